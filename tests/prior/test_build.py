"""build.py: the prior is the known Δ for every family, and its statistics are those of Δ."""

import subprocess
import sys
import warnings
from itertools import cycle
from pathlib import Path

import pytest
import torch
from known_delta import Q, build, matrix
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny import FAMILIES, LAYOUTS, MIXED, edit_tensors, save_layout, tiny_expert, tiny_llm, tiny_vlm

from drift_peft.prior.build import build_prior


@pytest.mark.parametrize(("family", "layout"), zip(FAMILIES, cycle(LAYOUTS)))
def test_prior_is_the_known_delta(family, layout, tmp_path):
    """That each family is read from each layout is shown in tests/checkpoints/test_checkpoint.py."""
    vlm = tiny_vlm(family)
    expert, delta = tiny_expert(family, vlm)
    many = LAYOUTS.index(layout) % 2
    save_layout(vlm, tmp_path / "vlm", layout, "5GB" if many else "20KB")
    save_layout(expert, tmp_path / "expert", layout, "20KB" if many else "5GB")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # rope theta, which has a test of its own
        prior = build(tmp_path, rank=64)
    assert prior.keys() == delta.keys()
    for name, weight in prior.items():
        assert torch.allclose(matrix(weight), delta[name], atol=1e-2 * delta[name].abs().max())
        assert weight.delta_norm == pytest.approx(float(delta[name].norm()), rel=1e-4)
        assert weight.energy == pytest.approx(1, abs=1e-5) and weight.cosine == pytest.approx(0.995, abs=0.002)


def test_statistics(pair, tmp_path):
    prior = build(tmp_path, rank=12)
    state = tiny_vlm("llava").get_decoder().state_dict()
    for name, weight in prior.items():
        W, delta = state[name], pair[name]
        assert weight.U.shape == (len(W), 12) and weight.S.shape == (12,) and weight.Vh.shape == (12, W.shape[1])
        best = torch.linalg.svdvals(delta).square()
        assert weight.energy == pytest.approx(float(best[:12].sum() / best.sum()), rel=5e-3)
        assert weight.base_norm == pytest.approx(float(W.norm()))
        cosine = torch.cosine_similarity((W + delta).flatten(), W.flatten(), dim=0)
        assert weight.cosine == pytest.approx(float(cosine), abs=1e-5)
        u, v = weight.U.float()[:, :8], weight.Vh.float()[:8]
        assert weight.fingerprint == pytest.approx((u.T @ W @ v.T).diag().tolist(), abs=1e-5)


def test_metadata(pair, tmp_path):
    metadata = build(tmp_path, rank=100, modules=["mlp"], seed=3).metadata
    weights = metadata.pop("weights")
    assert metadata == {
        "format": 1,
        "expert": {"id": str(tmp_path / "expert"), "revision": None},
        "base": {"id": str(tmp_path / "vlm"), "revision": None},
        "reference": None, "rank": 100, "energy": None, "max_rank": None, "dtype": "bfloat16", "seed": 3,
        "modules": ["mlp"], "only_layers": None, "skip_first": 0, "without_counterpart": {}, "not_steered": [],
    }  # fmt: skip
    assert weights.keys() == {name for name in pair if ".mlp." in name}
    assert {tuple(stats["shape"]) for stats in weights.values()} == {(64, 128), (128, 64)}
    assert {stats["rank"] for stats in weights.values()} == {64}  # the ceiling of 100, capped and recorded


def test_same_inputs_same_bytes(pair, tmp_path):
    files = [build(tmp_path, rank=4, output=tmp_path / name).path.read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]
    assert build(tmp_path, rank=4, seed=1).path.read_bytes() != files[0]


def test_bf16_against_fp32_checkpoints(pair, tmp_path):
    vlm = tiny_vlm("llava").bfloat16()
    save_layout(vlm, tmp_path / "vlm")
    prior = build(tmp_path)
    expected = load_file(tmp_path / "expert" / "model.safetensors")[f"model.{Q}"]
    expected = expected - vlm.get_decoder().state_dict()[Q].float()  # subtracted in fp32, not in bf16
    assert prior[Q].delta_norm == pytest.approx(float(expected.norm()), rel=1e-6)


def test_hierarchical_prior_takes_delta_from_the_reference(pair, tmp_path):
    reference = tiny_llm("llava", seed=9)
    state = load_file(tmp_path / "expert" / "model.safetensors")
    for name, parameter in reference.named_parameters():
        parameter.data.copy_(state[name] + 0.01 * torch.randn(parameter.shape))
    save_layout(reference, tmp_path / "reference")
    direct = build(tmp_path)
    prior = build(tmp_path, reference=tmp_path / "reference", output=tmp_path / "h.safetensors")
    expected = state[f"model.{Q}"] - reference.get_decoder().state_dict()[Q]
    assert torch.allclose(matrix(prior[Q]), expected, atol=1e-3)
    assert (prior[Q].base_norm, prior[Q].cosine) == (direct[Q].base_norm, direct[Q].cosine)
    assert prior.metadata["reference"] == {"id": str(tmp_path / "reference"), "revision": None}


def test_a_weight_without_delta_is_not_steered_but_recorded(pair, tmp_path):
    base = load_file(tmp_path / "vlm" / "model.safetensors")
    edit_tensors(tmp_path / "expert", lambda t: t.update({f"model.{Q}": base[f"language_model.model.{Q}"]}))
    prior = build(tmp_path)
    assert Q not in prior and len(prior) == 13 and prior.metadata["not_steered"] == [Q]


def test_progress_bar_names_the_weights(pair, tmp_path, capsys):
    build_prior(tmp_path / "expert", tmp_path / "vlm", tmp_path / "p.safetensors", rank=2)
    captured = capsys.readouterr()
    assert "14/14" in captured.err and "layers.1.self_attn.v_proj.weight" in captured.err and not captured.out


@pytest.mark.parametrize("family", MIXED)
def test_hybrids_and_mixtures_of_experts(family, tmp_path):
    vlm = tiny_vlm(family)
    expert, delta = tiny_expert(family, vlm)
    save_layout(vlm, tmp_path / "vlm")
    save_layout(expert, tmp_path / "expert", max_shard_size="20KB")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prior = build(tmp_path)
    assert prior.keys() == delta.keys()
    assert all(torch.allclose(matrix(w), delta[name], atol=1e-2 * delta[name].abs().max()) for name, w in prior.items())
    left = prior.metadata["without_counterpart"]
    said = [str(w.message) for w in caught if "not steered" in str(w.message)]
    assert len(said) == bool(left) == (family != "mistral_llava")
    assert all(f"{pattern} ({count}" in said[0] for pattern, count in left.items())


def test_an_adapter_is_an_expert(pair, tmp_path):
    llm = tiny_llm("llava")
    llm.load_state_dict(load_file(tmp_path / "expert" / "model.safetensors"))
    save_layout(llm, tmp_path / "text")
    adapted = get_peft_model(llm, LoraConfig(r=2, target_modules=["q_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "text")
    adapted.save_pretrained(tmp_path / "adapter")
    prior = build(tmp_path, expert=tmp_path / "adapter")
    merged = adapted.merge_and_unload().get_decoder().state_dict()
    base = tiny_vlm("llava").get_decoder().state_dict()
    assert len(prior) == 14 and prior.metadata["expert"]["base"]["id"] == str(tmp_path / "text")
    for name in (Q, "layers.1.mlp.up_proj.weight"):
        assert torch.allclose(matrix(prior[name]), merged[name] - base[name], atol=2e-3)


MEMORY = """
import sys, threading, time
from drift_peft.prior.build import build_prior

def anonymous():
    status = open("/proc/self/status").read()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024

def peak(layers, output):
    highest, done = [anonymous()], threading.Event()
    def watch():
        while not done.wait(0.001):
            highest.append(anonymous())
    watcher = threading.Thread(target=watch)
    watcher.start()
    build_prior(f"expert{layers}", f"vlm{layers}", output, rank=4, modules="mlp", progress=False)
    done.set()
    watcher.join()
    return max(highest)

peak(2, "first")  # with what is allocated once
print(peak(2, "a"), peak(7, "b"))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_layers(tmp_path):
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux")
    size = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 8}
    for layers in (2, 7):
        model = tiny_llm("llava", **size, head_dim=64, num_hidden_layers=layers)
        save_layout(model, tmp_path / f"vlm{layers}")
        for parameter in model.parameters():
            parameter.data += 0.01 * torch.ones_like(parameter)  # of rank 1, which is decomposed fast
        save_layout(model, tmp_path / f"expert{layers}")
    command = [sys.executable, "-c", MEMORY]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    few, many = map(float, run.stdout.split())
    assert many - few < 20, f"{few} MB with 2 layers, {many} MB with 7, of which each has 9 MB of Δ"
