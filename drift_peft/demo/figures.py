"""The demo's two pictures: accuracy with the adapters' way toward Δ, and six images with the models' answers."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from .evaluate import MEASURES
from .world import CELL, LONGEST

ANSWERING = ("vlm", "swap", "lora", "swap-lora", "drift", "decoupled")  # whose answers are shown under an image


def draw_results(result: dict, file: Path) -> None:
    """Accuracy bars for every method; below them the cosine of each adapter with Δ over the steps of its training."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    bars, lines = figure.subplots(2, 1, height_ratios=(3, 2))
    width = 0.85 / len(result["scores"])
    for i, (key, scores) in enumerate(result["scores"].items()):
        places = [group + (i - (len(result["scores"]) - 1) / 2) * width for group in range(len(MEASURES))]
        bars.bar(places, [scores[name] for name in MEASURES], width, color=f"C{i}", label=result["titles"][key])
        history = result["history"].get(key)
        if history and key != "swap-lora":  # whose base holds all of Δ already
            steps, cosines = [h["step"] for h in history], [h["alignment"] for h in history]
            lines.plot(steps, cosines, color=f"C{i}", label=result["titles"][key])
    bars.set_title(f"Held-out digits, seed {result['seed']}")
    bars.set_xticks(range(len(MEASURES)), MEASURES)
    bars.set_ylabel("share of right answers")
    bars.set_ylim(0, 1)
    bars.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    lines.set_xlabel("optimizer step")
    lines.set_ylabel("cosine of the adapter with Δ")
    figure.savefig(file, dpi=120)


def draw_samples(images: list, result: dict, file: Path) -> None:
    """The images of ``result["examples"]`` with the models' answers, green where right."""
    keys = [key for key in ANSWERING if key in result["scores"]]
    rows = (len(images) + 1) // 2
    figure = Figure(figsize=(13, rows * (1.1 + 0.2 * len(keys))))
    figure.subplots_adjust(left=0.02, right=0.98, top=0.93, bottom=0.17, hspace=1.2)
    for axes, image, example in zip(figure.subplots(rows, 2).flat, images, result["examples"], strict=True):
        axes.imshow(image, cmap="gray_r")
        axes.set_anchor("SW")
        axes.set_xlim(-0.5, CELL * LONGEST)  # the same scale for short and long rows
        axes.set_axis_off()
        axes.set_title(f"right: {example['answer']}", loc="left", fontsize=9, family="monospace")
        for i, key in enumerate(keys):
            axes.annotate(
                f"{result['titles'][key]}: {example['answers'][key]}",
                (0, 0),
                xytext=(0, -14 - 12 * i),
                xycoords="axes fraction",
                textcoords="offset points",
                fontsize=8,
                family="monospace",
                color="tab:green" if example["right"][key] else "tab:red",
                parse_math=False,
            )
    figure.savefig(file, dpi=120)
