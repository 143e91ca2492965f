r"""Make a set of chains of thought from any vision-language model: ask it, keep what is well-formed, correct and new.

    python recipes/distill.py russwang/ThinkLite-VL-hard-11k -o chains.parquet
    python recipes/distill.py questions.jsonl --server http://localhost:8000/v1 --model Qwen/Qwen3-VL-8B-Thinking \
        -o chains.parquet

The pipeline of the paper (arXiv 2510.15050): it starts from the 11,000 questions of ThinkLite-VL-Hard-11K (image,
problem, answer, says code that reads it), has ThinkLite-VL-7B write a chain of thought for each, removes those that are
not <think>…</think> \boxed{answer}, and those whose boxed answer is not the known one; about 4,000 remain. The paper
matches answers with ThinkLite's code; here it is parts/answers.py, and what is said twice is removed too. Its prompt is
a picture (figure 4), whose text could not be read: the default is what ThinkLite's own evaluation adds to a
question. How it samples is not said: the default takes the likeliest token each time. Without a server that is so
whatever the model's generation_config.json says of repetition; vLLM goes by that file unless it is started with
`--generation-config vllm`.

The source is anything that data.py reads, with the known answer as its last turn: boxed, tagged, alone, or with a chain
in front. Every answer is written to `<output>.journal.jsonl` as it comes; the same command asks only for what is not
there. The result holds the questions as they were, without the prompt, and the teacher's answers.
"""

from __future__ import annotations

from drift_peft.cli.interrupt import begin

if __name__ == "__main__":  # before what takes its time to import
    begin("distill.py")

import hashlib
import json
import sys
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import datasets
from parts.answers import is_correct, well_formed
from parts.bad_sample import printable
from parts.command_line import Parser, in_one_sentence, run_script, stop
from parts.journal import Journal, journal_path
from parts.layouts import last_answer
from parts.loading import FEATURES, load_messages
from parts.parquet import refuse_output, write_parquet
from parts.reading import known_answer
from parts.stamp import stamp
from parts.teachers import PROMPT, Local, Server, TeacherError, Unanswered, with_prompt
from parts.unseen import unseen
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from drift_peft.cli.keys import key_of

TEACHER = "russwang/ThinkLite-VL-7B"
HOPELESS = 20  # questions without an answer, one after the other, after which no more are asked
SHORT = 80  # signs of a text that a report shows


@dataclass
class Question:
    key: str  # hash of its normalised text and of its images' pixels
    index: int  # in the data set
    text: str
    gold: str


@dataclass
class Funnel:
    """How many are left after each step, and why the others are not: of each reason, what shows it in each of them."""

    left: dict[str, int] = field(default_factory=dict)
    lost: dict[str, dict[str, list[str]]] = field(default_factory=dict)

    def step(self, name: str, left: int, lost: dict[str, list[str]]) -> None:
        self.left[name], self.lost[name] = left, {reason: shown for reason, shown in lost.items() if shown}

    def numbers(self) -> dict[str, dict[str, int]]:
        """Step -> reason -> how many."""
        return {step: {why: len(shown) for why, shown in lost.items()} for step, lost in self.lost.items() if lost}

    def first(self) -> dict[str, dict[str, str]]:
        """Step -> reason -> the first that was lost for it."""
        return {step: {why: shown[0] for why, shown in lost.items()} for step, lost in self.lost.items() if lost}

    def tables(self, title: str) -> tuple[Table, Table]:
        """The steps, and the first that was lost for each reason."""
        steps, examples = Table("step", "left", "lost", title=title), Table("lost", "the first")
        for name, left in self.left.items():
            lost = sorted(self.lost[name].items(), key=lambda item: -len(item[1]))
            steps.add_row(name, str(left), "; ".join(f"{len(shown)} {reason}" for reason, shown in lost))
            for reason, shown in lost:
                examples.add_row(reason, shown[0])
        return steps, examples


def distill(source: str, output: Path, settings: dict, make_teacher: Callable, limit: int | None, **loading) -> Funnel:
    """Ask for every question of the source that has no answer yet, and write what passes the filters.

    Args:
        settings: what the answers depend on, with the `prompt` that is added to a question; the journal remembers it.
        make_teacher: returns one of parts/teachers.py.
        limit: only so many questions.
        loading: for `load_messages`.

    Raises:
        ValueError: the source cannot be read, or the journal is of other settings.
        TeacherError: the teacher cannot be asked any more. What it has answered is in the journal.
    """
    funnel = Funnel()
    told = {"model_files": f"{settings['model']} has others now"}
    with Journal(journal_path(output), settings, told=told) as journal:
        dataset, dropped = load_messages(source, chains=False, **loading)
        funnel.step("samples", len(dataset), dropped.all())
        found, repeated = find_questions(dataset)
        distinct = [*found.values()]
        questions = distinct[:limit]
        lost = {"like another": repeated, "beyond --limit": [*map(shown, distinct[len(questions) :])]}
        unanswered: dict[str, list[str]] = {}
        if any(question.key not in journal.answers for question in questions):
            teacher = make_teacher()
            if isinstance(teacher, Local):  # a server refuses them one by one
                refused = unseen(dataset, [question.index for question in questions], teacher, settings["prompt"])
                lost["refused by the model's processor"] = [
                    f"{shown(question)} ({refused[question.index][0]} pixels): {_short(refused[question.index][1])}"
                    for question in questions
                    if question.index in refused
                ]
                questions = [question for question in questions if question.index not in refused]
            if open_questions := [question for question in questions if question.key not in journal.answers]:
                if isinstance(teacher, Local):
                    teacher.load()
                unanswered = ask(open_questions, dataset, teacher, journal, settings["prompt"])
        funnel.step("asked", len(questions), lost)
        funnel.step("answered", len(questions) - sum(map(len, unanswered.values())), unanswered)
        kept = keep(questions, journal.answers, funnel)
    if kept:
        write_parquet(_with_answers(dataset, kept), output)
    return funnel


def find_questions(dataset: datasets.Dataset) -> tuple[dict[str, Question], list[str]]:
    """Key -> question; of those with the same text and images the first, and what shows the others."""
    questions: dict[str, Question] = {}
    repeated = []
    for index, sample in enumerate(tqdm(dataset, desc="reading questions", disable=None)):
        parts = [part for message in sample["messages"][:-1] for part in message["content"]]
        text = " ".join("<image>" if part["type"] == "image" else part["text"] for part in parts)
        digest = hashlib.sha256(" ".join(text.casefold().split()).encode())
        for image in sample["images"]:
            digest.update(f"{image.size}".encode() + image.tobytes())
        answer = last_answer(sample["messages"])
        question = Question(digest.hexdigest(), index, text, known_answer(answer))
        if questions.setdefault(question.key, question) is not question:
            repeated.append(shown(question))
    return questions, repeated


def shown(question: Question, answer: str | None = None) -> str:
    """A question, or its answer, as a report shows it."""
    asked = f"question {question.index + 1}, {_short(question.text)}"
    return asked if answer is None else f"{asked}: {_short(answer)}"


def _short(text: str) -> str:
    words = printable(" ".join(text.split()))
    return words if len(words) <= SHORT else f"{words[: SHORT // 2]}…{words[-SHORT // 2 :]}"


def ask(questions: list[Question], dataset, teacher, journal: Journal, prompt: str) -> dict[str, list[str]]:
    """Have each answer in the journal. Returns reason -> questions that have none: another run asks for them again."""
    unanswered, in_a_row = {}, 0

    def answer(chunk: list[Question]) -> None:
        samples = [dataset[question.index] for question in chunk]
        conversations = [(with_prompt(sample["messages"][:-1], prompt), sample["images"]) for sample in samples]
        for question, response in zip(chunk, teacher(conversations), strict=True):
            journal.add(question.key, response)

    chunks = [questions[i : i + teacher.batch_size] for i in range(0, len(questions), teacher.batch_size)]
    pool = ThreadPoolExecutor(teacher.concurrency)
    try:
        asked = {pool.submit(answer, chunk): chunk for chunk in chunks}
        for done in tqdm(as_completed(asked), total=len(asked), desc="asking", disable=None):
            try:
                done.result()
                in_a_row = 0
            except Unanswered as error:
                unanswered.setdefault(printable(str(error)), []).extend(map(shown, asked[done]))
                in_a_row += 1
                if in_a_row == HOPELESS:
                    raise TeacherError(f"{HOPELESS} questions in a row got no answer, the last one: {error}") from error
    finally:
        teacher.stop()
        pool.shutdown(cancel_futures=True)
    return unanswered


def keep(questions: list[Question], answers: dict[str, dict], funnel: Funnel) -> dict[int, str]:
    """Index in the data set -> answer, of what is well-formed, correct and not said before."""
    formed, malformed, wrong, repeated = [], defaultdict(list), [], []
    for question in questions:
        if question.key not in answers:
            continue
        answer = answers[question.key]
        text = _opened(answer["response"])
        if any("\ud800" <= sign <= "\udfff" for sign in text):  # which no file takes
            malformed["with half a sign"].append(shown(question, text))
        elif well_formed(text):
            formed.append((question, text))
        else:
            reason = "cut at --max-tokens" if answer.get("finish_reason") == "length" else "of another form"
            malformed[reason].append(shown(question, text))
    funnel.step("well-formed", len(formed), malformed)
    progress = tqdm(formed, desc="matching answers", disable=None)
    correct = []
    for question, text in progress:
        if is_correct(text, question.gold, question=question.text):
            correct.append((question, text))
        else:
            wrong.append(f"{shown(question, text)}, and known is {_short(question.gold)}")
    funnel.step("correct", len(correct), {"of another answer": wrong})
    unique: dict[str, tuple[int, str]] = {}
    for question, text in correct:
        kept = (question.index, text)
        if unique.setdefault(" ".join(text.casefold().split()), kept) is not kept:
            repeated.append(shown(question, text))
    funnel.step("unique", len(unique), {"of the same words as another": repeated})
    return dict(unique.values())


def _opened(text: str) -> str:
    """Chat templates of reasoning models open the thinking themselves, so that it is not in what the model writes."""
    if "</think>" in text and "<think>" not in text:
        return f"<think>\n{text.strip()}"
    return text.strip()


def _with_answers(dataset: datasets.Dataset, answers: dict[int, str]) -> datasets.Dataset:
    kept = dataset.select(answers)
    messages = [
        [*turns[:-1], {"role": "assistant", "content": [{"type": "text", "text": text}]}]
        for turns, text in zip(kept["messages"], answers.values(), strict=True)
    ]
    kept = kept.remove_columns("messages").add_column("messages", messages, feature=FEATURES["messages"])
    return kept.select_columns(list(FEATURES))


def main(arguments: list[str] | None = None) -> None:
    parser = Parser("distill.py", __doc__)
    parser.add_argument("source", help="questions with known answers: whatever data.py reads")
    parser.add_argument("-o", "--output", type=Path, required=True, help="file to write, such as chains.parquet")
    parser.add_argument("--split", default="train", help="split of a hub id or a folder")
    parser.add_argument("--images", type=Path, help="folder that relative image paths start from, if not the source's")
    parser.add_argument("--limit", type=int, help="ask only the first so many questions, not all")
    parser.add_argument("--model", default=TEACHER, help="folder, hub id, or its name at the server")
    parser.add_argument("--server", help="ask there, such as http://localhost:8000/v1, instead of loading the model")
    parser.add_argument("--api-key-env", metavar="NAME", help="environment variable that holds the server's key")
    parser.add_argument("--concurrency", type=int, default=16, help="questions at the server at the same time")
    parser.add_argument("--timeout", type=float, default=600, help="seconds that the server may be silent")
    parser.add_argument("--retries", type=int, default=6, help="further tries where the server fails")
    parser.add_argument("--batch-size", type=int, default=8, help="questions at a time without a server")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token each time")
    parser.add_argument("--max-tokens", type=int, default=4096, help="longest answer in tokens")
    parser.add_argument("--prompt", default=PROMPT, help='what is added to each question; "" for nothing')
    parser.add_argument("--overwrite", action="store_true", help="replace an output that has no journal")
    parser.add_argument("--json", action="store_true", help="print the funnel as JSON")
    args = parser.parse_args(arguments)
    if args.server:
        parser.refuse_idle("with --server, which loads the model itself", "--batch-size", "--trust-remote-code")
    else:
        parser.refuse_idle("without --server", "--api-key-env", "--concurrency", "--timeout", "--retries", lacks="it")
    parser.refuse_out_of_range(args, 1, "--limit", "--concurrency", "--batch-size", "--max-tokens")
    parser.refuse_out_of_range(args, 0, "--retries", "--temperature")
    parser.refuse_out_of_range(args, 0, "--timeout", above=True)
    journal = journal_path(args.output)
    answering = {"temperature": args.temperature, "max_tokens": args.max_tokens}
    settings = {"model": args.model, "prompt": args.prompt, **answering}
    with in_one_sentence("distill.py", ValueError, OSError, TeacherError):
        refuse_output(args.output, args.overwrite or journal.exists())
        if args.server:
            how = {"key": key_of(args.api_key_env), "timeout": args.timeout, "retries": args.retries}
            teacher = partial(Server, args.server, args.model, concurrency=args.concurrency, **how, **answering)
        else:
            how = {"batch_size": args.batch_size, "trust_remote_code": args.trust_remote_code}
            teacher = partial(Local, args.model, **how, **answering)
            settings["model_files"] = stamp(args.model)
        loading = {"split": args.split, "images": args.images}
        try:
            funnel = distill(args.source, args.output, settings, teacher, args.limit, **loading)
        except (TeacherError, KeyboardInterrupt) as end:
            if not journal.exists():
                raise
            message = f"{str(end) or 'stopped'}; the answers so far are in {journal}: run the same again to go on"
            raise type(end)(message) from end
    if args.json:
        report = {"left": funnel.left, "lost": funnel.numbers(), "first": funnel.first()}
        print(json.dumps({"source": args.source, "output": str(args.output), **report}))
    else:
        steps, examples = funnel.tables(f"{args.source} -> {args.output}")
        Console(markup=False).print(*([steps, examples] if examples.rows else [steps]))
    unanswered = sum(funnel.numbers().get("answered", {}).values())
    if unanswered:
        print(f"{unanswered} questions have no answer: run the same again to ask them", file=sys.stderr)
    if not funnel.left["unique"]:
        stop("distill.py", f"no answer is left, so {args.output} was not written", 1)


if __name__ == "__main__":
    run_script("distill.py", main)
