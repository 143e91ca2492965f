"""A VLM and unlabelled images -> keep set, resumable.

Everything that cannot be right is refused before the weights are loaded. Each batch of answers goes to disk at once, so
that an interrupted run loses one batch at most.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..arguments import check_whole, typed
from ..checkpoints import claimed_output, finish, finished, resumable_folder
from .file import FILE_NAME, KeepSet, area_of, decode_image, prompt_tokens, write_keep_set
from .generation import machine
from .pictures import read_pictures
from .questions import BUILT_IN, check_questions, read_questions
from .server import Server
from .vlm import Vlm

if TYPE_CHECKING:
    from PIL.Image import Image


@typed
def make_keep_set(
    model_or_id: nn.Module | str | Path,
    images: Any,
    output: str | Path,
    questions: str | Path | Sequence[tuple[str, str]] | None = None,
    samples: int = 300,
    max_new_tokens: int = 64,
    top_k: int = 32,
    load_in_4bit: bool = False,
    batch_size: int = 8,
    seed: int = 0,
    processor: Any = None,
    server: str | None = None,
    api_key: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> KeepSet:
    """Have a VLM answer questions about images that nobody has labelled, and write what it says as a keep set.

    Each answer takes the likeliest token each time, and keeps the `top_k` largest log probabilities (natural ones) of
    each of its tokens. Images are drawn at random and take turns with the questions; where there are fewer images than
    samples, an image gets several questions. The file holds the images as their files are.

    A run that was interrupted or killed leaves `<output>.partial/`. The same call goes on from there and ends in the
    same bytes as an uninterrupted one; a call with other settings is refused until that folder is gone.

    Args:
        model_or_id: the VLM: folder, hub id or `id@revision`, or a model in memory, with its processor.
        images: folder of pictures, data set (hub id or `id@revision`; .json, .jsonl or .parquet, such as the training
            data), `datasets.Dataset`, or sequence of paths, PIL images or rows of training data.
        output: file to write, such as keep.safetensors.
        questions: file of questions, or pairs of kind and question, instead of the built-in ones (`read_questions`).
        samples: how many answers.
        max_new_tokens: an answer is cut there.
        top_k: how many log probabilities of each answer token.
        load_in_4bit: load the projections of its language model in NF4, and the rest as it is.
        batch_size: questions at a time.
        seed: of the choice of images.
        processor: of the VLM, if not the one that lies with it; or settings of that one, such as {"max_pixels":
            262144}. Take what you train with: the set holds for no other resolution.
        server: address of a server that has the VLM and speaks OpenAI's protocol with log probabilities, such as
            http://localhost:8000/v1 of vLLM. It is asked instead of loading the weights; `model_or_id` is then the id
            by which it knows the VLM, whose config and processor are read here.
        api_key: for the server's header Authorization; stored nowhere.
        overwrite: replace an existing output, and throw away what an interrupted run with other settings has left.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: an argument is out of range; the model has no processor with a chat template; there are no images,
            or not enough for so many samples; a question or an image cannot be read; a question holds a token that
            stands for an image; the GPU has no room; the server refuses, gives no log probabilities, or names what is
            no token of the VLM.
        OSError: the model or the images are not found, the output exists or cannot be written, another process writes
            it, or it holds another run's work; the server does not answer.
        ImportError: pillow is missing, torchvision where the processor needs it, or datasets where a data set is read.

    Example:
        >>> made = make_keep_set(
        ...     VLM, IMAGES, "keep.safetensors", [("read", "read?"), ("count", "count?")],
        ...     samples=4, top_k=8, progress=False,
        ... )
        >>> made
        KeepSet('keep.safetensors', 4 samples, k 8)
    """
    numbers = {"samples": samples, "max_new_tokens": max_new_tokens, "top_k": top_k, "batch_size": batch_size}
    check_whole(**numbers)
    output = Path(output)
    from_file = questions is None or isinstance(questions, (str, Path))
    asked = read_questions(questions) if from_file else check_questions(questions)
    if server is not None and isinstance(model_or_id, nn.Module):
        raise ValueError("with server=, give the id by which the server knows its model, instead of a model in memory")
    if server is not None and load_in_4bit:
        raise ValueError("with server (--server), the server decides how its model is loaded: leave out load_in_4bit")
    if api_key is not None and server is None:
        raise ValueError("api_key goes with server (--server): a model in this process asks for none")
    sources = [source for source in (questions, images) if isinstance(source, (str, Path))]
    with claimed_output(output, overwrite, FILE_NAME, sources):
        vlm = Vlm(model_or_id, processor, load_in_4bit)
        vlm.check_top_k(top_k)
        source = str(questions or BUILT_IN) if from_file else "questions"
        vlm.check_written("question", [q for _, q in asked], source, "each question gets its image by itself")
        vlm_or_server = vlm
        if server is not None:
            known = vlm.processor.tokenizer, vlm.vocabulary, vlm.places
            counts = partial(prompt_tokens, vlm.processor)
            vlm_or_server = Server(server, vlm.origin["id"], *known, api_key, vlm.ends, counts)

        def show(image: Image) -> None:
            prompt_tokens(vlm.processor, image.convert(vlm.image_mode), asked[0][1])

        pictures = read_pictures(images, samples, seed, show)
        pairs = _pairs(len(pictures), len(asked), samples)

        generation = {"max_new_tokens": max_new_tokens, "load_in_4bit": load_in_4bit, "server": server is not None}
        facts = {**vlm.facts, "format": KeepSet.FORMAT, "k": top_k, "seed": seed, "generation": generation}
        facts["ends"] = vlm.ends
        facts["questions"] = [[kind, question] for kind, question in asked]
        # Of a small image, which no setting makes smaller, another resolution shows nothing.
        number = max(range(samples), key=lambda i: area_of(pictures[pairs[i][0]]))
        image, question = pairs[number]
        largest = decode_image(pictures[image], vlm.image_mode)
        facts["prompt_tokens"] = prompt_tokens(vlm.processor, largest, asked[question][1])
        del largest  # a decoded photograph takes tens of MB
        everything = {**facts, **numbers, "files of the VLM": vlm.identity, "images": _hash(pictures), **machine()}
        with resumable_folder(output, everything, afresh=overwrite, parts="batches") as folder:

            def ask(start: int) -> list[dict[str, Tensor]]:
                batch = pairs[start : start + batch_size]
                return vlm_or_server.answer(
                    [decode_image(pictures[image], vlm.image_mode) for image, _ in batch],
                    [asked[question][1] for _, question in batch],
                    max_new_tokens,
                    top_k,
                )

            answers = answers_in_batches(folder, samples, batch_size, ask, "keep set", progress)
            facts["prompt_sample"] = number
            facts["answers"] = [_words(answer["tokens"], vlm) for answer in answers]
            write_keep_set(folder, output, pictures, pairs, answers, facts)
        return KeepSet.load(output)


def _words(tokens: Tensor, vlm: Vlm) -> str:
    """What an answer says, without the special token that ends it. Other special ones, as those around a place, belong
    to it: a tokenizer makes the same tokens of their names again."""
    words, last = vlm.processor.tokenizer, int(tokens[-1])
    return words.decode(tokens[:-1] if last in vlm.ends and last in words.all_special_ids else tokens)


def answers_in_batches(
    folder: Path,
    samples: int,
    batch_size: int,
    ask: Callable[[int], list[dict[str, Tensor]]],
    title: str,
    progress: bool,
) -> list[dict[str, Tensor]]:
    """All answers in their order, of which those in the folder are not asked for again.

    Args:
        folder: of `resumable_folder`.
        ask: number of a batch's first sample -> its answers, each with `tokens` [T], `top_tokens` and `top_logprobs`
            [T, k].
        title: what the progress bar calls it.
    """
    starts = range(0, samples, batch_size)
    files = [folder / f"{start:08d}.safetensors" for start in starts]
    missing = {start: file for start, file in zip(starts, files, strict=True) if finished(file) is None}
    done = samples - sum(min(batch_size, samples - start) for start in missing)
    with tqdm(desc=title, total=samples, initial=done, unit="answer", disable=not progress) as bar:
        for start, file in missing.items():
            answers = ask(start)
            finish(file, _join(answers), len(answers))
            bar.update(len(answers))
    return [answer for file in files for answer in _split(load_file(file))]


def _pairs(images: int, questions: int, samples: int) -> list[tuple[int, int]]:
    """(image, question) of each sample: no image is asked the same twice, and no question is left behind."""
    if samples > images * questions:
        raise ValueError(
            f"samples={samples} is too many for {images} different images with {questions} questions each: give more "
            f"of them, or pass samples={images * questions} (--samples)"
        )
    period = math.lcm(images, questions)  # after which the same pairs would come again
    return [(i % images, (i + i // period) % questions) for i in range(samples)]


def _hash(pictures: Sequence[bytes]) -> str:
    digest = hashlib.sha256()
    for picture in pictures:
        digest.update(hashlib.sha256(picture).digest())
    return digest.hexdigest()


def _join(answers: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch of answers, one behind the other."""
    tensors = {name: torch.cat([answer[name] for answer in answers]) for name in answers[0]}
    tensors["lengths"] = torch.tensor([len(answer["tokens"]) for answer in answers])
    return tensors


def _split(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The answers of a batch, as `_join` was given them."""
    lengths = tensors.pop("lengths").tolist()
    parts = {name: tensor.split(lengths) for name, tensor in tensors.items()}
    return [{name: part[i] for name, part in parts.items()} for i in range(len(lengths))]
