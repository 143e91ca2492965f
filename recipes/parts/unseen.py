"""Samples whose images a model's processor does not take: one of them would stop a whole batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from tqdm import tqdm

from .teachers import Local, with_prompt


def unseen(dataset: Sequence[dict], indices: Sequence[int], model: Local, prompt: str) -> dict[int, tuple[str, str]]:
    """Index of each sample that is refused -> the sizes of its images, and what the processor says.

    Raises:
        ValueError: the processor takes none of several, so that it is not the samples that are at fault.
    """
    from drift_peft.keeping import Shown  # which takes ten times as long to import as the rest here

    seen: dict[tuple, Shown] = defaultdict(Shown)  # who speaks -> images of what sizes it has taken
    refused: dict[int, tuple[str, str]] = {}
    for index in tqdm(indices, desc="showing to the processor", disable=None):
        sample = dataset[index]
        sizes = [image.size for image in sample["images"]]
        shown = seen[len(sizes), *((turn["role"], len(turn["content"])) for turn in sample["messages"])]
        if shown.taken and all(map(shown.covers, sizes)):
            continue
        try:
            model.inputs([(with_prompt(sample["messages"][:-1], prompt), sample["images"])])
        except (ImportError, MemoryError):
            raise
        except Exception as error:  # of any kind: each processor has its own
            pixels = ", ".join(f"{width} x {height}" for width, height in sizes)
            refused[index] = (pixels, " ".join(str(error).split()))
        else:
            shown.take(sizes)
    if len(refused) > 1 and not any(shown.taken for shown in seen.values()):
        _, reason = next(iter(refused.values()))
        raise ValueError(f"the model's processor takes none of the {len(refused)} samples: {reason}")
    return refused
