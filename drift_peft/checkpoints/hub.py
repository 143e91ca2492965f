"""Model repositories on the hub: resolved to a commit, fetched file by file, and what was fetched freed again."""

import contextlib
import errno
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub import (
    HFCacheInfo,
    HfFileSystem,
    constants,
    hf_hub_download,
    list_repo_files,
    parse_safetensors_file_metadata,
    scan_cache_dir,
    snapshot_download,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)

from ..atomic import write_text
from ..warn import first_line, warn
from .lock import home_hint
from .shards import Header, load_bin, read_dtype

DESCRIPTIONS = ("config.json", "adapter_config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json")
"""Small files that say what a repository is; downloaded first."""

BLOCK = 1 << 20  # bytes that are asked for at once where only a table of contents is read


class Repository:
    """A model repository at one commit. Its files come into the hub's cache when they are fetched.

    Args:
        name: hub id.
        revision: branch, tag or commit.
        record: JSON file in which to note the weights that this object brings into the cache, each before its download,
            so that the next one that is given the same record knows them, even if this one was killed. While there is
            no folder to write it into, this object alone knows them.

    Attributes:
        name, commit: id and the commit that the revision stands for.
        folder: its snapshot in the cache.

    Raises:
        ValueError: a record is given, and the installed huggingface_hub cannot free files.
        FileNotFoundError, PermissionError, OSError: see `download`.
    """

    def __init__(self, name: str, revision: str | None = None, record: Path | None = None):
        if record is not None and not hasattr(HFCacheInfo, "delete_files"):
            raise ValueError(
                f"huggingface_hub {huggingface_hub.__version__} cannot free single files of its cache: leave out "
                "delete_shards, or install huggingface_hub 1.32 or newer"
            )
        self.name = name
        self.folder = download(name, revision, DESCRIPTIONS)
        self.commit = self.folder.name  # the cache names a snapshot's folder after its commit
        self._record = record
        known = record is not None and record.exists()
        self._brought: set[str] = set(json.loads(record.read_text(encoding="utf-8"))) if known else set()

    def files(self) -> set[str]:
        """Names of its files; of those in the cache where there is no network, or the hub is in trouble."""
        with _explained(self.name, self.commit, "the list of files"):
            try:
                return {*list_repo_files(self.name, revision=self.commit)}
            except Exception as error:  # of one HTTP library or another, by the client's version
                if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
                    raise
        return {path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*")}

    def header(self, file: str) -> Header:
        """Shapes and dtypes of a weight file, of which only the table of contents is read."""
        name = f"{file} of {self.name}"
        with _explained(self.name, self.commit, file):
            if file.endswith(".bin"):
                with HfFileSystem().open(f"{self.name}/{file}", revision=self.commit, block_size=BLOCK) as remote:
                    tensors = load_bin(remote, name, map_location="meta")
                return {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
            infos = parse_safetensors_file_metadata(self.name, file, revision=self.commit).tensors
            return {key: (tuple(info.shape), read_dtype(info.dtype, name)) for key, info in infos.items()}

    def fetch(self, file: str) -> Path:
        """Where the file is in the cache; downloaded if it is not there."""
        path = self.folder / file
        if path.exists():
            return path
        with _explained(self.name, self.commit, file):
            # Also cached: another revision's copy of the same bytes. And one that is noted already is ours, cached or
            # not, because a build was killed while or after it came.
            cached = hf_hub_download(self.name, file, revision=self.commit, dry_run=True).is_cached
            ours = not cached and str(path) not in self._brought
            if ours:
                self._note(self._brought | {str(path)})
            try:
                return Path(hf_hub_download(self.name, file, revision=self.commit))
            except Exception:
                if ours:  # not brought after all; whoever fetches it now may keep it
                    self._note(self._brought - {str(path)})
                raise

    def release(self, file: str) -> None:
        """Take a file out of the cache if this object, or one with the same record, brought it; else do nothing."""
        path = self.folder / file
        if str(path) not in self._brought:
            return
        # The client knows which bytes other revisions share, and where it keeps those that repositories share.
        cache = scan_cache_dir(self.folder.parents[2])
        cached = [f for repo in cache.repos for revision in repo.revisions for f in revision.files]
        if path.exists():
            entries = [entry for entry in cached if entry.file_path == path]
            # It takes the name away first. Who is killed then finds the bytes by this note.
            self._note(self._brought | {str(entry.blob_path) for entry in entries})
            cache.delete_files(*entries).execute()
            if path.exists():
                warn(f"{path} could not be freed: the hub's cache around it is damaged")
        bytes_left = {noted for noted in self._brought if Path(noted).parent == self.folder.parents[1] / "blobs"}
        for blob in bytes_left - {str(entry.blob_path) for entry in cached if entry.file_path != path}:
            Path(blob).unlink(missing_ok=True)
        self._note(self._brought - bytes_left - {str(path)})

    def _note(self, brought: set[str]) -> None:
        if self._record is not None and self._record.parent.is_dir():
            write_text(self._record, json.dumps(sorted(brought)))
        self._brought = brought


def split_revision(source: str, revision: str | None = None) -> tuple[str, str | None]:
    """Hub id and revision of `id` or `id@revision`. ValueError when a revision is given twice."""
    repository, _, inline = source.partition("@")
    if inline and revision:
        raise ValueError(f"{source} names the revision {inline}, but revision={revision!r} was given as well")
    return repository, inline or revision


def at_revision(source: str, revision: str | None = None) -> str:
    """`id@revision`, or the id alone: what `split_revision` takes apart."""
    return f"{source}@{revision}" if revision else source


def download(repository: str, revision: str | None, files: Sequence[str]) -> Path:
    """Folder of a hub snapshot that holds `files` (patterns), from the cache where they are in it.

    Raises:
        FileNotFoundError: there is no such repository or revision, or no network and not everything in the cache.
        PermissionError: the repository is gated.
        OSError: the download broke off, or there is no space left.
    """
    with _explained(repository, revision, None):
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(files)))


def folder_of(source: str | Path, revision: str | None, files: Sequence[str]) -> Path:
    """An existing local path as it is; else the hub snapshot, of `id` or `id@revision`, as of `download`."""
    if not revision and Path(source).exists():
        return Path(source)
    return download(*split_revision(str(source), revision), files)


def cached_snapshot(repository: str, revision: str) -> Path | None:
    """The folder of a snapshot that is in the hub's cache, maybe in part; the hub is not asked."""
    try:
        return Path(snapshot_download(repository, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def is_listed(repository: str, folder: Path) -> bool:
    """Whether it is known which files a snapshot has; else the client takes what is in its folder for all of them."""
    if (folder.parents[1] / "trees" / f"{folder.name}.json").exists():  # as newer clients keep it
        return True
    try:
        list_repo_files(repository, revision=folder.name)
    except Exception:  # of one HTTP library or another, by the client's version
        return False
    return True


@contextlib.contextmanager
def _explained(repository: str, revision: str | None, file: str | None) -> Iterator[None]:
    """What the hub's client raises (its own, httpx's and the system's errors), as one sentence."""
    at = f"{repository} at revision {revision}" if revision else repository
    what = f"{file} of {at}" if file else at
    try:
        yield
    except HFValidationError as error:
        unknown = f"{repository} is neither an existing path nor a hub id{home_hint(repository)}"
        raise FileNotFoundError(unknown) from error
    except SafetensorsParsingError as error:
        raise ValueError(f"{what} is truncated or no safetensors file on the hub") from error
    except GatedRepoError as error:
        raise PermissionError(
            f"{repository} is gated: accept its terms at {constants.ENDPOINT}/{repository}, then `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"{repository} has no revision {revision} on the hub") from error
    except RemoteEntryNotFoundError as error:
        raise FileNotFoundError(f"{at} lacks {file} on the hub") from error
    except Exception as error:
        if isinstance(error, ValueError) and not isinstance(error, HfHubHTTPError):
            raise  # ours, on what a file holds
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if isinstance(error, RepositoryNotFoundError) or status in (401, 403):
            raise FileNotFoundError(
                f"{repository} is no local path, and on the hub it does not exist or needs a login: check the name, "
                "or run `hf auth login`"
            ) from error
        causes = [error]
        while cause := causes[-1].__cause__ or causes[-1].__context__:
            causes.append(cause)
        if any(os.strerror(errno.ENOSPC) in str(cause) for cause in causes):
            raise OSError(
                f"no space left for {what} in {constants.HF_HUB_CACHE}: free some, or set HF_HOME to another disk; "
                "`drift-peft prior build` needs less with --delete-shards"
            ) from error
        # What is not in the cache either: the client then says so at length, and what helps is the first cause.
        absent = isinstance(error, LocalEntryNotFoundError)
        reason = first_line(causes[-1] if absent else error).rstrip(".")
        kind = FileNotFoundError if absent or file is None else OSError
        nowhere = "" if file else " is no local path and"
        raise kind(f"{what}{nowhere} cannot be fetched from the hub: {reason}") from error
