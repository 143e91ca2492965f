"""The appendix of comparisons: what beats DRIFT, what it gains and costs against LoRA, and every pair of methods."""

from __future__ import annotations

from drift_peft.demo.evaluate import MEASURES

from .collect import DUELS, LEADERS
from .methods import COMPUTE, CONTROLS, METHODS, NF4, TEXT, TUNED_CONTROLS, VARIANTS
from .words import MEANS, NOT_RUN, percent, signed

INSIDE = {key for leaders in LEADERS.values() for key in leaders}
PULLS = {"pull-to-zero", "pull-to-zero-keep"}  # controls that are also what a user may do: plain regularization
STEERED = {key for key in METHODS if key.startswith("drift")}
OURS = {*INSIDE, *STEERED, *VARIANTS, *NF4, *COMPUTE, *TEXT, *CONTROLS, *TUNED_CONTROLS} - PULLS  # not DRIFT's rivals
WORDS = {"2-3 operations": "the trained task", "4-5 operations": "longer chains", "text reasoning": "reasoning in text"}


def comparisons(results: dict, worlds: dict) -> list[str]:
    lines = []
    for criterion, mean in MEANS.items():
        lines += [
            f"\n## Chosen and compared by the {mean}\n",
            "What beats DRIFT inside the adapter, in its best form by validation: adaptive with Δ from the VLM, with Δ "
            "from the ancestor, or decoupled. What keeps is compared with what keeps as many answers.\n",
        ]
        for key, world in worlds.items():
            lines.append(f"- `{key}`: {beaten_by(results, world, criterion, 'without keeping')}")
            for kind in [kind for kind in LEADERS if kind != "without keeping"]:
                if world["chosen by"][criterion]["leaders"][kind]["leader"]:
                    lines.append(f"- `{key}`, {kind}: {beaten_by(results, world, criterion, kind)}")
        lines += ["\nAgainst plain LoRA, in points with 95 % intervals:\n"]
        for key, world in worlds.items():
            for method in ("drift", "decoupled", "hold"):
                if against := world["chosen by"][criterion]["rows"].get(method, {}).get("against LoRA"):
                    lines.append(f"- `{key}`, {results['titles'][method]}: {gains(against, criterion)}")
        lines += ["\nPair by pair, the first less the second:\n", *duels(results, worlds, criterion)]
    return lines


def rivals(world: dict, criterion: str, kind: str) -> tuple[str, list, list] | None:
    """DRIFT inside the adapter at its best (by validation); rivals as (method, difference), clearly ahead and level."""
    best, leads = (world["chosen by"][criterion]["leaders"][kind][key] for key in ("leader", "leads"))
    if best is None:
        return None
    ahead = [(key, lead) for key, lead in sorted(leads.items(), key=lambda pair: -pair[1][0]) if key not in OURS]
    return best, [pair for pair in ahead if pair[1][1] > 0], [pair for pair in ahead if pair[1][1] <= 0 <= pair[1][2]]


def beaten_by(results: dict, world: dict, criterion: str, kind: str) -> str:
    if (found := rivals(world, criterion, kind)) is None:
        return f"{NOT_RUN}."
    best, clear, unclear = found
    scores = world["chosen by"][criterion]["rows"][best]["scores"]
    name = f"{results['titles'][best]} ({percent(scores[criterion])})"
    said, close = ([f"{results['titles'][key]} by {signed(lead)}" for key, lead in part] for part in (clear, unclear))
    verb = "beats" if len(said) == 1 else "beat"
    sentence = f"{'; '.join(said)} {verb} {name}." if said else f"nothing clearly beats {name}."
    return sentence + (f" Level with it: {'; '.join(close)}." if close else "")


def gains(against: dict, criterion: str) -> str:
    parts = [f"{MEANS[criterion]} {signed(against[criterion])}"]
    for name in MEASURES:
        _, low, high = against[name]
        said = "better" if low > 0 else "worse" if high < 0 else "no clear difference"
        parts.append(f"{WORDS.get(name, name)} {signed(against[name])} ({said})")
    return "; ".join(parts) + "."


def duels(results: dict, worlds: dict, criterion: str) -> list[str]:
    lines = ["| | " + " | ".join(f"`{key}`" for key in worlds) + " |", "|---" * (len(worlds) + 1) + "|"]
    for first, second, question in DUELS:
        found = [world["chosen by"][criterion]["duels"].get(f"{first} {second}") for world in worlds.values()]
        if any(found):
            titles = f"{question} {results['titles'][first]} − {results['titles'][second]}".strip()
            lines.append(f"| {titles} | " + " | ".join(signed(f) if f else "" for f in found) + " |")
    return lines
