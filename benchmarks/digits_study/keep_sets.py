"""The keep sets of the study: the VLM's own answers to images of the world that nobody has labelled."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import ImageOps

from drift_peft import KeepSet, make_keep_set
from drift_peft.demo.compare import QUESTIONS
from drift_peft.demo.world import Sample, make_samples

from .worlds import World

VARIETIES = {  # of the images, and of the questions about them
    "as examined": "rows of one to five operations, all three kinds of questions",
    "shorter": "rows of one to three operations",
    "training images": "the images that the training samples have",
    "only read": "asked to read alone, never for a place or a count",
    "inverted": "dark digits on white, as no exam shows them",
}


def keep_set_of(world: World, settings: dict, seed: int, samples: list[Sample], folder: Path) -> KeepSet:
    """The VLM's answers about `keep_images` images of the variety; `samples` are those of the training.

    They are made once, and lie in `folder`, which is this world's alone.
    """
    count, variety, top_k = settings["keep_images"], settings["keep_variety"], settings["keep_top_k"]
    if variety not in VARIETIES:
        raise ValueError(f"keep_variety is one of {', '.join(VARIETIES)}, not {variety!r}")
    if variety == "training images":
        images = [sample.image for sample in samples[:count]]
    else:
        operations = (1, 2, 3) if variety == "shorter" else (1, 2, 3, 4, 5)
        drawn = make_samples(count, ["read"], np.random.default_rng([seed, 3]), world.digits("train"), operations)
        images = [ImageOps.invert(s.image) if variety == "inverted" else s.image for s in drawn]
    file = folder / f"keep-{seed}-{len(images)}-{variety.replace(' ', '-')}-{top_k}.safetensors"
    if file.exists():
        return KeepSet.load(file)
    questions = [QUESTIONS[0]] if variety == "only read" else QUESTIONS
    given = {"samples": len(images), "top_k": top_k, "max_new_tokens": 12, "batch_size": 60}
    with TemporaryDirectory(dir=folder) as made:  # another process may make the same
        make_keep_set(world.vlm, images, Path(made, file.name), questions, seed=seed, progress=False, **given)
        os.replace(Path(made, file.name), file)
    return KeepSet.load(file)


def replayed(keep_set: KeepSet) -> list[Sample]:
    """The kept answers as training samples, as if somebody had labelled the images with them."""
    kept = [keep_set[i] for i in range(len(keep_set))]
    return [Sample("read", "", sample.question, sample.answer, sample.image) for sample in kept]
