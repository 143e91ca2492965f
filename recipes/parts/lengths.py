"""How many tokens a conversation has, and which are too long."""

from __future__ import annotations

from typing import Literal

import datasets
from tqdm import tqdm

from .bad_sample import BadSample
from .loading import LONGER, PLACE, Dropped, nothing_left


def within_length(
    dataset, processor, max_tokens: int, *, source: str, on_long: Literal["drop", "fail"] = "drop", dropped: Dropped
):
    """The conversations of at most max_tokens tokens, those of their images included. None is ever cut.

    Each is processed as TRL's collator does it, so this takes as long as an epoch of loading.

    Args:
        source: what an error calls the whole of them.
        dropped: gets how many others there are, under "longer than <max_tokens> tokens", or "refused by the processor",
            which would stop the training too; and, but for a stream, all lengths.

    Raises:
        BadSample: with on_long="fail", or if none is left.
    """
    is_stream, fails = isinstance(dataset, datasets.IterableDataset), on_long == "fail"

    def fits(sample: dict, index: int) -> bool:
        place = sample.get(PLACE) or f"sample {index + 1}"
        try:
            length = count_tokens(sample["messages"], sample["images"], processor)
        except Exception as error:  # of any kind: each processor has its own
            message = " ".join(str(error).split())
            sizes = " and ".join("{} x {}".format(*image.size) for image in sample["images"])
            seen = f", with {'images' if ' and ' in sizes else 'an image'} of {sizes} pixels," if sizes else ""
            problem = BadSample("refused by the processor", f"{place}{seen} is refused by the processor: {message}")
        else:
            if not is_stream:
                dropped.lengths.append(length)
            if length <= max_tokens:
                return True
            problem = BadSample(
                f"{LONGER} {max_tokens} tokens",
                f"{place} has {length} tokens, its images' included, and max_tokens allows {max_tokens}: "
                f"allow more, or make the images smaller{', or set on_long, in data.py --on-bad, to drop' * fails}",
            )
        if fails:
            raise problem
        dropped.add(problem)
        return False

    if is_stream:
        return dataset.filter(fits, with_indices=True)
    kept = [i for i, sample in enumerate(tqdm(dataset, desc="counting tokens", disable=None)) if fits(sample, i)]
    if not kept:
        raise nothing_left(source, dropped)
    return dataset.select(kept)


def count_tokens(messages: list[dict], images: list, processor) -> int:
    """Tokens of a conversation as TRL's collator makes them."""
    from trl.data_utils import prepare_multimodal_messages  # which takes ten times as long to import as the rest here

    from drift_peft.keeping import image_mode

    mode = image_mode(processor)
    filled = prepare_multimodal_messages(messages, images=[image.convert(mode) for image in images])
    return len(processor.apply_chat_template([filled], tokenize=True, return_dict=True)["input_ids"][0])
