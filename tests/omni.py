"""Tiny Qwen Omni models, and a text model each that can be their expert."""

import transformers as tf
from tiny import TEXT

ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
AUDIO = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 40, "output_dim": 64}
VISION = {
    "depth": 1,
    "hidden_size": 32,
    "num_heads": 4,
    "out_hidden_size": 64,
    "intermediate_size": 40,
    "patch_size": 4,
}


def qwen2_5_omni():
    dit = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16, "ff_mult": 1}
    dit |= {"emb_dim": 16, "enc_dim": 16, "enc_emb_dim": 16, "enc_channels": [16] * 5, "enc_attention_channels": 8}
    dit |= {"enc_se_channels": 8, "mel_dim": 8, "num_embeds": 16}
    wave = {"mel_dim": 8, "upsample_initial_channel": 16, "resblock_kernel_sizes": [3], "upsample_rates": [2]}
    wave |= {"resblock_dilation_sizes": [[1, 3, 5]], "upsample_kernel_sizes": [4]}
    text = {**TEXT, "rope_parameters": ROPE}
    config = tf.Qwen2_5OmniConfig(
        thinker_config={"audio_config": AUDIO, "vision_config": VISION, "text_config": text},
        talker_config={**text, "embedding_size": 64},
        token2wav_config={"dit_config": dit, "bigvgan_config": wave},
    )
    expert = tf.Qwen2ForCausalLM(tf.Qwen2Config(**TEXT))
    return tf.Qwen2_5OmniForConditionalGeneration(config), expert


def qwen3_omni():
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    text = {**TEXT, **experts, "rope_parameters": ROPE}
    vision = {**VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    talker = {"text_config": {**text, "shared_expert_intermediate_size": 32}, "thinker_hidden_size": 64}
    talker |= {"code_predictor_config": {**TEXT, "num_code_groups": 2}, "num_code_groups": 2, "accept_hidden_layer": 1}
    sound = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    sound |= {"num_key_value_heads": 4, "decoder_dim": 16, "codebook_size": 16, "num_quantizers": 2}
    config = tf.Qwen3OmniMoeConfig(
        thinker_config={
            "audio_config": {**AUDIO, "downsample_hidden_size": 8}, "vision_config": vision, "text_config": text,
        },
        talker_config={**talker, "speaker_id": {}, "spatial_merge_size": 2},
        code2wav_config={**sound, "upsample_rates": [2, 2], "upsampling_ratios": [2]},
    )  # fmt: skip
    expert = tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**TEXT, **experts))
    return tf.Qwen3OmniMoeForConditionalGeneration(config), expert
