"""checkpoint.py: every family in every layout, and everything that is refused when a checkpoint is opened."""

import json
import shutil

import huggingface_hub.errors as hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, LAYOUTS, SELF_LAYERS, rename_keys, save_layout, tiny_llm, tiny_vlm

from drift_peft import checkpoint
from drift_peft.checkpoint import INDEX, Checkpoint
from drift_peft.naming import PROJECTION

Q = "layers.0.self_attn.q_proj.weight"


@pytest.fixture
def llm(tmp_path):
    """A folder with a text model in several shards."""
    return save_layout(tiny_llm("llava"), tmp_path / "llm", max_shard_size="20KB")


def edit_json(file, **changes):
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("shards", ["one", "many"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_language_model_of_every_family_and_layout(family, layout, shards, tmp_path):
    for model in (tiny_vlm(family), tiny_llm(family)):
        folder = save_layout(model, tmp_path / type(model).__name__, layout, "5GB" if shards == "one" else "20KB")
        opened = Checkpoint(folder)
        assert (len(opened.files) > 1) == (shards == "many")
        layers = model.get_decoder().layers
        kept = SELF_LAYERS[family] if len(layers) == 4 else [0, 1]
        expected = {
            f"layers.{index}.{name}": parameter
            for index, layer in enumerate(kept)
            for name, parameter in layers[layer].named_parameters()
        }
        found = {name: raw for name, raw in opened.language_model.items() if name.startswith("layers.")}
        assert found.keys() == expected.keys()
        assert all(torch.equal(opened.tensor(raw), expected[name]) for name, raw in found.items())
        assert {"embed_tokens.weight", "norm.weight"} <= opened.language_model.keys()
        assert sum(map(bool, map(PROJECTION.fullmatch, opened.language_model))) == 14


def test_attributes(llm):
    opened = Checkpoint(llm)
    assert (opened.source, opened.revision, opened.folder) == (str(llm), None, llm)
    assert opened.text_config.hidden_size == 64
    raw = opened.language_model[Q]
    assert raw == f"model.{Q}" and opened.keys[raw] in opened.files
    assert opened.shape(raw) == (64, 64) and opened.dtype(raw) == torch.float32


def test_only_the_index_says_which_files_belong(llm):
    save_file({f"model.{Q}": torch.zeros(1)}, llm / "consolidated.safetensors")
    opened = Checkpoint(llm)
    assert opened.shape(f"model.{Q}") == (64, 64)
    assert llm / "consolidated.safetensors" not in opened.files


def test_extra_prediction_layers_are_not_the_language_model(llm):
    rename_keys(llm, lambda key: key.replace("model.layers.1", "mtp.layers.0"))
    assert not any("layers.1" in name or "mtp" in name for name in Checkpoint(llm).language_model)
    rename_keys(llm, lambda key: key.replace("mtp.layers.0", "model.layers.2"))  # beyond the config's depth
    assert not any("layers.2" in name for name in Checkpoint(llm).language_model)


def test_two_keys_of_one_name_are_refused_when_asked_for(llm):
    shard = sorted(llm.glob("*.safetensors"))[0]
    save_file(load_file(shard) | {f"language_model.{Q}": torch.zeros(64, 64)}, shard)
    opened = Checkpoint(llm)
    assert sorted(opened.claims[Q]) == [f"language_model.{Q}", f"model.{Q}"]
    with pytest.raises(ValueError, match=f"names weights twice: .*{Q} and .*{Q}"):
        _ = opened.language_model


def no_config(folder):
    (folder / "config.json").unlink()


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def adapter(folder):
    (folder / "adapter_config.json").write_text("{}")


def gguf(folder):
    empty(folder)
    (folder / "model-q4.gguf").touch()


def quantized_config(folder):
    edit_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})


def fp8_keys(folder):
    rename_keys(folder, lambda key: key.replace("norm.weight", "norm.weight_scale_inv"))


def bitsandbytes_keys(folder):
    rename_keys(folder, lambda key: key.replace("norm.weight", "norm.weight.absmax"))


def truncated(folder):
    shard = sorted(folder.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-7])


def not_safetensors(folder):
    sorted(folder.glob("*.safetensors"))[0].write_bytes(b"version https://git-lfs.github.com/spec/v1\n")


def missing_shard(folder):
    sorted(folder.glob("*.safetensors"))[0].unlink()


def missing_key(folder):
    index = folder / INDEX
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map=weight_map | {"model.extra.weight": sorted(weight_map.values())[0]})


def broken_index(folder):
    (folder / INDEX).write_text("{}")


def unknown_model(folder):
    edit_json(folder / "config.json", model_type="no_such_model")


def wrong_type(folder):
    edit_json(folder / "config.json", hidden_size="sixty-four")


def remote_code(folder):
    edit_json(folder / "config.json", model_type="mine", auto_map={"AutoConfig": "mine.MyConfig"})
    (folder / "mine.py").write_text("raise SystemExit('this code must not run')")


def only_bin(folder):
    for file in [*folder.glob("*.safetensors"), folder / INDEX]:
        file.unlink()
    torch.save({}, folder / "pytorch_model.bin")


def no_weights(folder):
    for file in [*folder.glob("*.safetensors"), folder / INDEX]:
        file.unlink()


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (no_config, FileNotFoundError, "has no config.json: give the folder that save_pretrained wrote"),
        (empty, FileNotFoundError, "is an empty folder"),
        (adapter, ValueError, "is an adapter, not a model: merge it into its base"),
        (gguf, ValueError, "is GGUF, which is quantized"),
        (quantized_config, ValueError, r"is quantized \(gptq\): give the full-precision model"),
        (fp8_keys, ValueError, r"is quantized \(it holds model.*norm.weight_scale_inv\)"),
        (bitsandbytes_keys, ValueError, r"is quantized \(it holds model.*norm.weight.absmax\)"),
        (truncated, ValueError, "safetensors is truncated or no safetensors file"),
        (not_safetensors, ValueError, "safetensors is truncated or no safetensors file"),
        (missing_shard, FileNotFoundError, "lacks model-00001-of-.*safetensors, named in its index"),
        (missing_key, ValueError, "lacks model.extra.weight, which the index of .* places there"),
        (broken_index, ValueError, "is no safetensors index"),
        (unknown_model, ValueError, "transformers cannot read the config.json of .*no_such_model"),
        (wrong_type, ValueError, "transformers cannot read the config.json of .*hidden_size.*sixty-four"),
        (remote_code, ValueError, "transformers cannot read the config.json of .* contains custom code"),
        (only_bin, ValueError, "holds .bin weights: load it and save_pretrained it as safetensors"),
        (no_weights, FileNotFoundError, "holds neither model.safetensors nor model.safetensors.index.json"),
    ],
)
def test_refused_when_opened(spoil, error, message, llm):
    spoil(llm)
    with pytest.raises(error, match=message) as caught:
        Checkpoint(llm)
    assert "\n" not in str(caught.value) and str(llm) in str(caught.value)


def test_files_are_refused(tmp_path):
    for name, message in (("model.gguf", "is GGUF"), ("model.safetensors", "is a file: give the folder")):
        (tmp_path / name).touch()
        with pytest.raises(ValueError, match=message):
            Checkpoint(tmp_path / name)


@pytest.fixture
def fake_hub(monkeypatch, llm):
    """The hub client, answering with the folder `llm` as commit c0ffee; returns the calls that it got."""
    calls = []
    snapshot = llm.rename(llm.parent / "c0ffee")

    def snapshot_download(repository, revision=None, allow_patterns=None):
        calls.append((repository, revision, allow_patterns))
        return str(snapshot)

    monkeypatch.setattr(checkpoint, "snapshot_download", snapshot_download)
    return calls


def test_hub_id_is_resolved_to_its_commit(fake_hub):
    opened = Checkpoint("some/model@main")
    assert (opened.source, opened.revision) == ("some/model", "c0ffee")
    assert fake_hub[0] == ("some/model", "main", ["*.json"])
    assert fake_hub[1] == ("some/model", "c0ffee", [file.name for file in opened.files])  # and no other weights
    Checkpoint("some/model", revision="v1")
    assert fake_hub[2][:2] == ("some/model", "v1")


def test_refused_hub_repository_is_not_downloaded(fake_hub, tmp_path):
    quantized_config(tmp_path / "c0ffee")
    with pytest.raises(ValueError, match=r"some/model is quantized \(gptq\)"):
        Checkpoint("some/model")
    assert len(fake_hub) == 1


def test_hub_repository_without_config(fake_hub, tmp_path):
    empty(tmp_path / "c0ffee")  # nothing but GGUF files, say: only *.json is asked for at first
    with pytest.raises(FileNotFoundError, match=r"some/model has no config.json"):
        Checkpoint("some/model")


def test_an_existing_path_wins_over_a_hub_id(llm, fake_hub, monkeypatch):
    monkeypatch.chdir(llm.parent)
    assert Checkpoint("c0ffee").revision is None
    assert fake_hub == []


def test_a_revision_given_twice_is_refused():
    with pytest.raises(ValueError, match="names the revision main, but revision='v1'"):
        Checkpoint("some/model@main", revision="v1")


def test_neither_path_nor_hub_id(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing/folder is neither an existing path nor a hub id"):
        Checkpoint(tmp_path / "missing" / "folder")


def test_unreachable_hub(monkeypatch):
    def offline(*args, **kwargs):
        raise hub.OfflineModeIsEnabled("Cannot reach the hub.\nMore lines that nobody needs.")

    monkeypatch.setattr(checkpoint, "snapshot_download", offline)
    message = "some/model at revision v1 is no local path and the hub does not give it: Cannot reach the hub.$"
    with pytest.raises(FileNotFoundError, match=message):
        Checkpoint("some/model@v1")
