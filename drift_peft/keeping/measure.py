"""How far a model has gone from each of the VLM's own answers: what a training has cost, without a benchmark."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from .answers import Sample
from .distance import answer_rows, bucketed_kl
from .feed import read_part
from .generation import evaluated

RESAMPLES = 10_000


@dataclass(frozen=True)
class Distance:
    """Of one answer of the keep set.

    Attributes:
        kind: of question.
        tokens: of the answer.
        kl: KL(p_vlm || p_model) in nats, mean over the tokens.
        agreement: share of the tokens that the model would have chosen too, given those before.
    """

    kind: str
    tokens: int
    kl: float
    agreement: float


@torch.no_grad()
def measure(
    model: nn.Module, keep_set: Sequence[Sample], processor: Any, batch_size: int = 8, progress: bool = True
) -> list[Distance]:
    """The distance of a model from each answer of the keep set, in its order.

    Args:
        model: the VLM, trained or not, or one with an adapter on it; it is put into evaluation mode and back.
        processor: the VLM's.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: the processor has no chat template.
    """
    distances = []
    with evaluated(model), tqdm(total=len(keep_set), desc="measuring", unit="answer", disable=not progress) as bar:
        for start in range(0, len(keep_set), batch_size):
            samples = [keep_set[i] for i in range(start, min(start + batch_size, len(keep_set)))]
            distances += _of_batch(model, samples, processor)
            bar.update(len(samples))
    return distances


def _of_batch(model: nn.Module, samples: list[Sample], processor: Any) -> list[Distance]:
    lengths, distances = [len(sample.tokens) for sample in samples], []
    rows = answer_rows(model, read_part(processor, samples)).split(lengths)
    for sample, length, row in zip(samples, lengths, rows, strict=True):  # in fp32 they take room, so one by one
        top_tokens = sample.top_tokens.to(row.device)
        kl = bucketed_kl(row, top_tokens, sample.top_logprobs.to(row.device)).mean().item()
        distances.append(Distance(sample.kind, length, kl, (row.argmax(-1) == top_tokens[:, 0]).float().mean().item()))
    return distances


def summarize(distances: Sequence[Distance]) -> dict[str, dict]:
    """By kind of question and in "total": number of answers, mean KL and agreement, each with the 95 % interval of
    10,000 bootstrap resamples of the answers."""
    groups: dict[str, list[Distance]] = defaultdict(list)
    for distance in distances:
        groups[distance.kind].append(distance)
    groups = {**dict(sorted(groups.items())), "total": [*distances]}
    return {kind: _statistics(group) for kind, group in groups.items()}


def _statistics(group: list[Distance]) -> dict:
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor([[d.kl, d.agreement] for d in group], dtype=torch.float64)
    means = []
    for _ in range(RESAMPLES // 100):  # a hundred at a time
        drawn = torch.randint(len(group), (100, len(group)), generator=generator)
        means.append(values[drawn].mean(1))
    low, high = torch.cat(means).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    result = {"answers": len(group)}
    for i, name in enumerate(("kl", "agreement")):
        result |= {name: values[:, i].mean().item(), f"{name}_interval": [low[i].item(), high[i].item()]}
    return result
