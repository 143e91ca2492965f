"""Mamba's out_proj: PEFT refuses to adapt it, or the fused kernels of training pass over the adapter."""

import warnings

import pytest
import torch
from every_type import tiny_base, tiny_config, tiny_text_expert
from older import known_type
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch.nn.functional import linear, pad
from transformers import AutoModelForCausalLM

from drift_peft import DriftConfig, build_prior, guide, language_model_targets
from drift_peft.tuner.compatibility import adapted_modules

OUT = "language_model.model.layers.0.mixer.out_proj"
LEFT = "1 projections, such as .*out_proj, cannot be adapted: Mamba's fused kernels read their weights past an"
READ = f"Mamba's fused kernels read 1 targeted weights past an adapter, such as .*{OUT}'s: where these"


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mamba")
    base = tiny_base("nemotron_h_omni")
    base.save_pretrained(folder / "base")
    tiny_text_expert(base)[0].save_pretrained(folder / "expert")
    return build_prior(folder / "expert", folder / "base", folder / "prior.safetensors", rank=4, progress=False)


def fused(projected, *_, outproj_weight, **__):
    """What the kernel does last; before that, anything."""
    width = outproj_weight.shape[1]
    return linear(pad(projected, (0, max(0, width - projected.shape[-1])))[..., :width], outproj_weight)


@known_type("nemotron_h_omni")
def test_every_adapter_moves_under_the_fused_kernel(prior, monkeypatch):
    module = pytest.importorskip("transformers.models.nemotron_h.modeling_nemotron_h")
    if not hasattr(module, "mamba2_split_conv1d_scan_combined"):
        pytest.skip("this transformers calls the kernel otherwise")
    monkeypatch.setattr(module, "mamba2_split_conv1d_scan_combined", fused)
    model = tiny_base("nemotron_h_omni").train()
    with pytest.warns(UserWarning, match=LEFT):
        model = get_peft_model(model, DriftConfig(prior=prior.path, r=2))
    for config in (part.config for part in model.modules() if hasattr(part, "config")):
        config.use_cache = False
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(input_ids=torch.arange(8, 28).reshape(2, 10)).logits.square().mean().backward()
    optimizer.step()
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    assert layers and not [name for name, layer in layers.items() if not layer.lora_B["default"].weight.any()]
    assert "layers.0.mixer.out_proj.weight" in prior


@known_type("nemotron_h_omni")
def test_who_adapts_it_by_name_is_told(prior):
    settings = {"r": 2, "target_modules": [OUT]}
    with pytest.warns(UserWarning, match=READ):
        get_peft_model(tiny_base("nemotron_h_omni"), DriftConfig(prior=prior.path, **settings))
    model = get_peft_model(tiny_base("nemotron_h_omni"), LoraConfig(**settings))
    with pytest.warns(UserWarning, match=READ):
        guide(model, prior)


@pytest.mark.parametrize("model_type", [pytest.param(t, marks=known_type(t)) for t in ("nemotron_h", "falcon_h1")])
def test_peft_takes_the_targets_of_the_types_that_it_knows(model_type):
    model = AutoModelForCausalLM.from_config(tiny_config(model_type))
    with pytest.warns(UserWarning, match="projections, such as .*out_proj, cannot be adapted: Mamba's fused"):
        targets = language_model_targets(model)
    wrapped = get_peft_model(model, LoraConfig(target_modules=targets))
    names = adapted_modules(wrapped.get_base_model(), ["default"])
    assert any(name.endswith("in_proj") for name in names) and not any(name.endswith("out_proj") for name in names)


@known_type("qwen3_5")
def test_linear_attention_is_no_mamba():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "linear_attn" in language_model_targets(tiny_base("qwen3_5"))
