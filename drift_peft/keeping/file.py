"""The file of a keep set: images, questions, the VLM's answers and its k largest log probabilities, in one safetensors
file.

    images        U8 [bytes]   the images' files, one behind the other, each image once
    image_ends    I64 [images]   where each of them ends
    samples       I32 [N, 2]   image and question of each sample

and of the answers what `sample_file` describes. The header also holds:

    vlm            its id and revision
    model_type     its type in transformers
    vocabulary     rows of its logits
    processor      its class
    image_mode     what the processor takes, such as RGB
    prompt_sample  the first of those with the largest image; 0 in earlier sets
    prompt_tokens  of that sample's question and image
    ends           tokens that end an answer
    seed           of the choice of images
    generation     settings of the answers
    questions      as [kind, text]
"""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..checkpoints import SharedFile
from ..warn import warn
from .answers import Sample, prompts
from .header import Header
from .sample_file import SampleFile, grows, write_sample_file
from .share import model_card

if TYPE_CHECKING:
    from huggingface_hub import ModelCard
    from PIL.Image import Image

FILE_NAME = "keep.safetensors"  # what a keep set is called in a folder or hub repository
NEEDS_PILLOW = 'images need pillow: pip install "drift_peft[keep]"'


class KeepSet(SharedFile, SampleFile):
    """A VLM's own answers to questions about unlabelled images; `keep_set[i]` is read from the file on access.

    Make one with `load` or `make_keep_set`.

    Attributes:
        path: the file.
        source: path or hub id as given to `load`.
        metadata: the header, as described at the top of `file`.
        kinds: kind of question -> how many samples are of it.
        k: how many log probabilities are known of each answer token.

    Example:
        >>> keep_set = KeepSet.load("keep.safetensors")
        >>> len(keep_set), keep_set.k, sorted(keep_set.kinds.items())
        (4, 8, [('count', 2), ('read', 2)])
        >>> sample = keep_set[0]  # with n answer tokens: tokens [n], top_tokens and top_logprobs [n, k]
        >>> sample.top_logprobs.shape == (len(sample.tokens), 8)
        True
    """

    NOUN, MAKE = "keep set", "make one with `drift-peft keep make`"
    HEADER_KEY, HEADER = "drift_keep", Header
    FILE_NAME, COMMIT = FILE_NAME, "Upload a keep set"

    def check(self, processor: Any) -> None:
        """ValueError unless this processor is of the class, and its tokenizer has the tokens, that the set was made
        with. Tokens that were added since then are no matter.

        Warns:
            UserWarning: it makes more or fewer tokens of a question and its image than the VLM was asked with, as it
                does with another resolution or chat template.

        Example:
            >>> KeepSet.load("keep.safetensors").check(processor)
        """
        kind, made_with = type(processor).__name__, self.metadata["processor"]
        if not hasattr(processor, "tokenizer"):
            raise ValueError(
                f"the processor is a {kind}, which is at most a part of one: give the whole {made_with}, as "
                "AutoProcessor.from_pretrained(VLM) makes it"
            )
        if kind != made_with:
            raise ValueError(
                f"{self.source} was made with the processor {made_with}, and not with {kind}: {self._way_out}"
            )
        if not self.has_tokens_of(processor):
            raise ValueError(f"{self.source} was made with another tokenizer than this {kind}'s: {self._way_out}")
        asked, number = self.metadata["prompt_tokens"], self.metadata.get("prompt_sample", 0)
        sample = self[number]
        if (asks := prompt_tokens(processor, sample.image, sample.question)) != asked:
            warn(
                f"{self.source} was made with another resolution of images or another chat template: its question "
                f"{number} had {asked} tokens there, and has {asks} here, so keeping holds the model to answers to "
                "other inputs. Make the set with the processor that you train with (processor= of make_keep_set, "
                "--processor-kwargs of drift-peft keep make)."
            )

    def check_model(self, model: nn.Module) -> None:
        """ValueError unless the model is of the VLM's type and has its vocabulary. Its weights may be others: those of
        a merged or quantized base, or an adapter's.

        Example:
            >>> KeepSet.load("keep.safetensors").check_model(vlm)
        """
        config = getattr(model, "config", None)
        if not hasattr(config, "model_type"):
            raise ValueError(
                f"the model is a {type(model).__name__}, which is no model of transformers: give the "
                f"{self.metadata['model_type']} that is in it"
            )
        self.check_config(config)

    def check_config(self, config: Any) -> None:
        """As `check_model`, by the configuration of a model that need not be there."""
        kind, made_with = config.model_type, self.metadata["model_type"]
        if kind != made_with:
            raise ValueError(f"{self.source} holds a {made_with}'s answers, and the model is a {kind}: {self._way_out}")
        rows, known = vocabulary_rows(config), self.metadata["vocabulary"]
        if rows < known:
            raise ValueError(f"{self.source} knows {known} tokens, and the model {rows}: {self._way_out}")

    def model_card(self, repo_id: str | None = None, token: str | None = None) -> ModelCard:
        """What `push_to_hub` writes as README.md; looks the VLM's licence up in its card.

        Example:
            >>> KeepSet.load("keep.safetensors").model_card("me/keep").data.pipeline_tag
            'image-text-to-text'
        """
        source, images = repo_id or FILE_NAME, len(self._image_ends)
        return model_card(self.metadata, source, self.sha256, self.kinds, images, token)

    def was_cut(self, sample: Sample) -> bool:
        """Was this answer cut at max_new_tokens, before it had ended?

        Example:
            >>> keep_set = KeepSet.load("keep.safetensors")
            >>> keep_set.was_cut(keep_set[0])
            False
        """
        ended = int(sample.tokens[-1]) in self.metadata["ends"]
        return len(sample.tokens) == self.metadata["generation"]["max_new_tokens"] and not ended

    def image_file(self, i: int) -> bytes:
        """The i-th image as the file that it came from; `image_of` says whose it is.

        Example:
            >>> keep_set = KeepSet.load("keep.safetensors")
            >>> keep_set.image_file(keep_set.image_of(0))[1:4]
            b'PNG'
        """
        return self._part("images", self._image_ends, i).numpy().tobytes()

    def image_of(self, i: int) -> int:
        """Which image the i-th sample is about, for `image_file`."""
        return int(self._samples[i, 0])

    def _asked(self, i: int) -> tuple[str, str]:
        kind, question = self.metadata["questions"][int(self._samples[i, 1])]
        return kind, question

    def _image(self, i: int) -> Image:
        return decode_image(self.image_file(self.image_of(i)), self.metadata["image_mode"])

    @property
    def _way_out(self) -> str:
        return f"make one of your model with `drift-peft keep make`; this one is of {self.metadata['vlm']['id']}"

    def _is_whole(self) -> bool:
        self._image_ends, self._samples = (self._file.get_tensor(name) for name in ("image_ends", "samples"))
        questions = self.metadata["questions"]
        self.kinds = Counter(questions[question][0] for question in self._samples[:, 1].tolist())
        images, answers = len(self._image_ends), len(self.metadata["answers"])
        beside = {"images": ([int(self._image_ends[-1])], "U8"), "image_ends": ([images], "I64")}
        beside |= {"samples": ([answers, 2], "I32")}
        return (
            super()._is_whole()
            and self._holds(beside)
            and grows(self._image_ends)
            and int(self._samples.min()) >= 0
            and int(self._samples[:, 0].max()) < images
        )


class UnknownRange(ValueError):
    """An image of which nobody says what is black and what is white."""


def decode_image(content: bytes, mode: str = "RGB") -> Image:
    """A picture's file as an image. OSError or ValueError if it is broken, ImportError without pillow."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(NEEDS_PILLOW) from error
    with Image.open(io.BytesIO(content)) as image:
        return upright(image, mode)


def upright(image: Image, mode: str = "RGB") -> Image:
    """In this mode of PIL, turned as its camera says. Of 16 bits of gray the upper 8 are taken, as pillow takes them of
    16 bits of a colour; its own `convert` makes all above 255 white.

    Raises:
        UnknownRange: its pixels are whole numbers of 32 bits, or floating-point numbers.
    """
    from PIL import ImageOps

    turned = ImageOps.exif_transpose(image)
    if is_deep(image):
        if image.mode in ("I", "F") and image.format != "PNG":  # as I, older pillow opens PNGs of 16 bits
            raise UnknownRange(
                f"its pixels are of the mode {image.mode} of PIL, which does not say what is white: save it with 8 bits"
            )
        turned = turned.convert("I").point(lambda value: value / 256)
    return turned.convert(mode)


def is_deep(image: Image) -> bool:
    """Has it more than 8 bits of gray?"""
    return image.mode.startswith(("I", "F"))


def data_address(image: Image, format: str = "PNG", **options) -> str:
    """The image itself as an address, for servers and pages; `options` are those of PIL's `save`."""
    content = io.BytesIO()
    image.save(content, format, **options)
    return f"data:image/{format.lower()};base64,{base64.b64encode(content.getvalue()).decode()}"


def area_of(content: bytes) -> int:
    """How many pixels a picture's file has, by its beginning."""
    from PIL import Image

    with Image.open(io.BytesIO(content)) as image:
        return image.width * image.height


def prompt_tokens(processor: Any, image: Image, question: str) -> int:
    """How many tokens the VLM is asked with, those of the image among them."""
    return prompts(processor, [image], [question])["input_ids"].shape[1]


def vocabulary_rows(config: Any) -> int:
    """How many tokens a model of this configuration gives a probability."""
    return config.get_text_config().vocab_size


def write_keep_set(
    folder: Path,
    output: Path,
    images: Sequence[bytes],
    pairs: Sequence[tuple[int, int]],
    answers: Sequence[dict[str, Tensor]],
    metadata: dict,
) -> None:
    """Write a keep set inside a folder and rename it when it is complete.

    Args:
        images: files of pictures.
        pairs: image and question of each sample, by number.
        answers: of each sample, `tokens` [T], `top_tokens` and `top_logprobs` [T, k].
        metadata: the header.
    """
    beside = {
        "images": torch.frombuffer(bytearray().join(images), dtype=torch.uint8),
        "image_ends": torch.tensor([len(image) for image in images]).cumsum(0),
        "samples": torch.tensor(pairs, dtype=torch.int32),
    }
    write_sample_file(KeepSet, folder, output, answers, metadata, beside)
