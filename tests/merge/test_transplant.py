"""transplant: what a text expert has learned, in the VLM: W + λ·s·B·A or W + λ·Δ_r in stock PEFT, W + λ·Δ merged."""

import copy
import importlib
import json
import re
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from older import known
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import SELF_LAYERS, save_layout, tiny_llm, tiny_vlm
from transformers import AutoModelForImageTextToText
from transplants import LORA, go, save_lora

from drift_peft import merge_adapter, merge_baseline, transplant
from drift_peft.checkpoints.naming import canonical_name
from drift_peft.prior import build

IDS = torch.arange(7, 27).reshape(2, 10)
PATTERNS = {"rank_pattern": {"v_proj": 6, "layers.1.mlp.down_proj": 2}, "alpha_pattern": {"q_proj": 5}}


def in_vlm(family, vlm, name):
    """Module of the text model -> that of the VLM, by the parameter's number among all of its name."""
    _, _, rest = name.rpartition("layers.")
    index, _, path = rest.partition(".")
    layer = SELF_LAYERS.get(family, range(99))[int(index)]
    (module,) = [n for n, _ in vlm.named_modules() if n.endswith(f"layers.{layer}.{path}") and "language_model" in n]
    return module


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def load(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64).eval()


def moved(vlm, deltas, scale=1.0):
    """The VLM's logits with these Δ, module -> [out, in], added to its weights."""
    vlm = copy.deepcopy(vlm)
    for module, delta in deltas.items():
        vlm.get_submodule(module).weight.data += scale * delta
    return logits(vlm)


def close(found, expected, start, tolerance):
    """By how far both have gone from the VLM."""
    return (found - expected).norm() <= tolerance * (expected - start).norm()


# LoRA adapters


@pytest.mark.parametrize(
    "family, settings",
    [
        ("qwen2_5_vl", {}),
        ("qwen2_5_vl", {"use_rslora": True, **PATTERNS}),
        ("mllama", {**PATTERNS, "layers_to_transform": [1]}),
        ("qwen3_5", {"target_modules": "all-linear", "use_rslora": True}),
        ("gemma3", {"lora_alpha": 7}),
    ],
)
def test_a_lora_adapter_does_the_same_on_the_vlm(vlms, tmp_path, family, settings):
    deltas = save_lora(tmp_path / "lora", tiny_llm(family), **settings)
    report = go(vlms[family], tmp_path / "lora", tmp_path / "out", scale=0.5)
    vlm = load(vlms[family] / "vlm")
    start = logits(vlm)
    expected = moved(vlm, {in_vlm(family, vlm, name): delta for name, delta in deltas.items()}, 0.5)
    assert close(logits(PeftModel.from_pretrained(vlm, tmp_path / "out")), expected, start, 1e-6)
    assert (report.modules, report.scale, report.energy) == (len(deltas), 0.5, 1)
    # vLLM reads one r and one lora_alpha, llama.cpp one lora_alpha beside each tensor's own rank.
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert not config["rank_pattern"] and not config["alpha_pattern"] and not config["use_rslora"]
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {t.shape["lora_B" in name] for name, t in tensors.items()} == {config["r"]}
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in tensors)


def test_an_adapters_numbers_go_over_bit_for_bit(vlms, tmp_path):
    save_lora(tmp_path / "lora", tiny_llm("qwen2_5_vl").bfloat16())
    go(vlms["qwen2_5_vl"], tmp_path / "lora", tmp_path / "out")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("lora", "out"))
    renamed = {name.replace("model.layers", "model.language_model.layers"): t for name, t in before.items()}
    assert renamed.keys() == after.keys()
    assert all(torch.equal(renamed[name], t) and renamed[name].dtype == t.dtype for name, t in after.items())
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (LORA["r"], LORA["lora_alpha"])
    assert config["base_model_name_or_path"] == str(vlms["qwen2_5_vl"] / "vlm")


def test_a_whole_lora_alpha_stays_whole(vlms, tmp_path):
    """Other readers of the file take it for an integer; but α/r·r need not be α."""
    assert 16 / 49 * 49 != 16
    save_lora(tmp_path / "lora", tiny_llm("qwen2_5_vl"), r=49, lora_alpha=16)
    go(vlms["qwen2_5_vl"], tmp_path / "lora", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert repr(config["lora_alpha"]) == "16"


@pytest.mark.parametrize("family", ["qwen2_5_vl", "mllama"])
def test_an_adapter_of_the_vlm_itself_stays_what_it_is(vlms, tmp_path, family):
    """Also on the layers that the text model does not have, and on the vision tower."""
    tower = {"qwen2_5_vl": "visual.blocks.0.attn.proj", "mllama": "vision_model.transformer.layers.0.mlp.fc1"}[family]
    deltas = save_lora(tmp_path / "lora", tiny_vlm(family), target_modules=["q_proj", tower])
    assert go(vlms[family], tmp_path / "lora", tmp_path / "out").modules == len(deltas) > 2
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("lora", "out"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    vlms = [AutoModelForImageTextToText.from_pretrained(vlms[family] / "vlm") for _ in range(2)]
    ours, theirs = (PeftModel.from_pretrained(v, tmp_path / n) for v, n in zip(vlms, ("out", "lora"), strict=True))
    assert torch.equal(logits(ours), logits(theirs))
    assert ours.base_model.targeted_module_names == theirs.base_model.targeted_module_names


@pytest.mark.parametrize("expert, told", [("expert", True), ("of_text", True), ("of_vlm", False)])
def test_a_merge_knows_what_was_made_without_training(vlms, tmp_path, expert, told):
    """Merged, W + λΔ is what it was; how an adapter of the VLM itself was trained it does not say."""
    folder = vlms["qwen2_5_vl"]
    save_lora(tmp_path / "of_text", tiny_llm("qwen2_5_vl"))
    save_lora(tmp_path / "of_vlm", tiny_vlm("qwen2_5_vl"))
    go(folder, folder / "expert" if expert == "expert" else tmp_path / expert, tmp_path / "out", scale=0.5)
    merged = {"base": folder / "vlm", "adapter": tmp_path / "out", "verify": True, "progress": False}
    report = merge_adapter(**merged, output=tmp_path / "merged")
    assert (report.trained_on == "full precision") is told
    assert report.verification.verdict.startswith("Serve this folder: " if told else "The adapter does not say how")
    model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(folder / "vlm"), tmp_path / "out")
    model.save_pretrained(tmp_path / "saved")  # as after further training
    again = merge_adapter(**merged | {"adapter": tmp_path / "saved"}, output=tmp_path / "again")
    assert "assumed" in again.trained_on


def test_llama_cpp_knows_every_name(vlms, tmp_path):
    """As its convert_lora_to_gguf.py looks names up, after its own change of prefix."""
    gguf = pytest.importorskip("gguf")
    save_lora(tmp_path / "lora", tiny_llm("qwen2_5_vl"), target_modules="all-linear")
    go(vlms["qwen2_5_vl"], tmp_path / "lora", tmp_path / "out")
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2VL, 2)
    for name in load_file(tmp_path / "out" / "adapter_model.safetensors"):
        module = name.removeprefix("base_model.").partition(".lora_")[0].removeprefix("model.")
        assert known.get_name(module.replace("model.language_model.", "model."), ()), name


def test_merged_a_lora_adapter_is_in_the_weights(vlms, tmp_path):
    folder = vlms["qwen2_5_vl"]
    deltas = save_lora(tmp_path / "lora", tiny_llm("qwen2_5_vl"), use_rslora=True)
    go(folder, tmp_path / "lora", tmp_path / "out", scale=-0.5, merged=True)
    vlm = load(folder / "vlm")
    expected = moved(vlm, {in_vlm("qwen2_5_vl", vlm, name): delta for name, delta in deltas.items()}, -0.5)
    assert close(logits(load(tmp_path / "out")), expected, logits(vlm), 1e-5)


@pytest.mark.parametrize(
    "changes, count, named",
    [
        (
            {"num_hidden_layers": 3},
            1,
            "model.layers.2.self_attn.q_proj is not there .* model.language_model.layers.1.s",
        ),
        ({"num_key_value_heads": 4}, 0, None),
        ({"hidden_size": 128}, 2, r"\[64, 128\] in the adapter, and model.language_model.layers.0.self_attn.q_proj is"),
    ],
)
def test_modules_without_a_counterpart_are_named_on_both_sides(vlms, tmp_path, changes, count, named):
    save_lora(tmp_path / "lora", tiny_llm("qwen2_5_vl", **changes), target_modules=["q_proj"])
    if not count:
        assert go(vlms["qwen2_5_vl"], tmp_path / "lora", tmp_path / "out").modules == 2
        return
    with pytest.raises(ValueError, match=named) as refused:
        go(vlms["qwen2_5_vl"], tmp_path / "lora", tmp_path / "out")
    assert f" in {count} of its " in str(refused.value) and [*tmp_path.iterdir()] == [tmp_path / "lora"]


def test_two_modules_in_one_place_are_refused(vlms, tmp_path):
    save_lora(tmp_path / "lora", tiny_llm("qwen2_5_vl"), target_modules=["q_proj"])
    file = tmp_path / "lora" / "adapter_model.safetensors"
    twice = {name.replace("model.layers", "model.language_model.layers"): t for name, t in load_file(file).items()}
    save_file(load_file(file) | twice, file)
    with pytest.raises(
        ValueError, match=r"q_proj and .*q_proj are both model.language_model.layers.0.self_attn.q_proj"
    ):
        go(vlms["qwen2_5_vl"], tmp_path / "lora", tmp_path / "out")


@pytest.mark.parametrize(
    "settings, part",
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight itself"),
        known(
            {"bias": "lora_only"},
            {"bias": "lora_only"},
            r"q_proj.bias itself \(modules_to_save, bias",
        ),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens.weight, whose rows are tokens"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head.weight, whose rows are tokens"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ],
)
def test_what_is_more_than_lora_is_refused_by_name(vlms, tmp_path, settings, part):
    save_lora(tmp_path / "lora", tiny_llm("qwen2_5_vl"), **settings)
    with pytest.raises(ValueError, match=rf"{part}.*as reference \(--reference\)"):
        go(vlms["qwen2_5_vl"], tmp_path / "lora", tmp_path / "out")


def test_with_its_base_as_the_reference_it_is_a_fine_tune(vlms, tmp_path):
    """DoRA, as the refusal says."""
    folder, llm = vlms["qwen2_5_vl"], tiny_llm("qwen2_5_vl")
    save_layout(llm, tmp_path / "llm")
    save_lora(tmp_path / "lora", llm, use_dora=True)
    config = tmp_path / "lora" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(tmp_path / "llm")}))
    with pytest.raises(ValueError, match="no common ancestor"):  # here the text model is not the VLM's
        go(folder, tmp_path / "lora", tmp_path / "out", reference=tmp_path / "llm", merged=True)
    options = {"reference": tmp_path / "llm", "merged": True, "force": True}
    with pytest.raises(FileExistsError, match=r"is or holds .*llm, which it is made of: name another folder"):
        go(folder, tmp_path / "lora", tmp_path / "llm", **options | {"reference": folder / "expert"})
    go(folder, tmp_path / "lora", tmp_path / "out", **options)
    adapted = PeftModel.from_pretrained(tiny_llm("qwen2_5_vl"), tmp_path / "lora").merge_and_unload()
    before, after, expert, origin = (
        {canonical_name(name): p for name, p in model.named_parameters()}
        for model in (load(folder / "vlm"), load(tmp_path / "out"), adapted, tiny_llm("qwen2_5_vl"))
    )
    for name in ("layers.0.self_attn.q_proj.weight", "layers.1.mlp.down_proj.weight"):
        assert torch.allclose(after[name], before[name] + (expert[name] - origin[name]).double(), atol=1e-6)


def test_an_adapter_that_adds_nothing_is_refused(vlms, tmp_path):
    get_peft_model(tiny_llm("qwen2_5_vl"), LoraConfig(**LORA)).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="adds nothing"):
        go(vlms["qwen2_5_vl"], tmp_path / "lora", tmp_path / "out")


# Full fine-tunes


def low_rank(delta, rank=None, energy=None):
    U, S, Vh = torch.linalg.svd(delta.double(), full_matrices=False)
    k = rank or int((S.square().cumsum(0) / S.square().sum() < energy).sum()) + 1
    return (U[:, :k] * S[:k]) @ Vh[:k], S[:k].square().sum(), S.square().sum()


@pytest.mark.parametrize("family, ranks", [("qwen2_5_vl", {"rank": 5}), ("mllama", {"energy": 0.5})])
def test_an_adapter_holds_the_best_of_delta(vlms, tmp_path, family, ranks):
    folder, vlm = vlms[family], load(vlms[family] / "vlm")
    start, delta = logits(vlm), torch.load(folder / "delta")
    report = go(folder, output=tmp_path / "out", scale=1.5, **ranks)
    best = {name: low_rank(each, **ranks) for name, each in delta.items()}
    modules = {in_vlm(family, vlm, name.removesuffix(".weight")): each for name, (each, *_) in best.items()}
    expected = moved(vlm, modules, 1.5)
    assert report.modules == len(delta) and report.scale == 1.5 and report.costs == []
    held, whole = (sum(numbers) for numbers in list(zip(*best.values(), strict=True))[1:])
    assert report.energy == pytest.approx(float(held / whole), abs=1e-3)
    # Its factors are the prior's, which are in bf16.
    assert close(logits(PeftModel.from_pretrained(vlm, tmp_path / "out")), expected, start, 1e-2)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert "# expert in vlm" in card.text and str(folder) not in str(card) and card.data.base_model is None
    assert card.data.pipeline_tag == "image-text-to-text" and "drift-peft merge" in card.text
    assert "- base vlm: not stated in its card" in card.text and "- expert expert: not stated in its card" in card.text
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] <= int(re.search(r"--max-lora-rank (\d+)", card.text)[1]) <= 2 * max(4, config["r"])
    assert config["lora_alpha"] == 1.5 * config["r"] and not config["rank_pattern"]


@pytest.mark.parametrize("family", ["qwen3_5", "gemma3"])
def test_a_fine_tune_of_the_vlm_may_be_saved_as_text_model_or_as_vlm(vlms, tmp_path, family):
    folder, vlm = vlms[family], tiny_vlm(family)
    for name, delta in torch.load(folder / "delta").items():
        vlm.get_submodule(in_vlm(family, vlm, name.removesuffix(".weight"))).weight.data += delta
    save_layout(vlm, tmp_path / "whole")
    for expert, output in (("expert", "as_text"), (tmp_path / "whole", "as_vlm")):
        go(folder, expert, tmp_path / output, rank=4)
    text, whole = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("as_text", "as_vlm"))
    assert text.keys() == whole.keys() and all(torch.equal(text[name], whole[name]) for name in text)


def test_merged_other_files_than_safetensors_are_refused_before_work(vlms, tmp_path, monkeypatch):
    shutil.copytree(vlms["qwen2_5_vl"], tmp_path, dirs_exist_ok=True)
    torch.save(load_file(tmp_path / "vlm" / "model.safetensors"), tmp_path / "vlm" / "pytorch_model.bin")
    (tmp_path / "vlm" / "model.safetensors").unlink()
    monkeypatch.setattr(importlib.import_module("drift_peft.merge.transplant"), "Scales", None)
    with pytest.raises(ValueError, match=r"holds pytorch_model\.bin, and tensors are overwritten in"):
        go(tmp_path, merged=True, keep=tmp_path / "keep.safetensors")


def test_what_is_interrupted_promises_no_going_on(vlms, tmp_path, monkeypatch):
    """The prior is made in a folder that goes with the run."""
    done = []

    def finish(*args, real=build.finish):
        if done:
            raise KeyboardInterrupt
        done.append(real(*args))

    monkeypatch.setattr(build, "finish", finish)
    with pytest.raises(KeyboardInterrupt) as caught:
        go(vlms["qwen2_5_vl"], output=tmp_path / "out", rank=4)
    assert not getattr(caught.value, "__notes__", []) and not any(tmp_path.iterdir())


def test_merged_a_fine_tune_is_task_arithmetic(vlms, tmp_path):
    folder = vlms["qwen2_5_vl"]
    report = go(folder, output=tmp_path / "out", merged=True, scale=0.5)
    merge_baseline("task_arithmetic", folder / "expert", folder / "vlm", tmp_path / "other", scale=0.5, progress=False)
    ours, theirs = ({f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("out", "other"))
    assert ours.pop("README.md") != theirs.pop("README.md")  # another call
    assert ours == theirs and report.modules > len(torch.load(folder / "delta"))


def test_merged_the_reference_may_be_an_adapter_as_the_expert_may(vlms, tmp_path):
    """As a chat model that is published as LoRA, from which the expert was trained."""
    folder = vlms["qwen2_5_vl"]
    save_lora(tmp_path / "lora", load(folder / "vlm"), target_modules=r".*language_model\..*q_proj")
    config = tmp_path / "lora" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(folder / "vlm")}))
    go(folder, output=tmp_path / "out", merged=True, reference=tmp_path / "lora")
    reference = PeftModel.from_pretrained(load(folder / "vlm"), tmp_path / "lora").merge_and_unload()
    after, before, delta = load(tmp_path / "out"), load(folder / "vlm"), torch.load(folder / "delta")
    for name, expected in delta.items():
        module = in_vlm("qwen2_5_vl", before, name.removesuffix(".weight"))
        W, W_reference, merged = (model.get_submodule(module).weight for model in (before, reference, after))
        assert torch.equal(W, W_reference) == ("q_proj" not in name)
        assert torch.allclose(merged, W + (W + expected - W_reference), atol=1e-6), name


def test_a_fine_tune_of_another_architecture_is_refused(tmp_path):
    """Its attention would match, and its experts stay behind."""
    save_layout(tiny_vlm("qwen2_5_vl"), tmp_path / "vlm")
    save_layout(tiny_llm("qwen3_vl"), tmp_path / "expert")
    with pytest.raises(ValueError, match=r"no counterpart in .*: layers.0.self_attn.q_norm.* alone has .*q_proj.bias"):
        go(tmp_path, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_vlm_as_the_expert_of_a_text_model_is_refused(vlms, tmp_path):
    folder = vlms["qwen2_5_vl"]
    with pytest.raises(ValueError, match=r"a text model: .*, so change their places$"):
        transplant(folder / "vlm", folder / "expert", tmp_path / "out", merged=True)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"scale": 0}, 'scale must be "auto" or a finite number other than 0, got 0'),
        ({"scale": "all"}, "got 'all'"),
        ({"scale": "auto", "keep": "keep.safetensors"}, r"budget \(--budget\) is missing"),
        ({"scale": "auto", "budget": 0.1}, r"keep \(--keep\) is missing"),
        ({"budget": 0.1}, "budget=0.1 goes with"),
        ({"scale": "auto", "keep": "x", "budget": -1}, "budget must be a number of nats above 0"),
        ({"load_in_4bit": True}, r"load_in_4bit goes with keep"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"batch_size": 4}, r"batch_size=4 goes with keep \(--keep\): nothing else is asked"),
        ({"rank": 8, "energy": 0.9}, r"give rank=8 or energy=0\.9, not both$"),
        ({"merged": True, "rank": 4}, "rank=4 goes with an adapter"),
        ({"merged": True, "load_in_4bit": True, "keep": "x"}, "load_in_4bit measures an adapter"),
    ],
)
def test_arguments_without_meaning_are_refused(vlms, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        go(vlms["qwen2_5_vl"], output=tmp_path / "out", **options)
    assert not [*tmp_path.iterdir()]
