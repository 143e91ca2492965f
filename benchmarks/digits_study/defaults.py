"""The library's defaults: what they rest on, and how much depends on each of them."""

from __future__ import annotations

from drift_peft import DriftConfig

from .methods import VARIANTS
from .plan import SWEEPS
from .verdict import duels
from .words import Difference, compared, listed, percent, places, points

CHOSEN = {  # sweep -> the value that the tables' DRIFT has
    "strength": "×1",
    "rate": "×1",
    "rank": "8",
    "ranks": "8",
    "modules": "attention and MLP",
    "schedule": "constant",
}
KEPT_CHOSEN = {  # the same of the tables' DRIFT that keeps, with Δ from the ancestor
    "keep_weight": "1.0",
    "keep_batch_size": "8",
    "keep_every": "1",
    "keep_images": "240",
    "keep_variety": "as examined",
    "keep_top_k": "8",
}
KEEPER = "drift-ancestor-keep"


def rests_on(results: dict, worlds: dict) -> list[str]:
    """A bullet for each default: what the study says for and against it."""
    config = {key: field.default for key, field in DriftConfig.__dataclass_fields__.items()}
    lines = []
    others = {key: duels(worlds, "images", key, "drift") for key in ("decoupled", *VARIANTS)}
    others = {key: next(iter(d.values())) for key, d in others.items() if d}
    if others:
        closest, better = max(others, key=lambda k: others[k][0]), [k for k, d in others.items() if d[1] > 0]
        title = results["titles"][closest].removeprefix("DRIFT, ")
        said = f"{listed(results['titles'][k] for k in better)} is better" if better else "none is better"
        lines.append(
            f"- **Scale `{config['drift_scale']}`, target `{config['drift_target']}`.** Of {len(others)} other forms, "
            f"each with its own rate and strength, {said} in `{next(iter(worlds))}`; the closest is {title}."
        )
    edge = [f"`{key}`" for key, world in worlds.items() if "drift_alpha" in row_of(world, "drift").get("edge", ())]
    if edge:
        lines.append(
            f"- **Strength `drift_alpha` {config['drift_alpha']:g}.** Validation chose the smallest strength that was "
            f"offered in {places(edge, worlds)}; a smaller one may be better, and the runs with keeping offer it."
            f"{with_keeping(worlds)}"
        )
    lines += [line for name, chosen in CHOSEN.items() for line in depends(worlds, name, chosen, "drift")]
    if found := duels(worlds, "images", "drift-ancestor", "drift"):
        lines.append(
            "- **Δ from the ancestor, where it is known** (`reference=`). Each tuned, it is "
            f"{compared(found, worlds)}, compared with Δ from the VLM."
        )
    kept = [line for name, chosen in KEPT_CHOSEN.items() for line in depends(worlds, name, chosen, KEEPER)]
    lines += kept
    if not kept:
        lines.append(
            "- **The weight of keeping, its batch and its images.** They come from trials on validation digits that "
            "are not among these runs. The study has not varied them yet."
        )
    return lines


def with_keeping(worlds: dict) -> str:
    """The strengths that were chosen with keeping, from a grid that begins lower."""
    found: dict[float, list[str]] = {}
    for key, world in worlds.items():
        if settings := row_of(world, KEEPER).get("settings"):
            found.setdefault(settings["drift_alpha"], []).append(f"`{key}`")
    said = listed(f"{alpha:g} in {places(keys, worlds)}" for alpha, keys in sorted(found.items())) if found else ""
    return f" With keeping, and Δ from the ancestor, it chose {said}." if said else ""


def depends(worlds: dict, name: str, chosen: str, method: str) -> list[str]:
    """One sweep of this method: which values are level with the chosen one, where, and which costs most."""
    found: dict[str, dict[str, Difference]] = {}  # value -> world -> the value less the chosen one
    for key, world in worlds.items():
        for label, row in world["sweeps"].get(name, {}).get(method, {}).items():
            if label != chosen and row["against chosen"]:
                found.setdefault(label, {})[f"`{key}`"] = row["against chosen"]
    if not found:
        return []
    there = list(dict.fromkeys(key for differences in found.values() for key in differences))
    alike: dict[tuple[str, ...], list[str]] = {}  # worlds -> values that are level there
    costs: dict[tuple[str, str], Difference] = {}
    for label, differences in found.items():
        if level := tuple(key for key, (_, _, high) in differences.items() if high >= 0):
            alike.setdefault(level, []).append(f"*{label}*")
        costs |= {(label, key): d for key, d in differences.items() if d[2] < 0}
    parts = []
    for level, labels in alike.items():
        where = "" if len(level) == len(there) else f" in {listed(level)}"
        parts.append(f"{listed(labels)} {'is' if len(labels) == 1 else 'are'} level{where}")
    if costs:
        label, key = worst = min(costs, key=lambda pair: costs[pair][0])
        parts.append(f"*{label}* costs most, {points(costs[worst])}" + (f" in {key}" if len(there) > 1 else ""))
    return [f"- **{SWEEPS[name].title}: {chosen}** ({listed(there)}). {'; '.join(parts)}."]


def row_of(world: dict, method: str) -> dict:
    return world["chosen by"]["images"]["rows"].get(method, {})


def recommendation(results: dict, worlds: dict) -> list[str]:
    """Every value of every sweep that a default rests on."""
    config = {key: field.default for key, field in DriftConfig.__dataclass_fields__.items()}
    lines = [
        "\n## The defaults, and what depends on them\n",
        f"`DriftConfig` has scale `{config['drift_scale']}`, target `{config['drift_target']}` and a = "
        f"{config['drift_alpha']:g} by default, on attention and MLP, with as many singular directions of Δ as the "
        "adapter has rank, and no warm-up or decay. DRIFT's image mean where one setting changes and the rest stays as "
        "chosen in that world, what was chosen in bold:\n",
    ]
    head = len(lines)
    for name, chosen in CHOSEN.items():
        found = []
        for key, world in worlds.items():
            values = world["sweeps"].get(name, {}).get("drift", {})
            cells = [f"{label} {percent(row['scores']['images'])}" for label, row in values.items()]
            cells = [f"**{c}**" if label == chosen else c for label, c in zip(values, cells, strict=True)]
            found += [f"`{key}` " + ", ".join(cells)] if cells else []
        if found:
            lines.append(f"- {SWEEPS[name].title}: " + "; ".join(found) + ".")
    for key, world in worlds.items():
        rows = world["chosen by"]["images"]["rows"]
        tuned = {m: rows[m] for m in ("drift", "decoupled", *VARIANTS) if m in rows}
        if tuned.keys() & VARIANTS.keys():
            ranked = sorted(tuned, key=lambda m: -tuned[m]["scores"]["images"][0])
            titles = {**results["titles"], "drift": "**adaptive, residual**"}
            cells = [f"{titles[m].removeprefix('DRIFT, ')} {percent(tuned[m]['scores']['images'])}" for m in ranked]
            lines.append(f"- Scale and target, each with its own rate and strength: `{key}` " + "; ".join(cells) + ".")
    return lines if len(lines) > head else []
