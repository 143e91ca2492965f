"""The bases of the recipes in their published sizes, as configurations without weights."""

import transformers as tf

QWEN2 = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064,
}  # fmt: skip
QWEN2_VL = QWEN2 | {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}
LLAMA3 = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8,
}  # fmt: skip
QWEN3 = {"num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
QWEN3 |= {"vocab_size": 151936}
CLIP = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
SIGLIP = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
GRID = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
UNTIED = {"tie_word_embeddings": False}


def qwen2_5_vl_7b():
    return tf.Qwen2_5_VLConfig(
        text_config=QWEN2_VL, vision_config={"hidden_size": 1280, "out_hidden_size": 3584}, **UNTIED
    )


def qwen2_vl_7b():
    return tf.Qwen2VLConfig(text_config=QWEN2_VL, vision_config={"embed_dim": 1280, "hidden_size": 3584}, **UNTIED)


def llava_next_llama3_8b():
    vision = tf.CLIPVisionConfig(**CLIP, image_size=336, patch_size=14)
    text = tf.LlamaConfig(**LLAMA3, vocab_size=128320)
    return tf.LlavaNextConfig(vision_config=vision, text_config=text, image_grid_pinpoints=GRID, **UNTIED)


def idefics2_8b():
    vision = {**SIGLIP, "image_size": 980, "patch_size": 14}
    perceiver = {"hidden_size": 4096, "resampler_n_latents": 64, "resampler_depth": 3, "resampler_n_heads": 16,
                 "resampler_head_dim": 96, "num_key_value_heads": 4}  # fmt: skip
    text = tf.MistralConfig(**LLAMA3, vocab_size=32003)
    return tf.Idefics2Config(vision_config=vision, perceiver_config=perceiver, text_config=text, **UNTIED)


def qwen3_vl_4b():
    text = {**QWEN3, "hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True}
    vision = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "out_hidden_size": 2560,
              "deepstack_visual_indexes": [5, 11, 17]}  # fmt: skip
    return tf.Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)


def qwen3_vl_8b():
    text = {**QWEN3, "hidden_size": 4096, "intermediate_size": 12288}
    vision = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "out_hidden_size": 4096,
              "deepstack_visual_indexes": [8, 16, 24]}  # fmt: skip
    return tf.Qwen3VLConfig(text_config=text, vision_config=vision, **UNTIED)


def internvl3_8b():
    vision = {**CLIP, "image_size": [448, 448], "patch_size": [14, 14]}
    text = tf.Qwen2Config(**{**QWEN2, "vocab_size": 151674})
    return tf.InternVLConfig(vision_config=vision, text_config=text, **UNTIED)


def gemma3_12b():
    text = {"hidden_size": 3840, "intermediate_size": 15360, "num_hidden_layers": 48, "num_attention_heads": 16,
            "num_key_value_heads": 8, "head_dim": 256, "sliding_window": 1024, "vocab_size": 262208}  # fmt: skip
    vision = {**SIGLIP, "image_size": 896, "patch_size": 14, "vision_use_head": False}
    return tf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=256)


def smolvlm2_2b():
    text = tf.LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=32, vocab_size=49280
    )
    vision = {**SIGLIP, "image_size": 384, "patch_size": 14}
    return tf.SmolVLMConfig(vision_config=vision, text_config=text, scale_factor=3, **UNTIED)


# As Qwen/Qwen3.5-4B's config.json, which its fine-tunes repeat (huggingface.co/Chat2Find/Chat2Find-CPT).
def qwen3_5_4b():
    text = {"hidden_size": 2560, "intermediate_size": 9216, "tie_word_embeddings": True}
    vision = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "out_hidden_size": 2560}
    return tf.Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=True)


# What transformers' configuration has by default; as in huggingface.co/khtsly/Mini-Coder, a fine-tune of it.
def qwen3_5_9b():
    return tf.Qwen3_5Config(text_config={}, vision_config={"out_hidden_size": 4096}, **UNTIED)


# As in NVIDIA's recipe for it (Megatron Bridge, gemma4_e4b_pretrain_2gpu_h100_bf16_config); its towers are those that
# transformers' configuration has by default.
def gemma4_e4b():
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 42, "num_attention_heads": 8,
            "num_key_value_heads": 2, "head_dim": 256, "global_head_dim": 512, "num_kv_shared_layers": 18,
            "hidden_size_per_layer_input": 256}  # fmt: skip
    return tf.Gemma4Config(text_config=text, vision_config={}, audio_config={})


# Widths of tower and language model as quoted of LFM2-VL-1.6B's config.json; the projector is the one with which the
# weights have the published file's size, 3,193,334,216 bytes, less its header.
def lfm2_5_vl_1_6b():
    attention = (2, 5, 8, 10, 12, 14)
    text = {"model_type": "lfm2", "hidden_size": 2048, "intermediate_size": 12288, "num_hidden_layers": 16,
            "layer_types": ["full_attention" if i in attention else "conv" for i in range(16)]}  # fmt: skip
    vision = {**SIGLIP, "model_type": "siglip2_vision_model", "vision_use_head": False}
    projector = {"projector_hidden_size": 2048, "projector_use_layernorm": False}
    return tf.Lfm2VlConfig(text_config=text, vision_config=vision, **projector)


BASES = {  # as the recipes name them -> configuration, billions of weights
    "Qwen/Qwen2.5-VL-7B-Instruct": (qwen2_5_vl_7b, 8.29),
    "Qwen/Qwen2-VL-7B-Instruct": (qwen2_vl_7b, 8.29),
    "llava-hf/llama3-llava-next-8b-hf": (llava_next_llama3_8b, 8.36),
    "HuggingFaceM4/idefics2-8b": (idefics2_8b, 8.40),
    "Qwen/Qwen3-VL-4B-Instruct": (qwen3_vl_4b, 4.44),
    "Qwen/Qwen3-VL-8B-Instruct": (qwen3_vl_8b, 8.77),
    "OpenGVLab/InternVL3-8B-hf": (internvl3_8b, 7.94),
    "google/gemma-3-12b-it": (gemma3_12b, 12.19),
    "HuggingFaceTB/SmolVLM2-2.2B-Instruct": (smolvlm2_2b, 2.25),
    "Qwen/Qwen3.5-4B": (qwen3_5_4b, 4.54),
    "Qwen/Qwen3.5-9B": (qwen3_5_9b, 9.41),
    "google/gemma-4-E4B-it": (gemma4_e4b, 7.94),
    "LiquidAI/LFM2.5-VL-1.6B": (lfm2_5_vl_1_6b, 1.60),
}
