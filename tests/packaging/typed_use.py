"""The public names, used as a user's code would. `make lint` has a type checker read this; nothing runs it."""

from pathlib import Path
from typing import assert_type

from peft import LoraConfig, get_peft_model
from torch import nn

from drift_peft import (
    DriftConfig,
    DriftModel,
    KeepSet,
    ReasoningPrior,
    build_prior,
    guide,
    keep,
    language_model_targets,
    make_keep_set,
    merge_adapter,
    merge_baseline,
    telemetry,
    transplant,
)

VLM, EXPERT = "org/vlm", Path("expert")


def priors() -> None:
    prior = assert_type(build_prior(EXPERT, VLM, "prior.safetensors", rank=64, modules=["attn"]), ReasoningPrior)
    assert_type(build_prior(expert=EXPERT, base=VLM, output="p", energy=0.9, exist_ok=True), ReasoningPrior)
    assert_type(ReasoningPrior.load("user/prior"), ReasoningPrior)
    shares: dict[str, float] = {"a": 0.5, "b": 0.5}
    assert_type(ReasoningPrior.combine(shares, "c"), ReasoningPrior)
    assert_type(prior.truncate(8, "small.safetensors"), ReasoningPrior)
    assert_type(prior.as_lora(0.5, "adapter"), Path)


def adapters(vlm: nn.Module) -> None:
    config = DriftConfig(prior="prior.safetensors", r=16, lora_alpha=32, drift_alpha=0.3, task_type="CAUSAL_LM")
    assert_type(config.drift_alpha, float)
    lora: LoraConfig = config
    assert_type(DriftConfig.from_pretrained("adapter", drift_alpha=0.5), DriftConfig)
    tuner: type[nn.Module] = DriftModel
    targets = assert_type(language_model_targets(vlm), str | list[str])
    prior = ReasoningPrior.load("prior.safetensors")
    assert_type(guide(vlm, prior, drift_alpha=0.3), nn.Module)
    assert_type(telemetry(vlm), dict[str, float | int])
    print(lora, tuner, targets, get_peft_model)


def keep_sets(vlm: nn.Module) -> None:
    answers = assert_type(make_keep_set(VLM, "images/", "keep.safetensors", load_in_4bit=True), KeepSet)
    assert_type(keep(vlm, answers, every=2), nn.Module)
    assert_type(KeepSet.load("keep.safetensors"), KeepSet)


def merging() -> None:
    print(merge_adapter(VLM, "adapter", "merged", onto="dequantized", verify=True))
    print(merge_baseline("ties", EXPERT, VLM, "merged", reference="org/base"))
    print(transplant(EXPERT, VLM, "adapter", reference="org/base", rank=64, scale="auto"))
