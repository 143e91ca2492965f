"""DRIFT for PEFT: LoRA adapters of a vision-language model, steered toward a text-only reasoning expert."""

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from .build import build_prior
from .config import DriftConfig
from .merge import merge_adapter
from .naming import language_model_targets
from .prior import ReasoningPrior
from .step import telemetry
from .tuner import DriftModel, guide

__version__ = "0.1.0"
__all__ = [
    "DriftConfig",
    "DriftModel",
    "ReasoningPrior",
    "build_prior",
    "guide",
    "language_model_targets",
    "merge_adapter",
    "telemetry",
]

# What peft.utils.register_peft_method does, but a second import (a reloaded notebook module) is no error.
PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.DRIFT] = DriftConfig
PEFT_TYPE_TO_TUNER_MAPPING[PeftType.DRIFT] = DriftModel
PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.DRIFT] = DriftModel.prefix
