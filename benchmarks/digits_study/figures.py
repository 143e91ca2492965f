"""The study's pictures: the task against perception, sweeps, and losses.

Made to be read 830 pixels wide: the same axes everywhere, names beside what they name, Okabe and Ito's colours, which
colour-blind eyes can tell apart.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from drift_peft.demo.figures import DPI, WIDTH, label_ends

from .plan import SWEEPS

COLOURS = {  # of a way, whatever its Δ is taken from and whether it keeps
    "vlm": "#000000",
    "lora": "#0072b2",
    "full": "#56b4e9",
    "merge-lora": "#e69f00",
    "full-drift": "#cc79a7",
    "drift": "#d55e00",
    "decoupled": "#009e73",
    "hold": "#777777",
}
NAMES = {
    "lora": "LoRA",
    "full": "full fine-tuning",
    "merge-lora": "merged, then LoRA",
    "full-drift": "full DRIFT",
    "drift": "DRIFT",
    "decoupled": "DRIFT, decoupled",
    "hold": "merged, then held LoRA",
}
FIVE = {  # the points of the one figure
    "vlm": "VLM",
    "lora": "LoRA",
    "full-drift": "full DRIFT,\nas published",
    "merge-lora-ancestor": "merged,\nthen LoRA",
    "drift-ancestor": "DRIFT",
}
SIDES = (  # of a point, where its label may stand: offset in points, and how it is aligned there
    *((7, 0, "left", "center"), (-7, 0, "right", "center"), (0, 7, "center", "bottom"), (0, -7, "center", "top")),
    *((6, 6, "left", "bottom"), (-6, 6, "right", "bottom"), (6, -6, "left", "top"), (-6, -6, "right", "top")),
    *((14, 14, "left", "bottom"), (-14, 14, "right", "bottom"), (14, -14, "left", "top"), (-14, -14, "right", "top")),
)
TASK, PERCEPTION = "2-3 operations", "perception"


def draw_frontier(results: dict, file: Path) -> None:
    """The task against perception, five ways in each world with 95 % intervals, and where keeping takes them."""
    worlds = {key: world for key, world in results["worlds"].items() if rows_of(world)}
    figure = Figure(figsize=(WIDTH, 0.9 + 2.5 * 3 / max(3, len(worlds))), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, len(worlds), squeeze=False, sharex=True, sharey=True)[0]
    drawn = []
    for axes, (key, world) in zip(panels, worlds.items(), strict=True):
        rows, points = rows_of(world), {}
        for way in (way for way in FIVE if way in rows):
            colour = COLOURS[way.removesuffix("-ancestor")]
            points[way] = put(axes, rows[way], colour)
            if (kept := f"{way}-keep") in rows:
                points[kept] = put(axes, rows[kept], colour)
                arrow = {"arrowstyle": "->", "color": colour, "lw": 1.2, "shrinkA": 4, "shrinkB": 4}
                axes.annotate("", points[kept], points[way], arrowprops=arrow)
        axes.plot(*zip(*frontier(points.values()), strict=True), color="gray", linestyle=":", lw=1, zorder=0)
        axes.set_title(f"{key}: {world['title']}", fontsize=9)
        axes.set(xlim=(-3, 112), ylim=(-3, 109), xticks=range(0, 101, 25), yticks=range(0, 101, 25))
        plain(axes)
        drawn.append((axes, points))
    figure.supxlabel("perception, % right", fontsize=9)
    panels[0].set_ylabel("the task, % right", fontsize=9)
    figure.draw_without_rendering()  # now everything has its place
    for axes, points in drawn:
        arrows = [(points[way], points[f"{way}-keep"]) for way in FIVE if f"{way}-keep" in points]
        label_points(axes, {FIVE[way]: points[way] for way in FIVE if way in points}, arrows)
    figure.savefig(file)


def put(axes: Axes, row: dict, colour: str) -> tuple[float, float]:
    """A row as a point with its intervals."""
    (x, *xs), (y, *ys) = ([100 * v for v in row["scores"][name]] for name in (PERCEPTION, TASK))
    bars = {"xerr": [[x - xs[0]], [xs[1] - x]], "yerr": [[y - ys[0]], [ys[1] - y]]}
    axes.errorbar(x, y, **bars, fmt="o", ms=5, color=colour, lw=1)
    return x, y


def label_points(axes: Axes, labels: dict[str, tuple[float, float]], arrows: list[tuple]) -> None:
    """Write each label beside its point, on the first side where it meets no bar, no arrow and no other label."""
    ends = [axes.transData.transform(arrow) for arrow in arrows]
    along_arrows = [Bbox([at, at]).padded(1) for arrow in ends for at in np.linspace(*arrow, num=50)]
    taken = along_arrows + [
        Bbox(segment).padded(3)
        for bars in axes.collections
        for segment in map(axes.transData.transform, bars.get_segments())
    ]
    for text, point in labels.items():
        for x, y, across, along in SIDES:
            at = {"xytext": (x, y), "textcoords": "offset points", "ha": across, "va": along}
            label = axes.annotate(text, point, **at, fontsize=8, linespacing=1)
            box = label.get_window_extent()
            corners = (axes.bbox.contains(box.x0, box.y0), axes.bbox.contains(box.x1, box.y1))
            if all(corners) and not any(box.overlaps(other) for other in taken):
                break
            if (x, y, across, along) != SIDES[-1]:
                label.remove()
        taken.append(box.padded(6))


def frontier(points) -> list[tuple[float, float]]:
    """The points that no other one beats in both, from left to right."""
    points = set(points)
    kept = [(x, y) for x, y in points if not any(a >= x and b >= y and (a, b) != (x, y) for a, b in points)]
    return sorted(kept)


def rows_of(world: dict) -> dict:
    """The rows whose settings were chosen by the image mean."""
    return world["chosen by"]["images"]["rows"]


def plain(axes: Axes) -> None:
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def style(method: str) -> dict:
    """A line's: dashed with Δ from the ancestor, squares with keeping."""
    kept, ancestor = method.endswith("-keep"), "-ancestor" in method
    way = method.removesuffix("-keep").removesuffix("-ancestor")
    label = NAMES[way] + kept * ", keeping" + ancestor * "\nΔ from the ancestor"
    look = {"color": COLOURS[way], "marker": "s" if kept else "o", "ls": "--" if ancestor else "-"}
    return {"label": label, "ms": 3.5, "lw": 1.3, **look}


def name_ends(axes: Axes, line: float = 0.1) -> None:
    """Name each line at its end; `line` is the height of a line of text, as a share of the axes'."""
    lines = max(label.count("\n") + 1 for label in (drawn.get_label() for drawn in axes.get_lines()))
    label_ends(axes, gap=line * lines)


def draw_sweep(results: dict, name: str, file: Path) -> bool:
    """A sweep's exams over its values, a row of panels per world, in percent. False if nothing of it has been run."""
    worlds = {k: w for k, w in results["worlds"].items() if name in w["sweeps"]}
    if not worlds:
        return False
    exams = {TASK: "the task", PERCEPTION: "perception", "text reasoning": "text", "images": "image mean"}
    labels = list(SWEEPS[name].values)
    slanted = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"} if max(map(len, labels)) > 4 else {}
    figure = Figure(figsize=(WIDTH, 1.8 * len(worlds) + 0.5 + bool(slanted)), dpi=DPI, layout="constrained")
    panels = figure.subplots(len(worlds), len(exams), squeeze=False, sharex=True, sharey=True)
    for line, (key, world) in zip(panels, worlds.items(), strict=True):
        for axes, exam in zip(line, exams, strict=True):
            for method, values in world["sweeps"][name].items():
                shown = [label for label in labels if label in values]
                middle, low, high = zip(*(values[label]["scores"][exam] for label in shown), strict=True)
                places, look = [labels.index(label) for label in shown], style(method)
                axes.plot(places, [100 * v for v in middle], **look)
                axes.fill_between(
                    places, [100 * v for v in low], [100 * v for v in high], color=look["color"], alpha=0.15
                )
            axes.set(ylim=(-3, 103), yticks=range(0, 101, 25), xlim=(-0.3, len(labels) - 0.7))
            axes.set_xticks(range(len(labels)), labels, **slanted)
            plain(axes)
        line[0].set_ylabel(f"{key}, % right", fontsize=9)
        name_ends(line[-1])
    for axes, title in zip(panels[0], exams.values(), strict=True):
        axes.set_title(title, fontsize=9)
    figure.supxlabel(SWEEPS[name].title, fontsize=9)
    figure.savefig(file)
    return True


def draw_losses(results: dict, file: Path) -> bool:
    """Training loss by tenths of the training, of the ways that every world has. False if nothing was trained."""
    worlds = {k: w for k, w in results["worlds"].items() if any("loss" in row for row in rows_of(w).values())}
    if not worlds:
        return False
    ways = [key for key in COLOURS if all("loss" in rows_of(world).get(key, {}) for world in worlds.values())]
    figure = Figure(figsize=(WIDTH, 2.9), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, len(worlds), squeeze=False, sharey=True)[0]
    for axes, (key, world) in zip(panels, worlds.items(), strict=True):
        for way in ways:
            loss = rows_of(world)[way]["loss"]
            axes.plot(range(1, len(loss) + 1), loss, **style(way))
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_title(key, fontsize=9)
        plain(axes)
    figure.supxlabel("tenth of the training", fontsize=9)
    panels[0].set_ylabel("training loss", fontsize=9)
    name_ends(panels[-1], 0.08)
    figure.savefig(file)
    return True
