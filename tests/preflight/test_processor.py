"""drift-peft preflight reads the size of images where the base's own processor has it."""

import json

import numpy as np
import pytest
import transformers as tf
import yaml
from command import run
from models import qwen2_5_vl_7b
from older import loads_processors
from PIL import Image
from tiny_memory import TINY, settings
from tiny_vlm import PROCESSORS, tokenizer
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from drift_peft.demo.compare import CHECKPOINTS
from drift_peft.preflight import processor
from drift_peft.preflight.images import pixel_bytes
from drift_peft.preflight.memory import patches
from drift_peft.preflight.processor import with_processor

IDEFICS = tf.Idefics2Config(vision_config={"image_size": 980, "patch_size": 14})
SMOL = tf.SmolVLMConfig(vision_config={"image_size": 384, "patch_size": 14})
EDGES = {"shortest_edge": 56**2, "longest_edge": 280**2}
SMALLER = {"shortest_edge": 56**2, "longest_edge": 140**2}
TILES = {"max_image_size": {"longest_edge": 384}}


def saved(folder, content, name="preprocessor_config.json"):
    (folder / name).write_text(json.dumps(content))
    return settings(base=str(folder), max_tokens=4096, processor_kwargs=None)


def counted(folder, config, content, recipe=None, **nested):
    known = saved(folder, content, **nested)
    return patches(config, with_processor(settings(**vars(known) | {"processor_kwargs": recipe}), config.model_type))


@loads_processors
@pytest.mark.parametrize(
    "config, processor, content, recipe",
    [
        (qwen2_5_vl_7b(), Qwen2VLImageProcessorPil, {"size": EDGES}, None),
        (qwen2_5_vl_7b(), Qwen2VLImageProcessorPil, {"size": EDGES}, {"max_pixels": 140**2}),
        (qwen2_5_vl_7b(), Qwen2VLImageProcessorPil, {"size": EDGES}, {"size": SMALLER}),
        (qwen2_5_vl_7b(), Qwen2VLImageProcessorPil, {"max_pixels": 140**2, "min_pixels": 56**2}, None),
        (qwen2_5_vl_7b(), Qwen2VLImageProcessorPil, {"max_pixels": 280**2}, {"size": SMALLER}),  # max_pixels wins
        (qwen2_5_vl_7b(), Qwen2VLImageProcessorPil, {"max_pixels": 280**2}, {"max_pixels": None, "size": SMALLER}),
        (SMOL, SmolVLMImageProcessorPil, {"size": {"longest_edge": 768}, **TILES}, None),
        (SMOL, SmolVLMImageProcessorPil, {"size": {"longest_edge": 768}, **TILES}, {"size": {"longest_edge": 1152}}),
        (SMOL, SmolVLMImageProcessorPil, {"do_image_splitting": False, **TILES}, None),
        (SMOL, SmolVLMImageProcessorPil, {"do_image_splitting": False, **TILES}, {"do_image_splitting": True}),
        (IDEFICS, Idefics2ImageProcessorPil, {"do_image_splitting": False}, None),
        (IDEFICS, Idefics2ImageProcessorPil, {"size": {"longest_edge": 490, "shortest_edge": 378},
                                              "do_image_splitting": True}, None),
        (tf.Mistral3Config(), PixtralImageProcessorPil, {"patch_size": 14, "size": {"longest_edge": 448}}, None),
    ],
)  # fmt: skip
def test_pixels_are_those_that_the_processor_of_the_file_makes(config, processor, content, recipe, tmp_path):
    content = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "image_processor_type": processor.__name__, **content}
    number = counted(tmp_path, config, content, recipe)
    image = Image.fromarray(np.zeros((1400, 1400, 3), dtype=np.uint8))
    made = processor.from_pretrained(tmp_path, **(recipe or {}))([[image]], return_tensors="pt")
    pixels = [made[name] for name in ("pixel_values", "pixel_attention_mask") if name in made]
    assert number * pixel_bytes(config) == pytest.approx(sum(p.nbytes for p in pixels), rel=1e-6)
    assert counted(tmp_path, config, {"image_processor": content}, recipe, name="processor_config.json") == number


@loads_processors
@pytest.mark.parametrize(
    "family, config, content",
    [
        ("internvl", tf.AyaVisionConfig(vision_config={"image_size": 16, "patch_size": 8}), {"crop_to_patches": False}),
        ("gemma3", tf.Gemma3Config(vision_config={"image_size": 16, "patch_size": 8}),
         {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 4, "pan_and_scan_max_num_crops": 4,
          "pan_and_scan_min_ratio_to_activate": 1.2}),
    ],
)  # fmt: skip
def test_what_a_processor_decides_itself_is_not_taken_from_the_file(family, config, content, tmp_path):
    """AyaVision's cuts, and Gemma's does not, whatever the file says of their image processors."""
    make, image = PROCESSORS[family]
    make(tokenizer(), chat_template=image).save_pretrained(tmp_path)
    name = "processor_config.json" if (tmp_path / "processor_config.json").exists() else "preprocessor_config.json"
    known = json.loads((tmp_path / name).read_text())
    known.get("image_processor", known).update(content)
    (tmp_path / name).write_text(json.dumps(known))
    wide = Image.fromarray(np.zeros((64, 192, 3), dtype=np.uint8))
    pieces = len(tf.AutoProcessor.from_pretrained(tmp_path)(text=[image], images=[[wide]])["pixel_values"])
    asked = settings(base=str(tmp_path), processor_kwargs=None)
    assert patches(config, with_processor(asked, config.model_type)) == 4 * pieces


def test_without_a_file_or_with_nothing_in_it_all_is_as_it_was(tmp_path):
    asked = settings(base=str(tmp_path), processor_kwargs=None)
    assert with_processor(asked, "qwen2_5_vl") is asked
    for content in ({"image_processor": {"image_mean": [0.5]}}, {}, {"processor_class": "Qwen2_5_VLProcessor"}):
        assert with_processor(saved(tmp_path, content, "processor_config.json"), "qwen2_5_vl").processor_kwargs is None
    # An older file of image settings beside one of the whole processor, and one edge, which is no number of pixels.
    assert counted(tmp_path, TINY(), {"max_pixels": 64}) == 4
    assert counted(tmp_path, qwen2_5_vl_7b(), {"size": {"longest_edge": 1}}) == 4096 * 4


def test_a_file_that_holds_something_else_is_an_error_with_its_name(tmp_path):
    for content, told in (
        ("{torn", "preprocessor_config.json is no valid JSON"),
        ("[1]", "preprocessor_config.json holds no settings of images: give the file that"),
        ('{"max_pixels": "many"}', "preprocessor_config.json has a setting of images that cannot be used: max_pixels"),
    ):
        (tmp_path / "preprocessor_config.json").write_text(content)
        with pytest.raises(ValueError, match=told):
            with_processor(settings(base=str(tmp_path), processor_kwargs=None), "qwen2_5_vl")


@pytest.mark.parametrize("flags", [(), ("--gates",)])
def test_the_demos_images_are_as_small_as_its_processor_says(flags, capsys, tmp_path):
    """Which leaves images as they are: that is told."""
    recipe = {"base": str(CHECKPOINTS / "vlm"), "data": "d.jsonl", "prior": "p.safetensors", "max_tokens": 256}
    recipe |= {"keep": "k.safetensors", "keep_images": "pictures", "keep_batch_size": 8}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.warns(UserWarning, match=r"^The processor of .* leaves images as large as they are \(do_resize: false"):
        status, out, _ = run(capsys, "preflight", tmp_path / "recipe.yaml", "--json", *flags)
    summary = json.loads(out)
    assert status == 0
    if not flags:
        assert summary["patches"] == summary["keeping"]["patches"] == 1584 // 6**2
        assert summary["keeping"]["tokens"] == 44 // 4 + 32 + 64


def test_a_processor_that_cannot_be_fetched_now_is_said(tmp_path, monkeypatch):
    def fetch(*_):
        raise FileNotFoundError("no network")

    given = saved(tmp_path, {"size": EDGES})
    monkeypatch.setattr(processor, "folder_of", fetch)
    with pytest.warns(UserWarning, match=r"^The processor of \S+ cannot be fetched: what the recipe leaves out"):
        assert with_processor(given, "qwen2_5_vl") == given


def test_whole_numbers_may_be_written_with_a_point(tmp_path):
    written = {"max_pixels": 78400.0, "size": {"shortest_edge": 3136.0, "longest_edge": 78400.0}}
    kwargs = with_processor(saved(tmp_path, written), "qwen2_5_vl").processor_kwargs
    assert kwargs == written and all(isinstance(n, int) for n in (kwargs["max_pixels"], *kwargs["size"].values()))
