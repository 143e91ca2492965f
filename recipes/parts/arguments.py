"""What can be set in a recipe: RunArguments below, the settings of DriftConfig, and TRL's SFTConfig, in one YAML."""

import argparse
import math
import os
import re
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Literal, get_type_hints

import torch
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from trl import SFTConfig, TrlParser

from drift_peft import DriftConfig
from drift_peft.arguments import check_whole
from drift_peft.cli.parser import KINDS, guess
from drift_peft.preflight import as_meant, check_type, read_recipe, read_yaml

from .checkpoints import checkpoints, earlier_record, is_whole, newest_whole
from .command_line import Parser
from .processing import check_chat_template

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
        check_type("processor_kwargs", self.processor_kwargs, dict)
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


@dataclass
class TrainArguments(SFTConfig):
    """TRL's, except that nothing is cut and a missing GPU is told in plain words."""

    max_length: int | None = field(default=None, metadata={"help": "stays None: see --max-tokens"})

    def __post_init__(self):
        if self.max_length is not None:
            raise ValueError("max_length cuts samples, and their images' tokens with them: set max_tokens instead")
        self._refuse_what_cannot_work()
        if not self.use_cpu and not torch.cuda.is_available():
            raise ValueError("there is no CUDA device: see what nvidia-smi says, or train on the CPU with --use-cpu")
        check_chat_template(self.chat_template_path)
        super().__post_init__()
        if self.resume_from_checkpoint:
            self.resume_from_checkpoint = str(self._checkpoint(str(self.resume_from_checkpoint)))

    def _refuse_what_cannot_work(self) -> None:
        """What TRL refuses after the models were read, or takes and the recipe cannot keep."""
        check_whole(**{key: getattr(self, key) for key in STEP})
        for known in fields(self):
            value, never = getattr(self, known.name), NEVER.get(known.name)
            if re.search("eval|best|better|predict", known.name):
                never = NO_EVALUATION
            if never and value not in (known.default, None):
                raise ValueError(f"{known.name}={value} cannot be: {never}")
        if self.save_strategy == "best":
            raise ValueError(f"save_strategy=best cannot be: {NO_EVALUATION}")
        named = [self.report_to] if isinstance(self.report_to, str) else self.report_to or []
        for name in {*named} - {"none", "all", *get_available_reporting_integrations()}:
            if name not in INTEGRATION_TO_CALLBACK:
                raise ValueError(f"report_to={name} is not known: {guess(name, ['none', *INTEGRATION_TO_CALLBACK])}")
            if name != "flyte":  # whose package is asked for by itself alone
                raise ValueError(f"report_to={name} needs {name}, which is not installed here: install it, or set none")

    def _checkpoint(self, named: str) -> Path:
        """What to go on from: "true" stands for the newest that is whole."""
        if named.lower() == "true":
            newest, torn = newest_whole(self.output_dir), [path.name for path in checkpoints(self.output_dir)]
            if newest is None and earlier_record(self.output_dir):
                return Path(named)  # a run that was finished needs no checkpoint
            if newest is None and torn:
                what = f"none of {', '.join(torn)} in {self.output_dir} is whole"
                raise ValueError(f"{what}, so there is nothing to go on from: start in another output_dir")
            return self._checkpoint(str(newest or f"{self.output_dir}/checkpoint-*"))
        if not Path(named).is_dir():
            raise FileNotFoundError(f"there is no checkpoint {named} to go on from")
        if not is_whole(Path(named)):
            way_out = "name another one, or true for the newest that is whole"
            raise ValueError(f"the checkpoint {named} is not whole, as after a kill while it was written: {way_out}")
        return Path(named)


def from_yaml(value):
    """A setting of several types comes from the command line as a string."""
    return read_yaml(value) if isinstance(value, str) else value


def _or_none(kind: Callable[[str], object]) -> Callable[[str], object]:
    """The same for a value that may be left out, which a YAML says with null."""
    return lambda value: None if value.lower() in ("null", "none") else kind(value)


OR_NONE = {kind | None: _or_none(kind) for kind in (str, int, float)}
KINDS.update({OR_NONE[int | None]: "whole number or null", OR_NONE[float | None]: "number or null"})


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


def is_missing(made: str) -> bool:
    """Whether a prior or a keep set is yet to be made. Without the ending, it is a hub id."""
    return made.endswith(".safetensors") and not Path(made).exists()


class RecipeParser(Parser, TrlParser):
    """TRL's, with the same sentences about a wrong key of the YAML that --config names as about a wrong flag."""

    def __init__(self, doc: str):
        self.first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        self.first.error = self.error
        help = "YAML of the settings below, with underscores in their names; flags win over it"
        self.first.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS, help=help)
        types = RunArguments, DriftArguments, TrainArguments
        self.hints = {name: hint for kind in types for name, hint in get_type_hints(kind).items()}
        usage = "%(prog)s --config FILE [--flag value ...]"
        super().__init__("sft_vlm.py", doc, types, usage=usage, parents=[self.first])
        for action in self._actions:
            action.type = OR_NONE.get(self.hints.get(action.dest), action.type)

    def parse_args_and_config(self, args=None, **options):
        named, flags = self.first.parse_known_args(args)  # TRL takes no --config=FILE, nor a second one
        if "config" in named:
            self.set_defaults_with_config(**read_recipe(named.config))
        return super().parse_args_and_config(flags, **options)

    def set_defaults_with_config(self, env: dict | None = None, **settings) -> list[str]:
        check_type("env", env, dict | None)
        os.environ |= {name: str(value) for name, value in (env or {}).items()}  # as TRL's does
        known = {action.dest: action for action in self._actions if action.dest not in ("help", "config")}
        for key, value in settings.items():
            if key not in known:
                self.error(f"unknown key {key}; {guess(key, known)}")
            if key == "resume_from_checkpoint" and isinstance(value, bool):
                value = "true" if value else None
            if value is False and "no" in (known[key].choices or ()):  # save_strategy: no
                value = "no"
            settings[key] = value = as_meant(key, value, self.hints[key])
            check_type(key, value, self.hints[key])
            if value is not None:  # argparse checks no defaults
                self.check_choice(key, value, known[key].choices)
        return super().set_defaults_with_config(**settings)


def parse(argv: list[str] | None, doc: str) -> tuple[RunArguments, DriftConfig, TrainArguments]:
    """Flags win over the file that --config names.

    Args:
        doc: what --help says first, as for `Parser`.

    Raises:
        ValueError, yaml.YAMLError: a value out of range, no YAML, or no CUDA device.
        OSError: no such file.
    """
    run, drift, train = RecipeParser(doc).parse_args_and_config(argv)
    settings = {name: from_yaml(value) for name, value in vars(drift).items()}
    if run.method == "sft":
        run.prior, settings = None, {**{name: settings[name] for name in LORA}, "drift_alpha": 0.0}
    return run, DriftConfig(prior=run.prior, task_type="CAUSAL_LM", **settings), train
