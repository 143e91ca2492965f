"""Tiny random models of the real transformers classes, one vision-language model and its text LLM per family.

Used as:

    vlm = tiny_vlm("qwen2_5_vl")
    expert, delta = tiny_expert("qwen2_5_vl", vlm)      # expert = the VLM's language model + delta
    save_layout(vlm, tmp_path / "vlm", "hub")
"""

import json
import re

import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

TEXT = {  # widths are multiples of 64: bitsandbytes' 4-bit layers on a CPU are wrong for other in_features
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4,
    "image_size": 16, "patch_size": 4,
}  # fmt: skip
IMAGE = {"image_token_id": 3, "tie_word_embeddings": False}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
QWEN_VISION = {"depth": 1, "num_heads": 4, "patch_size": 4, "in_channels": 3}
QWEN_TOKENS = {"image_token_id": 3, "video_token_id": 4, "vision_start_token_id": 5, "vision_end_token_id": 6}
SELF_LAYERS = {"mllama": [0, 2]}  # of its 4 layers; 1 and 3 are cross-attention


def text(config, **changes):
    return {"model_type": config.model_type, **TEXT, **changes}


def qwen2_vl():
    vision = {**QWEN_VISION, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    return tf.Qwen2VLConfig(text_config={**TEXT, "rope_parameters": MROPE}, vision_config=vision, **QWEN_TOKENS)


def qwen2_5_vl():
    vision = {**QWEN_VISION, "hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 40,
              "window_size": 16, "fullatt_block_indexes": [0]}  # fmt: skip
    return tf.Qwen2_5_VLConfig(text_config={**TEXT, "rope_parameters": MROPE}, vision_config=vision, **QWEN_TOKENS)


def qwen3_vl():
    vision = {**QWEN_VISION, "hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 40,
              "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}  # fmt: skip
    return tf.Qwen3VLConfig(text_config={**TEXT, "rope_parameters": MROPE}, vision_config=vision, **QWEN_TOKENS)


def llava():
    return tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**VISION), text_config=text(tf.LlamaConfig), image_seq_length=16, **IMAGE
    )


def llava_next():
    grid = {"image_grid_pinpoints": [[16, 16]], "image_seq_length": 16}
    return tf.LlavaNextConfig(
        vision_config=tf.CLIPVisionConfig(**VISION), text_config=text(tf.LlamaConfig), **grid, **IMAGE
    )


def llava_onevision():
    grid = {"image_grid_pinpoints": [[16, 16]], "video_token_id": 4}
    return tf.LlavaOnevisionConfig(
        vision_config=tf.SiglipVisionConfig(**VISION), text_config=text(tf.Qwen2Config), **grid, **IMAGE
    )


def pixtral():
    return tf.LlavaConfig(
        vision_config=tf.PixtralVisionConfig(**VISION),
        text_config=text(tf.MistralConfig),
        vision_feature_layer=-1,
        **IMAGE,
    )


def internvl():
    vision = {**VISION, "image_size": [16, 16], "patch_size": [4, 4]}
    return tf.InternVLConfig(vision_config=vision, text_config=text(tf.Qwen2Config), image_seq_length=4, **IMAGE)


def gemma3():
    return tf.Gemma3Config(
        text_config={**TEXT, "sliding_window": 16}, vision_config=tf.SiglipVisionConfig(**VISION).to_dict(),
        mm_tokens_per_image=4, boi_token_index=5, eoi_token_index=6, image_token_index=3,
    )  # fmt: skip


def mistral3():
    return tf.Mistral3Config(
        vision_config=tf.PixtralVisionConfig(**VISION), text_config=text(tf.MistralConfig), **IMAGE
    )


def idefics2():
    perceiver = {"hidden_size": 64, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 4,
                 "resampler_head_dim": 16, "num_key_value_heads": 2}  # fmt: skip
    return tf.Idefics2Config(
        vision_config=VISION, perceiver_config=perceiver, text_config=text(tf.MistralConfig), **IMAGE
    )


def idefics3():
    return tf.Idefics3Config(vision_config=VISION, text_config=text(tf.LlamaConfig), scale_factor=2, **IMAGE)


def smolvlm():
    return tf.SmolVLMConfig(vision_config=VISION, text_config=text(tf.LlamaConfig), scale_factor=2, **IMAGE)


def mllama():
    vision = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_global_layers": 1,
              "attention_heads": 4, "vision_output_dim": 64, "intermediate_layers_indices": [0], "image_size": 16,
              "patch_size": 4, "max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]]}  # fmt: skip
    language = {**TEXT, "num_hidden_layers": 4, "cross_attention_layers": [1, 3]}
    return tf.MllamaConfig(vision_config=vision, text_config=language, image_token_index=3)


QWEN_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LINEAR = {"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 2, "linear_num_key_heads": 2,
          "linear_key_head_dim": 16, "linear_value_head_dim": 16}  # fmt: skip
SHARED = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "sliding_window": 16, "global_head_dim": 32,
          "layer_types": ["sliding_attention", "full_attention"] * 2,
          "hidden_size_per_layer_input": 64, "vocab_size_per_layer_input": 64}  # fmt: skip
TEXT_CHANGES = {  # family of MIXED -> what its text configs have beyond TEXT
    "qwen3_vl_moe": {**QWEN_EXPERTS, "decoder_sparse_step": 1, "mlp_only_layers": [0]},
    "glm4v_moe": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                  "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "attention_bias": True},
    "qwen3_5": LINEAR,
    "qwen3_5_moe": {**LINEAR, **QWEN_EXPERTS, "shared_expert_intermediate_size": 32},
    "gemma4": SHARED,
    "lfm2_vl": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
}  # fmt: skip


def qwen3_vl_moe():
    language = {**TEXT, **TEXT_CHANGES["qwen3_vl_moe"], "rope_parameters": MROPE}
    return tf.Qwen3VLMoeConfig(
        text_config=language, vision_config=qwen3_vl().vision_config.to_dict() | {"model_type": "qwen3_vl_moe"},
        **QWEN_TOKENS,
    )  # fmt: skip


def glm4v_moe():
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 4, "out_hidden_size": 64, "intermediate_size": 40,
              "patch_size": 4, "image_size": 16}  # fmt: skip
    language = {**TEXT, **TEXT_CHANGES["glm4v_moe"], "rope_parameters": MROPE}
    return tf.Glm4vMoeConfig(text_config=language, vision_config=vision)


def qwen3_5(config=tf.Qwen3_5Config, family="qwen3_5"):
    vision = {**QWEN_VISION, "hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 40,
              "num_position_embeddings": 16}  # fmt: skip
    language = {**TEXT, **TEXT_CHANGES[family], "rope_parameters": MROPE}
    return config(text_config=language, vision_config=vision, **QWEN_TOKENS)


def qwen3_5_moe():
    return qwen3_5(tf.Qwen3_5MoeConfig, "qwen3_5_moe")


def gemma4(**changes):
    vision = {**VISION, "num_key_value_heads": 4, "head_dim": 8, "pooling_kernel_size": 2,
              "position_embedding_size": 64}  # fmt: skip
    tokens = {"image_token_id": 3, "video_token_id": 4, "boi_token_id": 5, "eoi_token_id": 6, "audio_token_id": 8}
    return tf.Gemma4Config(text_config={**TEXT, **SHARED, **changes}, vision_config=vision, **tokens)


def lfm2_vl():
    vision = {**VISION, "model_type": "siglip2_vision_model", "num_patches": 16, "vision_use_head": False}
    language = text(tf.Lfm2Config, **TEXT_CHANGES["lfm2_vl"])
    return tf.Lfm2VlConfig(vision_config=vision, text_config=language, image_token_id=3, projector_hidden_size=64)


def mistral_llava():
    return tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**VISION), text_config=text(tf.MistralConfig), image_seq_length=16, **IMAGE
    )


FAMILIES = {  # name -> (config of the VLM, its class, class of the text LLM)
    "qwen2_vl": (qwen2_vl, tf.Qwen2VLForConditionalGeneration, tf.Qwen2ForCausalLM),
    "qwen2_5_vl": (qwen2_5_vl, tf.Qwen2_5_VLForConditionalGeneration, tf.Qwen2ForCausalLM),
    "qwen3_vl": (qwen3_vl, tf.Qwen3VLForConditionalGeneration, tf.Qwen3ForCausalLM),
    "llava": (llava, tf.LlavaForConditionalGeneration, tf.LlamaForCausalLM),
    "llava_next": (llava_next, tf.LlavaNextForConditionalGeneration, tf.LlamaForCausalLM),
    "llava_onevision": (llava_onevision, tf.LlavaOnevisionForConditionalGeneration, tf.Qwen2ForCausalLM),
    "pixtral": (pixtral, tf.LlavaForConditionalGeneration, tf.MistralForCausalLM),
    "internvl": (internvl, tf.InternVLForConditionalGeneration, tf.Qwen2ForCausalLM),
    "gemma3": (gemma3, tf.Gemma3ForConditionalGeneration, tf.Gemma3ForCausalLM),
    "mistral3": (mistral3, tf.Mistral3ForConditionalGeneration, tf.MistralForCausalLM),
    "idefics2": (idefics2, tf.Idefics2ForConditionalGeneration, tf.MistralForCausalLM),
    "idefics3": (idefics3, tf.Idefics3ForConditionalGeneration, tf.LlamaForCausalLM),
    "smolvlm": (smolvlm, tf.SmolVLMForConditionalGeneration, tf.LlamaForCausalLM),
    "mllama": (mllama, tf.MllamaForConditionalGeneration, tf.LlamaForCausalLM),
}
MIXED = {  # as FAMILIES: layers of several kinds or with experts, and a plain model to pair with Mixtral
    "qwen3_vl_moe": (qwen3_vl_moe, tf.Qwen3VLMoeForConditionalGeneration, tf.Qwen3MoeForCausalLM),
    "glm4v_moe": (glm4v_moe, tf.Glm4vMoeForConditionalGeneration, tf.Glm4MoeForCausalLM),
    "qwen3_5": (qwen3_5, tf.Qwen3_5ForConditionalGeneration, tf.Qwen3_5ForCausalLM),
    "qwen3_5_moe": (qwen3_5_moe, tf.Qwen3_5MoeForConditionalGeneration, tf.Qwen3_5MoeForCausalLM),
    "gemma4": (gemma4, tf.Gemma4ForConditionalGeneration, tf.Gemma4ForCausalLM),
    "lfm2_vl": (lfm2_vl, tf.Lfm2VlForConditionalGeneration, tf.Lfm2ForCausalLM),
    "mistral_llava": (mistral_llava, tf.LlavaForConditionalGeneration, tf.MistralForCausalLM),
}
LAYOUTS = ("hub", "memory", "base", "doubled")


def tiny_vlm(family, seed=0):
    """A random VLM of the family's real class, in eval mode, fp32."""
    config, cls, _ = (FAMILIES | MIXED)[family]
    torch.manual_seed(seed)
    return cls(config()).eval()


def tiny_llm(family, seed=0, **changes):
    """A random text LLM of the class that the family's language model comes from; `changes` go to its config."""
    cls = (FAMILIES | MIXED)[family][2]
    torch.manual_seed(seed)
    return cls(cls.config_class(**{**TEXT, **TEXT_CHANGES.get(family, {}), **changes})).eval()


def tiny_expert(family, vlm, scale=0.1, seed=1):
    """Text LLM whose projections are the VLM's + delta, everything else equal.

    Returns (model, delta): canonical weight name -> [out, in] with ||delta|| about scale * ||W||.
    """
    expert = tiny_llm(family)
    order = SELF_LAYERS.get(family, range(len(vlm.get_decoder().layers)))
    state = {}
    for key, value in vlm.get_decoder().state_dict().items():
        layer = re.match(r"layers\.(\d+)\.", key)
        if layer and int(layer[1]) in order:
            key = f"layers.{list(order).index(int(layer[1]))}.{key[layer.end() :]}"
        elif layer:
            continue
        rows = TEXT["vocab_size"] if key == "embed_tokens.weight" else len(value)
        state[key] = value[:rows].clone()
    generator = torch.Generator().manual_seed(seed)
    layers = expert.get_decoder().layers.named_modules(prefix="layers")
    linear = [name for name, module in layers if isinstance(module, torch.nn.Linear)]
    projections = {f"{name}.weight" for name in linear if not re.search(r"\.gate$|expert_gate$|\.experts\.", name)}
    delta = {}
    for key in sorted(state):
        if key in projections:
            noise = torch.randn(state[key].shape, generator=generator)
            delta[key] = scale * state[key].std() * noise
            state[key] += delta[key]
    expert.get_decoder().load_state_dict(state)
    if expert.get_output_embeddings().weight is not expert.get_input_embeddings().weight:
        expert.lm_head.weight.data.copy_(vlm.get_output_embeddings().weight[: TEXT["vocab_size"]])
    return expert, delta


def save_layout(model, folder, layout="hub", max_shard_size="5GB"):
    """Save a model as one of LAYOUTS; a small `max_shard_size` (such as "20KB") gives shards and an index."""
    saved = model.base_model if layout == "base" else model
    saved.save_pretrained(folder, max_shard_size=max_shard_size, save_original_format=layout in ("hub", "doubled"))
    if layout == "doubled":  # hub layout with one more "model." in front of the language model's names
        rename_keys(
            folder,
            lambda key: re.sub(
                r"^(.*\b(?:language|text)_model\.|)(?:model\.)*(?=(?:layers|norm|embed_tokens)\.)",
                r"\1model.model.",
                key,
            ),
        )
    return folder


def save_tokenizer(folder, vocabulary):
    """Save a tokenizer with these tokens, token -> row, into a model's folder."""
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=next(iter(vocabulary))))
    tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def edit_tensors(folder, change):
    """Apply change(tensors) to the only shard of a checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder, **changes):
    """Overwrite keys of a checkpoint's config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def rename_keys(folder, rename):
    """Rewrite every shard (and the index) of a checkpoint with renamed keys; a name of None drops the tensor."""
    for shard in folder.glob("*.safetensors"):
        tensors = {rename(key): value for key, value in load_file(shard).items()}
        tensors.pop(None, None)
        save_file(tensors, shard, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text())
        content["weight_map"] = {rename(k): v for k, v in content["weight_map"].items() if rename(k) is not None}
        index.write_text(json.dumps(content))
