"""A tiny model of each image-text-to-text type that transformers has, and a text expert with a known Δ for it.

    base = tiny_base("gemma4")
    expert, delta = tiny_text_expert(base)     # the language model's text LLM: its weights + delta

A type's own default configuration is made small by the names of its fields; what single types need beyond that stands
in CHANGES.
"""

from __future__ import annotations

import copy
import re

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.models.timm_wrapper import modeling_timm_wrapper as timm_wrapper

# timm needs torchvision, of which there is no build here: a linear layer stands for its vision towers.
timm_wrapper.requires_backends = lambda *_: None
timm_wrapper._create_timm_model_with_error_handling = lambda *_, **__: nn.Linear(4, 4)

TYPES = [*MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES]

WIDE, INNER, HEAD = 64, 128, 16  # widths that bitsandbytes' 4-bit layers on a CPU can have
TEXT = {  # size -> fields that are no larger
    WIDE: "hidden_size d_model n_embd embed_dim text_hidden_size word_embed_proj_dim projection_dim q_lora_rank "
    "kv_lora_rank moe_intermediate_size shared_expert_intermediate_size out_hidden_size mm_hidden_size vocab_size "
    "moe_shared_expert_intermediate_size vision_output_dim projector_input_dim projector_output_dim text_vocab_size "
    "projector_hidden_size projection_intermediate_size vocab_size_per_layer_input additional_vocab_size",
    INNER: "intermediate_size ffn_dim d_ff decoder_ffn_dim encoder_ffn_dim dense_intermediate_size n_positions "
    "intermediate_size_mlp shared_intermediate_size block_ff_dim block_multiple_of max_position_embeddings",
    HEAD: "head_dim global_head_dim swa_head_dim qk_nope_head_dim v_head_dim index_head_dim linear_key_head_dim d_kv "
    "linear_value_head_dim mamba_head_dim ssm_state_size hidden_size_per_layer_input laurel_rank chunk_size rel_extent "
    "linear_head_dim sliding_window attention_chunk_size index_topk image_size max_image_size max_img_size "
    "sliding_window_size",
    32: "vision_hidden_size patch_dim video_patch_dim",
    8: "qk_rope_head_dim",
    4: "num_attention_heads n_head num_heads attention_heads decoder_attention_heads encoder_attention_heads "
    "patch_size swa_num_attention_heads num_experts num_local_experts n_routed_experts moe_num_experts",
    2: "num_key_value_heads num_global_key_value_heads swa_num_key_value_heads num_experts_per_tok moe_k moe_topk "
    "num_experts_per_token top_k_experts linear_num_value_heads linear_num_key_heads index_n_heads mamba_num_heads",
    1: "n_group topk_group n_groups n_shared_experts moe_num_shared_experts",
}
VISION = {  # beyond these
    64: "intermediate_size mlp_dim ffn_dim",
    32: "hidden_size embed_dim d_model",
    8: "head_dim",
    4: "num_heads num_attention_heads num_key_value_heads attention_heads encoder_attention_heads",
    1: "depth num_global_layers",
}
TEXT, VISION = ({field: size for size, fields in of.items() for field in fields.split()} for of in (TEXT, VISION))
DEPTHS = "num_hidden_layers n_layer num_layers decoder_layers encoder_layers num_decoder_layers".split()


def tiny_config(model_type: str):
    """A small configuration of the type's own class."""
    cls = CONFIG_MAPPING[model_type]
    changes = CHANGES.get(model_type, {})
    settings = changes["from"]() if "from" in changes else cls().to_dict()
    settings = _shrunk(settings, vision=False)
    _merge(settings, {key: value for key, value in changes.items() if key != "from"})
    for key in ("dtype", "torch_dtype", "transformers_version", "architectures", "_name_or_path", "model_type"):
        settings.pop(key, None)
    return cls(**settings)


def _merge(settings: dict, changes: dict) -> None:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(settings.get(key), dict):
            _merge(settings[key], value)
        else:
            settings[key] = value


def _shrunk(settings: dict, vision: bool) -> dict:
    sizes = {**TEXT, **VISION} if vision else TEXT
    settings = _fewer_layers(settings, least=1 if vision else 2)
    small = {}
    for key, value in settings.items():
        if isinstance(value, dict) and ("config" in key or key in ("encoder", "decoder")):
            small[key] = _shrunk(value, vision or bool(re.search("vision|audio|qformer|perceiver|vq|dit|vit", key)))
        elif key in sizes and isinstance(value, int) and not isinstance(value, bool):
            small[key] = min(value, sizes[key])
        elif key in sizes and isinstance(value, list) and all(isinstance(v, int) for v in value):
            small[key] = [min(v, sizes[key]) for v in value]
        elif re.search(r"_token_(id|index)$|_token_id$", key) and isinstance(value, int):
            small[key] = TOKENS.get(key, min(value, 9))
        else:
            small[key] = value
    rope = small.get("rope_parameters")
    if isinstance(rope, dict) and "mrope_section" in rope:
        rope["mrope_section"] = [4, 2, 2] if len(rope["mrope_section"]) == 3 else [4, 4]
    return small


TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "image_token_id": 3, "image_token_index": 3,
          "video_token_id": 4, "video_token_index": 4, "audio_token_id": 5, "audio_token_index": 5,
          "vision_start_token_id": 6, "vision_end_token_id": 7}  # fmt: skip


def _fewer_layers(settings: dict, least: int) -> dict:
    """With one layer of each kind that the settings a layer tell apart; at least so many, and four at most."""
    depth = next((settings[key] for key in DEPTHS if isinstance(settings.get(key), int)), None)
    if depth is None:
        return settings
    lists = {key: value for key, value in settings.items() if isinstance(value, list) and len(value) == depth}
    own = {int(layer): _shrunk(value, least == 1) for layer, value in (settings.get("per_layer_config") or {}).items()}
    kinds = {}
    for i in range(depth):
        kinds.setdefault((repr(own.get(i)), *(repr(value[i]) for value in lists.values())), i)
    chosen = sorted(kinds.values())[:4] if least > 1 else []
    chosen += [i for i in range(depth) if i not in chosen][: max(0, least - len(chosen))]
    few = dict(settings)
    for key, value in lists.items():
        few[key] = [value[i] for i in chosen]
    if own:
        few["per_layer_config"] = {str(new): own[old] for new, old in enumerate(chosen) if old in own}
    for key in DEPTHS:
        if isinstance(settings.get(key), int):
            few[key] = len(chosen)
    return few


IMAGES = {"vocabulary_map": {"<image>": 3, "<|extra_200|>": 4, "<|image token|>": 3, "<|image start|>": 5}}
TOKENIZER = {
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
    "resolution": 16,
    "num_embeddings": 16,
}
SAM = {"output_channels": 32, "downsample_channels": [32, 32], "downsample_in_channels": 32}
GEMMA = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "per_layer_config": {"1": {"head_dim": 32}, "3": {"head_dim": 32}},
}


def mrope(*section: int) -> dict:
    return {
        "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [*section]}}
    }


CHANGES: dict[str, dict] = {  # type -> what it needs beyond, in the form of its configuration
    "apertus1p5": {
        "vision_config": {**TOKENIZER, "codebook_size": 16, "embed_dim": 32, "latent_channels": 32},
        "audio_config": {"codebook_dim": 32, "codebook_size": 16},
        "image_token_offset": 16,
        "audio_token_offset": 32,
    },
    "chameleon": {**IMAGES, "vq_config": {**TOKENIZER, "embed_dim": 32}},
    "cohere2_vision": {"alignment_intermediate_size": 128},
    "cohere_compass": {
        "text_config": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}}
    },
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    },
    "diffusion_gemma": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64}},
    "dots3_note": {
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 32, "hidden_size": 32, "adapter_output_size": 64},
        "text_config": {
            **{"num_key_value_heads": 4, "qk_nope_head_dim": 8, "head_dim": 16},
            "per_layer_config": {"2": {"num_key_value_heads": 4, "qk_nope_head_dim": 8}},
        },
    },
    "emu3": {**IMAGES, "vq_config": {**TOKENIZER, "embed_dim": 4}},
    "ernie4_5_vl_moe": {
        "text_config": {
            "moe_intermediate_size": [64, 64],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 4]},
        }
    },
    "gemma3n": {
        "text_config": {
            **{"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": GEMMA["layer_types"]},
            **{"intermediate_size": [128] * 4, "activation_sparsity_pattern": [0.0] * 4},
        }
    },
    "gemma4": {"text_config": {"num_hidden_layers": 4, "num_kv_shared_layers": 2, **GEMMA}},
    "glm46v": mrope(4, 2, 2),
    "glm4v": mrope(4, 2, 2),
    "glm4v_moe": mrope(2, 1, 1),
    "glm5_next": {"text_config": {"num_key_value_heads": 4, "qk_head_dim": 24}},
    "glm_ocr": mrope(4, 2, 2),
    "glmga": mrope(4, 2, 2),
    "granite4_vision": {"deepstack_layer_map": [], "downsample_rate": "1/2", "vision_config": {"hidden_size": 64}},
    "hunyuan_vl": {"text_config": {"head_dim": 16, **mrope(2, 2, 2, 2)["text_config"]}},
    "hy_v4_vl": {
        "text_config": {
            **{"head_dim": 8, "num_key_value_heads": 4, "qk_head_dim": 24},
            **mrope(2, 1, 1)["text_config"],
        }
    },
    "inkling2_loop": {
        "text_config": {
            **{"unpadded_vocab_size": 60, "num_hidden_layers": 4, "layer_types": ["hybrid_sliding", "hybrid"] * 2},
            **{"loop_layer_index_start": 1, "loop_layer_index_end": 3, "n_layers_per_attn_res_block": 1},
        }
    },
    "inkling_mm_model": {"vision_config": {"n_layers": 2}},
    "janus": {"vq_config": {**TOKENIZER, "embed_dim": 8}},
    "kimi_k25": {"text_config": {"head_dim": 8, "num_key_value_heads": 4}},
    "lfm2_vl": {"text_config": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}},
    "mistral4": {"qk_nope_head_dim": 8, "head_dim": 16, "num_key_value_heads": 4},
    "mistral_large4": {"text_config": {"head_dim": 8, "num_key_value_heads": 4}},
    "mllama": {"text_config": {"num_hidden_layers": 3, "cross_attention_layers": [1]}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [-1, -1]}},
    "paddleocr_vl": mrope(4, 2, 2),
    "perception_lm": {"vision_config": {"model_args": {"embed_dim": 32}}},
    "qwen2_5_omni_thinker": mrope(4, 2, 2),
    "qwen2_5_vl": mrope(4, 2, 2),
    "qwen2_vl": mrope(4, 2, 2),
    "qwen4_exp": {
        "text_config": {
            **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16},
            **{"indexer_compress_ratio": 4, "hc_lowrank": 16, "ngram_vocab_size_base": 64},
        }
    },
    "step3p7": {"text_config": {"sliding_window": 16}},
}


def tiny_base(model_type: str, seed: int = 0) -> nn.Module:
    """A random VLM of the type's real class, in fp32."""
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(tiny_config(model_type), dtype=torch.float32).eval()
    for parameter in model.parameters():
        if not parameter.any():  # nothing is learnt beside a zero
            torch.nn.init.normal_(parameter, std=0.02)
    return model


# The text LLM that a type's language model was made from, where the two have other classes
TEXT_LLM = {
    "glm4v_text": "glm4", "glm_ocr_text": "glm4", "mllama_text_model": "llama", "molmo2_text": "qwen3",
    "qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen2_5_omni_text": "qwen2", "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe", "qwen3_omni_moe_text": "qwen3_moe", "glm4v_moe_text": "glm4_moe",
    "paddleocr_vl_text": "ernie4_5", "cosmos3_text": "qwen3", "cosmos3_omni_text": "qwen3",
}  # fmt: skip


def tiny_text_expert(base: nn.Module, scale: float = 0.1, seed: int = 1) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Text LLM whose projections are the VLM's + delta; where no text LLM of its class exists, the VLM fine-tuned.

    Returns (model, delta): canonical weight name -> [out, in].
    """
    expert = _text_llm(base)
    theirs, ours = layers_of(expert), layers_of(base)
    cross = getattr(base.config.get_text_config(), "cross_attention_layers", None) or [] if expert is not base else []
    ours = [layer for i, layer in enumerate(ours) if type(expert) is type(base) or i not in cross]
    generator = torch.Generator().manual_seed(seed)
    delta = {}
    with torch.no_grad():
        for i, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            state = one.state_dict()
            own = other.state_dict()
            other.load_state_dict(
                {k: state[k] if k in state and state[k].shape == v.shape else v for k, v in own.items()}
            )
            for name in sorted(projections_of(one) & projections_of(other)):
                weight = other.get_submodule(name).weight
                change = scale * weight.std() * torch.randn(weight.shape, generator=generator)
                weight += change
                delta[f"layers.{i}.{name}.weight"] = change
    return expert, delta


def _text_llm(base: nn.Module) -> nn.Module:
    text = base.config.get_text_config(decoder=True)
    torch.manual_seed(2)
    if text.model_type in TEXT_LLM:
        cls = CONFIG_MAPPING[TEXT_LLM[text.model_type]]
        known = cls().to_dict()
        settings = {key: value for key, value in text.to_dict().items() if key in known and key != "model_type"}
        if "head_dim" in known:
            settings.setdefault("head_dim", text.hidden_size // text.num_attention_heads)
        if "num_hidden_layers" in settings:
            settings["num_hidden_layers"] -= len(getattr(text, "cross_attention_layers", None) or [])
        return AutoModelForCausalLM.from_config(cls(**settings), dtype=torch.float32).eval()
    if text.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and type(text) is not type(base.config):
        return AutoModelForCausalLM.from_config(copy.deepcopy(text), dtype=torch.float32).eval()
    return copy.deepcopy(base)


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The decoder's layers."""
    decoder = model.get_decoder()
    for path in ("layers", "model.layers", "model.decoder.layers", "decoder.layers", "h", "blocks", "layer", "block",
                 "encoder.layer", "bert.encoder.layer", "dit.layers"):  # fmt: skip
        try:
            return decoder.get_submodule(path)
        except AttributeError:
            continue
    raise LookupError(f"{type(model).__name__} has no list of layers")


def projections_of(layer: nn.Module) -> set[str]:
    """Paths of the linear layers in a layer that neither choose nor are chosen, and act on the tokens alone."""
    found = set()
    for name, module in layer.named_modules():
        parts = name.split(".")
        chosen = any(part in ("experts", "gate", "indexer", "shared_expert_gate") or "router" in part for part in parts)
        chosen |= any(re.match("cross|encoder_|EncDec", part) for part in parts)  # attention to other inputs
        chosen |= any(part in ("prediction_coefs", "correction_coefs") for part in parts)  # of AltUp, never called
        if isinstance(module, nn.Linear) and not chosen and not re.search("Router|Grouped", type(module).__name__):
            found.add(name)
    return found
