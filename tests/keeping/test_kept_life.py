"""keep while a model lives: hooks of its parameters, what is frozen, adapters that are merged, and compiling."""

import copy
import gc
import warnings
import weakref

import pytest
import torch
from kept_models import (
    LORA,
    Watched,
    adapted,
    assert_close,
    expected_step,
    gradients_of_step,
    kept_twin,
    load,
    processor_of,
)
from peft import IA3Config, LoraConfig, get_peft_model
from twin import BATCH, backward, sgd, trainable

from drift_peft import keep, telemetry
from drift_peft.keeping import keep_words, keepings_of


def test_hooks_of_parameters_are_for_the_gradients_of_the_task(model, folder, processor):
    """One that clips would clip what keeping adds as well, and times the scale that it is computed at."""
    twin, watched = kept_twin(model, folder)
    heard = []
    handles = [p.register_hook(lambda g: heard.append(1) or g.clamp(-10, 10)) for p in trainable(twin)]
    found = gradients_of_step(twin, sgd(twin, lr=0.0))
    assert len(heard) == len(handles)  # the task's backward pass alone
    assert_close(found, expected_step(model, processor, watched.batch(0, 3)))
    backward(twin, BATCH)
    assert len(heard) == 2 * len(handles)  # they are there again
    for handle in handles:
        handle.remove()
    backward(twin, BATCH)
    assert len(heard) == 2 * len(handles)


def test_what_is_frozen_meanwhile_is_left_alone(model, folder):
    """Its gradient of zeros is still there."""
    twin, _ = kept_twin(model, folder)
    optimizer, (first, *others) = sgd(twin, lr=0.1), trainable(twin)
    backward(twin, BATCH)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    first.requires_grad_(False)
    before = first.detach().clone()
    backward(twin, BATCH)
    bare = [p.grad.clone() for p in others]
    optimizer.step()
    assert torch.equal(first, before)
    assert not any(torch.equal(p.grad, g) for p, g in zip(others, bare, strict=True))


def test_what_is_frozen_with_its_gradient_is_said(model, folder):
    """The first parameter's gradient is as the last step left it, and those of the others are new."""
    twin, _ = kept_twin(model, folder)
    optimizer, (first, *others) = sgd(twin, lr=0.0), trainable(twin)
    backward(twin, BATCH)
    optimizer.step()
    first.requires_grad_(False)
    for p in others:
        p.grad = None
    backward(twin, BATCH)
    bare = [p.grad.clone() for p in others]
    with pytest.raises(RuntimeError, match=r"moves 1 parameters that are frozen by now, such as .*lora_A.default"):
        optimizer.step()
    first.grad.zero_()
    optimizer.step()
    assert not any(torch.equal(p.grad, g) for p, g in zip(others, bare, strict=True))


def test_several_adapters_take_a_step_each(model, folder):
    """The pass of keeping goes through the active one alone."""
    twin, _ = kept_twin(model, folder)
    twin.add_adapter("second", LoraConfig(**LORA))
    optimizer = torch.optim.SGD([p for n, p in twin.named_parameters() if "lora_" in n], lr=0.1)
    for name in ("default", "second"):
        twin.set_adapter(name)
        backward(twin)
    with pytest.raises(RuntimeError, match=r"frozen by now.*such as .*\.default\..*each of several in a step"):
        optimizer.step()
    for name in ("default", "second"):
        optimizer.zero_grad()
        twin.set_adapter(name)
        backward(twin)
        optimizer.step()
    assert optimizer.param_groups[0]["keep_steps"] == 2


def test_keeping_goes_on_when_the_adapter_is_merged(folder, processor):
    """ReLoRA and its like merge, begin a new adapter, and drop the model that was kept."""
    watched = Watched(folder)
    base = keep(adapted(folder), watched, processor, batch_size=3).merge_and_unload()
    gc.collect()
    again = get_peft_model(base, LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj")).double()
    for p in trainable(again):
        p.data.normal_(std=0.05)
    plain = copy.deepcopy(again)
    keep(plain, None)
    found = gradients_of_step(again, sgd(again, lr=0.0))
    assert_close(found, expected_step(plain, processor, watched.batch(0, 3)))
    freed = weakref.ref(base)
    del base, again
    gc.collect()
    assert freed() is None


def test_keeping_again_after_a_merge_replaces_the_settings(folder, processor):
    """Though the first wrapper is still there, as in a notebook."""
    first = keep(adapted(folder), Watched(folder), processor, batch_size=3)
    second = get_peft_model(first.merge_and_unload(), LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj"))
    keep(second, Watched(folder), processor, batch_size=3)
    assert len(keepings_of(second)) == len(keepings_of(first)) == 1
    keep(second, None)
    assert keepings_of(first) == [] and "drift_keep" not in vars(second.get_base_model())


def test_a_copy_of_the_base_alone_is_kept(folder, processor):
    model = keep(adapted(folder), Watched(folder), processor, batch_size=3)
    base = copy.deepcopy(model.get_base_model())
    (first, *_), watched = [p for p in base.parameters() if p.requires_grad], vars(base)["drift_keep"].feed.keep_set
    assert watched is not vars(model.get_base_model())["drift_keep"].feed.keep_set
    base(input_ids=BATCH, labels=BATCH).loss.backward()
    bare = first.grad.clone()
    torch.optim.SGD([first], lr=0.0).step()
    assert not torch.equal(first.grad, bare) and watched.read


def test_a_model_without_its_head_is_told_so(folder, processor):
    model = load(folder)
    keep(model.model, folder / "keep.safetensors", processor)
    model(input_ids=BATCH, labels=BATCH).loss.backward()
    with pytest.raises(RuntimeError, match="Qwen2_5_VLModel gives no logits: take the model with its head"):
        torch.optim.SGD(model.parameters(), lr=0.1).step()


@pytest.mark.slow
def test_batches_that_grow_do_not_compile_the_model_anew(folder, processor):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = keep(adapted(folder, torch.float32), folder / "keep.safetensors", processor, batch_size=2)
    compiled, optimizer, made = torch.compile(model, backend="eager", dynamic=True), sgd(model, lr=0.0), []
    for length in (8, 9, 14, 16, 18):
        ids = torch.randint(3, 60, (2, length))
        compiled(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        made.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert made[-1] == made[1] and vars(model.get_base_model())["drift_keep"].tokens == 36


class Foreign:
    """An optimizer that calls no hooks."""

    def __init__(self, model):
        self.parameters = trainable(model)

    @torch.no_grad()
    def step(self):
        for p in self.parameters:
            p -= 0.05 * p.grad


@pytest.mark.parametrize("optimizer", [Foreign, sgd])
def test_saving_says_when_no_step_was_kept(folder, processor, tmp_path, optimizer):
    model = get_peft_model(load(folder), LoraConfig(**LORA)).train()
    keep(model, folder / "keep.safetensors", processor, batch_size=2)
    assert telemetry(model) == {}
    backward(model)
    optimizer(model).step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.save_pretrained(tmp_path)
    missed = optimizer is Foreign
    assert any("was trained, but keep() never ran: its optimizer" in str(w.message) for w in caught) == missed
    assert (keep_words(model) is None) == (telemetry(model) == {}) == missed


def test_a_step_between_two_that_keep_is_not_missed(folder, processor, tmp_path):
    model = get_peft_model(load(folder), LoraConfig(**LORA)).train()
    optimizer = sgd(model)
    for weight in (1.0, 0.5):  # the optimizer's count goes on
        keep(model, folder / "keep.safetensors", processor, batch_size=2, weight=weight, every=4)
        backward(model)
        optimizer.step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.save_pretrained(tmp_path)
    assert not any("never ran" in str(w.message) for w in caught) and "weight 0.5" in keep_words(model)


def poisoned(folder, lost, optimizer, steps=4, poison=lambda logits: logits * torch.nan):
    """A model in float32 after some steps, on which the passes of keeping in `lost` were poisoned."""
    model = get_peft_model(load(folder), LoraConfig(**LORA)).train()
    keep(model, folder / "keep.safetensors", processor_of(folder), batch_size=2)
    passes = []

    def hook(module, args, output):  # each second pass is keeping's own
        passes.append(1)
        return poison(output) if len(passes) % 2 == 0 and len(passes) // 2 - 1 in lost else output

    model.get_output_embeddings().register_forward_hook(hook)
    optimizer = optimizer(model)
    for _ in range(steps):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()
    assert len(passes) == 2 * steps
    return model


def told_when_saved(model, folder):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.save_pretrained(folder)
    return [str(w.message) for w in caught if "passes of keep()" in str(w.message)]


def test_passes_that_are_never_finite_are_said(folder, tmp_path):
    """By the telemetry once, by each saving, and by the card."""
    model = poisoned(folder, range(4), sgd)
    with pytest.warns(UserWarning, match=r"Of 4 passes of keep\(\), 4 were not finite .* in bfloat16") as caught:
        telemetry(model)
        telemetry(model)
    assert len([w for w in caught if "passes of keep()" in str(w.message)]) == 1
    assert len(told_when_saved(model, tmp_path)) == len(told_when_saved(copy.deepcopy(model), tmp_path)) == 1
    words = "bound 1; 4 of 4 passes of this run were not finite and added nothing: it was not kept in this run"
    assert keep_words(model).endswith(words)


def test_one_bad_batch_is_not_said_and_what_turns_bad_again_is(folder, tmp_path):
    model = poisoned(folder, [0], sgd, steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        telemetry(model)
    assert len(told_when_saved(model, tmp_path)) == 1  # there may be no more of them
    (keeping,) = keepings_of(model)
    for added, lost, said in [(2, 3, False), (2, 4, False), (4, 4, False), (4, 6, True), (4, 9, False)]:
        keeping.passes = torch.tensor([added, lost])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert telemetry(model)["keep_kl"] != 0
        assert any("passes of keep()" in str(w.message) for w in caught) == said


@pytest.mark.parametrize(("lost", "said"), [((), False), ((2,), False), ((0, 2, 3), True)])
def test_how_many_passes_were_lost(folder, tmp_path, lost, said):
    model = poisoned(folder, lost, sgd)
    assert bool(told_when_saved(model, tmp_path)) == said
    words = keep_words(model)
    told = f"bound 1; {len(lost)} of 4 passes of this run were not finite and added nothing"
    assert words.endswith(told if lost else "bound 1")


def test_what_gets_well_is_not_lost(folder, tmp_path):
    """A gradient of keeping that overflows at one scale, and one of the task that is not finite."""

    def overflow(logits):
        logits.register_hook(lambda gradient: gradient * torch.inf)
        return logits

    model = poisoned(folder, range(4), sgd, poison=overflow)
    (keeping,) = keepings_of(model)
    assert keeping.counts() == (0, 0) and keeping.scale == 2.0**8 and not told_when_saved(model, tmp_path)
    model = poisoned(folder, range(14), sgd, steps=14, poison=overflow)
    assert keepings_of(model)[0].counts() == (0, 2) and told_when_saved(model, tmp_path)  # at the scale of 1
    model = poisoned(folder, (), infinite)
    assert keepings_of(model)[0].counts() == (0, 0) and not told_when_saved(model, tmp_path)


def infinite(model):
    """An optimizer that finds no finite gradient, as where a GradScaler skips a step."""
    first = trainable(model)[0]
    first.register_hook(lambda gradient: gradient * torch.inf)
    return sgd(model, lr=0.0)


def test_adapters_of_other_kinds_are_saved(folder, processor, tmp_path):
    parts = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    model = get_peft_model(load(folder), IA3Config(**parts)).train()
    keep(model, folder / "keep.safetensors", processor, batch_size=2)
    backward(model)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
