"""Everything that is compared, as a table: what a user could do with the VLM and the expert, and the controls.

Each method is tuned on validation digits over as many candidates as any other (CANDIDATES), in every world: those
that train plain LoRA or all weights over learning rates, those with a strength of their own over rates x strengths,
merges over their scales, weights and densities.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import product

CANDIDATES = 9
LORA_RATES = (5e-4, 1e-3, 2e-3, 3e-3, 5e-3, 7e-3, 1e-2, 1.5e-2, 2e-2)
FULL_RATES = (5e-5, 1e-4, 2e-4, 3e-4, 5e-4, 7e-4, 1e-3, 2e-3, 3e-3)
STEERED_RATES = (2e-3, 5e-3, 1e-2)


def grid(**axes: Iterable) -> tuple[dict, ...]:
    """All combinations of the values of these settings."""
    return tuple(dict(zip(axes, values, strict=True)) for values in product(*axes.values()))


@dataclass(frozen=True)
class Method:
    """One way to make the model that is examined.

    Attributes:
        title: the row's name.
        trains: "lora" or "full", or None where nothing is trained.
        merge: method of `merge_baseline`, or "export" for the prior as a LoRA adapter; where nothing is trained.
        start: `init_lora_weights` of a plain LoraConfig.
        drift: settings of DriftConfig (of `guide` with trains="full"); None trains without guidance.
        prior: which prior steers: "plain", "hierarchical", "negated", "random", "wrong", "weak"; with "hierarchical",
            what is merged beforehand is Δ from the ancestor too.
        four_bit: trained on NF4, then merged into the full-precision VLM.
        kept: "kl" keeps the model near the VLM's own answers to unlabelled images (`keep`), "replay" mixes them into
            the training samples; None keeps nothing.
        settings: fixed for this method; `merged` is λ of the Δ that is added to the VLM before anything else.
        grid: the candidates; none where there is nothing to choose.
        like: whose chosen candidate a control takes, instead of choosing one of its own.
        chosen_by: the exams whose mean chooses the candidate, where the plan's criteria do not ask what it is for.
    """

    title: str
    trains: str | None = "lora"
    merge: str | None = None
    start: str | bool = True
    drift: dict | None = None
    prior: str = "plain"
    four_bit: bool = False
    kept: str | None = None
    settings: dict = field(default_factory=dict)
    grid: tuple[dict, ...] = ()
    like: str | None = None
    chosen_by: tuple[str, ...] | None = None


ADAPTIVE = {"drift_scale": "adaptive", "drift_target": "residual"}
DECOUPLED = {"drift_scale": "decoupled", "drift_target": "factors"}
HOLD = {"drift_scale": "decoupled", "drift_target": "base", "drift_alpha": 30.0}
DENSITIES = grid(weights=[(1.6, 0.2), (1.0, 0.5), (1.0, 1.0)], density=[0.2, 0.5, 0.8])
LAYERS = ([0], [1], [2], [3], [0, 1], [1, 2], [2, 3], [0, 1, 2], [1, 2, 3])
ALPHAS = {"adaptive": (0.3, 1.0, 3.0), "gradnorm": (0.3, 1.0, 3.0), "absolute": (0.01, 0.1, 1.0)}

TRAINING_FREE = {
    "vlm": Method("VLM as it is", trains=None),
    "task-arithmetic": Method(
        "task arithmetic",
        None,
        "task_arithmetic",
        grid=grid(scale=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]),
    ),
    "ties": Method("TIES", None, "ties", grid=DENSITIES),
    "dare-linear": Method("DARE, linear", None, "dare_linear", grid=DENSITIES),
    "dare-ties": Method("DARE, TIES", None, "dare_ties", grid=DENSITIES),
    "layer-swap": Method("layers swapped", None, "task_arithmetic", grid=grid(scale=[1.0], only_layers=LAYERS)),
    "swap": Method("the whole expert swapped in", None, "task_arithmetic", settings={"scale": 1.0}),
    "export": Method(
        "the prior as a LoRA adapter", None, "export", grid=grid(scale=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0])
    ),
}

TRAINING = {
    "lora": Method("LoRA", grid=grid(rate=LORA_RATES)),
    "start": Method("LoRA, DRIFT's start, no bias", drift={"drift_alpha": 0.0}, grid=grid(rate=LORA_RATES)),
    "full": Method("full fine-tuning", "full", grid=grid(rate=FULL_RATES)),
    "merge-lora": Method("merged, then LoRA", grid=grid(rate=[1e-3, 3e-3, 1e-2], merged=[0.2, 0.5, 1.0])),
    "full-drift": Method(
        "full DRIFT, as published",
        "full",
        drift={"drift_scale": "adaptive", "drift_target": "delta"},
        grid=grid(rate=[1e-4, 3e-4, 1e-3], drift_alpha=[0.3, 1.0, 3.0]),
    ),
    "drift": Method("DRIFT", drift=ADAPTIVE, grid=grid(rate=STEERED_RATES, drift_alpha=ALPHAS["adaptive"])),
    "decoupled": Method(
        "DRIFT, decoupled", drift=DECOUPLED, grid=grid(rate=[1e-3, 3e-3, 1e-2], drift_alpha=[10.0, 30.0, 100.0])
    ),
    "hold": Method("merged, then held LoRA", drift=HOLD, grid=grid(rate=STEERED_RATES, merged=[0.8, 0.9, 1.0])),
}

ANCESTOR = {  # the two ways that are best inside and outside the adapter, with Δ from the common ancestor
    f"{key}-ancestor": replace(TRAINING[key], title=f"{TRAINING[key].title}, Δ from the ancestor", prior="hierarchical")
    for key in ("drift", "merge-lora")
}
ANCESTOR["drift-start-ancestor"] = replace(  # as merging first, but in the adapter
    ANCESTOR["drift-ancestor"],
    title="DRIFT that starts at a part of Δ, Δ from the ancestor",
    drift=ADAPTIVE | {"drift_alpha": 0.3},
    grid=grid(rate=STEERED_RATES, drift_start=[0.2, 0.5, 1.0]),
)

# Of a keep set: how many images, what they show and what is asked of them (see `keeping`), and the k largest log
# probabilities of a token; of its use: weight, answers a step, and at every n-th step.
KEEP = {
    "keep_images": 240,
    "keep_variety": "as examined",
    "keep_top_k": 8,
    "keep_weight": 1.0,
    "keep_batch_size": 8,
    "keep_every": 1,
}
REPLAY = {"keep_images": 60, "keep_variety": "as examined", "keep_top_k": 8}  # beside 200 samples
KEPT_DRIFT = grid(rate=STEERED_RATES, drift_alpha=(0.1, 0.3, 1.0))  # 0.3 was at the edge without keeping


def kept(key: str, how: str) -> Method:
    """A method that keeps, on a grid of its own."""
    method = (TRAINING | ANCESTOR)[key]
    title = f"{method.title}, {'keeping' if how == 'kl' else 'replay of 60 answers'}"
    candidates = KEPT_DRIFT if key.startswith("drift") else method.grid
    return replace(method, title=title, kept=how, settings=KEEP if how == "kl" else REPLAY, grid=candidates)


KEPT = {
    f"{key}-keep": kept(key, "kl")
    for key in ("lora", "merge-lora", "drift", "drift-ancestor", "merge-lora-ancestor", "full", "full-drift")
}
KEPT["merge-drift-ancestor-keep"] = replace(  # what the two ways that are best do, one after the other
    KEPT["drift-ancestor-keep"],
    title="merged, then DRIFT, Δ from the ancestor, keeping",
    drift=ADAPTIVE | {"drift_alpha": 0.3},
    grid=grid(rate=STEERED_RATES, merged=[0.2, 0.5, 0.8]),
)
KEPT["hold-ancestor-keep"] = replace(  # pulled back to the merged base, as gently as keeping allows
    TRAINING["hold"],
    title="merged, then held LoRA, Δ from the ancestor, keeping",
    prior="hierarchical",
    kept="kl",
    settings=KEEP | {"rate": 5e-3},
    grid=grid(merged=[0.2, 0.5, 1.0], drift_alpha=[1.0, 3.0, 10.0]),
)
KEPT["drift-start-ancestor-keep"] = replace(
    ANCESTOR["drift-start-ancestor"],
    title="DRIFT that starts at a part of Δ, Δ from the ancestor, keeping",
    kept="kl",
    settings=KEEP,
)
KEPT["drift-start-keep"] = replace(
    KEPT["drift-start-ancestor-keep"], title="DRIFT that starts at a part of Δ, keeping", prior=KEPT["drift-keep"].prior
)
KEPT["drift-guide-ancestor-keep"] = replace(  # as guide() finds an adapter that another tool has made
    KEPT["drift-ancestor-keep"],
    title="DRIFT, PEFT's start, Δ from the ancestor, keeping",
    drift=ADAPTIVE | {"init_lora_weights": True},
    grid=grid(rate=[5e-3, 1e-2, 2e-2], drift_alpha=[0.1, 0.3, 1.0]),  # lower rates learned less
)
RANK_32 = {  # does it matter how much of Δ the adapter can hold?
    f"{key}-32": replace(KEPT[key], title=f"{KEPT[key].title}, rank 32", settings=KEPT[key].settings | {"r": 32})
    for key in ("merge-lora-ancestor-keep", "drift-start-ancestor-keep")
}
RANK_32["drift-start-ancestor-keep-32"] = replace(  # of a larger adapter the best rate is lower
    RANK_32["drift-start-ancestor-keep-32"], grid=grid(rate=[1e-3, 2e-3, 5e-3], drift_start=[0.2, 0.5, 1.0])
)
REPLAYED = {f"{key}-replay": kept(key, "replay") for key in ("lora", "merge-lora-ancestor", "drift-ancestor")}
REPLAYED |= {  # as many answers as keeping has
    f"{key}-240": replace(
        method, title=method.title.replace("60", "240"), settings=method.settings | {"keep_images": 240}
    )
    for key, method in REPLAYED.items()
}
KEPT |= REPLAYED

MORE = {  # the ways that keep best, each tuned again with four times the images
    f"{key}-more": replace(
        KEPT[key], title=f"{KEPT[key].title}, 960 images", settings=KEPT[key].settings | {"keep_images": 960}
    )
    for key in (
        *("lora-keep", "merge-lora-keep", "merge-lora-ancestor-keep", "drift-keep", "drift-ancestor-keep"),
        *("merge-drift-ancestor-keep", "hold-ancestor-keep", "drift-start-ancestor-keep"),
    )
}

COMPUTE = {  # as many passes over samples as the kept ones have, with keep's 8 answers beside 16 samples
    f"{key}-longer": replace(
        (TRAINING | ANCESTOR)[key],
        title=f"{(TRAINING | ANCESTOR)[key].title}, half as long again",
        settings={"steps": 225},
        grid=(),
        like=key,
    )
    for key in ("lora", "merge-lora-ancestor", "drift-ancestor")
}

# Chains in text, of as many operations as the expert was taught, and no image but those whose answers are kept.
TEXT_CHAINS = {"chains": "text", "operations": [1, 2, 3, 4, 5], "keep_weight": 3.0}


def in_text(method: Method) -> Method:
    """The method with chains in text alone, chosen by what it is to learn and what it is to keep."""
    title, settings = f"{method.title}, text chains alone", method.settings | TEXT_CHAINS
    return replace(method, title=title, settings=settings, chosen_by=("text reasoning", "perception"))


TEXT = {f"{key}-text": in_text(KEPT[f"{key}-keep"]) for key in ("lora", "merge-lora-ancestor", "drift-ancestor")}

STARTS = {  # PEFT's other starts of an adapter
    "pissa": Method("LoRA, PiSSA start", start="pissa", grid=grid(rate=LORA_RATES)),
    "eva": Method("LoRA, EVA start", start="eva", grid=grid(rate=LORA_RATES)),
    "lora-ga": Method("LoRA, LoRA-GA start", start="lora_ga", grid=grid(rate=LORA_RATES)),
}

# Every other scale, target and norm of DRIFT with LoRA. A constant direction, and one of fixed length, drive the
# adapter on for as long as there are steps, so they get lower rates.
VARIANTS = {
    f"{scale}-{target}": Method(
        f"DRIFT, {scale}, {target}",
        drift={"drift_scale": scale, "drift_target": target},
        grid=grid(rate=(5e-4, 1e-3, 3e-3) if target == "delta" else STEERED_RATES, drift_alpha=ALPHAS[scale]),
    )
    for scale, target in product(("adaptive", "gradnorm", "absolute"), ("residual", "delta", "factors"))
    if (scale, target) != ("adaptive", "residual")
} | {
    f"weight-{target}": Method(
        f"DRIFT, adaptive, {target}, the weight's norm",
        drift={"drift_scale": "adaptive", "drift_target": target, "drift_norm": "weight"},
        grid=grid(rate=(5e-4, 1e-3, 3e-3) if target == "delta" else STEERED_RATES, drift_alpha=ALPHAS["adaptive"]),
    )
    for target in ("residual", "delta")
}

NF4 = {
    f"{key}-nf4": Method(
        f"{TRAINING[key].title}, on NF4",
        drift=TRAINING[key].drift,
        four_bit=True,
        like=key,
    )
    for key in ("lora", "merge-lora", "drift", "decoupled", "hold")
}

PRIORS = {  # variants of Δ, as priors for the two ways to steer
    "hierarchical": "Δ from the ancestor, settings of Δ from the VLM",
    "negated": "−Δ",
    "random": "Δ's singular values, random vectors",
    "wrong": "Δ of a wrong expert",
    "weak": "Δ of a weaker expert",
}
CONTROLS = {
    f"{key}-{prior}": Method(f"{TRAINING[key].title}: {what}", drift=TRAINING[key].drift, prior=prior, like=key)
    for key, (prior, what) in product(("drift", "decoupled"), PRIORS.items())
} | {
    "pull-to-zero": Method(
        "LoRA pulled to zero",
        drift={"drift_scale": "decoupled", "drift_target": "base"},
        like="decoupled",
    )
}

TUNED_CONTROLS = {  # with candidates of their own, as many as DRIFT has
    "drift-random-tuned": replace(
        TRAINING["drift"], title="DRIFT: Δ's singular values, random vectors, tuned", prior="random"
    ),
    "drift-random-keep": replace(
        KEPT["drift-keep"], title="DRIFT: Δ's singular values, random vectors, keeping", prior="random"
    ),
    "pull-to-zero-keep": Method(
        "LoRA pulled to zero, keeping",
        drift={"drift_scale": "decoupled", "drift_target": "base"},
        kept="kl",
        settings=KEEP,
        grid=grid(rate=STEERED_RATES, drift_alpha=[1.0, 3.0, 10.0]),
    ),
}

METHODS = TRAINING_FREE | TRAINING | ANCESTOR | KEPT | MORE | COMPUTE | TEXT | STARTS | VARIANTS | NF4 | CONTROLS
METHODS |= TUNED_CONTROLS | RANK_32
assert all(len(method.grid) in (0, CANDIDATES) for method in METHODS.values())
