"""The study's verdict and its counterpart, generated from its numbers."""

from __future__ import annotations

from .methods import ANCESTOR, METHODS, TRAINING
from .words import MEANS, NOT_RUN, Difference, compared, listed, minus, places, points, signed

DRIFT, MERGED = ("drift", "drift-ancestor"), ("merge-lora", "merge-lora-ancestor")
KEPT, MERGED_KEPT = ("drift-keep", "drift-ancestor-keep"), ("merge-lora-keep", "merge-lora-ancestor-keep")
MORE, MERGED_MORE = (
    ("drift-keep-more", "drift-ancestor-keep-more"),
    ("merge-lora-keep-more", "merge-lora-ancestor-keep-more"),
)
BOTH = "merge-drift-ancestor-keep"  # a part of Δ merged, then DRIFT
STARTED = "drift-start-ancestor-keep"  # DRIFT from a part of Δ in the adapter
HELD = "hold-ancestor-keep"  # a part of Δ merged, then LoRA that is held near it
REPLAYED = {  # ways whose kept answers were samples instead
    "lora": "LoRA",
    "merge-lora-ancestor": "Merging a part of Δ from the ancestor and then LoRA",
    "drift-ancestor": "DRIFT with Δ from the ancestor",
}
OTHERS = {"lora": "LoRA", "full": "full fine-tuning", "full-drift": "full DRIFT as published"}


def verdict(worlds: dict) -> list[str]:
    """What is found by the image mean, of what has been run."""
    found = (
        against_others(worlds, "images"),
        against_merging(worlds, "images"),
        cost(worlds),
        keeping(worlds),
        rivals_kept(worlds),
        replay(worlds, "images"),
        is_it_delta(worlds, "images"),
    )
    return [f"{number}. {said}" for number, said in enumerate(filter(None, found), start=1)]


def counterpart(worlds: dict) -> list[str]:
    """What the other way to choose and compare says, and the other form of DRIFT."""
    return [sentence for sentence in (
        against_others(worlds, "all"),
        same_delta(worlds),
        against_merging(worlds, "all"),
        kept_against_merging(worlds, "all"),
        replay(worlds, "all"),
        is_it_delta(worlds, "all"),
        held(worlds),
        other_form(worlds),
    ) if sentence and NOT_RUN not in sentence]  # fmt: skip


def duel(world: dict, criterion: str, first: str, second: str) -> Difference | None:
    return world["chosen by"][criterion]["duels"].get(f"{first} {second}")


def duels(worlds: dict, criterion: str, first: str, second: str) -> dict[str, Difference]:
    """`world` -> the first less the second, where both have been run."""
    found = {f"`{key}`": duel(world, criterion, first, second) for key, world in worlds.items()}
    return {place: difference for place, difference in found.items() if difference is not None}


def against_others(worlds: dict, criterion: str) -> str:
    """DRIFT against the ways that need no merging: where it is better than all of them, and the exceptions."""
    found = {other: duels(worlds, criterion, "drift", other) for other in OTHERS}
    found = {OTHERS[other]: differences for other, differences in found.items() if differences}
    if not found:
        return f"DRIFT against LoRA: {NOT_RUN}."
    pairs = {(other, place): d for other, differences in found.items() for place, d in differences.items()}
    sentence = f"By the {MEANS[criterion]}, DRIFT is better than {listed(found)}"
    there = places((place for _, place in pairs), worlds)
    wanting = {pair: d for pair, d in pairs.items() if d[1] <= 0}
    if not wanting:
        other, place = least = min(pairs, key=lambda pair: pairs[pair][0])
        where = f"(against {other}, in {place})"
        return f"{sentence} in {there}, by {points(pairs[least])} where it gains least {where}."
    said = [f"against {other} in {place} ({signed(d)})" for (other, place), d in wanting.items()]
    return f"{sentence} in {there}, except {listed(said)}."


def against_merging(worlds: dict, criterion: str) -> str:
    """DRIFT and its strongest rival, each with the Δ that validation prefers: from the VLM or from the ancestor."""
    found = best_duels(worlds, criterion, DRIFT, MERGED)
    if not found:
        return f"DRIFT against merging first: {NOT_RUN}."
    return (
        f"By the {MEANS[criterion]}, DRIFT compared with its strongest rival, which merges a part of Δ into the VLM "
        f"and then trains LoRA, is {compared(found, worlds)}."
    )


def kept_against_merging(worlds: dict, criterion: str) -> str:
    """The same with keeping in both, where all forms have been run: the preferred one may be the one that lacks."""
    rows = {key: world["chosen by"][criterion]["rows"] for key, world in worlds.items()}
    whole = {key: worlds[key] for key, found in rows.items() if {*KEPT, *MERGED_KEPT} <= found.keys()}
    found = best_duels(whole, criterion, KEPT, MERGED_KEPT)
    if not found:
        return NOT_RUN
    return f"By the {MEANS[criterion]}, with keeping in both, DRIFT compared with it is {compared(found, worlds)}."


def best_duels(worlds: dict, criterion: str, first: tuple[str, ...], second: tuple[str, ...]) -> dict[str, Difference]:
    """`world` -> the first less the second, each in the form that validation prefers."""
    found = {}
    for key, world in worlds.items():
        ours, theirs = (preferred(world, criterion, forms) for forms in (first, second))
        if ours and theirs and (difference := duel(world, criterion, ours, theirs)):
            found[f"`{key}`"] = difference
    return found


def same_delta(worlds: dict) -> str:
    """The same with Δ from the VLM in both, which is what a user without the ancestor can do."""
    sentences = []
    for ours, theirs, how in (("drift", "merge-lora", ""), ("drift-keep", "merge-lora-keep", " and keeping")):
        if found := duels(worlds, "images", ours, theirs):
            first = f"With Δ from the VLM{how} in both, DRIFT compared with that rival is"
            sentences.append(f"{first} {compared(found, worlds)}.")
    return " ".join(sentences) or NOT_RUN


def preferred(world: dict, criterion: str, forms: tuple[str, ...]) -> str | None:
    """The form that is best on validation digits, of those whose rows are there."""
    there = [form for form in forms if form in world["chosen by"][criterion]["rows"]]
    return max(there, key=lambda f: max(c[criterion] for c in world["tuning"][f].values()), default=None)


def cost(worlds: dict) -> str:
    """What the trained ways lose in perception without keeping, and which of their controls loses least."""
    lost = {}
    for key, world in worlds.items():
        rows = world["chosen by"]["images"]["rows"]
        if "vlm" in rows:
            ways = [way for way in rows if METHODS[way].trains and not METHODS[way].kept]
            seen = rows["vlm"]["scores"]["perception"][0]
            lost |= {(way, f"`{key}`"): 100 * (seen - rows[way]["scores"]["perception"][0]) for way in ways}
    main = {pair: points for pair, points in lost.items() if pair[0] in TRAINING | ANCESTOR}
    if not main:
        return f"The cost in perception: {NOT_RUN}."
    if min(main.values()) <= 0:
        return "Not every way that trains without keeping costs perception."
    where = places((place for _, place in main), worlds)
    least = f"{min(main.values()):.0f} points of it or more in {where}"
    sentence = f"Every way of the table that trains without keeping costs perception, {least}."
    way, place = gentlest = min(lost, key=lost.__getitem__)
    if gentlest not in main:
        title = METHODS[way].title
        sentence += f" Of their variants and controls, *{title}* costs least, {lost[gentlest]:.0f} in {place}."
    return sentence


def keeping(worlds: dict) -> str:
    """What keeping adds to DRIFT, and what perception it leaves lost."""
    gained = {}
    for key, world in worlds.items():
        way = preferred(world, "images", KEPT)
        if way and (difference := duel(world, "images", way, way.removesuffix("-keep"))):
            gained[f"`{key}`"] = difference
    if not gained:
        return "Keeping, which is to cure that, has not been run yet with DRIFT."
    sentences = [f"Keeping makes DRIFT {compared(gained, worlds)}."]
    if left := perception_lost(worlds, KEPT):
        sentences.append(f"Of perception it then loses so many points: {left}.")
    forms = {"the VLM": perception_lost(worlds, MORE[:1]), "the ancestor": perception_lost(worlds, MORE[1:])}
    if said := [f"{left}, with Δ from {where}" for where, left in forms.items() if left]:
        sentences.append(f"With 960 images instead of 240, and tuned again, it loses so many: {'; '.join(said)}.")
    if missing := [f"`{key}`" for key in worlds if f"`{key}`" not in gained]:
        sentences.append(f"In {listed(missing)} it has not been run yet.")
    return " ".join(sentences)


def rivals_kept(worlds: dict) -> str:
    """DRIFT with keeping against rivals that keep, by as many images; and the ways that go on from a merged VLM."""
    sentences = []
    for rival, name in ((MERGED_KEPT, "merging a part of Δ and then training LoRA"), (("lora-keep",), "LoRA")):
        if found := best_duels(worlds, "images", KEPT, rival):
            sentences.append(f"With keeping in both, DRIFT compared with {name} is {compared(found, worlds)}.")
    if found := best_duels(worlds, "images", MORE, MERGED_MORE):
        sentences.append(f"By 960 images in both, DRIFT compared with merging first is {compared(found, worlds)}.")
    if found := duels(worlds, "images", BOTH, "merge-lora-ancestor-keep"):
        first = "Where a part of Δ from the ancestor is merged first, DRIFT compared with LoRA is"
        sentences.append(f"{first} {compared(found, worlds)}.")
    for how, form in (("240 images", ""), ("240 images and rank 32", "-32"), ("960 images", "-more")):
        if found := duels(worlds, "images", f"{STARTED}{form}", f"merge-lora-ancestor-keep{form}"):
            first = f"By {how}, DRIFT that starts at a part of Δ from the ancestor (`drift_start`), compared"
            sentences.append(f"{first} with merging such a part first, is {compared(found, worlds)}.")
    for images, more in (("240", ""), ("960", "-more")):
        if found := duels(worlds, "images", f"{HELD}{more}", f"merge-lora-ancestor-keep{more}"):
            first = f'By {images} images, LoRA that is held near this merged VLM (`drift_target="base"`), compared with'
            sentences.append(f"{first} LoRA that is not, is {compared(found, worlds)}.")
    return " ".join(sentences)


def replay(worlds: dict, criterion: str) -> str:
    """Keeping against as many of the same answers among the samples, which cost no time in a step."""
    sentences = []
    for way, name in REPLAYED.items():
        if found := duels(worlds, criterion, f"{way}-keep", f"{way}-replay-240"):
            sentences.append(f"{name}, keeping, compared with replay of as many answers, is {compared(found, worlds)}.")
    return said_by(criterion, sentences)


def perception_lost(worlds: dict, forms: tuple[str, ...]) -> str:
    """How many points less than the VLM in which world, in the form that validation prefers; empty if none is run."""
    lost = {}
    for key, world in worlds.items():
        rows = world["chosen by"]["images"]["rows"]
        if "vlm" in rows and (way := preferred(world, "images", forms)):
            lost[key] = rows["vlm"]["scores"]["perception"][0] - rows[way]["scores"]["perception"][0]
    return listed(f"{100 * share:.0f} in `{key}`" for key, share in lost.items()) if lost else ""


def gap(worlds: dict, exam: str, first: str, second: str) -> str:
    """How many points of one exam the first has more than the second in which world."""
    found = {}
    for key, world in worlds.items():
        rows = world["chosen by"]["images"]["rows"]
        if first in rows and second in rows:
            found[key] = rows[first]["scores"][exam][0] - rows[second]["scores"][exam][0]
    return minus(listed(f"{100 * share:+.0f} in `{key}`" for key, share in found.items()))


def said_by(criterion: str, sentences: list[str]) -> str:
    """Sentences that name no criterion: the verdict goes by the image mean, and its counterpart says by what."""
    said = " ".join(sentences)
    return f"By the {MEANS[criterion]}: {said}" if said and criterion != "images" else said


def is_it_delta(worlds: dict, criterion: str) -> str:
    """DRIFT against pulls that know nothing of Δ, tuned where that has been run, without and with keeping."""
    tuned = duels(worlds, criterion, "drift", "drift-random-tuned")
    found = tuned or duels(worlds, criterion, "drift", "drift-random")
    if not found:
        return f"DRIFT against the same pull along random directions: {NOT_RUN}."
    how = ", tuned as well" if tuned else ""
    sentences = [
        f"Compared with the same pull along random directions instead of Δ's{how}, DRIFT is {compared(found, worlds)}."
    ]
    if tuned and criterion == "images":
        task, sight = (gap(worlds, exam, "drift", "drift-random-tuned") for exam in ("2-3 operations", "perception"))
        sentences.append(f"DRIFT's points in the task, less this pull's, are {task}; in perception they are {sight}.")
    if found := duels(worlds, criterion, "drift-ancestor", "drift-random-tuned"):
        sentences.append(f"With Δ from the ancestor DRIFT, compared with it, is {compared(found, worlds)}.")
    if found := duels(worlds, criterion, "drift-random-tuned", "lora"):
        sentences.append(f"This pull, compared with LoRA, is {compared(found, worlds)}.")
    if found := duels(worlds, criterion, "drift-keep", "drift-random-keep"):
        sentences.append(f"With keeping in both, DRIFT compared with this pull is {compared(found, worlds)}.")
    if found := duels(worlds, criterion, "drift-keep", "pull-to-zero-keep"):
        sentences.append(f"Compared with LoRA that is pulled to zero, both keeping, it is {compared(found, worlds)}.")
    return said_by(criterion, sentences)


def held(worlds: dict) -> str:
    """Our own other way, which does what DRIFT does not: it keeps the expert's reasoning in text."""
    found = {criterion: duels(worlds, criterion, "hold", "drift") for criterion in MEANS}
    if not found["images"]:
        return NOT_RUN
    return (
        f"Our own other way merges most of Δ and holds LoRA near it. By the {MEANS['all']}, compared with DRIFT, it is "
        f"{compared(found['all'], worlds)}. By the {MEANS['images']} it is {compared(found['images'], worlds)}."
    )


def other_form(worlds: dict) -> str:
    found = duels(worlds, "images", "decoupled", "decoupled-random")
    if not found:
        return NOT_RUN
    return f"DRIFT's decoupled form, compared with the same pull along random directions, is {compared(found, worlds)}."
