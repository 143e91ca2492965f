"""The command line of every script: flags with dashes, the nearest one for a wrong one, a sentence for each mistake."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NoReturn

from drift_peft.builds import explained, missing
from drift_peft.cli import parser
from drift_peft.cli.interrupt import ctrl_c_came, raise_at_ctrl_c
from drift_peft.cli.parser import guess
from drift_peft.cli.terminal import spell_out
from drift_peft.recipe import read_recipe
from drift_peft.warn import visible


class Parser(parser.Parser):
    """That of drift-peft. Flags are shown with dashes, and none may be shortened.

    Args:
        script: the name of its file.
        doc: its docstring: the first paragraph says what it does, the second how to call it.
        arguments: of another parser that this one is mixed into.
    """

    def __init__(self, script: str, doc: str, *arguments, **options):
        description, examples, *_ = doc.split("\n\n")
        texts = {"description": description, "epilog": f"examples:\n{examples}"}
        super().__init__(*arguments, prog=script, allow_abbrev=False, **texts, **options)

    def add_argument(self, *names, **options):
        dashed = dict.fromkeys(name.replace("_", "-") if name.startswith("-") else name for name in names)
        return super().add_argument(*dashed, **options)

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        for argument in args:  # or it would fail when the result, which names it, is written
            if not _is_text(argument):
                self.error(f"argument {argument!r} is not in UTF-8: rename that file or folder")
        if not _is_text(os.getcwd()):
            self.error(f"the working folder {os.getcwd()!r} is not in UTF-8: rename it, or work in another one")
        flags = (argument.partition("=")[0] for argument in args if argument.startswith("-"))
        self.given = [flag.replace("_", "-") for flag in flags]
        return super().parse_known_args(args, namespace)

    def refuse_idle(self, where: str, *flags: str, lacks: str = "") -> None:
        """End where one of these flags was given, which does nothing there, such as "with --keep", or "without" what
        it lacks."""
        if idle := [flag for flag in flags if flag in self.given]:
            way_out = f"name {lacks}, or leave {idle[0]} out" if lacks else "leave it out"
            self.error(f"{idle[0]} does nothing {where}: {way_out}")

    def refuse_out_of_range(self, args: Namespace, least: int, *flags: str, above: bool = False) -> None:
        """End where one of these numbers is below the least that it may be, or not above it; and where it is no finite
        number. None is no number, and stays."""
        for flag in flags:
            value = getattr(args, flag.lstrip("-").replace("-", "_"))
            if value is not None and not (least <= value < math.inf and (value > least or not above)):
                self.error(f"{flag} is a number {'above' if above else 'of at least'} {least}, got {value}")

    def _check_value(self, action, value):
        self.check_choice([action.dest, *action.option_strings][-1], value, action.choices)

    def check_choice(self, name: str, value, choices: Iterable | None) -> None:
        if choices is not None and value not in choices:
            known = [*map(str, choices)]
            self.error(f"{name} takes one of {', '.join(known)}, not {value}; {guess(str(value), known)}")

    def error(self, message: str) -> NoReturn:
        stop(self.prog, message, 2)


def look_for_config(script: str) -> None:
    """End in a sentence where --config names no file, before a script imports what takes its time."""
    spell_out(sys.stdout, sys.stderr)
    first = ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    first.error = lambda message: stop(script, message, 2)
    file = first.parse_known_args()[0].config
    with in_one_sentence(script, OSError):
        if file is not None and not Path(file).exists():
            read_recipe(file)


def _is_text(argument: str) -> bool:
    """Bytes that are no UTF-8 come as lone surrogates."""
    return not any("\ud800" <= sign <= "\udfff" for sign in argument)


def stop(script: str, message: str, status: int) -> NoReturn:
    """End with one sentence on stderr. After Ctrl-C, whose error this is, that is left to `run_script`."""
    sentence = f"{script}: error: {visible(' '.join(message.split()))}"
    if not ctrl_c_came():
        print(sentence, file=sys.stderr)
    end = SystemExit(sentence)  # for who catches it
    end.code = status
    raise end


@contextlib.contextmanager
def in_one_sentence(script: str, *mistakes: type[Exception]) -> Iterator[None]:
    """Mistakes that a user can mend end the script without a traceback."""
    try:
        yield
    except mistakes as error:
        stop(script, missing(error) or str(explained(error)), 1)


def run_script(script: str, main: Callable[[], object]) -> None:
    """What `python recipes/<script>` does: its main(), readable on any terminal, and without a traceback at Ctrl-C."""
    try:
        raise_at_ctrl_c()
        spell_out(sys.stdout, sys.stderr)
        main()
    except BaseException as end:
        if not isinstance(end, KeyboardInterrupt) and not ctrl_c_came():
            raise
        message = str(end) if isinstance(end, KeyboardInterrupt) else ""
        print(f"{script}: {message or 'stopped'}", file=sys.stderr)
        sys.exit(130)
