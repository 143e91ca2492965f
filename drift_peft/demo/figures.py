"""The demo's two pictures: accuracy with the adapters' way toward Δ, and six images with the models' answers.

Both are made to be read 830 pixels wide: names stand beside what they name, and colours are Okabe and Ito's, which
colour-blind eyes can tell apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .evaluate import MEASURES
from .world import CELL, LONGEST

ANSWERING = ("vlm", "swap", "lora", "swap-lora", "drift", "lora-keep", "drift-keep")  # whose answers are shown
RIGHT, WRONG = ("#0072b2", "✓"), ("#d55e00", "✗")
COLOURS = {  # of those that train; the others are grey
    "lora": "#0072b2",
    "lora-keep": "#56b4e9",
    "swap-lora": "#009e73",
    "drift": "#d55e00",
    "decoupled": "#cc79a7",
    "drift-keep": "#e69f00",
}
WIDTH, DPI = 8.3, 160  # inches; twice the pixels, for dense screens
LONGEST_ANSWER = 58  # characters that fit beside an image


def draw_results(result: dict, file: Path) -> None:
    """Accuracy bars for every method; below them the cosine of each adapter with Δ over the steps of its training."""
    titles = result["titles"]
    histories = {key: h for key, h in result["history"].items() if key != "swap-lora"}  # whose base holds all of Δ
    figure = Figure(figsize=(WIDTH, 1.2 + 0.24 * len(titles) + 2.4 * bool(histories)), layout="constrained")
    above, below = figure, None
    if histories:
        above, below = figure.subfigures(2, 1, height_ratios=(1 + 0.24 * len(titles), 2.4))
    for axes, name in zip(above.subplots(1, len(MEASURES), sharey=True), MEASURES, strict=True):
        shares = [100 * scores[name] for scores in result["scores"].values()]
        colours = [COLOURS.get(key, "#999999") for key in result["scores"]]
        axes.bar_label(axes.barh(list(titles.values()), shares, color=colours), fmt="%.0f", padding=2, fontsize=8)
        axes.set_title(MEASURES[name], fontsize=9)
        axes.set_xlim(0, 118)
        axes.set_xticks([0, 50, 100])
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    axes.invert_yaxis()
    above.suptitle(f"right answers in percent, {result['split']} digits, seed {result['seed']}", fontsize=9)
    if below is not None:
        axes = below.subplots()
        for key, history in histories.items():
            steps, cosines = [h["step"] for h in history], [h["alignment"] for h in history]
            axes.plot(steps, cosines, color=COLOURS[key], label=titles[key])
        axes.set_ylim(-0.05, 1.05)
        axes.set_xlabel("optimizer step", fontsize=9)
        axes.set_ylabel("cosine of adapter and Δ", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        label_ends(axes, gap=0.1)
    figure.savefig(file, dpi=DPI)


def label_ends(axes: Axes, gap: float) -> None:
    """Write each line's label beside its end, right of the axes, instead of a legend; call it when all is drawn.

    Args:
        gap: least distance of two labels, as a share of the axes' height.
    """
    lines = [line for line in axes.get_lines() if not line.get_label().startswith("_")]
    ends = [(line.get_xdata()[-1], line.get_ydata()[-1]) for line in lines]
    axes.get_ylim()  # makes the limits what they will be
    heights = [axes.transLimits.transform(axes.transScale.transform(end))[1] for end in ends]  # share of the axes
    for line, end, place in zip(lines, ends, spread(heights, gap), strict=True):
        axes.annotate(
            line.get_label(),
            end,
            xytext=(1.03, place),
            textcoords="axes fraction",
            va="center",
            fontsize=8,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "lw": 0.7, "color": line.get_color(), "relpos": (0, 0.5), "shrinkA": 1},
        )


def spread(places: Sequence[float], gap: float) -> list[float]:
    """The places moved as little as keeps neighbours `gap` apart, in their order, from 0 to 1 if they fit.

    Least squares: without i·gap the i-th place only has to be no lower than the one before, and pools of neighbours
    that are not so take their mean.
    """
    order = sorted(range(len(places)), key=places.__getitem__)
    pools: list[list[float]] = []
    for i, place in enumerate(order):
        pools.append([places[place] - i * gap])
        while len(pools) > 1 and fmean(pools[-2]) > fmean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    room = max(0.0, 1 - (len(places) - 1) * gap)
    level = [min(max(fmean(pool), 0.0), room) for pool in pools for _ in pool]
    moved = {place: level[i] + i * gap for i, place in enumerate(order)}
    return [moved[i] for i in range(len(places))]


def draw_samples(images: list, result: dict, file: Path) -> None:
    """The images of `result["examples"]`, each with the models' answers beside it, marked right or wrong."""
    keys = [key for key in ANSWERING if key in result["scores"]]
    names = max((len(result["titles"][key]) for key in keys), default=0)
    height = len(keys) + 2.5  # of an example in lines, with what is right above and room below
    figure = Figure(figsize=(WIDTH, 0.16 * height * len(images)), layout="constrained")
    panels = figure.subplots(len(images), 2, width_ratios=(1, 2.3), squeeze=False)
    for (picture, words), image, example in zip(panels, images, result["examples"], strict=True):
        picture.imshow(image, cmap="gray_r")
        picture.set_anchor("NW")
        picture.set_xlim(-0.5, CELL * LONGEST)  # the same scale for short and long rows
        picture.set_axis_off()
        words.set_axis_off()
        lines = [(f"  {'right':{names}}  {example['answer']}", "black")]
        for key in keys:
            colour, mark = RIGHT if example["right"][key] else WRONG
            answer = example["answers"][key]
            answer = answer if len(answer) <= LONGEST_ANSWER else f"{answer[: LONGEST_ANSWER - 1]}…"
            lines.append((f"{mark} {result['titles'][key]:{names}}  {answer}", colour))
        for i, (line, colour) in enumerate(lines):
            style = {"color": colour, "fontsize": 8, "family": "monospace", "parse_math": False, "va": "top"}
            words.text(0, 1 - i / height, line, transform=words.transAxes, **style)
    figure.savefig(file, dpi=DPI)
