"""LoRA steered by a prior, in PEFT's own terms: what is steered, when in the step, and what is done to it there.

patches          functions of PEFT and transformers to which something is added
names            what the parameters of a model are called in a prior
settings         the guidance's settings: what is allowed, and which weight they speak of
field_docs       the same in words, for help() and the documentation
card             the model card of an adapter
config           DriftConfig: LoraConfig with these settings, and how it is stored
guidance         the method as pure functions on tensors
sharding         parameters and gradients as whole stacks, wherever their parts live
capture          the weight gradient that LoRA never forms: its norm and inner products
steered          what is steered: adapters and other trainable tensors, each with its part of the prior
batches          one step's guidance, a batched call for all that has one shape
plan             what an optimizer guides, looked up once
unguided         adapters that were guided, and are trained on as plain LoRA
deepspeed        DeepSpeed's engine: where it keeps what it trains
step             when guidance runs: the optimizer hooks
telemetry        where training stands against the prior
trainer          the same in Trainer's logs
compatibility    does this prior belong to this model?
modules_to_save  modules which PEFT copies to train them themselves
start            which adapter can have its start in the directions of Δ, and what it is
attach           what the settings guide is registered
model            DriftModel(LoraModel): what get_peft_model makes of a DriftConfig
load             what PEFT loads: its guided steps, and whether training goes on guided
store            what PEFT saves and pushes: our settings and the card beside it
guide            the same for models that were wrapped elsewhere, and for full fine-tuning
targets          what target_modules=None adapts and steers, in numbers
"""

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

from . import load, step, store  # noqa: F401  what they hook into: PEFT's loads, saves and uploads, torch.optim's steps
from .compatibility import check_fingerprint, fitting_modules, weight_products
from .config import DriftConfig
from .field_docs import describe, own_fields
from .guide import guide
from .model import DriftModel
from .settings import is_guided
from .start import is_new
from .steered import BATCH_ELEMENTS
from .targets import targets_summary
from .telemetry import telemetry
from .trainer import DriftCallback

__all__ = [
    "BATCH_ELEMENTS",
    "DriftCallback",
    "DriftConfig",
    "DriftModel",
    "check_fingerprint",
    "describe",
    "fitting_modules",
    "guide",
    "is_guided",
    "is_new",
    "own_fields",
    "targets_summary",
    "telemetry",
    "weight_products",
]

# To PEFT, DRIFT is LoRA, so that all that PEFT does for LoRA (adapters side by side, hot-swapping, weight conversions)
# works for it. A plain LoraConfig makes what it always made: DriftModel adds something to a DriftConfig only.
PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = DriftModel
