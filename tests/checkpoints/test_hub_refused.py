"""hub.py: what is said when a repository cannot be opened, or a shard of it does not come."""

import errno
import json
import os
import shutil
from unittest.mock import Mock

import huggingface_hub
import pytest
from hub_models import Q, blobs
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from older import leaves_nothing
from test_checkpoint import save_tokenizer

from drift_peft.checkpoints.checkpoint import INDEX, Checkpoint
from drift_peft.checkpoints.hub import Repository
from drift_peft.checkpoints.standalone import write_model


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
        (nothing, "a/b/c", FileNotFoundError, "a/b/c is neither an existing path nor a hub id$"),
        (nothing, "~/m", FileNotFoundError, r"~/m is neither an existing path .*: ~ stands for .*, so write [^~]+m$"),
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


def test_a_hub_in_trouble_is_one_without_a_network(hub, llm, tmp_path, monkeypatch):
    """What is in the cache serves; but a repository that refuses is not one that is not there."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's own trials
    hub.add("org/model", llm)
    opened = Checkpoint("org/model")
    opened.tensor(Q)
    repository = Repository("org/model")
    listed = repository.files()
    cached = {path.name for path in repository.folder.iterdir()}
    assert cached < listed
    hub.fail("api/models", 503)
    assert repository.files() == cached
    for status, message in ((403, "needs a login"), (429, "the list of files of org/model .* from the hub: .*429")):
        hub.heal()
        hub.fail("api/models", status)
        with pytest.raises(OSError, match=message) as caught:
            repository.files()
        assert "\n" not in str(caught.value) and not isinstance(caught.value, HfHubHTTPError)


def test_weights_alone_in_the_cache(hub, llm, tmp_path, monkeypatch):
    """As transformers and others download: file by file, without a list of all."""
    save_tokenizer(llm, "<unk>", "a")
    hub.add("org/model", llm)
    for name in ("config.json", INDEX, *(file.name for file in llm.glob("*.safetensors"))):
        hf_hub_download("org/model", name)
    offline(hub, None, monkeypatch)
    with pytest.raises(FileNotFoundError, match=r"org/model .* only its weights are in the cache: run once"):
        write_model(Checkpoint("org/model"), tmp_path / "merged", (), None, progress=False)
    assert not (tmp_path / "merged").exists()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(llm / name, Checkpoint("org/model").folder)
    write_model(Checkpoint("org/model"), tmp_path / "merged", (), None, progress=False)
    assert (tmp_path / "merged" / "tokenizer.json").exists()


def test_a_truncated_shard_in_the_cache(hub, llm):
    hub.add("org/model", llm)
    opened = Checkpoint("org/model")
    file = opened.fetch(opened.keys[Q])
    content = file.read_bytes()
    file.resolve().write_bytes(content[:-9])
    for read in (lambda: opened.tensor(Q), lambda: Checkpoint("org/model")):
        with pytest.raises(ValueError, match=r"model-0\S+ is truncated or no safetensors file .*; fetch it again"):
            read()
