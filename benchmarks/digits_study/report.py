"""RESULTS.md from the collected numbers: the answer in plain words first, then tables and figures."""

from __future__ import annotations

from pathlib import Path

from drift_peft.demo.evaluate import MEASURES

from .defaults import recommendation
from .figures import draw_frontier, draw_losses, draw_sweep
from .methods import ANCESTOR, COMPUTE, CONTROLS, KEPT, NF4, STARTS, TEXT, TRAINING, TRAINING_FREE, VARIANTS
from .plan import CRITERIA, SWEEPS
from .words import percent, plain_words, signed

HEADS = {**MEASURES, "images": "`images`", "all": "`all`"}
GROUPS = {
    "Nothing trained": TRAINING_FREE,
    "Trained": TRAINING | ANCESTOR | STARTS,
    "Kept near the VLM's own answers": KEPT,
    "Trained as long as keeping takes, settings as above": COMPUTE,
    "Kept, and trained on chains in text alone": TEXT,
    "Other scales, targets and norms of DRIFT": VARIANTS,
    "On a 4-bit base, settings as above": NF4,
    "Controls, settings as above": CONTROLS,
}


def write(results: dict, folder: Path, page: Path) -> None:
    """Draw the figures into `folder` and write `page`, which shows them."""
    folder.mkdir(parents=True, exist_ok=True)
    for picture in folder.glob("digits_*.png"):  # of an earlier report, which may have shown more
        picture.unlink()
    shown = page.parent.resolve()
    place = folder.resolve().relative_to(shown) if folder.resolve().is_relative_to(shown) else folder.resolve()
    worlds = {key: world for key, world in results["worlds"].items() if world["chosen by"]["images"]["rows"]}
    parts = [introduction(results), "## In plain words\n", *plain_words(results, worlds)]
    if worlds:
        parts += recommendation(results, worlds)
        draw_frontier(results, folder / "digits_frontier.png")
        parts += [
            "\n## Reasoning against perception\n",
            "One point for each way to make a model, with 95 % intervals; the dotted line joins those that no "
            f"other one beats in both.\n\n![Reasoning against perception]({place}/digits_frontier.png)\n",
        ]
    for key, world in worlds.items():
        parts += [f"\n## {world['title']} (`{key}`)\n", *tables(results, world)]
    if draw_losses(results, folder / "digits_losses.png"):
        parts += ["\n## Losses\n", f"![Training losses]({place}/digits_losses.png)\n"]
    parts += ["\n## One setting after the other\n"] if any(world["sweeps"] for world in worlds.values()) else []
    for name, sweep in SWEEPS.items():
        if draw_sweep(results, name, folder / f"digits_{name}.png"):
            parts += [f"\n### {sweep.title}\n\n![{sweep.title}]({place}/digits_{name}.png)\n"]
            parts += [
                line for world in worlds.values() if name in world["sweeps"] for line in swept(world, name, results)
            ]
    parts += ["\n## Merging at every λ\n", *merging(results, worlds)]
    parts += ["\n## What the tuning saw\n", *common_settings(results, worlds)]
    page.write_text("\n".join(parts).rstrip() + "\n", encoding="utf-8")


def introduction(results: dict) -> str:
    missing = results["known_missing"]
    state = f"{missing} more are planned and not run yet, and what rests on them is missing here" if missing else "all"
    if others := results["not_shown"]:
        state += f"; {others} of the file belong to earlier plans and are not shown"
    return (
        "# What DRIFT with LoRA is worth\n\n"
        "Written by `python benchmarks/digits.py` from `results/digits.jsonl`; not edited by hand. "
        f"{results['runs']} runs, {results['hours']} core hours in all ({state}).\n\n"
        "Small models on real handwritten digits, not 7B pairs: what carries over is the comparison, not the numbers. "
        "Every method gets the same samples (in full size 200, for 150 steps of 16, at rank 8), and as many "
        "candidates for its settings, chosen on validation digits; the tables show test digits, "
        f"{results['seeds']} seeds, {results['size']} samples an exam, with 95 % intervals (Student's t over the "
        "seeds, paired in comparisons).\n\n"
        + "\n".join(f"- `{key}`: {world['title']}. {ABOUT[key]}" for key, world in results["worlds"].items())
        + "\n\nExams, all in percent right: reasoning over images with 2-3 operations (the trained task) and 4-5 "
        "operations (longer than trained; 10 is guessing), perception of images, and reasoning in text. `images` is "
        "the mean of the first three, `all` that of the four.\n\n"
        "Everything is shown twice, with settings chosen by `images` (the paper's benchmarks are all of that kind) and "
        "by `all`, since the two ask for different models: text reasoning is had by going all the way to the expert, "
        "and perception by staying at home. `all` was the criterion from the start; `images` was added when the "
        "test results of the first world by `all` had been seen, where DRIFT was level with its strongest rival.\n\n"
        "`qwen` and `far` share their VLM and data, so LoRA and full fine-tuning are the same models there. Controls "
        "change the start of the adapter with the pull, and take DRIFT's settings.\n"
    )


ABOUT = {
    "qwen": "The demo's: the VLM reads digits and has never calculated from an image; the expert calculates in text.",
    "far": "The same VLM with an expert trained much longer and further from the base: merging without training fails.",
    "llava": "Another ancestor, architecture and seed: a square CLIP image and a Llama.",
}


# Tables


def tables(results: dict, world: dict) -> list[str]:
    lines = []
    for criterion in CRITERIA:
        lines.append(f"\n### Settings chosen by `{criterion}`\n")
        for title, group in GROUPS.items():
            rows = {key: row for key, row in world["chosen by"][criterion]["rows"].items() if key in group}
            lines += table(f"{title}", rows, results, criterion) if rows else []
    lines.append(
        "\n*: the smallest or largest candidate was chosen. absorbed: ⟨W − W_vlm, Δ⟩/‖Δ‖² of the whole Δ. Steps are "
        "timed, and memory is counted as growth of the resident set, with another run on the other core.\n"
    )
    return lines


def table(title: str, rows: dict, results: dict, criterion: str) -> list[str]:
    heads = (*HEADS.values(), f"`{criterion}` against LoRA", "settings", "absorbed", "ms a step", "MB")
    lines = [f"\n{title}:\n", f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for key, row in rows.items():
        cells = [percent(row["scores"][name]) for name in HEADS]
        cells.append(signed(row["against LoRA"][criterion]) if "against LoRA" in row else "")
        cells += [settings(row), f"{row.get('absorbed', 0):.2f}"]
        cells.append(f"{1000 * row['step_seconds']:.0f}" if "step_seconds" in row else "")
        cells.append(f"{row['peak_mb']:.0f}" if "peak_mb" in row else "")
        lines.append(f"| {results['titles'][key]} | {' | '.join(cells)} |")
    return lines


def swept(world: dict, name: str, results: dict) -> list[str]:
    lines = [f"\n{world['title']}, `images` (trained task / perception / text):\n"]
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
    lines = ["Validation digits, one seed: mean of the three exams over images / text. λ = 0 is the VLM as it is.\n"]
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
        "On validation digits, where two or more worlds have been tuned: the candidate with the best mean over "
        "the worlds, and by how much it falls short of the best candidate of a world at worst. A default is such "
        "a candidate.\n",
        "| | worlds | by `images` | mean | shortfall | by `all` | mean | shortfall |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method in TRAINING | ANCESTOR | KEPT | TEXT | STARTS | VARIANTS:
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
    named = {"drift_alpha": "a", "merged": "λ", "scale": "λ", "only_layers": "layers"}
    cells = []
    for key, value in row["settings"].items():
        value = f"{value:g}" if isinstance(value, float) else str(value)
        cells.append(f"{named.get(key, key)} {value}{'*' if key in row['edge'] else ''}")
    return ", ".join(cells)
