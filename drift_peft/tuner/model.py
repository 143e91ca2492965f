"""DriftModel: PEFT's LoraModel whose layers know the prior that steers them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

from peft import PeftModel, mixed_model, peft_model
from peft.tuners.lora import LoraConfig, LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from ..checkpoints import (
    Decoder,
    auto_class_of,
    convert_peft_config_for_transformers,
    language_model_targets,
    quantization_of,
)
from ..keeping import keep_4bit_differentiable, keepings_of, warn_of_lost_passes
from ..prior import ReasoningPrior, origins_of
from ..warn import warn
from .attach import refuse_meta, steer
from .compatibility import (
    adapted_modules,
    check_fit,
    check_weights,
    refuse_other_targets,
    refuse_tied_adapters,
    targeted_modules,
    warn_of_unused,
)
from .config import DriftConfig
from .modules_to_save import check_saved, tensors_to_train
from .names import canonical_namer
from .patches import in_place_of
from .settings import refuse_unmeasured
from .sharding import values
from .start import start_adapters
from .steered import SteeredAdapter, all_steered, lora_layers, steered_of, trainable_tensors
from .unguided import warn_of_moved

ZERO_STARTS = ("drift", True, "gaussian", "eva")  # with lora_B = 0, or as much of Δ as drift_start says
# Of these, PEFT adds the heads to the list in the user's config, and only after it has made the LoRA layers.
HEADS_LATER = ("TOKEN_CLS", "QUESTION_ANS")


class DriftModel(LoraModel):
    """What `get_peft_model(model, DriftConfig(…))` makes. The forward pass is PEFT's own; gradients are guided.

    W + s·B·A with A [r, in] and B [out, r] is biased as DRIFT biases W (arXiv 2510.15050, equations 3 and 4): a
    direction X [out, in] in the space of the weight reaches the factors by the chain rule, as s·Bᵀ·X and s·X·Aᵀ. Plain
    `LoraConfig`s pass through as in LoraModel, in models of their own and beside a DriftConfig.

    Raises:
        ValueError: the prior belongs to another model, or none of the targets has a Δ. The model is then untouched.

    Example:
        >>> model = get_peft_model(vlm, DriftConfig(prior="prior.safetensors", r=8, task_type="CAUSAL_LM"))
        >>> type(model.base_model).__name__
        'DriftModel'
    """

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        """PEFT's own; what the settings guide is then registered, and the adapter gets its start.

        Raises:
            ValueError: as of the class.
        """
        config = self.peft_config[adapter_name]
        trains = isinstance(config, DriftConfig) and not config.inference_mode
        if trains:  # before anything is forgotten: what is refused stays as it is
            _refuse_unready(model, adapter_name, kwargs.get("low_cpu_mem_usage", False))
        _forget(model.modules(), adapter_name)  # one of this name may have been deleted, past this class even
        if not isinstance(config, DriftConfig):
            return super().inject_adapter(model, adapter_name, *args, **kwargs)
        loaded_by = auto_class_of(getattr(model, "config", None)).__name__
        if not trains:
            config.loaded_by = loaded_by
            if config.target_modules is None:
                config.target_modules = language_model_targets(model)
            return super().inject_adapter(model, adapter_name, *args, **kwargs)

        # A copy: what is filled in below belongs to this model, and the user may wrap another one with the same config.
        given, config = config, copy.deepcopy(config)
        config.loaded_by = loaded_by
        self.peft_config[adapter_name] = config
        config.steps_of_weights, config.drift_steps = config.drift_steps, 0  # no weights are there yet
        if config.task_type in HEADS_LATER:
            given.modules_to_save = config.modules_to_save = config.modules_to_save or []
        config.quantization = quantization_of(model)
        prior = None if config.prior is None else _open_prior(config)
        keep_4bit_differentiable(model)
        intended = _settle_targets(model, config, prior)
        check_saved(model, config, intended)
        other = _target_parameters(model, config)
        parameters = [*(f"{name}.weight" for name in sorted(intended)), *other]
        check_weights(model, parameters)
        canonical = canonical_namer(model)
        targets = {canonical(n) or n: _rank(config, n.removesuffix(".weight")) for n in parameters}
        check_fit(model, prior, config, targets, tensors_to_train(model, config, intended))
        embeddings = [f"{name}.weight" for name in sorted(intended) if _is_embedding(model.get_submodule(name))]
        for name in (canonical(name) or name for name in embeddings + other):
            if (prior is None or name in prior) and not config.absorbed(name):
                refuse_unmeasured(config, name)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except NotImplementedError as error:  # PEFT asks where the embedding is, to see what is tied
            raise ValueError(f"PEFT cannot adapt a {type(model).__name__}: {error}") from error
        refuse_other_targets(model, config.target_modules, intended, adapted_modules(model, [adapter_name]))
        tensors = [t for t in trainable_tensors(model, adapter_name) if config.bias != "none" or t.owner]
        adapters = steer(list(lora_layers(model, adapter_name)), tensors, prior, config, adapter_name)
        if config.init_lora_weights == "drift":
            start_adapters(adapters, prior)

    def _create_and_replace(self, lora_config, *args, **kwargs) -> None:
        if isinstance(lora_config, DriftConfig) and lora_config.init_lora_weights == "drift":
            # PEFT's layers refuse a start that they do not know; ours comes after them.
            lora_config = copy.copy(lora_config)
            lora_config.init_lora_weights = True
        super()._create_and_replace(lora_config, *args, **kwargs)

    def add_weighted_adapter(self, adapters: list[str], *args, **kwargs) -> None:
        """PEFT's own; the mixture is plain LoRA, whatever steered its parts."""
        configs = dict(self.peft_config)
        self.peft_config.update({name: c.to_lora() for name, c in configs.items() if isinstance(c, DriftConfig)})
        try:
            super().add_weighted_adapter(adapters, *args, **kwargs)
        finally:
            self.peft_config.update(configs)

    def _unload_and_optionally_merge(self, merge: bool = True, *args, **kwargs) -> nn.Module:
        modules = list(self.model.modules())  # LoRA layers are replaced; biases and modules to save stay in the model
        merged = {adapter for m in modules if isinstance(m, LoraLayer) for adapter in m.merged_adapters}
        merged |= {*(kwargs.get("adapter_names") or self.active_adapters)} if merge else set()
        toward = {s.adapter for s in all_steered(self.model) if s.alpha or s.config.drift_start}
        toward |= vars(self.model).get("drift_unguided", {}).keys()
        model = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        for adapter_name in self.peft_config:
            _forget(modules, adapter_name)
        if merged & toward:
            vars(model)["drift_merged"] = True  # which `check_fingerprint` finds
        return model

    def delete_adapter(self, adapter_name: str) -> None:
        modules = list(self.model.modules())  # copies of modules to save are removed
        super().delete_adapter(adapter_name)
        _forget(modules, adapter_name)


@in_place_of(mixed_model, "_check_config_compatible")  # what PEFT asks first
def _unmixed(check: Callable, config):
    """PEFT's models of mixed adapter types make their layers past DriftModel, so nothing there would be guided."""
    if isinstance(config, DriftConfig):
        raise ValueError(
            "DriftConfig is not guided beside other adapter types (mixed=True): leave out mixed=True, or use "
            "peft.LoraConfig for an adapter without guidance."
        )
    return check(config)


@in_place_of(LoraModel, "inject_adapter")
def _grown(inject_adapter: Callable, self: LoraModel, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
    """A model that PEFT made before this room was loaded becomes a DriftModel with its first DriftConfig."""
    if type(self) is LoraModel and isinstance(self.peft_config[adapter_name], DriftConfig):
        self.__class__ = DriftModel  # which has no state of its own
        return self.inject_adapter(model, adapter_name, *args, **kwargs)
    inject_adapter(self, model, adapter_name, *args, **kwargs)
    _warn_of_frozen(model, adapter_name, self.peft_config[adapter_name])


def _warn_of_frozen(model: nn.Module, adapter_name: str, config: LoraConfig) -> None:
    """What guide() steers of a model without adapters is trained no more once PEFT has frozen it."""
    frozen = [s for s in all_steered(model) if not s.adapter and not s.parameter(s.factors[0]).requires_grad]
    if frozen and not isinstance(config, DriftConfig) and not config.inference_mode:
        warn(
            f"guide() steered {len(frozen)} of this model's own weights, which PEFT has frozen now, and the adapter "
            f"'{adapter_name}' is not steered: call guide(model, prior) after get_peft_model."
        )


@in_place_of(LoraModel, "_load_from_state_dict")
def _noting_weights(
    load_from_state_dict: Callable, self: LoraModel, state_dict: dict[str, Tensor], prefix: str, *args, **kwargs
) -> None:
    """An adapter whose weights are loaded did not start where its config says."""
    for name, config in self.peft_config.items():
        loaded = {key: B for key, B in state_dict.items() if f".lora_B.{name}." in key or key.endswith(f"_B.{name}")}
        if loaded:
            config.weights_loaded = True
        # A start is loaded, too, to be spread over ranks.
        trained = _have_left(self, name, loaded, f"{prefix}{{}}.lora_B.{name}.weight")
        if trained and (steps := getattr(config, "steps_of_weights", None)) and not config.drift_steps:  # none yet
            config.drift_steps = steps
    load_from_state_dict(self, state_dict, prefix, *args, **kwargs)


def _warn_of_missed(model: PeftModel, adapter: str, weights: dict[str, Tensor]) -> None:
    guided = [s.config for s in all_steered(model) if s.adapter == adapter and s.alpha]
    missed = ["the guidance"] if guided and not any(int(c.drift_steps) or c.steps_before for c in guided) else []
    missed += ["keep()"] if any(kept.seen and not kept.stepped for kept in keepings_of(model)) else []
    config = model.peft_config[adapter]
    # The steps are those of TRL's reference adapters.
    copied = getattr(config, "weights_loaded", False) or getattr(config, "steps_of_weights", None)
    if not missed or getattr(config, "init_lora_weights", None) not in ZERO_STARTS or copied:
        return
    factors = {name: B for name, B in weights.items() if ".lora_B." in name}
    if _have_left(model, adapter, factors, "{}.lora_B.weight"):
        warn(
            f"The adapter '{adapter}' was trained, but {' and '.join(missed)} never ran: its optimizer does not call "
            "the step hooks of torch.optim, or trains copies of the parameters. Or it is a copy of the model that was "
            "trained, such as an average of its weights."
        )


def _have_left(model: nn.Module, adapter: str, factors: dict[str, Tensor], key: str) -> bool:
    """Is any of these lora_B no longer what its start has made it? `key` makes their keys of the modules' names."""
    names = {module: key.format(name) for name, module in model.named_modules()}
    steered = [s for s in all_steered(model) if s.adapter == adapter and isinstance(s, SteeredAdapter)]
    starts = {names[s.module]: s for s in steered}
    there = {name: values([B])[0] for name, B in factors.items() if not B.is_meta}
    return any(not starts[name].at_start(B) if name in starts else bool(B.any()) for name, B in there.items())


@in_place_of(peft_model, "get_peft_model_state_dict")
def _telling_unguided(
    get_state_dict: Callable, model: PeftModel, state_dict=None, adapter_name: str = "default", **kwargs
) -> dict[str, Tensor]:
    """What is saved. An adapter that moved without guidance is said loudly, not only stored."""
    weights = get_state_dict(model, state_dict, adapter_name, **kwargs)
    _warn_of_missed(model, adapter_name, weights)
    warn_of_moved(model.get_base_model(), adapter_name)
    warn_of_lost_passes(model)
    return weights


@in_place_of(PeftModel, "print_trainable_parameters")
def _with_steering(print_trainable: Callable, model: PeftModel) -> None:
    """How many of the adapted modules are steered, beside PEFT's count of parameters."""
    print_trainable(model)
    steered = [s for s in steered_of(model) if s.alpha]
    if not steered:
        return
    modules = {s.module for s in steered if isinstance(s, SteeredAdapter)}
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    adapted = sum(any(adapter in layer.r for adapter in layer.active_adapters) for layer in layers)
    tensors = sum(not isinstance(s, SteeredAdapter) for s in steered)
    suffix = f" || steered tensors: {tensors}" if tensors else ""
    print(f"steered modules: {len(modules)} of {adapted} adapted{suffix}")


def _settle_targets(model: nn.Module, config: DriftConfig, prior: ReasoningPrior | None) -> set[str]:
    """Put into the config what PEFT takes for the modules that are meant, and return their names."""
    layers = config.layers_to_transform
    if config.target_modules is None:
        canonical = canonical_namer(model)
        others = {canonical(name) for name in _target_parameters(model, config)}
        wanted = Decoder(model).projections.values() if prior is None else prior
        wanted = [name for name in wanted if name not in others]
        config.target_modules = language_model_targets(model, wanted, config.layers_to_transform)
        config.layers_to_transform = config.layers_pattern = None  # they are in there, and PEFT refuses both
    asked = config.target_modules
    intended = targeted_modules(model, _maybe_include_all_linear_layers(copy.copy(config), model))
    refuse_tied_adapters(model, config, intended)
    convert_peft_config_for_transformers(config, model, None)  # as PEFT does next
    _maybe_include_all_linear_layers(config, model)
    refuse_other_targets(model, asked, intended, targeted_modules(model, config))
    warn_of_unused(config.target_modules, layers, intended)
    return intended


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module.get_base_layer() if isinstance(module, BaseTunerLayer) else module, nn.Embedding)


def _target_parameters(model: nn.Module, config: DriftConfig) -> list[str]:
    """Names of the parameters that `target_parameters` adapts, as PEFT finds them."""
    wanted = config.target_parameters or ()
    return [name for name, _ in model.named_parameters() if any(f".{name}".endswith(f".{key}") for key in wanted)]


def _refuse_unready(model: nn.Module, adapter: str, low_cpu_mem_usage: bool) -> None:
    """Refuse a model that is wrapped already, or whose weights are not there yet."""
    if isinstance(model, PeftModel) or any(adapter in m.r for m in model.modules() if isinstance(m, LoraLayer)):
        raise ValueError(
            "The model is wrapped already and has an adapter: give it a second one with model.add_adapter(name, "
            "config), or take the first one off with model.unload()."
        )
    if not low_cpu_mem_usage:
        refuse_meta(model)


def _forget(modules: Iterable[nn.Module], adapter: str) -> None:
    """Whatever steered an adapter of this name does not steer the next one."""
    for module in modules:
        for steered in [s for s in vars(module).get("drift_peft", {}).values() if s.adapter == adapter]:
            steered.release()


def _open_prior(config: DriftConfig) -> ReasoningPrior:
    try:
        prior = ReasoningPrior.load(config.prior)
    except FileNotFoundError as error:
        if config.prior_sha256 is None:
            raise
        raise FileNotFoundError(
            f"The prior '{config.prior}' that this adapter was trained with is not here: name it with "
            "DriftConfig.from_pretrained(folder, prior=…)."
        ) from error
    if config.prior_sha256 not in (None, prior.sha256):
        raise ValueError(
            f"The prior '{config.prior}' has changed since this adapter was trained (SHA-256 {prior.sha256[:12]}…, was "
            f"{config.prior_sha256[:12]}…): pass the old file, or accept this one with "
            "DriftConfig.from_pretrained(folder, prior=…)."
        )
    config.prior_sha256 = prior.sha256
    config.origins = origins_of(prior.metadata)
    return prior


def _rank(config: DriftConfig, module_name: str) -> int:
    """The rank that PEFT will give this module's adapter."""
    return config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), module_name), config.r)
