"""drift-peft preflight: what training takes, against hand-computed sizes, published ones and TRL's own settings."""

from dataclasses import fields, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tiny_memory
import transformers as tf
import trl.trainer.utils
from fits_24gb import computed_sizes
from models import qwen2_5_vl_7b
from older import loads_processors
from PIL import Image
from published import BASES
from tiny import FAMILIES
from tiny_memory import PART, TINY, settings, slow
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from trl import SFTConfig

from drift_peft import DriftConfig
from drift_peft.preflight import RunArguments
from drift_peft.preflight import dry_run as dry
from drift_peft.preflight.cards import CARDS, advise, fits, read_settings
from drift_peft.preflight.images import cut, pixel_bytes, warn_of_unread
from drift_peft.preflight.memory import CONTEXT, IMAGES, STATE, WORKSPACES, Memory, Settings, patches

memory = tiny_memory.memory  # fixture

ROOT = Path(__file__).parents[2]


def test_defaults_are_those_of_the_recipes():
    known = {f.name: f.default for cls in (SFTConfig, DriftConfig, RunArguments) for f in fields(cls)}
    known.setdefault("activation_checkpointing", None)  # which an older transformers has not got
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
    open_ended = memory.estimate(settings(method="sft", processor_kwargs={"max_pixels": None}))
    assert "processor_kwargs" not in advise(memory, open_ended, 1e-3)["all"]


def test_gates_see_one_image_at_a_time(memory, monkeypatch):
    monkeypatch.setattr(memory, "tower", lambda settings: 1e12 * settings.images_per_sample)
    assert memory.gating(settings(images_per_sample=4), 64).parts["vision tower's activations"] == 1e12
    assert memory.estimate(settings(images_per_sample=4)).parts["vision tower's activations"] == 4e12


TILES = {"size": {"longest_edge": 1536}, "max_image_size": {"longest_edge": 384}}
AYA = tf.AyaVisionConfig(vision_config={"model_type": "siglip_vision_model", "image_size": 364, "patch_size": 14})
IDEFICS = tf.Idefics2Config(vision_config={"image_size": 980, "patch_size": 14})
GEMMA = tf.Gemma3Config(vision_config={"image_size": 896, "patch_size": 14})
SMOL = tf.SmolVLMConfig(vision_config={"image_size": 384, "patch_size": 14})


@pytest.mark.parametrize(
    "config, kwargs, number",
    [
        (qwen2_5_vl_7b(), {"max_pixels": 512 * 512}, 512 * 512 // 14**2),
        (qwen2_5_vl_7b(), None, 512 * 4),  # as many as there are tokens
        (qwen2_5_vl_7b(), {"max_pixels": 64 * 64, "images": 3}, 3 * (64 * 64 // 14**2)),
        (qwen2_5_vl_7b(), {"max_pixels": 512 * 512, "images": 3}, 512 * 4),
        (tf.LlavaNextConfig(), {"images": 2}, 2 * 5 * 24 * 24),
        (tf.LlavaNextConfig(), None, 5 * 24 * 24),
        (GEMMA, None, 64 * 64),
        (SMOL, None, 17 * 27 * 27),
        (SMOL, {"size": {"longest_edge": 768}}, 5 * 27 * 27),
        (IDEFICS, {"do_image_splitting": False}, 70**2),
        (SMOL, {"do_image_splitting": False}, 27 * 27),
        (SMOL, {"size": {"longest_edge": 384}}, 27 * 27),  # no larger than a tile, so the whole is no second one
        (IDEFICS, {"size": {"longest_edge": 490}}, 5 * 35**2),
        (GEMMA, {"do_pan_and_scan": True}, 5 * 64 * 64),
        (GEMMA, {"do_pan_and_scan": True, "pan_and_scan_max_num_crops": 2, "images": 2}, 2 * 3 * 64 * 64),
        (tf.Mistral3Config(), {"size": {"longest_edge": 448}}, 32 * 32),
        (tf.InternVLConfig(), None, 13 * 32 * 32),
        (tf.InternVLConfig(), {"max_patches": 1}, 32 * 32),
        (tf.InternVLConfig(), {"crop_to_patches": False}, 32 * 32),
        (tf.AyaVisionConfig(), None, 13 * 27 * 27),
        (tf.AyaVisionConfig(), {"max_patches": None}, 13 * 27 * 27),
        (tf.AyaVisionConfig(), {"max_patches": 4}, 5 * 27 * 27),
        (tf.MllamaConfig(vision_config={"image_size": 560, "patch_size": 14}), None, 4 * 40 * 40),
        (tf.Gemma4Config(vision_config={}), {"images": 2}, 2 * 280 * 9),
        (tf.Gemma4Config(vision_config={}), {"max_soft_tokens": 70}, 70 * 9),
        (tf.Lfm2VlConfig(), None, 11 * 32 * 32),
        (tf.Lfm2VlConfig(), {"do_image_splitting": False}, 32 * 32),
        (tf.Lfm2VlConfig(), {"max_tiles": 4, "use_thumbnail": False}, 4 * 32 * 32),
        (tf.Lfm2VlConfig(), {"tile_size": 1024}, 11 * 64 * 64),
    ],
)
def test_patches_of_a_sample(config, kwargs, number):
    kwargs = dict(kwargs or {})
    images = kwargs.pop("images", 1)
    assert patches(config, settings(processor_kwargs=kwargs, images_per_sample=images)) == number


SQUARE = {"size": {"height": 364, "width": 364}}
PAN = {"pan_and_scan_min_crop_size": 16, "pan_and_scan_min_ratio_to_activate": 1.2, "pan_and_scan_max_num_crops": 4}


@loads_processors
@pytest.mark.parametrize(
    "config, processor, own, changes, width",
    [
        (GEMMA, Gemma3ImageProcessorPil, {"size": {"height": 896, "width": 896}, **PAN}, {"do_pan_and_scan": True}, 4),
        (GEMMA, Gemma3ImageProcessorPil, {"size": {"height": 896, "width": 896}, **PAN}, {"do_pan_and_scan": False}, 4),
        (SMOL, SmolVLMImageProcessorPil, TILES, {}, 1),
        (SMOL, SmolVLMImageProcessorPil, TILES, {"do_image_splitting": False}, 1),
        (SMOL, SmolVLMImageProcessorPil, TILES, {"size": {"longest_edge": 768}}, 1),
        (SMOL, SmolVLMImageProcessorPil, TILES, {"size": {"longest_edge": 384}}, 1),
        (IDEFICS, Idefics2ImageProcessorPil, {}, {"do_image_splitting": True}, 1),
        (IDEFICS, Idefics2ImageProcessorPil, {}, {"size": {"longest_edge": 490, "shortest_edge": 378}}, 1),
        (AYA, GotOcr2ImageProcessorPil, {**SQUARE, "crop_to_patches": True}, {}, 12),
        (AYA, GotOcr2ImageProcessorPil, {**SQUARE, "crop_to_patches": True}, {"max_patches": 4}, 4),
        (AYA, GotOcr2ImageProcessorPil, SQUARE, {"crop_to_patches": False}, 12),
        (tf.Mistral3Config(), PixtralImageProcessorPil, {"patch_size": 14}, {"size": {"longest_edge": 448}}, 1),
    ],
)
def test_pixels_are_those_that_the_processor_makes(config, processor, own, changes, width):
    """Of a large image of a shape that becomes as many pieces as any."""
    image = Image.fromarray(np.zeros((1000, 1000 * width, 3), dtype=np.uint8))
    kwargs = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, **own, "do_image_splitting": True, **changes}
    made = processor(**kwargs)([[image]], return_tensors="pt")
    counted = patches(config, settings(processor_kwargs={**changes}))
    pixels = [made[name] for name in ("pixel_values", "pixel_attention_mask") if name in made]
    assert counted * pixel_bytes(config) == pytest.approx(sum(p.nbytes for p in pixels), rel=1e-6)


def test_what_is_not_read_of_the_processor_is_told(recwarn):
    told = {"max_pixels": 256, "min_pixels": 64, "image_mean": [0.5], "size": {"longest_edge": 9, "shortest_edge": 1}}
    for config, kwargs in ((TINY(), told), (GEMMA, {"do_pan_and_scan": False}), (GEMMA, None)):
        warn_of_unread(config, kwargs)
    assert not recwarn
    with pytest.warns(
        UserWarning, match=r"^max_patches, size\.height in processor_kwargs is not counted for gemma3: if"
    ):
        warn_of_unread(GEMMA, {"max_patches": 4, "size": {"height": 1792}, "do_rescale": True})


def test_images_of_a_step_and_of_the_next_one_are_counted(memory):
    """How many are there was seen in a run: tests/recipes/test_sft_vlm.py."""
    few = settings(processor_kwargs={"max_pixels": 256}, images_per_sample=2, per_device_train_batch_size=3)
    one = 2 * 256 * 3 * 2 * 4  # two colours in time
    assert memory.estimate(few).parts[IMAGES] == 3 * one
    many = memory.estimate(replace(few, gradient_accumulation_steps=20000))
    assert many.moment == "reading of the next step's samples"
    assert many.parts[IMAGES] == many.parts["their images, 32 bits"] == 20000 * 3 * one


def recipes():
    for file in sorted((ROOT / "recipes" / "configs").glob("*.yaml")):
        # linear attention's loops, and kinds of layers
        many = file.stem.startswith(("qwen3_5", "gemma", "lfm2"))
        another = file.stem in ("qwen2_5_vl_7b_math", "qwen3_vl_8b_thinking")  # of the same family
        yield pytest.param(file.stem, marks=[slow] if many or another else [])


@cache
def published(base):
    """Its memory and its weights in billions; recipes share bases, and so what was counted of a step."""
    config, weights = BASES[base]
    return Memory(config(), base), weights


@pytest.mark.parametrize("name", [*recipes()])
def test_what_a_recipe_says_it_takes_is_the_estimate_at_the_published_size(name):
    recipe = replace(read_settings(ROOT / "recipes" / "configs" / f"{name}.yaml"), keep=None)
    memory, weights = published(recipe.base)
    assert not cut(memory.config, recipe.processor_kwargs, 1, 1).unread
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
