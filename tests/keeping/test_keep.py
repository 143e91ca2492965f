"""keep: the gradient that is added, in every loop; METHOD's identity 7 against float64."""

import copy
import os
import random

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from keep_sets import dense_logprobs, make
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    Trainer,
    TrainingArguments,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from drift_peft import DriftConfig, KeepSet, keep, language_model_targets, telemetry
from drift_peft.keeping import measure, summarize
from drift_peft.keeping.distance import bucketed_kl

IDS = torch.arange(7, 27).reshape(2, 10)
ALL = {"samples": 6, "top_k": 64}  # the whole vocabulary


def load(folder, **options):
    return AutoModelForImageTextToText.from_pretrained(folder / "base", **{"dtype": torch.float32, **options})


def wrapped(folder, seed=1, **options):
    """Plain LoRA whose B is not zero, so that the model has gone from the VLM."""
    model = load(folder, **options)
    torch.manual_seed(seed)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=language_model_targets(model)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="session")
def processor(folder):
    return AutoProcessor.from_pretrained(folder / "base")


@pytest.fixture(scope="session")
def whole(folder):
    return make(folder, "everything.safetensors", **ALL)


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def task(model, ids=IDS):
    model(input_ids=ids, labels=ids).loss.backward()


class Still(torch.optim.SGD):
    """Takes no step, and remembers the gradients that it was given."""

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        self.seen = [p.grad.clone() for group in self.param_groups for p in group["params"]]
        return loss


def seen(model, optimizer=None, **loop):
    """The gradients at the optimizer of one step of the task."""
    optimizer = optimizer or Still(trained(model), lr=0.1)
    task(model)
    optimizer.step()
    return optimizer.seen


def oracle(model, processor, samples):
    """∇ of the mean KL of all answer tokens in float64: dense, one sample at a time, no padding."""
    exact = copy.deepcopy(model).double().train()
    parameters = trained(exact)
    total, tokens = 0.0, 0
    for sample in samples:
        ours = torch.enable_grad()(dense_logprobs.__wrapped__)(exact, processor, sample)
        theirs = torch.full_like(ours, float("-inf"), requires_grad=False).detach()
        theirs = theirs.scatter(1, sample.top_tokens, sample.top_logprobs.double())
        theirs = torch.log_softmax(theirs, -1)
        total = total + (theirs.exp() * (theirs - ours)).sum()
        tokens += len(sample.tokens)
    return [g.float() for g in torch.autograd.grad(total / tokens, parameters)], (total / tokens).item()


def norm(tensors):
    return torch.stack([t.double().norm() for t in tensors]).norm()


# Identity 7


@pytest.mark.parametrize(("weight", "bound"), [(1.0, None), (3.0, None), (1.0, 1e-2), (3.0, 1e-3)])
def test_the_added_gradient_is_autograds_of_the_weighted_distance(folder, processor, whole, weight, bound):
    model = wrapped(folder)
    plain = seen(model)
    model.zero_grad()
    keep(model, whole, processor, weight=weight, bound=bound, batch_size=len(whole))
    kept = seen(model)
    expected, kl = oracle(model, processor, list(whole))
    factor = 1.0 if bound is None else min(1.0, float(bound * norm(plain) / (weight * norm(expected))))
    assert bound is None or factor < 1
    for before, after, wanted in zip(plain, kept, expected, strict=True):
        torch.testing.assert_close(after - before, weight * factor * wanted, rtol=2e-3, atol=2e-6)
    numbers = telemetry(model)
    assert numbers["keep_kl"] == pytest.approx(kl, rel=1e-4) and kl > 1e-3
    assert numbers["keep_ratio"] == pytest.approx(
        weight * factor * norm(expected).item() / norm(plain).item(), rel=1e-2
    )


def test_a_model_that_has_not_changed_is_at_a_distance_of_zero(folder, processor, whole):
    model = load(folder)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=language_model_targets(model)))
    keep(model, whole, processor, bound=None)
    plain = seen(wrapped(folder).base_model.disable_adapter_layers() or model)
    assert telemetry(model)["keep_kl"] == pytest.approx(0, abs=1e-6) and telemetry(model)["keep_ratio"] < 1e-3
    assert all(torch.isfinite(g).all() for g in plain)
    distances = measure(model, whole, processor, progress=False)
    assert all(d.kl < 1e-6 and d.agreement == 1 for d in distances)


def test_the_distance_is_that_from_the_model_with_its_adapters_off(folder, processor, whole):
    model = wrapped(folder).eval()
    found = measure(model, whole, processor, batch_size=4, progress=False)
    for distance, sample in zip(found, whole, strict=True):
        ours = dense_logprobs(copy.deepcopy(model).double(), processor, sample)
        with model.disable_adapter():
            theirs = dense_logprobs(copy.deepcopy(model).double(), processor, sample)
        kl = (theirs.exp() * (theirs - ours)).sum(-1).mean().item()
        assert distance.kl == pytest.approx(kl, rel=1e-3, abs=1e-5)
    summary = summarize(found)
    assert summary["total"]["answers"] == len(whole)
    low, high = summary["total"]["kl_interval"]
    assert low <= summary["total"]["kl"] <= high


@given(st.integers(2, 40), st.integers(0, 10_000))
def test_what_is_kept_of_the_distribution_bounds_the_distance_from_below(size, seed):
    generator = torch.Generator().manual_seed(seed)
    logits, theirs = (3 * torch.randn(5, size, generator=generator).double() for _ in range(2))
    p = torch.log_softmax(theirs, -1)
    full = (p.exp() * (p - torch.log_softmax(logits, -1))).sum(-1)
    before = torch.zeros(5)
    for k in range(1, size + 1):
        top = p.topk(k)
        found = bucketed_kl(logits, top.indices, top.values)
        assert (found >= before - 1e-4).all() and (found <= full + 1e-4).all()
        before = found
    torch.testing.assert_close(found.double(), full, rtol=1e-4, atol=1e-5)


# Loops


@pytest.mark.parametrize("weight", [0, None])
def test_nothing_is_kept_bit_for_bit(folder, processor, whole, weight):
    one, other = wrapped(folder), wrapped(folder)
    keep(one, whole, processor)
    keep(one, whole if weight == 0 else None, processor, weight=weight or 0)
    assert all(map(torch.equal, seen(one), seen(other)))


def test_accumulation_checkpointing_and_closures_change_nothing(folder, processor, whole):
    def run(micro=1, checkpointing=False, closure=False):
        model = wrapped(folder).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        keep(model, whole, processor, batch_size=4)
        optimizer = Still(trained(model), lr=0.1)

        def backward():
            for part in IDS.chunk(micro):
                (model(input_ids=part, labels=part).loss / micro).backward()

        optimizer.step(backward) if closure else (backward(), optimizer.step())
        return optimizer.seen

    expected = run()
    for changed in ({"micro": 2}, {"checkpointing": True}, {"closure": True}):
        for one, other in zip(run(**changed), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_it_acts_before_the_guidance(folder, processor, whole, monkeypatch):
    """The bias's norms and cosines see the whole gradient."""
    order = []
    monkeypatch.setattr("drift_peft.keeping.train.Keeping._add", lambda *_: order.append("keep"))
    monkeypatch.setattr("drift_peft.tuner.step.bias_gradients", lambda *_: order.append("guide"))
    model = load(folder)
    held = DriftConfig(r=4, target_modules=["q_proj"], drift_target="base", drift_scale="decoupled")
    model = get_peft_model(model, held)
    keep(model, whole, processor)
    seen(model)
    assert order == ["keep", "guide"]


def test_steps_in_between_and_random_numbers(folder, processor, whole):
    model = wrapped(folder)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.lora_dropout["default"] = torch.nn.Dropout(0.5)
    keep(model, whole, processor, every=2, batch_size=2)
    other = copy.deepcopy(model)
    found = []
    for each in (model, other):
        set_seed(3)
        optimizer, drawn = Still(trained(each), lr=0.1), []
        for _ in range(3):
            drawn.append(seen(each, optimizer))
            each.zero_grad()
        found.append((drawn, torch.rand(3), np.random.rand(), random.random()))
    (kept, *after), (plain, *after_plain) = found
    assert torch.equal(after[0], after_plain[0]) and after[1:] == after_plain[1:]
    same = [all(map(torch.equal, one, two)) for one, two in zip(kept, plain, strict=True)]
    assert same == [False, True, False]  # the task's own dropout is the same in all of them


def test_resuming_goes_on_in_the_order(folder, processor, whole):
    def run(steps, optimizer=None, model=None):
        model = model or wrapped(folder)
        keep(model, whole, processor, batch_size=2)
        optimizer = optimizer or Still(trained(model), lr=0.1)
        found = []
        for _ in range(steps):
            found.append(seen(model, optimizer))
            model.zero_grad()
        return found, optimizer

    expected, _ = run(4)
    _, optimizer = run(2)
    model = wrapped(folder)
    resumed = Still(trained(model), lr=0.1)
    resumed.load_state_dict(optimizer.state_dict())
    found, _ = run(2, resumed, model)
    for one, two in zip(found, expected[2:], strict=True):
        assert all(map(torch.equal, one, two))
    assert not all(map(torch.equal, expected[0], expected[1]))


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_bases(folder, processor, whole, bits):
    quantization = BitsAndBytesConfig(
        load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=["model.visual", "lm_head"],
    )  # fmt: skip
    model = load(folder, quantization_config=quantization)
    held = DriftConfig(r=4, target_modules=["q_proj"], drift_target="base", drift_scale="decoupled")
    model = get_peft_model(model, held)
    keep(model, whole, processor, bound=None)
    gradients = seen(model)
    numbers = telemetry(model)
    assert numbers["keep_kl"] > 0 and all(torch.isfinite(g).all() for g in gradients)


def test_full_fine_tuning_gets_nearer(folder, processor, whole):
    model = load(folder).train()
    with torch.no_grad():
        for parameter in model.model.language_model.parameters():
            if parameter.dim() == 2:
                parameter += 0.3 * parameter.std() * torch.randn_like(parameter)
    model.model.visual.requires_grad_(False)
    keep(model, whole, processor, bound=None, batch_size=6)
    before = summarize(measure(model, whole, processor, progress=False))["total"]["kl"]
    optimizer = torch.optim.AdamW(trained(model), lr=1e-3, weight_decay=0.0)
    for _ in range(20):
        for parameter in trained(model):
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    after = summarize(measure(model, whole, processor, progress=False))["total"]["kl"]
    assert after < before / 2


def rows(count=8):
    return [
        {"input_ids": IDS[i % 2], "labels": IDS[i % 2], "attention_mask": torch.ones(10).long()} for i in range(count)
    ]


def arguments(cls, folder, **options):
    return cls(
        output_dir=str(folder), max_steps=2, logging_steps=1, use_cpu=True, report_to=[], save_strategy="no",
        per_device_train_batch_size=2, remove_unused_columns=False, disable_tqdm=True, **options,
    )  # fmt: skip


def test_trainer_logs_it_without_any_guidance(folder, processor, whole, tmp_path):
    model = wrapped(folder)
    keep(model, whole, processor, batch_size=2)
    trainer = Trainer(model, arguments(TrainingArguments, tmp_path), train_dataset=rows())
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 2 and all(log["drift/keep_kl"] > 0 and log["drift/keep_ratio"] > 0 for log in logs)


def test_trl(folder, processor, whole, tmp_path):
    from datasets import Dataset
    from PIL import Image

    picture = Image.open(next((folder / "pictures").iterdir())).convert("RGB")
    turns = [{"role": "user", "content": "how many"}, {"role": "assistant", "content": "2"}]
    data = Dataset.from_list([{"messages": turns, "images": [picture]} for _ in range(4)])
    model = wrapped(folder)
    keep(model, whole, processor, batch_size=2)
    config = arguments(SFTConfig, tmp_path, max_length=None)
    trainer = SFTTrainer(model, config, train_dataset=data, processing_class=copy.deepcopy(processor))
    trainer.train()
    assert trainer.state.log_history[0]["drift/keep_kl"] > 0


# Two processes


def of_process(rank, folder, port, results):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    torch.set_num_threads(1)
    processor = AutoProcessor.from_pretrained(folder / "base")
    model = wrapped(folder)
    keep(model, folder / "everything.safetensors", processor, batch_size=3)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = Still(trained(model), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        part = IDS[rank : rank + 1]
        parallel(input_ids=part, labels=part).loss.backward()
        optimizer.step()
    torch.save(optimizer.seen, results / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_are_one_with_both_batches(folder, processor, whole, tmp_path):
    mp.spawn(of_process, (folder, random.Random(os.getpid()).randint(20_000, 60_000), tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    model = wrapped(folder)
    keep(model, whole, processor, batch_size=6)
    optimizer = Still(trained(model), lr=0.1)
    for _ in range(2):
        model.zero_grad()
        expected = seen(model, optimizer)
    for one, two, wanted in zip(first, second, expected, strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, wanted, rtol=1e-3, atol=1e-6)


# Refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": -1}, "weight must be a finite number of at least 0, got -1"),
        ({"weight": float("nan")}, "weight must be a finite number of at least 0"),
        ({"bound": 0}, "bound must be positive, or None for no bound, got 0"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1"),
        ({"every": 1.5}, "every must be a whole number of at least 1, got 1.5"),
        ({"processor": None}, "keep needs the VLM's processor"),
    ],
)
def test_values_out_of_range(folder, processor, whole, settings, message):
    model = load(folder)
    with pytest.raises(ValueError, match=message):
        keep(model, whole, **{"processor": processor, **settings})


def test_a_set_of_another_model_is_refused(folder, processor, whole):
    model = load(folder)
    model.config.model_type = "qwen3_vl"
    with pytest.raises(ValueError, match=r"holds a qwen2_5_vl's answers, and the model is a qwen3_vl"):
        keep(model, whole, processor)
    with pytest.raises(FileNotFoundError, match=r"there is no file nowhere\.safetensors"):
        keep(load(folder), "nowhere.safetensors", processor)
    assert isinstance(whole, KeepSet)
