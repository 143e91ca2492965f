"""The images of a sample: found, read, and opened once to see that they are whole."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import fsspec
import PIL.Image

from .layouts import BadSample


@dataclass(frozen=True)
class Root:
    """Where relative paths start, and the name of the data set, which they may begin with: `../<name>/images/1.png`."""

    folder: str  # a local one, or hf://datasets/…
    name: str

    def locate(self, path: str) -> str:
        """Where an image is; where it should be if there is none."""
        here = PurePosixPath(path.replace("\\", "/"))
        if here.is_absolute() or Path(path).is_absolute():
            return path
        inside = [part for part in here.parts if part != ".."]
        places = [path, "/".join(inside)]
        if inside[0] == self.name:
            places.append("/".join(inside[1:]))
        if "://" in self.folder:  # a hub repository has nothing outside itself
            return f"{self.folder}/{places[-1]}"
        found = (str(Path(self.folder, place)) for place in places)
        return next((place for place in found if Path(place).exists()), str(Path(self.folder, path)))


def read_image(value, root: Root) -> dict:
    """What datasets.Image stores: the path of a local file, else the bytes. The image has been decoded once.

    Raises:
        BadSample: it is missing or broken.
    """
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, str) and value.startswith("data:"):
        value = _decode(value)
    if isinstance(value, str):
        if re.match(r"https?://", value):
            raise BadSample("image missing", f"names the web address {value}: download it, and name the file")
        path, value = value, root.locate(value)
        if "://" in value:
            value = _fetch(value)
    if isinstance(value, bytes):
        _check(value, "in its bytes")
        return {"bytes": value, "path": None}
    if not isinstance(value, str):
        raise BadSample("image missing", f"has an image that is {value!r}: a path, or the bytes of a file")
    if not Path(value).is_file():
        raise BadSample("image missing", f"names the image {path}, which is not there: paths start from {root.folder}")
    _check(value, value)
    return {"bytes": None, "path": str(Path(value).absolute())}


def image_mode(processor) -> str:
    """What a processor takes: RGB, or L where it normalizes a single channel."""
    mean = getattr(processor.image_processor, "image_mean", None)
    return "L" if isinstance(mean, (list, tuple)) and len(mean) == 1 else "RGB"


def _check(file: str | bytes, name: str) -> None:
    def opened():
        return PIL.Image.open(io.BytesIO(file) if isinstance(file, bytes) else file)

    try:
        with opened() as image:
            image.verify()
        with opened() as image:  # verify() reads no pixels, and leaves the image unusable
            image.load()
    except Exception as error:  # decoders raise nearly anything: OSError, SyntaxError, ValueError, struct.error, …
        raise BadSample("image broken", f"has a broken image {name}: {' '.join(str(error).split())}") from error


def _decode(address: str) -> bytes:
    head, _, data = address.partition(",")
    try:
        if not head.endswith(";base64"):
            raise ValueError(f"{head[:40]} is not base64")
        return base64.b64decode(data, validate=True)
    except ValueError as error:
        raise BadSample("image broken", f"has a broken image in a data: address: {error}") from error


def _fetch(address: str) -> bytes:
    try:
        with fsspec.open(address, "rb") as file:
            return file.read()
    except FileNotFoundError as error:
        raise BadSample("image missing", f"names the image {address}, which is not there") from error
