"""The output of merge_adapter: replaced only when asked, and never half-written."""

import errno
import re
import shutil
from pathlib import Path

import pytest
import torch
from merging import merge, save_adapter, save_base

import drift_peft.merge.adapter
from drift_peft import merge_adapter
from drift_peft.checkpoints.update import LowRank


def test_overwrite_replaces_a_model_and_nothing_else(pair):
    output = merge(pair).output
    (output / "stale.json").write_text("of the last merge")
    merge(pair, overwrite=True)
    assert not (output / "stale.json").exists() and (output / "config.json").exists()
    assert {file.name for file in pair.iterdir()} == {"base", "adapter", "merged"}
    for target in (pair / "base", pair):
        (pair / "config.json").write_text("{}")
        with pytest.raises(FileExistsError, match=r"is or holds .*base, which it is made of: name another folder"):
            merge_adapter(pair / "base", pair / "adapter", target, overwrite=True, progress=False)
    (pair / "photos").mkdir()
    (pair / "photos" / "1.png").touch()
    with pytest.raises(FileExistsError, match="is no model folder, so it is not overwritten"):
        merge_adapter(pair / "base", pair / "adapter", pair / "photos", overwrite=True, progress=False)
    with pytest.raises(FileNotFoundError, match="cannot be written: there is no folder"):
        merge_adapter(pair / "base", pair / "adapter", pair / "missing" / "merged", progress=False)


def test_a_merge_computes_with_one_thread_and_leaves_their_number(pair, monkeypatch):
    seen = []

    def block(*args, original=LowRank.block):
        seen.append(torch.get_num_threads())
        return original(*args)

    monkeypatch.setattr(LowRank, "block", block)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        merge(pair)
        assert set(seen) == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_an_unwritable_output_is_refused_before_work(pair, monkeypatch):
    def mkdir(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("pathlib.Path.mkdir", mkdir)
    monkeypatch.setattr(drift_peft.merge.adapter, "Checkpoint", None)  # not even opened
    with pytest.raises(OSError, match="merged cannot be written: Permission denied"):
        merge(pair)


def test_a_mounted_volume_is_refused_before_work(pair, monkeypatch):
    monkeypatch.setattr(drift_peft.merge.adapter, "Checkpoint", None)  # not even opened
    root = re.escape(str(Path("/").resolve()))
    with pytest.raises(FileExistsError, match=rf"output {root} is a mounted volume, .*: name a folder in it"):
        merge_adapter(pair / "base", pair / "adapter", "/", overwrite=True, progress=False)


@pytest.mark.parametrize("onto", ["base", "dequantized"])
def test_an_adapter_that_adds_nothing_is_refused_before_work(pair, monkeypatch, onto):
    save_adapter(pair / "adapter", std=0)
    monkeypatch.setattr(drift_peft.merge.adapter, "write_model", None)
    with pytest.raises(ValueError, match=r"changes no weight of .* lora_B are zero, as before training"):
        merge(pair, onto=onto)


def test_a_shard_that_vanishes_is_not_the_outputs_fault(tmp_path, monkeypatch):
    save_base(tmp_path / "base", layout="sharded")
    save_adapter(tmp_path / "adapter")
    last = max((tmp_path / "base").glob("*.safetensors"))

    def block(*args, original=LowRank.block):
        last.unlink(missing_ok=True)
        return original(*args)

    monkeypatch.setattr(LowRank, "block", block)
    with pytest.raises(ValueError, match=rf"{last.name} has changed while \S+base was read"):
        merge(tmp_path)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("when", ["copying a shard", "writing a tensor", "copying a config"])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, when):
    save_base(tmp_path / "base", layout="sharded")
    save_adapter(tmp_path / "adapter")
    output = merge(tmp_path).output
    before = {file.name: file.read_bytes() for file in output.iterdir()}
    full = OSError(errno.ENOSPC, "No space left on device")

    def copyfile(source, target, copy=shutil.copyfile):
        if (when, source.name[:11]) in {("copying a shard", "model-00003"), ("copying a config", "config.json")}:
            raise full
        return copy(source, target)

    def block(self, W, rows, original=LowRank.block):
        if when == "writing a tensor" and "layers.1" in self.module:
            raise full
        return original(self, W, rows)

    monkeypatch.setattr(shutil, "copyfile", copyfile)
    monkeypatch.setattr(LowRank, "block", block)
    with pytest.raises(OSError, match=r"output .*merged could not be written: No space left on device"):
        merge(tmp_path, overwrite=True)
    assert {file.name: file.read_bytes() for file in output.iterdir()} == before
    assert {file.name for file in tmp_path.iterdir()} == {"base", "adapter", "merged"}


@pytest.mark.parametrize("when", ["writing a tensor", "copying a config"])
def test_a_killed_merge_leaves_nothing_that_looks_complete(pair, monkeypatch, when):
    class Killed(BaseException):
        pass

    def copyfile(source, target, copy=shutil.copyfile):
        if (when, source.name) == ("copying a config", "generation_config.json"):
            raise Killed
        return copy(source, target)

    def block(*args, original=LowRank.block):
        if when == "writing a tensor":
            raise Killed
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", copyfile)
        patch.setattr(LowRank, "block", block)
        patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # a killed process does not tidy up
        with pytest.raises(Killed):
            merge(pair)
    assert not (pair / "merged").exists()
    assert sorted(file.name for file in (pair / "merged.partial").iterdir()) == [".drift_peft", "model.safetensors"]
    merge(pair, verify=True)
    assert not (pair / "merged.partial").exists()
