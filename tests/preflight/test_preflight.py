"""drift-peft preflight: what training takes, against hand-computed sizes, published ones and TRL's own settings."""

from dataclasses import fields, replace
from pathlib import Path

import pytest
import tiny_memory
import transformers as tf
import trl.trainer.utils
from fits_24gb import computed_sizes
from models import qwen2_5_vl_7b
from parts.arguments import RunArguments
from published import BASES
from tiny import FAMILIES
from tiny_memory import PART, TINY, settings, slow
from trl import SFTConfig

from drift_peft import DriftConfig
from drift_peft.preflight import dry_run as dry
from drift_peft.preflight.cards import CARDS, advise, fits, read_settings
from drift_peft.preflight.memory import CONTEXT, STATE, WORKSPACES, Memory, Settings, patches

memory = tiny_memory.memory  # fixture

ROOT = Path(__file__).parents[2]


def test_defaults_are_those_of_the_recipes():
    known = {f.name: f.default for cls in (SFTConfig, DriftConfig, RunArguments) for f in fields(cls)}
    for setting in fields(Settings)[1:]:
        assert setting.default == known[setting.name], setting.name
    kernels = pytest.importorskip("trl.kernels.chunked_logprob", reason="TRL before it has no kernels of its own")
    assert dry.TILE == (kernels.TOKEN_CHUNK_SIZE, trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE)
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


def test_without_guidance_nothing_is_counted_for_it(memory):
    sft, steered = (memory.estimate(settings(method=method, drift_norm="weight")) for method in ("sft", "drift"))
    steering = {part for part in steered.parts if "steering" in part or "drift_norm" in part}
    assert len(steering) == 2 and steered.parts.keys() - sft.parts.keys() == steering
    assert sft.bytes < steered.bytes and memory._guidance(settings(method="sft")) == 0
    assert "drift_norm" not in advise(memory, sft, 1e-3)["all"] and "drift_norm" in advise(memory, steered, 1e-3)["all"]
    with pytest.raises(ValueError, match="method is drift or sft, got 'full'"):
        settings(method="full")


def test_gates_see_one_image_at_a_time(memory, monkeypatch):
    monkeypatch.setattr(memory, "tower", lambda settings: 1e12 * settings.images_per_sample)
    assert memory.gating(settings(images_per_sample=4), 64).parts["vision tower's activations"] == 1e12
    assert memory.estimate(settings(images_per_sample=4)).parts["vision tower's activations"] == 4e12


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
    with pytest.raises(
        ValueError, match=r"^transformers cannot build the model of tiny from .*: embed_dim must[^\n]*$"
    ):
        Memory(wrong, "tiny")
    with pytest.raises(ValueError, match=r"^what GitLayer takes cannot be counted .*: train a few steps"):
        Memory(tf.GitConfig(), "git").estimate(settings())
    config = TINY()
    rope = config.text_config.rope_parameters
    config.text_config.rope_parameters = {**rope, "mrope_section": [4, 2, 1]}  # of 8: no step can be run
    with pytest.raises(ValueError, match=r"^what Qwen2_5_VLDecoderLayer takes cannot be counted .*: train a few steps"):
        Memory(config, "tiny").estimate(settings())
