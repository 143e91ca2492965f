"""Samples to train on and samples to examine with, which have no image in common.

Samples with an image in common, be it through others, stay together: a data set often asks several questions about an
image. The image is its content, wherever it lies. Samples without images stay together where they ask the same.
"""

from __future__ import annotations

import hashlib
import json
import sys
from argparse import Namespace
from functools import cache
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq

from .bad_sample import BadSample
from .layouts import last_answer
from .loading import load_messages, refuse_remnant, sha256_of, tell
from .loose import note_of_loose
from .parquet import write_parquet
from .sources import ALL, CATEGORY, read_categories
from .stamp import sha256_of_file

HELD_OUT = {"test": "train", "validation": "fitting"}  # exam -> what is trained on before it
ELSEWHERE = ("image missing", "image outside its folder")


def read_data(args: Namespace, settings: dict) -> tuple[datasets.Dataset, datasets.Dataset | None, str]:
    """The samples of the recipe, those of --test, and a SHA-256 over what both say, and over the categories that there
    are, which the table is by. What is dropped is told.

    Raises:
        ValueError: they cannot be read, or more are dropped than are left.
    """
    how = {"images": settings.get("images"), "on_bad": settings.get("on_bad", "drop")}
    dataset, dropped = load_messages(settings["data"], split=settings.get("split", "train"), **how)
    refuse_remnant(settings["data"], dataset, dropped)
    tell(dropped, sys.stderr)
    tested = read_tested(args.test, settings.get("images")) if args.test else None
    examined, source = (dataset, settings["data"]) if tested is None else (tested, args.test)
    if note := note_of_loose([last_answer(messages) for messages in examined["messages"]], source):
        print(note, file=sys.stderr)
    digest = hashlib.sha256()
    for each in (dataset, tested):
        digest.update(json.dumps(each and each["messages"][:]).encode())
    categories = [] if tested is None else tested[CATEGORY][:]
    if {*categories} - {ALL}:
        digest.update(json.dumps(categories).encode())
    return dataset, tested, digest.hexdigest()


def read_tested(source: str, images: str | None) -> datasets.Dataset:
    """Samples to examine with, as evaluate.py reads them, and their categories. Where their images are not beside them,
    they are in the recipe's folder."""
    how = {"split": "test", "default_split": "test", "on_bad": "fail", "chains": False}
    try:
        dataset, _ = load_messages(source, **how)
    except BadSample as error:
        if images is None or error.reason not in ELSEWHERE:
            raise
        dataset, _ = load_messages(source, images=images, **how)
    return dataset.add_column(CATEGORY, read_categories(source, "test", None))


def has_images(dataset: datasets.Dataset) -> bool:
    return any(map(len, dataset.with_format("arrow")["images"]))


def pictured(dataset: datasets.Dataset, rows: dict[str, list[int]], tested: datasets.Dataset | None) -> dict[str, bool]:
    """Train, test and so on, as far as there are samples -> whether any of these has an image."""
    parts = {name: dataset.select(numbers) for name, numbers in rows.items() if numbers}
    parts |= {} if tested is None else {"test": tested}
    return {name: has_images(part) for name, part in parts.items()}


def check_images(shown: dict[str, bool], others: str | None, keep: str | None, budget: float | None) -> None:
    """Refuse, or say, what a comparison has no images for.

    Args:
        shown: from `pictured`.
        others: the recipe's keep_images, which serve where the samples have none.
        keep: a keep set that is to be made of the samples that are trained on, if there is one.
        budget: of the distance from the VLM's own answers, if there is one.

    Raises:
        ValueError: there are no images to keep on, or to measure the distance on that the budget is of.
    """
    if others is not None:
        return
    if keep is not None and not shown.get("fitting", shown["train"]):
        told = f"there is no keep set {keep}, and the samples to train on have no images to make it of"
        raise ValueError(f"{told}: name a folder of pictures in the recipe's keep_images")
    blind = [exam for exam in HELD_OUT if exam in shown and not shown[exam]]
    if blind and budget is not None:
        told = "--budget is of the distance from the VLM's own answers, and there are no images to measure it on"
        raise ValueError(f"{told}: name some in the recipe's keep_images, or leave --budget out")
    if blind:
        told = f"note: the distance from the VLM's own answers is not measured: no sample of {blind[0]} has an image"
        print(f"{told}; to measure it, name pictures in the recipe's keep_images", file=sys.stderr)


def marks_of(dataset: datasets.Dataset) -> list[set[str]]:
    """What stands for each sample: a hash of the content of each of its images, or else of all before its answer."""
    hashed = cache(sha256_of_file)
    plain = dataset.select_columns(["messages", "images"]).cast_column("images", [datasets.Image(decode=False)])
    return [
        {hashed(image["path"]) if image["bytes"] is None else sha256_of(image["bytes"]) for image in row["images"]}
        or {sha256_of(_asked(row["messages"]).encode())}
        for row in plain
    ]


def _asked(messages: list[dict]) -> str:
    """What is asked in text, whatever its case and its white space."""
    texts = (part["text"] for turn in messages[:-1] for part in turn["content"])
    return " ".join(" ".join(texts).casefold().split())


def mark_all(
    dataset: datasets.Dataset, tested: datasets.Dataset | None, test: str | None
) -> tuple[list[set[str]], str]:
    """The marks of the samples, and a SHA-256 over these and those of --test: other images give another one, whatever
    their paths. What both have in common is told."""
    marks, others = marks_of(dataset), [] if tested is None else marks_of(tested)
    if shared := in_common(marks, others):
        message = f"{shared} of the {len(others)} samples of {test} have an image that is trained on"
        print(f"note: {message}, or without one the same question; what is learnt of it counts too", file=sys.stderr)
    return marks, sha256_of(json.dumps([[sorted(each) for each in rows] for rows in (marks, others)]).encode())


def groups_of(marks: list[set[str]]) -> list[list[int]]:
    """The samples that have a mark in common, be it through others, in the order of the first of each group."""
    parents = list(range(len(marks)))
    first: dict[str, int] = {}

    def root(row: int) -> int:
        while parents[row] != row:
            row = parents[row]
        return row

    for row, images in enumerate(marks):
        for image in images:
            one, other = sorted((root(row), root(first.setdefault(image, row))))
            parents[other] = one
    groups: dict[int, list[int]] = {}
    for row in range(len(marks)):
        groups.setdefault(root(row), []).append(row)
    return list(groups.values())


def hold_out(groups: list[list[int]], args: Namespace) -> dict[str, list[int]]:
    """The rows to train on and those that are held out, of samples that stay together in groups.

    At least --held-out are held out, more where the last group has more. A group that is larger than that comes last.

    Raises:
        ValueError: there are too few.
    """
    drawn = [groups[number] for number in np.random.default_rng(0).permutation(len(groups))]
    order = iter(sorted(drawn, key=lambda group: len(group) > args.held_out))
    sizes = {"test": 0 if args.test else args.held_out, "validation": args.held_out if args.search else 0}
    rows: dict[str, list[int]] = {name: [] for name in sizes}
    for name, size in sizes.items():
        while len(rows[name]) < size and (group := next(order, None)):
            rows[name] += group
    held, samples = max(sum(map(len, rows.values())), sum(sizes.values())), sum(map(len, groups))
    if 2 * held > samples:
        message = f"{held} of the {samples} samples of the data would be held out"
        if len(groups) < samples:
            message += (
                ", where samples with an image in common, or the same question without one, stay together, up to "
            )
            message += f"{max(map(len, groups))} of them"
        raise ValueError(f"{message}: hold out fewer with --held-out, or name other samples with --test")
    rows["train"] = sorted({*range(samples)} - {*rows["test"]})
    if args.search:
        rows["fitting"] = sorted({*rows["train"]} - {*rows["validation"]})
    return rows


def write_split(
    dataset: datasets.Dataset, rows: dict[str, list[int]], args: Namespace, tested: datasets.Dataset | None = None
) -> dict[str, str]:
    """The samples to train on and those that are held out, or tested, as files. Exams and keep sets take the tested
    ones from such a file, too: then both have the same samples and images, wherever these lay."""
    files = {name: args.output / f"{name}.parquet" for name, numbers in rows.items() if numbers}
    for name, file in files.items():
        if not file.exists():
            write_parquet(dataset.select(sorted(rows[name])), file)
    if tested is not None:
        files["test"] = args.output / "test.parquet"
        if not files["test"].exists():
            write_parquet(tested, files["test"], tested.features)
    return {name: str(file) for name, file in files.items()}


def rows_of(file: str) -> int:
    return pq.read_metadata(file).num_rows


def in_common(marks: list[set[str]], others: list[set[str]]) -> int:
    """How many of the others have a mark of these."""
    known = set().union(*marks)
    return sum(not known.isdisjoint(each) for each in others)


def note_of_kept(keep: str, measured: Path) -> str | None:
    """What is to be said where a keep set to keep by has images of the one to measure with."""
    from drift_peft import KeepSet

    def marks(source: str | Path) -> set[str]:
        keep_set = KeepSet.load(source)
        shown = {keep_set.image_of(sample) for sample in range(len(keep_set))}
        return {sha256_of(keep_set.image_file(i)) for i in shown}

    images = marks(measured)
    shared = len(images & marks(keep))
    note = f"note: {shared} of the {len(images)} images of {measured}, by which the distance from the VLM is measured,"
    return f"{note} are also in {keep}, so that what is kept looks nearer than it is" if shared else None
