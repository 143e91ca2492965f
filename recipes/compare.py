"""Compare the ways to bring an expert's skill into a VLM on your own data: one table, one picture, one recipe.

    python recipes/compare.py recipe.yaml -o compared
    python recipes/compare.py recipe.yaml -o compared --test test.jsonl --steps 300 --ways base sft drift drift-keep
    python recipes/compare.py recipe.yaml -o compared --search 20

The recipe is one of sft_vlm.py. Compared are the VLM as it is, transplants without training, the prior gated on the
expert's answers to --texts, SFT, SFT after a part of Δ was merged, and DRIFT, each trained one also with keeping. Held
LoRA, and DRIFT from a start that holds a part of Δ, are compared where --ways names them. All train on the same
samples, with the same seeds and budget. They are examined on samples that were held out of the data, or on --test, and
on the VLM's own answers about the images of these. Samples with an image in common, or the same question without one,
are held out together, so that no way has trained on these. The same command goes on where it was stopped.

The output folder then holds `compared.json`; `choice.yaml`, the recipe of the way to take, with its numbers; and, where
there are images to keep on, `compared.png`: right answers beside the distance from the VLM. `ways/` has a folder for
each way and seed. Checkpoints and merged bases are deleted when their way is measured: a run of its recipe makes them
again.
"""

from __future__ import annotations

from drift_peft.cli.interrupt import begin

if __name__ == "__main__":  # before what takes its time to import
    begin("compare.py")

import json
import math
import shutil
import sys
from argparse import Namespace
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import yaml
from parts.checkpoints import checkpoints, newest_whole
from parts.choice import compared_table, summarize, write_choice
from parts.command_line import Parser, in_one_sentence, run_script, stop
from parts.frontier import Measured, choose, draw, frontier, over_budget, read_measured
from parts.held_out import (
    HELD_OUT,
    check_images,
    groups_of,
    hold_out,
    mark_all,
    note_of_kept,
    pictured,
    read_data,
    rows_of,
    write_split,
)
from parts.journal import Journal, refuse_other_folder
from parts.launch import Failed, launch
from parts.pace import Pace
from parts.processing import processor_settings
from parts.stamp import hold, is_missing, sha256_of_file
from parts.teachers import PROMPT
from parts.ways import KEEPING, KINDS, OUTPUT, TRAINED, Way, gating, processing, transplanting, ways_of
from rich.console import Console

from drift_peft.atomic import write_json

RECIPES = Path(__file__).parent
PROBED = 5  # steps by which the pace of a way is known
LEDGER = "ledger.jsonl"
MADE = "ways", "*.parquet", "keep*.safetensors", "compared.*", "choice.yaml"  # beside it


@dataclass
class Comparison:
    """What is the same for all ways.

    Attributes:
        settings: of the recipe.
        data: train, test, and with a search fitting and validation, which are parts of train -> file.
        keep: keep set of the ways that keep, made by the first of them; None if there are no images to make it of.
        keep_sets: exam -> another keep set to measure with; empty if there are no images to make one of.
        ledger: what is finished, by way, exam and seed.
        pace: says how long the exams take.
    """

    args: Namespace
    settings: dict
    data: dict[str, str]
    keep: str | None
    keep_sets: dict[str, Path]
    ledger: Journal
    pace: Pace | None = None

    def runs(self, way: Way, exam: str) -> dict[str, tuple[int, Path]]:
        """Line of the ledger -> seed and folder. What is not trained has one, and so has what a search tries."""
        seeds = self.args.seeds if exam == "test" and way.trains is not None else self.args.seeds[:1]
        folder = self.args.output / ("ways" if exam == "test" else "search") / way.name
        return {f"{way.name}, {exam}, seed {seed}": (seed, folder / f"seed{seed}") for seed in seeds}

    def measure(self, way: Way, exam: str = "test") -> Measured:
        """Make a way and examine it, as far as that is not finished."""
        for line, (seed, folder) in self.runs(way, exam).items():
            if line in self.ledger.answers:
                continue
            print(f"{way.title}: {folder}", file=sys.stderr, flush=True)
            folder.mkdir(parents=True, exist_ok=True)
            facts = {} if way.trains is None else self.train(way, folder, seed, HELD_OUT[exam])
            if way.kind == "transplant":
                self.transplant(way, folder / "adapter")
            elif way.kind == "gated":
                self.gate(folder)
            with self.pace.exam(line) if self.pace else nullcontext():
                self.examine(folder, exam)
            hold(self.ledger, {**self.settings, "keep": self.keep}, made=folder)
            for left in (folder / "adapter-base", *checkpoints(folder / "adapter")):
                shutil.rmtree(left, ignore_errors=True)
            self.ledger.add(line, facts)
        return self.read(way, exam)

    def train(self, way: Way, folder: Path, seed: int, data: str) -> dict:
        """Run sft_vlm.py, or go on with it. Returns steps, and minutes where they are known."""
        output, recipe = folder / "adapter", folder / "recipe.yaml"
        own = {"data": self.data[data], "split": None, "images": None, "streaming": None, **dict.fromkeys(OUTPUT)}
        settings = way.recipe(self.settings, **own | {"output_dir": str(output), "seed": seed})

        def run(steps: int | None, **more) -> dict:
            content = {**settings, **({} if steps is None else {"max_steps": steps}), **more}
            recipe.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
            resumes = newest_whole(output) is not None
            if not resumes:
                shutil.rmtree(output, ignore_errors=True)  # of a run that was killed before its first checkpoint
            launch(RECIPES / "sft_vlm.py", "--config", recipe, *["--resume-from-checkpoint", "true"] * resumes)
            return results()

        def results() -> dict:
            return json.loads((output / "run.json").read_text(encoding="utf-8"))["results"]

        steps = self.args.steps
        if self.args.minutes is not None:
            pace = f"{folder.relative_to(self.args.output).as_posix()}, pace"
            if pace not in self.ledger.answers:
                shutil.rmtree(output, ignore_errors=True)
                seconds = run(PROBED, drift_warmup_steps=0)["train_runtime"] / PROBED
                shutil.rmtree(output)
                self.ledger.add(pace, {"seconds": seconds})
            steps = max(1, int(60 * self.args.minutes / self.ledger.answers[pace]["seconds"]))
        found = results() if (output / "run.json").exists() else run(steps)
        seconds = found.get("train_runtime")  # of a run that was stopped and went on, nobody knows them
        return {"steps": found["steps"], "minutes": seconds and seconds / 60}

    def transplant(self, way: Way, output: Path) -> None:
        from drift_peft import transplant

        if not output.exists():
            transplant(**transplanting(self.settings, way.scale), output=output)

    def gate(self, folder: Path) -> None:
        """The recipe's prior, gated on its keep set and the expert's answers, as adapter. What is not there is made."""
        names = {key: self.settings[key] for key in ("expert", "base", "prior")}
        pair = ["--expert", names["expert"], "--base", names["base"]]
        gated = folder / "gated.safetensors"
        if is_missing(names["prior"]):
            reference = ["--reference", self.settings["reference"]] if "reference" in self.settings else []
            rank = ["--rank", self.settings.get("prior_rank", 64)]
            launch("-m", "drift_peft", "prior", "build", *pair, *reference, *rank, "-o", names["prior"])
        self.make_keep()
        made = gated, folder / "adapter"
        for file, command in zip(made, gating(self.settings, self.keep, self.args.texts, *made), strict=True):
            if not file.exists():
                launch("-m", "drift_peft", *command)

    def make_keep(self) -> None:
        """The keep set of the ways that keep, if it is not there; of no images that a search judges by, if there is one
        by now."""
        if is_missing(self.keep):
            in_4bit = [] if self.settings.get("use_cpu") else ["--load-in-4bit"]
            images = self.settings.get("keep_images") or self.data.get("fitting", self.data["train"])
            longest = ["--max-new-tokens", self.settings.get("keep_max_new_tokens", 64), *in_4bit]
            make_keep_set(self.settings, images, self.keep, self.settings.get("keep_samples", 300), *longest)

    def note_kept(self) -> bool:
        """Say where the keep set of the ways that keep has images of those that an exam is measured on. Returns whether
        it is there to look at."""
        if self.keep is None or is_missing(self.keep):
            return False
        for measured in self.keep_sets.values():
            if note := note_of_kept(self.keep, measured):
                print(note, file=sys.stderr)
        return True

    def examine(self, folder: Path, exam: str) -> None:
        base, adapter = folder / "adapter-base", folder / "adapter"
        model = ["--model", base if base.exists() else self.settings["base"]]
        model += ["--adapter", adapter] if adapter.exists() else []
        size = ["--batch-size", self.args.batch_size, *processing(self.settings)]
        asked = ["--prompt", self.args.prompt, "--max-new-tokens", self.args.max_new_tokens]
        if not (folder / "right.json").exists():
            data = ["--data", self.data[exam]]
            launch(RECIPES / "evaluate.py", *model, *data, *asked, *size, "-o", folder / "right.json")
        if self.keep_sets and not (folder / "kept.json").exists():
            launch(RECIPES / "evaluate.py", *model, "--keep", self.keep_sets[exam], *size, "-o", folder / "kept.json")

    def read(self, way: Way, exam: str) -> Measured:
        """What the runs of a way have answered, mean over the seeds."""
        lines = self.runs(way, exam)
        folders = [folder for _, folder in lines.values()]
        return read_measured(folders, bool(self.keep_sets), [self.ledger.answers[line] for line in lines])


def make_keep_sets(args: Namespace, settings: dict, data: dict[str, str], shown: dict[str, bool]) -> dict[str, Path]:
    """The VLM's own answers to measure with, about the images of each exam's samples, or else about keep_images."""
    images = {exam: data[exam] if shown[exam] else settings.get("keep_images") for exam in HELD_OUT if exam in data}
    if None in images.values():
        return {}
    files = {exam: args.output / f"keep_{exam}.safetensors" for exam in images}
    for exam, file in files.items():
        if not file.exists():
            size = ["--batch-size", args.batch_size, "--seed", 1]
            make_keep_set(settings, images[exam], file, args.keep_samples, *size)
    return files


def make_keep_set(settings: dict, images: str, file: str | Path, samples: int, *flags: object) -> None:
    questions = ["--questions", settings["keep_questions"]] if "keep_questions" in settings else []
    top_k = ["--top-k", settings["keep_top_k"]] if "keep_top_k" in settings else []
    made = ["--base", settings["base"], "--images", images, "-o", file, "--samples", samples]
    launch("-m", "drift_peft", "keep", "make", *made, *questions, *top_k, *processing(settings), *flags)


def read_recipe(file: Path) -> dict:
    """Its settings as sft_vlm.py reads them, once its own parser has found nothing wrong with them."""
    from drift_peft import recipe

    content = recipe.read_recipe(file)  # a file that is not there is told before the seconds that torch takes to import

    from parts.arguments import HINTS, parse, value_of

    own = [] if {"keep", "replay"} & {*content} else ["--keep", "made"]  # by the first run that keeps
    parse(["--config", str(file), *own], __doc__)
    meant = {key: value_of(key, value, HINTS.get(key)) for key, value in content.items()}
    return {key: value for key, value in meant.items() if value is not None}


def compare(args: Namespace) -> dict:
    """All of it; what is written as compared.json.

    Raises:
        ValueError, OSError, yaml.YAMLError: a mistake in the recipe, the flags or the data.
        Failed: a run has failed.
    """
    refuse_other_folder(args.output, LEDGER, *MADE, "*config.json")  # of a model
    if args.texts is not None and not (args.texts.is_file() and args.texts.read_bytes().strip()):
        raise ValueError(f"--texts {args.texts} is no file with prompts: name one, with a prompt a line")
    settings = read_recipe(args.recipe)
    if args.search:
        import optuna  # noqa: F401  which is missed now, and not when all ways are measured
    flags = ("test", "held_out", "steps", "minutes", "prompt", "max_new_tokens", "keep_samples")
    asked = {**settings, **{f"--{name.replace('_', '-')}": getattr(args, name) for name in flags}}
    processor = processor_settings(settings.get("processor_kwargs"), settings.get("chat_template_path"))
    asked["examined with processor_kwargs"] = processor or None
    dataset, tested, asked["samples' SHA-256"] = read_data(args, settings)
    marks, asked["images' SHA-256"] = mark_all(dataset, tested, args.test)
    rows = hold_out(groups_of(marks), args)
    shown = pictured(dataset, rows, tested)
    keep = settings.get("keep")
    if keep is None and (shown.get("fitting", shown["train"]) or "keep_images" in settings):
        keep = str(args.output / "keep.safetensors")  # made by the first run that keeps
    texts = None if args.texts is None else sha256_of_file(args.texts)
    shares, held = args.merge_first or [0.5], args.merge_first or [1.0]
    ways = ways_of(settings, args.ways, args.scales, shares, keep, texts, held, args.meant)
    if args.search:
        from parts.search import space

        for way in ways:
            if way.trains is not None:
                space(way, settings)  # which refuses what cannot be tuned
    is_kept = any(way.kind.endswith(KEEPING) for way in ways)
    check_images(shown, settings.get("keep_images"), keep if is_kept and is_missing(keep) else None, args.budget)
    told = {f"{what}' SHA-256": "they are others now" for what in ("samples", "images")}
    args.output.mkdir(parents=True, exist_ok=True)  # now: what is refused above leaves nothing behind
    with Journal(args.output / LEDGER, asked, text=None, told=told) as ledger:
        ledger.begin()  # what is made next is of these settings
        hold(ledger, {**settings, "keep": keep})
        data = write_split(dataset, rows, args, tested)
        keep_sets = make_keep_sets(args, settings, data, shown)
        comparison = Comparison(args, settings, data, keep, keep_sets, ledger)
        waiting = [line for way in ways for line in comparison.runs(way, "test") if line not in ledger.answers]
        comparison.pace = Pace(waiting, rows_of(data["test"]), args.max_new_tokens)
        if args.search and is_kept:
            comparison.make_keep()
        noted = comparison.note_kept()
        measured = {way.name: comparison.measure(way) for way in ways}
        if not noted:
            comparison.note_kept()  # it is made by now, if a way keeps
        if args.search and (way := tune(comparison, ways, measured)):
            ways.append(way)
            measured[way.name] = comparison.measure(way)
    chosen = choose(measured, args.budget)
    titles = {way.name: way.title for way in ways}
    result = {"recipe": str(args.recipe), "seeds": args.seeds, **asked, **summarize(measured, titles, chosen)}
    write_json(args.output / "compared.json", result)
    if keep_sets:
        draw(measured, titles, chosen, args.output / "compared.png")
    if chosen is None:
        (args.output / "choice.yaml").unlink(missing_ok=True)  # of another budget
        return result
    (way,) = (way for way in ways if way.name == chosen)
    steps = None if args.steps is None and args.minutes is None else result["ways"][chosen].get("steps")
    write_choice(result, way, {**settings, "keep": keep}, steps, args.output / "choice.yaml", args.texts)
    return result


def tune(comparison: Comparison, ways: list[Way], measured: dict[str, Measured]) -> Way | None:
    """The best of the settings that a search has tried for the trained ways of the frontier, on validation samples.
    None, which is said, if all of them cost more than the budget."""
    from parts.search import search

    trained = [way for way in ways if way.trains is not None]
    leading = [way for way in trained if way.name in frontier(measured)] or trained

    def measure(way: Way) -> tuple[float, float]:
        result = comparison.measure(way, "validation")
        return float(result.right.mean()), result.cost

    args = comparison.args
    tried = search(args.search, leading, comparison.settings, measure, args.output / "search.journal", args.seeds[0])
    found = {way.name: comparison.measure(way, "validation") for way in tried}
    if (chosen := choose(found, args.budget)) is None:
        told = over_budget("trial", (way.cost for way in found.values()), args.budget)
        print(f"note: {told}; so none is trained on all samples", file=sys.stderr)
    return next((way for way in tried if way.name == chosen), None)


def main(arguments: list[str] | None = None) -> None:
    parser = Parser("compare.py", __doc__)
    add = parser.add_argument
    add("recipe", type=Path, help="YAML of sft_vlm.py, such as one of configs/")
    add("-o", "--output", type=Path, required=True, help="folder to write, and to go on in")
    add("--test", help="samples with known answers to examine on, instead of some of the data; see data.py")
    add("--held-out", type=int, default=100, help="samples to hold out of the data, once more for --search")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--steps", type=int, help="of every way that is trained; otherwise the recipe's")
    budget.add_argument("--minutes", type=float, help="instead: as many steps as fit, by the pace of the first ones")
    add("--seeds", type=int, nargs="+", default=[0], help="of the training runs; more than one give their mean")
    text = "which to compare; otherwise all that the recipe allows, without the started and held"
    add("--ways", nargs="+", choices=KINDS, default=[], help=text)
    add("--scales", type=float, nargs="+", default=[0.3, 0.6, 1.0], help="λ of the transplants")
    add("--texts", type=Path, metavar="FILE", help="prompts for the expert, one a line, whose answers gate the prior")
    text = "λ of what is merged before training, or in the adapter at its start (default: 0.5; for held LoRA, 1)"
    add("--merge-first", type=float, nargs="+", help=text)
    add("--search", type=int, default=0, metavar="N", help="tune the leading ways in so many trials, with optuna")
    add("--budget", type=float, help="most that the choice may cost, in nats a token from the VLM's own answers")
    add("--keep-samples", type=int, default=100, help="answers of the VLM to measure with")
    add("--batch-size", type=int, default=8, help="questions at a time, where nothing is trained")
    add("--max-new-tokens", type=int, default=16384, help="longest answer in tokens")
    add("--prompt", default=PROMPT, help='what is added to each question of an exam; "" for nothing')
    add("--json", action="store_true", help="print the numbers as JSON")
    args = parser.parse_args(arguments)
    use = {"--scales": ("transplant",), "--texts": ("gated",), "--merge-first": ("merged", "started", "held")}
    use |= {"--search": TRAINED, "--seeds": TRAINED}
    for flag, kinds in use.items():
        if args.ways and not any(kind.startswith(kinds) for kind in args.ways):
            parser.refuse_idle(f"with --ways {' '.join(args.ways)}", flag)
    args.meant = [kinds[0] for flag, kinds in use.items() if flag in parser.given and not args.ways]
    for name in ("held_out", "steps", "minutes", "keep_samples", "batch_size", "max_new_tokens"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} is above 0, not {getattr(args, name)}")
    for name in ("minutes", "budget"):
        if (value := getattr(args, name)) is not None and not 0 <= value < math.inf:
            parser.error(f"--{name} is a finite number, at least 0, not {value:g}")
    if args.search < 0:
        parser.error(f"--search is a number of trials, and 0 for none, not {args.search}")
    for name in ("seeds", "ways", "scales", "merge_first"):
        named = [f"{value:g}" if isinstance(value, float) else str(value) for value in getattr(args, name) or []]
        if twice := [value for value in named if named.count(value) > 1]:
            parser.error(f"--{name.replace('_', '-')} names {twice[0]} twice: name each once")
    for name, shares in (("scales", args.scales), ("merge-first", args.merge_first or [])):
        if useless := [share for share in shares if not (share and math.isfinite(share))]:
            parser.error(f"--{name} takes shares of Δ, such as 0.5, not {useless[0]:g}")
    with in_one_sentence("compare.py", ValueError, OSError, ImportError, yaml.YAMLError, Failed):
        try:
            result = compare(args)
        except KeyboardInterrupt:
            message = "stopped; the same command goes on" if args.output.exists() else "stopped"
            raise KeyboardInterrupt(message) from None
    if args.json:
        print(json.dumps(result))
    else:
        console = Console() if sys.stdout.isatty() else Console(width=180)
        console.print(compared_table(result))
    if result["choice"] is None:
        told = over_budget("way", (way["kl"][0] for way in result["ways"].values()), args.budget)
        stop("compare.py", f"{told}: raise --budget or leave it out, and the same command chooses of these", 1)
    if not args.json:
        print(f"The choice is {result['ways'][result['choice']]['title']}: {args.output / 'choice.yaml'}")


if __name__ == "__main__":
    run_script("compare.py", main)
