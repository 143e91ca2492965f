"""`<output>.partial/`: where a result is written until it is complete; nothing half-written carries its name.

Whoever works there holds the lock of lock.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from .lock import only_writer

SETTINGS, UNFINISHED = "settings.json", ".tmp"
OURS = ".drift_peft"  # a file in what may be thrown away after a run that was killed
OUR_HEADERS = ("drift_prior", "drift_keep", "drift_answers")  # metadata keys of what may be replaced there
DONE = "done"  # metadata key of a finished part
SHORT = 80  # characters of values that an error shows


@contextlib.contextmanager
def claimed_output(output: Path, overwrite: bool, example: str, sources: Collection[str | Path] = ()) -> Iterator[None]:
    """Be the only one who writes this file; refused at once if it could not be written in the end.

    Args:
        overwrite: whether there may be such a file.
        example: what a file in a folder would be called, for an error.
        sources: files that it is made of, none of which it may replace.

    Raises:
        FileExistsError: it exists, or is a file of a model or one of the sources, or another process writes it.
        IsADirectoryError, FileNotFoundError, OSError: it is a folder, or cannot be written.
    """
    if output.is_dir():
        raise IsADirectoryError(f"output {output} is a folder: name a file, such as {output / example}")
    with only_writer(output):
        if output.exists() and not overwrite:
            raise FileExistsError(f"output {output} exists: name another file, or pass overwrite=True (--overwrite)")
        if output.exists() and _is_of_a_model(output):
            raise FileExistsError(f"output {output} is a file of the model in that folder: name another file")
        for source in sources:
            if output.exists() and os.path.exists(source) and os.path.samefile(output, source):
                raise FileExistsError(f"output {output} is {source}, which it is made of: name another file")
        yield


def _is_of_a_model(file: Path) -> bool:
    """Whether it holds weights, lies beside the configuration of a model or adapter, and is nothing that we wrote."""
    configured = any((file.parent / name).is_file() for name in ("config.json", "adapter_config.json"))
    if not configured or file.suffix not in (".safetensors", ".bin"):
        return False
    try:
        with safe_open(file, framework="pt") as held:
            return (held.metadata() or {}).keys().isdisjoint(OUR_HEADERS)
    except (SafetensorError, OSError):
        return True


def refuse_both(exist_ok: bool, overwrite: bool) -> None:
    """ValueError if an existing output is to be taken and to be replaced."""
    if exist_ok and overwrite:
        raise ValueError("give exist_ok=True, which takes an existing output, or overwrite=True, which replaces it")


def refuse_other(output: Path, difference: str | None) -> None:
    """FileExistsError if an existing output is another one than would be made, for such a reason as "was gated"."""
    if difference is not None:
        raise FileExistsError(
            f"output {output} exists and {difference}: name another output, or pass overwrite=True (--overwrite)"
        )


@contextlib.contextmanager
def partial_folder(output: Path, afresh: bool = False) -> Iterator[Path]:
    """A folder `<output>.partial/` beside the output, empty but for `OURS`. It is gone afterwards, whatever happened.

    Args:
        afresh: throw away what an interrupted run has left there to go on from, instead of refusing.

    Raises:
        FileExistsError: such a folder is there, and is not ours or holds an interrupted run.
        FileNotFoundError: there is no folder to write the output into.
        OSError: that folder cannot be written to.
    """
    partial = partial_path(output)
    if _read_settings(partial) is not None and not afresh:
        raise FileExistsError(
            f"{partial} holds an interrupted run: go on with it, or give it up: delete that folder, or pass "
            "overwrite=True (--overwrite)"
        )
    _start(output, partial)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def resumable_folder(
    output: Path,
    settings: dict,
    afresh: bool = False,
    parts: str = "weights",
    final: tuple[type[BaseException], ...] = (),
) -> Iterator[Path]:
    """The folder `<output>.partial/`, with what an interrupted run of the same settings has finished there.

    It is gone when all went well, when nothing was finished, or after a `final` error. Else it stays, and the exception
    that ended the run gets a note (`__notes__`) that says so. Files are finished if they are called `*.safetensors`.

    Args:
        settings: name -> value, as JSON holds it, of whatever determines the result.
        afresh: throw away what a run of other settings has left, instead of refusing.
        parts: what the files hold, in the note's words.
        final: errors that the same run would end in again.

    Raises:
        FileNotFoundError, OSError: as for `partial_folder`.
        FileExistsError: a run of other settings has left its work here.
    """
    partial = partial_path(output)
    settings = json.loads(json.dumps(settings))
    left = _read_settings(partial)
    if left != settings:
        if left is not None and not afresh:
            raise FileExistsError(
                f"{partial} holds an interrupted build that differs in {_difference(left, settings)}: take its "
                "settings or another output, or give it up: delete that folder, or pass overwrite=True (--overwrite)"
            )
        _start(output, partial, settings)
    try:
        yield partial
    except BaseException as error:
        finished = [*partial.glob("*.safetensors")]
        if not finished or isinstance(error, final):
            shutil.rmtree(partial, ignore_errors=True)
        else:
            error.add_note(
                f"{partial} keeps the {len(finished)} {parts} that are done: run the same again to go on from there"
            )
        raise
    shutil.rmtree(partial, ignore_errors=True)


def write_tensors(file: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """`save_file` with one kind of error: OSError that names the file and the reason. Nothing torn is left.

    The file's mode is what the umask makes of it; that of `save_file` is readable by its owner alone.
    """
    try:
        file.touch()
        mode = file.stat().st_mode
        save_file(tensors, file, metadata=metadata)
    except (SafetensorError, OSError) as error:
        file.unlink(missing_ok=True)
        raise OSError(f"{file} could not be written: {error}") from error
    with contextlib.suppress(OSError):  # some network drives keep no modes
        file.chmod(mode)


@contextlib.contextmanager
def gathered(folder: Path, parts: Iterable[dict[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    """All tensors of these parts, memory-mapped: each part goes to disk at once, so that they do not add up in memory.
    Their files are gone afterwards."""
    files: list[Path] = []
    tensors: dict[str, torch.Tensor] = {}
    try:
        for part in parts:
            files.append(folder / f"{len(files)}.safetensors")
            write_tensors(files[-1], part)
        for file in files:
            tensors |= load_file(file)
        yield tensors
    finally:
        tensors.clear()  # Windows deletes no file that is still mapped
        for file in files:
            file.unlink(missing_ok=True)


def finish(file: Path, tensors: dict[str, torch.Tensor], done: Any) -> None:
    """Write a part of `resumable_folder` that is done, and `done`, which JSON can hold, of it."""
    unfinished = file.with_name(f"{file.name}{UNFINISHED}")
    write_tensors(unfinished, tensors, {DONE: json.dumps(done)})
    os.replace(unfinished, file)


def finished(file: Path) -> Any:
    """What `finish` said of a part; None if it is not done, or its file did not survive a crash of the machine."""
    try:
        with safe_open(file, framework="pt") as part:
            return json.loads(part.metadata()[DONE])
    except (SafetensorError, OSError, TypeError, KeyError, ValueError):
        return None


def write_output(output: Path, content: bytes, overwrite: bool) -> None:
    """Write a file that is complete once it has its name. Raises what `partial_folder` raises."""
    with partial_folder(output, overwrite) as folder:
        try:
            (folder / output.name).write_bytes(content)
            os.replace(folder / output.name, output)
        except OSError as error:
            raise OSError(f"output {output} cannot be written: {error.strerror}") from error


def partial_path(output: Path) -> Path:
    """`<output>.partial`."""
    return output.with_name(output.name + ".partial")


def _start(output: Path, partial: Path, settings: dict | None = None) -> None:
    """The folder anew, and the settings in it if there are any."""
    _clear(partial)
    try:
        partial.mkdir()
        (partial / OURS).touch()
        if settings is not None:
            (partial / SETTINGS).write_text(json.dumps(settings, indent=1), encoding="utf-8")
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"output {output} cannot be written: {error.strerror}") from error


def _clear(partial: Path) -> None:
    """What a killed run has left. FileExistsError for what somebody else has there."""
    existing = {*os.listdir(partial)} if os.path.isdir(partial) else {""} if os.path.lexists(partial) else set()
    if existing and OURS not in existing:
        raise FileExistsError(
            f"{partial} is in the way, which is where the output is written until it is complete: rename or delete it, "
            "or name another output"
        )
    shutil.rmtree(partial, ignore_errors=True)


def _read_settings(partial: Path) -> dict | None:
    """None where there is no such folder, or nothing in it that could be trusted."""
    if not os.path.exists(partial / OURS):  # which a name that is too long is not
        return None
    try:
        settings = json.loads((partial / SETTINGS).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return settings if isinstance(settings, dict) else None


def _difference(left: dict, settings: dict) -> str:
    """Keys whose values differ, with the values where they are short."""
    differing = []
    for key in settings | left:
        before, now = left.get(key), settings.get(key)
        if before != now:
            differing.append(key if len(f"{before}{now}") > SHORT else f"{key} ({before}, now {now})")
    return ", ".join(differing)
