"""checkpoint.py, shards.py: every family in every layout and format, and everything that is refused on opening."""

import itertools
import json
import os
import shutil
import sys
import warnings

import pytest
import torch
from bitsandbytes.functional import get_4bit_type
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, LAYOUTS, SELF_LAYERS, rename_keys, save_layout, tiny_llm, tiny_vlm
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast

from drift_peft.checkpoints.checkpoint import INDEX, Checkpoint
from drift_peft.checkpoints.naming import PROJECTIONS, module_kind

Q = "layers.0.self_attn.q_proj.weight"


@pytest.fixture
def llm(tmp_path):
    """A folder with a text model in several shards."""
    return save_layout(tiny_llm("llava"), tmp_path / "llm", max_shard_size="20KB")


def edit_json(file, **changes):
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("layout, shards", [*((layout, "many") for layout in LAYOUTS), (LAYOUTS[0], "one")])
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
        assert sum(module_kind(name) in PROJECTIONS for name in opened.language_model) == 14


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


def gguf_with_config(folder):
    no_weights(folder)
    (folder / "model-q4.gguf").touch()


def mlx(folder):
    edit_json(folder / "config.json", quantization={"group_size": 64, "bits": 4})


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


def a_link_to_nothing(folder):
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "model.safetensors").symlink_to(folder / "blob")


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


def no_weights(folder):
    for file in [*folder.glob("*.safetensors"), folder / INDEX]:
        file.unlink()


def twice_in_shards(folder):
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    save_file(load_file(first) | load_file(second), second)


def bnb_8_bit(folder):
    quantization = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization)
    empty(folder)
    model.save_pretrained(folder)


def bnb_8_bit_keys(folder):
    bnb_8_bit(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))


def four_bit(folder):
    save_four_bit(folder)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (no_config, FileNotFoundError, "has no config.json: give the folder that save_pretrained wrote"),
        (empty, FileNotFoundError, "is an empty folder"),
        (adapter, ValueError, "is an adapter, not a model: merge it into its base"),
        (gguf, ValueError, "is GGUF, which is quantized"),
        (gguf_with_config, ValueError, "is GGUF, which is quantized"),
        (mlx, ValueError, r"is quantized \(MLX\): give the full-precision model"),
        (quantized_config, ValueError, r"is quantized \(gptq\): give the full-precision model"),
        (fp8_keys, ValueError, r"is quantized \(it holds model.*norm.weight_scale_inv\)"),
        (bitsandbytes_keys, ValueError, r"is quantized \(it holds model.*norm.weight.absmax\): .* \(--dequantize\)"),
        (
            four_bit,
            ValueError,
            r"is quantized \(bitsandbytes, 4 bits\): .* dequantize=True \(--dequantize\)$",
        ),
        (bnb_8_bit, ValueError, r"is quantized \(bitsandbytes\): give the full-precision model$"),
        (bnb_8_bit_keys, ValueError, r"is quantized \(it holds model.*SCB\): give the full-precision model$"),
        (truncated, ValueError, "safetensors is truncated or no safetensors file"),
        (not_safetensors, ValueError, "safetensors is truncated or no safetensors file"),
        (a_link_to_nothing, FileNotFoundError, "lacks model.safetensors, a link to nothing: fetch it again"),
        (missing_shard, FileNotFoundError, "lacks model-00001-of-.*safetensors, named in its index"),
        (missing_key, ValueError, "lacks model.extra.weight, which the index of .* places there"),
        (broken_index, ValueError, "is no index of weights"),
        (unknown_model, ValueError, "transformers cannot read the config.json of .*no_such_model"),
        (wrong_type, ValueError, "transformers cannot read the config.json of .*hidden_size.*sixty-four"),
        (remote_code, ValueError, "brings its own code, which is not run: give the repository .* mostly ends in -hf"),
        (twice_in_shards, ValueError, r"holds model\.\S+ in both model-00001-of-\S+ and model-00002-of-"),
        (no_weights, FileNotFoundError, "holds none of model.safetensors, model.safetensors.index.json, pytorch_model"),
    ],
)
def test_refused_when_opened(spoil, error, message, llm):
    spoil(llm)
    with pytest.raises(error, match=message) as caught:
        Checkpoint(llm)
    assert "\n" not in str(caught.value) and str(llm) in str(caught.value)


def test_an_index_may_name_a_head_that_is_the_embedding(llm):
    """As where a model was tied, and its head dropped from the shard alone."""
    shard = Checkpoint(llm).keys["lm_head.weight"]
    left = {key: tensor for key, tensor in load_file(shard).items() if key != "lm_head.weight"}
    save_file(left or {"none": torch.zeros(1)}, shard, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks lm_head.weight, which the index of"):
        Checkpoint(llm)
    edit_json(llm / "config.json", tie_word_embeddings=True)
    assert "lm_head.weight" not in Checkpoint(llm).keys and Checkpoint(llm).tied


@pytest.mark.parametrize("said", ["none", True, {"quant_algo": None}])
def test_a_config_may_have_a_quantization_of_another_kind(said, llm):
    edit_json(llm / "config.json", quantization=said)
    assert Checkpoint(llm).language_model


def test_files_are_refused(tmp_path):
    for name, message in (("model.gguf", "is GGUF"), ("model.safetensors", "is a file: give the folder")):
        (tmp_path / name).touch()
        with pytest.raises(ValueError, match=message):
            Checkpoint(tmp_path / name)


# The formats and layouts of weights

BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def to_bin(folder):
    """Rewrite a safetensors checkpoint as the .bin files that transformers used to write."""
    for shard in folder.glob("*.safetensors"):
        name = shard.name.replace("model", "pytorch_model", 1).replace(".safetensors", ".bin")
        torch.save(load_file(shard), folder / name)
        shard.unlink()
    if (folder / INDEX).exists():
        text = (folder / INDEX).read_text().replace(".safetensors", ".bin").replace("model-0", "pytorch_model-0")
        (folder / BIN_INDEX).write_text(text)
        (folder / INDEX).unlink()
    return folder


@pytest.mark.parametrize("size", ["5GB", "20KB"])
def test_bin_weights_are_those_of_safetensors(size, tmp_path):
    model = tiny_llm("llava").bfloat16()
    expected = Checkpoint(save_layout(model, tmp_path / "safetensors", max_shard_size=size))
    found = Checkpoint(to_bin(save_layout(model, tmp_path / "bin", max_shard_size=size)))
    assert {file.suffix for file in found.files} == {".bin"} and len(found.files) == len(expected.files)
    assert found.keys.keys() == expected.keys.keys() and found.language_model == expected.language_model
    for raw in expected.keys:
        assert found.shape(raw) == expected.shape(raw) and found.dtype(raw) == expected.dtype(raw) == torch.bfloat16
        assert torch.equal(found.tensor(raw), expected.tensor(raw))


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what is mapped")
def test_bin_weights_are_mapped_into_memory(llm):
    opened = Checkpoint(to_bin(llm))
    tensor = opened.tensor(f"model.{Q}")
    with open("/proc/self/maps") as maps:
        ranges = [line.split()[0].split("-") for line in maps if str(opened.keys[f"model.{Q}"]) in line]
    assert any(int(start, 16) <= tensor.data_ptr() < int(end, 16) for start, end in ranges)


class Malicious:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_bin_files_may_hold_parameters(tmp_path):
    """As torch.save(dict(model.named_parameters())) writes them."""
    folder = to_bin(save_layout(tiny_llm("llava"), tmp_path / "bin"))
    torch.save({name: torch.nn.Parameter(t) for name, t in torch.load(folder / BIN).items()}, folder / BIN)
    checkpoint = Checkpoint(folder)
    assert not any(checkpoint.tensor(raw).requires_grad for raw in checkpoint.keys)


def cut_short(file):
    file.write_bytes(file.read_bytes()[:-200])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda file: torch.save(torch.load(file), file, _use_new_zipfile_serialization=False),
            r"was written before torch 1.6 and cannot be mapped into memory: rewrite it with torch.save\(",
        ),
        (
            lambda file: torch.save({"a": Malicious()}, file),
            r"calls (posix|nt)\.system, and code of a weight file is not run: ask for a safetensors copy",
        ),
        (cut_short, "is truncated or no torch file: fetch it again"),
        (lambda file: file.write_bytes(b"version https://git-lfs.github.com/spec/v1"), "is truncated or no torch file"),
        (lambda file: torch.save(torch.zeros(3), file), "holds a Tensor, not tensors by name: give a saved state dict"),
        (lambda file: torch.save({"state_dict": {}}, file), "holds state_dict, which is no tensor: give the model as"),
    ],
)
def test_refused_bin_files(spoil, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = to_bin(save_layout(tiny_llm("llava"), tmp_path / "llm"))
    spoil(folder / BIN)
    with pytest.raises(ValueError, match=message) as caught:
        Checkpoint(folder)
    assert str(folder / BIN) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "pwned").exists()


def test_of_two_layouts_the_one_that_transformers_reads(tmp_path):
    """Every subset of the four, each with weights of its own."""
    parts = {}
    for value, (name, size) in enumerate([("one", "5GB"), ("many", "20KB"), ("bin", "5GB"), ("bins", "20KB")]):
        model = tiny_llm("llava")
        torch.nn.init.constant_(model.get_decoder().norm.weight, value)
        folder = save_layout(model, tmp_path / name, max_shard_size=size)
        parts[name] = to_bin(folder) if "bin" in name else folder
    for count in (2, 3, 4):
        for names in itertools.combinations(parts, count):
            both = tmp_path / "-".join(names)
            for name in names:
                shutil.copytree(parts[name], both, dirs_exist_ok=True)
            expected = AutoModelForCausalLM.from_pretrained(both).get_decoder().norm.weight
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                opened = Checkpoint(both)
            assert torch.equal(opened.tensor("model.norm.weight"), expected), names
            # With one format beside another it is clear which to read; with two sets of files in one format it is not.
            said = [str(w.message) for w in caught if "delete what is out of date" in str(w.message)]
            assert len(said) == (names[:2] in [("one", "many"), ("bin", "bins")]), names


def test_an_index_of_the_single_file_is_no_second_layout(tmp_path, recwarn):
    folder = save_layout(tiny_llm("llava"), tmp_path / "llm")
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(Checkpoint(folder).keys, "model.safetensors")}))
    assert [file.name for file in Checkpoint(folder).files] == ["model.safetensors"]
    assert not [w for w in recwarn if "out of date" in str(w.message)]


# 4 bits


def save_four_bit(folder, kind="nf4", nested=True, dtype=torch.float32):
    """Load a folder in 4 bits, as a QLoRA user does, and save it in its place. Returns the model."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=nested, bnb_4bit_compute_dtype=dtype
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=quantization)
    empty(folder)
    model.save_pretrained(folder)
    return model


def unpack(weight):
    """A 4-bit weight by its definition, table[4 bits] · scale of its block of 64, without bitsandbytes' kernels."""
    state = weight.quant_state
    scales = state.absmax
    if state.nested:
        inner = state.state2
        scales = inner.code[scales.long()] * inner.absmax.repeat_interleave(inner.blocksize)[: scales.numel()]
        scales = scales + state.offset
    packed = weight.detach().cpu().flatten()
    values = get_4bit_type(state.quant_type, device="cpu")[torch.stack([packed >> 4, packed & 15], 1).long()].flatten()
    return (values * scales.repeat_interleave(state.blocksize)[: values.numel()]).reshape(state.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_dequantized_weights(kind, nested, dtype, tmp_path):
    # 96 columns: bitsandbytes 0.50 on a CPU is wrong where they are no multiple of its block of 64.
    original = tiny_llm("llava", intermediate_size=96)
    folder = save_layout(original, tmp_path / "llm")
    model = save_four_bit(folder, kind, nested, dtype)
    opened = Checkpoint(folder, dequantize=True)
    assert opened.origin == {"id": str(folder), "revision": None, "dequantize": True}  # for the call that a card gives
    assert opened.keys.keys() == original.state_dict().keys() and len(opened.language_model) == len(opened.keys)
    for name, weight in model.named_parameters():
        found, quantized = opened.tensor(name), hasattr(weight, "quant_state")
        assert quantized == ("_proj" in name)
        assert opened.shape(name) == tuple(found.shape) == original.get_parameter(name).shape
        assert opened.dtype(name) == found.dtype == dtype
        expected = unpack(weight) if quantized else weight
        torch.testing.assert_close(found, expected.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=0)
        error = (found - original.get_parameter(name)).norm() / original.get_parameter(name).norm()
        assert error < (0.15 if quantized else 0.01)  # 16 levels cost about a tenth
    assert torch.isfinite(opened.tensor(f"model.{Q}")).all()


def test_incomplete_four_bit_weights(llm):
    save_four_bit(llm)
    rename_keys(llm, lambda key: None if "layers.1.mlp.up_proj.weight.quant_state" in key else key)
    with pytest.raises(ValueError, match=r"holds model\.layers\.1\.mlp\.up_proj\S+absmax, but not all of a 4-bit"):
        Checkpoint(llm, dequantize=True)


def test_dequantize_changes_nothing_else(llm):
    assert torch.equal(Checkpoint(llm, dequantize=True).tensor(f"model.{Q}"), Checkpoint(llm).tensor(f"model.{Q}"))
    quantized_config(llm)
    with pytest.raises(ValueError, match=r"is quantized \(gptq\)"):
        Checkpoint(llm, dequantize=True)


# The tokens


def save_tokenizer(folder, *tokens):
    vocabulary = {token: row for row, token in enumerate(tokens)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=tokens[0]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=tokens[0])
    tokenizer.add_tokens(["<added>"])
    tokenizer.save_pretrained(folder)
    return vocabulary | {"<added>": len(tokens)}


def test_vocabulary(llm):
    expected = save_tokenizer(llm, "<unk>", "a", "b")
    assert Checkpoint(llm).vocabulary() == expected


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])  # for a Qwen, transformers makes an empty one of nothing
def test_no_tokenizer(family, tmp_path):
    opened = Checkpoint(save_layout(tiny_llm(family), tmp_path / "llm"))
    with pytest.raises(ValueError, match=r"llm holds no tokenizer, which tells the rows of head and embedding apart"):
        opened.vocabulary()
    (opened.folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"transformers cannot read the tokenizer of .*llm: ") as caught:
        opened.vocabulary()
    assert "\n" not in str(caught.value)
