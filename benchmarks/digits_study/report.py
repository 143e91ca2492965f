"""RESULTS.md from the collected numbers: the answer in plain words first, then tables and figures."""

from __future__ import annotations

from pathlib import Path

from drift_peft.demo.evaluate import MEASURES

from .collect import DUELS
from .figures import draw_frontier, draw_losses, draw_sweep
from .methods import CONTROLS, NF4, STARTS, TRAINING, TRAINING_FREE, VARIANTS
from .plan import SWEEPS

HEADS = {**MEASURES, "mean": "mean"}
GROUPS = {
    "Nothing trained": TRAINING_FREE,
    "Trained": TRAINING | STARTS,
    "Other scales, targets and norms of DRIFT": VARIANTS,
    "On a 4-bit base, settings as above": NF4,
    "Controls, settings as above": CONTROLS,
}
OURS = ("drift", "decoupled", "hold", "full-drift", *VARIANTS)
WORDS = {"2-3 operations": "the trained task", "4-5 operations": "longer chains", "text reasoning": "reasoning in text"}


def write(results: dict, folder: Path, page: Path) -> None:
    """Draw the figures into `folder` and write `page`, which shows them."""
    folder.mkdir(parents=True, exist_ok=True)
    shown = page.parent.resolve()
    place = folder.resolve().relative_to(shown) if folder.resolve().is_relative_to(shown) else folder.resolve()
    worlds = {key: world for key, world in results["worlds"].items() if world["rows"]}
    parts = [introduction(results), "## In plain words\n", *plain_words(results, worlds)]
    if worlds:
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
                table for world in worlds.values() if name in world["sweeps"] for table in swept(world, name, results)
            ]
    parts += ["\n## Merging at every λ\n", *merging(results, worlds)]
    parts += ["\n## What the tuning saw\n", *common_settings(results, worlds)]
    page.write_text("\n".join(parts).rstrip() + "\n", encoding="utf-8")


def introduction(results: dict) -> str:
    missing = results["known_missing"]
    state = f"{missing} more are planned and not run yet, and what rests on them is missing here" if missing else "all"
    return (
        "# What DRIFT with LoRA is worth\n\n"
        "Written by `python benchmarks/digits.py` from `results/digits.jsonl`; not edited by hand. "
        f"{results['runs']} runs, {results['hours']} hours of one CPU core each ({state}).\n\n"
        "Small models on real handwritten digits, not 7B pairs: what carries over is the comparison, not the numbers. "
        "Every method gets the same samples (200, for 150 steps of 16, rank 8), and as many candidates for its "
        "settings, chosen on validation digits by the mean of the four exams; the tables show test digits, "
        f"{results['seeds']} seeds, {results['size']} samples an exam, with 95 % intervals (bootstrap over seeds and "
        "samples, paired in comparisons).\n\n"
        + "\n".join(f"- `{key}`: {world['title']}. {ABOUT[key]}" for key, world in results["worlds"].items())
        + "\n\nExams, all in percent right: reasoning over images with 2-3 operations (the trained task) and 4-5 "
        "operations (longer than trained; 10 is guessing), perception of images, and reasoning in text.\n"
    )


ABOUT = {
    "qwen": "The demo's: the VLM reads digits and has never calculated from an image; the expert calculates in text.",
    "far": "The same VLM with an expert trained much longer and further from the base: merging is broken.",
    "llava": "Another ancestor, architecture and seed: a square CLIP image and a Llama.",
}


# In plain words


def plain_words(results: dict, worlds: dict) -> list[str]:
    if not worlds:
        return ["Nothing has been run yet.\n"]
    lines = [
        "**What beats DRIFT** (inside the adapter, the better of `drift` and `decoupled`), by the mean of the exams:\n"
    ]
    lines += [f"- `{key}`: {beaten_by(results, world)}" for key, world in worlds.items()]
    lines += ["\n**Against plain LoRA**, points and 95 % interval:\n"]
    for key, world in worlds.items():
        for method in ("drift", "decoupled", "hold"):
            if against := world["rows"].get(method, {}).get("against LoRA"):
                lines.append(f"- `{key}`, {results['titles'][method]}: {gains(against)}")
    lines += ["\n**Pair by pair**, the first less the second, mean of the exams:\n", *duels(results, worlds)]
    return lines


def beaten_by(results: dict, world: dict) -> str:
    rows = world["rows"]
    mine = [key for key in ("drift", "decoupled") if key in rows]
    if not mine:
        return "not run yet."
    best = max(mine, key=lambda key: rows[key]["scores"]["mean"][0])
    name = f"{results['titles'][best]} ({percent(rows[best]['scores']['mean'])})"
    clear, unclear = [], []
    for key, lead in world["leads"][best].items():
        if key not in (*mine, *VARIANTS, *CONTROLS, *NF4) and lead[0] > 0:
            (clear if lead[1] > 0 else unclear).append((lead[0], f"{results['titles'][key]} by {signed(lead)}"))
    said = [text for _, text in sorted(clear, reverse=True)]
    close = [text for _, text in sorted(unclear, reverse=True)]
    sentence = f"{'; '.join(said)} beat {name}." if said else f"nothing clearly beats {name}."
    return sentence + (f" Ahead within the noise: {'; '.join(close)}." if close else "")


def gains(against: dict) -> str:
    parts = [f"mean {signed(against['mean'])}"]
    for name in MEASURES:
        _, low, high = against[name]
        verdict = "better" if low > 0 else "worse" if high < 0 else "no clear difference"
        parts.append(f"{WORDS.get(name, name)} {signed(against[name])} ({verdict})")
    return "; ".join(parts) + "."


def duels(results: dict, worlds: dict) -> list[str]:
    lines = ["| | " + " | ".join(f"`{key}`" for key in worlds) + " |", "|---" * (len(worlds) + 1) + "|"]
    for first, second, question in DUELS:
        cells = [
            signed(found) if (found := world["duels"].get(f"{first} {second}")) else "" for world in worlds.values()
        ]
        if any(cells):
            titles = f"{results['titles'][first]} − {results['titles'][second]}"
            lines.append(f"| {question} {titles} | " + " | ".join(cells) + " |")
    return lines


# Tables


def tables(results: dict, world: dict) -> list[str]:
    lines = []
    for title, group in GROUPS.items():
        rows = [(key, world["rows"][key]) for key in group if key in world["rows"]]
        if not rows:
            continue
        lines += [
            f"\n{title}:\n",
            "| | " + " | ".join(HEADS.values()) + " | mean against LoRA | settings | absorbed | ms a step | MB |",
        ]
        lines.append("|---" * (len(HEADS) + 6) + "|")
        for key, row in rows:
            cells = [percent(row["scores"][name]) for name in HEADS]
            against = signed(row["against LoRA"]["mean"]) if "against LoRA" in row else ""
            step = f"{1000 * row['step_seconds']:.0f}" if "step_seconds" in row else ""
            lines.append(
                f"| {results['titles'][key]} | {' | '.join(cells)} | {against} | {settings(row)} | "
                f"{row.get('absorbed', 0):.2f} | {step} | {row.get('peak_mb', 0):.0f} |"
            )
    lines.append(
        "\n*: the smallest or largest candidate was chosen. absorbed: ⟨W − W_vlm, Δ⟩/‖Δ‖² of the whole Δ. Steps are "
        "timed, and memory is counted as growth of the resident set, with another run on the other core.\n"
    )
    return lines


def swept(world: dict, name: str, results: dict) -> list[str]:
    lines = [f"\n{world['title']}, mean of the exams (trained task / perception / text):\n"]
    labels = list(SWEEPS[name].values)
    lines += ["| | " + " | ".join(labels) + " |", "|---" * (len(labels) + 1) + "|"]
    for method, values in world["sweeps"][name].items():
        cells = []
        for label in labels:
            if label in values:
                found = values[label]["scores"]
                three = " / ".join(
                    f"{100 * found[n][0]:.0f}" for n in ("2-3 operations", "perception", "text reasoning")
                )
                cells.append(f"**{100 * found['mean'][0]:.0f}** ({three})")
            else:
                cells.append("")
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
        f"On validation digits, over {len(complete)} worlds: the candidate with the best mean, and by how much it "
        "falls short of the best candidate of a world at worst. A method with a small shortfall can have a default.\n",
        "| | candidate | mean | shortfall at worst | spread over the candidates |",
        "|---|---|---|---|---|",
    ]
    for method in TRAINING | STARTS | VARIANTS:
        if not complete or not all(method in tuning for tuning in complete):
            continue
        grids = [tuning[method] for tuning in complete]
        means = {c: sum(grid[c] for grid in grids) / len(grids) for c in grids[0]}
        best = max(means, key=means.get)
        short = max(max(grid.values()) - grid[best] for grid in grids)
        spread = max(means.values()) - min(means.values())
        lines.append(
            f"| {results['titles'][method]} | {results['candidates'][best]} | {100 * means[best]:.1f} | "
            f"{100 * short:.1f} | {100 * spread:.1f} |"
        )
    return lines


def percent(found: list[float]) -> str:
    return f"{100 * found[0]:.0f} ± {50 * (found[2] - found[1]):.0f}"


def signed(found: list[float]) -> str:
    return f"{100 * found[0]:+.1f} [{100 * found[1]:+.1f}, {100 * found[2]:+.1f}]"


def settings(row: dict) -> str:
    named = {"drift_alpha": "a", "merged": "λ", "scale": "λ", "only_layers": "layers"}
    cells = []
    for key, value in row["settings"].items():
        value = f"{value:g}" if isinstance(value, float) else str(value)
        cells.append(f"{named.get(key, key)} {value}{'*' if key in row['edge'] else ''}")
    return ", ".join(cells)
