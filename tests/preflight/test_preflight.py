"""drift-peft preflight: what training takes, against real steps, hand-computed sizes and TRL's own settings."""

import inspect
import json
import warnings
from dataclasses import fields, replace
from pathlib import Path

import bitsandbytes as bnb
import preflight as benchmark
import pytest
import torch
import transformers as tf
import yaml
from command import run
from fits_24gb import computed_sizes
from hub import Hub
from models import qwen2_5_vl_7b
from parts.arguments import RunArguments
from peft import LoraConfig, get_peft_model
from published import BASES
from sft_vlm import not_quantized
from tiny import FAMILIES, MIXED, TEXT, save_layout, tiny_llm
from trl import SFTConfig
from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

from drift_peft import DriftConfig, gate_prior, language_model_targets
from drift_peft.checkpoints import Decoder
from drift_peft.merge.gates import Gate, frozen, gated
from drift_peft.preflight import dry_run as dry
from drift_peft.preflight.cards import CARDS, USABLE, advise, cards_table, fits, read_settings
from drift_peft.preflight.gating import gating_table
from drift_peft.preflight.memory import CONTEXT, STATE, WORKSPACES, Memory, Settings, patches
from drift_peft.prior import PriorWeight

ROOT = Path(__file__).parents[2]

TINY = FAMILIES["qwen2_5_vl"][0]
PART = "language model's projections, 4 bits"
MIXTURES = "qwen3_vl_moe", "glm4v_moe", "qwen3_5_moe"


def glm4v():
    """GLM-4.1V: gate_proj and up_proj are one layer."""
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 4, "out_hidden_size": 64, "intermediate_size": 40,
              "patch_size": 4, "image_size": 16}  # fmt: skip
    return tf.Glm4vConfig(text_config=TEXT, vision_config=vision)


def settings(**changes):
    return Settings(**{"base": "tiny", "r": 16, "max_tokens": 512, "per_device_train_batch_size": 1, **changes})


@pytest.fixture(scope="module")
def memory():
    return Memory(TINY(), "tiny")


@pytest.fixture
def recipe(tmp_path):
    """A recipe whose base is a config.json without weights."""
    TINY().save_pretrained(tmp_path / "base")
    content = {"base": str(tmp_path / "base"), "r": 16, "max_tokens": 128, "learning_rate": 1e-4}
    content |= {"per_device_train_batch_size": 1, "optim": "paged_adamw_8bit", "processor_kwargs": {"max_pixels": 256}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "recipe.yaml"


def test_defaults_are_those_of_the_recipes():
    known = {f.name: f.default for cls in (SFTConfig, DriftConfig, RunArguments) for f in fields(cls)}
    for setting in fields(Settings)[1:]:
        assert setting.default == known[setting.name], setting.name
    assert dry.TILE == (TOKEN_CHUNK_SIZE, _CHUNKED_LOGPROB_CHUNK_SIZE)
    names = {name.value for name in tf.training_args.OptimizerNames}
    assert all({name, f"paged_{name}"} & names for name in STATE)


def test_the_weights_of_the_main_pair():
    parts = Memory(qwen2_5_vl_7b(), "7B").estimate(settings(max_tokens=64)).parts
    projections = 28 * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944)
    assert parts[PART] == projections * (0.5 + 1 / 64 + 4 / (64 * 256))
    assert parts["embedding and head"] == 2 * 2 * 152064 * 3584
    widths = 28 * (2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944))
    assert parts["adapter, 32 bits"] == parts["its gradients, 32 bits"] == 4 * 16 * widths
    assert parts["steering factors, 16 bits"] == 2 * 16 * widths
    assert parts["optimizer (adamw_torch_fused)"] == 8 * 16 * widths
    computed = computed_sizes()
    other = parts["embedding and head"] + parts["vision tower and the rest"]
    assert parts[PART] / 1e9 == pytest.approx(computed["language model, NF4"])
    assert other / 1e9 == pytest.approx(computed["other weights, bf16"], rel=1e-3)


def layers_of(family, layer_types):
    """The tiny family's config with layers of these kinds."""
    config = (FAMILIES | MIXED)[family][0]
    if family == "gemma4":  # the widths of its heads follow from the layers when it is made
        return config(num_hidden_layers=len(layer_types), layer_types=layer_types)
    config = config()
    config.text_config.num_hidden_layers = len(layer_types)
    config.text_config.layer_types = layer_types
    return config


def in_4_bits(model, folder, skip):
    """A tiny model with its projections in NF4, as the recipes load it."""
    bits = tf.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=skip,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
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
    moments = dry.take(step, decoder, decoder.layers[0], head)
    return {phase: max(moments[m] for m, of in dry.PHASE_OF.items() if of == phase) for phase in dry.PHASES}


FULL, SLIDING, LINEAR, CONV = "full_attention", "sliding_attention", "linear_attention", "conv"


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "family, layer_types, checkpointing",
    [
        ("qwen2_5_vl", [FULL] * 4, True),
        ("qwen2_5_vl", [FULL] * 4, False),
        ("gemma3", [SLIDING, SLIDING, SLIDING, FULL], True),
        pytest.param("gemma3", [SLIDING, SLIDING, SLIDING, FULL], False, marks=slow),
        pytest.param("qwen3_5", [LINEAR, FULL, LINEAR, LINEAR], True, marks=slow),
        pytest.param("qwen3_5", [LINEAR, FULL, LINEAR, LINEAR], False, marks=slow),
        pytest.param("qwen3_5", [FULL, LINEAR, FULL, FULL], True, marks=slow),
        pytest.param("qwen3_5", [FULL, LINEAR, FULL, FULL], False, marks=slow),
        pytest.param("qwen3_5_moe", [LINEAR, FULL, LINEAR, LINEAR], True, marks=slow),
        pytest.param("qwen3_5_moe", [LINEAR, FULL, LINEAR, LINEAR], False, marks=slow),
        pytest.param("lfm2_vl", [CONV, CONV, FULL, CONV], True, marks=slow),
        ("lfm2_vl", [CONV, CONV, FULL, CONV], False),
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
    real = real_step(in_4_bits(model, tmp_path, not_quantized(config)), step)
    peaks = Memory(config, "tiny").step_peaks(step)
    for phase in dry.PHASES:
        assert sum(peaks[phase]) == pytest.approx(real[phase], rel=0.1), phase


def test_activations_of_gates_are_those_of_a_real_step(tmp_path):
    config, k = layers_of("qwen2_5_vl", [FULL] * 4), 16
    step = dry.Step(1, 512, gated=k)
    model = tf.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model = in_4_bits(model, tmp_path, not_quantized(config)).requires_grad_(False)
    decoder, gates = model.get_decoder(), {}
    modules = {name: m for name, m in decoder.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    for name, m in modules.items():
        U, Vh = torch.zeros(m.out_features, k), torch.zeros(k, m.in_features)
        gates[name] = Gate(PriorWeight(U, torch.ones(k), Vh, 1.0, 1.0, 1.0, 1.0, ()), torch.device("cpu"), step.dtype)
        gates[name].gamma.grad = torch.zeros(k)
    with frozen(model, checkpointing=True), gated(modules, gates):
        moments = dry.take(step, decoder, decoder.layers[0], model.get_output_embeddings().weight)
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
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    skip = [name for name in linear if name not in decoder.projections]
    real = real_step(in_4_bits(tf.Gemma3nForCausalLM(config), tmp_path, skip), step)
    peaks = dry.step_peaks(decoder, model.lm_head.weight.shape, step)
    for phase in dry.PHASES:
        assert sum(peaks[phase]) == pytest.approx(real[phase], rel=0.1), phase


@pytest.mark.parametrize("family", ["gemma4", "lfm2_vl", *MIXTURES, "glm4v"])
def test_in_4_bits_is_counted_what_bitsandbytes_makes_so(family, tmp_path):
    config = glm4v() if family == "glm4v" else MIXED[family][0]()
    model = tf.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model = in_4_bits(model, tmp_path, not_quantized(config))
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


def test_what_training_takes_follows_the_settings(memory):
    lean = memory.estimate(settings())
    assert lean.bytes == sum(lean.parts.values()) and lean.parts["CUDA context"] == CONTEXT
    assert lean.parts["workspaces of cuBLAS and the like"] == WORKSPACES
    for more in ({"per_device_train_batch_size": 2}, {"drift_norm": "weight"}, {"bf16": False}):
        assert memory.estimate(settings(**more)).bytes > lean.bytes, more
    forward = [memory.step_peaks(settings(**{"gradient_checkpointing": g}).step)["forward pass"] for g in (True, False)]
    assert sum(forward[1]) > 2 * sum(forward[0])
    state = [memory.estimate(settings(optim=name)).parts[f"optimizer ({name})"] for name in ("adafactor", "adamw_8bit")]
    assert 0 < state[0] < state[1] < lean.parts["optimizer (adamw_torch_fused)"]
    attention = memory.estimate(settings(drift_modules=["attn"])).parts
    assert 0 < attention["steering factors, 16 bits"] < lean.parts["steering factors, 16 bits"]


@pytest.mark.parametrize(
    "config, kwargs, number",
    [
        (qwen2_5_vl_7b(), {"max_pixels": 512 * 512}, 512 * 512 // 14**2),
        (qwen2_5_vl_7b(), None, 512 * 4),  # as many as there are tokens
        (qwen2_5_vl_7b(), {"max_pixels": 64 * 64, "images": 3}, 3 * (64 * 64 // 14**2)),
        (qwen2_5_vl_7b(), {"max_pixels": 512 * 512, "images": 3}, 512 * 4),
        (tf.LlavaNextConfig(), {"images": 2}, 2 * 5 * 24 * 24),
        (tf.LlavaNextConfig(), None, 5 * 24 * 24),
        (tf.Gemma3Config(vision_config={"image_size": 896, "patch_size": 14}), None, 64 * 64),
        (tf.SmolVLMConfig(vision_config={"image_size": 384, "patch_size": 14}), None, 17 * 27 * 27),
        (
            tf.SmolVLMConfig(vision_config={"image_size": 384, "patch_size": 14}),
            {"size": {"longest_edge": 768}},
            5 * 27 * 27,
        ),
        (tf.Idefics2Config(vision_config={"image_size": 980, "patch_size": 14}), {"do_image_splitting": False}, 70**2),
        (tf.InternVLConfig(), None, 13 * 32 * 32),
        (tf.MllamaConfig(vision_config={"image_size": 560, "patch_size": 14}), None, 4 * 40 * 40),
        (tf.Gemma4Config(vision_config={}), {"images": 2}, 2 * 280 * 9),
        (tf.Gemma4Config(vision_config={}), {"max_soft_tokens": 70}, 70 * 9),
        (tf.Lfm2VlConfig(), None, 11 * 32 * 32),
        (tf.Lfm2VlConfig(), {"do_image_splitting": False}, 32 * 32),
    ],
)
def test_patches_of_a_sample(config, kwargs, number):
    kwargs = dict(kwargs or {})
    images = kwargs.pop("images", 1)
    assert patches(config, settings(processor_kwargs=kwargs, images_per_sample=images)) == number


GRIDS = {"image_grid_thw": torch.tensor([[1, 4, 4]] * 16)}
PLACES = {"image_position_ids": torch.cartesian_prod(torch.arange(4), torch.arange(4)).expand(16, 16, 2)}
SHAPES = {"spatial_shapes": torch.tensor([[4, 4]] * 16), "pixel_attention_mask": torch.ones(16, 16, dtype=torch.long)}


@pytest.mark.parametrize(
    "family, pixels, inputs",  # 16 images of 16 patches
    [
        ("llava", (16, 3, 16, 16), {}),
        ("gemma3", (16, 3, 16, 16), {}),
        ("idefics2", (1, 16, 3, 16, 16), {}),
        ("qwen2_5_vl", (16 * 16, 3 * 2 * 16), GRIDS),
        ("qwen3_vl", (16 * 16, 3 * 2 * 16), GRIDS),
        ("gemma4", (16, 16, 3 * 16), PLACES),
        ("lfm2_vl", (16, 16, 3 * 16), SHAPES),
    ],
)
def test_the_pass_of_the_vision_tower_is_that_of_a_real_one(family, pixels, inputs):
    config, cls, _ = (FAMILIES | MIXED)[family]
    config = config()
    setattr(config.vision_config, "depth" if hasattr(config.vision_config, "depth") else "num_hidden_layers", 4)
    model, pixels = cls(config), torch.ones(pixels)
    with torch.no_grad(), dry.Live() as live:
        model.get_image_features(pixel_values=pixels, **inputs)
    kwargs = {"max_pixels": 256, "do_image_splitting": False, "max_soft_tokens": 4, "max_image_tokens": 4}
    wanted = settings(images_per_sample=16, max_tokens=4096, bf16=False, processor_kwargs=kwargs)
    memory = Memory(config, "tiny")
    assert patches(config, wanted) == 16 * 16
    assert 0.8 <= memory.tower(wanted) / live.peaks["before the layers"] <= 2
    one = replace(wanted, images_per_sample=1)
    assert memory.tower(wanted) == 16 * memory.tower(one)


def recipes():
    for file in sorted((ROOT / "recipes" / "configs").glob("*.yaml")):
        # linear attention's loops, and kinds of layers
        many = file.stem.startswith(("qwen3_5", "gemma", "lfm2"))
        yield pytest.param(file.stem, marks=[slow] if many else [])


@pytest.mark.parametrize("name", recipes())
def test_what_a_recipe_says_it_takes_is_the_estimate_at_the_published_size(name):
    recipe = replace(read_settings(ROOT / "recipes" / "configs" / f"{name}.yaml"), keep=None)
    config, weights = BASES[recipe.base]
    memory = Memory(config(), recipe.base)
    assert sum(memory.weights.values()) / 1e9 == pytest.approx(weights, abs=0.006)
    estimate = memory.estimate(recipe)
    smallest = next(card for card in CARDS if fits(estimate, card))
    head = (ROOT / "recipes" / "configs" / f"{name}.yaml").read_text(encoding="utf-8").partition("\nbase:")[0]
    assert f"about {estimate.bytes / 1e9:.1f} GB, so a card of {smallest} GB; estimated by drift-peft preflight" in head
    if name in ("qwen2_5_vl_7b_r1", "llava_next_llama3_8b_dart"):  # what keeping takes at the peak; all would take long
        assert 0 <= memory.estimate(replace(recipe, keep="keep.safetensors")).bytes / estimate.bytes - 1 < 0.02


def test_what_cannot_be_counted_is_refused_by_name():
    with pytest.raises(ValueError, match=r"^tiny sees its images in 2 layers of cross-attention.*: train a few steps"):
        Memory(FAMILIES["mllama"][0](), "tiny")
    with pytest.raises(ValueError, match=r"^blip does not say where its head is.*: train a few steps"):
        Memory(tf.BlipConfig(), "blip")
    with pytest.raises(ValueError, match=r"^tiny is no vision-language model"):
        Memory(tf.Gemma4Config(), "tiny")  # its vision tower is optional
    wrong = tf.AyaVisionConfig(vision_config={"model_type": "siglip_vision_model", "hidden_size": 30})
    with pytest.raises(ValueError, match=r"^transformers cannot build tiny here: embed_dim must be divisible[^\n]*$"):
        Memory(wrong, "tiny")
    with pytest.raises(ValueError, match=r"^what GitLayer takes cannot be counted .*: train a few steps"):
        Memory(tf.GitConfig(), "git").estimate(settings())
    config = TINY()
    rope = config.text_config.rope_parameters
    config.text_config.rope_parameters = {**rope, "mrope_section": [4, 2, 1]}  # of 8: no step can be run
    with pytest.raises(ValueError, match=r"^what Qwen2_5_VLDecoderLayer takes cannot be counted .*: train a few steps"):
        Memory(config, "tiny").estimate(settings())


def card(estimate):
    """GB of the card that this just fits."""
    return estimate.bytes * (1 + 1e-9) / USABLE / 1e9


def test_advice_names_the_one_setting_that_helps_most(memory):
    now = memory.estimate(settings(r=8, per_device_train_batch_size=8, gradient_checkpointing=False))
    fewer, lean = (
        memory.estimate(replace(now.settings, **change))
        for change in ({"per_device_train_batch_size": 1}, {"optim": "paged_adamw_8bit"})
    )
    assert fewer.bytes < lean.bytes < now.bytes
    advice = advise(memory, now, card(lean))  # either would do
    assert (advice["setting"], advice["value"], advice["fits"]) == ("per_device_train_batch_size", 1, True)
    assert advice["total_gb"] == fewer.bytes / 1e9
    assert advice["all"].keys() == {"per_device_train_batch_size", "optim", "gradient_checkpointing", "max_tokens"}


@pytest.mark.slow
def test_advice_lowers_max_tokens_no_further_than_needed(memory):
    now = memory.estimate(settings(max_tokens=8192, r=8, optim="paged_adamw_8bit"))
    few = memory.estimate(replace(now.settings, max_tokens=3000))
    advice = advise(memory, now, card(few))
    assert advice["setting"] == "max_tokens" and advice["fits"]
    assert 2560 <= advice["value"] <= 3000 and advice["value"] % 256 == 0
    assert not advise(memory, now, 0.3)["fits_with_all"]  # less than the context


def test_the_verdict_says_what_to_change():
    advice = {"setting": "r", "value": 8, "total_gb": 7.0, "fits": True, "all": {"r": 8, "max_tokens": 512}}
    told = []
    for card in (
        {"fits": True},
        {"fits": False, "advice": {**advice, "fits_with_all": True}},
        {"fits": False, "advice": {**advice, "fits": False, "fits_with_all": True}},
        {"fits": False, "advice": {**advice, "fits": False, "fits_with_all": False}},
    ):
        table = cards_table({"total_gb": 7.4, "cards": [{"gb": 8, "usable_gb": 7.5, **card}]})
        told.append(str(next(table.columns[2].cells)))
    assert told == [
        "fits, with 0.1 GB to spare",
        "does not fit; with r: 8 it does (7.0 GB)",
        "does not fit; r: 8 helps most (7.0 GB), and enough is only r: 8, max_tokens: 512",
        "fits no card of this size at any of these settings",
    ]


def test_the_command(recipe, capsys):
    both = "--set", "max_tokens=256", "--set", "bf16=true", "r=8", "--json"
    status, out, _ = run(capsys, "preflight", recipe, *both)
    summary = json.loads(out)
    settings = summary["settings"]
    assert status == 0 and (settings["max_tokens"], settings["bf16"], settings["r"]) == (256, True, 8)
    assert summary["total_gb"] == pytest.approx(sum(summary["parts_gb"].values()))
    assert [(c["gb"], c["fits"]) for c in summary["cards"]] == [(8, True), (12, True), (16, True), (24, True)]
    several = json.loads(run(capsys, "preflight", recipe, "--set", "images_per_sample=4", "--json")[1])
    assert several["patches"] == 4 * summary["patches"] and several["settings"]["images_per_sample"] == 4
    assert "each with 4 images of 64 patches" in " ".join(
        run(capsys, "preflight", recipe, "--set", "images_per_sample=4")[1].split()
    )
    status, out, _ = run(capsys, "preflight", recipe)
    out = " ".join(out.split())
    assert status == 0 and "CUDA context" in out and "1 x 128 tokens, each with 1 image of 16 patches" in out
    assert "24 GB" in out and "fits, with" in out and "94% of a card" in out


def test_what_gating_takes(recipe, capsys):
    status, out, _ = run(capsys, "preflight", recipe, "--gates", "--json")
    summary = json.loads(out)
    assert status == 0 and summary["total_gb"] == pytest.approx(sum(summary["parts_gb"].values()))
    shapes = [(m.out_features, m.in_features) for m in Memory(TINY(), "tiny").projections.values()]
    prior = 2 * sum(min(64, *shape) * sum(shape) for shape in shapes)
    assert summary["parts_gb"]["prior, 16 bits"] == pytest.approx(prior / 1e9)
    assert summary["tokens"] == 200 * 8 * (400 + 512) and summary["sequences"] == summary["tokens"] / 128
    defaults = {name: p.default for name, p in inspect.signature(gate_prior).parameters.items()}
    assert (defaults["steps"], defaults["batch_size"], defaults["max_new_tokens"], defaults["top_k"]) == (
        200,
        8,
        512,
        32,
    )
    assert "1.5 million tokens: as long as training on 11400 sequences" in str(gating_table(summary).caption)


def test_nothing_but_the_config_is_downloaded(recipe, capsys, tmp_path, monkeypatch):
    save_layout(FAMILIES["qwen2_5_vl"][1](TINY()), tmp_path / "whole")
    with Hub() as hub:
        hub.use(monkeypatch, tmp_path / "cache")
        hub.add("user/base", tmp_path / "whole")
        assert run(capsys, "preflight", recipe, "--set", "base=user/base", "--json")[0] == 0
        assert hub.fetched("user/base") == ["config.json"] and not hub.peeked("user/base")


@pytest.mark.parametrize(
    "changes, message",
    [
        (["max_token=5"], "max_token does not decide what memory a recipe takes; did you mean max_tokens?"),
        (["max_tokens"], "--set max_tokens names no value: write key=value"),
        (["max_tokens=many"], "max_tokens takes a whole number of at least 1, got 'many'"),
        (["images_per_sample=0"], "images_per_sample takes a whole number of at least 1, got 0"),
        (["optim=adamm"], "what optim adamm keeps is not known here"),
        (["processor_kwargs=5"], "processor_kwargs takes settings of the processor, got 5"),
        (["base=no/where"], "no/where"),
        (["base=EMPTY"], "has no config.json"),
        (["base=TEXT"], "is no vision-language model"),
        (["base=QUANTIZED"], "is quantized: give the full-precision model"),
        (["base=null"], "is no recipe: it names no base"),
    ],
)
def test_mistakes_are_one_sentence(changes, message, recipe, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("EMPTY", "TEXT", "QUANTIZED"):
        (tmp_path / name).mkdir()
    tiny_llm("llava").config.save_pretrained(tmp_path / "TEXT")
    config = TINY()
    config.quantization_config = {"quant_method": "awq"}
    config.save_pretrained(tmp_path / "QUANTIZED")
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, "preflight", recipe, "--set", *changes)
    assert status == 1 and out == "" and err.count("\n") == 1 and message in err


def test_a_recipe_is_read_as_it_is_meant(tmp_path):
    """As by recipes/sft_vlm.py: tests/recipes/test_interrupted.py."""
    lines = ["base: b", "max_tokens: 2e3", "r: '16'", "think_tokens: 'no'", "bf16: 'off'", "gradient_checkpointing: 0"]
    lines += ["processor_kwargs: {max_pixels: 1e6}", "lora_dropout: '5e-2'", "drift_modules: attn"]
    (tmp_path / "a.yaml").write_text("\n".join(lines))
    wanted = dict(max_tokens=2000, r=16, think_tokens=False, bf16=False, gradient_checkpointing=False)
    wanted |= dict(processor_kwargs={"max_pixels": 10**6}, lora_dropout=0.05, drift_modules="attn")
    assert read_settings(tmp_path / "a.yaml") == Settings("b", **wanted)
    for line, sentence in (("think_tokens: 'perhaps'", "think_tokens takes yes or no, got 'perhaps'"),
                           ("optim: null", "optim has no value: give it one, or leave the key out"),
                           ("lora_dropout: [1]", r"lora_dropout takes a number, got \[1\]")):  # fmt: skip
        (tmp_path / "a.yaml").write_text("\n".join([*lines, line]))
        with pytest.raises(ValueError, match=f"^{sentence}$"):
            read_settings(tmp_path / "a.yaml")


def test_a_file_that_is_no_recipe(capsys, tmp_path):
    for content, message in (("a: [", "is no YAML"), ("just words", "is no recipe")):
        (tmp_path / "recipe.yaml").write_text(content)
        status, _, err = run(capsys, "preflight", tmp_path / "recipe.yaml")
        assert status == 1 and message in err
    assert "No such file" in run(capsys, "preflight", tmp_path / "none.yaml")[2]
    with pytest.raises(
        FileNotFoundError, match=r"recipe none\.yaml cannot be read: .*; name a YAML file such as recipes/"
    ):
        read_settings("none.yaml")


def test_the_benchmark_in_its_smallest_size(capsys):
    benchmark.main(["--smallest", "--tokens", "64", "--image", "56"])
    printed = capsys.readouterr().out
    (row,) = json.loads(printed.splitlines()[-1])["rows"]
    assert row["tokens"] == 64 and 0 < row["estimated_gb"] < row["total_gb"]
    assert "measured_gb" not in row and "not measured: no CUDA device" in printed
