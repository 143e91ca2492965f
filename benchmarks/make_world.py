"""Train the demo's three checkpoints, some minutes on one core: `python benchmarks/make_world.py`

They stand for a user's three 7B models and share one ancestor, the embeddings and the head::

    base        Qwen2ForCausalLM                      knows the format, perception tasks on text, sums of one operation
    reasoner    base, trained on                      text only: chains of 1 to 5 operations, with a chain of thought
    vlm         base, trained on, with a vision tower  images, but perception alone; never saw a chain of operations

The folders are ordinary Hugging Face checkpoints (bf16 safetensors, tokenizer, processor, chat template).
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import trange
from transformers import (
    AutoModelForCausalLM,
    PaddleOCRVLProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    get_cosine_schedule_with_warmup,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from drift_peft.demo.compare import CHECKPOINTS
from drift_peft.demo.evaluate import encode
from drift_peft.demo.world import CELL, LONGEST, PERCEPTION, Digits, make_samples

SEED = 0
ROPE_THETA = 1000.0
SPECIAL = {
    "pad_token": "<|pad|>",
    "eos_token": "<|eos|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
}
VOCABULARY = [*SPECIAL.values(), *"0123456789+-=;?}", "<think>", "</think>", "\\boxed{", *PERCEPTION, "solve"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}"
    "{% if message.role == 'assistant' %}{% generation %}{{ part.text }}{{ eos_token }}{% endgeneration %}"
    "{% elif part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endfor %}"
)
TEXT_TASKS = [*PERCEPTION, "at", "sum", "sum"]  # "at" is the hardest to learn


def make_tokenizer() -> Qwen2Tokenizer:
    """Qwen2's tokenizer with a small vocabulary: one token per symbol."""
    tokenizer = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(VOCABULARY)},
        merges=[],
        unk_token=None,
        eos_token=SPECIAL["eos_token"],
        pad_token=SPECIAL["pad_token"],
        extra_special_tokens={name: token for name, token in SPECIAL.items() if name not in ("eos_token", "pad_token")},
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.add_tokens([token for token in VOCABULARY if len(token) > 1 and token not in SPECIAL.values()])
    return tokenizer


def make_processor() -> PaddleOCRVLProcessor:
    """Qwen2-VL's image processor, for one channel and patches of 6x6, and the tokenizer.

    The processor class is the one in transformers that does what Qwen2.5-VL's does for images, and has no video
    processor (which needs torchvision).
    """
    image_processor = Qwen2VLImageProcessorPil(
        do_resize=False,
        do_convert_rgb=False,
        image_mean=[0.5],
        image_std=[0.5],
        patch_size=CELL // 2,
        merge_size=2,
        temporal_patch_size=1,
        size={"shortest_edge": CELL * CELL, "longest_edge": CELL * CELL * LONGEST},
    )
    return PaddleOCRVLProcessor(image_processor, make_tokenizer(), chat_template=CHAT_TEMPLATE)


def text_settings(**sizes: int) -> dict:
    """The language model, the same in all three checkpoints, in these sizes."""
    return dict(
        vocab_size=len(VOCABULARY),
        num_hidden_layers=4,
        num_attention_heads=4,
        **sizes,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=VOCABULARY.index(SPECIAL["eos_token"]),
        pad_token_id=VOCABULARY.index(SPECIAL["pad_token"]),
    )


SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 2}


def make_text_model() -> Qwen2ForCausalLM:
    rope = {"rope_type": "default", "rope_theta": ROPE_THETA}
    return Qwen2ForCausalLM(Qwen2Config(**text_settings(**SIZES), rope_parameters=rope))


def with_vision(base: Qwen2ForCausalLM) -> Qwen2_5_VLForConditionalGeneration:
    """The base language model with a new vision tower of two layers."""
    # A row of symbols varies along the image's width, and m-rope gives the width the lowest frequencies: with the usual
    # sections neighbours cannot be told apart, so nearly all of them go to the width.
    rope = {"rope_type": "default", "rope_theta": ROPE_THETA, "mrope_section": [1, 1, 14]}
    config = Qwen2_5_VLConfig(
        text_config=text_settings(**SIZES) | {"rope_parameters": rope},
        vision_config=dict(
            depth=2,
            hidden_size=64,
            intermediate_size=128,
            num_heads=4,
            in_channels=1,
            patch_size=CELL // 2,
            temporal_patch_size=1,
            spatial_merge_size=2,
            window_size=CELL,
            fullatt_block_indexes=[0, 1],
            out_hidden_size=128,
        ),
        vision_start_token_id=VOCABULARY.index(SPECIAL["vision_bos_token"]),
        vision_end_token_id=VOCABULARY.index(SPECIAL["vision_eos_token"]),
        image_token_id=VOCABULARY.index(SPECIAL["image_token"]),
        video_token_id=VOCABULARY.index(SPECIAL["video_token"]),
    )
    vlm = Qwen2_5_VLForConditionalGeneration(config)
    vlm.model.language_model.load_state_dict(base.model.state_dict())
    vlm.lm_head.load_state_dict(base.lm_head.state_dict())
    return vlm


def train(model, processor, draw, steps: int, rate: float, name: str, loss=None) -> None:
    """AdamW with a cosine schedule on batches of 32 fresh samples; `draw(n)` gives n samples."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    model.train()
    for _ in (bar := trange(steps, desc=name)):
        samples = draw(32)
        value = model(**encode(processor, samples)).loss if loss is None else loss(samples)
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix(loss=f"{value.item():.3f}", refresh=False)


def freeze(*modules) -> None:
    for module in modules:
        module.requires_grad_(False)


def save(model, processor, folder: Path) -> None:
    """An ordinary checkpoint folder in bf16."""
    model.generation_config.update(max_new_tokens=48, do_sample=False)
    copy.deepcopy(model).bfloat16().save_pretrained(folder)
    processor.save_pretrained(folder)


@dataclass(frozen=True)
class Family:
    """What kind of models a world is made of: the functions that make them, and the seed of all its training."""

    seed: int
    text_model: Callable  # () -> the ancestor, untrained
    processor: Callable  # () -> the VLM's processor
    with_vision: Callable  # ancestor -> VLM with a new vision tower in `model.visual` or `model.vision_tower`
    tower: Callable  # VLM -> its vision modules
    features: Callable  # (VLM, batch) -> what the language model gets for the images, one row per cell
    digits: Callable  # split -> where images come from
    shown: Callable  # symbols of an image -> the tokens that its cells show


QWEN = Family(
    SEED,
    make_text_model,
    make_processor,
    with_vision,
    tower=lambda vlm: [vlm.model.visual],
    features=lambda vlm, batch: torch.cat(
        vlm.model.get_image_features(batch["pixel_values"], batch["image_grid_thw"]).pooler_output
    ),
    digits=Digits,
    shown=list,
)


def make_base(folder: Path, family: Family = QWEN, steps: int = 1200) -> None:
    """The ancestor: perception tasks on text, and sums of one operation.

    It has to know every symbol, `=` and `;` too: embeddings and head are frozen afterwards.
    """
    torch.manual_seed(family.seed)
    rng, base, processor = np.random.default_rng(family.seed), family.text_model(), family.processor()
    train(base, processor, lambda n: make_samples(n, TEXT_TASKS, rng), steps, 2e-3, "base")
    save(base, processor.tokenizer, folder)


def make_reasoner(
    base: Path, folder: Path, family: Family = QWEN, steps: int = 400, rate: float = 5e-4, draw: Callable = make_samples
) -> None:
    """The base, trained on chains of 1 to 5 operations in text; `draw(n, tasks, rng)` gives them."""
    torch.manual_seed(family.seed)
    rng, processor = np.random.default_rng(family.seed + 1), family.processor()
    reasoner = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    freeze(reasoner.get_input_embeddings(), reasoner.lm_head)
    train(reasoner, processor, lambda n: draw(n, ["solve"], rng), steps, rate, folder.name)
    save(reasoner, processor.tokenizer, folder)


def make_vlm(base: Path, folder: Path, family: Family = QWEN, alignment_steps: int = 600, steps: int = 700) -> None:
    """The base with a vision tower: the tower alone first, then all but embeddings and head, on perception and text."""
    torch.manual_seed(family.seed)
    rng, digits, processor = np.random.default_rng(family.seed + 2), family.digits("train"), family.processor()
    vlm = family.with_vision(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    freeze(vlm)
    for module in family.tower(vlm):
        module.requires_grad_(True)
    embeddings = vlm.get_input_embeddings()

    def to_embeddings(samples):
        """Teach the vision tower to say a symbol as the language model's own embedding of it."""
        seen = family.features(vlm, encode(processor, samples, answered=False))
        shown = [token for sample in samples for token in family.shown(sample.symbols)]
        ids = torch.tensor(processor.tokenizer.convert_tokens_to_ids(shown))
        return F.mse_loss(seen, embeddings(ids)) / embeddings.weight.var()

    rows = partial(make_samples, tasks=["read"], rng=rng, digits=digits)
    train(vlm, processor, rows, alignment_steps, 3e-3, "vision", to_embeddings)

    def both(n):
        seen = make_samples(n * 3 // 4, [*PERCEPTION, "at"], rng, digits)
        return seen + make_samples(n - len(seen), TEXT_TASKS, rng)

    vlm.requires_grad_(True)
    freeze(embeddings, vlm.lm_head)
    train(vlm, processor, both, steps, 5e-4, "vlm")
    save(vlm, processor, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=["base", "reasoner", "vlm"], help="which of: base, reasoner, vlm")
    parser.add_argument("--out", type=Path, default=CHECKPOINTS, help="folder of the three checkpoints")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    base = arguments.out / "base"
    make = {
        "base": lambda: make_base(base),
        "reasoner": lambda: make_reasoner(base, arguments.out / "reasoner"),
        "vlm": lambda: make_vlm(base, arguments.out / "vlm"),
    }
    for model in arguments.models:
        make[model]()


if __name__ == "__main__":
    main()
