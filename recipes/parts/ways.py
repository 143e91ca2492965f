"""The ways that compare.py knows, from nothing to everything: what each changes in the user's recipe."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from .processing import processor_settings

KINDS = ("base", "transplant", "gated", "sft", "sft-keep", "merged", "merged-keep", "drift", "drift-keep")
KINDS += ("started", "started-keep", "merged-drift-keep", "held", "held-keep")
KEEPING = ("gated", "-keep")  # how those end that a keep set is for
TRAINED = KINDS[KINDS.index("sft") :]
ON_REQUEST = ("started", "started-keep", "held", "held-keep")  # with --ways alone: each is another run
OUTPUT = ("output_dir", "merge", "verify", "resume_from_checkpoint")  # what a recipe says of its result


@dataclass(frozen=True)
class Way:
    """One row of the table.

    Attributes:
        name: of its folder.
        title: in the table.
        kind: one of KINDS.
        scale: λ of a transplant, which is not trained.
        trains: what sft_vlm.py takes in place of the recipe's own settings; None of a way that is not trained. A
            value of None takes the key out.
    """

    name: str
    title: str
    kind: str
    scale: float | None = None
    trains: dict | None = field(default=None, hash=False)

    def recipe(self, settings: dict, **more) -> dict:
        """The recipe of this way: the user's settings, with its own and with `more` in their place."""
        changed = {**settings, **self.trains, **more}
        return {key: value for key, value in changed.items() if value is not None}

    def tuned(self, trial: int, settings: dict) -> Way:
        """This way with the settings that a search has found."""
        values = ", ".join(f"{key} {value:.2g}" for key, value in settings.items())
        return replace(
            self, name=f"{self.name}-trial{trial}", title=f"{self.title}, {values}", trains={**self.trains, **settings}
        )


def ways_of(
    settings: dict,
    kinds: list[str],
    scales: list[float],
    shares: list[float],
    keep: str | None,
    texts: str | None = None,
    held: Sequence[float] = (1.0,),
    meant: Sequence[str] = (),
) -> list[Way]:
    """The ways that a recipe has what it takes for, of the kinds that are asked for, in the order of KINDS.

    Without kinds it is all but those ON_REQUEST.

    Args:
        settings: the recipe's.
        scales: of transplants.
        shares: of Δ that is merged first, or in the adapter at the start.
        keep: keep set of the ways that keep; None leaves them out.
        texts: SHA-256 of the prompts for the expert, whose answers gate the prior; None leaves that out.
        held: shares of Δ that are merged before LoRA is held near the merged base.
        meant: kinds that a flag sets something for, so that they are not left out in silence.

    Raises:
        ValueError: a kind is asked for or meant, and what it takes is missing.
    """
    of_keeping = (key for key in settings if key.startswith("keep"))
    plain, kept = dict.fromkeys(["replay", "keep", *of_keeping]), {"keep": str(keep)}
    sft, drift = ({"method": method, "merge_first": None} for method in ("sft", "drift"))
    hold = dict.fromkeys(key for key in settings if key.startswith("drift_"))  # what is said of steering
    hold |= {"method": "drift", "drift_scale": "decoupled", "drift_target": "base", "drift_alpha": 1.0}
    table = {
        "base": [Way("base", "VLM as it is", "base")],
        "transplant": [Way(f"transplant-{λ:g}", f"transplant {λ:g}", "transplant", scale=λ) for λ in scales],
        "gated": [Way(f"gated-{(texts or '')[:8]}", "gated prior", "gated")],
        "sft": [Way("sft", "SFT", "sft", trains=sft | plain)],
        "sft-keep": [Way("sft-keep", "SFT, keeping", "sft-keep", trains=sft | kept)],
        "merged": [_merged(λ, "merged", "SFT", sft | plain) for λ in shares],
        "merged-keep": [_merged(λ, "merged-keep", "SFT, keeping", sft | kept) for λ in shares],
        "drift": [Way("drift", "DRIFT", "drift", trains=drift | plain)],
        "drift-keep": [Way("drift-keep", "DRIFT, keeping", "drift-keep", trains=drift | kept)],
        "started": [_started(λ, "started", "DRIFT", drift | plain) for λ in shares],
        "started-keep": [_started(λ, "started-keep", "DRIFT, keeping", drift | kept) for λ in shares],
        "merged-drift-keep": [
            _merged(λ, "merged-drift-keep", "DRIFT, keeping", drift | kept) for λ in shares if λ != 1
        ],
        "held": [_merged(λ, "held", "held LoRA", hold | plain) for λ in held],
        "held-keep": [_merged(λ, "held-keep", "held LoRA, keeping", hold | kept) for λ in held],
    }
    missing, blind = {}, settings.get("drift_norm") == "weight" and not settings.get("replay")
    for kind in KINDS:
        if kind.startswith(("transplant", "gated", "merged", "held")) and "expert" not in settings:
            missing[kind] = "the recipe names no expert"
        elif kind in ("gated", "drift", "drift-keep", "merged-drift-keep", *ON_REQUEST) and "prior" not in settings:
            missing[kind] = "the recipe names no prior"
        elif kind.endswith(KEEPING) and keep is None:
            missing[kind] = "the recipe names neither a keep set nor images to make it of"
        elif kind == "gated" and texts is None:
            missing[kind] = "the expert is asked nothing: name a file of prompts with --texts"
        elif kind == "merged-drift-keep" and {*shares} == {1}:
            missing[kind] = (
                "of Δ that was merged whole nothing is left to steer toward, and --merge-first names 1 alone"
            )
        elif kind.startswith("started") and (no_part := [λ for λ in shares if not 0 < λ <= 1]):
            missing[kind] = f"an adapter starts at a part of Δ, up to 1, and --merge-first names {no_part[0]:g}"
        elif kind.endswith(("drift-keep", "started-keep")) and blind:
            missing[kind] = "drift_norm: weight does not see the gradient that keeping adds; set factor, or replay"
    for kind in [*kinds, *meant]:
        if kind in missing:
            raise ValueError(f"{kind} cannot be compared: {missing[kind]}")
    wanted = ({*kinds} or {*KINDS} - {*ON_REQUEST}) - missing.keys()
    return [way for kind in KINDS if kind in wanted for way in table[kind]]


def gating(settings: dict, keep: str, texts: object, gated: object, adapter: object) -> list[list[str]]:
    """What drift-peft takes to gate the recipe's prior, and then to make an adapter of it."""
    asked = {"expert": settings["expert"], "base": settings["base"], "keep": keep, "texts": texts}
    asked |= {"top-k": settings["keep_top_k"]} if "keep_top_k" in settings else {}
    flags = [part for key, value in asked.items() for part in (f"--{key}", value)]
    flags += [] if settings.get("use_cpu") else ["--load-in-4bit"]
    flags += processing(settings)
    gate = ["prior", "gate", settings["prior"], *flags, "-o", gated]
    export = ["prior", "export", gated, "--scale", 1, "-o", adapter]
    return [[*map(str, command)] for command in (gate, export)]


def processing(settings: dict) -> list[str]:
    """Images and chats as they are trained on, for every way: an untrained one has no processor saved beside it."""
    kwargs = processor_settings(settings.get("processor_kwargs"), settings.get("chat_template_path"))
    return ["--processor-kwargs", json.dumps(kwargs)] if kwargs else []


def transplanting(settings: dict, scale: float) -> dict:
    """What `transplant` takes of a recipe: of a full fine-tune Δ at a rank; an adapter goes over as it is."""
    from drift_peft.checkpoints import is_adapter

    names = ["expert", "base"]
    delta = {}
    if not is_adapter(settings["expert"]):
        names += ["reference"] if "reference" in settings else []
        delta = {"rank": settings.get("prior_rank", 64)}
    return {**{name: settings[name] for name in names}, **delta, "scale": scale}


def _started(share: float, kind: str, then: str, trains: dict) -> Way:
    title = f"started at {share:g}, then {then}"
    return Way(f"{kind}-{share:g}", title, kind, trains={**trains, "drift_start": share})


def _merged(share: float, kind: str, then: str, trains: dict) -> Way:
    return Way(f"{kind}-{share:g}", f"merged {share:g}, then {then}", kind, trains={**trains, "merge_first": share})
