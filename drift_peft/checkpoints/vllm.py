"""A LoRA adapter as vLLM serves it beside its base, or why it cannot.

vLLM loads an adapter whose names are not its own without a word, and answers as the base does (vllm-project/vllm#48019,
#34186). What it does with each type was measured with its own code, version 0.33.0: `benchmarks/vllm_names.py` and
`benchmarks/results/vllm_names.txt`. Of the types of SERVED it finds every module, but for the short convolutions of
LFM2-VL: it has another name for them, and would leave them out in silence.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from peft import LoraConfig

from .adapter import read_adapter_config, read_updates
from .checkpoint import read_config, skeleton
from .conversion import Layout
from .hub import folder_of, split_revision
from .lora import adapter_folder
from .naming import canonical_name
from .output import write_tensors
from .promised import refuse_incomplete
from .serving import MAX_LORA_RANKS
from .standalone import replaced_when_complete
from .update import LowRank

VERSION = "0.33.0"
SERVED = frozenset(
    "aya_vision chameleon emu3 exaone4_5 gemma3 gemma4 glm4v glm_ocr got_ocr2 granite4_vision idefics2 idefics3 "
    "internvl janus kimi_k25 lfm2_vl llama4 llava llava_next llava_next_video mistral3 mllama ovis2 paligemma "
    "perception_lm qwen2_5_omni_thinker qwen2_5_vl qwen2_vl qwen3_5 qwen3_5_moe qwen3_omni_moe_thinker qwen3_vl "
    "qwen3_vl_moe shieldgemma2 smolvlm video_llama_3 video_llava vipllava".split()
)
RENAMED = {"lfm2_vl": (".conv.", ".short_conv.")}  # type -> part of a name in transformers, in vLLM


@dataclass(frozen=True)
class Export:
    """What was written: the folder, the modules that vLLM finds, those under a name of its own, and its flag."""

    output: str
    modules: int
    renamed: int
    max_lora_rank: int


def export_for_vllm(
    adapter: str | Path, output: str | Path, base: str | None = None, overwrite: bool = False
) -> Export:
    """Write a LoRA adapter under the names that vLLM 0.33 finds its modules by; for vLLM alone where they differ.

    Args:
        adapter: folder, hub id or `id@revision`.
        output: folder to write.
        base: the model that it was trained on, of which config.json is read; None: the one that the adapter names.

    Raises:
        FileNotFoundError: there is no such adapter or base.
        FileExistsError: the output exists, and `overwrite` is False.
        ValueError: vLLM cannot serve it, by the name of what stands against it: the type of the base, DoRA, saved
            modules, biases, trained tokens, patterns of ranks, a rank beyond 512, modules beside the language model, or
            that the base does not have; or the file lacks what its config promises.
    """
    folder = adapter_folder(adapter)
    config = read_adapter_config(folder)
    if not (base := base or config.base_model_name_or_path):
        raise ValueError(f"adapter {adapter} does not say what it was trained on: name the model as base (--base)")
    local = Path(base).exists()
    revision = config.revision if base == config.base_model_name_or_path and not local else None
    base_config = read_config(folder_of(base, revision, ("config.json",)), base)
    model_type = base_config.model_type
    if model_type not in SERVED:
        raise ValueError(
            f"vLLM {VERSION} is not known to serve every module of an adapter on a {model_type} model: merge {adapter} "
            "into its base (drift-peft merge), and serve that"
        )
    factors = _factors(folder, adapter)
    _refuse(config, factors, adapter)
    model = skeleton(base_config, base)
    layout, state = Layout(model, ()), model.state_dict()

    def weight_of(name: str) -> str | None:
        return next((known for known in (name, layout.name(name)) if known in state), None)

    weights = {module: weight_of(f"{module}.weight") for module in factors}  # in this version of transformers
    if absent := [module for module, weight in weights.items() if weight is None]:
        raise ValueError(
            f"adapter {adapter} adapts {absent[0]}, and {base} has no module of this name: name the model that it was "
            "trained on as base (--base)"
        )
    promising = {f"{module}.weight": update for module, update in factors.items()}
    refuse_incomplete(config, model, promising, str(adapter), weight_of)
    # The file shows that nothing of these was trained, and vLLM refuses whatever asks for them.
    config.bias, config.modules_to_save, config.trainable_token_indices = "none", None, None
    ours, theirs = RENAMED.get(model_type, (".", "."))
    names = {module: weight.removesuffix(".weight").replace(ours, theirs, 1) for module, weight in weights.items()}
    tensors = {}
    for module, update in factors.items():
        tensors[f"base_model.model.{names[module]}.lora_A.weight"] = update.A
        tensors[f"base_model.model.{names[module]}.lora_B.weight"] = update.B
    renamed = sum(module != name for module, name in names.items())
    if renamed:
        config.target_modules = sorted({key.split(".")[-3] for key in tensors})
    config.base_model_name_or_path, config.revision = (
        (os.path.abspath(base), None) if local else split_revision(base, revision)
    )
    with replaced_when_complete(Path(output), overwrite, [folder], kind="adapter") as partial:
        write_tensors(partial / "adapter_model.safetensors", tensors, {"format": "pt"})
        config.save_pretrained(partial)
    return Export(str(output), len(factors), renamed, next(rank for rank in MAX_LORA_RANKS if rank >= config.r))


def _factors(folder: Path, adapter: str | Path) -> dict[str, LowRank]:
    """Module -> its factors; refused by name where it is more than that, or not the language model's."""
    factors = {}
    for name, update in read_updates(folder).items():
        if not isinstance(update, LowRank) or update.magnitude is not None or update.start is not None:
            raise ValueError(
                f"adapter {adapter} holds more than LoRA factors of {name} (use_dora, modules_to_save, bias, "
                "trainable_token_indices, or weights of its base), which vLLM does not serve: merge it (drift-peft "
                "merge)"
            )
        if not (canonical_name(name) or "").startswith("layers."):
            raise ValueError(
                f"adapter {adapter} adapts {name}, and vLLM serves the language model's layers alone: merge it "
                "(drift-peft merge)"
            )
        factors[update.module] = update
    return factors


def _refuse(config: LoraConfig, factors: dict[str, LowRank], adapter: str | Path) -> None:
    if patterns := [key for key in ("rank_pattern", "alpha_pattern") if getattr(config, key)]:
        raise ValueError(
            f"adapter {adapter} has a {patterns[0]}, whose names are not vLLM's: merge it (drift-peft merge), or train "
            "with one rank and one lora_alpha"
        )
    if (rank := max(len(update.A) for update in factors.values())) > MAX_LORA_RANKS[-1]:
        raise ValueError(
            f"adapter {adapter} has rank {rank}, and vLLM takes {MAX_LORA_RANKS[-1]} at most: merge it (drift-peft "
            "merge)"
        )
