"""RESULTS.md: question, verdict, one table, one figure, what the defaults rest on, and what would change our mind."""

from __future__ import annotations

from .defaults import rests_on
from .methods import RANK_32
from .verdict import KEPT, MERGED_KEPT, best_duels, counterpart, duels, verdict
from .words import NOT_RUN, compared, percent, places

WORLDS = {
    "qwen": "The demo's pair: a VLM of Qwen2.5-VL's kind, and an expert of Qwen2's.",
    "far": "The same VLM, with an expert that was trained much longer: merging without training fails.",
    "llava": "Another ancestor, architecture and seed: LLaVA and Llama.",
}
TABLE = {  # what stands in the one table
    "Nothing trained": ("vlm", "task-arithmetic"),
    "Trained": (
        *("lora", "full", "full-drift", "merge-lora", "merge-lora-ancestor", "hold"),
        *("drift", "drift-ancestor", "drift-start-ancestor"),
    ),
    "Trained, keeping the VLM's own answers": (
        *("lora-keep", "full-keep", "full-drift-keep"),
        *("merge-lora-keep", "merge-lora-ancestor-keep", "drift-keep", "drift-ancestor-keep"),
        *("drift-guide-ancestor-keep", "merge-drift-ancestor-keep", "drift-start-keep", "drift-start-ancestor-keep"),
        "hold-ancestor-keep",
    ),
    "The same, with adapters of rank 32 instead of 8": tuple(RANK_32),
    "Trained, keeping by 960 images instead of 240": (
        *("lora-keep-more", "merge-lora-keep-more", "merge-lora-ancestor-keep-more"),
        *("drift-keep-more", "drift-ancestor-keep-more"),
        *("merge-drift-ancestor-keep-more", "drift-start-ancestor-keep-more", "hold-ancestor-keep-more"),
    ),
}


def one_page(results: dict, worlds: dict, figure: str, appendices: dict[str, str]) -> str:
    """The page's text.

    Args:
        results: of `collect`.
        worlds: key -> those of its worlds of which something has been run.
        figure: link to the figure.
        appendices: title -> link.
    """
    parts = [question(results), "## The verdict\n"]
    if not worlds:
        return "\n".join([*parts, "Nothing has been run yet."])
    parts += verdict(worlds)
    if other := counterpart(worlds):
        parts += [
            "\nIn points 2, 4 and 5 each way stands in the form that validation prefers, Δ from the VLM or from the "
            "ancestor. Two ways are *level* where the interval of their difference holds 0. "
            f"{by_chance(worlds)} The counterpart of these points:\n",
            *(f"- {sentence}" for sentence in other),
        ]
    parts += ["\n## The table\n", *table(results, worlds)]
    parts += [
        "\n## The task against perception\n",
        f"![The task against perception, five ways in each world]({figure})\n",
        "Up is better at the task, right is better at perception. An arrow leads from a way to the same way with "
        "keeping, where that has been run. Bars are 95 % intervals. DRIFT and merging have Δ from the ancestor.",
    ]
    if bullets := rests_on(results, worlds):
        parts += ["\n## What the defaults rest on\n", *bullets]
    parts += ["\n## What would change our mind\n", *change_our_mind(worlds)]
    parts += ["\n## The runs\n", runs(results)]
    parts += ["\nThe appendices, written by the same command:\n"]
    parts += [f"- [{title}]({link})" for title, link in appendices.items()]
    return "\n".join(parts)


def question(results: dict) -> str:
    return (
        "# What DRIFT with LoRA is worth\n\n"
        "Written by `python benchmarks/digits.py` from `results/digits.jsonl`; not edited by hand.\n\n"
        "## The question\n\n"
        "A VLM reads images and cannot calculate. A text model, the expert, calculates and sees nothing. Both come "
        "from one ancestor. You have a few samples that show the calculation over images. Which way makes the VLM "
        "calculate over images, and what does it lose?\n\n"
        "The models are small and the images are rows of real handwritten digits, in three worlds:\n\n"
        + "\n".join(f"- `{key}`: {WORLDS[key]}" for key in results["worlds"])
        + "\n\nFour exams are marked in percent. *The task* is calculation over images with two or three operations, "
        "as in the samples. *Longer chains* have four or five. *Perception* asks what stands in the image. *Text* asks "
        "for the calculation without an image. The *image mean* is the mean of the first three. Settings are chosen by "
        "it on validation digits, with as many candidates for every way. The appendix marks the rows that take another "
        "row's settings instead.\n\n"
        "The image mean was not the first criterion. At the start it was the mean of all four exams. By that one the "
        "first world's test results were seen, and DRIFT was level with its strongest rival. The image mean was added "
        "then, since the paper's benchmarks are all over images. The counterpart of the verdict goes by the mean of "
        "all four.\n\n"
        "Δ is the expert less the VLM, or the expert less the ancestor. *Keeping* holds the model to the VLM's own "
        "answers to unlabelled images.\n"
    )


def by_chance(worlds: dict) -> str:
    """How many of the differences by the image mean would look like some where there is none."""
    compared = sum(len(world["chosen by"]["images"]["duels"]) for world in worlds.values())
    return (
        f"An interval is at 95 %, and {compared} pairs are compared by the image mean. If no pair differed, about "
        f"{0.05 * compared:.0f} of them would still look better or worse."
    )


def table(results: dict, worlds: dict) -> list[str]:
    """Ways × worlds: the image mean, and in brackets perception."""
    lines = [
        f"The image mean, and in brackets perception, in percent on test digits. {results['seeds']} seeds, "
        f"{results['size']} samples an exam, 95 % intervals (Student's t over the seeds).\n",
        "| | " + " | ".join(f"`{key}`" for key in worlds) + " |",
        "|---" * (len(worlds) + 1) + "|",
    ]
    rows = {key: world["chosen by"]["images"]["rows"] for key, world in worlds.items()}
    best = {key: max(found, key=lambda way: found[way]["scores"]["images"][0]) for key, found in rows.items()}
    for title, ways in TABLE.items():
        lines.append(f"| *{title}* |" + " |" * len(worlds))
        for way in ways:
            cells = [cell(found.get(way), way == best[key]) for key, found in rows.items()]
            lines.append(f"| {results['titles'][way]} | {' | '.join(cells)} |")
    waiting: dict[tuple[str, ...], list[str]] = {}  # the rows that are missing -> in which worlds
    for key, found in rows.items():
        missing = tuple(results["titles"][way] for ways in TABLE.values() for way in ways if way not in found)
        waiting.setdefault(missing, []).append(f"`{key}`")
    waiting.pop((), None)
    lines.append(
        f"\nBold: the highest of a world. A row is shown when its tuning and all {results['seeds']} seeds are done. "
        "DRIFT that starts at a part of Δ, DRIFT with PEFT's start, and adapters of rank 32 were tried when all other "
        "rows had been seen."
    )
    lines += [
        f"\n{NOT_RUN.capitalize()} in {places(keys, rows)}: {'; '.join(titles)}." for titles, keys in waiting.items()
    ]
    return lines


def cell(row: dict | None, best: bool) -> str:
    if row is None:
        return NOT_RUN
    mean = percent(row["scores"]["images"])
    return f"{f'**{mean}**' if best else mean} ({percent(row['scores']['perception'])})"


def change_our_mind(worlds: dict) -> list[str]:
    """What would, and how much of it has been seen already."""
    merging = (
        "- **Merging first, with keeping.** If it does as well as DRIFT with keeping in every world, it is the simpler "
        "way and should be advised."
    )
    if found := best_duels(worlds, "images", KEPT, MERGED_KEPT):
        merging += f" DRIFT compared with it is {compared(found, worlds)}."
    lines = [
        "- **A real pair of models.** These weigh less than 2 MB each, and a small rank holds most of their Δ. What "
        "carries over is a comparison, not a number.",
        merging,
    ]
    if found := duels(worlds, "images", "drift-ancestor", "merge-lora-ancestor"):
        lines.append(
            "- **Experts that are far from the VLM.** If most pairs are like `far`, a small part of Δ should be merged "
            f"first. With Δ from the ancestor in both, DRIFT compared with that is {compared(found, worlds)}."
        )
    if found := duels(worlds, "images", "decoupled", "pull-to-zero"):
        lines.append(
            "- **A plain pull that does as well.** Compared with a pull to zero, which needs no expert, DRIFT's "
            f"decoupled form is {compared(found, worlds)}."
        )
    return lines


def runs(results: dict) -> str:
    missing = results["known_missing"]
    said = [
        f"{results['runs']} runs of the plan are done.",
        f"They took {results['hours']} hours, each on one core, in part beside other work.",
    ]
    if missing:
        said.append(
            f"At least {missing} more are planned and not run yet; `python benchmarks/digits.py` goes on with them. "
            "Tuning that is not complete decides nothing here."
        )
    else:
        said.append("No run of the plan is missing.")
    if others := results["not_shown"]:
        said.append(f"{others} runs of the file belong to earlier plans and are not shown.")
    return " ".join(said)
