r"""Ask a model the questions of a local file and mark its answers, in total and by category.

    python recipes/evaluate.py --model merged/ --data test.jsonl -o results.json
    python recipes/evaluate.py --model Qwen/Qwen2.5-VL-7B-Instruct --adapter runs/r1 --data test.jsonl -o results.json
    python recipes/evaluate.py --model Qwen/Qwen2.5-VL-7B-Instruct --adapter runs/r1 --keep k.safetensors -o k.json

With --data, the data is what data.py reads: questions with images, and the known answer as the last turn, boxed,
tagged, alone, or with its chain in front. Answers are greedy: the likeliest token each time, whatever the model's
generation_config.json says of sampling and repetition. Each is in `<output>.journal.jsonl` as soon as its batch is
done; the same command asks only for what is not there. Results of several models on the same data are compared by
score.py.

With --keep, nothing is marked. Measured is how far the model has gone from the VLM's own answers in a keep set, by kind
of question: KL in nats a token, and the share of tokens that it would choose too. With an adapter, the same is measured
without it.
"""

from __future__ import annotations

from drift_peft.cli.interrupt import begin

if __name__ == "__main__":  # before what takes its time to import
    begin("evaluate.py")

import hashlib
import json
import sys
from argparse import Namespace
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

from parts.command_line import Parser, in_one_sentence, run_script
from parts.journal import Journal, journal_path
from parts.layouts import last_answer
from parts.loading import PLACE, load_messages
from parts.loose import note_of_loose
from parts.reading import OUTCOMES, UNFINISHED, known_answer
from parts.scoring import mark, scorer
from parts.sources import CATEGORY, read_categories
from parts.stamp import stamp
from parts.teachers import PROMPT, Local, TeacherError, room_for, with_prompt
from parts.unseen import unseen
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from drift_peft.atomic import write_json
from drift_peft.cli.parser import json_object

SPLIT = "test"  # of a folder


@dataclass
class Question:
    index: int  # of the sample, among all of the data
    text: str
    gold: str
    category: str


def check(model: str, adapter: Path | None, data: str | None, output: Path) -> None:
    """Refuse before anything is loaded what would fail later. Without data, as with --keep, there is no journal."""
    if Path(model, "adapter_config.json").exists() and not Path(model, "config.json").exists():
        raise ValueError(
            f"{model} is an adapter, not a model: merge it (drift-peft merge --base BASE --adapter {model} -o merged), "
            f"or pass --model BASE --adapter {model}"
        )
    if adapter and not (adapter / "adapter_config.json").exists():
        raise ValueError(f"--adapter {adapter} is no adapter: it has no adapter_config.json")
    if data is not None and not Path(data).exists():
        raise ValueError(f"there is no data {data}")
    if output.is_dir() or not output.parent.is_dir():
        raise ValueError(f"output {output} cannot be written: name a file in a folder that exists")
    journal = journal_path(output)
    if data is None and output.exists():
        raise ValueError(f"output {output} exists: name another file")
    if data is None and journal.exists():
        raise ValueError(f"{journal} holds answers of an exam whose result is to be {output}: name another file")
    if output.exists() and not journal.exists():
        raise ValueError(f"output {output} exists, and has no journal to go on from: name another file")


def read_questions(dataset, categories: list[str]) -> tuple[list[Question], str]:
    """The questions of a data set, and a SHA-256 over all that is asked and known. Categories only sort."""
    questions, digest = [], hashlib.sha256()
    for index, (sample, category) in enumerate(zip(dataset, categories, strict=True)):
        gold = known_answer(last_answer(sample["messages"]))
        if not gold:
            raise ValueError(f"sample {index + 1} has no known answer: nothing is boxed, or said after its thinking")
        parts = [part for turn in sample["messages"][:-1] for part in turn["content"]]
        text = "".join("<image>" if part["type"] == "image" else part["text"] for part in parts)
        digest.update(json.dumps([text, gold]).encode())
        for image in sample["images"]:
            digest.update(f"{image.size}".encode() + image.tobytes())
        questions.append(Question(index, text, gold, category))
    return questions, digest.hexdigest()


def refuse_unseen(questions: list[Question], dataset, model: Local, prompt: str) -> None:
    """ValueError for the first sample that the model's processor does not take."""
    for index, (pixels, reason) in unseen(dataset, [question.index for question in questions], model, prompt).items():
        place = dataset[index][PLACE]
        place = f"{place} with {pixels} pixels" if pixels else place
        raise ValueError(f"{place} is refused by the model's processor: take it out ({reason})")


def unanswered(questions: list[Question], journal: Journal) -> list[Question]:
    return [question for question in questions if str(question.index) not in journal.answers]


def ask(questions: list[Question], dataset, model: Local, journal: Journal, prompt: str) -> None:
    """Have each answer in the journal."""
    open_questions = unanswered(questions, journal)
    batches = [open_questions[i : i + model.batch_size] for i in range(0, len(open_questions), model.batch_size)]
    with tqdm(total=len(questions), initial=len(questions) - len(open_questions), desc="asking", disable=None) as bar:
        for batch in batches:
            rows = [dataset[question.index] for question in batch]
            conversations = [(with_prompt(s["messages"][:-1], prompt), s["images"]) for s in rows]
            for question, answer in zip(batch, model(conversations), strict=True):
                journal.add(str(question.index), answer)
            bar.update(len(batch))


def mark_all(questions: list[Question], answers: dict[str, dict]) -> list[dict]:
    """What is known about each sample in the end."""
    marked = []
    for question in tqdm(questions, desc="marking", disable=None):
        answer = answers[str(question.index)]
        correct, read_by = mark(answer["response"], question.gold, question.text, answer.get("finish_reason"))
        fields = {"index": question.index, "category": question.category, "question": question.text}
        marked.append(
            {
                **fields,
                "gold": question.gold,
                **answer,
                "correct": correct,
                "unfinished": read_by == UNFINISHED,
                "read_by": read_by,
            }
        )
    return marked


def summarize(marked: list[dict]) -> dict:
    """Samples, accuracy in percent, unfinished answers, and how the answers were read; in total and by category."""
    groups: dict[str, list[dict]] = defaultdict(list)
    for sample in marked:
        groups[sample["category"]].append(sample)

    def count(group: list[dict]) -> dict:
        right = sum(sample["correct"] for sample in group)
        numbers = {"samples": len(group), "correct": right, "accuracy": round(100 * right / len(group), 2)}
        read_by = Counter(sample["read_by"] for sample in group)
        return numbers | {
            "unfinished": sum(sample["unfinished"] for sample in group),
            "read_by": {rule: read_by[rule] for rule in OUTCOMES},
        }

    return {"total": count(marked), "categories": {name: count(group) for name, group in sorted(groups.items())}}


def unfinished_note(result: dict) -> str:
    """What the unfinished answers are, and so what helps."""
    unfinished = [sample for sample in result["samples"] if sample["unfinished"]]
    cut = sum(sample.get("finish_reason") == "length" for sample in unfinished)
    notes = [f"{cut} were cut at {result['max_new_tokens']} tokens: see --max-new-tokens"] if cut else []
    notes += [f"{len(unfinished) - cut} ended without an answer that a rule reads"] if cut < len(unfinished) else []
    if 2 * len(unfinished) >= len(result["samples"]) and result["prompt"] == PROMPT:
        notes.append("the default --prompt asks for <think> and a box: give a model that was not made for it another")
    return f"{len(unfinished)} of {len(result['samples'])} answers are unfinished: {'; '.join(notes)}"


def results_table(result: dict) -> Table:
    shown = ("samples", "correct", "accuracy", "unfinished")
    table = Table("category", *shown, title=f"{result['model']}, {result['data']}")
    categories = result["categories"] if len(result["categories"]) > 1 else {}
    for name, numbers in {**categories, "total": result["total"]}.items():
        table.add_row(name, *(str(numbers[key]) for key in shown))
    return table


def reading_table(result: dict) -> Table:
    """By which rule each answer was found: a model that boxes nothing is not a worse one."""
    read_by = result["total"]["read_by"]
    table = Table(*read_by, title="answers by the rule that found them")
    table.add_row(*map(str, read_by.values()))
    return table


def has_processor(folder: Path) -> bool:
    """Whether a VLM's is there, with its tokenizer. The tokenizer alone, as of an expert on text, is none."""
    return (folder / "tokenizer_config.json").exists() and any(folder.glob("*processor_config.json"))


def refuse_other_model(model: str, adapter: Path) -> None:
    """As drift-peft merge does. On another model than its own an adapter answers too, and nothing in that shows it.

    Raises:
        ValueError: the adapter was not trained on this model; OSError.
    """
    from drift_peft.checkpoints import Checkpoint, adapter_updates, read_updates
    from drift_peft.merge import refuse_other_base

    try:
        checkpoint, _ = Checkpoint(model), read_updates(adapter)
    except ValueError as error:  # what cannot be merged may be asked nevertheless, such as a model in 4 bits
        print(f"note: whether {adapter} was trained on {model} is not known: {error}", file=sys.stderr)
        return
    refuse_other_base(checkpoint, adapter, str(adapter), adapter_updates(adapter, checkpoint, str(adapter)))


def open_model(args: Namespace) -> Local:
    """Its processor; the weights are for `load`."""
    if args.adapter and not args.force:
        refuse_other_model(args.model, args.adapter)
    how = {"batch_size": args.batch_size, "trust_remote_code": args.trust_remote_code}
    how["processor"] = args.adapter if args.adapter and has_processor(args.adapter) else None
    how["processor_kwargs"] = args.processor_kwargs
    return Local(args.model, temperature=0.0, max_tokens=args.max_new_tokens, **how)


def load(local: Local, adapter: Path | None) -> None:
    local.load()
    if adapter:
        from peft import PeftModel

        local.model = PeftModel.from_pretrained(local.model, adapter)


def evaluate_keeping(args: Namespace) -> dict:
    """The distance from the keep set's answers, of the model and of the one below its adapter; also written.

    Raises:
        ValueError: the keep set belongs to another model, or is damaged; OSError.
    """
    from drift_peft import KeepSet
    from drift_peft.keeping import measure, summarize

    check(args.model, args.adapter, None, args.output)
    keep_set = KeepSet.load(args.keep)
    local = open_model(args)
    keep_set.check(local.processor)
    load(local, args.adapter)
    with room_for(args.batch_size):
        measured = {"model": measure(local.model, keep_set, local.processor, args.batch_size)}
        if args.adapter:
            with local.model.disable_adapter():
                measured["without the adapter"] = measure(local.model, keep_set, local.processor, args.batch_size)
    summaries = {name: summarize(distances) for name, distances in measured.items()}
    result = {"model": args.model, "adapter": args.adapter and str(args.adapter), "keep": args.keep}
    result |= {"processor_kwargs": args.processor_kwargs or None}
    result |= {"keep_sha256": keep_set.sha256, "kept": summaries}
    write_json(args.output, {**result, "answers": {name: [asdict(d) for d in each] for name, each in measured.items()}})
    return result


def keeping_table(result: dict) -> Table:
    table = Table("", "kind", "answers", "KL, nats a token", "same tokens", title=f"distance from {result['keep']}")
    for name, summary in result["kept"].items():
        for kind, numbers in summary.items():
            low, high = numbers["kl_interval"]
            least, most = numbers["agreement_interval"]
            kl = f"{numbers['kl']:z.3f} [{low:z.3f}, {high:z.3f}]"
            agreement = f"{numbers['agreement']:.1%} [{least:.1%}, {most:.1%}]"
            table.add_row(name, kind, str(numbers["answers"]), kl, agreement)
        table.add_section()
    return table


def evaluate(args: Namespace) -> dict:
    """All of a run; its result is also written.

    Raises:
        ValueError: BadSample included; OSError, TeacherError.
    """
    check(args.model, args.adapter, args.data, args.output)
    how = {"split": args.split, "default_split": SPLIT, "images": args.images}
    dataset, _ = load_messages(args.data, **how, on_bad="fail", chains=False, places=True)
    questions, digest = read_questions(dataset, read_categories(args.data, args.split, args.category))
    if note := note_of_loose([last_answer(messages) for messages in dataset["messages"]], args.data):
        print(note, file=sys.stderr)
    asking = {"model": args.model, "model_files": stamp(args.model)}
    asking |= {"adapter": args.adapter and str(args.adapter), "adapter_files": stamp(args.adapter)}
    asking |= {"data_sha256": digest, "prompt": args.prompt, "max_new_tokens": args.max_new_tokens}
    asking["processor_kwargs"] = args.processor_kwargs or None
    told = {"data_sha256": f"{args.data} has other samples"}
    told |= {f"{name}_files": f"{getattr(args, name)} has others now" for name in ("model", "adapter")}
    with Journal(journal_path(args.output), asking, told=told) as journal:
        if rest := unanswered(questions, journal):
            model = open_model(args)
            refuse_unseen(rest, dataset, model, args.prompt)
            load(model, args.adapter)
            try:
                ask(questions, dataset, model, journal, args.prompt)
            except TeacherError as error:
                raise TeacherError(f"{error}; what is answered is in {journal.path}") from error
        marked = mark_all(questions, journal.answers)
    result = {**asking, "data": args.data, "scorer": scorer(), **summarize(marked), "samples": marked}
    write_json(args.output, result)
    return result


def main(arguments: list[str] | None = None) -> None:
    parser = Parser("evaluate.py", __doc__)
    parser.add_argument("--model", required=True, help="merged folder, any vision-language model's, or a hub id")
    parser.add_argument("--adapter", type=Path, help="adapter folder to put on the model without merging")
    text = "put it even on another model than it was trained on"
    parser.add_argument("--force", action="store_true", help=text)
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--data", help=".json, .jsonl or .parquet file, or a folder of these")
    asked.add_argument("--keep", help="keep set instead of data: file or hub id")
    parser.add_argument("-o", "--output", type=Path, required=True, help="file to write, such as results.json")
    parser.add_argument("--split", default=SPLIT, help="split of a folder")
    parser.add_argument("--images", type=Path, help="folder that relative image paths start from, if not the data's")
    parser.add_argument("--category", metavar="KEY", help=f"key of the samples to make a table by, if not {CATEGORY}")
    parser.add_argument("--batch-size", type=int, default=8, help="questions at a time")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    text = "settings of the processor in place of its own, such as '{\"max_pixels\": 262144}'"
    parser.add_argument("--processor-kwargs", type=json_object, metavar="JSON", help=text)
    parser.add_argument("--max-new-tokens", type=int, default=16384, help="longest answer in tokens")
    parser.add_argument("--prompt", default=PROMPT, help='what is added to each question; "" for nothing')
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON, without the answers")
    args = parser.parse_args(arguments)
    if args.keep:
        asking = "--split", "--images", "--category", "--prompt", "--max-new-tokens"
        parser.refuse_idle("with --keep, which has its questions and answers", *asking)
    if not args.adapter:
        parser.refuse_idle("without --adapter", "--force", lacks="it")
    parser.refuse_out_of_range(args, 1, "--batch-size", "--max-new-tokens")
    with in_one_sentence("evaluate.py", ValueError, OSError, TeacherError):
        try:
            result = evaluate_keeping(args) if args.keep else evaluate(args)
        except KeyboardInterrupt as end:
            if not journal_path(args.output).exists():
                raise
            raise KeyboardInterrupt(f"stopped; run the same again to go on from {journal_path(args.output)}") from end
    if args.json:
        print(json.dumps({key: value for key, value in result.items() if key != "samples"}))
    else:
        for table in (keeping_table,) if args.keep else (results_table, reading_table):
            Console(markup=False).print(table(result))
    if not args.keep and result["total"]["unfinished"]:
        print(f"note: {unfinished_note(result)}", file=sys.stderr)


if __name__ == "__main__":
    run_script("evaluate.py", main)
