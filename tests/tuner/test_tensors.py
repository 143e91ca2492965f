"""Tensors that are trained themselves: full fine-tuning, biases, norms, heads and embeddings saved with an adapter."""

import copy

import pytest
import torch
from older import known
from peft import LoraConfig, PeftModel, get_peft_model
from twin import (
    ALPHA,
    assert_copies_guided_like_oracle,
    assert_guided_like_oracle,
    assert_same_update,
    canonical,
    make_whole_pair,
    sgd,
    state,
    steered,
    train,
    train_by_oracle,
    trainable,
)

import drift_peft.tuner.batches
import drift_peft.tuner.steered
from drift_peft import DriftConfig, guide
from drift_peft.checkpoints.naming import module_kind

MODES = [
    (scale, target) for scale in ("absolute", "gradnorm", "adaptive") for target in ("residual", "delta", "factors")
]
MODES += [("decoupled", "factors"), ("decoupled", "base")]
two_modes = pytest.mark.parametrize(("scale", "target"), [("adaptive", "residual"), ("decoupled", "factors")])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make_whole_pair(tmp_path_factory.mktemp("whole"))


def in_full(pair, dtype=torch.float64):
    return copy.deepcopy(pair.base).to(dtype).train()


def guided(model, pair, scale, target, **settings):
    settings = {"drift_alpha": ALPHA[scale], **settings}
    return guide(model, pair.prior, drift_scale=scale, drift_target=target, **settings)


def assert_full_training_like_oracle(pair, scale, target, tolerance=1e-6, model=None, lr=0.2, steps=3, **settings):
    model = in_full(pair) if model is None else model
    twin, plain, start = copy.deepcopy(model), copy.deepcopy(model), state(model)
    guided(model, pair, scale, target, **settings)
    train(model, sgd(model, lr), steps)
    train(plain, sgd(plain, lr), steps)
    train_by_oracle(twin, sgd(twin, lr), pair.prior, scale, target, steps, start=start, rank=settings.get("drift_rank"))
    assert_same_update(model, twin, start, tolerance)
    with pytest.raises(AssertionError):
        assert_same_update(plain, twin, start, 0.01)


# Full fine-tuning


@pytest.mark.parametrize(("scale", "target"), MODES)
def test_every_mode_of_full_training_steps_as_the_oracle(whole, scale, target):
    assert_full_training_like_oracle(whole, scale, target)


@pytest.mark.parametrize("elements", [1, 1000])
@two_modes
def test_blocks_of_rows(whole, monkeypatch, scale, target, elements):
    for module in (drift_peft.tuner.steered, drift_peft.tuner.batches):
        monkeypatch.setattr(module, "BATCH_ELEMENTS", elements)
    assert_full_training_like_oracle(whole, scale, target, steps=2)


@pytest.mark.parametrize("target", ["residual", "delta"])
def test_a_rank_of_delta(whole, target):
    assert_full_training_like_oracle(whole, "adaptive", target, drift_rank=2)


@pytest.mark.parametrize("scale", ["adaptive", "decoupled"])
def test_bf16_parameters(whole, scale):
    """One step: the parameters, and what is kept of their start, are rounded to 8 bits, but norms are fp32."""
    model = in_full(whole, torch.bfloat16)
    assert_full_training_like_oracle(whole, scale, "factors", 2e-2, model, lr=8.0, steps=1)


KINDS = {
    "attn": {"attn"},
    "mlp": {"mlp"},
    "attn mlp norm": {"attn", "mlp", "norm"},
    "attn mlp head": {"attn", "mlp", "head"},
}


@pytest.mark.parametrize("kinds", ["attn", "mlp", "attn mlp", "attn mlp norm", "attn mlp head", "embed bias"])
def test_candidates_of_the_paper(whole, kinds):
    """Table 4: exactly the kinds that were asked for are steered; the others step bitwise as in plain training."""
    model, plain = in_full(whole), in_full(whole)
    guided(model, whole, "gradnorm", "delta", drift_modules=kinds.split())
    train(model, sgd(model), 1)
    train(plain, sgd(plain), 1)
    other = state(plain)
    moved = {name for name, p in state(model).items() if not torch.equal(p, other[name])}
    assert moved == {name for name in other if module_kind(canonical(name)) in kinds.split()}


def test_frozen_tensors_stay(whole):
    model = in_full(whole)
    for name, p in model.named_parameters():
        p.requires_grad = "layers.1" in name
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    assert_full_training_like_oracle(whole, "gradnorm", "residual", model=model)
    assert frozen and all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


def test_learning_rates_of_their_own(whole):
    """`decoupled` moves every tensor by its own group's learning rate."""
    model = in_full(whole)
    twin, start = copy.deepcopy(model), state(model)
    guided(model, whole, "decoupled", "factors")

    def groups(m):
        return torch.optim.SGD([{"params": [p], "lr": 0.01 + 0.001 * i} for i, p in enumerate(trainable(m))])

    train(model, groups(model))
    train_by_oracle(twin, groups(twin), whole.prior, "decoupled", "factors", start=start)
    assert_same_update(model, twin, start)


def test_nothing_to_train(whole):
    model = in_full(whole).requires_grad_(False)
    with pytest.raises(ValueError, match=r"no LoRA layers on its language model, and nothing of that is trainable"):
        guide(model, whole.prior)


# Beside an adapter


BESIDE = [
    {"bias": "lora_only"},
    {"bias": "all"},
    {"modules_to_save": ["norm"]},
    {"modules_to_save": ["input_layernorm"], "bias": "all"},
    {"modules_to_save": ["lm_head", "embed_tokens"]},
]


@pytest.mark.parametrize("beside", [known(settings, settings) for settings in BESIDE])
@pytest.mark.parametrize(
    ("scale", "target"),
    [("adaptive", "residual"), ("absolute", "delta"), ("decoupled", "factors"), ("decoupled", "base")],
)
def test_biases_norms_heads_and_embeddings(whole, scale, target, beside):
    model = assert_guided_like_oracle(
        whole, sgd, scale, target, steps=3, target_modules=["q_proj", "up_proj"], **beside
    )
    assert len(state(model)) > 8


def test_the_start_is_the_bases_when_training_goes_on(whole, tmp_path):
    """W_0 is what the base has, not what was loaded, and so the residual is the same as without the break."""
    settings = {
        "bias": "all",
        "modules_to_save": ["norm", "lm_head"],
        "target_modules": ["q_proj"],
        "dtype": torch.float32,
    }
    model = steered(whole, "absolute", "residual", **settings)
    train(model, sgd(model, 0.5), 4)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        copy.deepcopy(whole.base), tmp_path, config=DriftConfig.from_pretrained(tmp_path), is_trainable=True
    ).train()
    start = state(model)
    assert_same_update(loaded, start, {name: p - 1 for name, p in start.items()}, 1e-6)  # all of it was loaded
    for m in (model, loaded):
        train(m, sgd(m, 0.5), 2)
    assert_same_update(loaded, model, start, 1e-4)


def test_unloading_leaves_the_base_to_itself(whole):
    model = steered(whole, "gradnorm", "delta", bias="all", modules_to_save=["norm"], target_modules=["q_proj"])
    base = model.unload().requires_grad_(True)
    plain = in_full(whole)
    for m in (base, plain):
        train(m.train(), sgd(m), 1)
    assert all(torch.equal(p, q) for p, q in zip(base.parameters(), plain.parameters(), strict=True))


def test_a_deleted_adapter_leaves_its_biases_alone(whole):
    model = steered(whole, "gradnorm", "delta", bias="all", target_modules=["q_proj"])
    model.delete_adapter("default")
    base, plain = model.base_model.model.requires_grad_(True), in_full(whole)
    for m in (base, plain):
        train(m.train(), sgd(m), 1)
    got = {canonical(n): p for n, p in base.named_parameters()}
    assert all(torch.equal(got[canonical(n)], p) for n, p in plain.named_parameters())


@two_modes
def test_copies_stay_steered(whole, scale, target):
    model = guided(in_full(whole), whole, scale, target)
    start = state(model)
    train(model, sgd(model), 1)
    clone, middle = copy.deepcopy(model), state(model)
    twin = in_full(whole)
    twin.load_state_dict(model.state_dict())
    train(clone, sgd(clone))
    train_by_oracle(twin, sgd(twin), whole.prior, scale, target, start=start)
    assert_same_update(clone, twin, middle)


def test_tied_embeddings_are_biased_once(tmp_path):
    """Of a tensor with two names, the one that comes first counts."""
    pair = make_whole_pair(tmp_path, tie_word_embeddings=True)
    model = in_full(pair)
    twin, start = copy.deepcopy(model), state(model)
    guided(model, pair, "gradnorm", "delta", drift_modules=["embed", "head"])
    train(model, sgd(model), 1)
    prior = {name: weight for name, weight in pair.prior.items() if name == "embed_tokens.weight"}
    train_by_oracle(twin, sgd(twin), prior, "gradnorm", "delta", 1, start=start)
    assert_same_update(model, twin, start)


def test_an_adapter_wrapped_elsewhere_with_biases(whole):
    """guide() steers all that is trainable of a PEFT model; of a module to save, PEFT keeps what it started from."""
    lora = LoraConfig(r=4, target_modules=["q_proj"], bias="all", modules_to_save=["norm"])
    model = get_peft_model(in_full(whole), lora)
    assert_copies_guided_like_oracle(model, whole)
