"""hub.py: what is fetched from a hub repository and when, what is freed again, and what is said when it does not work.

A real client talks to a small hub on this machine.
"""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import huggingface_hub
import pytest
import torch
from hub import Hub
from huggingface_hub import DeleteCacheStrategy, constants, hf_hub_download
from older import CANNOT_FREE, FREES_FILES, leaves_nothing
from test_checkpoint import Malicious, save_four_bit, save_tokenizer, to_bin
from tiny import save_layout, tiny_llm

from drift_peft.checkpoints.checkpoint import INDEX, Checkpoint

Q = "model.layers.0.self_attn.q_proj.weight"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with Hub() as hub:
        hub.use(monkeypatch, tmp_path / "cache")
        yield hub


@pytest.fixture
def llm(tmp_path):
    """A folder with a text model in several shards."""
    return save_layout(tiny_llm("llava"), tmp_path / "llm", max_shard_size="20KB")


def weights(names):
    return [name for name in names if name.endswith((".safetensors", ".bin"))]


def blobs(tmp_path):
    """Sizes of what the cache holds, by name."""
    return {path.name: path.stat().st_size for path in (tmp_path / "cache/hub").glob("models--*/blobs/*")}


# What is fetched


@pytest.mark.parametrize("size", ["5GB", "20KB"])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_come_when_they_are_read(hub, tmp_path, kind, size):
    folder = save_layout(tiny_llm("llava"), tmp_path / "llm", max_shard_size=size)
    local = Checkpoint(to_bin(folder) if kind == "bin" else folder)
    commit = hub.add("org/model", folder)
    opened = Checkpoint("org/model@main")
    assert (opened.source, opened.revision, opened.folder.name) == ("org/model", commit, commit)
    assert opened.claims == local.claims and opened.identity == ["org/model", commit]
    assert [file.name for file in opened.files] == [file.name for file in local.files]
    for raw in local.keys:
        assert (opened.shape(raw), opened.dtype(raw)) == (local.shape(raw), local.dtype(raw))
        assert opened.keys[raw].name == local.keys[raw].name
    assert weights(hub.fetched("org/model")) == []
    assert set(weights(hub.peeked("org/model"))) == {file.name for file in local.files}

    for raw in (Q, UP, Q):
        assert torch.equal(opened.tensor(raw), local.tensor(raw))
    assert weights(hub.fetched("org/model")) == list(dict.fromkeys(local.keys[raw].name for raw in (Q, UP)))
    assert opened.fetch(opened.keys[Q]).read_bytes() == local.keys[Q].read_bytes()


def test_revisions(hub, llm, tmp_path):
    other = save_layout(tiny_llm("llava", seed=1), tmp_path / "other")
    hub.add("org/model", llm)
    commit = hub.add("org/model", other, "v2")
    for opened in (Checkpoint("org/model@v2"), Checkpoint("org/model", "v2"), Checkpoint("org/model", commit)):
        assert opened.revision == commit and torch.equal(opened.tensor(Q), Checkpoint(other).tensor(Q))
    with pytest.raises(ValueError, match="names the revision main, but revision='v2'"):
        Checkpoint("org/model@main", revision="v2")


def test_an_existing_path_wins_over_a_hub_id(hub, llm, monkeypatch):
    monkeypatch.chdir(llm.parent)
    assert Checkpoint("llm").revision is None and hub.requests == []


def test_what_is_refused_is_not_downloaded(hub, llm):
    config = json.loads((llm / "config.json").read_text())
    (llm / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    hub.add("org/model", llm)
    with pytest.raises(ValueError, match=r"org/model is quantized \(gptq\)"):
        Checkpoint("org/model")
    hub.add("org/gguf", {"model-q4.gguf": b"GGUF"})
    with pytest.raises(ValueError, match="org/gguf is GGUF, which is quantized"):
        Checkpoint("org/gguf")
    torch.save({"a": Malicious()}, llm / "pytorch_model.bin")
    hub.add("org/bin", {name: (llm / name).read_bytes() for name in ("generation_config.json", "pytorch_model.bin")})
    hub.add("org/bin", {**hub.files("org/bin"), "config.json": json.dumps(config).encode()})
    with pytest.raises(ValueError, match=r"pytorch_model.bin of org/bin calls \w+\.system, and code of a weight file"):
        Checkpoint("org/bin")
    assert weights([*hub.fetched("org/model"), *hub.fetched("org/bin")]) == []


def test_four_bit_weights(hub, llm):
    save_four_bit(llm)
    hub.add("org/model", llm)
    opened, local = Checkpoint("org/model", dequantize=True), Checkpoint(llm, dequantize=True)
    assert opened.shape(Q) == (64, 64) and torch.equal(opened.tensor(Q), local.tensor(Q))


def test_the_tokenizer_comes_when_it_is_asked_for(hub, llm):
    expected = save_tokenizer(llm, "<unk>", "a", "b")
    hub.add("org/model", llm)
    opened = Checkpoint("org/model")
    assert not [name for name in hub.fetched("org/model") if "token" in name]
    assert opened.vocabulary() == expected
    assert weights(hub.fetched("org/model")) == []


# Without a network


@pytest.mark.parametrize("how", ["HF_HUB_OFFLINE", "no connection"])
@pytest.mark.parametrize("listed", [True, False])
def test_a_cached_repository_needs_no_network(hub, llm, monkeypatch, how, listed):
    save_tokenizer(llm, "<unk>", "a")
    commit = hub.add("org/model", llm)
    if listed:
        opened = Checkpoint("org/model")
        opened.vocabulary()
        for file in opened.files:
            opened.fetch(file)
    else:  # as transformers downloads: file by file, without a list of all
        for name in hub.files("org/model"):
            hf_hub_download("org/model", name)
    hub.stop()
    if how == "HF_HUB_OFFLINE":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the client tries again for half a minute
    opened, local = Checkpoint("org/model"), Checkpoint(llm)
    assert opened.revision == commit and opened.keys.keys() == local.keys.keys()
    assert all(torch.equal(opened.tensor(raw), local.tensor(raw)) for raw in local.keys)
    if listed or how == "HF_HUB_OFFLINE":  # else the client tries for half a minute before it takes what is there
        assert opened.vocabulary() == local.vocabulary()


# What is freed


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
        arguments = [sys.executable, "-c", KILLED, Q, str(record)]
        killed = subprocess.run(arguments, env=hub.env(tmp_path / "cache"), capture_output=True)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
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


# What is said when it does not work


def nothing(hub, llm):
    pass


def gated(hub, llm):
    hub.fail("org/model", status=403, code="GatedRepo")


def private(hub, llm):
    hub.fail("org/model", status=401)


def server_error(hub, llm):
    hub.fail("org/model", status=501)


def stopped(hub, llm):
    hub.stop()


def no_shard(hub, llm):
    hub.add("org/model", {name: content for name, content in hub.files("org/model").items() if "00003" not in name})


def damaged_shard(hub, llm):
    shard = sorted(llm.glob("*.safetensors"))[0]
    shard.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    hub.add("org/model", llm)


def index_of_another_model(hub, llm):
    index = json.loads((llm / INDEX).read_text())
    index["weight_map"]["model.extra.weight"] = sorted(index["weight_map"].values())[0]
    (llm / INDEX).write_text(json.dumps(index))
    hub.add("org/model", llm)


def only_config(hub, llm):
    hub.add("org/model", {"config.json": (llm / "config.json").read_bytes()})


@pytest.mark.parametrize(
    ("spoil", "source", "error", "message"),
    [
        (nothing, "org/none", FileNotFoundError, "org/none is no local path, and on the hub it does not exist or"),
        (nothing, "org/model@v9", FileNotFoundError, "org/model has no revision v9 on the hub"),
        (nothing, "a/b/c", FileNotFoundError, "a/b/c is neither an existing path nor a hub id"),
        (gated, "org/model", PermissionError, r"org/model is gated: accept its terms at http://\S+/org/model, then"),
        (private, "org/model", FileNotFoundError, r"org/model is no local path, and on the hub .* needs a login"),
        (server_error, "org/model", FileNotFoundError, "org/model is no local path and cannot be fetched .*: .*501"),
        (stopped, "org/model", FileNotFoundError, "org/model is no local path and cannot .*: .*Connection refused"),
        (no_shard, "org/model", FileNotFoundError, r"org/model at revision \w+ lacks model-00003-of-\S+ on the hub"),
        (damaged_shard, "org/model", ValueError, r"model-00001-of-\S+ of org/model .* is truncated or no safetensors"),
        (index_of_another_model, "org/model", ValueError, "lacks model.extra.weight, which the index of org/model"),
        (only_config, "org/model", FileNotFoundError, "org/model holds none of model.safetensors, .*on the hub or, if"),
    ],
)  # fmt: skip
def test_refused_when_opened(hub, llm, spoil, source, error, message):
    hub.add("org/model", llm)
    spoil(hub, llm)
    with pytest.raises(error, match=message) as caught:
        Checkpoint(source)
    assert "\n" not in str(caught.value)


def offline(hub, file, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


CUT = r"model-0\S+ of org/model .* cannot be fetched .*: .*should be of size \d+ but has size 100"
FULL = r"no space left for model-0\S+ of org/model .* in \S+cache/hub: free .*--delete-shards"


def cut_short(hub, file, monkeypatch):
    hub.cut(file.name, size=100)


def full_disk(hub, file, monkeypatch):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(huggingface_hub.file_download, "http_get", Mock(side_effect=full))


def vanished(hub, file, monkeypatch):
    hub.fail(f"resolve/.*/{file.name}", 404, "EntryNotFound")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (offline, r"model-0\S+ of org/model at revision \w+ cannot be fetched from the hub: .*offline mode is enabled"),
        pytest.param(cut_short, CUT, marks=leaves_nothing),
        pytest.param(full_disk, FULL, marks=leaves_nothing),
        (vanished, r"org/model at revision \w+ lacks model-0\S+ on the hub"),
    ],
)  # fmt: skip
def test_a_shard_that_does_not_come(hub, llm, tmp_path, monkeypatch, spoil, message):
    hub.add("org/model", llm)
    opened = Checkpoint("org/model")
    before = blobs(tmp_path)
    spoil(hub, opened.keys[Q], monkeypatch)
    with pytest.raises(OSError, match=message) as caught:
        opened.tensor(Q)
    assert "\n" not in str(caught.value)
    assert blobs(tmp_path) == before  # nothing half-written
    hub.heal()
    monkeypatch.undo()


def test_a_truncated_shard_in_the_cache(hub, llm):
    hub.add("org/model", llm)
    opened = Checkpoint("org/model")
    file = opened.fetch(opened.keys[Q])
    content = file.read_bytes()
    file.resolve().write_bytes(content[:-9])
    for read in (lambda: opened.tensor(Q), lambda: Checkpoint("org/model")):
        with pytest.raises(ValueError, match=r"model-0\S+ is truncated or no safetensors file .*; fetch it again"):
            read()


def test_a_damaged_cache_is_left_alone(hub, llm, record):
    hub.add("org/model", llm)
    opened = Checkpoint("org/model", record=record)
    opened.tensor(Q)
    (opened.folder / "config.json").resolve().unlink()
    with pytest.warns(UserWarning, match="could not be freed: the hub's cache around it is damaged"):
        opened.release(opened.keys[Q])


def test_uploads(hub, llm):
    """The test's own hub: what a client uploads can be downloaded."""
    huggingface_hub.create_repo("org/new", exist_ok=True)
    huggingface_hub.create_repo("org/new", exist_ok=True)
    huggingface_hub.upload_folder(repo_id="org/new", folder_path=llm)
    huggingface_hub.upload_file(repo_id="org/new", path_or_fileobj=b"# Card", path_in_repo="README.md")
    assert hub.files("org/new").keys() == {".gitattributes", "README.md", *(file.name for file in llm.iterdir())}
    assert torch.equal(Checkpoint("org/new").tensor(Q), Checkpoint(llm).tensor(Q))
