"""Does this prior belong to this model, and what of it does it steer? Answered before anything is touched."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from transformers import PreTrainedModel

from ..arguments import shortened
from ..checkpoints import EMBEDDING, HEAD, past_adapters, says_tied, shared_weights, unwrapped
from ..prior import FINGERPRINT_TOLERANCE, ROUNDING_TOLERANCE, MergedDelta, ReasoningPrior, read_merge
from ..warn import warn
from .config import DriftConfig
from .names import canonical_namer
from .settings import check_patterns_used, is_guided
from .sharding import shape, values, whole
from .steered import SteeredTensor, all_steered

LISTED = 20  # modules that an error spells out
GONE_ON = (
    " If you have trained them further, the pull begins anew here, with all of Δ: to go on, call guide() on the base, "
    "and load what was trained afterwards."
)
PREDICTION_TOLERANCE = 0.02  # of what merging adds to it: U and Vh are stored in bf16


def check_fit(
    model: nn.Module, prior: ReasoningPrior | None, config: DriftConfig, targets: dict[str, int], tensors: Iterable[str]
) -> None:
    """Refuse a prior of another model, and report targets that have no Δ.

    A prior belongs to the model that it was built for, and to that model with a part of its Δ merged in, if the
    configuration says so (`prior.MergedDelta`) and the weights bear it out.

    Args:
        model: the model, adapted already or not; its base weights may be quantized.
        prior: what shall steer it; None where nothing pulls toward an expert.
        config: the settings of the guidance; `merged` is set here.
        targets: names, as of `lora_layers`, of the parameters that are (or will be) adapted -> their adapter's rank.
        tensors: canonical names of the tensors that are (or will be) trained themselves.

    Raises:
        ValueError: weights of the prior are missing here, have another shape or another fingerprint; no target has a Δ,
            or nothing is left of it after merging; `factors` lacks a target for some row of lora_A; or a setting speaks
            of weights that are not steered.
    """
    if prior is None:
        config.merged = read_merge(getattr(model, "config", None))
        return check_patterns_used(config, [*targets, *tensors])
    steered, unsteered = [name for name in targets if name in prior], [name for name in targets if name not in prior]
    if not targets and config.target_modules:
        named = f"target_modules={config.target_modules!r} names no module of this {type(model).__name__}"
        if config.modules_to_save:
            named += f" outside modules_to_save={config.modules_to_save!r}, where PEFT adapts nothing"
        raise ValueError(f"{named}: name others, or leave target_modules=None to adapt exactly what the prior covers.")
    modules = fitting_modules(model, prior)
    tensors = [name for name in tensors if name in prior]
    if not steered and not tensors:
        if not unsteered:
            raise ValueError(f"Nothing that is trained here has a Δ in the prior '{prior.source}': it steers nothing.")
        raise ValueError(
            f"None of the {len(unsteered)} targeted modules, such as {unsteered[0].removesuffix('.weight')}, has a Δ "
            f"in the prior '{prior.source}': leave target_modules=None to adapt exactly what the prior covers."
        )
    if config.drift_target == "factors":
        for name in steered:
            if (rank := len(prior[name].S)) < targets[name]:
                raise ValueError(
                    f"drift_target='factors' gives each of the {targets[name]} rows of lora_A its own target, but "
                    f"the prior has rank {rank} for {name}: build it with a higher rank, or lower r."
                )
    check_patterns_used(config, steered + tensors)
    if config.drift_start and not any(is_guided(config, name) for name in steered):
        raise ValueError(
            f"drift_start={config.drift_start} puts a part of Δ into LoRA factors, but none of them is steered here: "
            f"leave it out, or steer some, with another drift_modules than {config.drift_modules!r}."
        )
    if unsteered:
        warn(
            f"{len(unsteered)} targeted modules have no Δ in the prior and are trained as plain LoRA, not steered: "
            f"{', '.join(name.removesuffix('.weight') for name in unsteered[:3])}{', …' if len(unsteered) > 3 else ''}."
        )
    begun, held = _begun_with(model, modules, prior), bool(tensors) and config.drift_target != "delta"
    config.merged = merged = begun.merged if begun else check_fingerprint(model, modules, prior, held)
    guided = [name for name in steered + tensors if is_guided(config, name)]
    taken = [name for name in guided if config.absorbed(name)]
    if taken and len(taken) == len(guided):
        raise ValueError(
            f"The base is {merged.words}, so nothing is left of Δ to steer toward: train with drift_alpha=0 and "
            'without drift_start, which is plain LoRA, hold it there with drift_scale="decoupled" and '
            'drift_target="base", or merge less.'
        )
    if taken:
        warn(
            f"The base is {merged.words}, which is all of Δ in {len(taken)} of {len(guided)} weights, such as "
            f"{taken[0]}: these are not steered, and trained plainly."
        )


def fitting_modules(model: nn.Module, prior: ReasoningPrior) -> dict[str, nn.Module]:
    """Canonical name of each weight or bias in the prior -> the base module that holds it: of what PEFT has wrapped,
    the module as it was.

    Raises:
        ValueError: weights of the prior are missing here, or have another shape.
    """
    canonical_name = canonical_namer(model)
    modules = {}
    for name, module in model.named_modules():
        if ".base_layer" in name or ".modules_to_save." in name:  # a copy's wrapper comes before the module as it was
            continue
        for parameter in ("weight", "bias"):
            canonical = canonical_name(f"{name}.{parameter}")
            if canonical in prior and _has(module, parameter):
                modules[canonical] = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    missing = [name for name in prior if name not in modules]
    if missing:
        raise ValueError(
            f"The prior '{prior.source}' was built for another model: {len(missing)} of its {len(prior)} weights, "
            f"such as {missing[0]}, are not in this one; build a prior for this base with build_prior."
        )
    for canonical, module in modules.items():
        here = _shape(module, canonical)
        stored = prior.metadata["weights"][canonical]["shape"]
        if here != stored:
            raise ValueError(
                f"The prior '{prior.source}' was built for another model: {canonical} is {stored} there and {here} "
                "here; build a prior for this base with build_prior."
            )
    return modules


def _begun_with(model: nn.Module, modules: dict[str, nn.Module], prior: ReasoningPrior) -> DriftConfig | None:
    """The settings under which this prior steers base weights that are trained themselves already: it was compared with
    them before they moved."""
    trained = (s for s in all_steered(model) if isinstance(s, SteeredTensor) and s.module is modules.get(s.name))
    return next((s.config for s in trained if s.config.prior_sha256 == prior.sha256), None)


@torch.no_grad()
def check_fingerprint(
    model: nn.Module, modules: dict[str, nn.Module], prior: ReasoningPrior, held: bool = False
) -> MergedDelta | None:
    """Compare u_iᵀ·W_base·v_i with the values stored when the prior was built; quantization moves them only little.

    A base that says it is W_base + λΔ has u_iᵀ·W_base·v_i + λ·u_iᵀ·Δ·v_i. If it is nearer to the stored values
    themselves, the prior was built for the merged base, and nothing was taken from its Δ.

    Args:
        modules: of `fitting_modules`.
        held: weights that are trained themselves will be measured against what they are now.

    Returns:
        what the base has taken in of Δ, if it has.

    Warns:
        UserWarning: nothing is quantized here, and yet they differ by more than rounding explains.

    Raises:
        ValueError: they are another base's.
    """
    claim = read_merge(getattr(model, "config", None))
    measured = _measure(model, modules, prior, claim)
    return claim if measured is None else _judge(measured, prior, claim, held)


class _Measured(NamedTuple):
    """Norms of what u_iᵀ·W·v_i are here, less what they were when the prior was built."""

    off: float
    off_merged: float  # less what merging has added, too, if the base says so
    slack: float  # of the latter
    size: float  # the norm of what they were
    exact: bool  # nothing is quantized here
    adapter_inside: bool  # a guided adapter was merged in memory

    @property
    def bears_out(self) -> bool:
        """Whether the base is nearer to what it says it is."""
        return self.off_merged < self.off

    @property
    def share(self) -> float:
        return min(self.off, self.off_merged) / self.size

    def within(self, tolerance: float) -> bool:
        slack = self.slack if self.bears_out else 0.0
        return min(self.off, self.off_merged) <= tolerance * self.size + slack


def _measure(
    model: nn.Module, modules: dict[str, nn.Module], prior: ReasoningPrior, claim: MergedDelta | None
) -> _Measured | None:
    """None before the weights are loaded."""
    fingerprints, predictions, measured, exact = [], [], [], True
    for name, U, Vh, stored in prior.probes():
        tensors = [*modules[name].parameters(), *modules[name].buffers()]
        if any(tensor.device.type == "meta" for tensor in tensors):
            continue
        with whole(tensors):
            measured.append(weight_products(model, modules[name], U, Vh))
            exact &= _is_exact(modules[name], tensors)
        fingerprints.append(stored)
        predictions.append(torch.zeros_like(stored) if claim is None else claim.moved(prior, name, U, Vh))
    if not measured:
        return None
    stored, added, here = map(torch.cat, (fingerprints, predictions, measured))
    return _Measured(
        off=(here - stored).norm().item(),
        off_merged=(here - stored - added).norm().item(),
        slack=PREDICTION_TOLERANCE * added.norm().item(),
        size=stored.norm().item(),
        exact=exact,
        adapter_inside=any("drift_merged" in vars(module) for module in model.modules()),
    )


def _judge(measured: _Measured, prior: ReasoningPrior, claim: MergedDelta | None, held: bool) -> MergedDelta | None:
    """`check_fingerprint` of what was measured."""
    fits, same = measured.within(FINGERPRINT_TOLERANCE), measured.within(ROUNDING_TOLERANCE)
    if measured.adapter_inside and not same:
        message = (
            f"A guided adapter was merged into this base in memory, and the fingerprint of the prior '{prior.source}' "
            f"is off by {measured.share:.1%} now: a part of Δ is in these weights, and the pull would begin anew with "
            "all of Δ; go on with one adapter, or save this model and build a prior for it with build_prior."
        )
        if not fits:
            raise ValueError(message)
        warn(message)
    elif fits and measured.exact and not same:
        claimed = "" if claim is None else f", and it is said to be {claim.words}"
        own, gone_on = ("", GONE_ON) if held else (", or you have trained them further", "")
        warn(
            f"The prior '{prior.source}' was built for slightly other base weights: its fingerprint is off by "
            f"{measured.share:.1%} on this base, which rounding does not explain{claimed}. Unless its weights were "
            f"quantized once{own}, build a prior for it with build_prior.{gone_on}"
        )
    if not fits and claim is not None:
        raise ValueError(
            f"The base says that it is {claim.words}, but its weights are not what the prior '{prior.source}' makes of "
            f"that: its fingerprint is off by {measured.off_merged / measured.size:.0%}; name the prior of this Δ, or "
            "build one for this base with build_prior."
        )
    if not fits:
        raise ValueError(
            f"The prior '{prior.source}' was built for other base weights: its fingerprint is off by "
            f"{measured.share:.0%} (quantization explains up to {FINGERPRINT_TOLERANCE:.0%}); build a prior "
            "for this base with build_prior."
        )
    if not measured.bears_out:
        return None
    if own := next((key for key in ("parents", "gated") if prior.metadata.get(key)), None):
        how = "was combined" if own == "parents" else "is gated"
        raise ValueError(
            f"The base is {claim.words}, and the prior '{prior.source}' {how}, so that is no part of its Δ: take "
            f"the prior as build_prior made it, or {claim.base['id']} as the base."
        )
    return claim


def _is_exact(module: nn.Module, tensors: list[Tensor]) -> bool:
    """Whether a module computes with its weights as they are, unquantized; in doubt not.

    A linear layer of another class may quantize while it computes, and a tensor of another type may stand for a
    quantized one.
    """
    plain = all(type(t) in (nn.Parameter, Tensor) and t.is_floating_point() and t.itemsize > 1 for t in tensors)
    return plain and (type(module) is nn.Linear or not hasattr(module, "in_features"))


@torch.no_grad()
def weight_products(model: nn.Module, module: nn.Module, U: Tensor, Vh: Tensor) -> Tensor:
    """u_iᵀ·W·v_i [k] in fp32, on the CPU, of the columns of U [out, k] and the rows of Vh [k, in]; W is a module's
    weight in this model, however it is stored."""
    sharded = {n: values([p])[0] for n, p in module.named_parameters() if isinstance(p, DTensor)}  # of FSDP2
    weight = sharded.get("weight", getattr(module, "weight", None))
    Vh = Vh.to(next(iter([*module.parameters(), *module.buffers()])).device)
    if not hasattr(module, "in_features"):
        WV = Vh.to(weight).float() @ weight.float().mT  # (W·v_i)ᵀ [k, out]
    else:  # as a linear layer's own forward pass computes them, so that it does not matter how W is stored
        plain = isinstance(weight, Tensor) and weight.is_floating_point()
        dtype = weight.dtype if plain else getattr(model, "dtype", torch.float32)  # what quantized layers are given
        # In 16 bits a sum with a large bias, such as Qwen's, would round W·v away.
        bias = sharded.get("bias", getattr(module, "bias", None))
        without = {"bias": torch.zeros_like(bias)} if isinstance(bias, Tensor) else {}
        WV = functional_call(module, sharded | without, (Vh.to(dtype),)).float()
    return (U.to(WV).mT * WV).sum(-1).cpu()


def targeted_modules(model: nn.Module, config: LoraConfig) -> set[str]:
    """Names of the modules that `target_modules` names, as PEFT reads it: nothing inside what is adapted already."""
    names, adapted = set(), []
    for name, module in model.named_modules():  # what contains another one comes first
        if name and not name.startswith(tuple(adapted)) and check_target_module_exists(config, name):
            names.add(name)
        if isinstance(module, BaseTunerLayer):
            adapted.append(f"{name}.")
    return names


def adapted_modules(model: nn.Module, adapters: Iterable[str]) -> set[str]:
    """Names of the modules that these LoRA adapters adapt, without those of PEFT's target_parameters."""
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, LoraLayer)]
    return {n for n, layer in layers if not isinstance(layer, ParamWrapper) and any(a in layer.r for a in adapters)}


def refuse_other_targets(model: nn.Module, targets: str | Iterable[str], intended: set[str], adapted: set[str]) -> None:
    """Refuse adapters on other modules than `targets`, the user's target_modules, names.

    Raises:
        ValueError: PEFT has made something else of it, as of the configs of some mixture-of-experts models.
    """
    if intended == adapted:
        return
    differences = {"leaves out": intended - adapted, "adds": adapted - intended}
    done = " and ".join(f"{verb} {shortened(sorted(names), LISTED)}" for verb, names in differences.items() if names)
    given = repr(targets) if isinstance(targets, str) else f"[{shortened(sorted(targets), LISTED)}]"
    raise ValueError(
        f"target_modules={given} names {len(intended)} modules of this {type(model).__name__}, but PEFT {done}: name "
        "them as language_model_targets(model) does, or leave target_modules=None."
    )


def warn_of_unused(targets: str | Iterable[str], layers: int | Iterable[int] | None, intended: set[str]) -> None:
    """Name what target_modules and layers_to_transform list beside what they adapt: PEFT passes over it in silence."""
    parts = {part for name in intended for part in name.split(".")}
    names = () if isinstance(targets, str) else sorted(targets)
    indices = () if layers is None or isinstance(layers, int) else sorted(layers)
    if unused := [name for name in names if not any(f".{module}".endswith(f".{name}") for module in intended)]:
        warn(f"target_modules names {shortened(unused, LISTED)} too, and nothing of this name is adapted.")
    if unused := [str(index) for index in indices if str(index) not in parts]:
        warn(f"layers_to_transform names {shortened(unused, LISTED)} too, and nothing is adapted in such a layer.")


def refuse_tied_adapters(model: nn.Module, config: LoraConfig, names: Iterable[str]) -> None:
    """Refuse what PEFT makes of adapters on embedding or head with ensure_weight_tying.

    Args:
        names: of the modules that the user means, or that PEFT has adapted.

    Raises:
        ValueError: both ends are adapted by the same factors.
    """
    if not getattr(config, "ensure_weight_tying", False) or not isinstance(model, PreTrainedModel):
        return
    canonical = canonical_namer(model)
    if {canonical(f"{name}.weight") for name in names} & {EMBEDDING, HEAD} and says_tied(model.config):
        raise ValueError(
            "ensure_weight_tying=True has PEFT adapt embedding and head by the same factors, which guidance would pull "
            "twice: leave it out, or train the weight itself with modules_to_save=['embed_tokens']."
        )


def check_weights(model: nn.Module, parameters: Iterable[str]) -> None:
    """Refuse adapters on weights that several modules hold: trained in one of these, they are merged into all. Warn of
    those that the model may pass over."""
    parameters = [*parameters]
    if past := past_adapters(model, [name.removesuffix(".weight") for name in parameters]):
        warn(
            f"Mamba's fused kernels read {len(past)} targeted weights past an adapter, such as {past[0]}'s: "
            "where these kernels are installed, the adapter never moves."
        )
    if shared := sorted(shared_weights(model).intersection(map(unwrapped, parameters))):
        raise ValueError(
            f"{len(shared)} of the weights that are adapted, such as {shared[0]}, are shared with other modules, which "
            "merging would change too: leave them out of target_modules."
        )


def _has(module: nn.Module, parameter: str) -> bool:
    """Not every quantized layer calls what it holds `weight`."""
    return getattr(module, parameter, None) is not None or (parameter == "weight" and hasattr(module, "in_features"))


def _shape(module: nn.Module, canonical: str) -> list[int]:
    """Shape of a module's weight or bias; of a weight that is packed in 4 bit, the shape it stands for."""
    if canonical.endswith(".weight") and hasattr(module, "out_features"):
        return [module.out_features, module.in_features]
    return list(shape(getattr(module, canonical.rpartition(".")[2])))
