"""DRIFT for PEFT: LoRA adapters of a vision-language model, steered toward a text-only reasoning expert."""

from .checkpoints import language_model_targets
from .merge import merge_adapter, merge_baseline
from .prior import ReasoningPrior, build_prior
from .tuner import DriftConfig, DriftModel, guide, telemetry

__version__ = "0.1.0"
__all__ = [
    "DriftConfig",
    "DriftModel",
    "ReasoningPrior",
    "build_prior",
    "guide",
    "language_model_targets",
    "merge_adapter",
    "merge_baseline",
    "telemetry",
]
