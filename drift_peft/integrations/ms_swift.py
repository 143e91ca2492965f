"""The tuner `drift` of ms-swift. A file of one line makes it known, and `--model_kwargs` holds its settings:

    echo "import drift_peft.integrations.ms_swift" > drift.py
    swift sft --external_plugins drift.py --tuner_type drift --lora_rank 16 \\
        --model_kwargs '{"drift_prior": "prior.safetensors", "drift_alpha": 0.3}' …

ms-swift has no flags for the settings of somebody else's tuner. LoRA's are its own: --lora_rank, --lora_alpha, … By
default `--target_modules` means the projections that the prior covers.
"""

from __future__ import annotations

import ast
import os
from typing import Any

from peft import PeftModel, get_peft_model
from transformers import AutoProcessor

from ..tuner import DriftConfig
from .settings import PluginSettings

try:
    from swift.pipelines.train.tuner import get_modules_to_save, get_target_modules
    from swift.tuner_plugin import PeftTuner, tuners_map
except ImportError as error:
    raise ImportError(
        f"drift_peft.integrations.ms_swift is a plugin of ms-swift, which cannot be imported here ({error}): install "
        "ms-swift beside drift_peft."
    ) from error


class DriftTuner(PeftTuner):
    """LoRA with DriftConfig; it saves what stock PEFT saves."""

    @staticmethod
    def prepare_model(args, model):
        settings = PluginSettings.read(args.model_kwargs)
        language_model = args.target_modules == ["all-linear"] and args.freeze_vit and args.freeze_aligner
        config = settings.config(
            task_type=args.task_type.upper(),
            r=args.lora_rank,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            target_modules=None if language_model else get_target_modules(args, model),
            modules_to_save=get_modules_to_save(args, model, args.task_type) or None,
            bias=args.lora_bias,
            use_rslora=args.use_rslora,
            use_dora=args.use_dora,
        )
        model = get_peft_model(model, config)
        if settings.keeps:
            settings.keep(model, args.get_model_processor(load_model=False)[1])
        return model

    @staticmethod
    def from_pretrained(model, model_id, **kwargs):
        """Plain LoRA, steered and kept again where it is trained further (`--resume_from_checkpoint`, `--adapters`)."""
        if not kwargs.get("is_trainable"):
            return PeftModel.from_pretrained(model, model_id, **kwargs)
        values = _model_kwargs()
        settings = PluginSettings.read(values) if values else PluginSettings({}, {})
        config = DriftConfig.from_pretrained(model_id, **settings.guidance)
        model = PeftModel.from_pretrained(model, model_id, config=config, **kwargs)
        if settings.keeps:
            settings.keep(model, AutoProcessor.from_pretrained(model.name_or_path))
        return model


def _model_kwargs() -> dict[str, Any]:
    """Ours of `--model_kwargs`. ms-swift gives them to no `from_pretrained`, but makes environment variables of them:
    the key in capitals, and str() of the value."""
    own = {key.lower(): value for key, value in os.environ.items() if key.startswith("DRIFT_")}
    return {key: _literal(value) for key, value in own.items()}


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):  # a name or path
        return text


tuners_map["drift"] = DriftTuner
