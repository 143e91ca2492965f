"""The images of a sample: found, read, and opened once to see that they are whole."""

from __future__ import annotations

import base64
import io
import os
import re
from dataclasses import dataclass
from pathlib import PurePosixPath

import fsspec
import numpy as np
import PIL.Image
import PIL.ImageOps

from drift_peft.choices import PICTURES

from .bad_sample import BadSample

SHOWN = 80  # signs of a path that a sentence has
BASE64 = re.compile(r"[A-Za-z0-9+/\s]+=*\s*")
KEY = re.compile(r"(?i)(?:image|img|photo|(?<![a-z])pic|screenshot)(?!.*ids?$)")  # of pictures


@dataclass(frozen=True)
class Root:
    """Where relative paths start, and the name of the data set, which they may begin with: `../<name>/images/1.png`."""

    folder: str  # a local one, or hf://datasets/…
    name: str

    def locate(self, path: str) -> str:
        """Where an image is; where it should be if there is none.

        Raises:
            BadSample: it is outside of the folder: a data set of others must not put just any file into a result.
        """
        here = PurePosixPath(path.replace("\\", "/"))
        inside = [part for part in here.parts if part != ".."]
        if "://" in self.folder:  # a hub repository has nothing outside itself
            if here.is_absolute() or not inside or "::" in path:  # which fsspec would take for a chain of addresses
                raise BadSample("image missing", f"names the image {_shown(path)!r}, which is no path in {self.folder}")
            return f"{self.folder}/{'/'.join(inside[inside[0] == self.name :])}"
        root = os.path.abspath(self.folder)
        places = [path, "/".join(inside)] + (["/".join(inside[1:])] if inside[:1] == [self.name] else [])
        candidates = [os.path.abspath(os.path.join(root, place)) for place in places]
        allowed = [place for place in candidates if place == root or place.startswith(os.path.join(root, ""))]
        existing = next((place for place in allowed if os.path.isfile(place)), None)
        if existing is None and os.path.isfile(candidates[0]):
            raise BadSample(
                "image outside its folder",
                f"names the image {_shown(path)}, which is outside of {self.folder}: name its folder with --images",
            )
        return existing or candidates[0]


def pictures_in(value, key: str, root: Root | None = None) -> list[tuple[str | None, bytes | None]]:
    """Name and content, one of them at least, of each picture that a value names or holds.

    A text names one if the file is there, or if it stands under a key for pictures and has no white space. Prose has
    some, and an identifier may be the name of a file that nobody has.
    """
    if isinstance(value, (list, tuple)):
        return [picture for each in value for picture in pictures_in(each, key, root)]
    name, content = _name_and_content(value)
    if isinstance(value, str) and content is not None:
        return [(name, content)]
    content = content if content is not None and _opens(content) else None
    is_named = name is not None and name.lower().endswith(PICTURES)
    if is_named and not (isinstance(value, dict) and value.keys() <= {"path", "bytes"}):  # as datasets has one
        is_named = (KEY.search(key) is not None and not re.search(r"\s", name)) or _is_file(name, root)
    return [(name, content)] if is_named or content else []


def is_another(picture: tuple[str | None, bytes | None], images: list) -> bool:
    """Whether it is none of those that are read. A path beside bytes, or a web address, tells where one of them lies,
    and so does the same name in another folder."""
    name, content = picture
    if images and re.match("https?://", name or ""):
        return False
    for other, inside in map(_name_and_content, images):
        pairs = [pair for pair in ((name and _file(name), other and _file(other)), (content, inside)) if all(pair)]
        if not pairs or any(one == another for one, another in pairs):
            return False
    return True


def _name_and_content(value) -> tuple[str | None, bytes | None]:
    if isinstance(value, str):
        content = value.encode() if value.startswith("data:image/") else _bare(value)
        return None if content else value, content
    path, content = (value.get("path"), value.get("bytes")) if isinstance(value, dict) else (None, value)
    return path if isinstance(path, str) else None, content if isinstance(content, bytes) else None


def _file(path: str) -> str:
    return PurePosixPath(path.replace("\\", "/")).name


def read_image(value, root: Root) -> tuple[dict, list[str]]:
    """What datasets.Image stores: the path of a local file, else the bytes; and what was done to the image.

    The image has been decoded once. One that becomes black or white as RGB is stored as the RGB image that it shows.

    Raises:
        BadSample: it is missing, broken, or elsewhere.
    """
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, str):
        value = _decode(value) if value.startswith("data:") else _bare(value) or value.removeprefix("file://")
    name = "in its bytes"
    if isinstance(value, str):
        if re.match(r"https?://", value):
            raise BadSample("image missing", f"names the web address {_shown(value)}: download it, and name the file")
        path, value = value, root.locate(value)
        if "://" in root.folder:
            value = _fetch(value)
        elif not os.path.isfile(value):
            raise BadSample(
                "image missing",
                f"names the image {_shown(path)}, which is not there: paths start from {root.folder}, or from the "
                "folder that images names",
            )
        else:
            name = path
    if not isinstance(value, (str, bytes)):
        raise BadSample("image missing", f"has an image that is {_shown(repr(value))}: a path, or the bytes of a file")
    converted, done = _convert(value, name)
    if converted is not None or isinstance(value, bytes):
        return {"bytes": converted or value, "path": None}, done
    return {"bytes": None, "path": value}, done


def _convert(file: str | bytes, name: str) -> tuple[bytes | None, list[str]]:
    """The PNG of an image that has to be converted, and what was done."""

    def opened():
        return PIL.Image.open(io.BytesIO(file) if isinstance(file, bytes) else file)

    try:
        with opened() as image:
            image.verify()
        with opened() as image:  # verify() reads no pixels, and leaves the image unusable
            done = ["several frames: the first"] if getattr(image, "n_frames", 1) > 1 and image.format != "MPO" else []
            image.load()
            converted = None
            if image.mode in ("F", "I") or image.mode.startswith("I;"):
                converted = _scaled(image)
                done += ["more than 8 bits: scaled"] if converted else []
            elif image.has_transparency_data:
                converted = _on_white(image)
                done += ["transparent: on white"] if converted else []
            if converted is None:
                return None, done
            content = io.BytesIO()
            PIL.ImageOps.exif_transpose(converted).save(content, format="PNG")
            return content.getvalue(), done
    except Exception as error:  # decoders raise nearly anything: OSError, SyntaxError, ValueError, struct.error, …
        raise BadSample("image broken", f"has a broken image {name}: {' '.join(str(error).split())}") from error


def _on_white(image: PIL.Image.Image) -> PIL.Image.Image | None:
    """What a page shows of an image with transparent places; None if it has none."""
    layer = image.convert("RGBA")
    if layer.getchannel("A").getextrema()[0] == 255:
        return None
    white = PIL.Image.new("RGBA", layer.size, "white")
    return PIL.Image.alpha_composite(white, layer).convert("RGB")


def _scaled(image: PIL.Image.Image) -> PIL.Image.Image | None:
    """Grey values as 8 bits: 16 bits by their range, others by that of the image if they are not 8 bits already."""
    values = np.asarray(image).astype(np.float64)
    low, high = values.min(), values.max()
    if not np.isfinite(low + high):
        raise ValueError("it has values that are no numbers")
    if image.mode.startswith("I;16"):
        low, high = 0, 65535
    elif image.mode == "F" and 0 <= low and high <= 1:
        low, high = 0, 1
    elif 0 <= low and high <= 255:
        low, high = 0, 255
    grey = (values - low) / ((high - low) or 1) * 255
    return PIL.Image.fromarray(grey.round().astype(np.uint8)).convert("RGB")


def _decode(address: str) -> bytes:
    head, _, data = address.partition(",")
    try:
        if not head.endswith(";base64"):
            raise ValueError(f"{head[:40]} is not base64")
        return base64.b64decode(data, validate=True)
    except ValueError as error:
        raise BadSample("image broken", f"has a broken image in a data: address: {error}") from error


def _bare(text: str) -> bytes | None:
    """The image that a text is in base64, without an address around it; None if it is none."""
    if len(text) < SHOWN or not BASE64.fullmatch(text):
        return None
    try:
        content = base64.b64decode(text)
    except ValueError:  # then it is a path
        return None
    return content if _opens(content) else None


def _opens(content: bytes) -> bool:
    try:
        PIL.Image.open(io.BytesIO(content)).close()
    except Exception:  # of any kind, as in `_convert`
        return False
    return True


def _is_file(path: str, root: Root | None) -> bool:
    """Whether an image is there; on the hub, nobody looks."""
    try:
        return root is not None and "://" not in root.folder and os.path.isfile(root.locate(path))
    except BadSample:
        return False


def _shown(path: str) -> str:
    return path if len(path) <= SHOWN else f"{path[:SHOWN]}…"


def _fetch(address: str) -> bytes:
    try:
        with fsspec.open(address, "rb") as file:
            return file.read()
    except (FileNotFoundError, IsADirectoryError, ValueError) as error:
        raise BadSample("image missing", f"names the image {_shown(address)}, which is not there") from error
