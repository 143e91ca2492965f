"""The hard form of keeping: a keep set as ordinary training samples, for trainers that `keep` does not reach (METHOD,
"Keeping what the VLM can do").

A sample is a question with the VLM's answer, in the messages layout: `<image>` stands for the picture, which `images`
names. Answers that would teach something else than the VLM's own are left out, and counted by reason.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections import Counter
from pathlib import Path

from ..atomic import reason_of
from ..checkpoints import claimed_output, partial_folder
from .file import KeepSet, is_deep, upright

PLACEHOLDER = "<image>"
FILE_NAME = "samples.jsonl"  # what the samples are called in a folder
ORIENTATION = 0x0112  # of EXIF: how a camera was held


def training_samples(keep_set: KeepSet) -> tuple[list[tuple[int, list[dict]]], Counter]:
    """(which picture, its messages) of each answer that can be trained on, and how many others there are, by reason.

    An answer that was cut is left out, since a model that is trained on it learns to stop there.

    Raises:
        ValueError: none is left.
    """
    cut = f"cut at max_new_tokens={keep_set.metadata['generation']['max_new_tokens']}"
    kept, left_out = [], Counter()
    for i, sample in enumerate(keep_set.unpictured()):
        if keep_set.was_cut(sample):
            left_out[cut] += 1
        elif not sample.answer.strip():
            left_out["without words"] += 1
        elif PLACEHOLDER in sample.question + sample.answer:
            left_out[f"with {PLACEHOLDER} in their words"] += 1
        else:
            question = {"role": "user", "content": f"{PLACEHOLDER}{sample.question}"}
            kept.append((keep_set.image_of(i), [question, {"role": "assistant", "content": sample.answer}]))
    if not kept:
        reasons = ", ".join(f"{number} are {reason}" for reason, number in left_out.items())
        raise ValueError(
            f"none of the answers in {keep_set.source} can be trained on, {reasons}: make a set with more "
            "max_new_tokens (--max-new-tokens)"
        )
    return kept, left_out


def _named_in(file: Path) -> set[str]:
    """The pictures that samples written earlier name; none where there is no such file."""
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        return {Path(image).name for row in rows for image in row["images"]}
    except (OSError, ValueError, TypeError, KeyError):
        return set()


def write_samples(keep_set: KeepSet, output: str | Path, overwrite: bool = False) -> dict:
    """Write a keep set as training samples: lines of JSON, and beside them a folder of the pictures that they name.

    Args:
        output: file that ends in .jsonl, or a folder, which then holds samples.jsonl.
        overwrite: replace both; a folder that holds anything else is left alone.

    Returns:
        `samples` and `pictures`, where they are; `written`, how many samples; `left_out`, how many by reason.

    Raises:
        ValueError: no answer can be trained on, or the output is called as neither.
        OSError: the output exists, or cannot be written.
    """
    output = Path(output)
    is_folder = output.suffix != ".jsonl"
    if is_folder and (output.is_file() or output.suffix in (".json", ".parquet")):
        raise ValueError(f"output {output} is no folder, and no file that ends in .jsonl: name either")
    file = output / FILE_NAME if is_folder else output
    pictures = file.with_name(f"{file.stem}_images")
    if pictures.exists() and not overwrite:
        raise FileExistsError(f"output {pictures} exists: name another one, or pass overwrite=True (--overwrite)")
    held = {path.name for path in pictures.iterdir() if path.name[0] != "."} if pictures.is_dir() else set()
    if others := held - _named_in(file):
        raise FileExistsError(
            f"output {pictures} holds {min(others)}, which {file} does not name, so the folder is not overwritten: "
            "take it out, or name another output"
        )
    kept, left_out = training_samples(keep_set)
    if is_folder and output.parent.is_dir():
        output.mkdir(exist_ok=True)
    with claimed_output(file, overwrite, example=FILE_NAME), partial_folder(file, overwrite) as folder:
        try:
            (folder / pictures.name).mkdir()
            places: dict[int, str] = {}
            lines = []
            for number, messages in kept:
                if number not in places:
                    content, ending = _picture(keep_set.image_file(number))
                    places[number] = f"{pictures.name}/{number:06d}{ending}"
                    (folder / places[number]).write_bytes(content)
                lines.append(json.dumps({"messages": messages, "images": [places[number]]}, ensure_ascii=False))
            (folder / file.name).write_text("\n".join([*lines, ""]), encoding="utf-8")
            if pictures.is_symlink():
                pictures.unlink()
            elif pictures.exists():
                shutil.rmtree(pictures)
            os.replace(folder / pictures.name, pictures)
            os.replace(folder / file.name, file)
        except OSError as error:
            raise OSError(f"output {file} cannot be written: {reason_of(error)}") from error
    return {"samples": str(file), "pictures": str(pictures), "written": len(kept), "left_out": dict(left_out)}


def _picture(content: bytes) -> tuple[bytes, str]:
    """The picture's file as it is, and the ending of its name; where its camera was turned or its gray has 16
    bits, the picture as the VLM was shown it, since not every trainer turns or scales it."""
    from PIL import Image

    with Image.open(io.BytesIO(content)) as image:
        if image.getexif().get(ORIENTATION, 1) == 1 and not is_deep(image):
            return content, f".{image.format.lower()}"
        turned = io.BytesIO()
        upright(image).save(turned, "PNG")
        return turned.getvalue(), ".png"
