"""The command line. Results go to stdout, progress and errors to stderr; an error is one sentence, its status not 0."""

from __future__ import annotations

import difflib
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.table import Table

from . import __version__
from .build import MODULES, build_prior
from .checkpoint import Checkpoint
from .merge import merge_adapter
from .prior import ReasoningPrior
from .report import prior_summary, prior_table, targets_summary, targets_table

DESCRIPTION = "Priors of text-only reasoning models for vision-language models; adapters merged into their base."


class Parser(ArgumentParser):
    """Errors are one sentence, with the nearest known flag where one is unknown."""

    def error(self, message: str, ex: Exception | None = None) -> None:
        message = " ".join(message.split())
        if unknown := re.match(r"unrecognized arguments: (\S+)", message):
            flag = unknown[1].partition("=")[0]
            near = difflib.get_close_matches(flag, self._option_string_actions, n=1)
            message = f"unknown flag {flag}" + (f"; did you mean {near[0]}?" if near else "; see --help")
        elif wrong := re.match(r"argument \w+: invalid choice: '(.*)' \(choose from (.*)\)", message):
            near = difflib.get_close_matches(wrong[1], re.findall(r"\w+", wrong[2]), n=1)
            message = f"unknown command {wrong[1]}" + (f"; did you mean {near[0]}?" if near else f": one of {wrong[2]}")
        elif missing := re.match(r'expected "[\w.]+" to be one of \{(.*)\}', message):
            message = f"a command is missing: one of {missing[1].replace(',', ', ')}"
        elif wrong := re.match(r"Parser key \"(\w+)\": Expected a <class 'int'>\. Got value: (.*)", message):
            message = f"--{wrong[1]} takes a whole number, got {wrong[2]}"
        self.exit(2, f"drift-peft: error: {message}\n")


def parser() -> Parser:
    """All verbs and their flags."""
    build = Parser(
        description="Take Δ = expert − base for each language-model weight and write it as a low-rank prior."
    )
    build.add_argument("--expert", required=True, help="text-only reasoning model: folder, hub id or id@revision")
    build.add_argument("--base", required=True, help="vision-language model, in full precision")
    build.add_argument("--reference", help="take Δ = expert − reference: the model that the expert was trained from")
    build.add_argument("-o", "--output", required=True, help="file to write, such as prior.safetensors")
    build.add_argument("--rank", type=int, default=64, help="largest rank of Δ per weight")
    build.add_argument("--modules", type=str, nargs="+", default=list(MODULES), help="which projections: attn, mlp")
    build.add_argument("--seed", type=int, default=0, help="seed of the randomized SVD")
    build.add_argument("--device", help="where to compute, such as cuda; a GPU if there is one")
    build.add_argument("--force", action="store_true", help="build even when the two models seem unrelated")
    build.add_argument("--overwrite", action="store_true", help="replace an existing output")
    build.add_argument("--json", action="store_true", help="print the result as JSON")

    inspect = Parser(description="Show how far apart two models are, and how much of it a prior holds.")
    inspect.add_argument("prior", help="prior file, hub id or id@revision")
    inspect.add_argument(
        "--rank", type=int, help="captured energy when Δ is truncated to this rank, as an adapter's is"
    )
    inspect.add_argument("--json", action="store_true", help="print as JSON, with the numbers of every weight")

    targets = Parser(description="Show what target_modules=None adapts and steers on a model, without loading it.")
    targets.add_argument("model", help="folder, hub id or id@revision")
    targets.add_argument("--prior", help="also count which of them have a Δ in this prior")
    targets.add_argument("--json", action="store_true", help="print as JSON")

    merge = Parser(description="Merge a LoRA adapter into its full-precision base, streaming, as a standalone folder.")
    merge.add_argument("--base", required=True, help="full-precision model: folder, hub id or id@revision")
    merge.add_argument("--adapter", required=True, help="adapter folder or hub id, DRIFT or plain LoRA")
    merge.add_argument("-o", "--output", required=True, help="folder to write")
    merge.add_argument("--verify", action="store_true", help="load both and compare their logits before finishing")
    merge.add_argument("--overwrite", action="store_true", help="replace an existing model folder")
    merge.add_argument("--json", action="store_true", help="print the result as JSON")

    demo = Parser(description="Watch DRIFT move a text expert's reasoning into a vision-language model, in minutes.")
    demo.add_argument("--out", help="keep everything in this folder: prior, adapter, merged model, results, pictures")
    demo.add_argument("--seed", type=int, default=0, help="seed of data, start and training")

    prior = Parser(description="Build and inspect reasoning priors.")
    main = Parser(prog="drift-peft", description=DESCRIPTION, version=__version__)
    commands = main.add_subcommands(dest="command")
    commands.add_subcommand("prior", prior, help="build and inspect priors")
    commands.add_subcommand("targets", targets, help="what would be adapted and steered")
    commands.add_subcommand("merge", merge, help="adapter + full-precision base -> standalone model")
    commands.add_subcommand("demo", demo, help="the whole way on a small embedded world")
    verbs = prior.add_subcommands(dest="verb")
    verbs.add_subcommand("build", build, help="two checkpoints -> prior file")
    verbs.add_subcommand("inspect", inspect, help="what a prior holds")
    return main


def _print(result: dict, table: Table, as_json: bool) -> None:
    if as_json:
        print(json.dumps(result, indent=2, ensure_ascii=False, default=str))
    else:
        Console().print(table)


def _build(args: Namespace) -> None:
    settings = args.as_dict()
    as_json = settings.pop("json")
    summary = prior_summary(build_prior(**settings))
    _print(summary, prior_table(summary), as_json)


def _inspect(args: Namespace) -> None:
    prior = ReasoningPrior.load(args.prior)
    summary = prior_summary(prior, args.rank)
    _print({**summary, "weights": prior.metadata["weights"]}, prior_table(summary), args.json)


def _targets(args: Namespace) -> None:
    prior = None if args.prior is None else ReasoningPrior.load(args.prior)
    summary = targets_summary(Checkpoint(args.model), prior)
    _print(summary, targets_table(summary), args.json)
    if not args.json:
        print(f"target_modules = r'{summary['target_modules']}'")


def _merge(args: Namespace) -> None:
    report = merge_adapter(args.base, args.adapter, args.output, verify=args.verify, overwrite=args.overwrite)
    table = Table(show_header=False, title=f"merged into {report.output}")
    table.add_row("adapter modules merged", str(report.modules))
    table.add_row("tensors written", str(report.tensors))
    table.add_row("change of the merged weights ‖W' − W‖/‖W‖", f"{report.relative_change:.2e}")
    verified = "not verified (--verify)" if report.logits_error is None else f"{report.logits_error:.2e}"
    table.add_row("logits against base + adapter, relative error", verified)
    _print(asdict(report), table, args.json)


def _demo(args: Namespace) -> None:
    from .demo import run  # needs the extra `demo`, and says so

    run(out=args.out, seed=args.seed)


COMMANDS: dict[tuple[str, ...], Callable[[Namespace], None]] = {
    ("prior", "build"): _build,
    ("prior", "inspect"): _inspect,
    ("targets",): _targets,
    ("merge",): _merge,
    ("demo",): _demo,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    args = parser().parse_args(argv)
    path = (args.command,)
    args = args[args.command]
    if path == ("prior",):
        path, args = ("prior", args.verb), args[args.verb]
    try:
        COMMANDS[path](args)
    except (ValueError, OSError, KeyError, ImportError) as error:
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"drift-peft: error: {message}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
