"""The report's appendices: every comparison, row, sweep and candidate, in tables and figures."""

from __future__ import annotations

from pathlib import Path

from drift_peft.demo.evaluate import MEASURES

from .comparisons import comparisons
from .defaults import recommendation
from .figures import draw_losses, draw_sweep
from .methods import (
    ANCESTOR,
    COMPUTE,
    CONTROLS,
    KEPT,
    MORE,
    NF4,
    RANK_32,
    STARTS,
    TEXT,
    TRAINING,
    TRAINING_FREE,
    TUNED_CONTROLS,
    VARIANTS,
)
from .plan import CRITERIA, SWEEPS
from .words import MEANS, percent, signed

HEADS = {**MEASURES, **MEANS}
GROUPS = {
    "Nothing trained": TRAINING_FREE,
    "Trained": TRAINING | ANCESTOR | STARTS,
    "Kept near the VLM's own answers": KEPT,
    "Kept near the VLM's own answers, by adapters of rank 32": RANK_32,
    "Kept near the VLM's own answers to four times the images": MORE,
    "Trained on as many samples as keeping reads, settings as above": COMPUTE,
    "Kept, and trained on chains in text alone (settings chosen by the mean of text and perception)": TEXT,
    "Other scales, targets and norms of DRIFT": VARIANTS,
    "On a 4-bit VLM, settings as above": NF4,
    "Controls, settings as above": CONTROLS,
    "Controls, with settings of their own": TUNED_CONTROLS,
}


def appendices(results: dict, worlds: dict, folder: Path) -> dict[str, tuple[str, list[str]]]:
    """Draw their figures into `folder`; file name -> title and lines of each that has something to show."""
    found = {
        "appendix_comparisons.md": ("Every comparison", comparisons(results, worlds)),
        "appendix_tables.md": (
            "Every row",
            [EXPLAINED, *(line for k, w in worlds.items() for line in tables(k, w, results))],
        ),
        "appendix_sweeps.md": ("One setting after the other", sweeps(results, worlds, folder)),
        "appendix_tuning.md": ("What the tuning saw", [*merging(results, worlds), *common_settings(results, worlds)]),
    }
    return found if worlds else {}


EXPLAINED = (
    "Every row is shown with settings chosen by the image mean, as the paper's benchmarks are all over images, and by "
    "the mean of all four exams, since the two ask for different models: text reasoning is had by going all the way to "
    "the expert, and perception by staying near the VLM. The mean of all four was the criterion from the start; the "
    "image mean was added when the test results of the first world by the former had been seen, where DRIFT was level "
    "with its strongest rival. By the mean of all four, ways without keeping whose Δ is from the ancestor, adapters of "
    "rank 32 and ways that keep by 960 images are shown only where both criteria chose the same settings, and others "
    "were not run.\n\n"
    "Training has 200 samples in full size, 150 steps of 16, and rank 8 where none is named. `qwen` and `far` share "
    "their VLM and data, so LoRA and full fine-tuning are the same models there. Controls change the start of the "
    "adapter with the pull. In longer chains, 10 is guessing.\n"
)


def tables(key: str, world: dict, results: dict) -> list[str]:
    lines = [f"\n## {world['title']} (`{key}`)\n"]
    for criterion in CRITERIA:
        lines.append(f"\n### Settings chosen by the {MEANS[criterion]}\n")
        for title, group in GROUPS.items():
            rows = {key: row for key, row in world["chosen by"][criterion]["rows"].items() if key in group}
            lines += table(f"{title}", rows, results, criterion) if rows else []
    lines.append(
        "\n*: the smallest or largest candidate was chosen. absorbed: ⟨W − W_vlm, Δ⟩/‖Δ‖² of the whole Δ. Steps are "
        "timed, and memory is counted as growth of the resident set, with another run on the other core.\n"
    )
    return lines


def table(title: str, rows: dict, results: dict, criterion: str) -> list[str]:
    heads = (*HEADS.values(), f"{MEANS[criterion]} against LoRA", "settings", "absorbed", "ms a step", "MB")
    lines = [f"\n{title}:\n", f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for key, row in rows.items():
        cells = [percent(row["scores"][name]) for name in HEADS]
        cells.append(signed(row["against LoRA"][criterion]) if "against LoRA" in row else "")
        cells += [settings(row), f"{row.get('absorbed', 0):.2f}"]
        cells.append(f"{1000 * row['step_seconds']:.0f}" if "step_seconds" in row else "")
        cells.append(f"{row['peak_mb']:.0f}" if "peak_mb" in row else "")
        lines.append(f"| {results['titles'][key]} | {' | '.join(cells)} |")
    return lines


def sweeps(results: dict, worlds: dict, folder: Path) -> list[str]:
    lines = recommendation(results, worlds)
    if draw_losses(results, folder / "digits_losses.png"):
        lines += ["\n## Losses\n", "![Training losses](digits_losses.png)\n"]
    for name, sweep in SWEEPS.items():
        if draw_sweep(results, name, folder / f"digits_{name}.png"):
            lines += [f"\n## {sweep.title}\n\n![{sweep.title}](digits_{name}.png)\n"]
            lines += [
                line for world in worlds.values() if name in world["sweeps"] for line in swept(world, name, results)
            ]
    return lines


def swept(world: dict, name: str, results: dict) -> list[str]:
    lines = [f"\n{world['title']}, image mean (the task / perception / text):\n"]
    labels = list(SWEEPS[name].values)
    lines += ["| | " + " | ".join(labels) + " |", "|---" * (len(labels) + 1) + "|"]
    for method, values in world["sweeps"][name].items():
        cells = []
        for label in labels:
            found = values.get(label, {}).get("scores")
            exams = (
                [f"{100 * found[n][0]:.0f}" for n in ("2-3 operations", "perception", "text reasoning")]
                if found
                else []
            )
            cells.append(f"**{100 * found['images'][0]:.0f}** ({' / '.join(exams)})" if found else "")
        lines.append(f"| {results['titles'][method]} | {' | '.join(cells)} |")
    return lines


def merging(results: dict, worlds: dict) -> list[str]:
    """Task arithmetic and the exported prior at every λ: is merging broken in this world?"""
    lines = [
        "\n## Merging at every λ\n",
        "Validation digits, one seed: the image mean / text. λ = 0 is the VLM as it is.\n",
    ]
    for key, world in worlds.items():
        sweep = {m: world["merging"][m] for m in ("task-arithmetic", "export") if world["merging"].get(m)}
        if not sweep:
            continue
        scales = sorted({scale for found in sweep.values() for scale in found}, key=float)
        lines += [f"\n| `{key}`, λ | " + " | ".join(scales) + " |", "|---" * (len(scales) + 1) + "|"]
        for method, found in sweep.items():
            cells = [f"{100 * found[x][0]:.0f} / {100 * found[x][1]:.0f}" if x in found else "" for x in scales]
            lines.append(f"| {results['titles'][method]} | {' | '.join(cells)} |")
    return lines


def common_settings(results: dict, worlds: dict) -> list[str]:
    """For each method the one candidate that does best over all worlds, and what it costs against the best of each."""
    complete = [world["tuning"] for world in worlds.values() if world["tuning"]]
    lines = [
        "\n## The candidate that is best over the worlds\n",
        "On validation digits, where two or more worlds have been tuned: the candidate with the best mean over "
        "the worlds, and by how much it falls short of the best candidate of a world at worst. A default is such "
        "a candidate.\n",
        "| | worlds | by the image mean | mean | shortfall | by the mean of all four | mean | shortfall |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method in TRAINING | ANCESTOR | KEPT | RANK_32 | MORE | TEXT | STARTS | VARIANTS:
        grids_of = [tuning[method] for tuning in complete if method in tuning]
        if len(grids_of) < 2:
            continue
        cells = [str(len(grids_of))]
        for criterion in CRITERIA:
            grids = [{c: found[criterion] for c, found in grid.items()} for grid in grids_of]
            means = {c: sum(grid[c] for grid in grids) / len(grids) for c in grids[0]}
            best = max(means, key=means.get)
            short = max(max(grid.values()) - grid[best] for grid in grids)
            cells += [results["candidates"][best], f"{100 * means[best]:.1f}", f"{100 * short:.1f}"]
        lines.append(f"| {results['titles'][method]} | {' | '.join(cells)} |")
    return lines


def settings(row: dict) -> str:
    named = {"drift_alpha": "a", "drift_start": "λ", "merged": "λ", "scale": "λ", "only_layers": "layers"}
    cells = []
    for key, value in row["settings"].items():
        value = f"{value:g}" if isinstance(value, float) else str(value)
        cells.append(f"{named.get(key, key)} {value}{'*' if key in row['edge'] else ''}")
    return ", ".join(cells)
