"""The page of a prior: one HTML file that carries its style, script and numbers, and loads nothing."""

from __future__ import annotations

import contextlib
import json
import shlex
from html import escape
from pathlib import Path

from ...checkpoints import at_revision, claimed_output, write_output
from ...page import check_page, render
from .plot import draw_prior
from .tables import prior_notes, prior_title

TEMPLATE = Path(__file__).with_name("page.html")
GATES = """\
<h2>What the gates take</h2>
<p>A gate between 0 and 1 weighs each singular direction of the prior that this one was made of, the largest first.</p>
<div class="plots" id="gates" style="--least: 30rem"></div>"""
NEXT = """\
# Without training: the expert's Δ as an adapter of the VLM, as a first thing to compare with
drift-peft transplant --expert {expert} --base {base}{reference} -o untrained

# The VLM's own answers to your images, without labels: training then stays near them
drift-peft keep make --base {base} --images FOLDER -o keep.safetensors

# Training, in the loop that you have
model = get_peft_model(vlm, DriftConfig(prior="prior.safetensors", r=16, lora_alpha=32, task_type="CAUSAL_LM"))
keep(model, "keep.safetensors", processor)"""
_COLUMNS = ("relative_norm", "cosine", "energy", "rank", "delta_norm", "shape")


def write_report(
    summary: dict, plot: str | Path | None = None, html: str | Path | None = None, overwrite: bool = False
) -> None:
    """Write the figure of a prior (PNG, SVG or PDF, by its suffix), its page, or both.

    Raises:
        ImportError: the figure needs matplotlib, which is missing.
        ValueError: the figure's suffix is no format, or the page's is not .html.
        FileExistsError, IsADirectoryError, FileNotFoundError, OSError: an output could not be written.
    """
    outputs = {Path(path): example for path, example in ((plot, "prior.png"), (html, "prior.html")) if path is not None}
    with contextlib.ExitStack() as claims:
        for output, example in outputs.items():
            claims.enter_context(claimed_output(output, overwrite, example))
        if html is not None:
            check_page(html)
        contents = {}
        if plot is not None:
            contents[Path(plot)] = draw_prior(summary, Path(plot).suffix[1:].lower() or "png")
        if html is not None:
            contents[Path(html)] = render_page(summary).encode()
        for output, content in contents.items():
            write_output(output, content, overwrite)


def render_page(summary: dict) -> str:
    """`prior_summary` as an HTML page: the verdict, plots, what the gates take of it if there are gates, what each rank
    holds, a sortable table of the weights."""
    verdict, total = summary["verdict"], summary["total"]
    rank = f"rank {summary['rank']}" if summary["rank"] else ""  # vectors are kept whole
    expert = f"Expert {summary['expert']['id']}" if summary.get("expert") else ""
    facts = expert, f"base {summary['base']['id']}", rank, f"sha256 {summary['sha256'][:16]}"
    heading = [f"<span>{part}</span>" for part in escape(prior_title(summary)).replace(" − ", "\n−&nbsp;").split("\n")]
    tiles = {
        f"mean cosine of {summary['cosine_of']}": f"{verdict['mean_cosine']:.3f}" if verdict["level"] else "–",
        "relative norm ‖Δ‖/‖W‖": f"{total['relative_norm']:.3f}" if total["relative_norm"] else "–",
        **({f"captured energy at {rank}": f"{total['energy']:.1%}"} if rank else {}),
        "weights steered": str(total["weights"]),
    }
    fields = {
        "title": escape(prior_title(summary)),
        "heading": " ".join(heading),
        "facts": escape(", ".join(filter(None, facts))),
        "level": verdict["level"] or "unknown",
        "verdict": verdict["title"],
        **{key: escape(verdict[key]) for key in ("distance", "merging", "rank", "basis")},
        "tiles": "".join(f'<div class="card"><b>{value}</b>{name}</div>' for name, value in tiles.items()),
        "gates": GATES if summary["gates"] else "",
        "ranks": _rank_rows(summary),
        "next": _next_step(summary),
        "notes": "".join(f'<p class="note">{escape(note)}</p>' for note in prior_notes(summary)),
        "data": _data(summary),
    }
    return render(TEMPLATE, fields)


def _next_step(summary: dict) -> str:
    """Commands and Python for what comes after a prior, with the ids of the models that it was built from."""
    origins = {role: origin for role in ("expert", "base", "reference") if (origin := summary.get(role))}
    given = {role: shlex.quote(at_revision(of["id"], of["revision"])) for role, of in origins.items()}
    reference = f" --reference {given['reference']}" if "reference" in given else ""
    return escape(NEXT.format(**{"expert": "EXPERT", **given, "reference": reference}), quote=False)


def _rank_rows(summary: dict) -> str:
    groups = {kind["modules"]: kind["energy_by_rank"] for kind in summary["kinds"] if kind["energy_by_rank"]}
    if len(groups) != 1:
        groups["all"] = summary["total"]["energy_by_rank"]
    head = "".join(f'<th scope="col">{name}</th>' for name in ("rank", *groups))
    rows = [f"<thead><tr>{head}</tr></thead><tbody>"]
    for rank in summary["total"]["energy_by_rank"]:
        cells = "".join(
            f'<td style="--share: {energy[rank]:.1%}">{energy[rank]:.1%}</td>' for energy in groups.values()
        )
        rows.append(f"<tr><td>{rank}</td>{cells}</tr>")
    return "\n".join([*rows, "</tbody>"])


def _data(summary: dict) -> str:
    """What the script draws from, as JSON that cannot end its script element."""
    data = {
        "rank": summary["rank"],
        "cosine_of": summary["cosine_of"],
        "close": summary["verdict"]["close_from"],
        "far": summary["verdict"]["far_below"],
        "kinds": [kind["modules"] for kind in summary["kinds"]],
        "rows": summary["rows"],
        "projections": summary["projections"],
        "spectra": summary["spectra"],
        "gates": summary["gates"],
        "weights": [[name, *(w.get(key) for key in _COLUMNS)] for name, w in summary["weights"].items()],
    }
    return json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", r"\u003c")
