"""The file of a keep set: images, questions, the VLM's answers and its k largest log probabilities, in one safetensors
file.

    images        U8 [bytes]   the images' files, one behind the other, each image once
    image_ends    I64 [images]   where each of them ends
    samples       I32 [N, 2]   image and question of each sample
    tokens        I32 [tokens]   the answers' tokens, one answer behind the other
    token_ends    I64 [N]   where each answer ends
    top_tokens    I32 [tokens, k]
    top_logprobs  F32 [tokens, k]   in descending order

The header holds one JSON string: format, vlm (its id and revision), model_type, vocabulary (rows of its logits),
tokenizer (its size and hash), processor (its class), image_mode (what it takes, such as RGB), prompt_tokens (of the
first sample's question and image, where the file says so), k, seed, generation (its
settings), the questions as [kind, text], and the answers in words.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..arguments import typed
from ..checkpoints import check, file_sha256, find_file, upload, write_tensors
from ..warn import warn
from .answers import Sample, prompts
from .header import Header
from .share import model_card

if TYPE_CHECKING:
    from huggingface_hub import ModelCard
    from PIL.Image import Image

HEADER_KEY, FORMAT = "drift_keep", 1
FILE_NAME = "keep.safetensors"  # what a keep set is called in a folder or hub repository
NEEDS_PILLOW = 'images need pillow: pip install "drift_peft[keep]"'
DTYPES = {"images": "U8", "image_ends": "I64", "samples": "I32", "tokens": "I32", "token_ends": "I64"}
DTYPES |= {"top_tokens": "I32", "top_logprobs": "F32"}


class KeepSet(Sequence[Sample]):
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

    def __init__(self, path: Path, source: str):
        self.path, self.source = path, source
        try:
            self._file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{source} is no keep set: it is truncated or no safetensors file ({error})") from error
        header = (self._file.metadata() or {}).get(HEADER_KEY)
        if header is None:
            raise ValueError(f"{source} is a safetensors file but no keep set: make one with `drift-peft keep make`")
        damaged = f"{source} is a damaged keep set: make or fetch it again"
        try:
            self.metadata = json.loads(header)
            written = self.metadata["format"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(damaged) from error
        if written != FORMAT:
            raise ValueError(
                f"{source} is a keep set of format {written}, not {FORMAT}: read it with another drift_peft"
            )
        try:
            check(self.metadata, Header)
            whole = self._read_indices()
        except (SafetensorError, KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
            raise ValueError(damaged) from error
        if not whole:
            raise ValueError(damaged)

    @classmethod
    @typed
    def load(cls, source: str | Path, revision: str | None = None) -> Self:
        """Open a keep set: a file, a folder or hub repository that holds keep.safetensors, or `id@revision`.

        Raises:
            FileNotFoundError: there is no such path or repository, or no keep set in it.
            ValueError: the file is no keep set, or a damaged one.
        """
        return cls(find_file(source, revision, FILE_NAME), str(source))

    @cached_property
    def sha256(self) -> str:
        """Hash of the file, as a hexadecimal string."""
        return file_sha256(self.path)

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
        if kind != made_with:
            raise ValueError(f"{self.source} was made with a {made_with}, not a {kind}: {self._way_out}")
        known = self.metadata["tokenizer"]
        if tokenizer_identity(processor, known["size"]) != known:
            raise ValueError(f"{self.source} was made with another tokenizer than this {kind}'s: {self._way_out}")
        asked = self.metadata.get("prompt_tokens")
        if asked is not None and (asks := prompt_tokens(processor, self[0].image, self[0].question)) != asked:
            warn(
                f"{self.source} was made with another resolution of images or another chat template: its first "
                f"question had {asked} tokens there, and has {asks} here, so keeping holds the model to answers to "
                "other inputs: make one with the processor that you train with: processor= of "
                "make_keep_set, --processor-kwargs of drift-peft keep make"
            )

    def check_model(self, model: nn.Module) -> None:
        """ValueError unless the model is of the VLM's type and has its vocabulary. Its weights may be others: those of
        a merged or quantized base, or an adapter's.

        Example:
            >>> KeepSet.load("keep.safetensors").check_model(vlm)
        """
        kind, made_with = model.config.model_type, self.metadata["model_type"]
        if kind != made_with:
            raise ValueError(f"{self.source} holds a {made_with}'s answers, and the model is a {kind}: {self._way_out}")
        rows, known = vocabulary_rows(model.config), self.metadata["vocabulary"]
        if rows < known:
            raise ValueError(f"{self.source} knows {known} tokens, and the model {rows}: {self._way_out}")

    @typed
    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str | None = None,
        revision: str | None = None,
    ) -> str:
        """Upload the keep set, its images among it, with a card to a hub repository, made if need be. Returns the
        commit's URL.

        A README.md in the repository is replaced.

        Raises:
            ValueError: `repo_id` is no hub id.
            OSError: the hub does not take it: no network, no token, no permission.

        Example:
            >>> keep_set.push_to_hub("me/keep", private=True)  # doctest: +SKIP
        """
        files = {FILE_NAME: self.path, "README.md": str(self.model_card(repo_id, token)).encode()}
        return upload(self.source, repo_id, files, private, token, commit_message or "Upload a keep set", revision)

    def model_card(self, repo_id: str | None = None, token: str | None = None) -> ModelCard:
        """What `push_to_hub` writes as README.md; looks the VLM's licence up in its card.

        Example:
            >>> KeepSet.load("keep.safetensors").model_card("me/keep").data.pipeline_tag
            'image-text-to-text'
        """
        source, images = repo_id or FILE_NAME, len(self._image_ends)
        return model_card(self.metadata, source, self.sha256, self.kinds, images, token)

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

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, i: int) -> Sample:
        """The i-th sample. IndexError if there are not so many."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"{self.source} has {len(self)} samples, and none of number {i}")
        i %= len(self)
        image, question = self._samples[i].tolist()
        kind, text = self.metadata["questions"][question]
        tokens, top_tokens, top_logprobs = (
            self._part(name, self._token_ends, i) for name in ("tokens", "top_tokens", "top_logprobs")
        )
        return Sample(
            image=decode_image(self.image_file(image), self.metadata["image_mode"]),
            question=text,
            kind=kind,
            answer=self.metadata["answers"][i],
            tokens=tokens.long(),
            top_tokens=top_tokens.long(),
            top_logprobs=top_logprobs,
        )

    # A keep set is its file; a Sequence would compare contents.
    __eq__, __hash__ = object.__eq__, object.__hash__

    def __reduce__(self) -> tuple:  # an open file is not copied or pickled, but opened again
        return type(self), (self.path, self.source)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.source!r}, {len(self)} samples, k {self.k})"

    @property
    def _way_out(self) -> str:
        return f"make one of your model with `drift-peft keep make`; this one is of {self.metadata['vlm']['id']}"

    def _part(self, name: str, ends: Tensor, i: int) -> Tensor:
        start = int(ends[i - 1]) if i else 0
        return self._file.get_slice(name)[start : int(ends[i])]

    def _read_indices(self) -> bool:
        """Read what says where a sample is. False, or an error, if the file does not hold what its header promises."""
        header = self.metadata
        self._image_ends, self._samples, self._token_ends = (
            self._file.get_tensor(name) for name in ("image_ends", "samples", "token_ends")
        )
        slices = {name: self._file.get_slice(name) for name in self._file.keys()}
        self.k, tokens = header["k"], int(self._token_ends[-1])
        shapes = {
            "images": [int(self._image_ends[-1])],
            "image_ends": [len(self._image_ends)],
            "samples": [len(header["answers"]), 2],
            "tokens": [tokens],
            "token_ends": [len(header["answers"])],
            "top_tokens": [tokens, self.k],
            "top_logprobs": [tokens, self.k],
        }
        self.kinds = Counter(header["questions"][question][0] for question in self._samples[:, 1].tolist())
        return (
            {name: part.get_shape() for name, part in slices.items()} == shapes
            and {name: part.get_dtype() for name, part in slices.items()} == DTYPES
            and all(
                int(ends.diff(prepend=ends.new_zeros(1)).min()) > 0 for ends in (self._image_ends, self._token_ends)
            )
            and int(self._samples.min()) >= 0
            and int(self._samples[:, 0].max()) < len(self._image_ends)
        )


def decode_image(content: bytes, mode: str = "RGB") -> Image:
    """A picture's file as an image. OSError or ValueError if it is broken, ImportError without pillow."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(NEEDS_PILLOW) from error
    with Image.open(io.BytesIO(content)) as image:
        return upright(image, mode)


def upright(image: Image, mode: str = "RGB") -> Image:
    """In this mode of PIL, turned as its camera says."""
    from PIL import ImageOps

    return ImageOps.exif_transpose(image).convert(mode)


def tokenizer_identity(processor: Any, size: int | None = None) -> dict:
    """How many tokens the tokenizer has (up to `size`), and the hash of their sorted vocabulary."""
    vocabulary = processor.tokenizer.get_vocab()
    size = max(vocabulary.values()) + 1 if size is None else size
    known = sorted((token, row) for token, row in vocabulary.items() if row < size)
    return {"size": size, "sha256": hashlib.sha256(json.dumps(known).encode()).hexdigest()}


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
    lengths = torch.tensor([len(answer["tokens"]) for answer in answers])
    joined = {
        name: torch.cat([answer[name] for answer in answers]).contiguous()
        for name in ("tokens", "top_tokens", "top_logprobs")
    }
    tensors = {
        "images": torch.frombuffer(bytearray(b"".join(images)), dtype=torch.uint8),
        "image_ends": torch.tensor([len(image) for image in images]).cumsum(0),
        "samples": torch.tensor(pairs, dtype=torch.int32),
        "tokens": joined["tokens"].int(),
        "token_ends": lengths.cumsum(0),
        "top_tokens": joined["top_tokens"].int(),
        "top_logprobs": joined["top_logprobs"].float(),
    }
    write_tensors(folder / FILE_NAME, tensors, {HEADER_KEY: json.dumps(metadata, sort_keys=True, allow_nan=False)})
    os.replace(folder / FILE_NAME, output)
