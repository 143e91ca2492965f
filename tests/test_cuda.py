"""The same on a GPU: 4-bit training, fused optimizers under a GradScaler, and no synchronization within the step."""

import json

import pytest
import torch
from peft import get_peft_model
from recipe_runs import CONFIGS, FAMILY, KEEPING, SIZES, SMALL, flags, sft_vlm
from safetensors.torch import load_file
from tiny import save_layout, tiny_expert, tiny_vlm
from tiny_vlm import save_pair, save_pictures
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig
from twin import BATCH, assert_same_update, backward, sgd, state, train, train_by_oracle, twin_of
from twin import steered as steered_llm

from drift_peft import DriftConfig, build_prior, merge_adapter, telemetry

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device (make test-cuda)")
IDS = torch.arange(7, 27).reshape(2, 10)
SKIP = ["lm_head", "model.visual"]
MODES = [("adaptive", "residual"), ("gradnorm", "delta"), ("absolute", "factors"), ("decoupled", "factors")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda")
    vlm = tiny_vlm("qwen2_5_vl")
    expert, _ = tiny_expert("qwen2_5_vl", vlm)
    save_layout(vlm, folder / "vlm")
    save_layout(expert, folder / "expert")
    build_prior(folder / "expert", folder / "vlm", folder / "prior.safetensors", rank=8, progress=False)
    return folder


def steered(folder, device, scale="adaptive", target="residual", alpha=None, **options):
    model = AutoModelForImageTextToText.from_pretrained(folder / "vlm", dtype=torch.float32, **options)
    settings = {"drift_scale": scale, "drift_target": target, "r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}
    settings |= {} if alpha is None else {"drift_alpha": alpha}
    return get_peft_model(model.to(device), DriftConfig(prior=folder / "prior.safetensors", **settings)).train()


def adapter(model):
    return [p for p in model.parameters() if p.requires_grad]


def test_prior_built_on_the_gpu_matches(folder, tmp_path):
    cpu = build_prior(folder / "expert", folder / "vlm", tmp_path / "c.safetensors", rank=8, device="cpu")
    gpu = build_prior(folder / "expert", folder / "vlm", tmp_path / "g.safetensors", rank=8, device="cuda")
    for name in cpu:
        assert gpu[name].energy == pytest.approx(cpu[name].energy, rel=1e-4)
        dense = [w.U.float() * w.S @ w.Vh.float() for w in (cpu[name], gpu[name])]
        assert (dense[0] - dense[1]).norm() < 0.02 * dense[0].norm()


@pytest.mark.parametrize("scale, target", MODES)
def test_a_step_equals_the_cpus(folder, scale, target):
    models = [steered(folder, device, scale, target) for device in ("cpu", "cuda")]
    for model in models:
        optimizer = torch.optim.SGD(adapter(model), lr=0.01)
        for _ in range(3):
            ids = IDS.to(model.device)
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for want, got in zip(*map(adapter, models), strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("scale, target", MODES)
@pytest.mark.parametrize("fused", [False, True])
def test_no_synchronization_within_the_step(folder, scale, target, fused):
    model = steered(folder, "cuda", scale, target)
    optimizer = torch.optim.AdamW(adapter(model), lr=1e-3, fused=fused)
    ids = IDS.cuda()
    for step in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first step stacks the prior
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        optimizer.zero_grad()
    assert telemetry(model)["guided_steps"] == 3


@pytest.mark.parametrize("scale, target", MODES)
def test_fused_optimizer_under_a_grad_scaler(folder, scale, target):
    """Loss scaling changes nothing, and a step that overflows applies nothing and is not counted."""
    plain, scaled = (steered(folder, "cuda", scale, target) for _ in range(2))
    ids = IDS.cuda()
    optimizer = torch.optim.AdamW(adapter(plain), lr=1e-3, fused=True)
    for _ in range(2):
        plain(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer = torch.optim.AdamW(adapter(scaled), lr=1e-3, fused=True)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    for overflow in (False, True, False):
        scaler.scale(scaled(input_ids=ids, labels=ids).loss).backward()
        if overflow:
            adapter(scaled)[0].grad.fill_(float("inf"))
        before = [p.clone() for p in adapter(scaled)]
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if overflow:
            assert all(torch.equal(a, b) for a, b in zip(before, adapter(scaled), strict=True))
    for want, got in zip(adapter(plain), adapter(scaled), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)
    assert telemetry(scaled)["guided_steps"] == 2


@pytest.mark.parametrize("scale, target", MODES)
def test_telemetry_before_the_first_step(folder, scale, target):
    model = steered(folder, "cuda", scale, target)
    assert telemetry(model)["guided_steps"] == 0 and telemetry(model)["absorbed"] == 0


def test_after_a_change_of_device(pair):
    model = steered_llm(pair)
    twin = twin_of(pair, model)
    for device in ("cpu", "cuda", "cpu"):
        start = state(model)
        model.to(device)
        train(model, sgd(model), backward=lambda m, device=device: backward(m, BATCH.to(device)))
        model.to("cpu")
        assert telemetry(model)["gradient_cosine"] != 0  # of a step on the other device
        train_by_oracle(twin, sgd(twin), pair.prior, "adaptive", "residual")
        assert_same_update(model, twin, start, 1e-4)


def test_4bit_training_and_merge(folder, tmp_path):
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, llm_int8_skip_modules=SKIP
    )
    model = steered(folder, "cuda", alpha=1.0, quantization_config=quantization, device_map={"": 0})
    ids = IDS.cuda()
    optimizer = torch.optim.AdamW(adapter(model), lr=1e-3)
    for _ in range(10):
        with torch.autocast("cuda", torch.bfloat16):
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert telemetry(model)["alignment"] > 0.2
    model.eval()
    with torch.no_grad():
        want = model(input_ids=ids).logits
        got = model.merge_and_unload()(input_ids=ids).logits
    assert (got - want).norm() < 0.5 * want.norm()


def test_optimizers_of_bitsandbytes(folder):
    import bitsandbytes as bnb

    for kind in (bnb.optim.AdamW8bit, bnb.optim.PagedAdamW8bit):
        model = steered(folder, "cuda")
        optimizer = kind(adapter(model), lr=1e-3)
        ids = IDS.cuda()
        for _ in range(3):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert telemetry(model)["guided_steps"] == 3 and telemetry(model)["alignment"] > 0


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.filterwarnings("ignore:Switched off bitsandbytes", "ignore:.*gradient_checkpointing.*:FutureWarning")
def test_a_recipe_trains_and_its_adapter_merges(name, tmp_path):
    for folder in ("pair", "pictures"):
        (tmp_path / folder).mkdir()
    made, data = save_pair(tmp_path / "pair", FAMILY[name]), save_pictures(tmp_path / "pictures")
    paths = {"base": made / "base", "expert": made / "expert", "prior": tmp_path / "prior.safetensors", "data": data}
    settings = {**paths, "output_dir": tmp_path / "run", **SMALL, **KEEPING, **SIZES.get(name, {})}
    trainer = sft_vlm.main(["--config", str(CONFIGS / f"{name}.yaml"), *flags(**settings)])
    assert trainer.model.device.type == "cuda"
    results = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["results"]
    assert results["guided_steps"] == results["steps"] == 2 and results["peak_gpu_gb"] > 0
    weights = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())
    assert sum(bool(weight.any()) for key, weight in weights.items() if ".lora_B" in key) == 14
    merge_adapter(made / "base", tmp_path / "run", tmp_path / "merged", progress=False)
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", device_map={"": 0})
    assert merged(input_ids=IDS.cuda() % 40 + 7).logits.isfinite().all()
