"""Samples to train on and samples to examine with, which have no image in common.

Samples with an image in common, be it through others, stay together: a data set often asks several questions about an
image. The image is its content, wherever it lies. Samples without images are each by themselves.
"""

from __future__ import annotations

import hashlib
import json
from argparse import Namespace
from functools import cache
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq

from .parquet import write_parquet


def read_data(args: Namespace, settings: dict) -> tuple[datasets.Dataset, datasets.Dataset | None, str]:
    """The samples of the recipe, those of --test, and a SHA-256 over what both say.

    Raises:
        ValueError: they cannot be read.
    """
    from .loading import load_messages

    how = {"images": settings.get("images"), "on_bad": settings.get("on_bad", "drop")}
    dataset, _ = load_messages(settings["data"], split=settings.get("split", "train"), **how)
    tested = load_messages(args.test, split="test", on_bad="fail")[0] if args.test else None
    digest = hashlib.sha256()
    for each in (dataset, tested):
        digest.update(json.dumps(each and each["messages"][:]).encode())
    return dataset, tested, digest.hexdigest()


def has_images(dataset: datasets.Dataset) -> bool:
    return any(map(len, dataset.with_format("arrow")["images"]))


def marks_of(dataset: datasets.Dataset) -> list[set[str]]:
    """What stands for each sample's images: a hash of the content of each."""
    hashed = cache(lambda path: _hash(Path(path).read_bytes()))
    plain = dataset.select_columns("images").cast_column("images", [datasets.Image(decode=False)])
    return [
        {hashed(image["path"]) if image["bytes"] is None else _hash(image["bytes"]) for image in row["images"]}
        for row in plain
    ]


def groups_of(marks: list[set[str]]) -> list[list[int]]:
    """The samples that have an image in common, be it through others, in the order of the first of each group."""
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


def split(dataset: datasets.Dataset, groups: list[list[int]], args: Namespace) -> dict[str, str]:
    """The samples to train on and those that are held out, as files.

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
    held = max(sum(map(len, rows.values())), sum(sizes.values()))
    if 2 * held > len(dataset):
        told = f"{held} of the {len(dataset)} samples of the data would be held out"
        if len(groups) < len(dataset):
            told += f", where samples with an image in common stay together, up to {max(map(len, groups))} of them"
        raise ValueError(f"{told}: hold out fewer with --held-out, or name other samples with --test")
    rows["train"] = sorted({*range(len(dataset))} - {*rows["test"]})
    if args.search:
        rows["fitting"] = sorted({*rows["train"]} - {*rows["validation"]})
    files = {name: args.output / f"{name}.parquet" for name, numbers in rows.items() if numbers}
    for name, file in files.items():
        if not file.exists():
            write_parquet(dataset.select(sorted(rows[name])), file)
    return {"test": args.test, **{name: str(file) for name, file in files.items()}}


def rows_of(file: str) -> int:
    return pq.read_metadata(file).num_rows


def in_common(marks: list[set[str]], others: list[set[str]]) -> int:
    """How many of the others have an image of these."""
    images = set().union(*marks)
    return sum(not images.isdisjoint(each) for each in others)


def note_of_kept(keep: str, measured: Path) -> str | None:
    """What is to be said where a keep set to keep by has images of the one to measure with."""
    from drift_peft import KeepSet

    def marks(source: str | Path) -> set[str]:
        keep_set = KeepSet.load(source)
        return {_hash(keep_set.image_file(i)) for i in {keep_set.image_of(sample) for sample in range(len(keep_set))}}

    images = marks(measured)
    shared = len(images & marks(keep))
    told = f"note: {shared} of the {len(images)} images that the distance from the VLM is measured on are also in the"
    return f"{told} keep set {keep}, so that what is kept looks nearer than it is" if shared else None


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
