"""The worlds of the study: three VLMs and experts in the form of a user's checkpoints, each from an ancestor of its own
or trained differently, so that no conclusion rests on one model.

    qwen    the demo's: Qwen2.5-VL that reads a row of digits, and a Qwen2 that reasons
    far     the demo's VLM with an expert trained much longer and further from the ancestor, so that merging is broken
    llava   another ancestor family and seed: LLaVA with a CLIP tower, whose image is a square of 4x4 cells, and a Llama

The checkpoints that the demo does not hold are made by `python -m digits_study.worlds` in benchmarks/ and committed,
since another processor would round them differently, and with them every result.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import make_world
import numpy as np
import torch
from make_world import CHAT_TEMPLATE, QWEN, ROPE_THETA, SPECIAL, VOCABULARY, Family
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from drift_peft.demo.compare import CHECKPOINTS as DEMO
from drift_peft.demo.world import CELL, Digits, Sample, make_samples

FOLDER = Path(__file__).parent / "checkpoints"
SIDE = 4  # cells of LLaVA's square image in both directions
LLAVA_SIZES = {"hidden_size": 128, "intermediate_size": 320, "num_key_value_heads": 4}


@dataclass(frozen=True)
class World:
    """Folders of a world's checkpoints; `wrong` and `weak` are experts for controls, where there are any."""

    title: str
    base: Path
    vlm: Path
    expert: Path
    digits: Callable = Digits
    wrong: Path | None = None
    weak: Path | None = None


class FoldedDigits(Digits):
    """The same rows, folded into a square of SIDE x SIDE cells in reading order, as CLIP wants its images."""

    def draw(self, symbols: str, rng: np.random.Generator):
        row = np.asarray(super().draw(symbols, rng))
        cells = np.zeros((SIDE * SIDE, CELL, CELL), np.uint8)
        cells[: len(symbols)] = row.reshape(CELL, len(symbols), CELL).swapaxes(0, 1)
        square = cells.reshape(SIDE, SIDE, CELL, CELL).swapaxes(1, 2).reshape(SIDE * CELL, SIDE * CELL)
        return Image.fromarray(square)


WORLDS = {
    "qwen": World(
        "Qwen2.5-VL + Qwen2",
        *(DEMO / name for name in ("base", "vlm", "reasoner")),
        wrong=FOLDER / "qwen/wrong",
        weak=FOLDER / "qwen/weak",
    ),
    "far": World("Qwen2.5-VL + a far expert", DEMO / "base", DEMO / "vlm", FOLDER / "far/reasoner"),
    "llava": World("LLaVA + Llama", *(FOLDER / "llava" / name for name in ("base", "vlm", "reasoner")), FoldedDigits),
}


def llava_processor() -> LlavaProcessor:
    side = {"height": SIDE * CELL, "width": SIDE * CELL}
    image_processor = CLIPImageProcessorPil(
        size=side, crop_size=side, do_resize=False, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        image_processor,
        make_world.make_tokenizer(),
        patch_size=CELL,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token=SPECIAL["image_token"],
        num_additional_image_tokens=1,  # CLIP's class token, which LLaVA leaves out again
    )


def llama_settings() -> dict:
    rope = {"rope_type": "default", "rope_theta": ROPE_THETA}
    return make_world.text_settings(**LLAVA_SIZES) | {"rope_parameters": rope}


def llava_with_vision(base: LlamaForCausalLM) -> LlavaForConditionalGeneration:
    """The ancestor with a new CLIP tower of two layers and a projector."""
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=SIDE * CELL,
        patch_size=CELL,
    )
    vlm = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=LlamaConfig(**llama_settings()),
            image_token_id=VOCABULARY.index(SPECIAL["image_token"]),
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
        )
    )
    vlm.model.language_model.load_state_dict(base.model.state_dict())
    vlm.lm_head.load_state_dict(base.lm_head.state_dict())
    vlm.generation_config.update(
        eos_token_id=VOCABULARY.index(SPECIAL["eos_token"]), pad_token_id=VOCABULARY.index(SPECIAL["pad_token"])
    )
    return vlm


LLAVA = Family(
    seed=10,
    text_model=lambda: LlamaForCausalLM(LlamaConfig(**llama_settings())),
    processor=llava_processor,
    with_vision=llava_with_vision,
    tower=lambda vlm: [vlm.model.vision_tower, vlm.model.multi_modal_projector],
    features=lambda vlm, batch: torch.cat(list(vlm.model.get_image_features(batch["pixel_values"]).pooler_output)),
    digits=FoldedDigits,
    shown=lambda symbols: [*symbols, *[SPECIAL["pad_token"]] * (SIDE * SIDE - len(symbols))],
)


def mirrored(count: int, tasks, rng: np.random.Generator) -> list[Sample]:
    """Chains in which + means −, and − means +, modulo 10: an expert of these reasons about something else."""

    def answer(chain: str) -> str:
        steps, value = [], int(chain[0])
        for i in range(1, len(chain), 2):
            result = (value - int(chain[i : i + 2])) % 10
            steps.append(f"{value}{chain[i : i + 2]}={result}")
            value = result
        return f"<think>{';'.join(steps)}</think>\\boxed{{{value}}}"

    return [replace(sample, answer=answer(sample.symbols)) for sample in make_samples(count, tasks, rng)]


MAKE = {  # folder -> what trains it
    "llava/base": lambda folder: make_world.make_base(folder, LLAVA),
    "llava/reasoner": lambda folder: make_world.make_reasoner(WORLDS["llava"].base, folder, LLAVA, steps=800),
    "llava/vlm": lambda folder: make_world.make_vlm(WORLDS["llava"].base, folder, LLAVA),
    "far/reasoner": lambda folder: make_world.make_reasoner(DEMO / "base", folder, replace(QWEN, seed=10), 3000, 3e-3),
    "qwen/wrong": lambda folder: make_world.make_reasoner(DEMO / "base", folder, draw=mirrored),
    "qwen/weak": lambda folder: make_world.make_reasoner(DEMO / "base", folder, steps=100),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=list(MAKE), help=f"which of: {', '.join(MAKE)}")
    torch.set_num_threads(1)
    for name in parser.parse_args().models:
        MAKE[name](FOLDER / name)


if __name__ == "__main__":
    main()
