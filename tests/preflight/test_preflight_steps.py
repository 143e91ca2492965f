"""drift-peft preflight: activations and weights in 4 bits are those of real steps of tiny models."""

import warnings
from dataclasses import replace

import bitsandbytes as bnb
import pytest
import torch
import transformers as tf
from older import looks_up_places
from peft import LoraConfig, get_peft_model
from tiny import FAMILIES, MIXED, TEXT
from tiny_memory import PART, settings, slow
from torch._subclasses.fake_tensor import FakeTensorMode

from drift_peft import language_model_targets
from drift_peft.checkpoints import Checkpoint, Decoder, assumed_quantization
from drift_peft.merge.gates import Gate, frozen, gated
from drift_peft.preflight import dry_run as dry
from drift_peft.preflight.memory import Memory, patches
from drift_peft.prior import PriorWeight

MIXTURES = "qwen3_vl_moe", "glm4v_moe", "qwen3_5_moe"


def glm4v():
    """GLM-4.1V: gate_proj and up_proj are one layer."""
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 4, "out_hidden_size": 64, "intermediate_size": 40,
              "patch_size": 4, "image_size": 16}  # fmt: skip
    return tf.Glm4vConfig(text_config=TEXT, vision_config=vision)


def layers_of(family, layer_types):
    """The tiny family's config with layers of these kinds."""
    config = (FAMILIES | MIXED)[family][0]
    if family == "gemma4":  # the widths of its heads follow from the layers when it is made
        return config(num_hidden_layers=len(layer_types), layer_types=layer_types)
    config = config()
    config.text_config.num_hidden_layers = len(layer_types)
    config.text_config.layer_types = layer_types
    return config


def in_4_bits(model, folder):
    """A tiny model with its projections in NF4, as the recipes load it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
        bits = assumed_quantization(Checkpoint(folder))
        options = {"dtype": torch.bfloat16, "quantization_config": bits, "device_map": "cpu"}
        return type(model).from_pretrained(folder, **options)


def real_step(model, step):
    """Phase of a step on a model in 4 bits, with LoRA in fp32 as the recipes wrap it -> bytes at its peak."""
    model = get_peft_model(model, LoraConfig(r=step.r, target_modules=language_model_targets(model)))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            parameter.grad = torch.zeros_like(parameter)
    decoder = model.get_base_model().get_decoder().train()
    if step.checkpointing:
        decoder.gradient_checkpointing_enable({"use_reentrant": False})
    head = model.get_base_model().get_output_embeddings().weight.detach()
    moments = dry.take(step, decoder, decoder.layers, head).peaks
    return {phase: max(moments[m] for m, of in dry.PHASE_OF.items() if of == phase) for phase in dry.PHASES}


FULL, SLIDING, LINEAR, CONV = "full_attention", "sliding_attention", "linear_attention", "conv"


@pytest.mark.parametrize(
    "family, layer_types, checkpointing",
    [
        ("qwen2_5_vl", [FULL] * 4, True),
        ("qwen2_5_vl", [FULL] * 4, False),
        pytest.param("gemma3", [SLIDING, SLIDING, SLIDING, FULL], True, marks=slow),
        pytest.param("gemma3", [SLIDING, SLIDING, SLIDING, FULL], False, marks=slow),
        pytest.param("qwen3_5", [LINEAR, FULL, LINEAR, LINEAR], True, marks=slow),
        pytest.param("qwen3_5", [LINEAR, FULL, LINEAR, LINEAR], False, marks=slow),
        pytest.param("qwen3_5", [FULL, LINEAR, FULL, FULL], True, marks=slow),
        pytest.param("qwen3_5", [FULL, LINEAR, FULL, FULL], False, marks=slow),
        pytest.param("qwen3_5_moe", [LINEAR, FULL, LINEAR, LINEAR], True, marks=slow),
        pytest.param("qwen3_5_moe", [LINEAR, FULL, LINEAR, LINEAR], False, marks=slow),
        ("lfm2_vl", [CONV, CONV, FULL, CONV], True),
        pytest.param("lfm2_vl", [CONV, CONV, FULL, CONV], False, marks=slow),
        # of which the last two layers use the keys and values of two before
        pytest.param("gemma4", [FULL] * 8, True, marks=slow),
        pytest.param("gemma4", [SLIDING, FULL] * 4, True, marks=slow),
        pytest.param("gemma4", [SLIDING, FULL] * 4, False, marks=slow),
    ],
)
def test_activations_are_those_of_a_real_step(family, layer_types, checkpointing, tmp_path):
    config = layers_of(family, layer_types)
    step = dry.Step(2, 512, r=16, checkpointing=checkpointing, label_smoothing=0.1)
    model = tf.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    real = real_step(in_4_bits(model, tmp_path), step)
    peaks = Memory(config, "tiny").step_peaks(step)
    for phase in dry.PHASES:
        assert sum(peaks[phase]) == pytest.approx(real[phase], rel=0.1), phase


@pytest.mark.parametrize("checkpointing", [True, pytest.param(False, marks=slow)])
def test_activations_of_eager_attention_are_those_of_a_real_step(checkpointing, tmp_path):
    config = layers_of("qwen2_5_vl", [FULL] * 4)
    step = dry.Step(1, 512, r=16, checkpointing=checkpointing, label_smoothing=0.1)
    model = tf.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model = in_4_bits(model, tmp_path)
    model.set_attn_implementation("eager")
    real, memory = real_step(model, step), Memory(config, "tiny")
    peaks = memory.step_peaks(replace(step, eager=True))
    for phase in dry.PHASES:
        assert sum(peaks[phase]) == pytest.approx(real[phase], rel=0.1), phase
    assert sum(peaks["backward pass"]) > 1.5 * sum(memory.step_peaks(step)["backward pass"])
    for named, eager in (("eager", True), ({"text_config": "eager"}, True), ("sdpa", False), (None, False)):
        assert settings(model_init_kwargs={"attn_implementation": named}).step.eager == eager


def test_activations_of_gates_are_those_of_a_real_step(tmp_path):
    config, k = layers_of("qwen2_5_vl", [FULL] * 4), 16
    step = dry.Step(1, 512, gated=k)
    model = tf.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model = in_4_bits(model, tmp_path).requires_grad_(False)
    decoder, gates = model.get_decoder(), {}
    modules = {name: m for name, m in decoder.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    for name, m in modules.items():
        U, Vh = torch.zeros(m.out_features, k), torch.zeros(k, m.in_features)
        gates[name] = Gate(PriorWeight(U, torch.ones(k), Vh, 1.0, 1.0, 1.0, 1.0, ()), torch.device("cpu"), step.dtype)
        gates[name].gamma.grad = torch.zeros(k)
    with frozen(model, checkpointing=True), gated(modules, gates):
        moments = dry.take(step, decoder, decoder.layers, model.get_output_embeddings().weight).peaks
    peaks = Memory(config, "tiny").step_peaks(step)
    for phase in dry.PHASES:
        real = max(moments[m] for m, of in dry.PHASE_OF.items() if of == phase)
        assert sum(peaks[phase]) == pytest.approx(real, rel=0.1), phase


@slow
@pytest.mark.parametrize("checkpointing", [True, False])
def test_activations_of_gemma_3n(checkpointing, tmp_path):
    """Of its language model alone: its vision tower is timm's."""
    text = {**TEXT, "num_hidden_layers": 8, "layer_types": [SLIDING, FULL] * 4, "sliding_window": 16, "laurel_rank": 64}
    text |= {"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 64, "vocab_size_per_layer_input": 64}
    config = tf.Gemma3nTextConfig(**text, activation_sparsity_pattern=[0.95] * 2 + [0.0] * 6)
    with torch.device("meta"):
        model = tf.Gemma3nForCausalLM(config)
    decoder = Decoder(model)
    step = dry.Step(2, 512, r=16, checkpointing=checkpointing, label_smoothing=0.1)
    real = real_step(in_4_bits(tf.Gemma3nForCausalLM(config), tmp_path), step)
    peaks = dry.step_peaks(decoder, model.lm_head.weight.shape, step)
    for phase in dry.PHASES:
        assert sum(peaks[phase]) == pytest.approx(real[phase], rel=0.1), phase


@pytest.mark.parametrize("family", ["gemma4", "lfm2_vl", *MIXTURES, "glm4v"])
def test_in_4_bits_is_counted_what_bitsandbytes_makes_so(family, tmp_path):
    config = glm4v() if family == "glm4v" else MIXED[family][0]()
    model = tf.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model = in_4_bits(model, tmp_path)
    four = {
        name: m.weight.quant_state.shape.numel()
        for name, m in model.named_modules()
        if isinstance(m, bnb.nn.Linear4bit)
    }
    weights = Memory(config, "tiny").weights
    assert weights[PART] == sum(four.values()) > 0
    rest = {name: p.numel() for name, p in model.named_parameters() if name.removesuffix(".weight") not in four}
    assert sum(weights.values()) - weights[PART] == sum(rest.values())
    assert weights["experts"] == sum(n for name, n in rest.items() if ".experts." in name)
    assert weights["per-layer embeddings"] == sum(n for name, n in rest.items() if "embed_tokens_per_layer" in name)
    assert bool(weights["experts"]) == (family in MIXTURES)
    assert bool(weights["per-layer embeddings"]) == (family == "gemma4")


GRIDS = {"image_grid_thw": torch.tensor([[1, 4, 4]] * 16)}
PLACES = {"image_position_ids": torch.cartesian_prod(torch.arange(4), torch.arange(4)).expand(16, 16, 2)}
SHAPES = {"spatial_shapes": torch.tensor([[4, 4]] * 16), "pixel_attention_mask": torch.ones(16, 16, dtype=torch.long)}


@pytest.mark.parametrize(
    "family, pixels, inputs",  # 16 images of 16 patches
    [
        ("llava", (16, 3, 16, 16), {}),
        ("gemma3", (16, 3, 16, 16), {}),
        ("idefics2", (1, 16, 3, 16, 16), {}),
        ("internvl", (16, 3, 16, 16), {}),
        ("qwen2_5_vl", (16 * 16, 3 * 2 * 16), GRIDS),
        ("qwen3_vl", (16 * 16, 3 * 2 * 16), GRIDS),
        pytest.param("gemma4", (16, 16, 3 * 16), PLACES, marks=looks_up_places),
        ("lfm2_vl", (16, 16, 3 * 16), SHAPES),
    ],
)
def test_the_pass_of_the_vision_tower_is_that_of_a_real_one(family, pixels, inputs):
    config, cls, _ = (FAMILIES | MIXED)[family]
    config = config()
    depth = 24 if family == "internvl" else 4  # of whose blocks no outputs are kept
    setattr(config.vision_config, "depth" if hasattr(config.vision_config, "depth") else "num_hidden_layers", depth)
    model, pixels = cls(config), torch.ones(pixels)
    with torch.no_grad(), dry.Live() as live:
        model.get_image_features(pixel_values=pixels, **inputs)
    kwargs = {"max_pixels": 256, "do_image_splitting": False, "max_soft_tokens": 4, "max_image_tokens": 4}
    kwargs |= {"crop_to_patches": False}
    wanted = settings(images_per_sample=16, max_tokens=4096, bf16=False, processor_kwargs=kwargs)
    memory = Memory(config, "tiny")
    assert patches(config, wanted) == 16 * 16
    assert 0.8 <= memory.tower(wanted) / live.peaks["before the layers"] <= 2
    one = replace(wanted, images_per_sample=1)
    assert memory.tower(wanted) == 16 * memory.tower(one)


@pytest.mark.parametrize(
    "family, pixels, inputs",  # 4 images of 1024 patches
    [
        ("gemma3", (4, 3, 128, 128), {}),
        ("qwen2_5_vl", (4 * 1024, 3 * 2 * 16), {"image_grid_thw": torch.tensor([[1, 32, 32]] * 4)}),
    ],
)
def test_eager_attention_of_the_vision_tower_is_counted(family, pixels, inputs):
    config, cls, _ = FAMILIES[family]
    config = config()
    if family == "gemma3":
        config.vision_config.image_size = 128
        config.mm_tokens_per_image = 256
    else:
        config.vision_config.fullatt_block_indexes = [0]
    config._attn_implementation = "eager"
    model = cls(config)
    with torch.no_grad(), dry.Live() as live:
        model.get_image_features(pixel_values=torch.ones(pixels), **inputs)
    wanted = settings(images_per_sample=4, max_tokens=4096, bf16=False, processor_kwargs={"max_pixels": 128**2})
    memory, eager = Memory(config, "tiny"), replace(wanted, model_init_kwargs={"attn_implementation": "eager"})
    assert memory.tower(wanted) < 0.8 * live.peaks["before the layers"]
    assert 0.8 <= memory.tower(eager) / live.peaks["before the layers"] <= 2


@pytest.mark.parametrize("changes", [
    {"checkpointing": False}, pytest.param({}, marks=slow),
    pytest.param({"checkpointing": False, "answer": 40}, marks=slow), pytest.param({"answer": 40}, marks=slow),
])  # fmt: skip
def test_a_step_less_a_layer_is_one_without_it(changes, monkeypatch):
    """So that a step through each kind of layers is enough."""
    memory, taken = Memory(layers_of("gemma3", [SLIDING, FULL]), "tiny"), {}
    decoder, head = memory.step_peaks.__wrapped__.args
    step, run = dry.Step(2, 128, **changes), dry._run
    monkeypatch.setattr(dry, "_run", lambda *given: taken.setdefault(given[-1], run(*given)))
    dry.step_peaks(decoder, head, step)
    assert {*taken} == {(1, 0, 0, 0), (0, 1, 1, 1)}
    for (other, i, _, _), live in taken.items():
        three, two, mixed = (run(decoder, head, step, layers).peaks for layers in ((i, i, i), (i, i), (other, i, i)))
        assert live.peaks_without(2) == mixed
        less = live.peaks_without(0), live.peaks_without(0, 2)
        assert [less[0][m] - less[1][m] for m in dry.MOMENTS] == [three[m] - two[m] for m in dry.MOMENTS]


@pytest.mark.parametrize("lending", [0, 2])
def test_where_layers_share_an_input_each_run_is_made(lending, monkeypatch):
    """Its gradient is a sum over them. Of one run all take what they count, which is another test's."""
    config = MIXED["gemma4"][0](num_hidden_layers=4, layer_types=[FULL] * 4)
    config.text_config.num_kv_shared_layers = lending
    memory, taken, step = Memory(config, "tiny"), [], dry.Step(1, 64)
    decoder, head = memory.step_peaks.__wrapped__.args
    run = dry._run(decoder, head, step, (*dry.lenders(decoder), 0))
    monkeypatch.setattr(dry, "_run", lambda *given: (taken.append(given[-1]), run)[1])
    dry.step_peaks(decoder, head, step)
    lent = dry.lenders(decoder)
    assert len(lent) == min(lending, 1)
    assert {tuple(sorted(lent + layers)) for layers in ((0, 0), (0, 0, 0))} <= {*taken}


def test_a_question_after_the_device_is_no_operation(monkeypatch):
    """With linear attention two of three dispatches are such questions."""
    seen = []
    with FakeTensorMode(), dry.Live() as live:
        made = [torch.zeros(4), (torch.zeros(2), {"other": torch.zeros(8)})]
        monkeypatch.setattr(live, "_see", lambda *values, **_: seen.append(values))
        assert torch.ops.prim.device.default(made[0]).type == "cpu" and not seen  # as autograd asks
        made[0] + 1
        assert seen
    assert live.bytes == live.peaks["before the layers"] == 4 * (4 + 2 + 8)
    with FakeTensorMode(), dry.Live() as live:
        parts = torch.zeros(8).split(2)  # tensors in a tuple share what they are parts of
        assert live.bytes == 4 * 8
        del parts
        assert live.bytes == 0
