"""What type checkers and editors see: the public names, which `__init__.py` loads on first use."""

from .checkpoints import language_model_targets as language_model_targets
from .keeping import KeepSet as KeepSet
from .keeping import keep as keep
from .keeping import make_keep_set as make_keep_set
from .merge import gate_prior as gate_prior
from .merge import merge_adapter as merge_adapter
from .merge import merge_baseline as merge_baseline
from .merge import transplant as transplant
from .prior import ReasoningPrior as ReasoningPrior
from .prior import build_prior as build_prior
from .tuner import DriftConfig as DriftConfig
from .tuner import DriftModel as DriftModel
from .tuner import guide as guide
from .tuner import telemetry as telemetry

__version__: str
