"""What the tests of keep sets share: a tiny VLM whose answers end by themselves, pictures of several sizes, a maker."""

import weakref

import numpy as np
import torch
from PIL import Image
from tiny import save_layout, tiny_vlm
from tiny_vlm import ASKED, CHAT, tokenizer

from drift_peft import make_keep_set

ENDS = [2, *range(10, 64, 3)]  # tokens that end an answer, so many that some answers end early
# Family -> tokens that stand for an image.
PLACES = {"qwen2_5_vl": [3, 4, 5, 6], "llava_next": [3], "gemma3": [3, 5, 6], "idefics2": [3], "mllama": [3]}
SETTINGS = {"samples": 20, "max_new_tokens": 8, "top_k": 5, "batch_size": 4, "progress": False}


def save_folder(folder, family, pictures=7):
    base = tiny_vlm(family)
    base.get_output_embeddings().weight.data *= 10  # surer of its answers than random weights are
    save_layout(base, folder / "base")
    # As instruct models have it; an answer is greedy all the same.
    own = {"eos_token_id": ENDS, "do_sample": True, "temperature": 0.7, "repetition_penalty": 1.5}
    base.generation_config.update(**own)
    base.generation_config.save_pretrained(folder / "base")
    processor, image = ASKED[family]
    processor(tokenizer(64), chat_template=CHAT.replace("IMAGE", image)).save_pretrained(folder / "base")
    save_pictures(folder / "pictures", pictures)
    return folder


def save_pictures(folder, count):
    folder.mkdir()
    generator = np.random.default_rng(0)
    for i in range(count):
        size = (16, 24 if i % 2 else 16, 3)
        Image.fromarray(generator.integers(256, size=size, dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def make(folder, output="keep.safetensors", **changes):
    arguments = {"model_or_id": folder / "base", "images": folder / "pictures", **SETTINGS, **changes}
    return make_keep_set(output=folder / output, **arguments)


def count_decoded(monkeypatch, module):
    """Each time that a module decodes an image, how many of those that it has decoded are still there."""
    decoded, alive, decode = [], [], module.decode_image

    def counted(*given):
        image = decode(*given)
        decoded.append(weakref.ref(image))
        alive.append(sum(reference() is not None for reference in decoded))
        return image

    monkeypatch.setattr(module, "decode_image", counted)
    return alive


def single_inputs(processor, sample):
    """One question about its image, with no padding, as the processor's own chat template has it."""
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": sample.question}]}
    text = processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
    return dict(processor(text=[text], images=[sample.image], return_tensors="pt"))


@torch.no_grad()
def dense_logprobs(model, processor, sample):
    """[T, vocabulary] what the model says in the place of each answer token, in fp64: one sample, all its logits."""
    inputs = single_inputs(processor, sample)
    asked = inputs["input_ids"].shape[1]
    for name, value in inputs.items():
        if value.shape == (1, asked):
            added = {"input_ids": sample.tokens, "attention_mask": torch.ones_like(sample.tokens)}
            inputs[name] = torch.cat([value, added.get(name, torch.zeros_like(sample.tokens))[None]], 1)
        elif name == "cross_attention_mask":  # [1, tokens, images, tiles]: mllama's answers see what questions see
            inputs[name] = torch.cat([value, value[:, -1:].expand(-1, len(sample.tokens), -1, -1)], 1)
        elif value.is_floating_point():
            inputs[name] = value.double()
    return torch.log_softmax(model(**inputs).logits[0, asked - 1 : -1], -1)
