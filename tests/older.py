"""What older versions of PEFT and of the hub's client lack. What tests it is skipped there, and says so."""

from dataclasses import fields
from importlib.util import find_spec

import huggingface_hub
import peft
import pytest
from packaging.version import Version
from peft.tuners.lora import config as lora

FREES_FILES = hasattr(huggingface_hub.HFCacheInfo, "delete_files")
leaves_nothing = pytest.mark.skipif(
    Version(huggingface_hub.__version__) < Version("1.25"),
    reason=f"huggingface_hub {huggingface_hub.__version__} keeps the part of a file that has come",
)
rewrites_targets = pytest.mark.skipif(
    find_spec("peft.utils.transformers_weight_conversion") is None,
    reason=f"PEFT {peft.__version__} does not rewrite targets for transformers 5",
)
rewrites_omni_targets = pytest.mark.skipif(
    Version(peft.__version__) < Version("0.21"), reason=f"PEFT {peft.__version__} does not rewrite targets of Qwen Omni"
)
VARIANTS = {"kasa_config", "monteclora_config", "use_bdlora", "arrow_config", "velora_config"}


def variant(field: str, config: str, **settings) -> dict:
    """`LoraConfig`'s setting for a variant of LoRA, to be given to `known`."""
    return {field: getattr(lora, config)(**settings) if hasattr(lora, config) else None}


def known(case: str | dict, settings: dict, *others):
    """A parametrized case with these settings of LoRA, skipped where PEFT's `LoraConfig` has not got one of them."""
    here = {field.name: field for field in fields(peft.LoraConfig)}
    lacking = {*settings} & VARIANTS - {*here}
    if settings.get("init_lora_weights") == "mica" and "lora_variants" not in here["init_lora_weights"].metadata:
        lacking.add("mica")
    reason = f"PEFT {peft.__version__} has no {' and '.join(sorted(lacking))}"
    return pytest.param(case, *others, marks=pytest.mark.skipif(bool(lacking), reason=reason))
