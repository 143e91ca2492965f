"""One writer at a time: a lock beside the output, which ends with the process that holds it, however that ends."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryFile

from filelock import FileLock, Timeout


@contextlib.contextmanager
def only_writer(output: Path) -> Iterator[None]:
    """Hold `<output>.lock`, which says who works there and is gone afterwards.

    That of a killed process stays and holds nobody up.

    Raises:
        FileExistsError: another process, or another thread of this one, writes this output.
        FileNotFoundError: there is no folder to write the output into.
        OSError: that folder cannot be written to.
        ValueError: the output's path is not UTF-8, so that safetensors could not write there in the end.
    """
    try:
        str(output).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"output {output} cannot be written: its path is not UTF-8, and safetensors writes to no other: name "
            "another folder"
        ) from error
    if not output.parent.is_dir():
        missing = f"there is no folder {output.parent}{home_hint(output)}"
        raise FileNotFoundError(f"output {output} cannot be written: {missing}")
    file = output.with_name(f"{output.name}.lock")
    lock = FileLock(file)
    _acquire(lock, file, output)
    try:
        if _read(file).split("\n")[0] != str(os.getpid()):  # else a soft lock's record, by which others take it over
            with contextlib.suppress(OSError):  # of a full disk; Windows lets nobody write into a locked file
                file.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows keeps open files; there, filelock deletes it
            file.unlink()  # while it is held: who takes it now makes another
        lock.release()


def home_hint(path: str | Path) -> str:
    """What an error says in the end of a path that begins with ~, which Python takes as it is; "" of any other."""
    given = str(path).removeprefix(f"{os.getcwd()}{os.sep}")  # which an output that was resolved has before it
    whole = os.path.expanduser(given)
    return "" if whole == given else f": ~ stands for your folder in a shell alone, so write {whole}"


def _acquire(lock: FileLock, file: Path, output: Path) -> None:
    """FileExistsError if another holds the lock; OSError if there can be none."""
    while True:
        holder = _holder(file)  # now, since older versions of filelock empty the file as they try
        try:
            lock.acquire(timeout=0)
            return
        except Timeout as error:
            if file.exists():
                who = _holder(file) or holder or "another process"
                raise FileExistsError(
                    f"output {output} is being written by {who}: wait until it is done, or name another output"
                ) from error
        except OSError as error:
            raise OSError(f"output {output} cannot be written: {error.strerror}") from error
        # Its holder has finished meanwhile; or nothing can be made here, as in /proc, of which filelock says the same.
        try:
            TemporaryFile(dir=file.parent).close()
        except OSError as error:
            raise OSError(f"output {output} cannot be written: {file.parent} takes no file") from error


def _holder(file: Path) -> str:
    """Who holds the lock. Where the filesystem has no flock, filelock says so itself: process, host (with the PID
    namespace of a container) and start, a line each."""
    process, *rest = _read(file).split("\n")
    return f"process {process} on {rest[0].partition('?pidns-')[0]}" if rest else process


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""
