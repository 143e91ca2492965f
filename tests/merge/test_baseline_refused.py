"""What merge_baseline refuses or warns of: the message, and nothing left behind."""

import json
import math
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_layout, tiny_llm, tiny_vlm
from trios import Q, merge

from drift_peft import merge_baseline


def spoil(role, value):
    def change(folder):
        for shard in (folder / role).glob("*.safetensors"):
            held = load_file(shard)
            if f"model.{Q}" in held:
                held[f"model.{Q}"][3, 3] = value
                save_file(held, shard, metadata={"format": "pt"})

    return change


def replace_expert(make):
    def change(folder):
        shutil.rmtree(folder / "expert")
        save_layout(make(), folder / "expert")

    return change


def eight_bits(folder):
    for shard in (folder / "expert").glob("*.safetensors"):
        held = {key: t.to(torch.float8_e4m3fn) if "q_proj" in key else t for key, t in load_file(shard).items()}
        save_file(held, shard, metadata={"format": "pt"})


def scaled(folder):
    """In 16 bits, as whoever knows no integers casts them, and with a scale of which the class knows nothing."""
    for shard in (folder / "base").glob("*.safetensors"):
        held = load_file(shard)
        if f"model.{Q}" in held:
            held |= {f"model.{Q}": held[f"model.{Q}"].half(), f"model.{Q}".replace("weight", "scales"): torch.ones(64)}
            save_file(held, shard, metadata={"format": "pt"})


def tiny_weights(folder):
    for role in ("base", "expert"):
        for shard in (folder / role).glob("*.safetensors"):
            held = {key: t * 1e-26 for key, t in load_file(shard).items()}
            save_file(held, shard, metadata={"format": "pt"})


def same(folder):
    shutil.rmtree(folder / "expert")
    shutil.copytree(folder / "base", folder / "expert")


def swapped(folder):
    for role, model in (("expert", tiny_vlm("llava_next")), ("base", tiny_llm("llava"))):
        shutil.rmtree(folder / role)
        save_layout(model, folder / role)


REFUSED = {
    "unknown method": ({"method": "slerp"}, None, "method='slerp' is unknown: choose from task_arithmetic, ties"),
    "ties alone": ({"method": "ties"}, None, r"ties with weights \(1.6, 0.2\) needs the model .*--reference.*--scale"),
    "dare alone": ({"method": "dare_linear"}, None, "dare_linear with weights .* needs the model that base and expert"),
    "other sum": ({"weights": (0.9, 0.2)}, None, r"task_arithmetic with weights \(0.9, 0.2\) needs the model that"),
    "both": ({"weights": (0.9, 0.1), "scale": 1}, None, r"scale=1 .* and weights=\(0.9, 0.1\) for two: give one"),
    "three": ({"weights": (0.9, 0.1, 0)}, None, r"weights are two, .*; got \(0.9, 0.1, 0\)"),
    "infinite": ({"scale": math.inf}, None, "scale is one finite number"),
    "density": ({"method": "ties", "scale": 1, "density": 0}, None, "density must be above 0 and at most 1, got 0"),
    "no density": ({"density": 0.5}, None, "density=0.5 has no meaning for task_arithmetic, which keeps every entry"),
    "module": ({"modules": "head"}, None, r"modules=\['head'\] are not all merged: choose from attn, mlp, norm, bias"),
    "no module": ({"modules": []}, None, r"modules=\[\] are not all merged"),
    "eight bits": ({}, eight_bits, f"{Q} is torch.float8_e4m3fn in the expert .*: name the full-precision one"),
    "scaled": ({}, scaled, rf"{Q} is scaled by model\..*q_proj\.scales in the base .*: name the full-precision one"),
    "no layer": ({"method": "layer_swap"}, None, "skip_first=6 leaves none of the 2 layers of"),
    "other layer": ({"only_layers": [4]}, None, "only_layers names layer 4, but .* has the layers 0 to 1"),
    "no layer to skip": ({"skip_first": -1}, None, "skip_first must be a whole number ≥ 0, got -1"),
    "zero": ({"scale": 0}, None, "the expert's weight is 0, so that nothing of it is merged: give it another one"),
    "of two, zero": ({"weights": (1, 0)}, None, "the expert's weight is 0, so that nothing of it is merged"),
    "tiny": ({"scale": 1e-30}, None, r"task_arithmetic with weights \(1e-30,\) changes no weight of .*base: .* is the"),
    "same": ({}, same, "changes no weight of .* is the same model there"),
    "nan": ({}, spoil("expert", math.nan), f"{Q} of the expert .*expert holds NaN or infinite values"),
    "inf": ({}, spoil("base", math.inf), f"{Q} of the base .*base holds NaN or infinite values"),
    "overflow": (
        {"scale": 3e38},
        None,
        r"model\.layers\..* is not finite after the merge: NaN, Inf or an overflow of torch.float32",
    ),
    "stranger": (
        {},
        replace_expert(lambda: tiny_llm("llava", seed=9)),
        r"has cosine -?0\.0\d\d with that of .*: no common ancestor, or shifted layers; force=True \(--force\)",
    ),
    "other depth": (
        {},
        replace_expert(lambda: tiny_llm("llava", num_hidden_layers=3)),
        "differ in number of layers 3 and 2",
    ),
    "a base that cannot see": ({}, swapped, "expert .* is a vision-language model and base .* a text model: the base"),
    "no expert": ({"expert": "no/where"}, None, "no/where"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(trio, case, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    options, change, message = REFUSED[case]
    if change:
        change(trio)
    before = {file: file.stat().st_mtime_ns for file in trio.rglob("*")}
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        merge(trio, **options)
    assert "\n" not in str(caught.value)
    assert {file: file.stat().st_mtime_ns for file in trio.rglob("*") if file != trio} == before


def test_force_merges_into_a_text_model_too(trio):
    swapped(trio)
    assert merge(trio, force=True).merged > 0


def test_dare_is_refused_where_peft_does_not_divide_by_the_density(trio, monkeypatch):
    monkeypatch.setattr(peft, "__version__", "0.18.1")
    message = (
        r"^method 'dare_ties' needs PEFT 0\.19 or newer, since PEFT 0\.18\.1 does not divide .* merge by 'ties'\.$"
    )
    with pytest.raises(ValueError, match=message):
        merge(trio, "dare_ties", reference=trio / "reference")


def test_a_reference_must_be_related_too(trio):
    shutil.rmtree(trio / "reference")
    save_layout(tiny_llm("llava", seed=9), trio / "reference")
    with pytest.raises(ValueError, match=r"expert has cosine -?0\.0\d\d with that of .*reference: no common ancestor"):
        merge(trio, "ties", reference=trio / "reference")
    assert merge(trio, "ties", reference=trio / "reference", force=True).relative_change > 0.04


def test_weights_whose_squares_vanish_are_merged(trio):
    expected = merge(trio, output=trio / "first").relative_change
    tiny_weights(trio)
    assert merge(trio).relative_change == pytest.approx(expected, rel=1e-3)


def test_warns_of_other_rotations(trio):
    file = trio / "expert" / "config.json"
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    file.write_text(json.dumps({**json.loads(file.read_text()), "rope_parameters": rope}))
    with pytest.warns(UserWarning, match="rope type is linear in the expert and default in the base, rope factor is"):
        merge(trio)


def test_force_merges_strangers(trio):
    replace_expert(lambda: tiny_llm("llava", seed=9))(trio)
    assert merge(trio, force=True).relative_change > 0.04


def test_an_existing_output_is_replaced_only_when_asked(trio):
    output = merge(trio).output
    before = {file.name: file.read_bytes() for file in output.iterdir()}
    where = {"expert": trio / "expert", "base": trio / "base", "progress": False}
    with pytest.raises(FileExistsError, match=r"exists: name another folder, or pass overwrite=True"):
        merge_baseline("task_arithmetic", **where, output=output)
    for role in ("expert", "base", "reference"):
        with pytest.raises(FileExistsError, match=rf"is or holds .*{role}, which it is made of: name another"):
            merge(trio, output=trio / role, reference=trio / "reference")
    spoil("expert", math.nan)(trio)
    with pytest.raises(ValueError, match="holds NaN"):
        merge(trio)
    assert {file.name: file.read_bytes() for file in output.iterdir()} == before
