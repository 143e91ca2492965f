"""What older versions of PEFT, transformers and others lack. What tests it is skipped there, and says so."""

from collections.abc import Iterable
from dataclasses import fields
from importlib.util import find_spec

import huggingface_hub
import peft
import pytest
import transformers
from packaging.version import Version
from peft.tuners.lora import config as lora
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import is_torchvision_available


def needs(package, version: str, lack: str):
    """The mark of a test that an older version of the package cannot pass."""
    installed = package.__version__
    return pytest.mark.skipif(Version(installed) < Version(version), reason=f"{package.__name__} {installed} {lack}")


FREES_FILES = hasattr(huggingface_hub.HFCacheInfo, "delete_files")
CANNOT_FREE = f"huggingface_hub {huggingface_hub.__version__} cannot free single files"
frees_files = pytest.mark.skipif(not FREES_FILES, reason=CANNOT_FREE)
leaves_nothing = needs(huggingface_hub, "1.25", "keeps the part of a file that has come")

rewrites_targets = pytest.mark.skipif(
    find_spec("peft.utils.transformers_weight_conversion") is None,
    reason=f"peft {peft.__version__} does not rewrite targets for transformers 5",
)
rewrites_omni_targets = needs(peft, "0.21", "does not rewrite targets of Qwen Omni")
saves_biases = needs(peft, "0.21", 'saves no biases with bias="lora_only"')
ties_weights = needs(peft, "0.19", "ties embedding and head in modules_to_save alone")
scales_what_dare_keeps = needs(peft, "0.19", "does not divide by dare's density")

knows_torchao = needs(peft, "0.19", "does not know the tensors of today's torchao")
weighs_alone = needs(peft, "0.19", "approximates an adapter that is weighted alone")
weighs_by_svd = needs(peft, "0.19", "does not save what it combines by svd")
deletes_saved_modules = needs(peft, "0.19", "does not delete the active adapter with its modules to save")
transformers_takes_it = needs(peft, "0.18.2", "is refused by transformers itself")
transformers_adds_it = needs(
    peft, MIN_PEFT_VERSION, f"is refused by transformers {transformers.__version__}, which asks for {MIN_PEFT_VERSION}"
)
looks_up_places = needs(transformers, "5.10.1", "finds the place of a patch of Gemma 4 by a product over all places")
copies_take_names = needs(peft, "0.20", "gives what it copies no input by its name alone")
leaves_the_others = needs(peft, "0.21", "freezes what another adapter trains when it adds one")
tells_adapters_apart = needs(peft, "0.21", "saves an adapter whose name holds this one's as well")
trains_what_was_swapped = needs(peft, "0.21", "freezes an adapter that is swapped in")
FORGETS_CONFIG = Version(peft.__version__) >= Version("0.19")  # when an adapter is merged and unloaded
VARIANTS = {"kasa_config", "monteclora_config", "use_bdlora", "arrow_config", "velora_config"}


def variant(field: str, config: str, **settings) -> dict:
    """`LoraConfig`'s setting for a variant of LoRA, to be given to `known`."""
    return {field: getattr(lora, config)(**settings) if hasattr(lora, config) else None}


def known(case: str | dict, settings: dict, *others, marks=()):
    """A parametrized case with these settings of LoRA, skipped where PEFT's `LoraConfig` has not got one of them."""
    here = {field.name: field for field in fields(peft.LoraConfig)}
    lacking = {*settings} & VARIANTS - {*here}
    if settings.get("init_lora_weights") == "mica" and "lora_variants" not in here["init_lora_weights"].metadata:
        lacking.add("mica")
    reason = f"peft {peft.__version__} has no {' and '.join(sorted(lacking))}"
    marks = [*marks, pytest.mark.skipif(bool(lacking), reason=reason)]
    marks += [saves_biases] if settings.get("bias") == "lora_only" else []
    by_name = {"self_attn", "model"}.intersection(settings.get("modules_to_save") or ())
    marks += [copies_take_names] if by_name else []
    return pytest.param(case, *others, marks=marks)


def known_types(types: Iterable[str]) -> list:
    """Parametrized types of models, each skipped where transformers has not got it."""
    return [pytest.param(model_type, marks=known_type(model_type)) for model_type in types]


def known_type(*types: str):
    """The mark of a test of these types of models."""
    lacking = [model_type for model_type in types if model_type not in CONFIG_MAPPING]
    reason = f"transformers {transformers.__version__} has no {' and '.join(lacking)}"
    return pytest.mark.skipif(bool(lacking), reason=reason)


LOADS_PROCESSORS = Version(transformers.__version__) >= Version("5.18") or is_torchvision_available()
NO_PROCESSORS = f"transformers {transformers.__version__} loads no processor of images without torchvision"
loads_processors = pytest.mark.skipif(not LOADS_PROCESSORS, reason=NO_PROCESSORS)


def skip_what_loads_processors() -> None:
    """In this process, wherever a test does it; one whose own processes do it is marked `loads_processors`."""
    if not LOADS_PROCESSORS:
        transformers.AutoProcessor.from_pretrained = lambda *_, **__: pytest.skip(NO_PROCESSORS)
