"""What a run of a recipe takes and refuses before it reads a model, as far as that needs no TRL: recipes/sft_vlm.py and
preflight ask here."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from enum import Enum
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from transformers import TrainingArguments

from ..arguments import check_whole, nearest
from ..recipe import as_meant, check_value, read_yaml
from ..tuner import DriftConfig
from ..warn import warn

WHOLE = ("prior_rank", "max_tokens", "keep_samples", "keep_top_k", "keep_max_new_tokens")
WHOLE += ("keep_batch_size", "keep_every")  # what there is at least one of
STEP = ("per_device_train_batch_size", "gradient_accumulation_steps")
NO_EVALUATION = "a recipe has no data for an evaluation while it trains: leave it out, and ask evaluate.py afterwards"
NEVER = {  # TRL's settings that no recipe can take, unless they are as they come -> why
    "packing": "samples with images cannot be packed: leave it out",
    "padding_free": "samples with images are padded: leave it out",
    "assistant_only_loss": "the loss is on the last turn alone: leave it out",
    "pad_to_multiple_of": "a question and its answer are not padded to a multiple: leave it out",
    "save_only_model": "training goes on from a checkpoint only with its optimizer: leave it out",
}
LOADED = {  # keys of model_init_kwargs that no recipe can take -> why
    "revision": "while prior, keep set and processor are those of base: name it there, as base: id@revision",
    "quantization_config": "which the recipe sets itself: leave it out",
    "torch_dtype": "the former name of dtype, which is set beside it and wins: write dtype",
    **dict.fromkeys(
        ("subfolder", "variant", "config", "state_dict"),
        "which may load other weights than those that prior and keep set are made of: leave it out",
    ),
}


@dataclass
class RunArguments:
    base: str = field(metadata={"help": "vision-language model in full precision: folder, hub id or id@revision"})
    data: str = field(metadata={"help": "chains of thought, about images or text: file, folder or hub id; see data.py"})
    method: Literal["drift", "sft"] = field(
        default="drift", metadata={"help": "drift: steered by the prior; sft: plain LoRA fine-tuning, without a prior"}
    )
    prior: str | None = field(
        default=None, metadata={"help": "file.safetensors, built from the expert if it is not there; or a hub id"}
    )
    expert: str | None = field(default=None, metadata={"help": "text-only reasoning model: folder, hub id, adapter"})
    reference: str | None = field(default=None, metadata={"help": "what the expert was trained from, if not the base"})
    merge_first: float | None = field(
        default=None, metadata={"help": "λ: train on base + λΔ, made beside the output; drift then steers to the rest"}
    )
    prior_rank: int = field(default=64, metadata={"help": "rank of the prior, if it is built"})
    split: str = field(default="train", metadata={"help": "split of the data"})
    images: str | None = field(default=None, metadata={"help": "folder that the data's image paths start from"})
    streaming: bool = field(default=False, metadata={"help": "do not download the data first; needs --max-steps"})
    on_bad: Literal["drop", "fail"] = field(
        default="drop", metadata={"help": "samples that cannot be used: drop, or fail"}
    )
    max_tokens: int = field(default=4096, metadata={"help": "longest sample, with its images' tokens; none is cut"})
    on_long: Literal["drop", "fail"] = field(default="drop", metadata={"help": "longer samples: drop, or fail"})
    images_per_sample: int = field(default=1, metadata={"help": "most that one has; only preflight asks"})
    processor_kwargs: dict | str | None = field(default=None, metadata={"help": "settings of the processor, as YAML"})
    think_tokens: bool = field(default=False, metadata={"help": "train <think> and </think> as tokens of their own"})
    keep: str | None = field(
        default=None, metadata={"help": "keep set, file.safetensors, made of the data's images if it is not there"}
    )
    keep_images: str | None = field(
        default=None, metadata={"help": "pictures to make it of, if not the data's: folder, file or hub data set"}
    )
    keep_samples: int = field(default=300, metadata={"help": "answers of the keep set, if it is made"})
    keep_top_k: int = field(default=32, metadata={"help": "log probabilities that it has of each token, if it is made"})
    keep_questions: str | None = field(default=None, metadata={"help": "file of questions for it; built-in if none"})
    keep_max_new_tokens: int = field(default=64, metadata={"help": "its longest answer; longer ones are cut there"})
    keep_weight: float = field(default=1.0, metadata={"help": "weight of the distance from the keep set's answers"})
    keep_bound: float = field(default=1.0, metadata={"help": "most that it adds, as a multiple of the gradient"})
    keep_batch_size: int = field(default=1, metadata={"help": "answers a step"})
    keep_every: int = field(default=1, metadata={"help": "only every so many steps"})
    replay: float = field(
        default=0.0, metadata={"help": "instead: share of the training samples that are answers of the keep set"}
    )
    merge: bool = field(default=False, metadata={"help": "merge into the full-precision base in the end"})
    verify: bool = field(
        default=True, metadata={"help": "of merge: compare with what was trained; takes the model in fp32, in turn"}
    )

    def __post_init__(self):
        hint = get_type_hints(RunArguments)["processor_kwargs"]
        self.processor_kwargs = as_meant("processor_kwargs", self.processor_kwargs, hint) or {}
        check_value("processor_kwargs", self.processor_kwargs, dict)
        for key, value in vars(self).items():
            if value == "":
                raise ValueError(f"{key} is empty: give it a value, or leave it out")
        check_whole(**{key: getattr(self, key) for key in WHOLE})
        if not 0 <= self.keep_weight < math.inf:
            raise ValueError(f"keep_weight is a number of at least 0, and 0 keeps nothing, got {self.keep_weight}")
        if not 0 < self.keep_bound < math.inf:
            raise ValueError(f"keep_bound is a number above 0, such as 1, got {self.keep_bound}")
        if self.method == "drift" and self.prior is None:
            raise ValueError("method drift needs a prior: name the file to build it in, or set method to sft")
        if self.merge_first is not None and not (math.isfinite(self.merge_first) and self.merge_first):
            raise ValueError(f"merge_first is the share of Δ to merge, such as 0.5, got {self.merge_first}")
        if not 0 <= self.replay < 1:
            raise ValueError(f"replay is a share of the training samples, at least 0 and below 1, got {self.replay}")
        if self.replay and self.keep is None:
            raise ValueError(f"replay={self.replay} takes the answers of a keep set: name one with keep")
        if not self.keep_weight and not self.replay:
            self.keep = None  # so that none is made
        if self.replay and self.streaming:
            raise ValueError(
                f"replay={self.replay} is a share of the data, whose size streaming does not know: leave out either"
            )


def from_yaml(key: str, value: Any) -> Any:
    """A setting of several types comes from the command line as a string."""
    try:
        return read_yaml(value) if isinstance(value, str) else value
    except yaml.YAMLError as error:
        raise ValueError(f"{key}={value} is no YAML: {' '.join(str(error).split())}") from error


def _mirror(name: str) -> tuple:
    """A field of DriftConfig, in types that the parser knows."""
    types = {"drift_spectrum": str, "drift_modules": list[str] | None, "drift_alpha_pattern": dict | str | None}
    known = DriftConfig.__dataclass_fields__[name]
    default = {"default": known.default} if known.default is not MISSING else {"default_factory": known.default_factory}
    help = {"help": known.metadata["help"]}
    return name, types.get(name, get_type_hints(DriftConfig)[name]), field(**default, metadata=help)


DRIFT = [name for name in DriftConfig.__dataclass_fields__ if name.startswith("drift_") and name != "drift_steps"]
LORA = ["r", "lora_alpha", "lora_dropout", "use_rslora"]
DriftArguments = make_dataclass("DriftArguments", map(_mirror, LORA + DRIFT))
OWN = {*get_type_hints(RunArguments), *LORA, *DRIFT, "env"}
BESIDE = {"env": dict | None, "bf16": bool | None}  # TRL's own, and what it makes of transformers'


def adapter_of(run: RunArguments, settings: Mapping[str, Any]) -> DriftConfig:
    """What is trained, by the keys of `DriftArguments`. sft does not look at the guidance's."""
    settings = {name: from_yaml(name, value) for name, value in settings.items()}
    if run.method == "sft":
        run.prior, settings = None, {**{name: settings[name] for name in LORA}, "drift_alpha": 0.0}
    return DriftConfig(prior=run.prior, task_type="CAUSAL_LM", **settings)


def value_of(key: str, value: Any, hint: Any, choices: Any = None) -> Any:
    """A value of a recipe as its setting takes it. ValueError if it is of another type."""
    if key == "resume_from_checkpoint" and isinstance(value, bool):
        value = "true" if value else None
    if key in OWN and isinstance(value, str) and value.lower() in ("none", "null") and NoneType in get_args(hint):
        value = None
    if value is False and "no" in (choices or ()):  # save_strategy: no
        value = "no"
    value = as_meant(key, value, hint)
    check_value(key, value, hint)
    return value


def refuse_what_cannot_work(training: Mapping[str, Any], kind: type = TrainingArguments) -> None:
    """ValueError for what TRL refuses after the models were read, or takes and the recipe cannot keep.

    Args:
        kind: the dataclass of these settings, whose defaults are no choice of anybody's.
    """
    if training.get("max_length") is not None:
        raise ValueError("max_length cuts samples, and their images' tokens with them: set max_tokens instead")
    check_whole(**{key: training[key] for key in STEP if key in training})
    for name, value in training.items():
        never = NO_EVALUATION if re.search("eval|best|better|predict", name) else NEVER.get(name)
        as_it_comes = value is None or value is False or value == getattr(kind, name, "auto")  # as TRL has it
        if never and not as_it_comes:
            raise ValueError(f"{name}={value} cannot be: {never}")
        kwargs = as_meant(name, value, dict) if name.endswith("_checkpointing_kwargs") else None
        if isinstance(kwargs, dict) and kwargs.get("selective"):
            why = "TRL's own way to it fails in the first step with transformers from 5.23"
            raise ValueError(f"{name}={value} cannot be: {why}: leave out selective")
    loading = as_meant("model_init_kwargs", training.get("model_init_kwargs"), dict)
    if isinstance(loading, dict) and (key := next((key for key in LOADED if key in loading), None)):
        raise ValueError(f"model_init_kwargs has {key}, {LOADED[key]}")
    if training.get("train_sampling_strategy") == "group_by_length":
        raise ValueError(
            "train_sampling_strategy=group_by_length cannot be: how long a sample is with its images shows in the step "
            "alone: leave it out"
        )
    if training.get("save_strategy") == "best":
        raise ValueError(f"save_strategy=best cannot be: {NO_EVALUATION}")


def check_together(run: RunArguments, drift: DriftConfig, training: Mapping[str, Any]) -> None:
    """ValueError for settings of which each could be, but not with another."""
    steps, epochs = (training.get(name, getattr(TrainingArguments, name)) for name in ("max_steps", "num_train_epochs"))
    if run.prior is None and run.merge_first is not None and run.expert is None:
        raise ValueError(f"merge_first={run.merge_first} merges a part of expert − base: set expert")
    if steps == 0:
        raise ValueError("max_steps=0 trains no step: name their number, or leave it out to train in epochs")
    if steps <= 0 and (run.streaming or epochs <= 0):
        why = "streaming: true, whose length nobody knows" if run.streaming else f"{epochs} epochs"
        raise ValueError(f"max_steps={steps} sets no number of steps for {why}: set max_steps")
    if run.merge_first == 1 and (drift.pulls or drift.drift_start):
        raise ValueError("merge_first=1 leaves nothing to steer toward: set method to sft, or merge less")
    if 0 < steps <= drift.drift_warmup_steps and drift.guides:
        warn(
            f"drift_warmup_steps={drift.drift_warmup_steps} is no less than max_steps={steps}: the full strength is "
            "never reached."
        )
    if run.keep is not None and not run.replay and drift.drift_norm == "weight":
        raise ValueError(
            "drift_norm: weight does not see the gradient that keep adds: set drift_norm to factor, or replay to 0.2, "
            "which mixes the keep set's answers into the training data instead"
        )


def check_recipe(content: Mapping[str, Any], choices: Mapping[str, list]) -> None:
    """ValueError for what recipes/sft_vlm.py refuses of a recipe before it reads a model and looks for files.

    Args:
        choices: key of TRL's own -> what it may be. Of their types nothing is known here.
    """
    types = TrainingArguments, DriftArguments, RunArguments
    hints = {name: hint for kind in types for name, hint in get_type_hints(kind).items()} | BESIDE
    choices = _choices(types, hints) | choices
    meant = {"data": "a flag's", **content}  # which comes with --data as often as with the recipe
    for key, known in {key: choices.get(key, []) for key in content}.items():
        if key in hints:
            meant[key] = value_of(key, content[key], hints[key], known)
        if known and meant[key] is not None and meant[key] not in known:
            words = f"{key} takes one of {', '.join(map(str, known))}, not {meant[key]}"
            raise ValueError("; ".join(filter(None, (words, nearest(str(meant[key]), known)))))
    training = {key: value for key, value in meant.items() if key not in OWN}
    refuse_what_cannot_work(training)
    run = RunArguments(**{f.name: meant[f.name] for f in fields(RunArguments) if f.name in meant})
    adapter = DriftArguments(**{name: meant[name] for name in (*LORA, *DRIFT) if name in meant})
    check_together(run, adapter_of(run, vars(adapter)), training)


def _choices(types: Iterable[type], hints: Mapping[str, Any]) -> dict[str, list]:
    """key -> what it may be, where that is one of a few."""
    choices = {f.name: f.metadata["choices"] for kind in types for f in fields(kind) if "choices" in f.metadata}
    for key, hint in hints.items():
        kinds = [kind for kind in get_args(hint) if isinstance(kind, type) and issubclass(kind, Enum)]
        if known := get_args(hint) if get_origin(hint) is Literal else [one.value for kind in kinds for one in kind]:
            choices[key] = [*known]
    return choices
