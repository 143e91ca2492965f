"""The contact sheet of a keep set: one HTML file with its pictures, questions and answers, which loads nothing."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoints import claimed_output, shown, write_output
from ..page import check_page, render
from .file import KeepSet, data_address
from .summary import CAPTION, entropy, keep_rows, keep_summary

if TYPE_CHECKING:
    from PIL.Image import Image

    from .answers import Sample

TEMPLATE = Path(__file__).with_name("page.html")
SIDE = 320  # pixels of a picture on the page


def write_page(keep_set: KeepSet, html: str | Path, overwrite: bool = False) -> None:
    """Write the contact sheet of a keep set.

    Raises:
        ValueError: the page's name does not end in .html.
        FileExistsError, IsADirectoryError, FileNotFoundError, OSError: it could not be written.
    """
    output = Path(html)
    check_page(output)
    with claimed_output(output, overwrite, example="keep.html"):
        write_output(output, render_page(keep_set).encode(), overwrite)


def render_page(keep_set: KeepSet) -> str:
    """The contact sheet as HTML: the numbers of each kind of question, then its samples."""
    summary = keep_summary(keep_set)
    kinds = [sample.kind for sample in keep_set.unpictured()]
    sheets = []
    for i, kind in enumerate(summary["kinds"]):
        cards = "\n".join(_card(keep_set[j]) for j, other in enumerate(kinds) if other == kind)
        sheets.append(f'<h2 id="kind-{i}">{escape(kind)}</h2>\n<section class="sheet">\n{cards}\n</section>')
    heads, rows = keep_rows(summary)
    facts = f"{len(kinds)} answers about {summary['images']} images; {CAPTION}; sha256 {summary['sha256'][:16]}"
    fields = {
        "title": escape(f"Keep set of {shown(summary['vlm']['id'])}"),
        "facts": escape(facts),
        "head": "".join(f'<th scope="col">{head}</th>' for head in heads),
        "rows": "\n".join(f"<tr>{_cells(cells, i, last=i + 1 == len(rows))}</tr>" for i, cells in enumerate(rows)),
        "sheets": "\n".join(sheets),
    }
    return render(TEMPLATE, fields)


def _cells(cells: list[str], i: int, last: bool) -> str:
    """A row of the table, whose kind leads to its samples."""
    kind, *numbers = map(escape, cells)
    kind = kind if last else f'<a href="#kind-{i}">{kind}</a>'
    return "".join(f"<td>{cell}</td>" for cell in (kind, *numbers))


def _card(sample: Sample) -> str:
    unsure = entropy(sample.top_logprobs.double()).mean().item()
    return (
        f'<article><img alt="" loading="lazy" src="{_thumbnail(sample.image)}"><div>'
        f'<p class="question">{escape(sample.question)}</p><p class="answer">{escape(sample.answer) or "–"}</p>'
        f'<p class="muted">{len(sample.tokens)} tokens, entropy {unsure:.2f}</p></div></article>'
    )


def _thumbnail(image: Image) -> str:
    image.thumbnail((SIDE, SIDE))
    return data_address(image, "JPEG", quality=80)
