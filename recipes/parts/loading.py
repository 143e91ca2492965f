"""The usable samples of a source, as TRL takes them; what cannot be used is dropped and counted.

Result: the columns `messages` and `images`, which TRL's SFTTrainer and DataCollatorForVisionLanguageModeling take as
they are: a list of {"role", "content": [{"type": "image" or "text", "text"}]}, and as many RGB images as there are
image parts, decoded when they are read. (In Arrow an image part has a `text` too, which is None; the collator puts the
image beside it.) Tags such as <think> stay plain text.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Literal, TextIO
from uuid import uuid4

import datasets
import pyarrow as pa

from .bad_sample import BadSample
from .images import read_image
from .layouts import last_answer, read_sample
from .reading import extract_boxed
from .sources import find_files, read_file, samples
from .trained import as_trained

TEXT = datasets.Value("string")
FEATURES = datasets.Features(
    {
        "messages": [{"role": TEXT, "content": [{"type": TEXT, "text": TEXT}]}],
        "images": [datasets.Image(mode="RGB")],
    }
)
LONGER = "longer than"  # so many tokens: how this reason begins
REPEATED = "the same as an earlier one"
PLACE = "place"  # a column with the name of each sample, where it is asked for


class Dropped(Counter):
    """Reason -> dropped samples. A sample counts once, however often it is read.

    Attributes:
        sentences: what is wrong with each -> its reason.
        layouts: the layouts of the others.
        unread: keys of the others that hold text and are not read -> how the first such text begins.
        noted: what was done to a sample or its images, or is to be known of it -> the others that this is said of.
        lengths: tokens of the samples that were counted, those of the longer ones included.
    """

    def __init__(self):
        super().__init__()
        self.sentences: dict[str, str] = {}
        self.layouts: set[str] = set()
        self.unread: dict[str, str] = {}
        self.noted: dict[str, set[tuple[str, int]]] = {}
        self.lengths: list[int] = []

    def add(self, error: BadSample) -> None:
        if str(error) not in self.sentences:
            self.sentences[str(error)] = error.reason
            self[error.reason] += 1

    def first(self) -> dict[str, str]:
        """Reason -> what is wrong with the first of its samples."""
        return {reason: sentence for sentence, reason in reversed(self.sentences.items())}

    def all(self) -> dict[str, list[str]]:
        """Reason -> what is wrong with each of its samples."""
        return {why: [sentence for sentence, reason in self.sentences.items() if reason == why] for why in self}

    def rows(self) -> list[tuple[str, int, str]]:
        """What is dropped and what is noted, how many samples that is, and the first of them."""
        lines = [(f"dropped, {reason}", self[reason], sentence) for reason, sentence in self.first().items()]
        for what, places in self.noted.items():
            lines.append((f"kept, {what}", len(places), place_of(*min(places))))
        return lines

    def quantiles(self) -> dict[str, int]:
        """How many tokens the longest sample has, and how many 95 % have at most, where they were counted."""
        lengths = sorted(self.lengths)
        return {"longest": lengths[-1], "95 %": lengths[math.ceil(0.95 * len(lengths)) - 1]} if lengths else {}

    def report(self) -> dict:
        """All of it, in types that JSON has."""
        noted = {what: len(places) for what, places in self.noted.items()}
        report = {"dropped": dict(self), "first": self.first(), "layouts": sorted(self.layouts)}
        return {**report, "unread": self.unread, "noted": noted, "tokens": self.quantiles()}


def place_of(file: str, number: int) -> str:
    return f"sample {number} of {file.removeprefix('hf://datasets/')}"


def load_messages(
    source: str | Path,
    *,
    split: str = "train",
    default_split: str = "train",
    images: str | Path | None = None,
    streaming: bool = False,
    on_bad: Literal["drop", "fail"] = "drop",
    boxed: bool = False,
    chains: bool = True,
    special: Collection[str] = (),
    places: bool = False,
) -> tuple[datasets.Dataset | datasets.IterableDataset, Dropped]:
    r"""The usable samples of a source, and what was dropped.

    Args:
        source: hub id or id@revision of a data set, a .json, .jsonl or .parquet file, or a folder of these.
        split: of a hub id or a folder.
        default_split: see `find_files`.
        images: folder that relative image paths start from; by default that of the source.
        streaming: read samples when they are asked for, and download nothing first. What is dropped is then counted
            meanwhile, in the process that iterates.
        on_bad: "fail" raises at the first sample that cannot be used.
        boxed: drop samples whose last answer has no \boxed{…}.
        chains: put the chain of thought that stands beside an answer before it, drop an answer that is nothing but one,
            and take end tokens out; else the last turn is the answer as it is written.
        special: the special tokens of the base, if it is known; see `as_trained`.
        places: add the column PLACE, which says of each sample where it stands in the source.

    Raises:
        BadSample: with on_bad="fail", or if none is left.
        ValueError: the source cannot be read, or lacks the split, or has no splits and one is named.
    """
    files, root = find_files(str(source), split, images, streaming, default_split)
    features = datasets.Features({**FEATURES, PLACE: TEXT}) if places else FEATURES
    dropped = Dropped()
    seen: dict[str, tuple[str, int]] = {}  # where each sample comes first: a stream may be read again

    def keep(table: pa.Table, indices: list[int], file: str) -> pa.Table:
        columns = {name: [] for name in features}
        for number, sample in samples(table, indices, file):
            place = place_of(file, number)
            try:
                read = read_sample(sample, chains, root)
                if boxed and not extract_boxed(last_answer(read.messages)):
                    raise BadSample("answer without a box", r"has no \boxed{…} in its answer")
                messages, noted = as_trained(read.messages, special) if chains else (read.messages, [])
                images = [read_image(value, root) for value in read.images]
            except (BadSample, RecursionError) as error:
                reason = getattr(error, "reason", "nested too deeply")
                named = BadSample(reason, f"{place} {error}")
                if on_bad == "fail":
                    raise named from error
                dropped.add(named)
            else:
                columns["messages"].append(messages)
                columns["images"].append([image for image, _ in images])
                if places:
                    columns[PLACE].append(place)
                content = json.dumps([messages, [image["path"] or sha256_of(image["bytes"]) for image, _ in images]])
                if seen.setdefault(sha256_of(content.encode()), (file, number)) != (file, number):
                    noted.append(REPEATED)
                dropped.layouts.add(read.layout)
                dropped.unread = read.unread | dropped.unread
                for what in [*read.noted, *noted, *(what for _, done in images for what in done)]:
                    dropped.noted.setdefault(what, set()).add((file, number))
        return pa.Table.from_pydict(features.encode_batch(columns), schema=features.arrow_schema)

    parts = []
    for file in files:
        rows = read_file(file, streaming)
        options = dict(with_indices=True, batched=True, batch_size=32, fn_kwargs={"file": file})
        if streaming:  # features=features would leave the images undecoded for a filter or map of the stream
            parts.append(rows.map(keep, **options).with_format(None).cast(features))
        else:  # not from the cache of datasets, which cannot know that an image has changed
            # Nor under a hash of `keep`, which holds all that was read before.
            options |= {"load_from_cache_file": False, "new_fingerprint": uuid4().hex}
            kept = rows.map(keep, features=features, **options)
            parts.append(kept.with_format(None))
    dataset = datasets.concatenate_datasets(parts)
    if not streaming and not len(dataset):
        raise nothing_left(source, dropped)
    return dataset, dropped


def sha256_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def nothing_left(source: str | Path, dropped: Dropped) -> BadSample:
    first = dropped.first()
    reasons = [f"{count} {why}" + (f" ({first[why]})" if why in first else "") for why, count in dropped.items()]
    if dropped.lengths:  # each of which is too long
        reasons.append(f"the shortest has {min(dropped.lengths)} tokens")
    return BadSample("none left", f"no sample of {source} is left: {'; '.join(reasons) or 'it has none'}")


def tell(dropped: Dropped, file: TextIO | None = None) -> None:
    """Print what was dropped and noted, with the first sample of each; where some are too long, how long they are."""
    for what, count, first in dropped.rows():
        print(f"{what}: {count} (the first: {first})", file=file)
    if dropped.lengths and any(reason.startswith(LONGER) for reason in dropped):
        longest, nearly_all = dropped.quantiles().values()
        print(f"the longest sample has {longest} tokens, and 95 % have at most {nearly_all}", file=file)
    for key, text in dropped.unread.items():
        print(f"not read: {key}, such as {text}", file=file)


def refuse_remnant(source: str | Path, dataset: datasets.Dataset | datasets.IterableDataset, dropped: Dropped) -> None:
    """If more samples are bad than good, the input is probably wrong, such as the image folder.

    Raises:
        ValueError: they are more; of a stream, nobody knows yet.
    """
    bad = sum(dropped.values())
    if isinstance(dataset, datasets.Dataset) and bad > len(dataset):
        reasons = "; ".join(f"{dropped[reason]} {reason} ({first})" for reason, first in dropped.first().items())
        way_out = "mend them, or let recipes/data.py write what is left to a file, and train on that"
        raise ValueError(f"{bad} of the {bad + len(dataset)} samples of {source} cannot be used: {reasons}: {way_out}")
