"""The samples of a run: loaded and told, then as the trainer takes them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, IterableDataset, List

from drift_peft.keeping import image_mode

from .arguments import RunArguments, TrainArguments
from .lengths import within_length
from .loading import PLACE, load_messages, nothing_left, refuse_remnant, tell
from .template import check_template
from .trained import special_tokens

SHUFFLED = 256  # samples of a stream, of which the next one is drawn; their images are in memory


def load_data(run: RunArguments, processor: Any) -> tuple[Dataset | IterableDataset, dict]:
    """The samples that can be trained on, and what run.json says of them. What is dropped is counted and printed.

    Raises:
        ValueError: they cannot be read, none is left, or the chat template does not show them to the model.
    """
    options = {"images": run.images, "streaming": run.streaming, "on_bad": run.on_bad, "places": True}
    dataset, dropped = load_messages(run.data, split=run.split, special=special_tokens(processor), **options)
    refuse_remnant(run.data, dataset, dropped)
    dataset = dataset.cast_column("images", List(Image(mode=image_mode(processor))))
    limits = {"source": run.data, "on_long": run.on_long, "dropped": dropped}
    dataset = within_length(dataset, processor, run.max_tokens, **limits)
    if run.streaming and next(iter(dataset), None) is None:  # else the trainer would find no first sample
        raise nothing_left(run.data, dropped)
    check_template(dataset, processor)
    dataset = dataset.remove_columns(PLACE)
    data = {**dropped.report(), "dropped": dropped, **describe(dataset)}  # a stream's grows
    print(f"{data['samples'] or 'streamed'} samples; dropped: {sum(dropped.values()) or 'none'}")
    tell(dropped)
    return dataset, data


def describe(dataset: Dataset | IterableDataset) -> dict:
    """Number of samples and of images, and SHA-256 over both; of a stream none is known."""
    if not isinstance(dataset, Dataset):
        return {"samples": None, "images": None, "sha256": None}
    digest, images = hashlib.sha256(), 0
    for row in dataset.cast_column("images", List(Image(decode=False))):
        digest.update(json.dumps(row["messages"], sort_keys=True).encode())
        for image in row["images"]:
            digest.update(image["bytes"] or Path(image["path"]).read_bytes())
        images += len(row["images"])
    return {"samples": len(dataset), "images": images, "sha256": digest.hexdigest()}


def prompts_and_completions(dataset: Dataset | IterableDataset, train: TrainArguments) -> Dataset | IterableDataset:
    """In TRL's form, whose loss is on the last turn alone, not on the question and its images' placeholders. A stream
    comes shuffled, and again and again.

    Raises:
        ValueError: there are fewer samples than whole batches take.
    """
    batch = train.per_device_train_batch_size
    first = dataset.take(batch) if train.dataloader_drop_last else None
    if first is not None and (there := sum(1 for _ in first)) < batch:
        told = f"{there} samples are no batch of per_device_train_batch_size={batch}"
        raise ValueError(f"{told}, and dataloader_drop_last takes whole ones alone: lower it, or leave that out")
    if isinstance(dataset, IterableDataset):
        if train.train_sampling_strategy != "sequential":  # Trainer's own samplers take no streams
            dataset = dataset.shuffle(train.seed if train.data_seed is None else train.data_seed, buffer_size=SHUFFLED)
        dataset = dataset.repeat(None)  # Trainer goes on in the first pass alone, since it knows no pass's length
    turns = dataset.features["messages"]
    columns = Features(prompt=turns, completion=turns, images=dataset.features["images"])  # else streams lose the types
    return dataset.map(_split_last, input_columns="messages", remove_columns="messages", features=columns)


def _split_last(turns: list[dict]) -> dict:
    return {"prompt": turns[:-1], "completion": turns[-1:]}
