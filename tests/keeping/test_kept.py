"""keep: what a step adds to the gradients, against its definition; and that it leaves everything else alone."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from keep_sets import dense_logprobs, make
from kept_models import (
    Watched,
    adapted,
    assert_close,
    expected_step,
    gradients_of_step,
    keep_gradients,
    keep_loss,
    kept_twin,
    load,
    processor_of,
    task_gradients,
    with_keeping,
)
from pairs import make_pair
from peft import LoraConfig, get_peft_model
from twin import BATCH, backward, bias_by_oracle, randomized, sgd, train, trainable

from drift_peft import DriftConfig, KeepSet, ReasoningPrior, guide, keep, telemetry
from drift_peft.keeping import keepings_of


def full(folder):
    """Trained in full, but for its vision tower."""
    model = load(folder).double().train()
    for name, p in model.named_parameters():
        p.requires_grad = "visual" not in name
        if p.dim() == 2:
            p.data += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    return model


# The added gradient


@pytest.mark.parametrize(("weight", "bound"), [(1.0, 1.0), (3.0, None), (0.01, 1.0), (50.0, 0.5), (0.5, None)], ids=str)
def test_the_added_gradient_is_its_definition(model, folder, processor, weight, bound):
    twin, watched = kept_twin(model, folder, weight=weight, bound=bound)
    found = gradients_of_step(twin, sgd(twin, lr=0.0))
    samples = watched.batch(0, 3)
    assert_close(found, expected_step(model, processor, samples, weight=weight, bound=bound))
    twin, _ = kept_twin(model, folder, weight=weight, bound=bound)
    optimizer = sgd(twin, lr=0.0)
    backward(twin, BATCH)
    with torch.no_grad():  # where a loop's own step may stand
        optimizer.step()
    assert_close([p.grad for p in trainable(twin)], found)
    told = telemetry(twin)
    assert told["keep_kl"] == pytest.approx(float(keep_loss(model, processor, samples)), rel=1e-6)
    assert told["keep_kl"] > 0.01 and (bound is None or told["keep_ratio"] <= bound * (1 + 1e-6))


def test_full_fine_tuning(folder, processor):
    model = full(folder)
    twin, watched = kept_twin(model, folder)
    found = gradients_of_step(twin, sgd(twin, lr=0.0))
    assert_close(found, expected_step(model, processor, watched.batch(0, 3)))


def test_what_an_optimizer_does_not_train_is_left_alone(model, folder, processor):
    """The bound is taken of what it does train; frozen parameters come into no gradient."""
    model = copy.deepcopy(model)
    trainable(model)[0].requires_grad = False
    twin, watched = kept_twin(model, folder)
    backward(twin)
    mine, others = trainable(twin)[::2], trainable(twin)[1::2]
    before = [p.grad.clone() for p in others]
    torch.optim.SGD(mine, lr=0.0).step()
    assert_close([p.grad for p in others], before, 0.0)
    own = [p for p, q in zip(trainable(model), trainable(twin), strict=True) if any(q is m for m in mine)]
    assert_close([p.grad for p in mine], expected_step(model, processor, watched.batch(0, 3), own))
    assert all(p.grad is None for p in twin.parameters() if not p.requires_grad)


@pytest.mark.parametrize("first", ["keep", "guide"])
@pytest.mark.parametrize("by", ["guide", "DriftConfig"])
def test_guidance_sees_the_whole_gradient(folder, processor, tmp_path_factory, first, by):
    path = make_pair(tmp_path_factory.mktemp("prior"), "qwen2_5_vl") / "prior.safetensors"
    settings = {"drift_scale": "gradnorm", "drift_target": "delta", "drift_alpha": 0.8}
    if by == "guide":
        model = adapted(folder)
        guided, watched = copy.deepcopy(model), Watched(folder)
        for what in (first, *({"keep", "guide"} - {first})):
            if what == "keep":
                keep(guided, watched, processor, batch_size=3)
            else:
                guide(guided, path, **settings)
    else:
        guided, watched = randomized(get_peft_model(load(folder), DriftConfig(prior=path, r=4, **settings))), None
        model, watched = copy.deepcopy(guided), Watched(folder)
        guide_off(model)
        keep(guided, watched, processor, batch_size=3)
    found = gradients_of_step(guided, sgd(guided, lr=0.0))
    for p, g in zip(trainable(model), expected_step(model, processor, watched.batch(0, 3)), strict=True):
        p.grad = g
    bias_by_oracle(model, ReasoningPrior.load(path), "gradnorm", "delta")
    assert_close(found, [p.grad for p in trainable(model)], 1e-6)
    assert telemetry(guided)["guided_steps"] == 1 and telemetry(guided)["keep_kl"] > 0


def guide_off(model):
    for module in model.modules():
        for steered in list(vars(module).get("drift", {}).values()):
            steered.release()


def test_weight_norms_are_refused(model, folder, tmp_path):
    guided = guide(copy.deepcopy(model), make_pair(tmp_path, "qwen2_5_vl") / "prior.safetensors", drift_norm="weight")
    keep(guided, folder / "keep.safetensors", processor_of(folder), batch_size=2)
    with pytest.raises(RuntimeError, match=r"drift_norm='weight' does not see the gradient that keep\(\) adds: use"):
        train(guided, sgd(guided), 1)


@pytest.mark.parametrize("rows", [1, 8, 40])
def test_no_batch_of_the_set_is_larger_than_the_trainings(model, folder, processor, rows):
    """It comes in parts then, so that it takes no more memory; what is added stays as it was."""
    twin, watched = kept_twin(model, folder, batch_size=6)
    seen = []
    twin.get_input_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    ids = BATCH[:1].repeat(rows, 1)
    found = gradients_of_step(twin, sgd(twin, lr=0.0), ids)
    first, *parts = seen
    assert first == ids.shape and sum(shape[0] for shape in parts) == 6
    assert all(shape.numel() <= max(ids.numel(), shape[1]) for shape in parts)
    assert (len(parts) == 1) == (rows == 40) and (len(parts) == 6) == (rows == 1)
    expected = with_keeping(
        task_gradients(model, ids), keep_gradients(model, processor, watched.batch(0, 6), trainable(model))
    )
    assert_close(found, expected)


# The distance


def test_with_the_whole_vocabulary_it_is_the_distance_from_the_model_itself(folder, processor):
    keep_set = make(folder, "every_token.safetensors", top_k=64, samples=6)
    model = adapted(folder)
    twin, _ = kept_twin(model, folder, "every_token.safetensors", batch_size=6)
    train(twin, sgd(twin, lr=0.0), 1)
    expected, tokens = 0.0, 0
    for sample in keep_set:
        log_q = dense_logprobs(model, processor, sample)
        with model.disable_adapter():
            log_p = dense_logprobs(model, processor, sample)
        expected += float((log_p.exp() * (log_p - log_q)).sum())
        tokens += len(sample.tokens)
    assert telemetry(twin)["keep_kl"] == pytest.approx(expected / tokens, rel=1e-5)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.zero_()
    fresh, _ = kept_twin(model, folder, "every_token.safetensors", batch_size=6)
    before = [g.clone() for g in gradients_of_step(model, sgd(model, lr=0.0))]
    assert_close(gradients_of_step(fresh, sgd(fresh, lr=0.0)), before, 1e-5)  # nothing is added
    assert abs(telemetry(fresh)["keep_kl"]) < 1e-6


# Nothing else


def test_no_weight_is_no_keeping_to_the_last_bit(folder):
    model = adapted(folder, torch.float32, lora_dropout=0.1)
    twin, watched = kept_twin(model, folder, weight=0)
    other, _ = kept_twin(model, folder)
    keep(other, None)
    for m in (model, twin, other):
        torch.manual_seed(3)
        train(m, torch.optim.AdamW(trainable(m), lr=0.01), 3)
    for m in (twin, other):
        assert all(torch.equal(p, q) for p, q in zip(trainable(model), trainable(m), strict=True))
        with pytest.raises(ValueError, match="No layer of this model is steered"):
            telemetry(m)
    assert watched.read == [] and not any(m._forward_pre_hooks for m in twin.modules())


def test_random_numbers_and_buffers_are_those_of_training(folder):
    """And dropout of the keep pass is drawn by seed and step."""
    model = adapted(folder, torch.float32, lora_dropout=0.3)
    model.get_input_embeddings().register_buffer("passes", torch.zeros((), dtype=torch.long))

    def count(module, args):
        if module.training:
            module.passes += 1

    model.get_input_embeddings().register_forward_pre_hook(count)
    runs, plain = [], copy.deepcopy(model)
    for seed in (0, 0, 1):
        twin, _ = kept_twin(model, folder, every=2, seed=seed)
        torch.manual_seed(0)
        optimizer, gradients = sgd(twin, lr=0.0), []
        for _ in range(4):
            gradients.append(gradients_of_step(twin, optimizer))
        runs.append(gradients)
        state = torch.get_rng_state()
        assert twin.get_input_embeddings().passes == 4
    torch.manual_seed(0)
    without = [gradients_of_step(plain, sgd(plain, lr=0.0)) for _ in range(4)]
    assert torch.equal(state, torch.get_rng_state())
    for step in (1, 3):  # off steps have the same masks
        for gradients in runs:
            assert all(torch.equal(g, h) for g, h in zip(gradients[step], without[step], strict=True))
    for step in (0, 2):
        same = [torch.equal(g, h) for g, h in zip(runs[0][step], runs[1][step], strict=True)]
        other = [torch.equal(g, h) for g, h in zip(runs[0][step], runs[2][step], strict=True)]
        assert all(same) and not any(other)
        assert not any(torch.equal(g, h) for g, h in zip(runs[0][step], without[step], strict=True))


def test_every_sample_comes_once_a_round(model, folder):
    twin, watched = kept_twin(model, folder, batch_size=7)
    train(twin, sgd(twin), 6)
    rounds = [watched.read[i : i + 20] for i in (0, 20)]
    assert all(sorted(each) == list(range(20)) for each in rounds) and rounds[0] != rounds[1]


def test_a_resumed_optimizer_goes_on_in_the_order(folder):
    model = adapted(folder, torch.float32, lora_dropout=0.1)
    torch.manual_seed(1)
    whole, watched = kept_twin(model, folder)
    train(whole, torch.optim.AdamW(trainable(whole), lr=0.01), 4)
    torch.manual_seed(1)
    first, _ = kept_twin(model, folder)
    before = torch.optim.AdamW(trainable(first), lr=0.01)
    train(first, before, 2)
    saved = io.BytesIO()
    torch.save(before.state_dict(), saved)
    saved.seek(0)
    keep(first, None)
    second, again = kept_twin(first, folder)
    optimizer = torch.optim.AdamW(trainable(second), lr=0.01)
    optimizer.load_state_dict(torch.load(saved))
    train(second, optimizer, 2)
    assert optimizer.param_groups[0]["keep_steps"] == 4
    assert again.read[:6] == watched.read[6:12]
    assert all(torch.equal(p, q) for p, q in zip(trainable(whole), trainable(second), strict=True))


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def test_a_copy_of_the_embedding_alone_tells_the_model(folder, processor):
    """As PEFT copies it for modules_to_save: the model itself is not copied along, and its batches are still seen."""
    model = load(folder)
    kept = vars(keep(model, folder / "keep.safetensors", processor))["drift_keep"]
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"]))
    hooked = [hook.__self__ for m in wrapped.modules() for hook in m._forward_pre_hooks.values()]
    assert len(hooked) > 1 and all(owner is kept for owner in hooked)
    with torch.autocast("cpu", torch.bfloat16):
        wrapped(input_ids=BATCH)
    assert kept.seen == BATCH.numel() and kept.autocast == torch.bfloat16


def test_an_embedding_called_by_keyword_is_seen(folder, processor):
    model = keep(load(folder), folder / "keep.safetensors", processor)
    with torch.autocast("cpu", torch.bfloat16):
        model.get_input_embeddings()(input=BATCH)
    (kept,) = keepings_of(model)
    assert kept.seen == BATCH.numel() and kept.autocast == torch.bfloat16


@pytest.mark.parametrize("how", [copy.deepcopy, pickled])
def test_copies_are_kept_too(model, folder, processor, how):
    kept = keep(copy.deepcopy(model), folder / "keep.safetensors", processor, batch_size=2)
    train(kept, sgd(kept), 1)
    clone = how(kept)
    for m in (kept, clone):
        train(m, sgd(m), 2)
    assert all(torch.equal(p, q) for p, q in zip(trainable(kept), trainable(clone), strict=True))
    plain = copy.deepcopy(model)
    train(plain, sgd(plain), 3)
    assert not any(torch.equal(p, q) for p, q in zip(trainable(kept), trainable(plain), strict=True))
    freed = [weakref.ref(m) for m in (kept, trainable(kept)[0])]
    del kept, m
    gc.collect()
    assert [ref() for ref in freed] == [None, None]
    train(clone, sgd(clone), 1)


def test_keeping_again_replaces_the_settings(model, folder, processor):
    twin, watched = kept_twin(model, folder, weight=5.0, bound=None)
    other = Watched(folder)
    keep(twin.base_model, other, processor, batch_size=3, bound=None)  # the same model within its wrapper
    found = gradients_of_step(twin, sgd(twin, lr=0.0))
    assert watched.read == []
    assert_close(found, expected_step(model, processor, other.batch(0, 3), bound=None))


# What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": -1}, "weight must be a number ≥ 0, got -1"),
        ({"weight": float("nan")}, "weight must be a number ≥ 0, got nan"),
        ({"bound": 0}, "bound must be a number > 0, or None for no bound, got 0"),
        ({"batch_size": 0}, "batch_size must be a whole number ≥ 1, got 0"),
        ({"every": 1.5}, r"every must be a whole number ≥ 1, got 1\.5"),
        ({"seed": -1}, "seed must be a whole number ≥ 0, got -1"),
        ({"processor": None}, r"keep\(\) needs the model's processor"),
    ],
)
def test_values_out_of_range(model, folder, processor, settings, message):
    with pytest.raises(ValueError, match=message):
        keep(model, folder / "keep.safetensors", **{"processor": processor, **settings})


def test_sets_of_other_models(model, folder, processor):
    keep_set = KeepSet.load(folder / "keep.safetensors")
    other = copy.deepcopy(processor)
    other.tokenizer.add_tokens(["<think>"])
    keep(copy.deepcopy(model), keep_set, other)
    keep_set.metadata["tokenizer"] = {**keep_set.metadata["tokenizer"], "sha256": "0"}
    with pytest.raises(ValueError, match="was made with another tokenizer"):
        keep(model, keep_set, processor)
    with pytest.raises(FileNotFoundError, match=r"there is no file gone\.safetensors"):
        keep(model, "gone.safetensors", processor)
    with pytest.raises(ValueError, match=r"keep\(\) takes the model first, then the keep set, but got str as model"):
        keep("keep.safetensors", model, processor)
    inside = r"the model is a Linear, which is no model of transformers: give the qwen2_5_vl that is in it$"
    with pytest.raises(ValueError, match=inside):
        keep(torch.nn.Linear(2, 2), folder / "keep.safetensors", processor)
    for part in (processor.tokenizer, processor.image_processor, 5):
        with pytest.raises(
            ValueError, match=rf"the processor is a {type(part).__name__}, .*: give the whole \w+Processor"
        ):
            keep(model, folder / "keep.safetensors", part)
    llava = load(folder)
    llava.config.model_type = "llava"
    with pytest.raises(ValueError, match="holds a qwen2_5_vl's answers, and the model is a llava"):
        keep(llava, folder / "keep.safetensors", processor)


def test_an_optimizer_that_maximizes_is_refused(model, folder):
    twin, _ = kept_twin(model, folder)
    with pytest.raises(RuntimeError, match=r"maximize=True moves away from the VLM: negate the loss"):
        train(twin, torch.optim.SGD(trainable(twin), lr=0.05, maximize=True))


def test_a_gradient_that_is_not_finite_gets_nothing(model, folder):
    twin, _ = kept_twin(model, folder)

    def backward_to_nan(m):
        backward(m)
        trainable(m)[0].grad[0, 0] = torch.nan

    train(twin, sgd(twin), 1, backward_to_nan)
    assert all(p.isfinite().all() for p in trainable(twin)[1:]) and telemetry(twin)["keep_ratio"] == 0


def test_a_keep_pass_that_overflows_adds_nothing(model, folder):
    twin, _ = kept_twin(model, folder)
    plain = copy.deepcopy(twin)
    keep(plain, None)
    train(plain, sgd(plain), 1)
    passes = []

    def poison(module, args, output):  # the second pass is keeping's own
        passes.append(1)
        return output * torch.nan if len(passes) == 2 else output

    twin.get_output_embeddings().register_forward_hook(poison)
    train(twin, sgd(twin), 1)
    assert len(passes) == 2
    assert all(torch.equal(p, q) for p, q in zip(trainable(plain), trainable(twin), strict=True))


# Steps on the same gradients


def test_a_second_step_on_the_same_gradients_adds_nothing(model, folder):
    twin, watched = kept_twin(model, folder)
    optimizer = sgd(twin, lr=0.0)
    first = gradients_of_step(twin, optimizer)
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(trainable(twin), first, strict=True))
    optimizer.zero_grad(set_to_none=False)
    backward(twin, BATCH)
    bare = [p.grad.clone() for p in trainable(twin)]
    optimizer.step()
    assert not any(torch.equal(p.grad, g) for p, g in zip(trainable(twin), bare, strict=True))
    assert len(watched.read) >= 6
