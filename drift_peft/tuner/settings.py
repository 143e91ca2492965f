"""The guidance's own settings: what they are, what values they may have, and what they say about a weight."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, Literal, get_args, get_type_hints

from ..arguments import check_type, check_whole, is_number, is_of, is_whole, nearest, plain
from ..checkpoints import module_kind, named, pattern_matches
from ..choices import MODULES
from ..prior import MergedDelta

SPECTRA = {"full": 1.0, "flat": 0.0}
# Read at each step, so that they may change between steps. The others say what is made when a model is wrapped.
CHANGING = (
    "drift_alpha",
    "drift_alpha_pattern",
    "drift_scale",
    "drift_warmup_steps",
    "drift_decay_steps",
    "drift_log_kinds",
)
FIXED = (
    "prior",
    "drift_target",
    "drift_rank",
    "drift_start",
    "drift_norm",
    "drift_sketch",
    "drift_spectrum",
    "drift_modules",
)


@dataclass
class DriftSettings:
    """What the guidance knows of its settings: the fields of `DriftConfig` that are not LoRA's."""

    prior: str | None = field(
        default=None,
        metadata={
            "help": "The prior that steers: its file, or its hub id (`id@revision`).",
            "range": "None at strength 0 or with drift_target='base' alone",
        },
    )
    drift_alpha: float = field(
        default=0.3,  # of the adaptive scale: benchmarks/RESULTS.md, chosen by the exams over images
        metadata={
            "help": "Strength a of the pull toward the expert; 0 is plain LoRA. The paper's α is −a.",
            "range": "a finite number ≥ 0",
        },
    )
    drift_scale: Literal["adaptive", "gradnorm", "absolute", "decoupled"] = field(
        default="adaptive",
        metadata={
            "help": "How the bias is scaled against the gradient; 'decoupled' acts after the step instead.",
            "range": "'decoupled' with drift_target='factors' or 'base' alone",
        },
    )
    drift_target: Literal["residual", "delta", "factors", "base"] = field(
        default="residual",
        metadata={
            "help": "What the bias points to: Δ − sBA, Δ, the SVD's own factors, or the base (sBA = 0).",
            "range": "'base' with drift_scale='decoupled' alone",
        },
    )
    drift_rank: int | None = field(
        default=None,
        metadata={
            "help": "Rank to which Δ is truncated; None: the adapter's own rank.",
            "range": "None, or a whole number ≥ 1; None with drift_target='factors'",
        },
    )
    drift_start: float = field(
        default=0.0,
        metadata={
            "help": "Share of Δ that the LoRA factors hold before the first step; 0 leaves the outputs unchanged.",
            "range": "a number from 0 to 1; above 0 with init_lora_weights='drift', and not with drift_target='base'",
        },
    )
    drift_norm: Literal["factor", "weight"] = field(
        default="factor",
        metadata={
            "help": "Whose norm and cosine scale the bias: each LoRA factor's, or the weight gradient's.",
            "range": "'weight' with drift_target='residual' or 'delta' alone",
        },
    )
    drift_sketch: int | None = field(
        default=64,
        metadata={
            "help": "drift_norm='weight': columns of the sketch that ‖G‖ is taken from; None keeps G itself.",
            "range": "None, or a whole number ≥ 1",
        },
    )
    drift_spectrum: str | float = field(
        default="full",
        metadata={
            "help": "Weight of Δ's singular directions: 'full' S, 'flat' all alike, or a power p for S^p.",
            "range": "'full', 'flat', or a number between 0 and 4",
        },
    )
    drift_modules: str | list[str] | None = field(
        default=None,
        metadata={
            "help": "Where the bias acts: presets attn, mlp, bias, norm, head, embed or regular expressions.",
            "range": "None for everything that the prior has, one name, or a list of them; each has to match something",
        },
    )
    drift_alpha_pattern: dict[str, float] = field(
        default_factory=dict,
        metadata={
            "help": "Regular expression of weight names -> strength there.",
            "range": "finite numbers ≥ 0; each expression has to match something",
        },
    )
    drift_warmup_steps: int = field(
        default=0,
        metadata={
            "help": "Optimizer steps over which the strength grows linearly from 0.",
            "range": "a whole number ≥ 0",
        },
    )
    drift_decay_steps: int | None = field(
        default=None,
        metadata={
            "help": "Optimizer steps after the warm-up over which it goes to 0; None: it stays.",
            "range": "None, or a whole number ≥ 1",
        },
    )
    drift_log_kinds: bool = field(
        default=False,
        metadata={"help": "In Trainer's logs also the numbers of attn, mlp, … beside their totals.", "stored": False},
    )
    prior_sha256: str | None = field(
        default=None, metadata={"help": "SHA-256 of the prior file; filled in when the model is wrapped."}
    )
    drift_steps: int = field(default=0, metadata={"help": "Guided optimizer steps so far; counted while training."})
    quantization: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "transformers' quantization_config of the base in training, {} if it was in full precision; filled "
            "in when the model is wrapped."
        },
    )

    # Known only while training, on the instance, and not stored.
    repeated_steps: ClassVar[int] = 0  # steps taken twice on the same gradients
    iteration: ClassVar[Any] = 0  # guided steps before this iteration, in which several optimizers may step
    stepped: ClassVar[frozenset] = frozenset()  # what they have trained in it so far
    origins: ClassVar[Sequence[tuple[str, dict]]] = ()  # (role, id and revision) of what the prior was made from
    merged: ClassVar[MergedDelta | None] = None  # the part of Δ that the base has taken in
    trained_on: ClassVar[str | None] = None  # name of the data set
    training: ClassVar[str | None] = None  # Trainer's settings, in words
    keeping: ClassVar[str | None] = None  # what keeps the model, in words
    loaded_by: ClassVar[str | None] = None  # the name of the auto class that loads the base
    read_from: ClassVar[str | None] = None  # the folder of these settings, until its weights are loaded, too
    steps_before: ClassVar[int] = 0  # guided steps under settings that these have replaced
    steps_of_weights: ClassVar[int | None] = None  # guided steps of the weights that the adapter shall get
    weights_loaded: ClassVar[bool] = False  # whether it has got any; also on a plain LoraConfig
    in_force: ClassVar[bool] = False  # something is steered by these settings

    def __setattr__(self, name: str, value: Any) -> None:
        """Of settings in force, refuse what cannot change any more, and what is out of range."""
        before = getattr(self, name, None)
        value = plain(value) if self.in_force and name in (*CHANGING, *FIXED) else value
        if self.in_force and name in FIXED and value != before:
            raise ValueError(
                f"{name}={value!r} comes too late, since what is steered was made with {name}={before!r}: wrap a model "
                f"with another DriftConfig. Between steps {', '.join(CHANGING)} may change."
            )
        super().__setattr__(name, value)
        if self.in_force and name in CHANGING:
            try:
                check_settings(self)
            except ValueError:
                super().__setattr__(name, before)
                raise

    @property
    def expert(self) -> str | None:
        """The names of the experts that the prior, or what it was combined from, was made from."""
        experts = dict.fromkeys(named(origin) for role, origin in self.origins if role == "expert")
        return " and ".join(experts) or None

    @property
    def guides(self) -> bool:
        """Is there any strength, anywhere?"""
        return any([self.drift_alpha, *self.drift_alpha_pattern.values()])

    @property
    def pulls(self) -> bool:
        """Is there a pull toward the expert?"""
        return self.guides and self.drift_target != "base"

    def absorbed(self, name: str) -> bool:
        """Has the base taken in all of this weight's Δ, so that nothing is left to pull to, or to start with?"""
        return bool(self.pulls or self.drift_start) and self.merged is not None and self.merged.scale_of(name) == 1

    @property
    def spectrum_power(self) -> float:
        """p of S^p (see `guidance.spectrum`)."""
        return SPECTRA.get(self.drift_spectrum, self.drift_spectrum)


def check_settings(config: DriftSettings) -> None:
    """Refuse a guidance setting that is out of range, by name and value, with the way out.

    Raises:
        ValueError: the value is unknown, out of range, or at odds with another setting.
    """
    types = get_type_hints(DriftSettings)
    for name in ("drift_scale", "drift_target", "drift_norm"):
        _choose(name, getattr(config, name), get_args(types[name]))
    alpha, rank = config.drift_alpha, config.drift_rank
    if not is_number(alpha):
        raise ValueError(f"drift_alpha must be a finite number ≥ 0, got {alpha!r}.")
    if alpha < 0:
        raise ValueError(
            f"drift_alpha={alpha} is negative: a positive strength pulls toward the expert here, so where the paper "
            f"writes α = {alpha} set drift_alpha={-alpha}."
        )
    for name in ("drift_rank", "drift_sketch", "drift_decay_steps"):
        if (value := getattr(config, name)) is not None and not is_whole(value):
            raise ValueError(f"{name} must be None or a whole number ≥ 1, got {value!r}.")
    check_whole(0, drift_warmup_steps=config.drift_warmup_steps, drift_steps=config.drift_steps)
    check_type("prior_sha256", config.prior_sha256, str | None)
    if not is_number(config.drift_start) or not 0 <= config.drift_start <= 1:
        raise ValueError(f"drift_start is a share of Δ, a number from 0 to 1, got {config.drift_start!r}.")
    if config.drift_scale == "decoupled" and config.drift_target not in ("factors", "base"):
        raise ValueError(
            f"drift_scale='decoupled' moves the factors themselves, so drift_target={config.drift_target!r} has no "
            "meaning for it: set drift_target='factors' or 'base'."
        )
    if config.drift_target == "base" and config.drift_scale != "decoupled":
        raise ValueError(
            f"drift_target='base' holds the adapter near the base after each step, so drift_scale="
            f"{config.drift_scale!r} has no meaning for it: set drift_scale='decoupled'."
        )
    if config.drift_start and config.drift_target == "base":
        raise ValueError(
            f"drift_start={config.drift_start} puts a part of Δ into the adapter, and drift_target='base' would pull "
            "it out again: leave out either."
        )
    if config.drift_norm == "weight" and config.drift_target not in ("residual", "delta"):
        raise ValueError(
            f"drift_norm='weight' compares the weight gradient with a direction in weight space, which drift_target="
            f"{config.drift_target!r} does not have: set drift_target='residual' or 'delta', or drift_norm='factor'."
        )
    check_type("drift_log_kinds", config.drift_log_kinds, bool)
    _check_spectrum(config.drift_spectrum)
    _check_patterns(config)
    if config.drift_target == "base" and (rank is not None or config.spectrum_power != 1):
        name = "drift_spectrum" if rank is None else "drift_rank"
        raise ValueError(
            f"{name}={getattr(config, name)!r} has no meaning with drift_target='base', which goes to no part of Δ: "
            "leave it out."
        )
    if config.drift_target == "factors" and rank is not None:
        raise ValueError(
            f"drift_rank={rank} has no meaning with drift_target='factors', which gives every row of lora_A its own "
            "target: leave drift_rank=None."
        )


def drift_alpha_of(config: DriftSettings, name: str) -> float:
    """The strength a for a canonical weight name: that of the first pattern that matches it, else drift_alpha."""
    return next((a for key, a in config.drift_alpha_pattern.items() if _matches(key, name)), config.drift_alpha)


def is_guided(config: DriftSettings, name: str) -> bool:
    """Does `drift_modules` select this canonical weight name?"""
    return config.drift_modules is None or any(_selects(key, name) for key in listed_modules(config.drift_modules))


def check_patterns_used(config: DriftSettings, names: Iterable[str]) -> None:
    """Refuse a setting for weights that are not there: nothing that was configured is skipped.

    Raises:
        ValueError: a pattern of drift_alpha_pattern, or a part of drift_modules, matches none of these names.
    """
    names = list(names)
    for key in listed_modules(config.drift_modules):
        if not any(_selects(key, name) for name in names):
            raise ValueError(
                f"drift_modules names {key!r}, but nothing that would be steered matches it: there is "
                f"{', '.join(sorted({str(module_kind(name)) for name in names})) or 'nothing'}."
            )
    guided = [name for name in names if is_guided(config, name)]
    for key in config.drift_alpha_pattern:
        if not any(_matches(key, name) for name in guided):
            named = f"its names are like {guided[0]}" if guided else "nothing is steered at all"
            raise ValueError(
                f"drift_alpha_pattern names {key!r}, but nothing that is steered matches it: {named}; take it out, or "
                "add it to drift_modules."
            )


def refuse_unmeasured(config: DriftSettings, name: str) -> None:
    """Of LoRA on an embedding or by target_parameters, no gradient of the weight can be summed."""
    if config.drift_norm == "weight" and is_guided(config, name) and drift_alpha_of(config, name):
        raise ValueError(
            f"drift_norm='weight' is not available for LoRA on an embedding or by target_parameters, such as {name}: "
            "use drift_norm='factor', or leave it out of drift_modules."
        )


def listed_modules(modules: str | list[str] | None) -> list[str]:
    return [modules] if isinstance(modules, str) else modules or []


def _selects(key: str, name: str) -> bool:
    return module_kind(name) == key if key in MODULES else _matches(key, name)


@cache  # asked at every step
def _matches(pattern: str, name: str) -> bool:
    """As PEFT's rank_pattern; `.weight` is left out."""
    return pattern_matches(pattern, name.removesuffix(".weight"))


def _check_spectrum(spectrum: Any) -> None:
    if isinstance(spectrum, str):
        _choose("drift_spectrum", spectrum, tuple(SPECTRA))
    elif not is_number(spectrum) or not 0 <= spectrum <= 4:
        raise ValueError(f"drift_spectrum must be 'full', 'flat' or a power between 0 and 4, got {spectrum!r}.")


def _check_patterns(config: DriftSettings) -> None:
    modules, listed = config.drift_modules, listed_modules(config.drift_modules)
    if modules is not None and not (is_of(listed, Sequence[str]) and listed and all(listed)):
        raise ValueError(
            f"drift_modules must be None, or name presets ({', '.join(MODULES)}) or regular expressions, got "
            f"{modules!r}."
        )
    check_type("drift_alpha_pattern", config.drift_alpha_pattern, dict[str, Any])
    for name, keys in (("drift_modules", listed), ("drift_alpha_pattern", config.drift_alpha_pattern)):
        for key in keys:
            try:
                pattern_matches(key, "")
            except ValueError as error:
                raise ValueError(f"{name}: {error}.") from error
    for key, alpha in config.drift_alpha_pattern.items():
        if not is_number(alpha) or alpha < 0:
            raise ValueError(f"drift_alpha_pattern[{key!r}] must be a finite number ≥ 0, got {alpha!r}.")


def _choose(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        words = f"{name}={value!r} is unknown: choose one of {', '.join(map(repr, known))}", nearest(str(value), known)
        raise ValueError("; ".join(filter(None, words)))
