"""The images that are asked about: of a folder, of a data set, of training data, or given one by one.

A data set's rows have `images` or `image`, or messages with parts of the type image; other columns do not matter. An
image is a path, the bytes of a file, a data: address, {"path", "bytes"}, or a picture of PIL.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..arguments import shortened
from ..checkpoints import split_revision
from ..choices import PICTURES
from ..warn import blamed_on, warn, warn_of_hub
from .file import UnknownRange, decode_image, upright

if TYPE_CHECKING:
    from PIL.Image import Image

JSON, PARQUET = (".json", ".jsonl"), ".parquet"
FEWEST_REFUSED = 16  # before a processor is taken to refuse all, or a data set to hold none that can be had
COLUMNS = ("images", "image", "messages", "conversations")  # of a row, in which images are looked for
NAMED = 8  # columns in an error
BUFFER = 1000  # rows of a streamed data set among which the next one is drawn
NO_DATA_SET = "cannot be read as a data set"
MISSING = 'a data set needs the package datasets: pip install "drift_peft[recipes]", or name a folder of pictures'


def read_pictures(source: Any, count: int, seed: int, show: Callable[[Image], Any] = lambda image: None) -> list[bytes]:
    """Files of at most `count` different images, drawn from the source; each can be decoded, and shown to the VLM. Of a
    folder or a data set, those that are missing, broken, refused or no files are left out, and a warning says how many.

    Args:
        source: a folder of pictures, a .json, .jsonl or .parquet file or a folder of such, a hub data set (`id` or
            `id@revision`), a `datasets.Dataset`, or a sequence of paths, PIL images or rows.
        show: what the VLM's processor makes of an image. An error of any kind is its refusal.

    Raises:
        FileNotFoundError: there is no such source; an image of a list is missing, or all of a data set are.
        ValueError: there are no images in it; one of a list is broken, refused or no file, or all of a folder or a data
            set are.
        ImportError: the source needs the package datasets, or the processor another one, which is missing.
    """
    pictures: dict[bytes, None] = {}
    # Of all errors no more than the first one is held: with each goes the image that was decoded.
    first: OSError | ValueError | None = None
    left_out = refused = no_file = 0
    shown = Shown()
    for value, folder, name in _drawn(source, seed):
        try:
            content = _content(value, folder, name)
            if content not in pictures:
                image = _decoded(decode_image, content, name)
                if not shown.covers(image.size):
                    _show(show, image, name)
                    shown.take([image.size])
        except (FileNotFoundError, Broken) as error:
            if not (isinstance(source, (str, Path)) or _is_data_set(source)):  # each of a list is meant
                raise
            first = first or error
            left_out += 1
            refused += isinstance(error, Refused)
            no_file += isinstance(error, NoFile)
            if not pictures and refused + no_file == max(count, FEWEST_REFUSED):  # the source may have many more
                break
            continue
        pictures[content] = None
        if len(pictures) == count:
            break
    if not pictures and 1 < left_out == refused:
        reason = " ".join(str(first.__cause__).split())
        raise ValueError(f"the VLM's processor refuses all {left_out} images that were drawn: {reason}")
    if not pictures:
        raise first
    if first:
        warn(f"{left_out} of the {left_out + len(pictures)} images that were drawn are left out: {first}")
    return [*pictures]


def check_source(source: str | Path) -> None:
    """Raise what `read_pictures` would raise of a folder or a file that is not there or has no pictures. The hub is not
    asked."""
    path = Path(source)
    if path.exists() or path.suffix in (*JSON, PARQUET):
        next(_drawn(source, 0))


class Shown:
    """Sizes of images that a processor has taken. It refuses images for being narrow, small or large, and takes up to
    seconds for a large one: what is less of each than one that it has taken need not be shown to it."""

    def __init__(self):
        self.taken = False
        self.narrowest, self.smallest, self.largest = 1.0, math.inf, 0

    def covers(self, size: tuple[int, int]) -> bool:
        least, most = sorted(size)
        return most <= self.narrowest * least and self.smallest <= least and most <= self.largest

    def take(self, sizes: Iterable[tuple[int, int]]) -> None:
        self.taken = True
        for least, most in map(sorted, sizes):
            self.narrowest = max(self.narrowest, most / least)
            self.smallest, self.largest = min(self.smallest, least), max(self.largest, most)


class Broken(ValueError):
    """An image that cannot be decoded."""


class NoFile(Broken):
    """What is given is no file that can be had, such as a web address."""


class Refused(Broken):
    """An image that the processor does not take, such as one that is much wider than high."""


def _show(show: Callable[[Image], Any], image: Image, name: str) -> None:
    try:
        show(image)
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # of any kind: each processor has its own
        width, height = image.size
        reason = " ".join(str(error).split())
        message = f"{name} has {width} x {height} pixels and is refused by the VLM's processor: take it out ({reason})"
        raise Refused(message) from error


def _decoded(decode: Callable[[Any], Image], image: Any, name: str) -> Image:
    try:
        return decode(image)
    except ImportError:
        raise
    except UnknownRange as error:
        raise Broken(f"{name} cannot be shown to a VLM: {error}") from error
    except Exception as error:  # decoders raise nearly anything: OSError, SyntaxError, ValueError, struct.error, …
        reason = " ".join(str(error).split())
        raise Broken(f"{name} is a broken image or none: take it out ({reason})") from error


def _is_data_set(source: Any) -> bool:
    """Of datasets, and none of its columns, which are lists."""
    return hasattr(source, "features") and hasattr(source, "shuffle")


def _is_row(given: Any) -> bool:
    """Of a data set; an image of datasets is a dict, too."""
    return isinstance(given, dict) and bool({*COLUMNS} & given.keys() or not {"bytes", "path"} & given.keys())


def _can_be_read(source: Any) -> bool:
    """One after another, as a list, or a data set of torch that has numbers for them."""
    try:
        iter(source)
    except TypeError:
        return False
    return True


def _drawn(source: Any, seed: int) -> Iterator[tuple[Any, Path | None, str]]:
    """(image, where relative paths start, what an error calls it) in random order. ValueError where there is none."""
    if not isinstance(source, (str, Path)):
        if _is_data_set(source):
            yield from _rows(source, seed, "the data set")
        elif isinstance(source, (bytes, Mapping)) or not _can_be_read(source):  # a DatasetDict is a Mapping
            kind = type(source).__name__
            raise ValueError(f"images must be a folder, a data set (one split of it) or a list of images, got {kind}")
        else:
            values, columns = [], {}
            for i, given in enumerate(source):
                row = given if _is_row(given) else {}
                columns |= dict.fromkeys(row)
                values += [(image, None, f"image {i}") for image in (_images(row) if _is_row(given) else [given])]
            yield from _shuffled(values, seed, "what was given", columns)
        return
    path = Path(source)
    if not path.exists():
        if path.suffix in (*JSON, PARQUET):
            raise FileNotFoundError(f"there is no file {source}")
        warn_of_hub(str(source))
        yield from _rows(_loaded(str(source)), seed, str(source))
        return
    if path.is_dir():
        inside = sorted((file for file in path.rglob("*") if file.is_file()), key=lambda file: file.as_posix())
        pictures = [file for file in inside if file.suffix.lower() in PICTURES]
        if pictures:
            yield from _shuffled([(str(file), None, str(file)) for file in pictures], seed, str(source))
            return
        files = [file for file in inside if file.suffix in (*JSON, PARQUET)]
        if not files:
            raise ValueError(f"there are no images in {source}: it has no file of the kinds {', '.join(PICTURES)}")
    else:
        files = [path]
    if wrong := [file for file in files if file.suffix not in (*JSON, PARQUET)]:
        kinds = ", ".join((*JSON, PARQUET))
        raise ValueError(f"{wrong[0]} is no data set: name a folder of pictures, or a file of the kinds {kinds}")
    if parquet := [str(file) for file in files if file.suffix == PARQUET]:
        folder = path if path.is_dir() else path.parent
        yield from _rows(_loaded("parquet", data_files=parquet), seed, str(source), folder)
        return
    values, columns = [], {}
    for file in files:
        for name, row in _json_rows(file):
            columns |= dict.fromkeys(row if isinstance(row, dict) else ())
            values += [(image, file.parent, f"an image of {name}") for image in _images(row)]
    yield from _shuffled(values, seed, str(source), columns)


def _shuffled(values: list, seed: int, name: str, columns: Iterable[Any] = ()) -> list:
    """The values, which are of rows with these columns, in random order. ValueError if there are none."""
    if not values:
        raise _no_images(name, columns)
    random.Random(seed).shuffle(values)
    return values


def _no_images(name: str, columns: Iterable[Any]) -> ValueError:
    message = f"there are no images in {name}"
    if columns := [*map(str, columns)]:
        message += (
            f", whose rows hold {shortened(columns, NAMED)}: have them in {COLUMNS[0]} or {COLUMNS[1]}, or as parts of "
            f"the type image in {COLUMNS[2]} or {COLUMNS[3]}"
        )
    return ValueError(message)


def _json_rows(file: Path) -> Iterator[tuple[str, Any]]:
    """(what an error calls it, row) of a file of JSON: a list, one row a line, or one row. The reader of datasets
    refuses columns of mixed types, such as contents that are a text in one row and a list in another."""
    try:
        text = file.read_text(encoding="utf-8-sig")
        try:
            whole = json.loads(text)
            rows = whole if isinstance(whole, list) else [whole]
        except ValueError:
            if text.lstrip().startswith("["):
                raise
            rows = map(json.loads, filter(str.strip, text.split("\n")))  # JSON may hold other ends of lines
        yield from ((f"row {number} of {file}", row) for number, row in enumerate(rows, 1))
    except ValueError as error:
        raise ValueError(f"{file} is no valid JSON: {error}") from error


def _loaded(name: str, **files) -> Any:
    """The split train of a data set, or its first one, as a stream."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(MISSING) from error
    repository, revision = split_revision(name)
    with blamed_on(name if files else f"{name}, which is no file or folder here,", NO_DATA_SET):
        splits = datasets.load_dataset(repository, revision=revision, streaming=True, **files)
    return splits["train"] if "train" in splits else next(iter(splits.values()))


def _rows(dataset: Any, seed: int, name: str, folder: Path | None = None) -> Iterator[tuple[Any, Path | None, str]]:
    """The images in the rows of datasets, drawn as its own shuffle draws them, undecoded."""
    with blamed_on(name, NO_DATA_SET):
        if hasattr(dataset, "to_iterable_dataset"):  # one with a length, which is shuffled as a whole
            dataset = dataset.shuffle(seed=seed).to_iterable_dataset()
        else:
            dataset = dataset.shuffle(seed=seed, buffer_size=BUFFER)
        rows = iter(dataset.with_format(None).decode(False))
    columns = dict.fromkeys(dataset.column_names or ())  # a stream of the hub may not know them
    if columns and not {*COLUMNS} & {*columns}:  # before millions of rows are read
        raise _no_images(name, columns)
    found = False
    while True:
        with blamed_on(name, NO_DATA_SET):
            row = next(rows, None)
        if row is None:
            break
        columns |= dict.fromkeys(row)
        for image in _images(row):
            found = True
            yield image, folder, f"an image of {name}"
    if not found:
        raise _no_images(name, columns)


def _images(row: Any) -> list:
    """The images of a row of a data set, as they are given there."""
    if not isinstance(row, dict):
        return [row] if isinstance(row, str) else []  # a list of paths
    for key in COLUMNS[:2]:
        given = row.get(key)
        if given is not None and not (isinstance(given, Sized) and not len(given)):
            return list(given) if isinstance(given, (list, tuple)) else [given]
    turns = next((row[key] for key in COLUMNS[2:] if row.get(key)), [])
    contents = (turn.get("content") for turn in turns if isinstance(turn, dict))
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    named = (
        next((part[key] for key in ("image", "image_url", "url", "path") if part.get(key)), None) for part in parts
    )
    return [image["url"] if isinstance(image, dict) and "url" in image else image for image in named if image]


def _content(image: Any, folder: Path | None, name: str) -> bytes:
    """The file of an image."""
    given = image
    if isinstance(image, dict):
        image = image["bytes"] if image.get("bytes") is not None else image.get("path")
    if isinstance(image, bytes):
        return image
    if hasattr(image, "save"):  # of PIL
        file = io.BytesIO()
        _decoded(upright, image, name).save(file, "PNG")
        return file.getvalue()
    if not isinstance(image, (str, Path)):
        raise NoFile(f"{name} is {str(given)[:40]!r}: give a path, the bytes of a file, or a picture of PIL")
    if str(image).startswith("data:"):
        with contextlib.suppress(ValueError):
            return base64.b64decode(str(image).partition(";base64,")[2], validate=True)
        raise NoFile(f"{name} is a data: address that is not base64")
    if str(image).startswith(("http://", "https://")):
        raise NoFile(f"{name} is the web address {image}: download it, and name the file")
    if "://" in str(image):  # in a repository of the hub, or in an archive there
        import fsspec

        try:
            with blamed_on(str(image)), fsspec.open(str(image), "rb") as file:
                return file.read()
        except ValueError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise NoFile(str(error)) from error
            raise  # the network fails, say, and would for the next one
    path = Path(folder or ".", image)
    try:
        if not path.is_file():
            raise FileNotFoundError(f"there is no image {path}, which is {name}")
        return path.read_bytes()
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        # Base64 without its data: is too long for a path.
        message = f"{name}, {str(image)[:200]!r}, cannot be read as a file: {error.strerror}"
        raise NoFile(message) from error
