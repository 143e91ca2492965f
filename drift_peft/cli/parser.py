"""The parser of drift-peft and of the recipes: argparse, whose errors are one sentence with the nearest known name."""

from __future__ import annotations

import json
import os
import re
import sys
import textwrap
from argparse import SUPPRESS, Action, ArgumentError, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile
from types import ModuleType
from typing import NoReturn

from ..arguments import meant, nearest

WIDTH = 80  # of descriptions; examples are broken by hand
NEGATIVE = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")
FLAG = re.compile(r"--?[a-zA-Z][\w-]*")  # a negative number is none


def number_or_auto(value: str) -> float | str:
    return value if value == "auto" else float(value)


def json_object(value: str) -> dict:
    parsed = json.loads(value)
    if not isinstance(parsed, dict):
        raise ValueError
    return parsed


def file_such_as(example: str) -> Callable[[str], str]:
    """The type of a flag that names a file to write. What ends as a folder does is refused here, since a Path would be
    without that end, and the file be called like the folder."""

    def file(value: str) -> str:
        if os.path.dirname(value) and os.path.basename(value) in ("", os.curdir):
            such = os.path.join(value, example)
            raise ArgumentError(None, f"output {value} is a folder: name a file, such as {such}")
        return value

    return file


KINDS = {int: "whole number", float: "number", number_or_auto: "number or auto"}
KINDS[json_object] = "JSON object, such as '{\"max_pixels\": 262144}'"


class Help(RawDescriptionHelpFormatter):  # which leaves the lines of an example as they are
    """argparse's, which also says of each flag whether it must be given, and what it is without."""

    def _get_help_string(self, action: Action) -> str | None:
        if action.required and action.option_strings:
            return f"{action.help} (required)"
        if action.nargs == 0 or action.default in (None, SUPPRESS, "", [], {}) or "(default: " in (action.help or ""):
            return action.help
        return f"{action.help} (default: %(default)s)"


class Store(Action):
    """argparse's own, except that a flag of several values takes those of each time that it is given."""

    def __call__(
        self, parser: ArgumentParser, namespace: Namespace, values: object, option_string: str | None = None
    ) -> None:
        if self.nargs == "+" and (so_far := getattr(namespace, self.dest, None)) is not self.default:
            values = [*(so_far or []), *values]
        setattr(namespace, self.dest, values)


class Parser(ArgumentParser):
    """argparse's, except that verbs are modules, and that errors are one sentence.

    Flags are written with dashes, and read with underscores (--max_rank) as well.
    """

    def __init__(self, *arguments, **settings) -> None:
        super().__init__(*arguments, formatter_class=Help, **settings)
        self.verbs: dict[str, ModuleType] = {}
        self._negative_number_matcher = NEGATIVE  # argparse's own knows no -5e-1

    def _registry_get(self, registry_name: str, value: object, default: object = None) -> object:
        # Not by `register`: other parsers, which the recipes mix this one into, add flags while they are made.
        stores = registry_name == "action" and value in (None, "store")
        return Store if stores else super()._registry_get(registry_name, value, default)

    def add_processor_kwargs(self) -> None:
        self.add_argument(
            "--processor-kwargs",
            dest="processor",
            type=json_object,
            metavar="JSON",
            help="settings of the VLM's processor that you train with, such as '{\"max_pixels\": 262144}'",
        )

    def add_json(self, help: str = "print the result as JSON") -> None:
        self.add_argument("--json", dest="as_json", action="store_true", help=help)

    def add_verbs(self, verbs: dict[str, ModuleType]) -> None:
        """Verbs by their modules, each of which has HELP, DESCRIPTION, EXAMPLE, a function that adds its flags, and one
        that runs it or further verbs."""
        self.verbs = verbs
        commands = self.add_subparsers(title="commands", metavar="COMMAND")
        for name, verb in verbs.items():
            command = commands.add_parser(name, help=verb.HELP, **help_texts(verb.DESCRIPTION, verb.EXAMPLE))
            command.set_defaults(run=getattr(verb, "run", None))
            verb.flags(command)
        # Not `required`, which argparse would speak of before an unknown flag.
        self.set_defaults(run=lambda: self.error(f"a command is missing: one of {', '.join(verbs)}"))

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: Namespace | None = None
    ) -> tuple[Namespace, list[str]]:
        """Leaves nothing over: what a verb does not know is refused here, where its flags are known."""
        args = [*(sys.argv[1:] if args is None else args)]
        flags = args.index("--") if "--" in args else len(args)
        if not {"-h", "--help"} & {*args}:
            self._refuse_unknown(takewhile(lambda arg: arg[:1] == "-" or not self.verbs, args[:flags]))
        args[:flags] = map(_dashed, args[:flags])
        namespace, left = super().parse_known_args(args, namespace)
        if left:
            self.error(f"unexpected argument {left[0]}; see {self.prog} --help")
        return namespace, left

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"drift-peft: error: {message}\n")

    def _refuse_unknown(self, args: Iterable[str]) -> None:
        """Before argparse parses, which would speak of a missing --expert where --exprt was given."""
        for arg in args:
            given = arg.partition("=")[0]
            flag = _dashed(given)
            # argparse's own of these two knows abbreviations, where they are allowed.
            if FLAG.fullmatch(flag) and flag not in self._option_string_actions and not self._get_option_tuples(flag):
                self.error(f"unknown flag {given}; {self.way_out(flag, self._option_string_actions)}")

    def way_out(self, flag: str, known: Iterable[str]) -> str:
        """What to give instead of an unknown flag."""
        return guess(flag, known, f"{self.prog} --help")

    def _get_value(self, action: Action, arg_string: str) -> object:
        try:
            return super()._get_value(action, arg_string)
        except ArgumentError:
            if action.type not in KINDS:
                raise
            message = f"{[action.dest, *action.option_strings][-1]} takes a {KINDS[action.type]}, got {arg_string}"
            raise ArgumentError(None, message) from None

    def _check_value(self, action: Action, value: str) -> None:
        if action.choices is None or value in action.choices:
            return
        message = f"unknown {action.option_strings[-1] if action.option_strings else 'command'} {value}"
        choices = f"choose from {', '.join(action.choices)}"
        near = nearest(value.lower(), action.choices)
        raise ArgumentError(None, f"{message}; {near} ({choices})" if near else f"{message}: {choices}")


def help_texts(description: str, example: str) -> dict[str, str]:
    """What the help says before and after the flags."""
    return {
        "description": textwrap.fill(description, WIDTH),
        "epilog": f"example:\n{textwrap.indent(example, '  ')}",
    }


def guess(name: str, known: Iterable[str], help: str = "--help") -> str:
    """The known name that may have been meant, whatever its dashes, else one that begins so."""
    bare, name = {other.lstrip("-"): other for other in known}, name.lstrip("-").lower()
    near = meant(name, bare) or next((other for other in bare if other.startswith(name)), None)
    return f"did you mean {bare[near]}?" if near else f"see {help}"


def _dashed(arg: str) -> str:
    """A flag with dashes; everything else as it is."""
    flag, equals, value = arg.partition("=")
    return flag.replace("_", "-") + equals + value if FLAG.fullmatch(flag) else arg
