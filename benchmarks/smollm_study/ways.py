"""What a user could do with the VLM and the expert; each trained way with three learning rates that users use."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

RATES = tuple({"rate": rate} for rate in (1e-4, 3e-4, 1e-3))
SCALES = tuple({"scale": scale} for scale in (0.3, 0.6, 0.9))
WEIGHTS = tuple({"keep_weight": weight} for weight in (0.1, 0.3, 1.0))


@dataclass(frozen=True)
class Way:
    """One row.

    Attributes:
        title: its name.
        trains: an adapter on the 4-bit base, which is merged into the full-precision one afterwards.
        merged: λ of the Δ that is added to the VLM beforehand; where nothing is trained, `scale` of the grid is it.
        gated: the prior's directions are weighed by the expert's answers in text and the VLM's own about images; the
            grid is over κ, the weight of the latter.
        ancestor: Δ is the expert less the ancestor, not less the VLM.
        drift: settings of DriftConfig; None trains plain LoRA.
        kept: near the VLM's own answers to images without labels.
        grid: the candidates, chosen among on validation samples.
    """

    title: str
    trains: bool = True
    merged: float = 0.0
    gated: bool = False
    ancestor: bool = False
    drift: dict | None = None
    kept: bool = False
    grid: tuple[dict, ...] = field(default=RATES)

    @property
    def checkpoints(self) -> tuple[str, ...]:
        """Those that it is made of and measured with."""
        scaled = any("scale" in candidate for candidate in self.grid)
        expert = self.gated or self.merged or self.drift is not None or scaled
        return ("base", "vlm", "expert") if expert else ("base", "vlm")


DRIFT = {"drift_alpha": 0.3}  # as the recipes for real pairs have it
TRAINED = {
    "lora": Way("LoRA"),
    "merge-lora": Way("merged, then LoRA", merged=0.5),
    "merge-lora-ancestor": Way("merged, then LoRA, Δ from the ancestor", merged=0.5, ancestor=True),
    "drift": Way("DRIFT", drift=DRIFT),
    "drift-ancestor": Way("DRIFT, Δ from the ancestor", ancestor=True, drift=DRIFT),
}
KEPT = {f"{key}-keep": replace(way, title=f"{way.title}, keeping", kept=True) for key, way in TRAINED.items()}
STARTED = {  # the same half of Δ as merging first adds, but in the adapter
    key.replace("drift", "drift-start"): replace(
        KEPT[key],
        title=KEPT[key].title.replace("DRIFT", "DRIFT that starts at half of Δ"),
        drift=DRIFT | {"drift_start": 0.5},
    )
    for key in ("drift-ancestor-keep", "drift-keep")
}
WAYS = {  # in the order in which they are run
    "vlm": Way("VLM as it is", trains=False, grid=()),
    "task-arithmetic-ancestor": Way("task arithmetic, Δ from the ancestor", False, ancestor=True, grid=SCALES),
    **{key: TRAINED[key] for key in ("lora", "drift-ancestor")},
    **{key: KEPT[key] for key in ("drift-ancestor-keep", "lora-keep", "merge-lora-ancestor-keep")},
    "gates-ancestor": Way("gates, Δ from the ancestor", False, gated=True, ancestor=True, grid=WEIGHTS),
    "task-arithmetic": Way("task arithmetic", trains=False, grid=SCALES),
    "gates": Way("gates", trains=False, gated=True, grid=WEIGHTS),
}
WAYS |= {key: way for key, way in (TRAINED | KEPT | STARTED).items() if key not in WAYS}
# In 100 steps at 1e-3, with the cosine, the shares that it takes add up to 5.
DECOUPLED = {"drift_scale": "decoupled", "drift_target": "factors", "drift_alpha": 100.0}
SWEEPS = {  # way -> changes of the settings that were chosen for it: is another one better?
    "drift-ancestor-keep": (
        {"scale": 0.5},
        {"r": 64},
        {"drift_alpha": 0.1},
        {"drift_alpha": 1.0},
        DECOUPLED,
        {"drift_target": "delta"},
        {"rate": 2e-3},
    ),
    "lora-keep": ({"rate": 2e-3},),
    "merge-lora-ancestor-keep": ({"rate": 2e-3},),
    "drift-keep": ({"scale": 0.5}, {"r": 64}),
}
