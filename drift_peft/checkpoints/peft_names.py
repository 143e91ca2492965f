"""How PEFT rewrites targets and weights for transformers 5. PEFT 0.18 does not: it takes all names as they are."""

from __future__ import annotations

from importlib.util import find_spec

__all__ = ["convert_peft_adapter_state_dict_for_transformers", "convert_peft_config_for_transformers"]

if find_spec("peft.utils.transformers_weight_conversion"):
    from peft.utils.transformers_weight_conversion import (
        convert_peft_adapter_state_dict_for_transformers,
        convert_peft_config_for_transformers,
    )
else:

    def convert_peft_adapter_state_dict_for_transformers(model, peft_config, state_dict):
        return state_dict

    def convert_peft_config_for_transformers(peft_config, model, conversions):
        pass
