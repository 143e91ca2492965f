"""What the tests of gates share: a tiny VLM with its keep set, a text-only expert that can be asked, and their Δ."""

import keep_sets
from tiny import save_layout, tiny_expert
from tiny_vlm import CHAT, tokenizer
from transformers import AutoModelForImageTextToText

from drift_peft import build_prior

PROMPTS = ["1 + 2 = ?", "how many 3 3 ?", "4 4 4 = ?", "9 + 0 = ? how", "7"]
SETTINGS = {"max_new_tokens": 6, "top_k": 5, "batch_size": 2, "progress": False}


def save_folder(folder, family="qwen2_5_vl", rank=4):
    """`base`, `expert`, `keep.safetensors` and `prior.safetensors`."""
    keep_sets.save_folder(folder, family, pictures=3)
    keep_sets.make(folder, samples=6, top_k=64, max_new_tokens=4)
    expert, _ = tiny_expert(family, AutoModelForImageTextToText.from_pretrained(folder / "base"), scale=0.5)
    expert.generation_config.eos_token_id = keep_sets.ENDS
    save_layout(expert, folder / "expert")
    words = tokenizer(64)
    words.chat_template = CHAT
    words.save_pretrained(folder / "expert")
    build_prior(folder / "expert", folder / "base", folder / "prior.safetensors", rank=rank, progress=False)
    return folder
