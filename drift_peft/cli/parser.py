"""The parser: argparse, whose errors are one sentence with the nearest known name."""

from __future__ import annotations

import json
import re
import sys
import textwrap
from argparse import Action, ArgumentError, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterable, Sequence
from itertools import takewhile
from types import ModuleType
from typing import NoReturn

from ..arguments import nearest

WIDTH = 80  # of descriptions; examples are broken by hand
NEGATIVE = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")
FLAG = re.compile(r"--?[a-zA-Z][\w-]*")  # a negative number is none


def number_or_auto(value: str) -> float | str:
    return value if value == "auto" else float(value)


def json_object(value: str) -> dict:
    found = json.loads(value)
    if not isinstance(found, dict):
        raise ValueError
    return found


KINDS = {int: "whole number", float: "number", number_or_auto: "number or auto", json_object: "JSON object"}


class Help(RawDescriptionHelpFormatter):  # which leaves the lines of an example as they are
    """argparse's, which also says of each flag whether it must be given."""

    def _get_help_string(self, action: Action) -> str | None:
        return f"{action.help} (required)" if action.required and action.option_strings else action.help


class Parser(ArgumentParser):
    """argparse's, except that verbs are modules, that the help ends in an example, and that errors are one sentence.

    Flags are written with dashes, and read with underscores (--max_rank) as well.
    """

    def __init__(self, *, description: str, example: str, **settings) -> None:
        super().__init__(
            description=textwrap.fill(description, WIDTH),
            epilog=f"example:\n{textwrap.indent(example, '  ')}",
            formatter_class=Help,
            **settings,
        )
        self.verbs: dict[str, ModuleType] = {}
        self._negative_number_matcher = NEGATIVE  # argparse's own knows no -5e-1

    def add_processor_kwargs(self) -> None:
        self.add_argument(
            "--processor-kwargs",
            dest="processor",
            type=json_object,
            metavar="JSON",
            help="settings of the VLM's processor that you train with, such as '{\"max_pixels\": 262144}'",
        )

    def add_verbs(self, verbs: dict[str, ModuleType]) -> None:
        """Verbs by their modules, each of which has HELP, DESCRIPTION, EXAMPLE, a function that adds its flags, and one
        that runs it or further verbs."""
        self.verbs = verbs
        commands = self.add_subparsers(title="commands", metavar="COMMAND")
        for name, verb in verbs.items():
            command = commands.add_parser(name, help=verb.HELP, description=verb.DESCRIPTION, example=verb.EXAMPLE)
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
        args[:flags] = map(_dashed, args[:flags])
        if not {"-h", "--help"} & {*args}:
            self._refuse_unknown(takewhile(lambda arg: arg != "--" and (arg[:1] == "-" or not self.verbs), args))
        namespace, left = super().parse_known_args(args, namespace)
        if left:
            self.error(f"unexpected argument {left[0]}; see {self.prog} --help")
        return namespace, left

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"drift-peft: error: {message}\n")

    def _refuse_unknown(self, args: Iterable[str]) -> None:
        """Before argparse parses, which would speak of a missing --expert where --exprt was given."""
        for arg in args:
            flag = arg.partition("=")[0]
            if FLAG.fullmatch(flag) and not self._get_option_tuples(flag):  # argparse's, which knows abbreviations
                near = nearest(flag.lower(), self._option_string_actions, cutoff=0.7)  # the dashes of all are alike
                self.error(f"unknown flag {flag}; {near or f'see {self.prog} --help'}")

    def _get_value(self, action: Action, arg_string: str) -> object:
        try:
            return super()._get_value(action, arg_string)
        except ArgumentError:
            message = f"{action.option_strings[-1]} takes a {KINDS[action.type]}, got {arg_string}"
            raise ArgumentError(None, message) from None

    def _check_value(self, action: Action, value: str) -> None:
        if action.choices is None or value in action.choices:
            return
        message = f"unknown {action.option_strings[-1] if action.option_strings else 'command'} {value}"
        choices = f"choose from {', '.join(action.choices)}"
        near = nearest(value.lower(), action.choices)
        raise ArgumentError(None, f"{message}; {near} ({choices})" if near else f"{message}: {choices}")


def _dashed(arg: str) -> str:
    """A flag with dashes; everything else as it is."""
    flag, equals, value = arg.partition("=")
    return flag.replace("_", "-") + equals + value if FLAG.fullmatch(flag) else arg
