"""A file that cannot be written whole stays as it was, and nothing lies beside it."""

import errno
import os
import threading

import pytest

from drift_peft import DriftConfig
from drift_peft.atomic import write

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("error", [FULL, Exception("No space left\non device")])  # the tokenizers library's is bare
def test_what_cannot_be_written_stays_as_it_was(error, tmp_path):
    file = tmp_path / "x.json"
    file.write_text("before")

    def half(unfinished):
        unfinished.write_text("a half")
        raise error

    with pytest.raises(OSError) as failed:
        write(file, half)
    assert str(failed.value) == f"{file} could not be written ({' '.join(str(error).split())})"
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"] and file.read_text() == "before"


def test_two_that_write_one_file_do_not_disturb_each_other(tmp_path):
    """As ranks do that all save an adapter into one folder."""
    file = tmp_path / "x.json"

    def slow(unfinished):
        unfinished.write_text("first")
        other = threading.Thread(target=write, args=(file, lambda own: own.write_text("second")))
        other.start()
        other.join()
        assert file.read_text() == "second" and unfinished.read_text() == "first"

    write(file, slow)
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"] and file.read_text() == "first"


@pytest.mark.parametrize("name", ["drift_config.json", "README.md"])
def test_a_full_disk_leaves_nothing_beside_an_adapter(name, tmp_path, monkeypatch):
    config, replace = DriftConfig(prior="prior.safetensors"), os.replace
    (tmp_path / "README.md").write_text("---\nlibrary_name: peft\n---\n# Mine\n")
    config.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(source, destination):
        if destination.name == name:
            raise FULL
        replace(source, destination)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=rf"{name} could not be written \(\[Errno \d+\] No space left on device\)$"):
        config.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
