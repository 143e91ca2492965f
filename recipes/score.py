"""Score the answers of base, SFT and DRIFT by one rule, with confidence intervals, beside the published numbers.

    python recipes/score.py --base outputs/base --sft outputs/sft --drift outputs/drift -o scores.json

Each is a folder that VLMEvalKit or lmms-eval wrote, or a result of evaluate.py; how to make them: EVALUATION.md. All
have to hold the same samples. Results of evaluate.py have to be asked alike, too: with the same prompt, token limit and
settings of the processor. --force compares others nevertheless, and says what differs. The intervals are of the
differences, by a bootstrap over samples that are drawn for all models together (over problems in WeMath, whose score is
of whole problems).
"""

from __future__ import annotations

from drift_peft.cli.interrupt import begin

if __name__ == "__main__":  # before what takes its time to import
    begin("score.py")

import json
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from parts.command_line import Parser, in_one_sentence, run_script
from parts.intervals import RESAMPLES, SEED, resample
from parts.outputs import ASKED, BENCHMARKS, Answer, read_outputs
from parts.reading import OUTCOMES, UNFINISHED
from parts.scoring import mark, scorer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from drift_peft.atomic import write_json

PUBLISHED = json.loads(Path(__file__).with_name("eval").joinpath("published.json").read_text("utf-8"))
REASONING = ["MathVista", "MathVision", "MathVerse", "WeMath strict", "WeMath loose", "LogicVista"]  # of table 2
AVERAGE = "Avg."
SHOWN = 60  # characters of what differs
ALIKE = "run the same tool with the same settings on both"
UNSURE = {"HallusionBench": "the paper does not say which of its accuracies it publishes; ours is per question"}


def same_samples(models: dict[str, list[Answer]], benchmark: str) -> dict[str, list[Answer]]:
    """The answers of each model in the order of the first one's.

    Raises:
        ValueError: they are not of the same samples; it names the first that differs.
    """
    (first, expected), *others = models.items()
    ordered = {first: expected}
    for name, answers in others:
        by_id = {answer.id: answer for answer in answers}
        for answer in expected:
            other = by_id.pop(answer.id, None)
            if other is None:
                raise ValueError(f"{benchmark}: sample {answer.id} of {first} is not in {name}: {ALIKE}")
            for what in ("question", "gold", "step"):
                one, two = getattr(answer, what), getattr(other, what)
                if one != two:
                    one, two = where_they_part(str(one), str(two))
                    message = f"{one!r} in {first}, {two!r} in {name}"
                    raise ValueError(f"{benchmark}: sample {answer.id} has another {what}: {message}: {ALIKE}")
            ordered.setdefault(name, []).append(other)
        if by_id:
            raise ValueError(f"{benchmark}: sample {next(iter(by_id))} of {name} is not in {first}: {ALIKE}")
    return ordered


def other_data(*models: dict[str, list[Answer]]) -> str | None:
    """About which data two results of evaluate.py are, whose benchmarks are called by these; None of other files."""
    asked = [answers[0].asked for benchmarks in models if len(benchmarks) == 1 for answers in benchmarks.values()]
    if len(asked) < 2 or None in asked:
        return None
    one, two = asked
    return f"{one['file']} was asked about {one['data']}, and {two['file']} about {two['data']}"


def where_they_part(one: str, two: str) -> tuple[str, str]:
    """As much of two texts as a sentence has room for, with the first character that differs."""
    pairs = enumerate(zip(one, two, strict=False))
    alike = next((place for place, (a, b) in pairs if a != b), min(len(one), len(two)))
    start = 0 if alike < SHOWN else alike - SHOWN // 2
    before = "…" if start else ""
    return tuple(f"{before}{text[start : start + SHOWN]}" for text in (one, two))


def asked_otherwise(models: dict[str, list[Answer]]) -> list[str]:
    """In which settings of evaluate.py the result of the first model and that of another one differ, in words."""
    first, *others = (answers[0].asked for answers in models.values())
    told = []
    for other in others:
        for key in ASKED if first and other else ():
            if first[key] != other[key]:
                one, two = where_they_part(*(json.dumps(asked[key], ensure_ascii=False) for asked in (first, other)))
                told.append(f"{first['file']} was asked with {key} {one}, {other['file']} with {two}")
    return told


def mark_all(answers: list[Answer], name: str) -> tuple[list[bool], dict[str, int]]:
    """Which are correct, and how many were read by each rule, are unfinished, or were not decided."""
    progress = tqdm(answers, desc=name, disable=None)
    marks = [mark(given.response, given.gold, given.question, given.finish_reason) for given in progress]
    read_by = Counter(rule for _, rule in marks)
    return [correct for correct, _ in marks], {rule: read_by[rule] for rule in OUTCOMES}


def units(answers: list[Answer], correct: list[bool], benchmark: str) -> dict[str, np.ndarray]:
    """Column of the table -> score of each unit that a bootstrap may draw: a sample, or a problem of WeMath.

    WeMath (arXiv 2407.01284; both tools compute it alike) asks the steps of a problem one by one, and all at once. A
    problem counts 1 if the whole is right and its steps are (strict: all of them; loose: one), 0.5 if all steps are
    right and the whole is not.
    """
    if answers[0].step is None:
        return {benchmark: np.array(correct, float)}
    problems: dict[str, dict[str, bool]] = defaultdict(dict)
    for answer, right in zip(answers, correct, strict=True):
        problem, step = answer.step
        problems[f"{problem} of {step.partition('_')[0]}"][step] = right
    strict, loose = [], []
    for problem, marks in problems.items():
        whole = [right for step, right in marks.items() if step.endswith("_multi")]
        steps = [right for step, right in marks.items() if not step.endswith("_multi")]
        if len(whole) != 1 or not all(step.startswith(f"{len(steps)}steps_") for step in marks):
            raise ValueError(f"{benchmark}: problem {problem} lacks one of its steps: run all of the benchmark")
        strict.append(float(all(steps)) if whole[0] else 0.5 * all(steps))
        loose.append(float(any(steps)) if whole[0] else 0.5 * all(steps))
    return {f"{benchmark} strict": np.array(strict), f"{benchmark} loose": np.array(loose)}


def score(models: dict[str, dict[str, list[Answer]]], force: bool = False) -> dict:
    """What is written with -o: for each column its scores, differences with intervals, how its answers were read.

    Args:
        models: name -> benchmark -> answers; the last one is compared with each before it.
        force: compare what evaluate.py has asked otherwise.

    Raises:
        ValueError: they do not hold the same samples of the same benchmarks, or were asked otherwise.
    """
    (first, found), *others = models.items()
    for name, benchmarks in others:
        for benchmark in sorted(found.keys() ^ benchmarks.keys()):
            if told := other_data(found, benchmarks):
                raise ValueError(f"{told}: {ALIKE}")
            have, lack = (first, name) if benchmark in found else (name, first)
            raise ValueError(f"there is {benchmark} of {have}, and none of {lack}: {ALIKE}")
    *before, last = models
    columns: dict[str, dict] = {}
    means: dict[str, dict[str, float]] = {name: {} for name in models}  # model -> column -> accuracy
    draws: dict[str, dict[str, np.ndarray]] = {name: {} for name in before}  # model -> column -> resampled differences
    otherwise = []
    for number, benchmark in enumerate(sorted(found, key=[*BENCHMARKS, *found].index)):
        answers = same_samples({name: benchmarks[benchmark] for name, benchmarks in models.items()}, benchmark)
        otherwise += asked_otherwise(answers)
        if otherwise and not force:
            raise ValueError(f"{'; '.join(otherwise)}: ask all alike, or pass --force to compare them nevertheless")
        marked = {name: mark_all(given, f"{benchmark}, {name}") for name, given in answers.items()}
        scores = {name: units(answers[name], right, benchmark) for name, (right, _) in marked.items()}
        read_by = {name: read for name, (_, read) in marked.items()}
        unfinished = {name: read[UNFINISHED] for name, read in read_by.items()}
        for column, values in scores[last].items():
            columns[column] = {"samples": len(answers[last]), "units": len(values)}
            columns[column] |= {"unfinished": unfinished, "read_by": read_by}
            for name in models:
                means[name][column] = scores[name][column].mean()
        for name in before:
            differences = np.stack([scores[last][column] - scores[name][column] for column in scores[last]], 1)
            draws[name] |= zip(scores[last], resample(differences, [SEED, number]).T, strict=True)
    if columns.keys() >= set(REASONING):
        columns[AVERAGE] = {}
        for numbers in (*means.values(), *draws.values()):
            numbers[AVERAGE] = np.mean([numbers[column] for column in REASONING], axis=0)
    for column, numbers in columns.items():
        numbers["scores"] = {name: _percent(means[name][column]) for name in models}
        numbers["differences"] = {
            f"{last} - {name}": {
                "difference": _percent(means[last][column] - means[name][column]),
                "interval": [_percent(bound) for bound in np.quantile(draws[name][column], [0.025, 0.975])],
            }
            for name in before
        }
    bootstrap = {"resamples": RESAMPLES, "seed": SEED, "level": 0.95}
    result = {"models": list(models), "scorer": scorer(), "bootstrap": bootstrap, "columns": columns}
    return result | ({"asked_otherwise": otherwise} if otherwise else {})


def _percent(share: float) -> float:
    return round(100 * float(share), 2)


def paper_table(result: dict) -> Table:
    """The layout of the paper's tables 2 and 3, its numbers below ours."""
    columns = result["columns"]
    table = Table("", *columns, title="accuracy in %, by rule")
    for name in result["models"]:
        table.add_row(name, *(f"{column['scores'][name]:.1f}" for column in columns.values()))
    table.add_section()
    for name, numbers in published(columns).items():
        if name in result["models"]:
            table.add_row(f"{name}, published", *(_number(numbers.get(column)) for column in columns))
    return table


def published(columns) -> dict[str, dict[str, float]]:
    """Model -> column -> what the paper says; its average is that of table 2, over all six columns."""
    found = {}
    for name in ("base", "SFT", "DRIFT"):
        numbers = PUBLISHED[name]
        average = {AVERAGE: round(sum(numbers[column] for column in REASONING) / len(REASONING), 1)}
        found[name] = {column: value for column, value in (numbers | average).items() if column in columns}
    return found


def interval_table(result: dict) -> Table:
    *before, last = result["models"]
    pairs = [f"{last} - {name}" for name in before]
    table = Table("", "samples", "unfinished", *(f"{pair} [95 %]" for pair in pairs), title="differences, paired")
    for name, column in result["columns"].items():
        cut = (
            " / ".join(str(column["unfinished"][model]) for model in result["models"]) if "unfinished" in column else ""
        )
        differences = (column["differences"][pair] for pair in pairs)
        cells = (
            "{difference:+.1f} [{interval[0]:+.1f}, {interval[1]:+.1f}]".format(**difference)
            for difference in differences
        )
        table.add_row(name, str(column.get("samples", "")), cut, *cells)
    return table


def reading_table(result: dict) -> Table:
    """By which rule each model's answers were found: where that differs, part of a difference may be of form alone."""
    table = Table("", *OUTCOMES, title="answers by the rule that found them")
    for name, column in result["columns"].items():
        for model, read_by in column.get("read_by", {}).items():
            table.add_row(f"{name}, {model}", *map(str, read_by.values()))
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def notes(result: dict) -> list[str]:
    """What a reader of the tables has to know."""
    cut = [
        f"{name} ({number} of {column['samples']} of {model})"
        for name, column in result["columns"].items()
        for model, number in column.get("unfinished", {}).items()
        if number > 0.01 * column["samples"]
    ]
    lines = [*result.get("asked_otherwise", [])]
    lines += [f"{name}: {reason}" for name, reason in UNSURE.items() if name in result["columns"]]
    if cut:
        lines.append(f"answers without an end count as wrong, in {', '.join(cut)}: allow more new tokens")
    return lines


def refuse_output(output: Path, inputs: dict[str, str]) -> None:
    """Raise ValueError where the scores cannot be written, or would replace anything but scores of answers so named.

    So the same command may be run again, as reproduce_drift.sh does, wherever its folder lies then.
    """
    if not output.parent.is_dir():
        raise ValueError(f"output {output} cannot be written: there is no folder {output.parent}")
    if output.is_dir():
        raise ValueError(f"output {output} is a folder: name a file, such as {output / 'scores.json'}")
    if not output.exists():
        return
    if (earlier := inputs_of(output)) is None:
        raise ValueError(f"output {output} exists, and holds no scores: name another file")
    if {model: Path(place).name for model, place in earlier.items()} != {m: Path(p).name for m, p in inputs.items()}:
        whose = ", ".join(f"{model} {place}" for model, place in earlier.items())
        raise ValueError(f"output {output} holds the scores of other answers ({whose}): name another file")


def inputs_of(scores: Path) -> dict[str, str] | None:
    """Whose scores a file holds; None of any other file."""
    try:
        content = json.loads(scores.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None
    return content.get("inputs") if isinstance(content, dict) and "columns" in content else None


def main(arguments: list[str] | None = None) -> None:
    parser = Parser("score.py", __doc__)
    parser.add_argument("--base", type=Path, required=True, help="answers of the untrained model: folder or file")
    parser.add_argument("--sft", type=Path, help="answers of the model trained without a prior")
    parser.add_argument("--drift", type=Path, required=True, help="answers of the model trained with one")
    parser.add_argument("-o", "--output", type=Path, help="file to write the numbers to, as JSON")
    parser.add_argument("--force", action="store_true", help="compare results of evaluate.py that were asked otherwise")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    args = parser.parse_args(arguments)
    places = {"base": args.base, "SFT": args.sft, "DRIFT": args.drift}
    with in_one_sentence("score.py", ValueError, OSError):
        inputs = {name: str(place) for name, place in places.items() if place}
        if args.output:
            refuse_output(args.output, inputs)
        result = score({name: read_outputs(place) for name, place in inputs.items()}, args.force)
        result |= {"inputs": inputs}
        result |= {"published": {"source": PUBLISHED["source"], **published(result["columns"])}}
        if args.output:
            write_json(args.output, result)
    if args.json:
        print(json.dumps(result))
    else:
        console = Console() if sys.stdout.isatty() else Console(width=160)
        for table in (paper_table(result), interval_table(result), reading_table(result)):
            console.print(table)
    for sentence in notes(result):
        print(f"note: {sentence}", file=sys.stderr)


if __name__ == "__main__":
    run_script("score.py", main)
