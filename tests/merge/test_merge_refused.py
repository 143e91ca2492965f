"""What merge_adapter refuses: the message, and nothing left behind."""

import math
import shutil
import warnings

import pytest
import torch
from merging import edit_config, edit_weights, lora, merge, rename_module, save_adapter, save_base
from peft import LoHaConfig
from tiny import edit_tensors

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
    "no alpha": (lora(lora_alpha=0), "changes no weight of .*: its lora_alpha is 0$"),
    "untrained": (lora(std=0), "changes no weight of .* lora_B are zero, as before training"),
    "nan": (
        lambda p: edit_weights(p / "adapter", lambda t: t[Q.format("B")].fill_(float("nan"))),
        "adapter .* holds NaN or infinity in .*layers.0.self_attn.q_proj.lora_B.weight",
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
