"""The hard form of keeping: the answers of a keep set among the training samples, as a share of them."""

from __future__ import annotations

import random

import datasets

from drift_peft import KeepSet
from drift_peft.keeping import training_samples

from .layouts import read_sample
from .lengths import within_length
from .loading import Dropped


def with_replay(
    dataset: datasets.Dataset, keep_set: KeepSet, share: float, processor, max_tokens: int, seed: int
) -> tuple[datasets.Dataset, dict]:
    """The data, and behind them so many of the VLM's answers that `share` of all samples are answers.

    Where the keep set has fewer, its answers come again and again, each time in another order; the trainer mixes all.

    Returns:
        the samples; and for run.json how many answers are among them (`samples`), how many of the keep set's are used
        (`answers`), and how many are not, by reason (`left_out`).

    Raises:
        ValueError: no answer of the keep set can be trained on.
    """
    answers, left_out = training_samples(keep_set)
    columns = {"messages": [], "images": []}
    for picture, messages in answers:
        sample = read_sample({"messages": messages, "images": [keep_set.image_file(picture)]})
        columns["messages"].append(sample.messages)
        columns["images"].append([{"bytes": image, "path": None} for image in sample.images])
    dropped = Dropped()
    dropped.update(left_out)
    samples = datasets.Dataset.from_dict(columns, dataset.features)  # else images of another mode do not go with them
    kept = within_length(samples, processor, max_tokens, source=keep_set.source, dropped=dropped)
    wanted = max(1, round(share / (1 - share) * len(dataset)))
    order, draw = [], random.Random(seed)
    while len(order) < wanted:
        order += draw.sample(range(len(kept)), len(kept))
    mixed = datasets.concatenate_datasets([dataset, kept.select(order[:wanted])])
    return mixed, {"samples": wanted, "answers": len(kept), "left_out": dict(dropped)}
