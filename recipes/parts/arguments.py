"""What can be set in a recipe: RunArguments below, the settings of DriftConfig, and TRL's SFTConfig, in one YAML."""

import difflib
from dataclasses import MISSING, dataclass, field, make_dataclass
from pathlib import Path
from typing import Literal, get_type_hints

import torch
import yaml
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, TrlParser

from drift_peft import DriftConfig


@dataclass
class RunArguments:
    base: str = field(metadata={"help": "vision-language model in full precision: folder, hub id or id@revision"})
    data: str = field(metadata={"help": "chains of thought about images: file, folder or hub id; see data.py"})
    prior: str = field(metadata={"help": "file.safetensors, built from the expert if it is not there; or a hub id"})
    expert: str | None = field(default=None, metadata={"help": "text-only reasoning model: folder, hub id, adapter"})
    reference: str | None = field(default=None, metadata={"help": "what the expert was trained from, if not the base"})
    prior_rank: int = field(default=64, metadata={"help": "rank of the prior, if it is built"})
    split: str = field(default="train", metadata={"help": "split of the data"})
    images: str | None = field(default=None, metadata={"help": "folder that the data's image paths start from"})
    streaming: bool = field(default=False, metadata={"help": "do not download the data first; needs max_steps"})
    on_bad: Literal["drop", "fail"] = field(default="drop", metadata={"help": "samples that cannot be used"})
    max_tokens: int = field(default=4096, metadata={"help": "longest sample, with its images' tokens; none is cut"})
    on_long: Literal["drop", "fail"] = field(default="drop", metadata={"help": "longer samples"})
    images_per_sample: int = field(default=1, metadata={"help": "most that one has; only preflight asks"})
    processor_kwargs: dict | str | None = field(default=None, metadata={"help": "settings of the processor, as YAML"})
    think_tokens: bool = field(default=False, metadata={"help": "train <think> and </think> as tokens of their own"})
    merge: bool = field(default=False, metadata={"help": "merge into the full-precision base in the end, verified"})

    def __post_init__(self):
        self.processor_kwargs = from_yaml(self.processor_kwargs) or {}


@dataclass
class TrainArguments(SFTConfig):
    """TRL's, except that nothing is cut and a missing GPU is told in plain words."""

    max_length: int | None = field(default=None, metadata={"help": "stays None: see max_tokens"})

    def __post_init__(self):
        if self.max_length is not None:
            raise ValueError("max_length cuts samples, and their images' tokens with them: set max_tokens instead")
        if not self.use_cpu and not torch.cuda.is_available():
            raise ValueError("there is no CUDA device: see what nvidia-smi says, or train on the CPU with --use_cpu")
        super().__post_init__()
        if str(self.resume_from_checkpoint).lower() == "true":  # as in Trainer.train: the last one
            last = get_last_checkpoint(self.output_dir) if Path(self.output_dir).is_dir() else None
            self.resume_from_checkpoint = last or f"{self.output_dir}/checkpoint-*"
        if self.resume_from_checkpoint and not Path(self.resume_from_checkpoint).is_dir():
            raise FileNotFoundError(f"there is no checkpoint {self.resume_from_checkpoint} to go on from")


def from_yaml(value):
    """A setting of several types comes from the command line as a string."""
    return yaml.safe_load(value) if isinstance(value, str) else value


def _mirror(name: str) -> tuple:
    """A field of DriftConfig, in types that the parser knows."""
    types = {"drift_spectrum": str, "drift_modules": list[str] | None, "drift_alpha_pattern": dict | str | None}
    known = DriftConfig.__dataclass_fields__[name]
    default = {"default": known.default} if known.default is not MISSING else {"default_factory": known.default_factory}
    help = {"help": known.metadata["help"]}
    return name, types.get(name, get_type_hints(DriftConfig)[name]), field(**default, metadata=help)


_DRIFT = [name for name in DriftConfig.__dataclass_fields__ if name.startswith("drift_") and name != "drift_steps"]
_LORA = ["r", "lora_alpha", "lora_dropout", "use_rslora"]
DriftArguments = make_dataclass("DriftArguments", map(_mirror, _LORA + _DRIFT))


class Parser(TrlParser):
    """TRL's, except that an unknown key is refused with the nearest known one, wherever it comes from."""

    def set_defaults_with_config(self, **settings) -> list[str]:
        self._refuse(super().set_defaults_with_config(**settings)[::2])
        return []

    def parse_known_args(self, args=None, namespace=None):
        namespace, unknown = super().parse_known_args(args, namespace)
        self._refuse([argument for argument in unknown if argument.startswith("--")] or unknown)
        return namespace, []

    def error(self, message: str):
        raise ValueError(message)

    def _refuse(self, unknown: list[str]) -> None:
        for key in (argument.lstrip("-").partition("=")[0] for argument in unknown):
            near = difflib.get_close_matches(key, [action.dest for action in self._actions], n=1)
            raise ValueError(f"unknown key {key}" + (f"; did you mean {near[0]}?" if near else "; see --help"))


def parse(argv: list[str] | None = None) -> tuple[RunArguments, DriftConfig, TrainArguments]:
    """Flags win over the file that --config names.

    Raises:
        ValueError, yaml.YAMLError: an unknown key, a value out of range, or no CUDA device.
        OSError: no such file.
    """
    parser = Parser((RunArguments, DriftArguments, TrainArguments), allow_abbrev=False)
    run, drift, train = parser.parse_args_and_config(argv)
    settings = {name: from_yaml(value) for name, value in vars(drift).items()}
    return run, DriftConfig(prior=run.prior, task_type="CAUSAL_LM", **settings), train
