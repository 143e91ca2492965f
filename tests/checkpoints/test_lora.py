"""lora.py: an expert given as a LoRA adapter on a base is the model that PEFT makes of the two."""

import json
import os
import re
import warnings

import pytest
import torch
from hub import Hub
from older import frees_files
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_checkpoint import save_four_bit, save_tokenizer, to_bin
from tiny import rename_keys, save_layout, tiny_llm
from transformers import AutoModelForCausalLM

from drift_peft import build_prior, merge_adapter, transplant
from drift_peft.checkpoints import export_for_vllm
from drift_peft.checkpoints.checkpoint import Checkpoint
from drift_peft.checkpoints.lora import AdaptedCheckpoint, is_adapter, open_expert

TARGETS = r".*layers\..*(q_proj|down_proj)"
ADAPTED = [f"model.layers.{i}.{m}.weight" for i in (0, 1) for m in ("self_attn.q_proj", "mlp.down_proj")]


def save_adapter(folder, base, **settings):
    """A stock LoRA adapter on the model of a folder, with a random B."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **settings})
    torch.manual_seed(2)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def pair(tmp_path):
    """A folder with a `base` in several shards and an `adapter` that names it."""
    save_layout(tiny_llm("llava"), tmp_path / "base", max_shard_size="20KB")
    save_adapter(tmp_path / "adapter", tmp_path / "base")
    return tmp_path


def edit_config(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


SETTINGS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"down_proj": 2, "layers.1.self_attn.q_proj": 6}, "alpha_pattern": {"q_proj": 3}},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_the_expert_is_base_plus_adapter(pair, case):
    save_adapter(pair / "adapter", pair / "base", **SETTINGS[case])
    base = AutoModelForCausalLM.from_pretrained(pair / "base", dtype=torch.float32)
    merged = PeftModel.from_pretrained(base, pair / "adapter").merge_and_unload()
    expert, alone = open_expert(pair / "adapter"), Checkpoint(pair / "base")
    assert isinstance(expert, AdaptedCheckpoint)
    assert expert.claims == alone.claims and expert.keys == alone.keys and expert.files == alone.files
    for raw in expert.keys:
        found = expert.tensor(raw)
        assert expert.shape(raw) == found.shape and expert.dtype(raw) == found.dtype
        torch.testing.assert_close(found, merged.get_parameter(raw), rtol=1e-5, atol=1e-7)
        assert torch.equal(found, alone.tensor(raw)) == (raw not in ADAPTED)


def test_the_sum_is_taken_in_fp32(tmp_path):
    base = save_layout(tiny_llm("llava").bfloat16(), tmp_path / "base")
    expert = open_expert(save_adapter(tmp_path / "adapter", base))
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for raw in ADAPTED:
        name = f"base_model.model.{raw.removesuffix('.weight')}.lora_"
        A, B = (weights[f"{name}{factor}.weight"].double() for factor in "AB")
        exact = Checkpoint(base).tensor(raw).double() + 2 * B @ A
        assert expert.dtype(raw) == expert.tensor(raw).dtype == torch.float32
        torch.testing.assert_close(expert.tensor(raw).double(), exact, rtol=1e-6, atol=1e-8)
    assert expert.tensor("lm_head.weight").dtype == expert.dtype("lm_head.weight") == torch.bfloat16


def test_it_says_where_it_comes_from(pair):
    expert = open_expert(pair / "adapter")
    assert (expert.source, expert.revision) == (str(pair / "adapter"), None)
    base = {"id": str(pair / "base"), "revision": None}
    assert expert.origin == {"id": str(pair / "adapter"), "revision": None, "base": base}
    before = expert.identity
    assert before == open_expert(pair / "adapter").identity != Checkpoint(pair / "base").identity
    os.utime(pair / "adapter" / "adapter_model.safetensors", ns=(1, 1))
    assert open_expert(pair / "adapter").identity != before
    assert save_tokenizer(pair / "base", "<unk>", "a") == expert.vocabulary()


def test_a_model_is_opened_as_it_is(pair):
    opened = open_expert(pair / "base")
    assert type(opened) is Checkpoint and opened.origin == {"id": str(pair / "base"), "revision": None}


def test_adapter_and_base_on_the_hub(pair, monkeypatch):
    with Hub() as hub:
        hub.use(monkeypatch, pair / "cache")
        of_base = hub.add("org/base", pair / "base", "v1")
        edit_config(pair / "adapter", base_model_name_or_path="org/base", revision="v1")
        of_adapter = hub.add("org/adapter", pair / "adapter")
        expert = open_expert("org/adapter@main")
        assert (expert.source, expert.revision) == ("org/adapter", of_adapter)
        assert expert.origin["base"] == {"id": "org/base", "revision": of_base}
        assert not [file for file in hub.fetched("org/base") if "-of-" in file]
        edit_config(pair / "adapter", base_model_name_or_path=str(pair / "base"))
        assert torch.equal(expert.tensor(ADAPTED[0]), open_expert(pair / "adapter").tensor(ADAPTED[0]))
        assert [file for file in hub.fetched("org/base") if "-of-" in file] == [expert.keys[ADAPTED[0]].name]
        assert type(open_expert("org/base", revision="v1")) is Checkpoint
        assert is_adapter("org/adapter@main") and not is_adapter("org/base@v1")


def test_an_adapter_is_taken_at_its_revision(pair, monkeypatch):
    with Hub() as hub:
        hub.use(monkeypatch, pair / "cache")
        hub.add("org/adapter", pair / "adapter")
        save_adapter(pair / "adapter", pair / "base", lora_alpha=3)
        commit = hub.add("org/adapter", pair / "adapter", "v2")
        newer = open_expert(pair / "adapter").tensor(ADAPTED[0])
        for expert in open_expert("org/adapter@v2"), open_expert("org/adapter", "v2"):
            assert expert.revision == commit and torch.equal(expert.tensor(ADAPTED[0]), newer)
        assert not torch.equal(open_expert("org/adapter").tensor(ADAPTED[0]), newer)


@frees_files
def test_what_is_brought_of_the_base_is_on_the_record(pair, monkeypatch):
    with Hub() as hub:
        hub.use(monkeypatch, pair / "cache")
        hub.add("org/base", pair / "base")
        edit_config(pair / "adapter", base_model_name_or_path="org/base")
        record = pair / "downloads.json"
        expert = open_expert(pair / "adapter", record=record)
        file = expert.keys[ADAPTED[0]]
        expert.tensor(ADAPTED[0])
        assert json.loads(record.read_text()) == [str(file)]
        expert.release(file)
        assert not file.exists() and json.loads(record.read_text()) == []


def test_a_four_bit_base(pair):
    save_four_bit(pair / "base")
    for opener in open_expert, AdaptedCheckpoint:
        message = r"base is quantized \(bitsandbytes, 4 bits\): .*--dequantize.* into base_model_name_or_path of its"
        with pytest.raises(ValueError, match=message):
            opener(pair / "adapter")
    expert, base = (
        opener(p, dequantize=True) for opener, p in ((open_expert, pair / "adapter"), (Checkpoint, pair / "base"))
    )
    weights = load_file(pair / "adapter" / "adapter_model.safetensors")
    A, B = (weights[f"base_model.model.{ADAPTED[1].removesuffix('.weight')}.lora_{factor}.weight"] for factor in "AB")
    torch.testing.assert_close(expert.tensor(ADAPTED[1]), base.tensor(ADAPTED[1]) + 2 * B @ A)


def rename(old, new):
    return lambda p: rename_keys(p / "adapter", lambda key: key.replace(old, new))


def retrain(**settings):
    return lambda p: save_adapter(p / "adapter", p / "base", **settings)


def malicious(p):
    (p / "adapter" / "adapter_model.safetensors").unlink()

    class Malicious:
        def __reduce__(self):
            return os.system, (f"touch {p / 'pwned'}",)

    torch.save({"a": Malicious()}, p / "adapter" / "adapter_model.bin")


def not_a_number(p):
    file = p / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    next(t for name, t in tensors.items() if "lora_B" in name)[0, 0] = torch.nan
    save_file(tensors, file)


def enlarged(p):
    """PEFT saves embedding and head by itself where the vocabulary has another size than the base's."""
    model = AutoModelForCausalLM.from_pretrained(p / "base")
    model.resize_token_embeddings(model.config.vocab_size + 2)
    model = get_peft_model(model, LoraConfig(target_modules=TARGETS, r=4, init_lora_weights=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(p / "adapter")


def chained(p):
    (p / "base" / "adapter_config.json").write_text((p / "adapter" / "adapter_config.json").read_text())


REFUSED = {
    "moved base": (
        lambda p: edit_config(p / "adapter", base_model_name_or_path="/nowhere/base"),
        r"adapter \S+ adapts /nowhere/base, which cannot be found: write .* into base_model_name_or_path of its "
        r"adapter_config.json \(/nowhere/base is neither an existing path nor a hub id\)",
    ),
    "no base": (
        lambda p: edit_config(p / "adapter", base_model_name_or_path=None),
        "does not say what it adapts: base_model_name_or_path in its adapter_config.json",
    ),
    "not a number": (not_a_number, r"adapter \S+ holds NaN or infinity in \S+lora_B.weight: its training diverged, so"),
    "enlarged": (enlarged, r"; call resize_token_embeddings\(\d+\) on the base, save it, and name that folder"),
    "chained": (chained, "base is an adapter, not a model"),
    "not lora": (lambda p: LoHaConfig().save_pretrained(p / "adapter"), "is LOHA, not LoRA"),
    "damaged config": (
        lambda p: (p / "adapter" / "adapter_config.json").write_text("{"),
        "PEFT cannot read the adapter_config.json of adapter",
    ),
    "no weights": (
        lambda p: (p / "adapter" / "adapter_model.safetensors").unlink(),
        "holds neither adapter_model.safe",
    ),
    "other model": (rename("layers.1", "layers.7"), r"does not fit the base .*base: the base has no layers.7"),
    "malicious": (malicious, r"adapter_model.bin calls \w+\.system, and code of a weight file is not run"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(pair, case):
    spoil, message = REFUSED[case]
    spoil(pair)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        open_expert(pair / "adapter")
    assert "\n" not in str(caught.value) and not (pair / "pwned").exists()


def test_it_is_named_as_it_was_given_where_it_is_refused(pair):
    given = re.escape(str(pair / "adapter"))
    expert = open_expert(pair / "adapter")
    rename("layers.1", "layers.7")(pair)
    with pytest.raises(ValueError, match=rf"has changed while {given} was read"):
        expert.refuse_changed()
    with pytest.raises(ValueError, match=rf"^adapter {given} does not fit the base"):
        open_expert(pair / "adapter")


def test_a_base_in_bin_format(pair):
    """It can be read, but a merge overwrites tensors where they stand in safetensors files."""
    expected = open_expert(pair / "adapter").tensor(ADAPTED[0])
    to_bin(pair / "base")
    assert torch.equal(open_expert(pair / "adapter").tensor(ADAPTED[0]), expected)
    with pytest.raises(ValueError, match=r"base holds pytorch_model-00001-of-\S+.bin, and tensors are overwritten in"):
        merge_adapter(pair / "base", pair / "adapter", pair / "merged", progress=False)
    assert {path.name for path in pair.iterdir()} == {"base", "adapter"}


def test_embedding_and_head_that_were_saved_with_the_adapter(pair):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(pair / "base"),
        LoraConfig(target_modules=TARGETS, r=4, init_lora_weights=False),
    )
    embedding = torch.nn.init.normal_(model.get_input_embeddings().weight.data)
    model.save_pretrained(pair / "adapter", save_embedding_layers=True)
    assert torch.equal(open_expert(pair / "adapter").tensor("model.embed_tokens.weight"), embedding)


def test_the_way_out_of_an_enlarged_vocabulary(pair):
    enlarged(pair)
    resized = AutoModelForCausalLM.from_pretrained(pair / "base")
    resized.resize_token_embeddings(resized.config.vocab_size + 2)
    resized.save_pretrained(pair / "resized")
    assert merge_adapter(pair / "resized", pair / "adapter", pair / "merged", progress=False).modules > 4
    edit_config(pair / "adapter", base_model_name_or_path=str(pair / "resized"))
    expert = open_expert(pair / "adapter")
    merged = load_file(pair / "merged" / "model.safetensors")
    for name in ("model.embed_tokens.weight", ADAPTED[0]):
        assert torch.equal(expert.tensor(name), merged[name])


def test_numbers_of_one_byte_are_looked_at(pair):
    file = pair / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(file).items()}, file)
    assert open_expert(pair / "adapter").tensor(ADAPTED[0]).isfinite().all()


def test_an_empty_adapter_file(pair):
    save_file({}, pair / "adapter" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="holds no weights: it was saved from a model that is not wrapped"):
        open_expert(pair / "adapter")


def test_adapters_that_have_a_name_are_told(tmp_path):
    """PEFT saves each into a folder of its own."""
    save_layout(tiny_llm("llava"), tmp_path / "base")
    wrapped = get_peft_model(tiny_llm("llava"), LoraConfig(target_modules=["q_proj"]), adapter_name="math")
    wrapped.add_adapter("code", LoraConfig(target_modules=["q_proj"]))
    wrapped.save_pretrained(tmp_path / "named")
    for call in (
        lambda: merge_adapter(tmp_path / "base", tmp_path / "named", tmp_path / "out", progress=False),
        lambda: transplant(tmp_path / "named", tmp_path / "base", tmp_path / "out", progress=False),
        lambda: build_prior(tmp_path / "named", tmp_path / "base", tmp_path / "p.safetensors", progress=False),
        lambda: export_for_vllm(tmp_path / "named", tmp_path / "out"),
    ):
        with pytest.raises(FileNotFoundError, match=r"named holds the adapters code, math: name one of these folders$"):
            call()
    assert {path.name for path in tmp_path.iterdir()} == {"base", "named"}


def test_single_experts_are_set_aside_where_nothing_steers_them(tmp_path):
    """As older versions of PEFT and transformers name them, where the base is in stacks. A merge would lose them."""
    save_layout(tiny_llm("qwen3_vl_moe", mlp_only_layers=[]), tmp_path / "base", "memory")
    save_adapter(tmp_path / "adapter", tmp_path / "base", target_modules=["q_proj"])
    sources = {"expert": tmp_path / "adapter", "base": tmp_path / "base", "rank": 4, "progress": False}
    expected = build_prior(**sources, output=tmp_path / "expected")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    edit_config(tmp_path / "adapter", target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"])
    held, module = load_file(file), "base_model.model.model.layers.1.mlp.experts.3.down_proj"
    held |= {f"{module}.lora_A.weight": torch.ones(4, 32), f"{module}.lora_B.weight": torch.ones(64, 4)}
    save_file(held, file)
    with pytest.warns(
        UserWarning, match=r"also trains \S+experts.3.down_proj.weight, which no prior steers: they stay"
    ):
        prior = build_prior(**sources, output=tmp_path / "p")
    assert prior.metadata["weights"] == expected.metadata["weights"] and len(prior) == 2
    with pytest.raises(ValueError, match=r"does not fit the base .*has no layers.1.mlp.experts.3.down_proj.weight$"):
        merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", progress=False)
