"""The tuner `drift` of ms-swift. A file of one line makes it known, and `--model_kwargs` holds its settings:

    echo "import drift_peft.integrations.ms_swift" > drift.py
    swift sft --external_plugins drift.py --tuner_type drift --lora_rank 16 \\
        --model_kwargs '{"drift_prior": "prior.safetensors", "drift_alpha": 0.3}' …

ms-swift has no flags for the settings of somebody else's tuner. LoRA's are its own: --lora_rank, --lora_alpha, … By
default `--target_modules` means the projections that the prior covers, and `--init_weights` DriftConfig's own start.
"""

from __future__ import annotations

import ast
import json
import os
from functools import partial
from pathlib import Path
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


# ms-swift's task types by those of PEFT, as it does for its own `lora`; the others have the same name in both.
TASK_TYPES = {"embedding": None, "reranker": "SEQ_CLS", "generative_reranker": "CAUSAL_LM", "decision": "CAUSAL_LM"}
# Flags of its `lora` that DriftConfig has no field for, and what they are when nobody has set them.
UNUSED = {"lora_dtype": None, "lorap_lr_ratio": None, "use_swift_lora": False}


class DriftTuner(PeftTuner):
    """LoRA with DriftConfig; it saves what stock PEFT saves."""

    @staticmethod
    def prepare_model(args, model):
        """A new adapter.

        Raises:
            ValueError: as of PluginSettings.read and DriftConfig, or a flag is set that is not available here.
        """
        settings = PluginSettings.read(args.model_kwargs)
        for flag, unset in UNUSED.items():
            if (value := getattr(args, flag, unset)) != unset:
                raise ValueError(f"--{flag} {value} is not available with --tuner_type drift: leave it out.")
        language_model = args.target_modules == ["all-linear"] and args.freeze_vit and args.freeze_aligner
        optional = {"target_parameters": args.target_parameters} if args.target_parameters else {}
        if args.init_weights is not True:  # by default ours
            optional["init_lora_weights"] = args.init_weights
        config = settings.config(
            task_type=TASK_TYPES.get(args.task_type, args.task_type.upper()),
            r=args.lora_rank,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            target_modules=None if language_model else get_target_modules(args, model),
            modules_to_save=get_modules_to_save(args, model, args.task_type) or None,
            bias=args.lora_bias,
            use_rslora=args.use_rslora,
            use_dora=args.use_dora,
            **optional,
        )
        model = get_peft_model(model, config)
        settings.keep(model, lambda: args.get_model_processor(load_model=False)[1])
        return model

    @staticmethod
    def save_pretrained(model, save_directory, state_dict=None, safe_serialization=True, **kwargs):
        """PeftTuner's leaves out `state_dict`: the weights, where ZeRO-3 or FSDP has left the model's own empty."""
        kwargs.setdefault("selected_adapters", ["default"])
        model.save_pretrained(save_directory, safe_serialization=safe_serialization, state_dict=state_dict, **kwargs)

    @staticmethod
    def from_pretrained(model, model_id, **kwargs):
        """Plain LoRA, steered and kept again where it is trained further (`--resume_from_checkpoint`, `--adapters`).

        Raises:
            ValueError: as of PluginSettings.read, or nothing says how a checkpoint of ours was kept.
        """
        if isinstance(model, PeftModel) and "adapter_name" in kwargs:  # --ref_adapters: one that is not trained
            model.load_adapter(model_id, **kwargs)
            return model
        if not kwargs.get("is_trainable"):
            return PeftModel.from_pretrained(model, model_id, **kwargs)
        given, ours = _model_kwargs(), DriftConfig.stored(model_id) is not None
        values = given or _stored_kwargs(model_id)
        settings = PluginSettings.read(values) if values or not ours else PluginSettings({}, {})
        if ours and not given:
            settings.guidance = {}  # the adapter holds its own, with the hash of its prior
        model = settings.load(model, model_id, **{key: kwargs[key] for key in kwargs if key != "is_trainable"})
        settings.keep(model, partial(AutoProcessor.from_pretrained, model.name_or_path))
        return model


def _model_kwargs() -> dict[str, Any]:
    """Ours of `--model_kwargs`. ms-swift gives them to no `from_pretrained`, but makes environment variables of them:
    the key in capitals, and str() of the value."""
    own = {key.lower(): value for key, value in os.environ.items() if key.startswith("DRIFT_")}
    return {key: _literal(value) for key, value in own.items()}


def _stored_kwargs(checkpoint: str) -> dict[str, Any]:
    """Ours of the command that a checkpoint was trained by."""
    file = Path(checkpoint, "args.json")
    args = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    own = {key: value for key, value in (args.get("model_kwargs") or {}).items() if key.startswith("drift_")}
    if args.get("tuner_type") == "drift" and not own:  # a restart without them itself
        raise ValueError(
            f"{file} does not say how the adapter was trained: give --model_kwargs '{{\"drift_prior\": …}}'."
        )
    return own


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):  # a name or path
        return text


tuners_map["drift"] = DriftTuner
