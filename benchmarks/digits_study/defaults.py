"""The library's default, and how much depends on each of its settings."""

from __future__ import annotations

from drift_peft import DriftConfig

from .methods import VARIANTS
from .plan import SWEEPS
from .words import percent

CHOSEN = {  # sweep -> the value that the tables' DRIFT has
    "strength": "×1",
    "rate": "×1",
    "rank": "8",
    "ranks": "8",
    "modules": "attention and MLP",
    "schedule": "constant",
}


def recommendation(results: dict, worlds: dict) -> list[str]:
    config = {key: field.default for key, field in DriftConfig.__dataclass_fields__.items()}
    lines = [
        "\n## The default, and what depends on it\n",
        f"`DriftConfig` has scale `{config['drift_scale']}`, target `{config['drift_target']}` and a = "
        f"{config['drift_alpha']:g} by default, on attention and MLP, with as many singular directions of Δ as the "
        "adapter has rank, and no warm-up or decay. DRIFT's `images` where one setting changes and the rest stays as "
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
