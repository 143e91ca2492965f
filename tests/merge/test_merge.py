"""merge_adapter and merge_and_unload: the merged model is the base with its adapter, and says so or fails cleanly."""

import errno
import json
import math
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from hub import Hub
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import edit_tensors, rename_keys, save_layout, tiny_expert, tiny_llm, tiny_vlm
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig

import drift_peft.merge.adapter
from drift_peft import DriftConfig, build_prior, language_model_targets, merge_adapter
from drift_peft.checkpoints.naming import PROJECTIONS, canonical_name, module_kind
from drift_peft.checkpoints.update import LowRank

IDS = torch.arange(7, 27).reshape(2, 10)
LAYOUTS = {"hub": "5GB", "memory": "5GB", "sharded": "20KB"}  # layout -> largest shard


def tiny(family):
    return tiny_llm("llava") if family == "llama" else tiny_vlm(family)


def save_base(folder, family="llama", layout="hub", dtype=torch.float32):
    save_layout(tiny(family).to(dtype), folder, layout.replace("sharded", "hub"), LAYOUTS[layout])
    return folder


def load(folder, family="llama", **options):
    auto = AutoModelForCausalLM if family == "llama" else AutoModelForImageTextToText
    return auto.from_pretrained(folder, **{"dtype": torch.float32, **options}).eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits.float()


def off(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def save_adapter(folder, family="llama", std=0.05, model=None, **settings):
    """A stock LoRA adapter whose lora_B is random instead of zero, on the model's own in-memory names."""
    model = model or tiny(family)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": language_model_targets(model), **settings}
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=std, generator=generator) if std else parameter.data.zero_()
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    return folder


def merge(tmp_path, **options):
    return merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", progress=False, **options)


@pytest.fixture(scope="session")
def template(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stock")
    save_base(folder / "base")
    save_adapter(folder / "adapter")
    return folder


@pytest.fixture
def pair(template, tmp_path):
    return shutil.copytree(template, tmp_path, dirs_exist_ok=True)


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


# Refusals: the message, and nothing left behind


def edit_config(folder, name="adapter_config.json", **changes):
    file = folder / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_weights(folder, change):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


def rename_module(old, new):
    return lambda p: rename_keys(p / "adapter", lambda key: key.replace(old, new))


def lora(**settings):
    return lambda p: save_adapter(p / "adapter", **settings)


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
W, SINGLE = "model.layers.0.self_attn.q_proj.weight", "model.safetensors"
REFUSED = {
    "pissa": (lambda p: edit_config(p / "adapter", init_lora_weights="pissa"), "uses init_lora_weights='pissa'"),
    "not lora": (lambda p: LoHaConfig().save_pretrained(p / "adapter"), "is LOHA, not LoRA"),
    "vision": (rename_module("model.layers", "vision_tower.layers"), r"the base has no vision_tower\.layers\.0"),
    "no such layer": (rename_module("layers.1", "layers.7"), r"the base has no layers\.7\..*; and 2 more"),
    "claimed twice": (
        lambda p: edit_weights(
            p / "adapter",
            lambda t: t.update({Q.format(f).replace("model.layers", "layers"): t[Q.format(f)].clone() for f in "AB"}),
        ),
        "are the same weight layers.0.self_attn.q_proj.weight",
    ),
    "half a pair": (
        lambda p: edit_weights(p / "adapter", lambda t: t.pop(Q.format("B"))),
        "holds only lora_A.weight of model.*, without lora_B.weight",
    ),
    "other rank": (lambda p: edit_config(p / "adapter", r=8), r"says r=8 for .* but its lora_A is \[4, \d+\] and"),
    "sharded": (
        lambda p: edit_weights(p / "adapter", lambda t: t.update({Q.format("B"): torch.ones(0)})),
        r"says r=4 for .* and its lora_B \[0\]: .* or they were saved sharded",
    ),
    "other width": (
        lambda p: edit_weights(p / "adapter", lambda t: t.update({Q.format("A"): torch.ones(4, 7)})),
        r"q_proj.weight is \[(\d+), \d+\] in the base and \[\1, 7\] in the adapter",
    ),
    "empty": (lambda p: edit_weights(p / "adapter", lambda t: t.clear()), "holds no weights"),
    "untrained": (lora(std=0), "changes no weight of .* lora_B are zero, as before training"),
    "nan": (
        lambda p: edit_weights(p / "adapter", lambda t: t[Q.format("B")].fill_(float("nan"))),
        "layers.0.self_attn.q_proj.weight is not finite after the merge",
    ),
    "truncated": (
        lambda p: (p / "adapter" / "adapter_model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{"),
        "adapter .* is truncated or damaged",
    ),
    "no weights": (
        lambda p: (p / "adapter" / "adapter_model.safetensors").unlink(),
        "holds neither adapter_model.safe",
    ),
    "no adapter": (lambda p: (p / "adapter" / "adapter_config.json").unlink(), "has no adapter_config.json"),
    "base is an adapter": (
        lambda p: shutil.copy(p / "adapter" / "adapter_config.json", p / "base"),
        "base .* is an adapter itself: name the full-precision base",
    ),
    "base is quantized": (
        lambda p: edit_config(p / "base", "config.json", quantization_config={"quant_method": "bitsandbytes"}),
        "is quantized .*: give the full-precision model",
    ),
    "index is a list": (
        lambda p: ((p / "base" / "model.safetensors").unlink(), (p / "base" / f"{SINGLE}.index.json").write_text("[]")),
        r"index.json is no index of weights .*got \[\].*: fetch it again",
    ),
    "eight bits": (
        lambda p: edit_tensors(p / "base", lambda t: t.update({W: t[W].to(torch.int8)})),
        "q_proj.weight is torch.int8 in the base: name the full-precision one",
    ),
    "scaled": (
        lambda p: edit_tensors(p / "base", lambda t: t.update({W.replace("weight", "scale_weight"): torch.ones(64)})),
        "q_proj.weight is scaled by .*q_proj.scale_weight in the base: name the full-precision one",
    ),
    "nan as alpha": (
        lambda p: edit_config(p / "adapter", lora_alpha=math.nan),
        "adapter_config.json of adapter .*: lora_alpha should be a finite number, got NaN",
    ),
    "a pattern of inf": (
        lambda p: edit_config(p / "adapter", alpha_pattern={"q_proj": math.inf}),
        "adapter_config.json of adapter .*: alpha_pattern.q_proj should be a finite number, got Infinity",
    ),
    "alpha as text": (
        lambda p: edit_config(p / "adapter", lora_alpha="16"),
        'adapter_config.json of adapter .*: lora_alpha should be a valid number, got "16"',
    ),
    "base is empty": (lambda p: (shutil.rmtree(p / "base"), (p / "base").mkdir()), "is an empty folder"),
    "output exists": (lambda p: (p / "merged").mkdir(), r"exists: name another folder, or pass overwrite=True"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(pair, case):
    change, message = REFUSED[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        change(pair)
    before = {file: file.stat().st_mtime_ns for file in pair.rglob("*")}
    with pytest.raises((ValueError, FileNotFoundError, FileExistsError), match=message) as caught:
        merge(pair)
    assert "\n" not in str(caught.value)
    assert {file: file.stat().st_mtime_ns for file in pair.rglob("*") if file != pair} == before


def test_weights_whose_norm_is_zero_or_vanishes(pair):
    expected = merge(pair).relative_change
    edit_tensors(pair / "base", lambda t: [W.mul_(1e-26) for W in t.values()])
    edit_weights(pair / "adapter", lambda t: [W.mul_(1e-26) for key, W in t.items() if "lora_B" in key])
    assert merge(pair, overwrite=True).relative_change == pytest.approx(expected, rel=1e-3)
    edit_tensors(pair / "base", lambda t: [W.zero_() for W in t.values()])
    assert merge(pair, overwrite=True).relative_change is None


def test_lost_in_rounding(tmp_path):
    save_base(tmp_path / "base", dtype=torch.bfloat16)
    save_adapter(tmp_path / "adapter", std=1e-12)
    with pytest.raises(ValueError, match=r"changes no weight of .*: all is lost in rounding to the base's dtype"):
        merge(tmp_path)


# The output


def test_overwrite_replaces_a_model_and_nothing_else(pair):
    output = merge(pair).output
    (output / "stale.json").write_text("of the last merge")
    merge(pair, overwrite=True)
    assert not (output / "stale.json").exists() and (output / "config.json").exists()
    assert {file.name for file in pair.iterdir()} == {"base", "adapter", "merged"}
    for target in (pair / "base", pair):
        (pair / "config.json").write_text("{}")
        with pytest.raises(FileExistsError, match=r"holds .*, which is merged: name another folder"):
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
    assert [file.name for file in (pair / "merged.partial").iterdir()] == ["model.safetensors"]
    merge(pair, verify=True)
    assert not (pair / "merged.partial").exists()


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
