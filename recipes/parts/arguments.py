"""What can be set in a recipe, in one YAML: RunArguments and the settings of DriftConfig, which stand in
drift_peft/preflight/recipe_settings.py, and TRL's SFTConfig."""

import argparse
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import torch
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_pt_utils import AcceleratorConfig
from trl import SFTConfig, TrlParser

from drift_peft import DriftConfig
from drift_peft.cli.parser import KINDS, guess
from drift_peft.preflight import (
    DRIFT,
    DriftArguments,
    RunArguments,
    adapter_of,
    refuse_what_cannot_work,
    value_of,
)
from drift_peft.recipe import as_meant, check_value, read_recipe
from drift_peft.warn import warn

from .checkpoints import checkpoints, earlier_record, is_whole, newest_whole
from .command_line import Parser
from .processing import check_chat_template
from .rehearsal import rehearse


@dataclass
class TrainArguments(SFTConfig):
    """TRL's, except that nothing is cut and a missing GPU is told in plain words."""

    max_length: int | None = field(default=None, metadata={"help": "stays None: see --max-tokens"})

    def __post_init__(self):
        for name in self._VALID_DICT_FIELDS:  # of which transformers reads JSON alone
            setattr(self, name, self._settings_of(name))
        refuse_what_cannot_work(vars(self), type(self))
        self._refuse_unknown_reports()
        if not self.use_cpu and not torch.cuda.is_available():
            raise ValueError("there is no CUDA device: see what nvidia-smi says, or train on the CPU with --use-cpu")
        check_chat_template(self.chat_template_path)
        super().__post_init__()
        rehearse(self)
        if self.resume_from_checkpoint:
            self.resume_from_checkpoint = str(self._checkpoint(str(self.resume_from_checkpoint)))

    def _settings_of(self, name: str) -> Any:
        """A setting that is settings itself, on the command line as YAML; some also take the name of a file of them."""
        value = as_meant(name, getattr(self, name), dict)
        if isinstance(value, str) and value.lower() in NOTHING:
            return None
        if isinstance(value, str) and (name not in FILES or value.lstrip().startswith("{")):
            check_value(name, value, dict)
        if name == "accelerator_config" and isinstance(value, dict):
            known = AcceleratorConfig.__dataclass_fields__
            if unknown := next((key for key in value if key not in known), None):
                raise ValueError(f"accelerator_config has the unknown key {unknown}; {guess(unknown, known)}")
        return value

    def _refuse_unknown_reports(self) -> None:
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


def _or_none(kind: Callable[[str], object]) -> Callable[[str], object]:
    """The same for a value that may be left out, which a YAML says with null."""
    return lambda value: None if value.lower() in NOTHING else kind(value)


NOTHING = "null", "none"
FILES = "accelerator_config", "fsdp_config", "deepspeed"
OR_NONE = {kind | None: _or_none(kind) for kind in (str, int, float)}
KINDS.update({OR_NONE[int | None]: "whole number or null", OR_NONE[float | None]: "number or null"})
IN_4BIT = dict.fromkeys(
    ("--load-in-4bit", "load_in_4bit"),  # which keep make and prior gate have
    "the recipe always loads the base in 4 bit: leave it out",
)


TYPES = RunArguments, DriftArguments, TrainArguments
HINTS = {name: hint for kind in TYPES for name, hint in get_type_hints(kind).items()}


class RecipeParser(Parser, TrlParser):
    """TRL's, with the same sentences about a wrong key of the YAML that --config names as about a wrong flag."""

    def __init__(self, doc: str):
        self.first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        self.first.error = self.error
        help = "YAML of the settings below, with underscores in their names; flags win over it"
        self.named: list[str] = []  # keys of the YAML
        self.first.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS, help=help)
        usage = "%(prog)s --config FILE [--flag value ...]"
        super().__init__("sft_vlm.py", doc, TYPES, usage=usage, parents=[self.first])
        for action in self._actions:
            action.type = OR_NONE.get(HINTS.get(action.dest), action.type)

    def parse_args_and_config(self, args=None, **options):
        named, flags = self.first.parse_known_args(args)  # TRL takes no --config=FILE, nor a second one
        if "config" in named:
            self.set_defaults_with_config(**read_recipe(named.config))
        return super().parse_args_and_config(flags, **options)

    def way_out(self, flag, known):
        return IN_4BIT.get(flag) or super().way_out(flag, known)

    def set_defaults_with_config(self, env: dict | None = None, **settings) -> list[str]:
        check_value("env", env, dict | None)
        os.environ |= {name: str(value) for name, value in (env or {}).items()}  # as TRL's does
        known = {action.dest: action for action in self._actions if action.dest not in ("help", "config")}
        self.named = [key for key, value in settings.items() if value is not None or key == "keep"]
        for key, value in settings.items():
            if key not in known:
                self.error(f"unknown key {key}; {IN_4BIT.get(key) or guess(key, known)}")
            settings[key] = value = value_of(key, value, HINTS[key], known[key].choices)
            if value is not None:  # argparse checks no defaults
                self.check_choice(key, value, known[key].choices)
        return super().set_defaults_with_config(**settings)


def refuse_forgotten(run: RunArguments, named: Collection[str]) -> None:
    """ValueError where a run is told how to keep and no keep set is named.

    Args:
        named: keys of the recipe and the command line. `keep: null` is among them, and keeps nothing.
    """
    if (of_keeping := [key for key in named if key.startswith("keep_")]) and "keep" not in named and run.keep_weight:
        raise ValueError(
            f"{of_keeping[0]} is said of a keep set, and none is named: name its file with keep, or set keep to null, "
            "which keeps nothing"
        )


def parse(argv: list[str] | None, doc: str) -> tuple[RunArguments, DriftConfig, TrainArguments]:
    """Flags win over the file that --config names.

    Args:
        doc: what --help says first, as for `Parser`.

    Raises:
        ValueError, yaml.YAMLError: a value out of range, no YAML, or no CUDA device.
        OSError: no such file.
    """
    parser = RecipeParser(doc)
    run, drift, train = parser.parse_args_and_config(argv)
    flags = [flag.lstrip("-").replace("-", "_") for flag in parser.given]
    refuse_forgotten(run, [*parser.named, *flags])
    # What a recipe says of guidance is for its method drift.
    if run.method == "sft" and (idle := [flag for flag in flags if flag in DRIFT]):
        warn(f"method sft steers nothing, and so {idle[0]} does nothing here.")
    return run, adapter_of(run, vars(drift)), train
