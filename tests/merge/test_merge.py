"""merge_adapter and merge_and_unload: the merged model is the base with its adapter, and is shown to be."""

import math
import warnings
from dataclasses import replace

import pytest
import torch
from hub import Hub
from merging import IDS, LAYOUTS, load, logits, merge, off, save_adapter, save_base
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import rename_keys, save_layout, tiny_expert, tiny_llm, tiny_vlm
from transformers import BitsAndBytesConfig

from drift_peft import DriftConfig, build_prior, merge_adapter
from drift_peft.checkpoints.naming import PROJECTIONS, canonical_name, module_kind
from drift_peft.checkpoints.update import LowRank

# What is merged


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_next", "idefics2", "llama"])
def test_the_merged_folder_is_base_plus_adapter(tmp_path, family, layout):
    base = save_base(tmp_path / "base", family, layout)
    save_adapter(tmp_path / "adapter", family)
    report = merge(tmp_path)
    adapted = PeftModel.from_pretrained(load(base, family), tmp_path / "adapter").eval()
    assert off(logits(load(report.output, family)), logits(adapted)) < 1e-5
    assert off(logits(load(base, family)), logits(adapted)) > 1e-2
    assert report.modules == 14 and 0.1 < report.relative_change < 1 and report.logits_error is None

    shards = sorted(file.name for file in base.glob("*.safetensors"))
    assert sorted(file.name for file in report.output.glob("*.safetensors")) == shards
    assert len(shards) > 3 if layout == "sharded" else shards == ["model.safetensors"]
    changed = 0
    for shard in shards:
        before, after = load_file(base / shard), load_file(report.output / shard)
        assert list(before) == list(after)
        assert safe_open(base / shard, "pt").metadata() == safe_open(report.output / shard, "pt").metadata()
        differ = {name for name in before if not torch.equal(before[name], after[name])}
        assert differ == {name for name in before if module_kind(canonical_name(name) or "") in PROJECTIONS}
        changed += len(differ)
    assert changed == 14
    for file in base.glob("*.json"):
        assert (report.output / file.name).read_bytes() == file.read_bytes()
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sum_is_fp32_and_cast_once(tmp_path, dtype):
    base = save_base(tmp_path / "base", dtype=dtype)
    save_adapter(tmp_path / "adapter", std=1e-3)
    before, after = load_file(base / "model.safetensors"), load_file(merge(tmp_path).output / "model.safetensors")
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    A, B = (adapter[f"base_model.model.{name}.lora_{factor}.weight"].double() for factor in "AB")
    exact = before[f"{name}.weight"].double() + 2 * B @ A
    assert after[f"{name}.weight"].dtype == dtype
    half_step = torch.finfo(dtype).eps / 2 * exact.abs() + torch.finfo(dtype).smallest_normal
    assert ((after[f"{name}.weight"].double() - exact).abs() <= 1.001 * half_step).all()


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6},
            "alpha_pattern": {"^model.layers.0.*v_proj": 32},
        },
        {"fan_in_fan_out": False, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    ],
    ids=["rslora", "patterns", "few"],
)
def test_scaling_is_pefts(tmp_path, settings):
    base = save_base(tmp_path / "base")
    save_adapter(tmp_path / "adapter", **settings)
    report = merge(tmp_path, verify=True)
    expected = PeftModel.from_pretrained(load(base), tmp_path / "adapter").merge_and_unload().state_dict()
    for name, tensor in load_file(report.output / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=0)
    assert report.logits_error < 1e-5


def test_an_adapter_with_the_names_of_another_transformers_version(tmp_path):
    save_base(tmp_path / "base", "qwen2_5_vl", "sharded")
    save_adapter(tmp_path / "adapter", "qwen2_5_vl")
    first = merge(tmp_path).output.rename(tmp_path / "first")
    rename_keys(tmp_path / "adapter", lambda key: key.replace("model.language_model.", "model."))  # transformers 4.51
    for shard in merge(tmp_path).output.glob("*.safetensors"):
        assert shard.read_bytes() == (first / shard.name).read_bytes()


def test_an_adapter_in_pickle_format(pair):
    first = merge(pair).output.rename(pair / "first")
    weights = pair / "adapter" / "adapter_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    assert (merge(pair).output / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()


def test_the_folder_stands_alone(pair):
    base, nested = pair / "base", "additional_chat_templates/tool_use.jinja"
    kept = {"tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "chat_template.jinja", "merges.txt"}
    kept |= {"tokenizer.model.v3", "source.spm", "vocab.bpe", "vocab", "USE_POLICY.md"}
    kept |= {"tokenizer.model", "LICENSE", "config.json", "generation_config.json", "model.safetensors", nested}
    left = {"README.md", "pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.safetensors"}
    left |= {"optimizer.pt", "trainer_state.json", "original/params.json", ".gitattributes"}
    for name in (kept | left) - {file.name for file in base.iterdir()}:
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(f"{name} of the base")
    (pair / "adapter" / "tokenizer.json").write_text("of the adapter")
    output = merge(pair).output
    written = {file.relative_to(output).as_posix() for file in output.rglob("*") if file.is_file()}
    assert written == kept | {"README.md"} and "of the base" not in (output / "README.md").read_text()
    assert (output / "tokenizer.json").read_text() == "tokenizer.json of the base"


def test_hub_ids(pair, monkeypatch):
    expected = merge(pair).output.rename(pair / "first")
    with Hub() as hub:
        hub.use(monkeypatch, pair / "cache")
        hub.add("org/base", pair / "base")
        hub.add("org/adapter", pair / "adapter", "v1")
        report = merge_adapter("org/base@main", "org/adapter@v1", pair / "merged", verify=True, progress=False)
        assert hub.fetched("org/base").count("model.safetensors") == 1
    assert {file.name for file in report.output.iterdir()} == {file.name for file in expected.iterdir()}
    assert (report.output / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()


# The proof


@pytest.mark.parametrize("family", ["qwen2_5_vl", "mllama", "gemma3", "llama"])
def test_verify(tmp_path, family):
    save_base(tmp_path / "base", family, dtype=torch.bfloat16)
    save_adapter(tmp_path / "adapter", family)
    report = merge(tmp_path, verify=True)
    rounding = 2**-8  # what bf16 does to one weight
    assert rounding / 20 < report.logits_error < math.sqrt(report.modules) * rounding
    assert report.modules == 14


def test_verify_of_a_checkpoint_without_a_head(tmp_path):
    save_layout(tiny_llm("llava"), tmp_path / "base", "base")
    save_adapter(tmp_path / "adapter")
    assert merge(tmp_path, verify=True).logits_error < 1e-5


def test_verify_finds_a_wrong_merge(pair, monkeypatch):
    block = LowRank.block
    monkeypatch.setattr(LowRank, "block", lambda self, *args: block(replace(self, scaling=2 * self.scaling), *args))
    with pytest.raises(
        ValueError, match=r"logits are \d.* off those of base \+ adapter, and rounding to torch.float32"
    ):
        merge(pair, verify=True)
    assert {file.name for file in pair.iterdir()} == {"base", "adapter"}


def test_verify_warns_of_an_adapter_that_rounding_undoes(tmp_path):
    save_base(tmp_path / "base", dtype=torch.bfloat16)
    save_adapter(tmp_path / "adapter", std=3e-6)
    with pytest.warns(
        UserWarning, match="Rounding to torch.bfloat16 undoes much of this adapter: .* Serve it unmerged"
    ):
        assert 0 < merge(tmp_path, verify=True).logits_error < 1e-4


def test_verify_says_what_peft_cannot_load(pair):
    rename_keys(pair / "adapter", lambda key: key.replace("model.model.layers", "model.model.language_model.layers"))
    with pytest.raises(
        ValueError, match=r"PEFT cannot load .* onto its base to verify the merge: Found missing adapter"
    ):
        merge(pair, verify=True)
    assert merge(pair).modules == 14


def test_verify_says_which_saved_module_peft_lacks(pair):
    save_adapter(pair / "adapter", modules_to_save=["norm"])
    rename_keys(pair / "adapter", lambda key: key.replace("model.model.norm", "model.model.language_model.norm"))
    with pytest.raises(ValueError, match=r"PEFT cannot load .* to verify the merge: it lacks base_model\.\S*norm"):
        merge(pair, verify=True)


# model.merge_and_unload() of a model that was wrapped and trained with DriftConfig


@pytest.fixture(scope="module")
def steered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("steered")
    vlm = tiny_vlm("qwen2_5_vl")
    save_layout(vlm, folder / "base")
    save_layout(tiny_expert("qwen2_5_vl", vlm)[0], folder / "expert")
    build_prior(folder / "expert", folder / "base", folder / "prior.safetensors", rank=8, progress=False)
    return folder


@pytest.mark.parametrize("kind", ["fp32", "bf16", "nf4"])
def test_merge_and_unload(steered, tmp_path, kind):
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["lm_head", "visual"]
    )
    options = {"fp32": {}, "bf16": {"dtype": torch.bfloat16}, "nf4": {"quantization_config": quantization}}[kind]
    config = DriftConfig(prior=steered / "prior.safetensors", r=4, lora_alpha=8, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Switched off bitsandbytes")
        model = get_peft_model(load(steered / "base", "qwen2_5_vl", **options), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(4):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(tmp_path / "adapter")
    adapted = logits(model)
    with model.disable_adapter():
        effect = off(logits(model), adapted)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Merge lora module to 4-bit")
        merged = model.merge_and_unload()
    assert not any("lora" in name for name, _ in merged.named_modules())
    error = off(logits(merged), adapted)
    assert error < {"fp32": 1e-5, "bf16": 0.02, "nf4": 0.1}[kind] and error < effect / 4, (error, effect)

    report = merge_adapter(steered / "base", tmp_path / "adapter", tmp_path / "merged", verify=True, progress=False)
    assert report.logits_error < 1e-5
    disk = {canonical_name(k): v for k, v in load_file(tmp_path / "merged" / "model.safetensors").items()}
    for name, weight in merged.named_parameters():
        name = canonical_name(name)
        if name and module_kind(name) in PROJECTIONS and kind != "nf4":
            assert off(weight.float(), disk[name]) < {"fp32": 1e-6, "bf16": 4e-3}[kind], name
