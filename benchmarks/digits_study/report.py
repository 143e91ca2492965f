"""The report from the collected numbers: one page, its figure, and the appendices beside the numbers."""

from __future__ import annotations

from pathlib import Path

from .appendices import appendices
from .figures import draw_frontier
from .page import one_page


def write(results: dict, folder: Path, page: Path) -> None:
    """Write `page`, and into `folder` its appendices and all figures."""
    folder.mkdir(parents=True, exist_ok=True)
    for earlier in (*folder.glob("digits_*.png"), *folder.glob("appendix_*.md")):  # which may have shown more
        earlier.unlink()
    shown = page.parent.resolve()
    place = folder.resolve().relative_to(shown) if folder.resolve().is_relative_to(shown) else folder.resolve()
    worlds = {key: world for key, world in results["worlds"].items() if world["chosen by"]["images"]["rows"]}
    if worlds:
        draw_frontier(results, folder / "digits_frontier.png")
    links = {}
    for name, (title, lines) in appendices(results, worlds, folder).items():
        head = f"# {title}\n\nAn appendix of RESULTS.md, written by the same command; not edited by hand.\n"
        (folder / name).write_text("\n".join([head, *lines]).rstrip() + "\n", encoding="utf-8")
        links[title] = (place / name).as_posix()
    text = one_page(results, worlds, (place / "digits_frontier.png").as_posix(), links)
    page.write_text(text.rstrip() + "\n", encoding="utf-8")
