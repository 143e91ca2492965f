"""get_peft_model(model, DriftConfig(…)) on real model classes, full precision and 4-bit."""

import copy
import warnings

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from older import transformers_adds_it
from pairs import FAMILIES, IDS, drift, load, train, untouched, wrap
from peft import EvaConfig, LoHaConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora import LoraLayer
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from safetensors.torch import load_file
from torch import nn
from transformers import (
    Adafactor,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from drift_peft import DriftConfig, ReasoningPrior, guide, telemetry
from drift_peft.checkpoints.naming import canonical_name
from drift_peft.keeping import keep_4bit_differentiable
from drift_peft.tuner.steered import steered_of


@pytest.mark.parametrize("kind", ["fp32", "bf16", "nf4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_wraps_starts_and_guides(pairs, family, kind):
    folder = pairs(family)
    model = load(folder, family, kind).eval()
    keep = {id(m): n for n, m in model.named_modules()}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        keep_4bit_differentiable(model)  # the same kernel before and after, so that bitwise equality can be asked for
        before = model(input_ids=IDS).logits
    model = wrap(model, drift(folder))
    prior = ReasoningPrior.load(folder / "prior.safetensors")
    adapted = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    assert {canonical_name(f"{name}.weight") for name in adapted} == set(prior)
    assert all("vis" not in keep[id(m.base_layer)] for m in adapted.values())
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=IDS).logits, before)  # the start leaves the function unchanged
    layer, weight = next((m, prior[canonical_name(f"{n}.weight")]) for n, m in adapted.items())
    torch.testing.assert_close(
        layer.lora_A["default"].weight.float(), weight.Vh[:4].float() / 3**0.5, atol=2e-3, rtol=1e-2
    )
    train(model.train())
    state = telemetry(model)
    assert state["guided_steps"] == 3 and state["alignment"] > 0.2 and state["absorbed"] > 0
    assert {"alignment/attn", "alignment/mlp"} <= set(state)


HEADS = {
    "SEQ_CLS": (AutoModelForSequenceClassification, "score"),
    "TOKEN_CLS": (AutoModelForTokenClassification, "score"),
    "QUESTION_ANS": (AutoModelForQuestionAnswering, "qa_outputs"),
}


@pytest.mark.parametrize("saved", [None, ["norm"]])
@pytest.mark.parametrize("task", HEADS)
def test_tasks_whose_heads_are_saved(pair, tmp_path, task, saved):
    """As with PEFT's LoraConfig, and a second model by the same config."""
    auto, head = HEADS[task]

    def base():
        model = auto.from_config(copy.deepcopy(pair.base.config))
        model.base_model.load_state_dict(pair.base.base_model.state_dict())
        return model

    def models(config):
        return [get_peft_model(base(), config) for _ in range(2)]

    common = {"r": 4, "task_type": task, "modules_to_save": saved, "target_modules": ["q_proj", "up_proj"]}
    config = DriftConfig(prior=pair.path, **copy.deepcopy(common))
    for plain, ours in zip(models(LoraConfig(**copy.deepcopy(common))), models(config), strict=True):
        trains = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (plain, ours)]
        assert trains[0] == trains[1] and any(f"{head}.modules_to_save.default" in name for name in trains[1])
        assert head in ours.peft_config["default"].modules_to_save
    optimizer = torch.optim.SGD([p for p in ours.parameters() if p.requires_grad], lr=0.1)
    sum(p.sum() for p in ours.parameters() if p.requires_grad).backward()
    optimizer.step()
    assert telemetry(ours)["guided_steps"] == 1
    ours.save_pretrained(tmp_path)
    assert any(head in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    again = DriftConfig.from_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path, config=again, is_trainable=True)
    found, expected = (
        {n: p for n, p in model.named_parameters() if p.requires_grad and "modules_to_save" in n}
        for model in (again, ours)
    )
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_what_a_model_fills_in_is_not_the_users(pair):
    config = DriftConfig(
        prior=pair.path, rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 3}, modules_to_save=["norm"]
    )
    before = copy.deepcopy(vars(config))
    model = get_peft_model(copy.deepcopy(pair.base), config)
    own = model.peft_config["default"]
    for value in vars(own).values():
        if isinstance(value, dict):
            value["x"] = 1
        elif isinstance(value, (list, set)):
            value.clear()
    assert {**before, "base_model_name_or_path": None} == {**vars(config), "base_model_name_or_path": None}
    assert config.rank_pattern is not own.rank_pattern and config.alpha_pattern is not own.alpha_pattern


@pytest.mark.parametrize("kind", ["fp32", "nf4"])
def test_guided_training_ends_nearer_to_the_expert(pairs, kind):
    folder = pairs("qwen2_5_vl")
    plain = get_peft_model(load(folder, "qwen2_5_vl", kind), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]))
    steered = wrap(load(folder, "qwen2_5_vl", kind), drift(folder, target_modules=["q_proj"]))
    prior = ReasoningPrior.load(folder / "prior.safetensors")
    assert telemetry(train(steered, 20))["alignment"] > telemetry(train(plain, 20), prior)["alignment"] + 0.3


# bitsandbytes on CPUs with AVX512-BF16


def adapter_gradients(model):
    model.zero_grad()
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_4bit_gradients_are_right_after_an_evaluation_pass(pairs):
    """Llama's projections have no bias, which is where the wrong kernel raises no error."""
    model = load(pairs("llama"), "llama", "nf4")
    supported = any(m.support_avx512bf16_for_cpu for m in model.modules() if isinstance(m, Linear4bit))
    config = drift(pairs("llama"))
    if supported:
        with pytest.warns(UserWarning, match="Switched off bitsandbytes' AVX512-BF16 inference kernel on 14"):
            model = get_peft_model(model, config)
    else:
        model = get_peft_model(model, config)
    train(model)  # lora_B leaves zero, so that both factors have gradients
    before = adapter_gradients(model)
    with torch.no_grad():
        model.eval()(input_ids=IDS)
    after = adapter_gradients(model)
    assert len(before) == 28 and all(before[n].norm() > 0 for n in before)
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_4bit_gradients_are_right_after_an_evaluation_pass_before_wrapping(pairs):
    fresh = train(wrap(load(pairs("llama"), "llama", "nf4"), drift(pairs("llama"))))
    evaluated = load(pairs("llama"), "llama", "nf4")
    layers = [m for m in evaluated.modules() if isinstance(m, Linear4bit)]
    with torch.no_grad():
        evaluated.eval()(input_ids=IDS)
    packed = [m for m in layers if getattr(m.weight.quant_state, "packing_format_for_cpu", False)]
    if any(m.support_avx512bf16_for_cpu for m in layers):
        assert packed  # else this test would prove nothing on this CPU
    evaluated = wrap(evaluated, drift(pairs("llama")))
    assert not any(getattr(m.weight.quant_state, "packing_format_for_cpu", False) for m in layers)
    evaluated.load_state_dict({n: p for n, p in fresh.state_dict().items() if "lora_" in n}, strict=False)
    want, got = adapter_gradients(fresh), adapter_gradients(evaluated)
    for name in want:  # bitsandbytes rounds its block scales to bf16 when it packs
        torch.testing.assert_close(got[name], want[name], rtol=0.05, atol=0.02 * want[name].abs().max().item())


# Settings, and the life of a wrapped model


def test_inference_never_opens_the_prior(pairs, tmp_path):
    folder = pairs("llama")
    model = train(wrap(load(folder, "llama"), drift(folder))).eval()
    model.save_pretrained(tmp_path)
    config = DriftConfig.from_pretrained(tmp_path, prior="gone.safetensors")
    loaded = PeftModel.from_pretrained(load(folder, "llama"), tmp_path, config=config).eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors"):
        PeftModel.from_pretrained(load(folder, "llama"), tmp_path, config=config, is_trainable=True)


def test_an_attribute_of_the_users_is_not_ours():
    """Plain LoRA of a model that calls a module of its own drift."""
    model = nn.Module()
    model.net, model.drift = nn.Linear(4, 4), nn.Linear(4, 4)
    adapted = get_peft_model(model, LoraConfig(target_modules=["net"]))
    assert isinstance(adapted.base_model.model.drift, nn.Linear) and steered_of(adapted) == []


def test_adapter_rank_above_the_priors(pairs):
    folder = pairs("llama")
    config = DriftConfig(prior=folder / "prior.safetensors", r=12, lora_alpha=24, drift_alpha=1.0)
    with pytest.warns(UserWarning, match="On 14 layers the prior's rank is below the adapter's"):
        model = get_peft_model(load(folder, "llama"), config)
    assert telemetry(train(model))["alignment"] > 0.2


def test_steering_rank_below_the_adapters(pairs):
    """The start takes all rows that the prior has, whatever Δ is truncated to."""
    folder = pairs("llama")
    prior = ReasoningPrior.load(folder / "prior.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = get_peft_model(load(folder, "llama"), drift(folder, drift_rank=2))
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    V = prior["layers.0.self_attn.q_proj.weight"].Vh[:4].float()
    torch.testing.assert_close(layer.lora_A["default"].weight.data, V / 3**0.5)
    assert len(layer.drift_peft["default"].prior["S"]) == 2
    with pytest.warns(UserWarning, match="drift_rank=64 is more than the prior holds for 14 weights"):
        get_peft_model(load(folder, "llama"), drift(folder, drift_rank=64))


def test_all_linear(pairs):
    folder = pairs("llava_next")
    with pytest.warns(UserWarning, match="targeted modules have no Δ in the prior"):
        model = get_peft_model(load(folder, "llava_next"), drift(folder, target_modules="all-linear"))
    adapted = [m for m in model.modules() if isinstance(m, LoraLayer)]
    assert len(adapted) > 14 and sum("default" in vars(m).get("drift_peft", {}) for m in adapted) == 14


def test_layers_to_transform(pairs, tmp_path):
    folder = pairs("llama")
    for targets, count in ((["q_proj"], 1), (None, 7)):
        model = get_peft_model(load(folder, "llama"), drift(folder, layers_to_transform=[1], target_modules=targets))
        adapted = [n for n, m in model.named_modules() if isinstance(m, LoraLayer)]
        assert len(adapted) == count and all("layers.1." in name for name in adapted)
        train(model).save_pretrained(tmp_path)
        config = DriftConfig.from_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(load(folder, "llama"), tmp_path, config=config, is_trainable=True)
        assert [n for n, m in loaded.named_modules() if isinstance(m, LoraLayer)] == adapted
    with pytest.raises(ValueError, match="layers names 2, and LlamaForCausalLM has those from 0 to 1"):
        get_peft_model(load(folder, "llama"), drift(folder, layers_to_transform=[2]))


@pytest.mark.parametrize(
    ("passed", "adapter"), [("the model", "default"), ("the model", "another"), ("its base", "default")]
)
def test_a_model_that_is_wrapped_already(pairs, passed, adapter):
    """It is refused, with the way out, and the first adapter stays steered."""
    folder = pairs("llama")
    model = get_peft_model(load(folder, "llama"), drift(folder))
    inner = model if passed == "the model" else model.get_base_model()
    with pytest.raises(ValueError, match=r"wrapped already .*model\.add_adapter\(name, config\), .*model\.unload\(\)"):
        get_peft_model(inner, drift(folder), adapter_name=adapter)
    assert telemetry(train(model))["guided_steps"] == 3
    get_peft_model(model.unload(), drift(folder))


def test_adapters_of_mixed_types_are_refused(pairs):
    """Where PEFT would train them as plain LoRA, before anything is changed, and other types still mix."""
    folder = pairs("llama")
    model = load(folder, "llama")
    for start in ("drift", True):
        with pytest.raises(ValueError, match=r"^DriftConfig is not guided .*mixed=True\): leave out mixed=True"):
            get_peft_model(model, drift(folder, init_lora_weights=start), mixed=True)
    assert untouched(model) and all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    mixed = get_peft_model(model, LoHaConfig(target_modules=["q_proj"]), mixed=True)
    with pytest.raises(ValueError, match=r"^DriftConfig is not guided"):
        mixed.add_adapter("second", drift(folder))
    mixed.add_adapter("second", LoraConfig(target_modules=["q_proj"]))
    assert set(mixed.peft_config) == {"default", "second"}


def test_an_adapter_prepared_for_hotswapping(pairs):
    """With its rank as it was, it trains on; with padded ranks it is refused by what padded it."""
    folder = pairs("llama")
    model, same, padded = (get_peft_model(load(folder, "llama"), drift(folder)) for _ in range(3))
    prepare_model_for_compiled_hotswap(same, target_rank=4)
    assert telemetry(train(same)) == telemetry(train(model))
    prepare_model_for_compiled_hotswap(padded, target_rank=8)
    with pytest.raises(
        RuntimeError, match=r"^The adapter of layers\.0.* has rank 4 but 8 rows: prepare_model_for_comp"
    ):
        train(padded)


def test_ranks_that_eva_gives_anew(pairs, tmp_path):
    """Guidance of the ranks of before would be another one after the adapter is loaded: said, with two ways out."""
    folder = pairs("llama")

    def started(rho):
        settings = {
            "init_lora_weights": "eva",
            "eva_config": EvaConfig(rho=rho),
            "target_modules": ["q_proj", "up_proj"],
        }
        model = get_peft_model(load(folder, "llama"), drift(folder, **settings))
        initialize_lora_eva_weights(model, [{"input_ids": IDS}] * 8, show_progress_bar=False)
        return model

    model = started(2.0)
    assert len({layer.r["default"] for layer in model.modules() if isinstance(layer, LoraLayer)}) > 1
    with pytest.raises(
        RuntimeError, match=r"had rank 4 when its guidance was made, and has \d+ now: with EVA, set rho"
    ):
        train(model)
    model.save_pretrained(tmp_path)
    config = DriftConfig.from_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(folder, "llama"), tmp_path, config=config, is_trainable=True)
    assert telemetry(train(again))["guided_steps"] == telemetry(train(started(1.0)))["guided_steps"] > 0


def test_a_model_without_weights(pairs):
    folder = pairs("llama")
    model = load(folder, "llama").to("meta")
    with pytest.raises(ValueError, match="The model is on the meta device, without weights: load them "):
        get_peft_model(model, drift(folder))
    assert untouched(model)


def test_one_config_for_several_models(pairs, tmp_path):
    folder, config = pairs("llama"), drift(pairs("llama"))
    first = train(get_peft_model(load(folder, "llama"), config))
    second = get_peft_model(load(folder, "llama"), config)
    assert telemetry(first)["guided_steps"] == 3 and telemetry(second)["guided_steps"] == 0
    for name, parameter in second.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    with pytest.warns(UserWarning, match="the guidance never ran"):
        second.save_pretrained(tmp_path)


def test_settings_can_be_changed_when_training_goes_on(pairs, tmp_path):
    folder = pairs("llama")
    train(get_peft_model(load(folder, "llama"), drift(folder))).save_pretrained(tmp_path)
    config = DriftConfig.from_pretrained(tmp_path, drift_alpha=0.3)
    assert config.drift_alpha == 0.3 and config.drift_steps == 3
    with pytest.raises(TypeError, match="'drift_alpa'; did you mean drift_alpha"):
        DriftConfig.from_pretrained(tmp_path, drift_alpa=0.3)


@pytest.mark.parametrize("scale, target", [("absolute", "residual"), ("gradnorm", "delta"), ("decoupled", "factors")])
def test_every_mode_moves_toward_the_expert(pairs, scale, target):
    folder = pairs("llama")
    alpha = 300.0 if scale == "decoupled" else 1.0
    model = wrap(load(folder, "llama"), drift(folder, drift_scale=scale, drift_target=target, drift_alpha=alpha))
    assert telemetry(train(model, 10))["alignment"] > 0.3


def test_a_deleted_adapter_leaves_nothing_behind(pairs):
    folder = pairs("llama")
    model = get_peft_model(load(folder, "llama"), LoraConfig(r=4, target_modules=["q_proj"]))
    guide(model, str(folder / "prior.safetensors"))
    model.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj"]))
    model.set_adapter("other")
    model.delete_adapter("default")
    model.add_adapter("default", LoraConfig(r=4, target_modules=["q_proj"]))
    model.set_adapter("default")
    train(model)
    with pytest.raises(ValueError, match="No layer of this model is steered"):
        telemetry(model)


@transformers_adds_it
def test_an_adapter_deleted_by_transformers_leaves_nothing_behind(pairs):
    folder = pairs("llama")
    model = load(folder, "llama")
    model.add_adapter(drift(folder), "a")
    train(model)
    model.delete_adapter("a")
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"]), "a")
    train(model)
    with pytest.raises(ValueError, match="No layer of this model is steered"):
        telemetry(model)


def test_decoupled_needs_a_learning_rate(pairs):
    folder = pairs("llama")
    settings = {"drift_scale": "decoupled", "drift_target": "factors"}
    model = wrap(load(folder, "llama"), drift(folder, **settings))
    optimizer = Adafactor([p for p in model.parameters() if p.requires_grad])  # its steps are relative: lr=None
    model(input_ids=IDS, labels=IDS).loss.backward()
    with pytest.raises(
        RuntimeError, match="moves by the learning rate, and this optimizer's parameter groups name none"
    ):
        optimizer.step()
