"""get_peft_model(model, DriftConfig(…)) and guide(model, prior) on real model classes, full precision and 4-bit."""

import copy
import warnings

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from tiny import save_layout, tiny_expert, tiny_llm, tiny_vlm
from transformers import Adafactor, AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig

from drift_peft import DriftConfig, ReasoningPrior, build_prior, guide, telemetry
from drift_peft.naming import PROJECTION, canonical_name
from drift_peft.tuner import keep_4bit_differentiable

FAMILIES = ("qwen2_5_vl", "llava_next", "idefics2", "llama")
IDS = torch.arange(7, 27).reshape(2, 10)
TOWERS = ("visual", "vision_tower", "vision_model", "multi_modal_projector", "connector")
SKIP = ["lm_head", *(f"model.{name}" for name in TOWERS)]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """family -> folder with the checkpoints `base` and `expert` and their prior of rank 8; made once."""
    made = {}

    def pair(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            if family == "llama":
                base, (expert, _) = tiny_llm("llava"), (tiny_llm("llava", seed=0), None)
                generator = torch.Generator().manual_seed(1)
                for name, weight in expert.named_parameters():
                    if PROJECTION.fullmatch(canonical_name(name) or ""):
                        weight.data += 0.1 * weight.std() * torch.randn(weight.shape, generator=generator)
            else:
                base = tiny_vlm(family)
                expert, _ = tiny_expert(family, base)
            save_layout(base, folder / "base")
            save_layout(expert, folder / "expert")
            build_prior(folder / "expert", folder / "base", folder / "prior.safetensors", rank=8, progress=False)
            made[family] = folder
        return made[family]

    return pair


def load(folder, family, kind="fp32"):
    auto = AutoModelForCausalLM if family == "llama" else AutoModelForImageTextToText
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=SKIP,
    )
    options = {"fp32": {}, "bf16": {"dtype": torch.bfloat16}, "nf4": {"quantization_config": quantization}}[kind]
    return auto.from_pretrained(folder / "base", **{"dtype": torch.float32, **options})


def drift(folder, **settings):
    return DriftConfig(prior=folder / "prior.safetensors", r=4, lora_alpha=8, task_type="CAUSAL_LM", **settings)


def wrap(model, config):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Switched off bitsandbytes")
        return get_peft_model(model, config)


def train(model, steps=3, lr=1e-3):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


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


# What does not fit


def untouched(model):
    return not any(isinstance(m, LoraLayer) for m in model.modules())


def test_targets_without_a_delta_are_reported(pairs):
    folder = pairs("llava_next")
    targets = r".*(language_model|vision_tower).*\.q_proj"
    with pytest.warns(UserWarning, match=r"1 targeted modules have no Δ .*not steered: model\.vision_tower"):
        model = get_peft_model(load(folder, "llava_next"), drift(folder, target_modules=targets))
    steered = [n for n, m in model.named_modules() if "default" in getattr(m, "drift", {})]
    assert len(steered) == 2 and all("language_model" in n for n in steered)


def test_no_target_with_a_delta(pairs):
    folder = pairs("llava_next")
    model = load(folder, "llava_next")
    with pytest.raises(ValueError, match=r"None of the 1 targeted modules, such as .*vision_tower.* has a Δ"):
        get_peft_model(model, drift(folder, target_modules=r".*vision_tower.*\.q_proj"))
    assert untouched(model)


def test_prior_of_another_depth(pairs):
    model = tiny_llm("llava", num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"another model: 7 of its 14 weights, such as layers\.1\.mlp\.down_proj"):
        get_peft_model(model, drift(pairs("llama")))
    assert untouched(model)


def test_prior_of_another_width(pairs):
    model = tiny_llm("llava", intermediate_size=192)
    with pytest.raises(ValueError, match=r"mlp\.gate_proj\.weight is \[128, 64\] there and \[192, 64\] here"):
        get_peft_model(model, drift(pairs("llama")))
    assert untouched(model)


def test_prior_of_another_base(pairs):
    model = tiny_llm("llava", seed=5)
    with pytest.raises(ValueError, match=r"built for other base weights: its fingerprint is off by 1\d\d%"):
        get_peft_model(model, drift(pairs("llama")))
    assert untouched(model)


@pytest.mark.parametrize(
    "source, error", [("missing.safetensors", FileNotFoundError), ("base/config.json", ValueError)]
)
def test_prior_that_is_none(pairs, source, error):
    model = load(pairs("llama"), "llama")
    with pytest.raises(error, match=r"missing|is no prior"):
        get_peft_model(model, DriftConfig(prior=pairs("llama") / source))
    assert untouched(model)


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


def test_adapter_rank_above_the_priors(pairs):
    folder = pairs("llama")
    config = DriftConfig(prior=folder / "prior.safetensors", r=12, lora_alpha=24)
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
    assert len(layer.drift["default"].S) == 2
    with pytest.warns(UserWarning, match="drift_rank=64 is more than the prior holds for 14 weights"):
        get_peft_model(load(folder, "llama"), drift(folder, drift_rank=64))


def test_all_linear(pairs):
    folder = pairs("llava_next")
    with pytest.warns(UserWarning, match="targeted modules have no Δ in the prior"):
        model = get_peft_model(load(folder, "llava_next"), drift(folder, target_modules="all-linear"))
    adapted = [m for m in model.modules() if isinstance(m, LoraLayer)]
    assert len(adapted) > 14 and sum("default" in getattr(m, "drift", {}) for m in adapted) == 14


def test_layers_to_transform(pairs, tmp_path):
    folder = pairs("llama")
    with pytest.raises(ValueError, match="layers_to_transform needs target_modules to be named"):
        drift(folder, layers_to_transform=[0])
    model = get_peft_model(load(folder, "llama"), drift(folder, layers_to_transform=[0], target_modules=["q_proj"]))
    adapted = [n for n, m in model.named_modules() if isinstance(m, LoraLayer)]
    assert len(adapted) == 1 and "layers.0." in adapted[0]
    train(model).save_pretrained(tmp_path)
    assert DriftConfig.from_pretrained(tmp_path).layers_to_transform == [0]


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
    with pytest.raises(TypeError, match="'drift_alpa'; did you mean 'drift_alpha'"):
        DriftConfig.from_pretrained(tmp_path, drift_alpa=0.3)


def test_factors_need_a_prior_of_the_adapters_rank(pairs):
    folder = pairs("llama")
    config = DriftConfig(prior=folder / "prior.safetensors", r=12, drift_target="factors")
    model = load(folder, "llama")
    with pytest.raises(ValueError, match="rank 8 for layers"):
        get_peft_model(model, config)
    assert untouched(model)


@pytest.mark.parametrize("scale, target", [("absolute", "residual"), ("gradnorm", "delta"), ("decoupled", "factors")])
def test_every_mode_moves_toward_the_expert(pairs, scale, target):
    folder = pairs("llama")
    alpha = 300.0 if scale == "decoupled" else 1.0
    model = wrap(load(folder, "llama"), drift(folder, drift_scale=scale, drift_target=target, drift_alpha=alpha))
    assert telemetry(train(model, 10))["alignment"] > 0.3


# guide(): models that somebody else wrapped


def test_guide_equals_drift_config(pairs):
    folder = pairs("llama")
    steered = wrap(load(folder, "llama"), drift(folder, lora_dropout=0.0))
    plain = get_peft_model(
        load(folder, "llama"),
        LoraConfig(r=4, lora_alpha=8, target_modules=steered.peft_config["default"].target_modules),
    )
    plain.load_state_dict(steered.state_dict())
    assert guide(plain, str(folder / "prior.safetensors")) is plain
    train(steered), train(plain)
    want = {n: p for n, p in steered.named_parameters() if p.requires_grad}
    got = {n: p for n, p in plain.named_parameters() if p.requires_grad}
    assert want.keys() == got.keys() and all(torch.equal(want[n], got[n]) for n in want)


def test_guide_reports_what_it_does_not_steer(pairs):
    folder = pairs("llava_next")
    model = get_peft_model(load(folder, "llava_next"), LoraConfig(r=4, target_modules="all-linear"))
    with pytest.warns(UserWarning, match="targeted modules have no Δ in the prior"):
        guide(model, ReasoningPrior.load(folder / "prior.safetensors"))


def test_guide_again_replaces_the_settings(pairs):
    folder = pairs("llama")
    prior = ReasoningPrior.load(folder / "prior.safetensors")
    model = get_peft_model(load(folder, "llama"), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    guide(model, prior, drift_alpha=0.5)
    guide(model, prior, drift_alpha=0.0)
    plain = get_peft_model(load(folder, "llama"), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    plain.load_state_dict(model.state_dict())
    train(model), train(plain)
    pairs_of = zip(model.parameters(), plain.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs_of)


def test_guide_refuses(pairs):
    folder = pairs("llama")
    prior = ReasoningPrior.load(folder / "prior.safetensors")
    with pytest.raises(ValueError, match="has no LoRA layers on its language model"):
        guide(load(folder, "llama"), prior)
    dora = get_peft_model(load(folder, "llama"), LoraConfig(use_dora=True, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="uses DoraLinearVariant, whose chain rule is not plain LoRA's"):
        guide(dora, prior)
    negative = get_peft_model(load(folder, "llama"), LoraConfig(lora_alpha=-4, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"has the LoRA scaling -0\.5, but drift_target='factors' divides by it"):
        guide(negative, prior, drift_target="factors")
    own = wrap(load(folder, "llama"), drift(folder))
    with pytest.raises(ValueError, match="steered by its DriftConfig already"):
        guide(own, prior)
    with pytest.raises(ValueError, match="has no adapter 'other'"):
        guide(copy.deepcopy(own), prior, "other")
    with pytest.raises(ValueError, match="drift_scale='adaptiv' is unknown"):
        guide(
            get_peft_model(load(folder, "llama"), LoraConfig(target_modules=["q_proj"])), prior, drift_scale="adaptiv"
        )


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
