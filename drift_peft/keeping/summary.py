"""A keep set in numbers and as tables: what was asked, how long the answers are, how sure the VLM was."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from .answers import Sample
from .file import KeepSet

CAPTION = "cut: answers that max_new_tokens ended; entropy: at least, nats a token; top: what the stored tokens have"


def keep_summary(keep_set: KeepSet) -> dict:
    """What a keep set holds, as JSON holds it.

    `kinds` and `total` have how many samples there are, the mean and largest number of tokens of an answer, how many
    were cut at max_new_tokens, the mean entropy of an answer token in nats, and the mean probability that its k stored
    tokens have together.
    """
    header, samples = keep_set.metadata, [*keep_set.unpictured()]
    kinds = {kind: [sample for sample in samples if sample.kind == kind] for kind in keep_set.kinds}
    return {
        "source": keep_set.source,
        "sha256": keep_set.sha256,
        **{key: header[key] for key in ("vlm", "model_type", "processor", "k", "seed", "generation")},
        "images": len({keep_set.image_of(i) for i in range(len(keep_set))}),
        "questions": len({(sample.kind, sample.question) for sample in samples}),
        "kinds": {kind: _measured(group, keep_set.was_cut) for kind, group in kinds.items()},
        "total": _measured(samples, keep_set.was_cut),
    }


def entropy(top_logprobs: Tensor) -> Tensor:
    """[T] entropy in nats of the VLM's distribution, of which the k largest log probabilities [T, k] are known.

    What is left over counts as one outcome, so that the whole distribution's entropy may be larger.
    """
    p = top_logprobs.exp()
    rest = (1 - p.sum(-1)).clamp_min(0)
    return -(p * top_logprobs).sum(-1) - torch.xlogy(rest, rest)


def keep_rows(summary: dict) -> tuple[list[str], list[list[str]]]:
    """Heads and cells of `keep_summary`, a row a kind of question; the last one is over all of them."""
    heads = ["kind", "samples", "tokens", "longest", "cut", "entropy", f"top {summary['k']}"]
    rows = []
    for kind, row in [*summary["kinds"].items(), ("all", summary["total"])]:
        cells = [kind, str(row["samples"]), f"{row['mean_tokens']:.1f}", str(row["longest"]), str(row["cut"])]
        rows.append([*cells, f"{row['entropy']:.2f}", f"{row['captured']:.1%}"])
    return heads, rows


def keep_table(summary: dict) -> Table:
    """`keep_summary` for the terminal."""
    heads, rows = keep_rows(summary)
    # As Text, since brackets and colons in a folder's name are no markup.
    title = Text(f"{summary['total']['samples']} answers of {summary['vlm']['id']} about {summary['images']} images")
    table = Table(*heads, title=title, caption=CAPTION)
    for column in table.columns[1:]:
        column.justify = "right"
    for cells in rows[:-1]:
        table.add_row(*map(Text, cells))
    table.add_section()
    table.add_row(*rows[-1])
    return table


def _measured(samples: Sequence[Sample], was_cut: Callable[[Sample], bool]) -> dict:
    lengths = [len(sample.tokens) for sample in samples]
    logprobs = torch.cat([sample.top_logprobs for sample in samples]).double()
    return {
        "samples": len(samples),
        "mean_tokens": math.fsum(lengths) / len(lengths),
        "longest": max(lengths),
        "cut": sum(map(was_cut, samples)),
        "entropy": entropy(logprobs).mean().item(),
        "captured": logprobs.exp().sum(-1).clamp_max(1).mean().item(),
    }
