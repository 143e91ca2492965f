"""The YAML of a recipe, read as it is meant, without an import of torch."""

from __future__ import annotations

import datetime
import re
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import yaml

NAMES = {bool: "yes or no", int: "a whole number", float: "a number", str: "a text", list: "a list"}
NAMES[dict] = "settings such as {name: value}"
WORDS = {"yes": True, "true": True, "on": True, "no": False, "false": False, "off": False}
# What has numbers and switches inside.
NESTED = ("processor_kwargs", "lr_scheduler_kwargs", "drift_alpha_pattern", "accelerator_config", "fsdp_config",
          "deepspeed", "gradient_checkpointing_kwargs", "activation_checkpointing_kwargs",
          "model_init_kwargs")  # fmt: skip


class KeyTwice(yaml.YAMLError):
    """A key that stands twice, of which PyYAML takes the last one."""


class Loader(yaml.SafeLoader):
    """PyYAML's, with the numbers of YAML 1.2: `1e-6` is one, and `1e6` a whole one. To YAML 1.1 they are texts. A key
    stands once."""

    def compose_mapping_node(self, anchor):
        node, lines = super().compose_mapping_node(anchor), {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            line = key.start_mark.line + 1
            if key.value in lines:
                first = lines[key.value]
                where = f"line {line}" if first == line else f"lines {first} and {line}"
                raise KeyTwice(f"the key {key.value} stands twice, in {where}: take one of them out")
            lines[key.value] = line
        return node


def _number(loader: Loader, node: yaml.ScalarNode) -> float:
    value = float(loader.construct_scalar(node))
    return int(value) if value.is_integer() else value


Loader.add_constructor("!number", _number)
Loader.add_implicit_resolver("!number", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))
# The first resolver that matches wins, and those of YAML 1.1 know 1.0e+6 as a float.
for first, resolvers in Loader.yaml_implicit_resolvers.items():
    Loader.yaml_implicit_resolvers[first] = sorted(resolvers, key=lambda resolver: resolver[0] != "!number")


def read_yaml(text: str):
    """What a text says as YAML.

    Raises:
        yaml.YAMLError: it is none.
    """
    try:
        return yaml.load(text, Loader)
    except (RecursionError, OverflowError, TypeError) as error:  # nested too deeply; 1e999 as a whole number; odd keys
        raise yaml.YAMLError(str(error)) from error


def read_recipe(recipe: str | Path) -> dict:
    """The keys and values of a recipe.

    Raises:
        FileNotFoundError, OSError: there is no such file, or it cannot be read.
        ValueError: it is no YAML, or has no keys.
    """
    try:
        content = read_yaml(Path(recipe).read_text(encoding="utf-8"))
    except OSError as error:
        way_out = "name a YAML file such as recipes/configs/qwen2_5_vl_7b_r1.yaml"
        raise type(error)(f"recipe {recipe} cannot be read: {error.strerror}; {way_out}") from error
    except KeyTwice as error:
        raise ValueError(f"in {recipe} {error}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{recipe} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{recipe} is no recipe: it has to be keys with their values, such as r: 16")
    return content


def as_meant(key: str, value, hint):
    """A value of a recipe in a type of its setting where it is plain what is meant, such as "16" or 16.0 for 16.

    Args:
        hint: the setting's type. What is of no type that it allows comes back as it is.
    """
    kinds = _kinds(hint)
    if isinstance(value, str) and dict in kinds:
        value = _read(value) if isinstance(_read(value), dict) else value
    if isinstance(value, dict) and key in NESTED:
        return _plain(value)
    if type(value) in kinds:
        return value
    if bool in kinds and isinstance(value, str):
        return WORDS.get(value.lower(), value)
    if bool in kinds and value in (0, 1):
        return bool(value)
    if isinstance(value, str) and kinds & {int, float} and isinstance(_read(value), (int, float)):
        value = _read(value)
    if isinstance(value, str) and list in kinds and str not in kinds:
        return [value]
    if int in kinds and isinstance(value, float) and value.is_integer():
        return int(value)
    if str in kinds and not kinds & {dict, list} and isinstance(value, (int, float, datetime.date)):
        return value if isinstance(value, bool) else str(value)
    return value


def check_value(key: str, value, hint) -> None:
    """Raise ValueError if a value is of no type that its setting allows."""
    kinds = _kinds(hint)
    known = kinds & {*NAMES, NoneType}
    if kinds - known or type(value) in kinds or (float in kinds and type(value) is int):
        return  # another type, as of an enumeration, is checked where it is used
    if value is None:
        raise ValueError(f"{key} has no value: give it one, or leave the key out")
    raise ValueError(f"{key} takes {' or '.join(NAMES[kind] for kind in NAMES if kind in known)}, got {value!r}")


def _kinds(hint) -> set:
    """int | list[str] | None -> {int, list, NoneType}"""
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return {get_origin(member) or member for member in members}


def _read(text: str) -> Any:
    try:
        return read_yaml(text)
    except yaml.YAMLError:
        return text


def _plain(value):
    """Numbers and switches that stand in quotes, however deep inside."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return _read(value) if isinstance(value, str) and isinstance(_read(value), (bool, int, float)) else value
