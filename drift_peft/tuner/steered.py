"""What is steered: LoRA adapters and other trainable tensors, each with its part of the prior; and in what batches.

What steers a module lives on the module itself (`module.drift_peft[key]`), outside any state dict, so it follows the
module through copies, pickling and whatever wraps the model. All layers of one shape go through one batched call: their
part of the prior is stacked once, on the device of their parameters.
"""

from __future__ import annotations

import weakref
from collections.abc import Container, Iterator
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from ..checkpoints import module_kind, unwrapped
from ..keeping import LeftGradient, Registry
from ..prior import PriorVector, PriorWeight
from . import guidance
from .capture import Capture
from .config import DriftConfig
from .names import canonical_namer
from .settings import drift_alpha_of, refuse_unmeasured
from .sharding import gather, layout, shape

BATCH_ELEMENTS = 2**24  # of one batch at most: bounds a step's transient memory to some hundred MB


# In the order of wrapping. Reloading this module keeps what is steered.
STEERED: Registry[Steered] = globals().get("STEERED") or Registry()


class Steered:
    """Trainable parameters of one module that a part of the prior pulls.

    Attributes:
        name: canonical name of the weight that they are, or adapt.
        adapter: the adapter that they belong to.
        config: the settings, which may change between steps.
        prior: U [out, k] and Vh [k, in] in the prior's dtype and S [k] in fp32, or delta [n]; and for tensors that are
            trained themselves W0, what they started from. Empty for `drift_target="base"` without a prior.
    """

    factors: tuple[str, ...]  # names of the parameters

    def __init__(self, module: nn.Module, adapter: str, name: str, config: DriftConfig, prior: dict[str, Tensor]):
        self._module = weakref.ref(module)
        self.adapter, self.name, self.config, self.prior = adapter, name, config, prior
        self.stack: Stack | None = None

    def register(self) -> None:
        """Steer from the next step on, in place of whatever steered these parameters before."""
        steering = vars(self.module).setdefault("drift_peft", {})
        if self.key in steering:
            steering[self.key].release()
        steering[self.key] = self
        STEERED.add(self)

    def release(self) -> None:
        """Steer no more."""
        del self.module.drift_peft[self.key]
        STEERED.discard(self)

    def __getstate__(self):
        return {**self.__dict__, "_module": self.module, "stack": None}

    def __setstate__(self, state):  # a copied or unpickled module is steered like the one it came from
        self.__dict__.update(state, _module=weakref.ref(state["_module"]))
        STEERED.add(self)

    @property
    def module(self) -> nn.Module:
        return self._module()

    @property
    def alpha(self) -> float:
        """The strength here, before warm-up and decay."""
        return drift_alpha_of(self.config, self.name)

    @property
    def key(self) -> str:
        """What stands for these parameters in `module.drift_peft`."""
        return self.adapter

    @property
    def present(self) -> bool:
        """Neither freed nor deleted from its module since."""
        raise NotImplementedError

    def parameter(self, factor: str) -> nn.Parameter:
        raise NotImplementedError

    def among(self, parameters: Container[int]) -> tuple[str, ...]:
        """Names of those of its parameters whose id() is in `parameters`; none once they are gone."""
        module = self.module  # another thread may free it, or delete its adapter
        try:
            return () if module is None else tuple(f for f in self.factors if id(self.parameter(f)) in parameters)
        except KeyError:
            return ()

    def state(self) -> tuple:
        """What decides about its batch, beside its parameters."""
        return (self.alpha,)

    def batch_size(self) -> int:
        """How many of its shape go through one call at most."""
        return max(1, BATCH_ELEMENTS // shape(self.parameter(self.factors[-1])).numel())


class SteeredAdapter(Steered):
    """One adapter of one LoRA layer: W + s·B·A with A [r, in], B [out, r].

    LoRA on an embedding W [rows, width] adds s·(B·A)ᵀ, so it is steered by Δᵀ.
    """

    factors = ("A", "B")

    def __init__(self, layer: LoraLayer, adapter: str, name: str, config: DriftConfig, weight: PriorWeight | None):
        prior = {}
        if weight is not None:
            k = config.drift_rank or layer.r[adapter]
            U, S, Vh = weight.U[:, :k], weight.S[:k].float(), weight.Vh[:k]
            if adapter in layer.lora_embedding_A:
                U, Vh = Vh.mT.contiguous(), U.mT.contiguous()
            prior = {"U": U.clone(), "S": guidance.spectrum(S, config.spectrum_power), "Vh": Vh.clone()}
        super().__init__(layer, adapter, name, config, prior)
        self.rank = layer.r[adapter]  # whose directions of Δ these are
        self.capture: Capture | None = None
        self.start: tuple[float, float, torch.dtype] | None = None  # λ > 0, s and lora_B's dtype when it was started
        if adapter in layer.lora_embedding_A or isinstance(layer, ParamWrapper):
            refuse_unmeasured(config, name)

    def register(self) -> None:
        super().register()
        if self.config.drift_norm == "weight" and self.alpha:
            self.capture = Capture(self.name, self.parameter, self.prior, self.config.drift_sketch)
            self.capture.attach(self.module, self.adapter)

    def release(self) -> None:
        super().release()
        if self.capture is not None:
            self.capture.remove()

    @property
    def present(self) -> bool:
        layer = self.module
        return layer is not None and (self.adapter in layer.lora_A or self.adapter in layer.lora_embedding_A)

    def parameter(self, factor: str) -> nn.Parameter:
        return lora_factor(self.module, factor, self.adapter)

    @property
    def scaling(self) -> float:
        return self.module.scaling[self.adapter]

    def starts(self, B: Tensor) -> Tensor:
        """lora_B as the `drift` start fills it, λ·U_r diag(S_r)/(s·c) [out, r], in B's dtype on the CPU; λ > 0."""
        self.start = self.config.drift_start, self.scaling, B.dtype
        return self._start_B()

    def at_start(self, B: Tensor) -> bool:
        """Is this lora_B, as it may be saved or loaded, what the start has left? True of what is not here in full."""
        if self.start is None:
            return not B.any()
        start = self._start_B().to(B.dtype)
        return B.shape != start.shape or torch.equal(B.cpu(), start)

    def _start_B(self) -> Tensor:
        share, s, dtype = self.start
        U, S, Vh = (self.prior[key].cpu().float() for key in ("U", "S", "Vh"))
        B_star = share * guidance.start_targets(U, S, Vh, S.new_tensor(float(s)))[1][:, : self.rank]
        return torch.cat([B_star, U.new_zeros(len(U), self.rank - B_star.shape[1])], dim=1).to(dtype)

    @property
    def others(self) -> list[str]:
        """The other adapters that act on this layer beside it now; none beside one that is not active."""
        layer = self.module
        if self.adapter not in layer.active_adapters:
            return []
        return [a for a in layer.active_adapters if a != self.adapter and a in layer.r]

    def state(self) -> tuple:
        layer = self.module
        if layer is None:  # freed, and what steered it not yet
            return ()
        active = layer.active_adapter
        return self.alpha, active if isinstance(active, str) else tuple(active), len(layer.r)

    def batch_key(self) -> tuple:
        A, B, r = self.parameter("A"), self.parameter("B"), self.module.r[self.adapter]
        if len(shape(A)) != 2:
            raise RuntimeError(
                f"The adapter of {self.name} is flattened: guidance under FSDP1 is not available; use fully_shard "
                "(FSDP2), DDP or one GPU."
            )
        if r != self.rank:
            raise RuntimeError(
                f"The adapter of {self.name} had rank {self.rank} when its guidance was made, and has {r} now: with "
                "EVA, set rho=1.0, which keeps the ranks, or save the adapter and load it for training with "
                "DriftConfig.from_pretrained."
            )
        if shape(A)[0] != r * getattr(self.module, "num_experts", 1):  # of PEFT's target_parameters, one for each
            raise RuntimeError(
                f"The adapter of {self.name} has rank {r} but {shape(A)[0]} rows: prepare_model_for_compiled_hotswap "
                f"pads it (call that after training, or with target_rank={r}), or one of another rank was swapped in."
            )
        others = tuple(layout(lora_factor(self.module, factor, a)) for a in self.others for factor in "AB")
        return layout(A), layout(B), others


class SteeredTensor(Steered):
    """One tensor that is trained itself: a bias, a norm, a head saved with the adapter, or a fully trained weight."""

    factors = ("W",)

    def __init__(
        self,
        module: nn.Module,
        adapter: str,
        attribute: str,
        name: str,
        config: DriftConfig,
        weight: PriorWeight | PriorVector | None,
        W0: Tensor | None,
    ):
        prior = {} if W0 is None else {"W0": W0}
        if isinstance(weight, PriorWeight):
            k = config.drift_rank
            S = guidance.spectrum(weight.S[:k].float(), config.spectrum_power)
            prior |= {"U": weight.U[:, :k].clone(), "S": S, "Vh": weight.Vh[:k].clone()}
        elif weight is not None:
            prior |= {"delta": weight.delta.clone()}
        super().__init__(module, adapter, name, config, prior)
        self.attribute = attribute

    @property
    def key(self) -> str:
        return self.attribute

    @property
    def present(self) -> bool:
        return self.module is not None

    def parameter(self, factor: str) -> nn.Parameter:
        return getattr(self.module, self.attribute)

    def batch_key(self) -> tuple:
        return (layout(self.parameter("W")),)


class Stack:
    """The prior of L things of one shape, stacked on their parameters' device.

    `prior` holds U [L, out, k], S [L, k], Vh [L, k, in] or delta [L, n], and W0 [L, …]; `norm` [L] is ‖Δ_r‖. What the
    last step saw stands here for telemetry: `measured` is ‖g‖, ‖D‖, ⟨g, D⟩ and c of g̃ = g − c·D, each [factors, L].
    """

    def __init__(self, batch: list[Steered], device: torch.device):
        self.members = [weakref.ref(s) for s in batch]
        self.device = device
        self.prior = {key: gather([s.prior[key].to(device) for s in batch]) for key in batch[0].prior}
        for i, steered in enumerate(batch):  # views from now on: the prior is in memory once
            steered.prior.update({key: stacked[i] for key, stacked in self.prior.items()})
            steered.stack = self
        self.norm: Tensor | None = None
        if "U" in self.prior:
            U, S, Vh = (self.prior[key].float() for key in ("U", "S", "Vh"))
            self.norm = guidance.gram_norm(U, S, Vh)
        elif "delta" in self.prior:
            self.norm = torch.linalg.vector_norm(self.prior["delta"].float(), dim=-1)
        self.measured: tuple[Tensor, ...] | None = None
        self.biased: dict[tuple[str, ...], LeftGradient] = {}  # by which of the factors an optimizer trains
        self._scaling: list[tuple[dict[str, float], str]] = []  # where each layer keeps that of its adapters
        self.scalings: list[float] = []
        self.s: Tensor | None = None

    def last_step(self) -> tuple[Tensor, Tensor] | None:
        """cos(g, D) and ‖g̃ − g‖/‖g‖, both [L], means over the factors; None before the first step."""
        if self.measured is None:
            return None
        g_norm, D_norm, inner, c = self.measured
        ratio = torch.where(g_norm > 0, c * D_norm / g_norm, 0.0)
        return guidance.cosine(g_norm, D_norm, inner).mean(0), ratio.mean(0)

    def scaling(self, dtype: torch.dtype) -> Tensor:
        """s [L]; copied to the device, and waited for, only when a scaling has changed."""
        if not self._scaling:
            self._scaling = [(s.module.scaling, s.adapter) for s in (member() for member in self.members)]
        scalings = [float(of_layer[adapter]) for of_layer, adapter in self._scaling]  # a hot swap writes into tensors
        if self.s is None or self.s.dtype != dtype or scalings != self.scalings:
            self.scalings, self.s = scalings, torch.tensor(scalings, device=self.device, dtype=dtype)
        return self.s

    @classmethod
    def of(cls, batch: list[Steered], device: torch.device) -> Stack:
        stack = batch[0].stack
        same = stack is not None and stack.device == device and len(stack.members) == len(batch)
        if same and all(member() is steered for member, steered in zip(stack.members, batch, strict=True)):
            return stack
        return cls(batch, device)


# What there is to steer in a model


def all_steered(model: nn.Module) -> list[Steered]:
    """Everything of a model that is steered, in module order, whether it is active or not."""
    # vars: PEFT's wrapper of a module to save passes on its copy's attributes, and that copy comes by itself.
    return [s for module in model.modules() for s in vars(module).get("drift_peft", {}).values() if s.present]


def settings_of(model: PeftModel, adapter: str) -> DriftConfig | None:
    """What steers an adapter: its own DriftConfig, or the settings that `guide` was given. None of plain LoRA, and of
    other types, whose modules to save `guide` may steer: a DriftConfig cannot describe these."""
    if isinstance(config := model.peft_config[adapter], DriftConfig):
        return config
    if not isinstance(config, LoraConfig):
        return None
    return next((s.config for s in all_steered(model) if s.adapter == adapter), None)


def steered_of(model: nn.Module) -> list[Steered]:
    """The same of the active adapters; and of the model's own weights where PEFT has not frozen them."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    idle = {adapter for layer in layers for adapter in layer.r if adapter not in layer.active_adapters}
    steered = [s for s in all_steered(model) if s.adapter not in idle]
    return [s for s in steered if s.adapter or not layers or s.parameter(s.factors[0]).requires_grad]


def lora_factor(layer: LoraLayer, factor: str, adapter: str) -> nn.Parameter:
    """lora_A [r, in] or lora_B [out, r] of an adapter, on a linear layer or an embedding."""
    if adapter in layer.lora_embedding_A:
        return getattr(layer, f"lora_embedding_{factor}")[adapter]
    return getattr(layer, f"lora_{factor}")[adapter].weight


def lora_layers(model: nn.Module, adapter: str | None = None) -> Iterator[tuple[str, LoraLayer, str]]:
    """(weight name, layer, adapter) of every LoRA layer, in module order. The name is the canonical one of a
    language-model weight, and the model's own of any other, which no prior holds."""
    canonical = canonical_namer(model)
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            weight = unwrapped(f"{name}.{getattr(layer, 'parameter_name', 'weight')}")  # target_parameters name theirs
            for a in layer.active_adapters if adapter is None else [adapter]:
                if a in layer.lora_A or a in layer.lora_embedding_A:
                    yield canonical(weight) or weight, layer, a


class TrainedTensor(NamedTuple):
    """A tensor of the language model that is trained itself.

    `start` is what it was before training where the model keeps that, else None; `owner` is the adapter whose copy of a
    module to save it belongs to, None where it is the model's own.
    """

    name: str  # canonical
    module: nn.Module
    attribute: str
    start: Tensor | None
    owner: str | None


def trainable_tensors(model: nn.Module, adapter: str | None = None) -> Iterator[TrainedTensor]:
    """The language model's trainable tensors that are no LoRA factors, in module order.

    Of modules to save, which may contain others, these are all in the copies of `adapter`, active or not; of every
    active adapter if None.
    """
    canonical_name, unused = canonical_namer(model), []
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            if any(active in module.modules_to_save for active in module.active_adapters):
                unused.append(f"{name}.original_module.")
            for owner, copied in module.modules_to_save.items():
                for path, parameter in copied.named_parameters():
                    inside, _, attribute = path.rpartition(".")
                    trains = parameter.requires_grad if adapter is None else owner == adapter
                    if trains and (canonical := canonical_name(f"{name}.{path}")):
                        start = module.original_module.get_parameter(path).detach()
                        yield TrainedTensor(canonical, copied.get_submodule(inside), attribute, start, owner)
        elif ".modules_to_save." not in name and not isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            for attribute, parameter in module.named_parameters(recurse=False):
                canonical = canonical_name(f"{name}.{attribute}")
                used = parameter.requires_grad and not f"{name}.".startswith(tuple(unused))
                if used and canonical and module_kind(canonical):
                    yield TrainedTensor(canonical, module, attribute, None, None)
