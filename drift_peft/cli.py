"""The command line. Results go to stdout, progress and errors to stderr; an error is one sentence, its status not 0."""

from __future__ import annotations

import difflib
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict

import yaml
from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.table import Table

from . import __version__
from .checkpoints import MODULES, Checkpoint, describe
from .merge import METHODS, merge_adapter, merge_baseline, verification_table
from .preflight import cards_table, preflight_summary, preflight_table
from .prior import DEFAULT_MODULES, ReasoningPrior, build_prior
from .prior.report import prior_summary, prior_table, targets_summary, targets_table, write_report

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
            near = difflib.get_close_matches(wrong[1], re.findall(r"[\w-]+", wrong[2]), n=1)
            message = f"unknown command {wrong[1]}" + (f"; did you mean {near[0]}?" if near else f": one of {wrong[2]}")
        elif missing := re.match(r'expected "[\w.]+" to be one of \{(.*)\}', message):
            message = f"a command is missing: one of {missing[1].replace(',', ', ')}"
        elif wrong := re.match(r"Parser key \"(\w+)\".*: Expected a <class '(int|float)'>\. Got value: (.*)", message):
            kind = "whole number" if wrong[2] == "int" else "number"
            message = f"--{wrong[1].replace('_', '-')} takes a {kind}, got {wrong[3]}"
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
    build.add_argument("--rank", type=int, help="largest rank of Δ per weight (64)")
    build.add_argument("--energy", type=float, help="instead: per weight the smallest rank with this share of ‖Δ‖²")
    build.add_argument("--max-rank", type=int, help="largest rank with --energy (256)")
    build.add_argument(
        "--modules", type=str, nargs="+", default=list(DEFAULT_MODULES), help=f"which weights: {', '.join(MODULES)}"
    )
    build.add_argument("--only-layers", type=str, nargs="+", help="these layers alone, from 0 on, such as 0 4 8-27")
    build.add_argument("--skip-first", type=int, default=0, help="not the first so many layers")
    build.add_argument("--dequantize", action="store_true", help="accept models that are 4-bit on disk")
    build.add_argument(
        "--delete-shards", action="store_true", help="free each shard of the expert that was downloaded for this"
    )
    build.add_argument("--seed", type=int, default=0, help="seed of the randomized SVD")
    build.add_argument("--device", help="where to compute, such as cuda; a GPU if there is one")
    build.add_argument("--force", action="store_true", help="build even when the two models seem unrelated")
    build.add_argument(
        "--overwrite", action="store_true", help="replace an existing output, or an interrupted build of other settings"
    )
    build.add_argument("--json", action="store_true", help="print the result as JSON")

    inspect = Parser(description="Show how far apart two models are, and how much of it a prior holds.")
    inspect.add_argument("prior", help="prior file, hub id or id@revision")
    inspect.add_argument(
        "--rank", type=int, help="captured energy when Δ is truncated to this rank, as an adapter's is"
    )
    inspect.add_argument("--plot", help="also draw it into this file, such as prior.png; needs the extra report")
    inspect.add_argument("--html", help="also write it as one self-contained page, such as prior.html")
    inspect.add_argument("--overwrite", action="store_true", help="replace existing files of --plot and --html")
    inspect.add_argument("--json", action="store_true", help="print as JSON, with the numbers of every weight")

    combine = Parser(description="Write a weighted sum of priors of one base as a new prior.")
    combine.add_argument(
        "parts", type=str, nargs="+", help="prior=coefficient, such as a.safetensors=0.7 user/prior@v1=0.3"
    )
    combine.add_argument("-o", "--output", required=True, help="file to write")
    combine.add_argument("--rank", type=int, help="largest rank per weight; by default the largest in these priors")
    combine.add_argument("--overwrite", action="store_true", help="replace an existing output")
    combine.add_argument("--json", action="store_true", help="print the result as JSON")

    truncate = Parser(description="Write a prior of lower rank.")
    truncate.add_argument("prior", help="prior file, hub id or id@revision")
    truncate.add_argument("--rank", type=int, required=True, help="largest rank per weight")
    truncate.add_argument("-o", "--output", required=True, help="file to write")
    truncate.add_argument("--overwrite", action="store_true", help="replace an existing output")
    truncate.add_argument("--json", action="store_true", help="print the result as JSON")

    export = Parser(description="Write scale·Δ as a plain LoRA adapter for stock PEFT: task arithmetic, no training.")
    export.add_argument("prior", help="prior file, hub id or id@revision")
    export.add_argument("--scale", type=float, required=True, help="how much of Δ to add, such as 0.1")
    export.add_argument("-o", "--output", required=True, help="folder to write")
    export.add_argument("--base", help="where the base's config is now, if not where the prior was built")
    export.add_argument("--overwrite", action="store_true", help="replace an existing adapter folder")
    export.add_argument("--json", action="store_true", help="print the result as JSON")

    push = Parser(description="Upload a prior with a model card to a hub repository.")
    push.add_argument("prior", help="prior file")
    push.add_argument("repository", help="hub id, such as user/repository; made if it does not exist")
    push.add_argument("--private", action="store_true", help="make the repository a private one")
    push.add_argument("--revision", help="branch to upload to")
    push.add_argument("--message", help="of the commit")
    push.add_argument("--json", action="store_true", help="print the result as JSON")

    targets = Parser(description="Show what target_modules=None adapts and steers on a model, without loading it.")
    targets.add_argument("model", help="folder, hub id or id@revision")
    targets.add_argument("--prior", help="also count which of them have a Δ in this prior")
    targets.add_argument("--json", action="store_true", help="print as JSON")

    merge = Parser(description="Merge a LoRA adapter into its full-precision base, streaming, as a standalone folder.")
    merge.add_argument("--base", required=True, help="full-precision model: folder, hub id or id@revision")
    merge.add_argument("--adapter", required=True, help="adapter folder or hub id, DRIFT or plain LoRA")
    merge.add_argument("-o", "--output", required=True, help="folder to write")
    merge.add_argument(
        "--onto", type=str, default="base", help="base, or dequantized: the 4-bit base's numbers, as it was trained on"
    )
    merge.add_argument(
        "--verify", action="store_true", help="also load both models, in turn, and compare the ways to serve"
    )
    merge.add_argument("--overwrite", action="store_true", help="replace an existing model folder")
    merge.add_argument("--json", action="store_true", help="print the result as JSON")

    baseline = Parser(
        description="Merge a text-only expert into a VLM without training: the baselines of the DRIFT paper's table 2. "
        "Defaults are those of its table 9 (arXiv 2510.15050v2); the density and what its k counts, which the table "
        "leaves open, are those of the code of BR2V (arXiv 2505.05464), its source."
    )
    baseline.add_argument("--method", required=True, help=f"one of {', '.join(METHODS)}")
    baseline.add_argument("--expert", required=True, help="text-only reasoning model: folder, hub id or id@revision")
    baseline.add_argument("--base", required=True, help="vision-language model, in full precision")
    baseline.add_argument("--reference", help="model that both were trained from; ties and dare need it, or a scale")
    baseline.add_argument("-o", "--output", required=True, help="folder to write")
    baseline.add_argument("--scale", type=float, help="merge base + scale·Δ: one task vector instead of two")
    baseline.add_argument(
        "--weights", type=float, nargs=2, help="of the task vectors of base and expert: 0.9 0.1, ties and dare 1.6 0.2"
    )
    baseline.add_argument("--density", type=float, help="share of entries that ties and dare keep: 0.2")
    baseline.add_argument(
        "--modules", type=str, nargs="+", help="which weights: attn, mlp, norm, bias; by default all that there are"
    )
    baseline.add_argument("--only-layers", type=str, nargs="+", help="these layers alone, from 0 on, such as 0 4 8-27")
    baseline.add_argument("--skip-first", type=int, help="not the first so many layers: 6 for layer_swap, else 0")
    baseline.add_argument("--seed", type=int, default=0, help="seed of what dare keeps")
    baseline.add_argument("--force", action="store_true", help="merge even when the two models seem unrelated")
    baseline.add_argument("--overwrite", action="store_true", help="replace an existing model folder")
    baseline.add_argument("--json", action="store_true", help="print the result as JSON")

    demo = Parser(description="Watch DRIFT move a text expert's reasoning into a vision-language model, in minutes.")
    demo.add_argument("--out", help="keep everything in this folder: prior, adapter, merged model, results, pictures")
    demo.add_argument("--seed", type=int, default=0, help="seed of data, start and training")

    preflight = Parser(description="Estimate what training takes on the GPU, from a recipe and its base's config.json.")
    preflight.add_argument("recipe", help="YAML of recipes/sft_vlm.py")
    preflight.add_argument(
        "--set", type=str, nargs="+", default=[], help="settings that win over it: key=value, such as max_tokens=2048"
    )
    preflight.add_argument("--json", action="store_true", help="print as JSON")

    prior = Parser(description="Build, inspect, combine and share reasoning priors.")
    main = Parser(prog="drift-peft", description=DESCRIPTION, version=__version__)
    commands = main.add_subcommands(dest="command")
    commands.add_subcommand("prior", prior, help="build, inspect, combine and share priors")
    commands.add_subcommand("targets", targets, help="what would be adapted and steered")
    commands.add_subcommand("merge", merge, help="adapter + full-precision base -> standalone model")
    commands.add_subcommand("merge-baseline", baseline, help="expert + VLM -> VLM without training, to compare with")
    commands.add_subcommand("demo", demo, help="the whole way on a small embedded world")
    commands.add_subcommand("preflight", preflight, help="will training fit the GPU?")
    verbs = prior.add_subcommands(dest="verb")
    verbs.add_subcommand("build", build, help="two checkpoints -> prior file")
    verbs.add_subcommand("inspect", inspect, help="what a prior holds")
    verbs.add_subcommand("combine", combine, help="weighted sum of priors")
    verbs.add_subcommand("truncate", truncate, help="the same prior at a lower rank")
    verbs.add_subcommand("export", export, help="the prior itself as a LoRA adapter")
    verbs.add_subcommand("push", push, help="upload to the hub, with a model card")
    return main


def _print(result: dict, table: Table, as_json: bool) -> None:
    if as_json:
        print(json.dumps(result, indent=2, ensure_ascii=False, default=str))
    else:
        Console().print(table)


def _build(args: Namespace) -> None:
    settings = args.as_dict()
    as_json = settings.pop("json")
    settings["only_layers"] = _layers(settings["only_layers"])
    summary = prior_summary(build_prior(**settings))
    _print(summary, prior_table(summary), as_json)
    if (energy := args.energy) is not None and not as_json:
        weights = summary["weights"].values()
        capped = sum(weight["energy"] < energy for weight in weights)
        print(f"{capped} of {len(weights)} weights are capped at rank {summary['max_rank']}, below {energy:.1%}")


def _layers(numbers: Sequence[str] | None) -> list[int] | None:
    """0 4 8-27 -> the numbers."""
    layers = []
    for number in numbers or ():
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", number)
        between = match and range(int(match[1]), int(match[2] or match[1]) + 1)
        if not between:
            raise ValueError(f"--only-layers takes numbers and ranges, such as 0 4 8-27, got {number}")
        layers += between
    return layers or None


def _inspect(args: Namespace) -> None:
    summary = prior_summary(ReasoningPrior.load(args.prior), args.rank)
    write_report(summary, args.plot, args.html, args.overwrite)
    _print(summary, prior_table(summary), args.json)
    if not args.json:
        words = "\n".join(summary["verdict"][key] for key in ("distance", "merging", "rank", "basis"))
        Console().print(words, markup=False, emoji=False, highlight=False)


def _combine(args: Namespace) -> None:
    parts = [_part(part) for part in args.parts]
    summary = prior_summary(ReasoningPrior.combine(parts, args.output, args.rank, args.overwrite))
    _print(summary, prior_table(summary), args.json)


def _part(text: str) -> tuple[str, float]:
    """a.safetensors=0.7 -> the prior and its coefficient."""
    source, _, coefficient = text.rpartition("=")
    try:
        if source:
            return source, float(coefficient)
    except ValueError:
        pass
    raise ValueError(f"{text} names no coefficient: write prior=coefficient, such as a.safetensors=0.7")


def _truncate(args: Namespace) -> None:
    summary = prior_summary(ReasoningPrior.load(args.prior).truncate(args.rank, args.output, args.overwrite))
    _print(summary, prior_table(summary), args.json)


def _export(args: Namespace) -> None:
    folder = ReasoningPrior.load(args.prior).as_lora(args.scale, args.output, args.base, args.overwrite)
    table = Table(show_header=False, title=f"LoRA adapter {folder}")
    table.add_row("adds", f"{args.scale:g}·Δ, with the LoRA scaling 1")
    table.add_row("load with", f'PeftModel.from_pretrained(vlm, "{folder}")')
    _print({"output": folder, "scale": args.scale}, table, args.json)


def _push(args: Namespace) -> None:
    prior = ReasoningPrior.load(args.prior)
    url = prior.push_to_hub(
        args.repository, private=args.private or None, commit_message=args.message, revision=args.revision
    )
    table = Table(show_header=False, title=f"{args.prior} uploaded")
    table.add_row("commit", url)
    table.add_row("load with", f'ReasoningPrior.load("{args.repository}")')
    _print({"repository": args.repository, "commit": url, "sha256": prior.sha256}, table, args.json)


def _targets(args: Namespace) -> None:
    prior = None if args.prior is None else ReasoningPrior.load(args.prior)
    summary = targets_summary(Checkpoint(args.model), prior)
    _print(summary, targets_table(summary), args.json)
    if not args.json:
        print(f"target_modules = r'{summary['target_modules']}'")


def _merge(args: Namespace) -> None:
    settings = args.as_dict()
    as_json = settings.pop("json")
    report = merge_adapter(**settings)
    table = Table(show_header=False, title=f"merged into {report.output}")
    table.add_row("adapter modules merged", str(report.modules))
    table.add_row("tensors written", str(report.tensors))
    table.add_row("change of the merged weights ‖W' − W‖/‖W‖", f"{report.relative_change:.2e}")
    if report.trained_on is not None:
        table.add_row("the base in training", report.trained_on)
    verified = "not verified (--verify)" if report.logits_error is None else f"{report.logits_error:.2e}"
    table.add_row("logits against base + adapter, relative error", verified)
    _print(asdict(report), table, as_json)
    if report.verification is not None and not as_json:
        Console().print(verification_table(report.verification))
        Console().print(report.verification.verdict, markup=False, emoji=False, highlight=False)


def _merge_baseline(args: Namespace) -> None:
    settings = args.as_dict()
    as_json = settings.pop("json")
    settings["only_layers"] = _layers(settings["only_layers"])
    report = merge_baseline(**settings)
    table = Table(show_header=False, title=f"{report.method} merged into {report.output}")
    table.add_row("weights of the task vectors", ", ".join(f"{weight:g}" for weight in report.weights))
    table.add_row("density", "all entries" if report.density is None else f"{report.density:g}")
    table.add_row("weights merged", str(report.merged))
    if report.without_counterpart:
        table.add_row("not merged, the expert has none", describe(report.without_counterpart))
    table.add_row("tensors written", str(report.tensors))
    table.add_row("change of the merged weights ‖W' − W‖/‖W‖", f"{report.relative_change:.2e}")
    _print(asdict(report), table, as_json)


def _demo(args: Namespace) -> None:
    from .demo import run  # needs the extra `demo`, and says so

    run(out=args.out, seed=args.seed)


def _preflight(args: Namespace) -> None:
    summary = preflight_summary(args.recipe, dict(_setting(text) for text in args.set))
    _print(summary, preflight_table(summary), args.json)
    if not args.json:
        Console().print(cards_table(summary))


def _setting(text: str) -> tuple[str, object]:
    """max_tokens=2048 -> the key and its value, read as YAML."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set {text} names no value: write key=value, such as max_tokens=2048")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {text} is no YAML: {' '.join(str(error).split())}") from error


COMMANDS: dict[tuple[str, ...], Callable[[Namespace], None]] = {
    ("prior", "build"): _build,
    ("prior", "inspect"): _inspect,
    ("prior", "combine"): _combine,
    ("prior", "truncate"): _truncate,
    ("prior", "export"): _export,
    ("prior", "push"): _push,
    ("targets",): _targets,
    ("merge",): _merge,
    ("merge-baseline",): _merge_baseline,
    ("demo",): _demo,
    ("preflight",): _preflight,
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
    except (ValueError, OSError, KeyError, ImportError, KeyboardInterrupt) as error:
        message = error.args[0] if isinstance(error, KeyError) and error.args else str(error) or "interrupted"
        print(f"drift-peft: error: {'; '.join([message, *getattr(error, '__notes__', ())])}", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
