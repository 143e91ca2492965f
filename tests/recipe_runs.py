"""Runs of recipes/sft_vlm.py on tiny pairs: the settings, and the fixtures that make pairs, data and runs."""

from functools import cache
from pathlib import Path

import pytest
import sft_vlm
from PIL import Image
from tiny_vlm import save_pair, save_pictures, save_texts

RECIPES = Path(__file__).parent.parent / "recipes"
CONFIGS = RECIPES / "configs"

FAMILY = {  # configuration -> family of its base
    "qwen2_5_vl_7b_r1": "qwen2_5_vl",
    "qwen2_5_vl_7b_math": "qwen2_5_vl",
    "qwen2_vl_7b_math": "qwen2_vl",
    "llava_next_llama3_8b_dart": "llava_next",
    "idefics2_8b_metamath": "idefics2",
    "qwen3_vl_4b_thinking": "qwen3_vl",
    "qwen3_vl_8b_thinking": "qwen3_vl",
    "internvl3_8b_r1": "internvl",
    "gemma3_12b_gemmacoder": "gemma3",
    "smolvlm2_2b_smoltulu": "smolvlm",
    "qwen3_5_4b_opus": "qwen3_5",
    "qwen3_5_9b_opus": "qwen3_5",
    "gemma4_e4b_opus": "gemma4",
    "lfm2_5_vl_1_6b_thinking": "lfm2_vl",
    "qwen2_5_vl_7b_text": "qwen2_5_vl",
}
SMALL = {"prior_rank": 8, "r": 4, "lora_alpha": 8, "gradient_accumulation_steps": 2, "max_steps": 2, "logging_steps": 1}
KEEPING = {"keep_samples": 4, "keep_batch_size": 2}
SIZES = {"smolvlm2_2b_smoltulu": {"processor_kwargs": "{size: {longest_edge: 16}}"}}
FAST = {**SMALL, "learning_rate": 1e-3, "bf16": False, "per_device_train_batch_size": 2}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """family -> folder with base, expert and, after the first run, prior.safetensors."""
    return cache(lambda family, rows=40: save_pair(tmp_path_factory.mktemp(family), family, rows))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return save_pictures(tmp_path_factory.mktemp("pictures"))


def flags(**settings):
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return save_texts(tmp_path_factory.mktemp("texts"))


def blank(history, output):
    Image.new("1", (1, 1)).save(output)


@pytest.fixture
def train(pair, data, texts, tmp_path, monkeypatch):
    """Run the script on a tiny pair; what is given wins over what is set here. Returns the trainer and output_dir."""

    def run(family="qwen2_5_vl", config=None, draws=False, **settings):
        if not draws:  # which takes longer than training
            monkeypatch.setattr(sft_vlm, "plot_run", blank if config else lambda history, output: None)
        folder = pair(family)
        paths = {"base": folder / "base", "expert": folder / "expert", "prior": folder / "prior.safetensors"}
        paths["reference"] = folder / "base"  # so that Δ = expert − base; those of the YAMLs lie on the hub
        paths["data"] = data
        if config is not None:
            paths["keep"] = folder / "keep.safetensors"
            if "\nkeep_images:" in Path(config).read_text(encoding="utf-8"):  # on text alone
                paths |= {"keep": folder / "keep_text.safetensors", "keep_images": data, "data": texts}
        keeping = KEEPING if config or settings.get("keep") is not None else {}
        settings = {**paths, "output_dir": tmp_path / "run", "use_cpu": True, **keeping, **settings}
        start = ["--config", str(config)] if config else []
        given = {name: value for name, value in settings.items() if value is not None}
        return sft_vlm.main(start + flags(**given)), Path(settings["output_dir"])

    return run
