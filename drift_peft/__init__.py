"""DRIFT for PEFT: LoRA adapters of a vision-language model, steered toward a text-only reasoning expert."""

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

from . import step  # noqa: F401  its hooks of torch.optim are what guides
from .baseline import merge_baseline
from .build import build_prior
from .config import DriftConfig
from .merge import merge_adapter
from .naming import language_model_targets
from .prior import ReasoningPrior
from .telemetry import telemetry
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
    "merge_baseline",
    "telemetry",
]

# To PEFT, DRIFT is LoRA, so that all that PEFT does for LoRA (adapters side by side, hot-swapping, weight conversions)
# works for it. A plain LoraConfig makes what it always made: DriftModel adds something to a DriftConfig only.
PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = DriftModel
