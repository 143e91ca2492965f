"""The answers that a model gave, as VLMEvalKit, lmms-eval or evaluate.py wrote them down.

Read off the source of open-compass/VLMEvalKit at e8e78f0 and EvolvingLMMs-Lab/lmms-eval at 75571cf:

VLMEvalKit, vlmeval/inference.py and vlmeval/smp/file.py: `<model>_<data set>.xlsx`, or .tsv or .json by PRED_FORMAT;
    the columns of the data set without `image`, and `prediction`; with SPLIT_THINK also `thinking`. What cannot be
    written so is pickled instead.
lmms-eval, lmms_eval/loggers/evaluation_tracker.py and lmms_eval/evaluator.py: `<date>_samples_<task>.jsonl` by
    --log_samples; a line has doc_id, input, target, filtered_resps, resps where it differs (the thinking is taken out
    of the first), and the task's metrics, but not the data set's other columns.
"""

from __future__ import annotations

import ast
import contextlib
import json
import math
import string
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

# Name -> (data set of VLMEvalKit, tasks of lmms-eval). The first eight are what the paper names (arXiv 2510.15050,
# sections 4.2 and 4.6), which does not say whether its MathVision is all of it or the testmini.
BENCHMARKS = {
    "MathVista": ("MathVista_MINI", ("mathvista_testmini_cot_reasoning",)),
    "MathVision": ("MathVision", ("mathvision_reason_test_reasoning",)),
    "MathVerse": ("MathVerse_MINI_Vision_Only", ("mathverse_vision_only_reasoning",)),
    "WeMath": ("WeMath", ("wemath_testmini_reasoning",)),
    "LogicVista": ("LogicVista", ("logicvista_reasoning",)),
    "HallusionBench": ("HallusionBench", ()),  # lmms-eval's has a sentence as answer, for a judge
    "RealWorldQA": ("RealWorldQA", ("realworldqa_reasoning", "realworldqa")),
    "MMStar": ("MMStar", ("mmstar_reasoning", "mmstar")),
    "MathVision testmini": ("MathVision_MINI", ("mathvision_reason_testmini_reasoning",)),
    "MathVerse all versions": ("MathVerse_MINI", ("mathverse_testmini_reasoning",)),
}
FAILED = "Failed to obtain answer"  # what VLMEvalKit writes for an answer that it did not get
NO_ANSWERS = "it holds no answers: name a result of evaluate.py, or the folder that VLMEvalKit or lmms-eval wrote"
ASKED = ("data_sha256", "prompt", "max_new_tokens", "processor_kwargs")  # of evaluate.py
EXCEL = 32767  # characters of a cell: what is longer is cut when it is written


@dataclass(frozen=True)
class Answer:
    """One answer to one question. `step` is WeMath's: (problem, which of its steps). `finish_reason` is "length" of an
    answer that was cut; only evaluate.py says so, and only it says how it was `asked`."""

    id: str
    question: str
    gold: str
    response: str
    step: tuple[str, str] | None = None
    finish_reason: str | None = None
    asked: dict | None = None


def read_outputs(place: str | Path) -> dict[str, list[Answer]]:
    """Benchmark -> answers, of all files of the tools below a folder, or of one file, which may be of evaluate.py.

    Raises:
        ValueError: there is none, or two for a benchmark, or a file cannot be used.
    """
    place = Path(place)
    if not place.exists():
        raise ValueError(f"there is no {place}")
    if place.is_file():
        with _naming(place):
            return {_benchmark(place) or _data_of(place): _read(place)}
    files: dict[str, Path] = {}
    for path in sorted({path.resolve() for path in place.rglob("*") if path.is_file()}):  # VLMEvalKit makes links
        name = _benchmark(path)
        if name in files:
            raise ValueError(f"{files[name]} and {path} are both of {name}: name the folder of one run")
        if name:
            files[name] = path
    if not files:
        raise ValueError(
            f"{place} holds no answers to a known benchmark: neither <model>_<data set>.tsv of VLMEvalKit, nor "
            "<date>_samples_<task>.jsonl of lmms-eval, which it writes with --log_samples"
        )
    answers = {}
    for name, path in files.items():
        with _naming(path):
            answers[name] = _read(path)
    return answers


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """What is wrong with a file, behind its name."""
    try:
        yield
    except (ValueError, KeyError, zipfile.BadZipFile, RecursionError) as error:  # KeyError: a zip that is no Excel file
        raise ValueError(f"{path}: {error}") from error


def _benchmark(path: Path) -> str | None:
    for name, (dataset, tasks) in BENCHMARKS.items():
        if path.suffix in (".tsv", ".json", ".xlsx", ".pkl") and path.stem.endswith(f"_{dataset}"):
            return name
        if path.suffix == ".jsonl" and any(path.stem.endswith(f"_samples_{task}") for task in tasks):
            return name
    return None


def _data_of(path: Path) -> str:
    """The name of the data that a result of evaluate.py is about."""
    content = _load(path) if path.suffix == ".json" else None
    if not isinstance(content, dict) or not {"data", "scorer", "samples"} <= content.keys():
        raise ValueError(NO_ANSWERS)
    return Path(str(content["data"])).stem


def _read(path: Path) -> list[Answer]:
    answers = [_convert(row, path.suffix) for row in READERS[path.suffix](path)]
    if not answers:
        raise ValueError("it is empty")
    seen = set()
    for answer in answers:
        if answer.id in seen:
            raise ValueError(f"it holds sample {answer.id} twice: two runs may have been written into one file")
        seen.add(answer.id)
    failed = sum(answer.response.startswith(FAILED) for answer in answers)
    if failed:
        raise ValueError(f"it holds {failed} failures in place of answers: run VLMEvalKit again with --reuse")
    return answers


def _convert(row: dict, suffix: str) -> Answer:
    if not isinstance(row, dict):
        raise ValueError(NO_ANSWERS)
    sample = f"sample {row.get('index', row.get('doc_id'))}"
    try:
        if suffix == ".jsonl":
            answer = _from_lmms_eval(row)
        else:
            answer = _from_evaluate(row) if "response" in row else _from_vlmevalkit(row)
    except KeyError as error:
        raise ValueError(f"{sample} lacks {error}") from error
    except ValueError as error:
        raise ValueError(f"{sample} {error}") from error
    for name in ("question", "gold", "response"):
        if not isinstance(getattr(answer, name), str):
            raise ValueError(f"{sample} has a {name} that is no text: {str(getattr(answer, name))[:40]}")
    return answer


def _from_vlmevalkit(row: dict) -> Answer:
    question, gold = row["question"], row["answer"]
    if row.get("question_type") == "multi_choice":  # MathVista, whose answer is an option's text
        gold = row["answer_option"]
    options = {letter: row[letter] for letter in string.ascii_uppercase if row.get(letter)}
    if row.get("choices", "").startswith("["):  # MathVista, MathVision
        options |= dict(zip(string.ascii_uppercase, _listed(row["choices"]), strict=False))
    question += "".join(f"\n{letter}. {text}" for letter, text in options.items())
    thinking, response = row.get("thinking"), row["prediction"]
    step = (row["ID"], row["key"]) if row.get("ID") and "steps_" in row.get("key", "") else None
    return Answer(row["index"], question, gold, f"<think>{thinking}</think>{response}" if thinking else response, step)


def _listed(choices: str) -> list[str]:
    try:
        return [*map(str, ast.literal_eval(choices))]
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"has choices that are no list: {choices[:40]}") from error


def _from_lmms_eval(row: dict) -> Answer:
    responses = row.get("resps", row["filtered_resps"])
    responses = responses if isinstance(responses, list) else [responses]
    if len(responses) != 1:
        raise ValueError(f"has {len(responses)} answers: run lmms-eval with --repeats 1")
    problem = row.get("wemath_strict")
    if problem and not isinstance(problem, dict):
        raise ValueError(f"has a wemath_strict that is no object: {str(problem)[:40]}")
    step = (str(problem["ID"]), problem["key"]) if problem else None
    return Answer(str(row["doc_id"]), row["input"], row["target"], responses[0], step)


def _from_evaluate(row: dict) -> Answer:
    reason = row.get("finish_reason")
    asked = row.get("asked")
    return Answer(row["index"], row["question"], row["gold"], row["response"], finish_reason=reason, asked=asked)


def _read_tsv(path: Path) -> list[dict]:
    return pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False).to_dict("records")


def _read_xlsx(path: Path) -> list[dict]:
    try:
        table = pd.read_excel(path, dtype=str, keep_default_na=False, engine="openpyxl")
    except ImportError as error:
        raise ValueError(
            "reading it takes openpyxl: pip install openpyxl; or run VLMEvalKit with PRED_FORMAT=tsv"
        ) from error
    rows = table.to_dict("records")
    cut = sum(len(row.get("prediction", "")) >= EXCEL for row in rows)
    if cut:
        raise ValueError(f"it holds {cut} answers that Excel's format has cut: run VLMEvalKit with PRED_FORMAT=tsv")
    return rows


def _read_json(path: Path) -> list[dict]:
    content = _load(path)
    rows = content.get("samples") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise ValueError(NO_ANSWERS)
    rows = [{key: _text(value) for key, value in row.items()} if isinstance(row, dict) else row for row in rows]
    if isinstance(content, dict):
        asked = {"file": str(path), "data": content.get("data")} | {name: content.get(name) for name in ASKED}
        asked["processor_kwargs"] = asked["processor_kwargs"] or None  # {} asks for nothing either
        rows = [row | {"asked": asked} if isinstance(row, dict) else row for row in rows]
    return rows


def _load(path: Path):
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"it is no valid JSON: {error}") from error


def _read_jsonl(path: Path) -> list[dict]:
    rows = []
    for number, line in enumerate(path.read_text("utf-8").split("\n"), 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            raise ValueError(f"line {number} is no valid JSON: {error}") from error
    return rows


def _refuse_pickle(path: Path) -> list[dict]:
    raise ValueError(
        "it is a pickle, which VLMEvalKit leaves when it is interrupted or cannot write a table, and which runs "
        "code when it is read: run VLMEvalKit again with PRED_FORMAT=tsv and --reuse"
    )


def _text(value) -> str:
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else str(value)


READERS = {".tsv": _read_tsv, ".xlsx": _read_xlsx, ".json": _read_json, ".jsonl": _read_jsonl, ".pkl": _refuse_pickle}
