"""hub.py: what is freed again, also after a kill, and what is kept."""

import contextlib
import json
import os
import signal
from pathlib import Path
from unittest.mock import Mock

import huggingface_hub
import pytest
import torch
from hub_models import UP, Q, blobs, weights
from huggingface_hub import DeleteCacheStrategy, hf_hub_download
from older import CANNOT_FREE, FREES_FILES
from processes import Program

from drift_peft.checkpoints.checkpoint import Checkpoint


@pytest.fixture
def record(tmp_path):
    if not FREES_FILES:
        pytest.skip(CANNOT_FREE)
    return tmp_path / "downloads.json"


def test_release_frees_what_was_fetched(hub, llm, tmp_path, record):
    hub.add("org/model", llm)
    opened = Checkpoint("org/model", record=record)
    file = opened.keys[Q]
    before = blobs(tmp_path)
    tensor = opened.tensor(Q)
    assert len(blobs(tmp_path)) == len(before) + 1 and json.loads(record.read_text()) == [str(file)]
    opened.release(file)
    assert blobs(tmp_path) == before and not file.is_symlink() and json.loads(record.read_text()) == []
    assert torch.equal(tensor, Checkpoint(llm).tensor(Q))  # still mapped
    opened.release(file)  # nothing left to do
    assert torch.equal(opened.tensor(Q), tensor)  # and fetched again
    assert weights(hub.fetched("org/model")) == [file.name, file.name]
    opened.release(opened.keys[UP])  # never fetched
    assert len(blobs(tmp_path)) == len(before) + 1


def test_release_keeps_what_was_cached(hub, llm, tmp_path, record):
    hub.add("org/model", llm)
    cached = hf_hub_download("org/model", Checkpoint(llm).keys[Q].name)
    before = blobs(tmp_path)
    opened = Checkpoint("org/model", record=record)
    opened.tensor(Q)
    opened.release(opened.keys[Q])
    assert os.path.exists(cached) and before.items() <= blobs(tmp_path).items() and not record.exists()


@pytest.mark.parametrize("linked", [True, False])
def test_release_keeps_what_another_revision_brought(hub, llm, tmp_path, record, linked):
    hub.add("org/model", llm)
    old = Path(hf_hub_download("org/model", Checkpoint(llm).keys[Q].name))
    blob = old.resolve()
    if not linked:
        old.unlink()
    (llm / "README.md").write_text("another commit with the same weights")
    hub.add("org/model", llm)
    opened = Checkpoint("org/model", record=record)
    hub.forget()
    opened.tensor(Q)
    opened.release(opened.keys[Q])
    assert weights(hub.fetched("org/model")) == [] and blob.exists() and old.exists() == linked


def test_release_keeps_what_another_revision_uses_since(hub, llm, record):
    hub.add("org/model", llm)
    opened = Checkpoint("org/model", record=record)
    opened.tensor(Q)
    (llm / "README.md").write_text("another commit with the same weights")
    other = hf_hub_download("org/model", opened.keys[Q].name, revision=hub.add("org/model", llm))
    opened.release(opened.keys[Q])
    assert os.path.exists(other) and not opened.keys[Q].exists()


def test_an_old_client_cannot_release(hub, llm, tmp_path, monkeypatch):
    hub.add("org/model", llm)
    monkeypatch.delattr(huggingface_hub.HFCacheInfo, "delete_files", raising=False)
    with pytest.raises(ValueError, match=r"huggingface_hub .* cannot free single files .*: leave out delete_shards"):
        Checkpoint("org/model", record=tmp_path / "downloads.json")
    assert hub.requests == []


def test_release_without_a_hub(llm):
    opened = Checkpoint(llm)
    before = opened.tensor(Q).clone()
    opened.release(opened.keys[Q])
    assert torch.equal(opened.tensor(Q), before)


def test_release_of_bytes_that_repositories_share(hub, llm, tmp_path, record):
    """Where the hub stores files as Xet, the client keeps their bytes once for all repositories of the cache."""
    shared = pytest.importorskip("huggingface_hub.utils._shared_blobs")
    hub.add("org/model", llm)
    opened = Checkpoint("org/model", record=record)
    opened.tensor(Q)
    file, cache, hash = opened.keys[Q], tmp_path / "cache" / "hub", "ab" * 32
    blob = (file.parent / os.readlink(file)).resolve()
    assert shared.publish_blob_to_shared_store(
        blob_path=str(blob), xet_hash=hash, cache_dir=str(cache), expected_size=blob.stat().st_size
    )
    stored = shared.shared_blob_path(cache, hash)
    assert file.resolve() == stored and torch.equal(opened.tensor(Q), Checkpoint(llm).tensor(Q))
    opened.release(file)
    assert not stored.exists() and not blob.is_symlink()


KILLED = """
import os, signal, sys
from pathlib import Path
import huggingface_hub.file_download as client
from drift_peft.checkpoints.checkpoint import Checkpoint

opened = Checkpoint("org/model", record=Path(sys.argv[2]))
client._create_symlink = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
opened.tensor(sys.argv[1])
"""


class Killed(BaseException):
    """Ends a build as a signal does."""


SIGKILL = pytest.param(
    "after the download, by SIGKILL", marks=pytest.mark.skipif(os.name == "nt", reason="Windows has no such signal")
)


@pytest.mark.parametrize("when", ["before the download", SIGKILL, "after all"])
def test_a_killed_build_still_knows_what_it_brought(hub, llm, tmp_path, monkeypatch, record, when):
    hub.add("org/model", llm)
    cached = hf_hub_download("org/model", Checkpoint(llm).keys[UP].name)
    if when == "after the download, by SIGKILL":  # and before the link to what came
        status, _, err = Program(tmp_path, "-c", KILLED, Q, record, **hub.env(tmp_path / "cache")).ended()
        assert status == -signal.SIGKILL, err
    else:
        opened = Checkpoint("org/model", record=record)
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            if when == "before the download":
                patch.setattr(huggingface_hub.file_download, "http_get", Mock(side_effect=Killed))
            opened.tensor(Q)

    opened = Checkpoint("org/model", record=record)
    assert json.loads(record.read_text()) == [str(opened.keys[Q])]
    for raw in (Q, UP):
        assert torch.equal(opened.tensor(raw), Checkpoint(llm).tensor(raw))
        opened.release(opened.keys[raw])
    assert not opened.keys[Q].exists() and os.path.exists(cached)
    linked = {path.resolve().name for path in opened.folder.iterdir()}
    assert opened.keys[UP].resolve().name in linked and blobs(tmp_path).keys() == linked


def test_killed_while_it_frees_a_file(hub, llm, tmp_path, record, monkeypatch):
    """The client takes a file's name away before its bytes, and nobody who looks for the name would find these."""
    hub.add("org/model", llm)
    opened = Checkpoint("org/model", record=record)
    before = blobs(tmp_path)
    opened.tensor(Q)

    class Killed(BaseException):
        pass

    def execute(strategy):
        for file in strategy.files:
            file.unlink()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(DeleteCacheStrategy, "execute", execute)
        with pytest.raises(Killed):
            opened.release(opened.keys[Q])
    assert len(blobs(tmp_path)) == len(before) + 1
    opened = Checkpoint("org/model", record=record)
    opened.release(opened.keys[Q])
    assert blobs(tmp_path) == before and json.loads(record.read_text()) == []


def test_without_the_record_nothing_of_an_earlier_run_is_freed(hub, llm, record):
    hub.add("org/model", llm)
    Checkpoint("org/model", record=record).tensor(Q)
    opened = Checkpoint("org/model")
    opened.tensor(Q)
    opened.release(opened.keys[Q])
    assert opened.keys[Q].exists()


def test_a_failed_download_is_not_on_the_record(hub, llm, record):
    hub.add("org/model", llm)
    opened = Checkpoint("org/model", record=record)
    hub.cut(opened.keys[Q].name, size=100)
    with pytest.raises(OSError):
        opened.tensor(Q)
    hub.heal()
    kept = hf_hub_download("org/model", opened.keys[Q].name)  # by the user, in between
    opened.tensor(Q)
    opened.release(opened.keys[Q])
    assert os.path.exists(kept) and json.loads(record.read_text()) == []


def test_a_damaged_cache_is_left_alone(hub, llm, record):
    hub.add("org/model", llm)
    opened = Checkpoint("org/model", record=record)
    opened.tensor(Q)
    (opened.folder / "config.json").resolve().unlink()
    with pytest.warns(UserWarning, match="could not be freed: the hub's cache around it is damaged"):
        opened.release(opened.keys[Q])
