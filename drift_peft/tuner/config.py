"""DriftConfig: LoRA's own configuration plus what the guidance needs, and how both are stored on disk."""

from __future__ import annotations

import copy
import inspect
import json
import os
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_origin, get_type_hints

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError
from peft import LoraConfig, PeftConfig
from pydantic import create_model
from torch import Tensor

from ..arguments import is_number, is_whole, nearest, plain
from ..atomic import write_text
from ..checkpoints import DRIFT_CONFIG, PLAIN_STARTS, Schema, check, lora_variants, needs_peft, read_json
from .card import update_card
from .field_docs import documented, own_fields
from .settings import DriftSettings, check_settings

STARTS = ("drift", *PLAIN_STARTS)  # the others (PiSSA, OLoRA, …) change W, and with it Δ
# Variants of LoRA that act on the weight as W + s·B·A too: one on the tokens after an invocation, one with compressed
# activations.
PLAIN_CHAIN_RULE = ("alora_invocation_tokens", "velora_config")


@documented(LoraConfig)
@dataclass
class DriftConfig(DriftSettings, LoraConfig):
    """LoRA whose gradients are biased toward a reasoning prior (DRIFT, arXiv 2510.15050, equations 3 and 4).

    All of `LoraConfig`'s fields keep their meaning. `target_modules=None` means exactly the language model's
    projections that the prior covers; without a prior, which strength 0 and `drift_target="base"` need none of, all of
    the language model's projections. On disk the adapter is plain LoRA; the guidance's own fields, which stand in
    `DriftSettings`, go to `drift_config.json`.

    Raises:
        TypeError: an unknown field (the nearest known one is named).
        ValueError: a value out of range, a LoRA variant with another chain rule, or no prior to train with.

    Example:
        >>> config = DriftConfig(prior="prior.safetensors", r=8, lora_alpha=16, task_type="CAUSAL_LM")
        >>> config.drift_scale, config.drift_target, config.drift_alpha
        ('adaptive', 'residual', 0.3)
        >>> model = get_peft_model(vlm, config)
        >>> model.get_base_model().model.visual.blocks[0].attn.qkv  # the vision tower is left alone
        Linear(in_features=64, out_features=192, bias=True)
    """

    init_lora_weights: bool | str = field(  # PEFT reads which LoRA variants a start may ask for from this metadata
        default="drift",
        metadata={
            **LoraConfig.__dataclass_fields__["init_lora_weights"].metadata,
            "help": "'drift': lora_A starts in the top right singular vectors of Δ, and lora_B at 0, or as drift_start "
            "says; or PEFT's own.",
            "range": ", ".join(map(repr, STARTS)),
        },
    )

    def __new__(cls, *args, **kwargs):
        known = [f.name for f in fields(cls)]
        for name in kwargs:
            if name not in known:
                words = f"{cls.__name__} got an unexpected keyword argument '{name}'", nearest(name, known)
                raise TypeError("; ".join(filter(None, words)))
        return super().__new__(cls)

    def __post_init__(self):
        for f in fields(self):
            setattr(self, f.name, plain(getattr(self, f.name)))
        if isinstance(self.drift_steps, Tensor):  # as steps with a GradScaler are counted
            self.drift_steps = int(self.drift_steps)
        if isinstance(self.drift_modules, (set, frozenset)):  # as PEFT takes target_modules
            self.drift_modules = sorted(self.drift_modules, key=repr)
        start = self.init_lora_weights
        self.init_lora_weights = True if start == "drift" else start  # PEFT refuses other starts beside lora_bias
        super().__post_init__()
        self.init_lora_weights = start
        self.prior = os.fspath(self.prior) if isinstance(self.prior, os.PathLike) else self.prior
        check_settings(self)
        self._check_lora()
        needless = not self.pulls and not self.drift_start and self.prior is None
        if needless and self.init_lora_weights == "drift":
            self.init_lora_weights = True  # there is no Δ to start from
        if self.prior is not None and not isinstance(self.prior, str):
            raise ValueError(f"prior must be a path or a hub id, got {type(self.prior).__name__}.")
        if self.prior == "":
            raise ValueError("prior is empty: name a file, a folder or a hub id.")
        if self.prior is None and not self.inference_mode and not needless:
            raise ValueError(
                "DriftConfig needs a prior to train: build one with build_prior(expert, base, output) and pass its "
                "path, or use peft.LoraConfig for training without guidance."
            )

    def _check_lora(self) -> None:
        if not is_whole(self.r):
            raise ValueError(f"r must be a whole number ≥ 1, got {self.r!r}.")
        if isinstance(self.modules_to_save, str):  # of which PEFT would take each letter for a name
            raise ValueError(f"modules_to_save must be a list, such as ['lm_head'], got '{self.modules_to_save}'.")
        alphas = {f"alpha_pattern[{key!r}]": alpha for key, alpha in (self.alpha_pattern or {}).items()}
        alphas["lora_alpha"] = self.lora_alpha
        for name, alpha in alphas.items():
            if not is_number(alpha):
                raise ValueError(
                    f"{name}={alpha!r} is no finite number: lora_alpha and alpha_pattern scale the adapter."
                )
        if not is_number(self.lora_dropout) or self.lora_dropout > 1:  # what is not above 0 is none, to PEFT too
            raise ValueError(
                f"lora_dropout is the probability that a number is left out, at most 1, got {self.lora_dropout!r}."
            )
        if self.init_lora_weights not in STARTS:
            raise ValueError(
                f"init_lora_weights={self.init_lora_weights!r} is not available with guidance: choose one of "
                f"{', '.join(map(repr, STARTS))}; starts that change the base weight also change Δ."
            )
        refused = [v for v in [*lora_variants(), "use_qalora", "layer_replication"] if getattr(self, v, None)]
        refused = [v for v in refused if v not in PLAIN_CHAIN_RULE]
        if refused:
            raise ValueError(
                f"{refused[0]} changes how an adapter acts on the weight, so the guidance of plain LoRA would be "
                f"wrong for it: leave out {' and '.join(refused)}."
            )
        if self.bias == "lora_only" and not self.inference_mode:
            needs_peft((0, 21), "bias='lora_only'", "does not save the biases that it trains", "take bias='all'")
        if self.drift_start and self.init_lora_weights != "drift":
            raise ValueError(
                f"drift_start={self.drift_start} puts a part of Δ into the adapter, but init_lora_weights="
                f"{self.init_lora_weights!r} starts it otherwise: leave out either."
            )
        if (self.drift_target == "factors" or self.drift_start) and min(alphas.values()) <= 0:
            name = "drift_target='factors'" if self.drift_target == "factors" else f"drift_start={self.drift_start}"
            raise ValueError(
                f"{name} needs a positive LoRA scaling, since what it makes of Δ is divided by it, got "
                f"lora_alpha={self.lora_alpha} and alpha_pattern={self.alpha_pattern}."
            )

    # On disk: what stock PEFT writes for LoRA, and our settings beside it.

    def to_lora(self) -> LoraConfig:
        """The same adapter as stock PEFT knows it; `init_lora_weights` is True where the start is ours.

        Example:
            >>> config = DriftConfig(prior="prior.safetensors", r=8)
            >>> type(config.to_lora()).__name__, config.to_lora().init_lora_weights
            ('LoraConfig', True)
        """
        lora = {f.name: getattr(self, f.name) for f in fields(LoraConfig)}
        lora["init_lora_weights"] = True if self.init_lora_weights == "drift" else self.init_lora_weights
        return LoraConfig(**lora)

    def beside(self, lora: LoraConfig) -> DriftConfig:
        """These settings with the LoRA of an adapter that `guide` steers, whose config is not ours."""
        both = copy.copy(self)
        for f in fields(LoraConfig):
            setattr(both, f.name, getattr(lora, f.name))
        if self.init_lora_weights == "drift":  # it was given by `guide`
            both.init_lora_weights = "drift"
        return both

    def to_dict(self) -> dict[str, Any]:
        """All fields, with the guided steps so far as a plain number."""
        return {**super().to_dict(), "drift_steps": int(self.drift_steps)}

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """Write `adapter_config.json` (plain LoRA) and `drift_config.json` (the settings, the prior, guided steps).

        Example:
            >>> DriftConfig(prior="prior.safetensors", r=8).save_pretrained("settings")
            >>> DriftConfig.stored("settings")["drift_target"]
            'residual'
        """
        self.to_lora().save_pretrained(save_directory, **kwargs)
        self.save_settings(Path(save_directory))

    def save_settings(self, folder: Path) -> None:
        """What is ours in the folder of an adapter: `drift_config.json`, and a section of the card."""
        own = {name: value for name, value in self.to_dict().items() if name in _stored_fields()}
        write_text(folder / DRIFT_CONFIG, json.dumps(own, indent=2, sort_keys=True) + "\n")
        update_card(folder, self)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs) -> DriftConfig:
        """Read an adapter's settings back, for more training: `PeftModel.from_pretrained(base, dir, config=…,
        is_trainable=True)`.

        Fields given by name replace the stored ones, such as `drift_alpha=0.3`, or `prior=` for a file that has moved.
        Other keywords (`revision`, `token`, …) go to the hub.

        Raises:
            TypeError: an unknown keyword.
            ValueError: the folder or hub repository has no `drift_config.json`, or it holds unknown settings.

        Example:
            >>> config = DriftConfig.from_pretrained("adapter", drift_alpha=0.1)  # an adapter's folder
            >>> model = PeftModel.from_pretrained(vlm, "adapter", config=config, is_trainable=True)
        """
        source = os.fspath(pretrained_model_name_or_path)
        hub, _, _ = PeftConfig._split_kwargs(kwargs)
        given = {name: value for name, value in kwargs.items() if name not in hub}
        lora = LoraConfig.from_pretrained(source, subfolder=subfolder, **hub)
        own = cls.stored(source, subfolder, **hub)
        if own is None:
            raise ValueError(
                f"'{source}' has no {DRIFT_CONFIG}, the settings of what was steered: load it as plain LoRA with "
                "PeftModel.from_pretrained(base, folder), or steer it with guide(model, prior)."
            )
        if "prior" in given:
            own["prior_sha256"] = None  # the new file is accepted as it is
        start = own.setdefault("drift_start", 0.0)
        if given.get("drift_start", start) != start:
            raise ValueError(
                f"The adapter in '{source}' had its start with drift_start={start}: leave out drift_start="
                f"{given['drift_start']!r}."
            )
        for name in ("r", "rank_pattern"):
            if name in given and given[name] != getattr(lora, name):
                raise ValueError(
                    f"The adapter in '{source}' has {name}={getattr(lora, name)!r}: leave out {name}={given[name]!r}."
                )
        if given.get("prior", "") is None:
            own["drift_start"] = 0.0  # it needs a prior, and is past
        shared = {f.name: getattr(lora, f.name) for f in fields(LoraConfig)}
        shared["inference_mode"] = False  # as PEFT stores it, nothing would be trained
        config = cls(**{**shared, **own, **given})
        config.read_from = os.path.realpath(source)  # these weights' guided steps are known
        return config

    @staticmethod
    def stored(source: str, subfolder: str | None = None, **hub) -> dict[str, Any] | None:
        """What `drift_config.json` of an adapter's folder or hub repository says; None if there is none.

        Raises:
            ValueError: it holds unknown settings, or is no JSON.

        Example:
            >>> DriftConfig.stored("adapter")["drift_steps"]
            2
        """
        path = settings_file(source, subfolder, **hub)
        if path is None:
            return None
        own = read_json(path)
        try:
            check(own, _stored_form())
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}): save the adapter again") from error
        if unknown := sorted(set(own) - _stored_fields()):
            raise ValueError(f"{path} holds the unknown setting '{unknown[0]}': was it written by a newer drift_peft?")
        return own


def settings_file(source: str, subfolder: str | None = None, **hub) -> Path | None:
    """`drift_config.json` of an adapter's folder or hub repository; None if there is none."""
    path = Path(source, subfolder or "", DRIFT_CONFIG)
    if path.is_file():
        return path
    if Path(source).is_dir():  # of an adapter that is not ours: its path is no repository
        return None
    try:
        return Path(hf_hub_download(source, DRIFT_CONFIG, subfolder=subfolder, **hub))
    except (HFValidationError, OSError):
        return None


def _stored_form() -> type[Schema]:
    """What drift_config.json may hold: the settings' own types, whatever of them there is."""
    hints = get_type_hints(DriftSettings) | {"init_lora_weights": bool | str}
    types = {name: str if get_origin(hints[name]) is Literal else hints[name] for name in _stored_fields()}
    return create_model("Stored", __base__=Schema, **{name: (kind, None) for name, kind in types.items()})


# Else `__new__` hides the fields from inspect.signature, and so from completion in editors.
DriftConfig.__signature__ = inspect.signature(partial(DriftConfig.__init__, None))


def _stored_fields() -> set[str]:
    """Names of the fields that are ours, so that they go to drift_config.json; but what concerns a run's logs alone."""
    known = DriftConfig.__dataclass_fields__
    return {name for name in own_fields(DriftConfig, LoraConfig) if known[name].metadata.get("stored", True)}
