"""keep in every training loop: the step is the one of its definition, whatever called it."""

import contextlib
import copy
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from kept_models import (
    LORA,
    Watched,
    adapted,
    assert_close,
    expected_step,
    gradients_of_step,
    keep_gradients,
    kept_twin,
    load,
    processor_of,
    with_keeping,
)
from pairs import make_pair
from peft import LoraConfig, prepare_model_for_kbit_training
from processes import on_two, replicated
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import BitsAndBytesConfig, Trainer, TrainingArguments
from transformers.trainer_callback import DefaultFlowCallback
from trl import SFTConfig, SFTTrainer
from twin import BATCH, backward, sgd, train, trainable

from drift_peft import guide, keep, telemetry
from drift_peft.keeping import keep_telemetry, keepings_of

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated", "ignore:Switched off bitsandbytes")
TOWER = ["lm_head", "visual"]


# Plain PyTorch


def test_accumulation(model, folder, processor):
    twin, watched = kept_twin(model, folder)
    optimizer = sgd(twin, lr=0.0)
    for ids in BATCH.chunk(4):
        backward(twin, ids, 1 / 4)
    optimizer.step()
    found = [p.grad for p in trainable(twin)]
    assert_close(found, expected_step(model, processor, watched.batch(0, 3)))
    assert optimizer.param_groups[0]["keep_steps"] == 1


def test_an_adapter_that_is_disabled_at_the_step(model, folder):
    twin, _ = kept_twin(model, folder)
    optimizer = sgd(twin, lr=0.0)
    backward(twin)
    with (
        twin.disable_adapter(),
        pytest.raises(RuntimeError, match=r"frozen by now.*: enable their adapter and make it the active one before"),
    ):
        optimizer.step()


@pytest.mark.parametrize("call", ["positional", "keyword"])
def test_closures(model, folder, processor, call):
    twin, watched = kept_twin(model, folder)
    optimizer = sgd(twin, lr=0.0)

    def closure():
        optimizer.zero_grad()
        return backward(twin)

    backward(twin, BATCH.flip(1))  # stale gradients
    optimizer.step(closure) if call == "positional" else optimizer.step(closure=closure)
    assert_close([p.grad for p in trainable(twin)], expected_step(model, processor, watched.batch(0, 3)))


def test_lbfgs_keeps_one_batch_a_step(model, folder):
    twin, watched = kept_twin(model, folder)
    optimizer = torch.optim.LBFGS(trainable(twin), lr=0.1, max_iter=3)

    def closure():
        optimizer.zero_grad()
        return backward(twin)

    for _ in range(2):
        optimizer.step(closure)
    assert optimizer.param_groups[0]["keep_steps"] == 2
    plain, once = kept_twin(model, folder)
    steps = sgd(plain)
    for _ in range(3):
        gradients_of_step(plain, steps)
    order = once.read  # the batches one after the other
    assert {*order[:6]} <= {*watched.read} <= {*order[:9]}  # of two steps, and what was read ahead


def test_a_state_that_is_asked_for_before_the_first_step_is_no_step(model, folder, processor):
    twin, watched = kept_twin(model, folder)
    optimizer = sgd(twin, lr=0.0)
    get_optimizer_state_dict(twin, optimizer)
    assert optimizer.param_groups[0]["keep_steps"] == 0 and not watched.read
    found = gradients_of_step(twin, optimizer)
    assert_close(found, expected_step(model, processor, watched.batch(0, 3)))


class Child(torch.optim.SGD):
    def step(self, closure=None):
        return super().step(closure)


def test_a_step_within_a_step_adds_once(model, folder, processor):
    twin, watched = kept_twin(model, folder)
    torch.optim.SGD(trainable(twin), lr=1)  # from here on both classes' step() call the hooks
    optimizer = Child(trainable(twin), lr=0.0)
    found = gradients_of_step(twin, optimizer)
    assert_close(found, expected_step(model, processor, watched.batch(0, 3)))
    assert optimizer.param_groups[0]["keep_steps"] == 1


def test_an_optimizer_for_each_parameter(folder, processor):
    """Each steps as soon as its gradient is there, and takes a pass of its own."""
    several = r".*language_model.*\.(q_proj|k_proj|up_proj)"
    model = keep(adapted(folder, target_modules=several), folder / "keep.safetensors", processor, batch_size=1)
    optimizers = {p: torch.optim.SGD([p], lr=0.0) for p in trainable(model)}
    assert len(optimizers) == 12
    for p in optimizers:
        p.register_post_accumulate_grad_hook(lambda p: optimizers[p].step())
    backward(model)
    assert keepings_of(model)[0].counts() == (12, 0)


def test_many_optimizers_in_turn_are_not_warned_of(folder, processor):
    """Rounds, or clients whose optimizers are held: each trains all parameters."""
    model = keep(adapted(folder), folder / "keep.safetensors", processor, batch_size=1)
    optimizers = [sgd(model) for _ in range(9)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for optimizer in optimizers:
            train(model, optimizer, 1)
    assert keepings_of(model)[0].counts() == (9, 0)


@pytest.mark.parametrize(("fused", "unscale"), [(True, False), (True, True), (False, False)])
def test_loss_scaling_does_not_change_the_update(folder, fused, unscale):
    model = adapted(folder, torch.float32)
    plain, _ = kept_twin(model, folder)
    scaled, _ = kept_twin(model, folder)
    make = {"lr": 0.01, "fused": fused}
    train(plain, torch.optim.AdamW(trainable(plain), **make), 3)
    optimizer, scaler = torch.optim.AdamW(trainable(scaled), **make), torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for _ in range(3):
        optimizer.zero_grad()
        scaler.scale(scaled(input_ids=BATCH, labels=BATCH).loss).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    moved = [p - q for p, q in zip(trainable(plain), trainable(model), strict=True)]
    found = [p - q for p, q in zip(trainable(scaled), trainable(model), strict=True)]
    assert_close(found, moved, 1e-3)
    assert telemetry(scaled)["keep_ratio"] == pytest.approx(telemetry(plain)["keep_ratio"], rel=1e-2)


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_skipped_on_inf_applies_nothing(folder, fused):
    twin, _ = kept_twin(adapted(folder, torch.float32), folder)
    start = [p.clone() for p in trainable(twin)]
    optimizer, scaler = torch.optim.AdamW(trainable(twin), lr=0.01, fused=fused), torch.amp.GradScaler("cpu")
    scaler.scale(twin(input_ids=BATCH, labels=BATCH).loss * torch.inf).backward()
    scaler.step(optimizer)
    assert all(torch.equal(p, q) for p, q in zip(trainable(twin), start, strict=True))


def test_autocast_of_the_training(folder):
    """The keep pass computes as training did, though its loop has left autocast when it steps."""
    seen = []

    def see(module, args, output):
        seen.append(output.dtype)

    twin, _ = kept_twin(adapted(folder, torch.float32), folder)
    twin.get_output_embeddings().register_forward_hook(see)
    for context in (torch.autocast("cpu", torch.bfloat16), contextlib.nullcontext()):
        optimizer = sgd(twin, lr=0.0)
        with context:
            loss = twin(input_ids=BATCH, labels=BATCH).loss
        loss.backward()
        with torch.no_grad(), torch.autocast("cpu", torch.float16):
            twin(input_ids=BATCH)  # an evaluation says nothing about the training
        optimizer.step()
        optimizer.zero_grad()
    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    assert seen == [bf16, fp16, bf16, fp32, fp16, fp32]


@pytest.mark.slow
def test_a_compiled_model(model, folder, processor):
    torch._dynamo.reset()
    twin = copy.deepcopy(model)
    compiled, watched = torch.compile(twin, backend="aot_eager"), Watched(folder)
    keep(compiled, watched, processor, batch_size=3)
    optimizer = sgd(twin, lr=0.0)
    backward(compiled)
    optimizer.step()
    found = [p.grad for p in trainable(twin)]
    assert_close(found, expected_step(model, processor, watched.batch(0, 3)), 1e-6)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantized_bases(folder, processor, kind):
    options = {
        "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
        "int8": {"load_in_8bit": True},
    }[kind]
    config = BitsAndBytesConfig(llm_int8_skip_modules=TOWER, **options)
    base = prepare_model_for_kbit_training(load(folder, quantization_config=config), use_gradient_checkpointing=False)
    model, watched = adapted(folder, torch.float32, base), Watched(folder)
    # An evaluation first: on some CPUs bitsandbytes then takes a kernel that has no gradient.
    keep(model, watched, processor, batch_size=3)
    with torch.no_grad():
        model.eval()(input_ids=BATCH)
    found = gradients_of_step(model.train(), sgd(model, lr=0.0))
    assert telemetry(model)["keep_kl"] > 0
    keep(model, None)
    expected = expected_step(model, processor, watched.batch(0, 3))
    assert_close(found, expected, {"nf4": 1e-3, "int8": 0.1}[kind])  # int8 rounds activations by the batch's rows


# Trainer, TRL, accelerate


def tokens(rows=16):
    ids = BATCH.repeat(rows // 8, 1)
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})


SETTINGS = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 3, "logging_steps": 1}
SETTINGS |= {"save_strategy": "no", "report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True}


@pytest.mark.parametrize("trains", ["LoRA", "full"])
def test_trainer_logs_how_far_the_model_is(folder, processor, tmp_path, trains):
    model = adapted(folder, torch.float32) if trains == "LoRA" else load(folder).train()
    watched = keep_watched(model, folder, processor)
    run = Trainer(model, TrainingArguments(tmp_path, learning_rate=0.01, **SETTINGS), train_dataset=tokens())
    run.train()
    logs = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(logs) == 3 and all({"drift/keep_kl", "drift/keep_ratio"} <= entry.keys() for entry in logs)
    assert logs[-1]["drift/keep_kl"] == telemetry(model)["keep_kl"] > 0
    assert not any("drift/guided_steps" in entry for entry in logs)
    assert run.optimizer.param_groups[0]["keep_steps"] == 3 and 9 <= len(watched.read) <= 12


def test_what_is_steered_and_kept_is_measured_once_a_log(folder, processor, tmp_path, monkeypatch):
    model, measured = adapted(folder, torch.float32), []
    guide(model, make_pair(tmp_path, "qwen2_5_vl") / "prior.safetensors")
    keep_watched(model, folder, processor)

    def counted(model):
        measured.append(model)
        return keep_telemetry(model)

    for module in ("drift_peft.keeping.trainer", "drift_peft.tuner.telemetry"):
        monkeypatch.setattr(sys.modules[module], "keep_telemetry", counted)
    run = Trainer(model, TrainingArguments(tmp_path, **SETTINGS), train_dataset=tokens())
    run.train()
    logs = [entry for entry in run.state.log_history if "loss" in entry]
    everything = telemetry(model)
    assert len(measured) == len(logs) + 1 == 4
    logged = {name.removeprefix("drift/"): value for name, value in logs[-1].items() if name.startswith("drift/")}
    assert logged == {name: value for name, value in everything.items() if "/" not in name}
    assert {"keep_kl", "guided_steps", "alignment"} <= logged.keys()


def keep_watched(model, folder, processor, **settings):
    watched = Watched(folder)
    keep(model, watched, processor, batch_size=3, **settings)
    return watched


def test_trainer_resumes_in_the_order(folder, processor, tmp_path):
    def run(steps, resume=False):
        model = adapted(folder, torch.float32, lora_dropout=0.1)
        watched = keep_watched(model, folder, processor)
        settings = {**SETTINGS, "max_steps": steps, "save_strategy": "steps", "save_steps": 2}
        trainer = Trainer(
            model, TrainingArguments(tmp_path, lr_scheduler_type="constant", **settings), train_dataset=tokens()
        )
        trainer.train(resume_from_checkpoint=resume)
        return [p.detach().clone() for p in trainable(model)], watched.read

    run(2)
    resumed, after = run(4, resume=True)
    whole, read = run(4)
    assert after[:6] == read[6:12]
    assert all(torch.equal(p, q) for p, q in zip(resumed, whole, strict=True))


def test_trl_with_images(folder, processor, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "transformers.trainer.DEFAULT_CALLBACKS", [DefaultFlowCallback]
    )  # as where nothing was kept before
    keep_set = Watched(folder)
    chats = [[{"role": "user", "content": "how many"}, {"role": "assistant", "content": str(i)}] for i in range(8)]
    data = Dataset.from_dict({"images": [[keep_set.whole[i].image] for i in range(8)], "messages": chats})
    run = SFTTrainer(
        load(folder),
        SFTConfig(tmp_path, max_length=None, learning_rate=0.05, lr_scheduler_type="constant", **SETTINGS),
        train_dataset=data,
        processing_class=processor,
        peft_config=LoraConfig(**LORA),
    )
    keep(run.model, keep_set, processor, batch_size=3)
    run.train()
    first, *later = [entry["drift/keep_kl"] for entry in run.state.log_history if "loss" in entry]
    assert abs(first) < 1e-6 and len(later) == 2 and min(later) > 1e-4
    assert run.optimizer.param_groups[0]["keep_steps"] == 3


def test_accelerate(model, folder, processor):
    twin, watched = kept_twin(model, folder)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    prepared, optimizer = accelerator.prepare(twin, sgd(twin, lr=0.0))
    for ids in BATCH.chunk(2):
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(input_ids=ids, labels=ids).loss)
            optimizer.step()
    assert_close([p.grad for p in trainable(twin)], expected_step(model, processor, watched.batch(0, 3)))


# Several processes


def test_data_parallel(model, folder, processor, monkeypatch):
    """Its replicas have no parameters; the pass of keeping goes through the model itself, once."""
    twin, watched = kept_twin(model, folder)
    optimizer, heads = sgd(twin, lr=0.0), []
    replicas = replicated(twin, monkeypatch)
    twin.get_output_embeddings().register_forward_hook(lambda head, *_: heads.append(head))
    with ThreadPoolExecutor(2) as pool:
        losses = pool.map(lambda replica, ids: replica(input_ids=ids, labels=ids).loss, replicas, BATCH.chunk(2))
    (sum(losses) / 2).backward()
    optimizer.step()
    head, (keeping,) = twin.get_output_embeddings(), keepings_of(twin)
    assert head not in heads[:2] and {*heads[2:]} == {head} and keeping.counts() == (1, 0)
    assert_close([p.grad for p in trainable(twin)], expected_step(model, processor, watched.batch(0, 3)))


def worker(rank, folder):
    results = {}
    for accumulation in (1, 2):
        model = adapted(folder)
        wrapped, watched = DistributedDataParallel(model), Watched(folder)
        keep(wrapped, watched, processor_of(folder), batch_size=3)
        optimizer, seen = sgd(model), []
        for _ in range(2):
            optimizer.zero_grad()
            *first, last = BATCH.chunk(2)[rank].chunk(accumulation)
            with wrapped.no_sync():
                for ids in first:
                    backward(wrapped, ids, 1 / accumulation)
            backward(wrapped, last, 1 / accumulation)
            optimizer.step()
            seen.append([p.grad.clone() for p in trainable(model)])
        results[accumulation] = seen, watched.read, telemetry(model), [p.detach() for p in trainable(model)]
    model = adapted(folder)
    wrapped, optimizer = DistributedDataParallel(model), sgd(model)
    with wrapped.join():
        train(wrapped, optimizer, 2 - rank)
    keep(wrapped, folder / "keep.safetensors", processor_of(folder), batch_size=3)
    train(wrapped, optimizer, 2)
    results["after"] = keepings_of(model)[0].counts(), [p.detach() for p in trainable(model)]
    with pytest.raises(RuntimeError, match="exhausted"), wrapped.join(throw_on_early_termination=True):
        train(wrapped, optimizer, 2 - rank)
    results["throw"] = keepings_of(model)[0].counts()
    for kind in ("FSDP1", "FSDP2"):
        model = adapted(folder)
        keep(model, folder / "keep.safetensors", processor_of(folder), batch_size=3)
        if kind == "FSDP2":
            sharded = fully_shard(model)
        else:
            sharded = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        optimizer = sgd(sharded)
        backward(sharded, BATCH.chunk(2)[rank])
        with pytest.raises(RuntimeError) as refused:
            optimizer.step()
        results[kind] = str(refused.value)
    return results


@pytest.fixture(scope="module")
def ranks(folder):
    return on_two(worker, folder)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes(model, folder, processor, ranks, accumulation):
    """Each its own batches, whose gradients are averaged; the bound is of the averaged ones."""
    (seen, read, told, weights), (others, others_read, others_told, others_weights) = (r[accumulation] for r in ranks)
    assert not {*read[:6]} & {*others_read[:6]}
    watched, model = Watched(folder), copy.deepcopy(model)
    for step in range(2):
        kept = []
        for each in (read, others_read):
            samples = [watched.whole[i] for i in each[3 * step : 3 * step + 3]]
            kept.append(keep_gradients(model, processor, samples, trainable(model)))
        mean = [(one + other) / 2 for one, other in zip(*kept, strict=True)]
        model.zero_grad()
        backward(model)
        expected = with_keeping([p.grad.clone() for p in trainable(model)], mean)
        for found in (seen[step], others[step]):
            assert_close(found, expected, 1e-6)
        for p, g in zip(trainable(model), expected, strict=True):
            p.data -= 0.05 * g
    assert told == others_told
    assert all(torch.equal(p, q) for p, q in zip(weights, others_weights, strict=True))


def test_beside_uneven_data(ranks):
    """After a join() that has ended, and within one that ends with the first process that is out of data."""
    (counts, weights), (others_counts, others_weights) = (results["after"] for results in ranks)
    assert counts == others_counts == (2, 0)
    assert all(torch.equal(p, q) for p, q in zip(weights, others_weights, strict=True))
    assert [results["throw"] for results in ranks] == [(3, 0), (3, 0)]


def test_sharded_training_is_refused(ranks):
    for results in ranks:
        assert "not available under FSDP1, which flattens parameters: use DDP or one GPU" in results["FSDP1"]
        assert "such as those of FSDP2 (fully_shard): use DDP or one GPU" in results["FSDP2"]
        assert all("(drift-peft keep samples)" in results[kind] for kind in ("FSDP1", "FSDP2"))


def test_deepspeed_is_refused(model, folder, monkeypatch):
    """Its engine steps an optimizer of flat copies of the parameters."""

    class DeepSpeedEngine:
        def __init__(self, module):
            self.module = module
            flat = torch.nn.Parameter(torch.cat([p.detach().flatten() for p in trainable(module)]))
            flat.grad = torch.zeros_like(flat)
            self.optimizer = torch.optim.SGD([flat], lr=0.1)

        def step(self):
            self.optimizer.step()

    module = SimpleNamespace(DeepSpeedEngine=DeepSpeedEngine)
    monkeypatch.setitem(sys.modules, "deepspeed.runtime.engine", module)
    twin, _ = kept_twin(model, folder)
    told = r"keep\(\) is not available under DeepSpeed: use DDP or one GPU, or .*\(drift-peft keep samples\)"
    with pytest.raises(RuntimeError, match=told):
        DeepSpeedEngine(twin).step()
    DeepSpeedEngine(copy.deepcopy(model)).step()  # an engine for another model
