"""Bases that are quantized: whatever PEFT wraps as a LoRA layer on a CPU takes the same step as the oracle.

Libraries that are no dependency of this project are tested where they are installed: torchao, hqq, gptqmodel.
"""

import pytest
import torch
import transformers
from older import knows_torchao
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from tiny import save_layout, tiny_llm
from torch import nn
from transformers import BitsAndBytesConfig, LlamaForCausalLM
from twin import ALPHA, BATCH, assert_same_update, backward, each_scale, sgd, state, train, train_by_oracle, trainable

from drift_peft import DriftConfig, telemetry

pytestmark = pytest.mark.filterwarnings("ignore:Switched off bitsandbytes", "ignore:.*is deprecated")
GROUP = 32  # weights that share a scale


def with_config(**settings):
    return lambda folder: LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings)


def nf4(folder):
    bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return with_config(quantization_config=bits)(folder)


def int8(folder):
    return with_config(quantization_config=BitsAndBytesConfig(load_in_8bit=True))(folder)


def torchao(folder):
    quantization = pytest.importorskip("torchao.quantization")
    config = transformers.TorchAoConfig(
        quant_type=quantization.Int8WeightOnlyConfig(version=2), modules_to_not_convert=["lm_head"]
    )
    return with_config(quantization_config=config)(folder)


def layer_by_layer(quantize):
    """A model whose projections are replaced, for formats that transformers does not make itself on a CPU."""

    def load(folder):
        model = with_config()(folder)
        for name, module in list(model.model.named_modules()):
            if isinstance(module, nn.Linear):
                model.model.set_submodule(name, quantize(module))
        return model

    return load


def hqq(linear):
    from_hqq = pytest.importorskip("hqq.core.quantize")
    settings = from_hqq.BaseQuantizeConfig(nbits=4, group_size=64)
    return from_hqq.HQQLinear(linear, settings, compute_dtype=torch.float32, device="cpu")


def packed(make, linear, **kwargs):
    """A layer of gptqmodel's with each group's weights rounded to -7 … 7 times its scale."""
    shape = {"in_features": linear.in_features, "out_features": linear.out_features, "bias": linear.bias is not None}
    layer = make(bits=4, group_size=GROUP, sym=True, desc_act=False, **shape)
    scales = linear.weight.data.unflatten(1, (-1, GROUP)).abs().amax(-1) / 7
    getattr(layer, "pack_original", layer.pack)(linear, scales, torch.full_like(scales, 8), **kwargs)
    layer.optimized = True  # it would compile its kernel
    layer.post_init()
    return layer


def gptq(linear):
    pytest.importorskip("optimum")
    make = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch").TorchLinear
    return packed(make, linear, g_idx=torch.arange(linear.in_features, dtype=torch.int32) // GROUP)


def awq(linear):
    pytest.importorskip("optimum")
    return packed(pytest.importorskip("gptqmodel.nn_modules.qlinear.torch_awq").AwqTorchLinear, linear)


FORMATS = {  # -> how to load it, and the class that PEFT wraps its layers in
    "bitsandbytes NF4": (nf4, "Linear4bit"),
    "bitsandbytes int8": (int8, "Linear8bitLt"),
    "torchao int8": (torchao, "TorchaoLoraLinear"),
    "HQQ": (layer_by_layer(hqq), "HqqLoraLinear"),
    "GPTQ": (layer_by_layer(gptq), "GPTQLoraLinear"),
    "AWQ": (layer_by_layer(awq), "AwqLoraLinear"),
}
each_format = pytest.mark.parametrize(
    "format", [pytest.param(name, marks=knows_torchao if name == "torchao int8" else ()) for name in FORMATS]
)


def with_factors(model):
    """Random factors, as in the middle of training. Casting the model would be more than some formats bear."""
    generator = torch.Generator().manual_seed(0)
    for p in trainable(model):
        p.data = 0.1 * torch.randn(p.shape, generator=generator)
    return model.train()


@each_format
@each_scale
def test_a_step_on_a_quantized_base(pair, format, scale, target):
    load, layer = FORMATS[format]
    base = load(pair.folder / "base").train()
    before = base(input_ids=BATCH).logits.detach()
    settings = {"r": 4, "lora_alpha": 6}
    model = get_peft_model(
        base,
        DriftConfig(prior=pair.path, drift_scale=scale, drift_target=target, drift_alpha=ALPHA[scale], **settings),
    )
    assert {type(m).__name__ for m in model.modules() if isinstance(m, LoraLayer)} == {layer}
    assert torch.equal(model.train()(input_ids=BATCH).logits, before)

    lora = LoraConfig(target_modules=model.peft_config["default"].target_modules, **settings)
    twin, plain = (get_peft_model(load(pair.folder / "base"), lora) for _ in range(2))
    model, twin, plain = (with_factors(m) for m in (model, twin, plain))
    start = state(model)
    assert len(start) == 28
    loss = backward(model)
    assert loss == backward(twin) == backward(plain)
    train(model, sgd(model), 1)
    train(plain, sgd(plain), 1)
    train_by_oracle(twin, sgd(twin), pair.prior, scale, target, 1)
    assert_same_update(model, twin, start, 1e-4)
    with pytest.raises(AssertionError):
        assert_same_update(plain, twin, start, 0.05)
    assert telemetry(model)["guided_steps"] == 1


@each_format
def test_the_weight_gradient_is_seen(pair, format):
    """drift_norm="weight" keeps s·G and s·G·Aᵀ; the latter is what autograd finds for lora_B."""
    load, _ = FORMATS[format]
    config = DriftConfig(prior=pair.path, r=4, lora_alpha=6, drift_norm="weight", drift_sketch=None)
    model = with_factors(get_peft_model(load(pair.folder / "base"), config))
    backward(model)
    for layer in (m for m in model.modules() if isinstance(m, LoraLayer)):
        A, B = (getattr(layer, f"lora_{factor}")["default"].weight for factor in "AB")
        sums = layer.drift_peft["default"].capture.sums
        torch.testing.assert_close(sums[:, -4:], B.grad, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(sums[:, :-4] @ A.mT, B.grad, rtol=1e-3, atol=1e-6)
    train(model, sgd(model), 1)
    assert telemetry(model)["guided_steps"] == 1


@each_format
def test_a_prior_of_another_base_is_refused(pair, tmp_path, format):
    """The fingerprint is compared whatever form the weights have."""
    load, _ = FORMATS[format]
    save_layout(tiny_llm("llava", seed=5), tmp_path)
    with pytest.raises(ValueError, match=r"built for other base weights: its fingerprint is off by 1\d\d%"):
        get_peft_model(load(tmp_path), DriftConfig(prior=pair.path, r=4))


@pytest.mark.filterwarnings("error:The prior")
@each_format
def test_a_bias_is_as_it_was_and_hides_no_weight(pair, tmp_path, format):
    load, _ = FORMATS[format]
    model = tiny_llm("llava", attention_bias=True)
    biases = model.load_state_dict(pair.base.state_dict(), strict=False).missing_keys
    assert biases and all(name.endswith("bias") for name in biases)
    for name in biases:
        model.get_parameter(name).data.normal_(std=30)
    save_layout(model, tmp_path)
    model = load(tmp_path)
    before = model(BATCH).logits
    assert torch.equal(get_peft_model(model, DriftConfig(prior=pair.path, r=4))(BATCH).logits, before)
