"""What a prior holds, as a table of rich's and of HTML."""

from __future__ import annotations

from html import escape

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from ...arguments import shortened
from ...checkpoints import describe
from ..combine import formula

CAPTION = "captured energy at rank k; cosine of {cosine_of}: mean and lowest"


def prior_rows(summary: dict) -> tuple[list[str], list[list[str]]]:
    """Heads and cells of `prior_summary`, a row per layer and module kind; the last one is over all of them."""
    rank = summary["rank"]  # 0 where there are vectors alone, which are kept whole
    ranks = [k for k in summary["total"]["energy_by_rank"] if k < rank][-3:]
    heads = ["layer", "kind", "weights", "‖Δ‖/‖W‖", "cosine", "lowest"]
    heads += [f"k={k}" for k in (*ranks, rank) if k]
    heads += ["taken"] if summary["gates"] else []
    rows = []
    for row in [*summary["rows"], {"layer": "all", "modules": "", **summary["total"]}]:
        numbers = (row[key] for key in ("relative_norm", "mean_cosine", "cosine"))
        energies = [*(row["energy_by_rank"].get(k) for k in ranks), *([row["energy"]] if rank else [])]
        energies += [row["taken"]] if summary["gates"] else []
        cells = ["–" if row["layer"] is None else str(row["layer"]), row["modules"], str(row["weights"])]
        cells += ["–" if x is None else f"{x:.3f}" for x in numbers]
        rows.append(cells + ["–" if x is None else f"{x:.1%}".replace("100.0%", "100%") for x in energies])
    return heads, rows


def prior_table(summary: dict) -> Table:
    """`prior_summary` for the terminal."""
    heads, rows = prior_rows(summary)
    # As Text, since brackets and colons in a folder's name are no markup.
    title, caption = Text(prior_title(summary)), Text("\n".join([CAPTION.format_map(summary), *prior_notes(summary)]))
    # So narrow that 80 columns hold eleven of these.
    table = Table(*heads, title=title, caption=caption, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for column in table.columns:
        column.justify = "right"
    for cells in rows[:-1]:
        table.add_row(*cells)
    table.add_section()
    table.add_row(*rows[-1])
    return table


def prior_html(summary: dict) -> str:
    """`prior_summary` for a notebook: the verdict in words, and the table."""
    heads, rows = prior_rows(summary)
    words = " ".join(summary["verdict"][key] for key in ("distance", "merging", "rank"))
    head = "".join(f"<th>{escape(cell)}</th>" for cell in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>" for cells in rows)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    notes = "".join(f"<p>{escape(note)}</p>" for note in (CAPTION.format_map(summary), *prior_notes(summary)))
    return f"<p><b>{escape(prior_title(summary))}</b><br>{escape(words)}</p>{table}{notes}"


def prior_title(summary: dict) -> str:
    """What Δ is: expert − base, with their ids and revisions."""
    return f"Δ = {formula(summary)}"


def prior_notes(summary: dict) -> list[str]:
    """What else is to be known about a prior, a sentence each."""
    notes = []
    if summary["gates"]:
        taken, (least, most) = summary["total"]["taken"], gate_range(summary)
        notes.append(
            f"Gated: of what the prior held, {taken:.1%} of its energy is taken; the gates of its directions run from "
            f"{least:.2f} to {most:.2f}."
        )
    ranks = {w["rank"] for w in summary["weights"].values() if "rank" in w}
    if len(ranks) > 1:
        notes.append(f"The ranks of the weights run from {min(ranks)} to {max(ranks)}.")
    for name, stats in summary["weights"].items():
        if "rows" in stats:
            notes.append(f"{stats['rows']} of the {stats['shape'][0]} rows of {name} have a counterpart.")
    if names := summary["not_steered"]:
        notes.append(f"Δ is zero in {shortened(names, 3)}: not steered.")
    if missing := summary.get("without_counterpart"):
        notes.append(f"Not steered for want of a counterpart: {describe(missing)}.")
    return notes


def gate_range(summary: dict) -> tuple[float, float]:
    """The lowest and the highest gate of all."""
    return min(min(kind["least"]) for kind in summary["gates"]), max(max(kind["most"]) for kind in summary["gates"])
