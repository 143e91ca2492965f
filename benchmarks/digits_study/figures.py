"""The study's pictures: reasoning against perception, sweeps, and losses."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from .methods import COMPUTE, CONTROLS, KEPT, NF4, STARTS, TEXT, TRAINING_FREE, VARIANTS
from .plan import SWEEPS

COLOURS = {  # of what is followed through all figures
    "vlm": "black",
    "swap": "dimgray",
    "lora": "tab:blue",
    "full": "tab:cyan",
    "full-drift": "tab:olive",
    "merge-lora": "tab:orange",
    "drift": "tab:red",
    "decoupled": "tab:purple",
    "hold": "tab:green",
    "start": "tab:brown",
    "drift-ancestor": "hotpink",
    "merge-lora-ancestor": "gold",
    "lora-keep": "navy",
    "drift-keep": "darkred",
    "drift-ancestor-keep": "deeppink",
    "merge-lora-ancestor-keep": "darkgoldenrod",
}
GREYS = (  # what stays in the background
    (TRAINING_FREE, "merges without training", "darkgray"),
    (STARTS, "LoRA with PEFT's other starts", "tab:pink"),
    (VARIANTS, "DRIFT's other scales and targets", "mistyrose"),
    (KEPT | COMPUTE | TEXT, "others kept, or trained longer", "lightgreen"),
)
REASONING, PERCEPTION = "2-3 operations", "perception"


def draw_frontier(results: dict, file: Path) -> None:
    """Reasoning over images against perception, a point with 95 % intervals for each method; the frontier is drawn."""
    worlds = {key: world for key, world in results["worlds"].items() if rows_of(world)}
    figure = Figure(figsize=(5.5 * len(worlds) + 2.5, 5.5), layout="constrained")
    handles = {}
    for axes, world in zip(figure.subplots(1, len(worlds), squeeze=False)[0], worlds.values(), strict=True):
        points = {}
        for key, row in rows_of(world).items():
            if key in CONTROLS or key in NF4:
                continue
            (x, *xs), (y, *ys) = ([100 * v for v in row["scores"][name]] for name in (PERCEPTION, REASONING))
            points[key] = (x, y)
            title, colour = results["titles"][key], COLOURS.get(key)
            if colour is None:
                title, colour = next(group for keys, *group in GREYS if key in keys)
            bars = {"xerr": [[x - xs[0]], [xs[1] - x]], "yerr": [[y - ys[0]], [ys[1] - y]]}
            handles[title] = axes.errorbar(x, y, **bars, fmt="o", ms=6 if key in COLOURS else 4, color=colour, lw=1)
        axes.plot(*zip(*frontier(points.values()), strict=True), color="gray", linestyle=":", zorder=0)
        axes.set_title(world["title"])
        axes.set_xlabel("perception, % right")
        axes.set_ylabel("reasoning over images (2-3 operations), % right")
        axes.set_xlim(-3, 103)
        axes.set_ylim(-3, 103)
    figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False)
    figure.savefig(file, dpi=100)


def frontier(points) -> list[tuple[float, float]]:
    """The points that no other one beats in both, from left to right."""
    points = set(points)
    kept = [(x, y) for x, y in points if not any(a >= x and b >= y and (a, b) != (x, y) for a, b in points)]
    return sorted(kept)


def rows_of(world: dict) -> dict:
    """The rows whose settings were chosen by the exams over images."""
    return world["chosen by"]["images"]["rows"]


def draw_sweep(results: dict, name: str, file: Path) -> bool:
    """A sweep's four exams over its values, a row of panels per world. False if nothing of it has been run."""
    worlds = {k: w for k, w in results["worlds"].items() if name in w["sweeps"]}
    if not worlds:
        return False
    exams = ("2-3 operations", "perception", "text reasoning", "images")
    figure = Figure(figsize=(4.2 * len(exams), 3.4 * len(worlds)), layout="constrained")
    panels = figure.subplots(len(worlds), len(exams), squeeze=False)
    for line, world in zip(panels, worlds.values(), strict=True):
        for axes, exam in zip(line, exams, strict=True):
            for method, values in world["sweeps"][name].items():
                labels = [label for label in SWEEPS[name].values if label in values]
                middle, low, high = zip(*(values[label]["scores"][exam] for label in labels), strict=True)
                places = [list(SWEEPS[name].values).index(label) for label in labels]
                colour = COLOURS.get(method)
                axes.plot(places, [100 * v for v in middle], "o-", color=colour, label=results["titles"][method])
                axes.fill_between(places, [100 * v for v in low], [100 * v for v in high], color=colour, alpha=0.15)
            axes.set_xticks(range(len(SWEEPS[name].values)), list(SWEEPS[name].values), fontsize=8)
            axes.set_title(f"{world['title']}: {exam}", fontsize=9)
        line[0].set_ylabel("% right")
    panels[0][-1].legend(fontsize=7)
    figure.supxlabel(SWEEPS[name].title, fontsize=10)
    figure.savefig(file, dpi=90)
    return True


def draw_losses(results: dict, file: Path) -> bool:
    """Training loss by tenths of the training, for the methods that are followed. False if nothing was trained."""
    worlds = {k: w for k, w in results["worlds"].items() if any("loss" in row for row in rows_of(w).values())}
    if not worlds:
        return False
    figure = Figure(figsize=(5 * len(worlds), 3.6), layout="constrained")
    panels = figure.subplots(1, len(worlds), squeeze=False)[0]
    for axes, world in zip(panels, worlds.values(), strict=True):
        for key, colour in COLOURS.items():
            if "loss" in rows_of(world).get(key, {}):
                loss = rows_of(world)[key]["loss"]
                axes.plot(range(1, len(loss) + 1), loss, color=colour, label=results["titles"][key])
        axes.set_yscale("log")
        axes.set_title(world["title"])
        axes.set_xlabel("tenth of the training")
    panels[0].set_ylabel("training loss")
    panels[-1].legend(fontsize=7)
    figure.savefig(file, dpi=90)
    return True
