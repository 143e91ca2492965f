"""A pass of keeping is the one of its definition, whatever a training loop has put into the model."""

import copy
import functools

import pytest
import torch
from kept_models import (
    Watched,
    adapted,
    assert_close,
    expected_step,
    gradients_of_step,
    keep_gradients,
    kept_twin,
    task_gradients,
)
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments
from twin import BATCH, backward, sgd, trainable

from drift_peft import keep

# Checkpoints


class OwnCheckpoint(torch.autograd.Function):
    """One that serves backward() alone, as Unsloth's does."""

    @staticmethod
    def forward(ctx, function, hidden, *rest):
        ctx.function, ctx.rest = function, rest
        ctx.save_for_backward(hidden)
        with torch.no_grad():
            return function(hidden, *rest)

    @staticmethod
    def backward(ctx, gradient):
        hidden = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            output = ctx.function(hidden, *ctx.rest)
        torch.autograd.backward(output, gradient)
        return None, hidden.grad, *(None for _ in ctx.rest)


def wrapped_checkpoint(function, *args):
    """A plain function around torch's, as LLaMA-Factory's is."""
    return checkpoint(function, *args, use_reentrant=True)


CHECKPOINTS = {
    "torch's": functools.partial(checkpoint, use_reentrant=False),
    "torch's, reentrant": functools.partial(checkpoint, use_reentrant=True, preserve_rng_state=False),
    "in a function": wrapped_checkpoint,
    "in a partial": functools.partial(wrapped_checkpoint),
    "of its own": OwnCheckpoint.apply,
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpoints_of_any_kind(model, folder, processor, kind):
    checkpointed = copy.deepcopy(model)
    checkpointed.gradient_checkpointing_enable()
    checkpointed.enable_input_require_grads()
    layers = [m for m in checkpointed.modules() if "_gradient_checkpointing_func" in vars(m)]
    for layer in layers:
        layer._gradient_checkpointing_func = CHECKPOINTS[kind]
    watched = Watched(folder)
    keep(checkpointed, watched, processor, batch_size=3)
    found = gradients_of_step(checkpointed, sgd(checkpointed, lr=0.0))
    assert_close(found, expected_step(model, processor, watched.batch(0, 3)))
    assert layers and all(layer._gradient_checkpointing_func is CHECKPOINTS[kind] for layer in layers)


def checkpointing(forward):
    """As in the code of a model itself, where nothing can take its place."""

    def checkpointed(*args, **kwargs):
        return checkpoint(functools.partial(forward, **kwargs), *args, use_reentrant=True)

    return checkpointed


@pytest.mark.parametrize("layers", [slice(None), slice(1)], ids=["all", "the first"])
def test_what_is_hidden_by_a_checkpoint_is_refused(model, folder, layers):
    twin, _ = kept_twin(model, folder)
    twin.enable_input_require_grads()
    for layer in twin.get_base_model().model.language_model.layers[layers]:
        layer.forward = checkpointing(layer.forward)
    with pytest.raises(RuntimeError, match=r"within CheckpointFunctionBackward: .* serves backward\(\) alone. Use"):
        gradients_of_step(twin, sgd(twin, lr=0.0))


def test_an_adapter_without_part_is_no_checkpoint(model, folder):
    twin, _ = kept_twin(model, folder)
    twin.enable_input_require_grads()  # so the loss has a gradient, of the embedding's output
    optimizer = sgd(twin, lr=0.0)
    backward(twin)
    twin.merge_adapter()
    with pytest.raises(RuntimeError, match=r"no part in that now: enable the adapter, or unmerge it, before step\(\)"):
        optimizer.step()


def test_an_optimizer_of_what_has_no_part_in_the_answers(model, folder):
    twin, _ = kept_twin(model, folder)
    twin.value_head = torch.nn.Linear(4, 1)
    head = [*twin.value_head.parameters()]
    for p in head:
        p.grad = torch.ones_like(p)
    torch.optim.SGD(head, lr=0.0).step()
    assert all((p.grad == 1).all() for p in head)


# What else is put into a model


def test_the_noise_of_neftune(folder, processor, tmp_path):
    def trained(**settings):
        model = adapted(folder, torch.float32)
        keep(model, Watched(folder), processor, batch_size=3)
        settings |= {"max_steps": 1, "per_device_train_batch_size": 4, "report_to": "none", "save_strategy": "no"}
        arguments = TrainingArguments(tmp_path, logging_steps=1, disable_tqdm=True, **settings)
        run = Trainer(model, arguments, train_dataset=[{"input_ids": ids, "labels": ids} for ids in BATCH])
        run.train()
        assert model.get_input_embeddings().training
        return run.state.log_history[0]

    plain, noisy = trained(), trained(neftune_noise_alpha=20)
    assert noisy["drift/keep_kl"] == plain["drift/keep_kl"]
    assert noisy["loss"] != plain["loss"]


def test_a_model_that_is_compiled_in_place(model, folder, processor):
    counter = CompileCounter()
    twin, watched = kept_twin(model, folder)
    before = task_gradients(model)
    twin.compile(backend=counter)
    twin(input_ids=BATCH, labels=BATCH).loss.backward()
    compiled = counter.frame_count
    assert compiled
    keep(twin, watched, processor, batch_size=3, bound=None)
    sgd(twin, lr=0.0).step()
    assert counter.frame_count == compiled
    kept = keep_gradients(model, processor, watched.batch(0, 3), trainable(model))
    assert_close([p.grad for p in trainable(twin)], [g + k for g, k in zip(before, kept, strict=True)])
    twin(input_ids=BATCH, labels=BATCH)
    assert counter.frame_count == compiled and twin._compiled_call_impl is not None
