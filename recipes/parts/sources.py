"""Where samples come from: files, folders and hub data sets, read as rows by datasets."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import datasets
import pyarrow as pa
from filelock import FileLock, Timeout
from huggingface_hub import snapshot_download

from drift_peft.keeping import PICTURES, explained

from .images import Root

CATEGORY = "category"  # key of a sample
FILES = (".json", ".jsonl", ".parquet")


def find_files(source: str, split: str, images: str | Path | None, streaming: bool) -> tuple[list[str], Root]:
    """The files of a source's split, and where its images are. ValueError if there are none."""
    path = Path(source)
    if path.is_dir():
        files, root = _split_files(source, split), Root(source, path.resolve().name)
    elif path.exists() or path.suffix in FILES:
        if not path.exists():
            raise ValueError(f"there is no file {source} here: a path begins where the command is run")
        if path.suffix not in FILES:
            raise ValueError(f"{source} is no file to be read: take one of {', '.join(FILES)}, a folder, or a hub id")
        files, root = [source], Root(str(path.parent), path.resolve().parent.name)
    else:
        files = _split_files(source, split)
        folder, name, commit = re.match(r"(hf://datasets/([^/]+/[^/]+)@([^/]+))/", files[0]).groups()
        if images is None and not streaming:
            patterns = [f"*{suffix}" for suffix in (*PICTURES, *map(str.upper, PICTURES))]
            with explained(source, "cannot be read"):
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
    if file.endswith(".parquet"):
        kind, options = "parquet", {}
    else:
        by = "line" if file.endswith(".jsonl") else "document"
        features = datasets.Features({"text": datasets.Value("string")})
        kind, options = "text", {"sample_by": by, "encoding": "utf-8-sig", "features": features}
    with explained(file, "cannot be read"):
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
    if file.endswith(".parquet"):
        rows = table.to_pylist()
    elif file.endswith(".jsonl"):
        rows = table["text"].to_pylist()
    else:
        (text,) = table["text"].to_pylist()
        rows = _read_document(text, file)
        indices = range(len(rows))
    yield from ((i + 1, row) for i, row in zip(indices, rows, strict=True) if not isinstance(row, str) or row.strip())


def read_categories(data: str, split: str, key: str | None) -> list[str]:
    """What each sample has under a key; "all" if it is not asked for by name, and not there."""
    values = []
    for file in find_files(data, split, None, False)[0]:
        rows = read_file(file, streaming=False)
        if file.endswith(".parquet"):  # whose images are not to be read for this
            found = (key or CATEGORY) in rows.column_names
            values += rows.with_format(None)[key or CATEGORY] if found else [None] * len(rows)
            continue
        for _, sample in samples(rows[:], range(len(rows)), file):
            sample = json.loads(sample) if isinstance(sample, str) else sample
            values.append(sample.get(key or CATEGORY))
    if key and all(value is None for value in values):
        raise ValueError(f"no sample of {data} has the category {key}")
    return ["all" if value is None else str(value) for value in values]


def _read_document(text: str, file: str) -> list[dict | str]:
    """A list of samples, one sample, or one in each line."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("["):
            raise ValueError(f"{file} is no valid JSON: {error}") from error
        return text.split("\n")
    return content if isinstance(content, list) else [content]


def _split_files(source: str, split: str) -> list[str]:
    """A split by the rules of datasets: what the repository's card says, else the names of its files."""
    name, _, revision = (source, "", "") if Path(source).is_dir() else source.partition("@")
    with explained(source, "cannot be read"):
        found = datasets.load_dataset_builder(name, revision=revision or None).config.data_files or {}
    if split not in found:
        raise ValueError(f"{source} has no split {split}: it has {', '.join(map(str, found)) or 'none'}")
    files = [file for file in found[split] if Path(file).suffix in FILES]
    if not files:
        raise ValueError(f"{source} has for {split} no file of the kinds {', '.join(FILES)}: convert it to one of them")
    return files
