"""hub.py: what is fetched from a hub repository and when, and what needs no network."""

import json
import time

import huggingface_hub
import pytest
import torch
from hub_models import UP, Q, weights
from huggingface_hub import constants, hf_hub_download
from peft import LoraConfig, get_peft_model
from test_checkpoint import Malicious, save_four_bit, save_tokenizer, to_bin
from tiny import save_layout, tiny_llm

from drift_peft.checkpoints import open_expert
from drift_peft.checkpoints.checkpoint import Checkpoint

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


@pytest.mark.parametrize("adapter", [False, True])
def test_a_revision_is_the_hubs_whatever_folder_has_its_name(hub, llm, tmp_path, monkeypatch, adapter):
    if adapter:
        model = get_peft_model(tiny_llm("llava"), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        model.peft_config["default"].base_model_name_or_path = str(llm)
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    commit = hub.add("org/model", tmp_path / "adapter" if adapter else llm, "v2")
    monkeypatch.chdir(tmp_path)
    save_layout(tiny_llm("llava", seed=1), tmp_path / "org" / "model")
    opened = open_expert("org/model@v2")
    assert (opened.source, opened.revision, opened.origin["revision"]) == ("org/model", commit, commit)
    assert torch.equal(opened.tensor(UP), Checkpoint(llm).tensor(UP))


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


def test_uploads(hub, llm):
    """The test's own hub: what a client uploads can be downloaded."""
    huggingface_hub.create_repo("org/new", exist_ok=True)
    huggingface_hub.create_repo("org/new", exist_ok=True)
    huggingface_hub.upload_folder(repo_id="org/new", folder_path=llm)
    huggingface_hub.upload_file(repo_id="org/new", path_or_fileobj=b"# Card", path_in_repo="README.md")
    assert hub.files("org/new").keys() == {".gitattributes", "README.md", *(file.name for file in llm.iterdir())}
    assert torch.equal(Checkpoint("org/new").tensor(Q), Checkpoint(llm).tensor(Q))


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
