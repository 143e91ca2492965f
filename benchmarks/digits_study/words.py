"""The study's answer in plain words, generated from its numbers: where rivals win comes first."""

from __future__ import annotations

from functools import partial
from itertools import product

from drift_peft.demo.evaluate import MEASURES

from .collect import DUELS, LEADERS
from .methods import COMPUTE, CONTROLS, NF4, TEXT, VARIANTS
from .plan import CRITERIA

NOT_RUN = "not run yet"
OURS = {*LEADERS, "drift-ancestor-replay", *VARIANTS, *NF4, *COMPUTE, *TEXT, *CONTROLS}  # no rivals of DRIFT's
PULL = "pull-to-zero"  # a control that is also what a user may do: plain regularization
WORDS = {"2-3 operations": "the trained task", "4-5 operations": "longer chains", "text reasoning": "reasoning in text"}


def plain_words(results: dict, worlds: dict) -> list[str]:
    if not worlds:
        return ["Nothing has been run yet.\n"]
    lines = answer(results, worlds)
    for criterion in CRITERIA:
        lines += [
            f"\n### Chosen and compared by `{criterion}`\n",
            "What beats DRIFT inside the adapter (the best of `drift`, `decoupled` and `drift-ancestor`, the first "
            "and the last also with keeping):\n",
        ]
        lines += [f"- `{key}`: {beaten_by(results, world, criterion)}" for key, world in worlds.items()]
        lines += ["\nAgainst plain LoRA, points and 95 % interval:\n"]
        for key, world in worlds.items():
            for method in ("drift", "decoupled", "hold"):
                if against := world["chosen by"][criterion]["rows"].get(method, {}).get("against LoRA"):
                    lines.append(f"- `{key}`, {results['titles'][method]}: {gains(against, criterion)}")
        lines += ["\nPair by pair, the first less the second:\n", *duels(results, worlds, criterion)]
    return lines


def answer(results: dict, worlds: dict) -> list[str]:
    """The page in a few sentences: first where a simple rival wins, then what DRIFT gives, costs and rests on."""
    wins, close = [], []
    for criterion, (key, world) in product(CRITERIA, worlds.items()):
        if (found := rivals(world, criterion)) is not None:
            _, clear, unclear = found
            wins += [f"{results['titles'][m]} by {signed(d)} (`{criterion}`, `{key}`)" for m, d in clear if m != "hold"]
            close += [f"{results['titles'][m]} (`{criterion}`, `{key}`)" for m, _ in unclear if m != "hold"]
    kept = [
        f"`{key}` perception {signed(against['perception'])}, text {signed(against['text reasoning'])}"
        for key, world in worlds.items()
        if (against := world["chosen by"]["images"]["rows"].get("drift", {}).get("against LoRA"))
    ]
    than = partial(across, worlds)
    lines = [
        "- **A simple rival wins** over the best of DRIFT inside the adapter: "
        + ("; ".join(wins) if wins else "nowhere so far")
        + ". **One is as good** (its interval holds 0): "
        + ("; ".join(close) if close else "nowhere so far")
        + ".",
        "- **Against merging a part of Δ and then training LoRA**, DRIFT with the same Δ: "
        f"{than('drift', 'merge-lora')}; both with Δ from the common ancestor: "
        f"{than('drift-ancestor', 'merge-lora-ancestor')}.",
        "- **Our own other way**, merging Δ into the base and holding the adapter near it, against DRIFT inside: "
        f"{than('hold', 'drift')}.",
        f"- **Against the VLM as it is**, DRIFT: {than('drift', 'vlm')}; LoRA: {than('lora', 'vlm')}.",
        f"- **DRIFT against LoRA** on the same data: {than('drift', 'lora')}.",
        "- **What it costs or keeps** beside the trained task, against LoRA, by `images`: " + "; ".join(kept) + ".",
        f"- **What the bias adds** to LoRA from DRIFT's start without it: {than('drift', 'start')}.",
        f"- **Against full fine-tuning**: {than('drift', 'full')}; **against DRIFT as published**, with all weights: "
        f"{than('drift', 'full-drift')}.",
    ]
    if (found := across(worlds, "drift-ancestor-keep", "drift-ancestor")) != NOT_RUN:
        lines.append(
            "- **Keeping the VLM's own answers** to images without labels, added to DRIFT with Δ from the ancestor: "
            f"{found}; and then against merged, then LoRA, with the same Δ and keeping: "
            f"{than('drift-ancestor-keep', 'merge-lora-ancestor-keep')}; against LoRA with the same keeping: "
            f"{than('drift-keep', 'lora-keep')}, here with Δ from the VLM."
        )
    if (found := across(worlds, "drift-hierarchical", "drift")) != NOT_RUN:
        lines.append(
            "- **Δ from the common ancestor** (`reference=`, the paper's table 10) in place of Δ from the VLM, which "
            f"also takes back what the VLM had learned; with the settings of the latter: {found}."
        )
    for other, question in (("drift-random", "random directions instead of Δ's"), ("drift-wrong", "a wrong expert")):
        if any(f"drift {other}" in world["duels"] for w in worlds.values() for world in w["chosen by"].values()):
            lines.append(
                f"- **Is it Δ?** DRIFT against the same pull with {question}: {across(worlds, 'drift', other)}."
            )
    if (found := across(worlds, "decoupled", PULL)) != NOT_RUN:
        lines.append(
            f"- **Is it more than regularization?** DRIFT, decoupled, against the same pull to zero: {found}; "
            f"with random directions: {across(worlds, 'decoupled', 'decoupled-random')}."
        )
    return [*lines, ""]


def across(worlds: dict, first: str, second: str) -> str:
    """The difference of two methods in every world, by each criterion."""
    parts = []
    for criterion in CRITERIA:
        pairs = {key: world["chosen by"][criterion]["duels"].get(f"{first} {second}") for key, world in worlds.items()}
        found = [f"`{key}` {signed(pair)}" for key, pair in pairs.items() if pair]
        parts += [f"by `{criterion}` " + ", ".join(found)] if found else []
    return "; ".join(parts) or NOT_RUN


def rivals(world: dict, criterion: str) -> tuple[str, list, list] | None:
    """DRIFT inside the adapter at its best (by validation); rivals as (method, difference), clearly ahead and level."""
    best, leads = (world["chosen by"][criterion][key] for key in ("leader", "leads"))
    if best is None:
        return None
    ahead = [
        (key, lead) for key, lead in sorted(leads.items(), key=lambda pair: -pair[1][0]) if key not in OURS - {PULL}
    ]
    return best, [pair for pair in ahead if pair[1][1] > 0], [pair for pair in ahead if pair[1][1] <= 0 <= pair[1][2]]


def beaten_by(results: dict, world: dict, criterion: str) -> str:
    if (found := rivals(world, criterion)) is None:
        return "not run yet."
    best, clear, unclear = found
    scores = world["chosen by"][criterion]["rows"][best]["scores"]
    name = f"{results['titles'][best]} ({percent(scores[criterion])})"
    said, close = ([f"{results['titles'][key]} by {signed(lead)}" for key, lead in part] for part in (clear, unclear))
    verb = "beats" if len(said) == 1 else "beat"
    sentence = f"{'; '.join(said)} {verb} {name}." if said else f"nothing clearly beats {name}."
    return sentence + (f" Level with it: {'; '.join(close)}." if close else "")


def gains(against: dict, criterion: str) -> str:
    parts = [f"`{criterion}` {signed(against[criterion])}"]
    for name in MEASURES:
        _, low, high = against[name]
        verdict = "better" if low > 0 else "worse" if high < 0 else "no clear difference"
        parts.append(f"{WORDS.get(name, name)} {signed(against[name])} ({verdict})")
    return "; ".join(parts) + "."


def duels(results: dict, worlds: dict, criterion: str) -> list[str]:
    lines = ["| | " + " | ".join(f"`{key}`" for key in worlds) + " |", "|---" * (len(worlds) + 1) + "|"]
    for first, second, question in DUELS:
        found = [world["chosen by"][criterion]["duels"].get(f"{first} {second}") for world in worlds.values()]
        if any(found):
            titles = f"{question} {results['titles'][first]} − {results['titles'][second]}".strip()
            lines.append(f"| {titles} | " + " | ".join(signed(f) if f else "" for f in found) + " |")
    return lines


def percent(found: list[float]) -> str:
    return f"{100 * found[0]:.0f} ± {50 * (found[2] - found[1]):.0f}"


def signed(found: list[float]) -> str:
    return f"{100 * found[0]:+.1f} [{100 * found[1]:+.1f}, {100 * found[2]:+.1f}]"
