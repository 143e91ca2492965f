"""Where samples come from: files, folders and hub data sets, read as rows by datasets."""

from __future__ import annotations

import atexit
import codecs
import contextlib
import functools
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import datasets
import fsspec
import pyarrow as pa
from filelock import FileLock, Timeout
from huggingface_hub import snapshot_download

from drift_peft.choices import PICTURES
from drift_peft.warn import blamed_on, warn_of_hub

from .images import Root
from .layouts import TURNS

CATEGORY = "category"  # key of a sample
ALL = "all"  # category of a sample that has none
FILES = (".json", ".jsonl", ".parquet")
DOCUMENT = "document"  # column of a file that is one text
START = 1000  # bytes of a file that tell how it is to be read


def find_files(
    source: str, split: str, images: str | Path | None, streaming: bool, default_split: str = "train"
) -> tuple[list[str], Root]:
    """The files of a source's split, and where its images are. ValueError if there are none.

    Args:
        default_split: what `split` is where nobody has named one; any other is refused of a source without splits.
    """
    path = Path(source)
    if path.is_dir():
        files = _saved_files(path, split, default_split) or _split_files(source, split)
        root = Root(source, path.resolve().name)
    elif path.exists() or _is_data(source):
        if not path.exists():
            raise ValueError(f"there is no file {source} here: a path begins where the command is run")
        if not _is_data(source):
            raise ValueError(f"{source} is no file to be read: take one of {', '.join(FILES)}, a folder, or a hub id")
        if split != default_split:
            raise _without_splits(source, split)
        files, root = [source], Root(str(path.parent), path.resolve().parent.name)
    else:
        warn_of_hub(source)
        files = _split_files(source, split)
        folder, name, commit = re.match(r"(hf://datasets/([^/]+/[^/]+)@([^/]+))/", files[0]).groups()
        if images is None and not streaming:
            patterns = [f"*{suffix}" for suffix in (*PICTURES, *map(str.upper, PICTURES))]
            with blamed_on(source):
                folder = snapshot_download(name, repo_type="dataset", revision=commit, allow_patterns=patterns)
        root = Root(folder, name.partition("/")[2])
    if images is None:
        return files, root
    if not Path(images).is_dir():
        raise ValueError(f"images {images} is no folder")
    return files, Root(str(images), root.name)


def read_file(file: str, streaming: bool) -> datasets.Dataset | datasets.IterableDataset:
    """A file's rows in arrow format; of JSON, its text: the reader of datasets makes 1.5 of an answer "1.50" where a
    column mixes types, and loses the whole file to one torn line."""
    suffix = Path(file).suffix.lower()
    with blamed_on(file):
        if suffix in (".json", ".jsonl"):
            with fsspec.open(file, "rb") if "://" in file else open(file, "rb") as content:
                start = content.read(START).removeprefix(codecs.BOM_UTF8).lstrip()
            if not start:
                raise ValueError("it is empty")
            name, by = (DOCUMENT, "document") if suffix == ".json" or start.startswith(b"[") else ("text", "line")
            features = datasets.Features({name: datasets.Value("string")})
            kind, options = "text", {"sample_by": by, "encoding": "utf-8-sig", "features": features}
        else:
            kind, options = suffix[1:], {}
        options |= {"data_files": file, "cache_dir": scratch(datasets.config.HF_DATASETS_CACHE)}
        rows = datasets.load_dataset(kind, split="train", streaming=streaming, **options)
    return rows.with_format("arrow")


@functools.cache
def scratch(cache: Path) -> str:
    """A folder of this process for the rows that datasets writes down, which would stay in its cache for good.

    It goes when the process ends; those of processes that were killed go with the next one that makes its own.
    """
    cache.mkdir(parents=True, exist_ok=True)
    for left in cache.glob("recipes-*.lock"):
        with contextlib.suppress(Timeout, OSError), FileLock(left, timeout=0):  # nobody holds it any more
            _remove(left)
    with tempfile.NamedTemporaryFile(dir=cache, prefix="recipes-", suffix=".lock", delete=False) as file:
        lock = FileLock(file.name)
        lock.acquire()
    atexit.register(_remove, Path(lock.lock_file), lock)
    return str(Path(lock.lock_file).with_suffix(""))


def _remove(lock_file: Path, lock: FileLock | None = None) -> None:
    shutil.rmtree(lock_file.with_suffix(""), ignore_errors=True)
    if lock is not None:
        lock.release()
    lock_file.unlink(missing_ok=True)


def samples(table: pa.Table, indices: list[int], file: str) -> Iterator[tuple[int, dict | str]]:
    """Number, from 1, and content of the samples in some rows of a file; a line of JSON as its text, if it has some."""
    if DOCUMENT in table.column_names:
        (text,) = table[DOCUMENT].to_pylist()
        rows = _read_document(text, file)
        indices = range(len(rows))
    else:
        rows = table["text"].to_pylist() if is_json(file) else table.to_pylist()
    yield from ((i + 1, row) for i, row in zip(indices, rows, strict=True) if not isinstance(row, str) or row.strip())


def read_categories(data: str, split: str, key: str | None) -> list[str]:
    """What each sample has under a key; ALL if it is not asked for by name, and not there."""
    values = []
    for file in find_files(data, split, None, False, default_split=split)[0]:  # by which the samples were read
        rows = read_file(file, streaming=False)
        if not is_json(file):  # whose images are not to be read for this
            has_key = (key or CATEGORY) in rows.column_names
            values += rows.with_format(None)[key or CATEGORY] if has_key else [None] * len(rows)
            continue
        for _, sample in samples(rows[:], range(len(rows)), file):
            sample = json.loads(sample) if isinstance(sample, str) else sample
            values.append(sample.get(key or CATEGORY))
    if key and all(value is None for value in values):
        raise ValueError(f"no sample of {data} has the category {key}")
    return [ALL if value is None else str(value) for value in values]


def _read_document(text: str, file: str) -> list[dict | str]:
    """A list of samples, one sample, one in each line, or samples under one key or under a key for each."""
    is_lines = file.lower().endswith(".jsonl")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("[") and not is_lines:
            raise ValueError(f"{file} is no valid JSON: {error}") from error
        return text.split("\n")
    if is_lines and not all(isinstance(row, dict) for row in content):  # its first line alone is a list
        return text.split("\n")
    if isinstance(content, dict):
        values = [*content.values()]
        if values and all(isinstance(value, dict) for value in values):
            return values
        inside = values[0] if len(values) == 1 and not {*content} & {*TURNS} else None  # "data", often
        content = inside if isinstance(inside, list) and all(isinstance(row, dict) for row in inside) else [content]
    return content if isinstance(content, list) else [content]


def is_json(file: str) -> bool:
    return file.lower().endswith((".json", ".jsonl"))


def _is_data(file: str | Path) -> bool:
    return Path(file).suffix.lower() in FILES


def _without_splits(source: str | Path, split: str) -> ValueError:
    way_out = "leave split out, or name the file or folder of that split as the data"
    return ValueError(f"{source} has no splits, so split {split} cannot be taken of it: {way_out}")


def _saved_files(folder: Path, split: str, default_split: str) -> list[str]:
    """The files of what a data set's save_to_disk has written; none if it is another folder."""
    with blamed_on(str(folder)):
        if (several := folder / "dataset_dict.json").exists():
            splits = json.loads(several.read_text(encoding="utf-8"))["splits"]
            if split not in splits:
                raise ValueError(f"it has no split {split}, but {', '.join(splits)}")
            folder = folder / split
        state = folder / "state.json"
        if not state.exists():
            return []
        saved = json.loads(state.read_text(encoding="utf-8"))
        files = [str(folder / file["filename"]) for file in saved["_data_files"]]
    if not several.exists() and split not in (default_split, saved.get("_split")):
        raise _without_splits(folder, split)
    return files


def _split_files(source: str, split: str) -> list[str]:
    """A split by the rules of datasets: what the repository's card says, else the names of its files. A folder whose
    files datasets takes for something else, such as a set of pictures, may have one that is meant."""
    is_here = Path(source).is_dir()
    name, _, revision = (source, "", "") if is_here else source.partition("@")
    existing = sorted(str(path) for path in Path(source).rglob("*") if _is_data(path)) if is_here else []
    with blamed_on(source):
        splits = datasets.load_dataset_builder(name, revision=revision or None).config.data_files or {}
    if split not in splits:
        raise ValueError(f"{source} has no split {split}: it has {', '.join(map(str, splits)) or 'none'}")
    files = [file for file in splits[split] if _is_data(file)] or existing
    if not files:
        raise ValueError(f"{source} has for {split} no file of the kinds {', '.join(FILES)}: convert it to one of them")
    if files is existing and len(existing) > 1:
        named = ", ".join(existing[:5]) + ", …" * (len(existing) > 5)
        raise ValueError(f"which files of {source} are for {split}, their names do not say: name one of {named}")
    return files
