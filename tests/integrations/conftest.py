"""What the tests of all tools train: a tiny Llama with a prior, tokenizer and chat template, and a few questions."""

import json

import pytest
from tiny_vlm import tokenizer

CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }} </s> {% endfor %}"


@pytest.fixture(scope="session")
def folder(pairs):
    """With `base`, `prior.safetensors` and `data.json`."""
    folder = pairs("llama")
    words = tokenizer(64)
    words.chat_template = CHAT
    words.save_pretrained(folder / "base")
    turns = [{"role": "user", "content": "how many ?"}, {"role": "assistant", "content": "4 + 3 = 7"}]
    (folder / "data.json").write_text(json.dumps([{"messages": turns}] * 8))
    return folder
