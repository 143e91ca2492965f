"""Tiny random models under the ids that PEFT's tests ask the hub for, in a cache of their own: no network is needed.

What a test reads of the published model beyond its class, such as its tokens or its adapters, is not there.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers as tf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

COMMIT = "0" * 40
SIZES = {
    "vocab_size": 1000, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 32, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OPT = {**SIZES, "ffn_dim": 32, "word_embed_proj_dim": 16}
GPT2 = {"vocab_size": 1000, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 128}
GROUPED = {**SIZES, "num_key_value_heads": 2}

MODELS = {  # id -> class, its configuration
    "peft-internal-testing/tiny-random-OPTForCausalLM": (tf.OPTForCausalLM, tf.OPTConfig, OPT),
    "peft-internal-testing/opt-125m": (tf.OPTForCausalLM, tf.OPTConfig, OPT),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": (tf.GPT2LMHeadModel, tf.GPT2Config, GPT2),
    "peft-internal-testing/tiny-random-gpt2": (tf.GPT2LMHeadModel, tf.GPT2Config, GPT2),
    "hf-internal-testing/tiny-random-gpt2": (tf.GPT2LMHeadModel, tf.GPT2Config, GPT2),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": (tf.GPTJForCausalLM, tf.GPTJConfig, {**GPT2, "rotary_dim": 4}),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": (tf.LlamaForCausalLM, tf.LlamaConfig, SIZES),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": (tf.LlamaForCausalLM, tf.LlamaConfig, SIZES),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": (tf.LlamaForCausalLM, tf.LlamaConfig, SIZES),
    "hf-internal-testing/tiny-random-MistralForCausalLM": (tf.MistralForCausalLM, tf.MistralConfig, GROUPED),
    "peft-internal-testing/tiny-dummy-qwen2": (tf.Qwen2ForCausalLM, tf.Qwen2Config, GROUPED),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        tf.Gemma3ForCausalLM,
        tf.Gemma3TextConfig,
        {**GROUPED, "head_dim": 4, "sliding_window": 16},
    ),
    "trl-internal-testing/tiny-Llama4ForCausalLM": (
        tf.Llama4ForCausalLM,
        tf.Llama4TextConfig,
        {**GROUPED, "head_dim": 4, "num_local_experts": 4, "interleave_moe_layer_step": 1, "intermediate_size_mlp": 32},
    ),
    "trl-internal-testing/tiny-GptOssForCausalLM": (
        tf.GptOssForCausalLM,
        tf.GptOssConfig,
        {**GROUPED, "head_dim": 4, "num_local_experts": 4, "sliding_window": 16},
    ),
}


def fill(cache: Path) -> None:
    """Put the models into a folder that is then HF_HUB_CACHE, each with a tokenizer of whole words."""
    for name, (model, config, settings) in MODELS.items():
        repository = cache / f"models--{name.replace('/', '--')}"
        folder = repository / "snapshots" / COMMIT
        if folder.exists():
            continue
        torch.manual_seed(0)
        model(config(**settings)).save_pretrained(folder)
        _tokenizer().save_pretrained(folder)
        (folder / "complete.json").write_text(json.dumps(name))
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(COMMIT)


def _tokenizer() -> tf.PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
