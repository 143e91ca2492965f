"""A prior that does not belong to the model, or does not reach its targets, is refused or reported, by name."""

import copy

import pytest
import torch
from dense_prior import dense_prior
from pairs import drift, load, nearly, train, untouched, wrap
from peft import get_peft_model
from tiny import tiny_llm, tiny_vlm
from twin import make_whole_pair

from drift_peft import DriftConfig, guide, telemetry
from drift_peft.checkpoints.naming import canonical_name, module_kind


def test_targets_without_a_delta_are_reported(pairs):
    folder = pairs("llava_next")
    targets = r".*(language_model|vision_tower).*\.q_proj"
    with pytest.warns(UserWarning, match=r"1 targeted modules have no Δ .*not steered: model\.vision_tower"):
        model = get_peft_model(load(folder, "llava_next"), drift(folder, target_modules=targets))
    steered = [n for n, m in model.named_modules() if "default" in vars(m).get("drift_peft", {})]
    assert len(steered) == 2 and all("language_model" in n for n in steered)


def test_no_target_with_a_delta(pairs):
    folder = pairs("llava_next")
    model = load(folder, "llava_next")
    with pytest.raises(ValueError, match=r"None of the 1 targeted modules, such as .*vision_tower.*, has a Δ"):
        get_peft_model(model, drift(folder, target_modules=r".*vision_tower.*\.q_proj"))
    assert untouched(model)


def test_targets_that_are_no_modules(pairs):
    folder = pairs("llava_next")
    model = load(folder, "llava_next")
    with pytest.raises(ValueError, match=r"target_modules=.*foo.* names no module of this \w+: name others, or leave"):
        get_peft_model(model, drift(folder, target_modules=["foo"]))
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


def test_prior_of_another_base_for_full_training(pairs):
    with pytest.raises(ValueError, match=r"built for other base weights: its fingerprint is off by 1\d\d%"):
        guide(tiny_llm("llava", seed=5), pairs("llama") / "prior.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_prior_of_a_base_that_is_nearly_this_one(pairs, dtype):
    """Which quantization might have made of it; but nothing is quantized."""
    nearby = r"slightly other base weights: its fingerprint is off by [5-9]\.\d%"
    with pytest.warns(UserWarning, match=nearby):
        get_peft_model(nearly(tiny_llm("llava"), 0.07).to(dtype), drift(pairs("llama")))
    begins_anew = nearby + r".* Unless its weights were quantized once, build a prior .* the pull begins anew here"
    with pytest.warns(UserWarning, match=begins_anew):  # from W_0 as it is now
        guide(nearly(tiny_llm("llava"), 0.07).to(dtype), pairs("llama") / "prior.safetensors")
    further = nearby + r".* or you have trained them further, build a prior for it with build_prior\.$"
    with pytest.warns(UserWarning, match=further):
        delta = {"drift_target": "delta"}
        guide(nearly(tiny_llm("llava"), 0.07).to(dtype), pairs("llama") / "prior.safetensors", **delta)


@pytest.mark.filterwarnings("error:The prior")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_no_other_base(pairs, dtype):
    get_peft_model(tiny_llm("llava").to(dtype), drift(pairs("llama")))


@pytest.mark.filterwarnings("error:The prior")
@pytest.mark.parametrize("kind", ["fp32", "bf16", "nf4", "nf4 bf16"])
def test_large_biases_do_not_hide_the_weights(pairs, kind):
    """As Qwen's, beside which W·v is lost in bfloat16."""
    folder = pairs("qwen2_5_vl")
    model = load(folder, "qwen2_5_vl", kind)
    biases = {n: p for n, p in model.named_parameters() if n.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias"))}
    for bias in biases.values():
        bias.data.normal_(std=100)
    before = {name: bias.clone() for name, bias in biases.items()}
    wrap(model, drift(folder))
    assert len(biases) == 6 and all(torch.equal(biases[name], before[name]) for name in biases)


def test_prior_with_vectors_of_another_model(tmp_path):
    """Norms and biases have no fingerprint: their names and shapes must fit."""
    pair = make_whole_pair(tmp_path)
    missing = r"another model: 14 of its 35 weights, such as layers\.0\.mlp\.down_proj\.bias, are not in this one"
    with pytest.raises(ValueError, match=missing):
        guide(tiny_llm("llava", vocab_size=72), pair.prior)
    wider = copy.deepcopy(pair.base)
    wider.model.norm.weight = torch.nn.Parameter(torch.ones(96))
    with pytest.raises(ValueError, match=r"another model: norm\.weight is \[64\] there and \[96\] here"):
        guide(wider, pair.prior)


@pytest.mark.parametrize(
    "source, error", [("missing.safetensors", FileNotFoundError), ("base/config.json", ValueError)]
)
def test_prior_that_is_none(pairs, source, error):
    model = load(pairs("llama"), "llama")
    with pytest.raises(error, match=r"missing|is no prior"):
        get_peft_model(model, DriftConfig(prior=pairs("llama") / source))
    assert untouched(model)


def test_factors_need_a_prior_of_the_adapters_rank(pairs):
    folder = pairs("llama")
    config = DriftConfig(prior=folder / "prior.safetensors", r=12, drift_target="factors")
    model = load(folder, "llama")
    with pytest.raises(ValueError, match="rank 8 for layers"):
        get_peft_model(model, config)
    assert untouched(model)


# Priors of more than projections


def prior_of_everything(path, model):
    """Δ on every weight of the language model: projections, norms, biases, embedding, head."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for key, W in model.named_parameters():
        if module_kind(name := canonical_name(key) or ""):
            weights[name] = W, 0.1 * torch.randn(W.shape, generator=generator)
    return dense_prior(path, weights)


@pytest.mark.parametrize("kind", ["fp32", "nf4"])
def test_vectors_head_and_embedding_fit_their_model(pairs, tmp_path, kind):
    base = load(pairs("qwen2_5_vl"), "qwen2_5_vl")
    prior = prior_of_everything(tmp_path / "p", base)
    kinds = {module_kind(name) for name in prior}
    assert kinds == {"attn", "mlp", "norm", "bias", "head", "embed"}
    config = DriftConfig(prior=prior.path, r=4, task_type="CAUSAL_LM")
    model = wrap(load(pairs("qwen2_5_vl"), "qwen2_5_vl", kind), config)
    assert telemetry(train(model))["guided_steps"] == 3
    config = DriftConfig(prior=prior.path, r=4, target_modules=["q_proj", "embed_tokens"])
    assert "absorbed/embed" in telemetry(wrap(load(pairs("qwen2_5_vl"), "qwen2_5_vl", kind), config))
    saved = DriftConfig(prior=prior.path, r=4, task_type="CAUSAL_LM", modules_to_save=["lm_head"])
    wrap(load(pairs("qwen2_5_vl"), "qwen2_5_vl", kind), saved)


def test_other_rows_biases_and_norms_do_not_fit(tmp_path):
    model = tiny_vlm("qwen2_5_vl")
    config = DriftConfig(prior=prior_of_everything(tmp_path / "p", model).path, r=4)
    model.resize_token_embeddings(80)
    with pytest.raises(ValueError, match=r"embed_tokens.weight is \[64, 64\] there and \[80, 64\] here"):
        get_peft_model(model, config)
    model = tiny_vlm("qwen2_5_vl")
    for layer in model.get_decoder().layers:
        layer.self_attn.q_proj.bias = None
    with pytest.raises(ValueError, match=r"2 of its \d+ weights, such as layers.0.self_attn.q_proj.bias, are not"):
        get_peft_model(model, config)
    model = tiny_vlm("qwen2_5_vl")
    model.get_decoder().norm.weight = torch.nn.Parameter(torch.ones(32))
    with pytest.raises(ValueError, match=r"norm.weight is \[64\] there and \[32\] here"):
        get_peft_model(model, config)
    assert untouched(model)
