"""When the guidance runs, and on what: once per optimizer step, on the LoRA layers that the optimizer trains.

One process-wide hook of torch.optim acts before every `step()`: there the gradient is accumulated over micro-batches
and synchronized between processes, and no training loop has to know of it. Gradients of all layers of one shape are
biased in one batched call. What a layer is steered by lives on the layer itself (`layer.drift[adapter]`), outside any
state dict, so it follows the layer through copies, pickling and whatever wraps the model.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Container, Iterable, Iterator

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from . import guidance
from .config import DriftConfig
from .naming import canonical_name, cross_attention_layers, module_kind
from .prior import PriorWeight, ReasoningPrior

# Every steered adapter of the process, in the order of wrapping, which is the same on all ranks. The entries belong to
# their layers; reloading this module keeps them.
_STEERED: weakref.WeakKeyDictionary[Steered, None] = globals().get("_STEERED") or weakref.WeakKeyDictionary()


class Steered:
    """One adapter of one LoRA layer, with the prior Δ_r = U diag(S) Vh that steers it.

    U [out, k] and Vh [k, in] keep the prior's dtype, S [k] is fp32; k is `drift_rank`, or the adapter's own rank.
    """

    def __init__(self, layer: LoraLayer, adapter: str, name: str, weight: PriorWeight, config: DriftConfig):
        k = config.drift_rank or layer.r[adapter]
        self._layer = weakref.ref(layer)
        self.adapter, self.name, self.config = adapter, name, config
        self.U, self.S, self.Vh = weight.U[:, :k].clone(), weight.S[:k].float().clone(), weight.Vh[:k].clone()
        self.stack: Stack | None = None

    def register(self) -> None:
        """Steer from the next step on, in place of whatever steered this adapter before."""
        self.layer.__dict__.setdefault("drift", {})[self.adapter] = self
        _STEERED[self] = None

    def __getstate__(self):
        return {**self.__dict__, "_layer": self.layer, "stack": None}

    def __setstate__(self, state):  # a copied or unpickled layer is steered like the one it came from
        self.__dict__.update(state, _layer=weakref.ref(state["_layer"]))
        _STEERED[self] = None

    @property
    def layer(self) -> LoraLayer:
        return self._layer()

    @property
    def A(self) -> Tensor:
        return self.layer.lora_A[self.adapter].weight

    @property
    def B(self) -> Tensor:
        return self.layer.lora_B[self.adapter].weight

    @property
    def scaling(self) -> float:
        return self.layer.scaling[self.adapter]

    @property
    def others(self) -> list[str]:
        """The other adapters that act on this layer now."""
        layer = self.layer
        return [a for a in layer.active_adapters if a != self.adapter and a in layer.lora_A]


class Stack:
    """U [L, out, k], S [L, k], Vh [L, k, in] and ‖Δ_r‖ [L] of L layers of one shape, on their parameters' device."""

    def __init__(self, batch: list[Steered], device: torch.device):
        self.members = [weakref.ref(s) for s in batch]
        self.device = device
        self.U = torch.stack([s.U.to(device) for s in batch])
        self.S = torch.stack([s.S.to(device) for s in batch])
        self.Vh = torch.stack([s.Vh.to(device) for s in batch])
        for i, steered in enumerate(batch):  # views from now on: the prior is in memory once
            steered.U, steered.S, steered.Vh, steered.stack = self.U[i], self.S[i], self.Vh[i], self
        self.delta_norm = guidance.gram_norm(self.U.float(), self.S, self.Vh.float())
        self.scalings: list[float] = []
        self.s: Tensor | None = None

    def scaling(self, batch: list[Steered], dtype: torch.dtype) -> Tensor:
        """s [L]; copied to the device, and waited for, only when a scaling has changed."""
        scalings = [s.scaling for s in batch]
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


BATCH_ELEMENTS = 2**24  # of lora_B in one batch at most: bounds a step's transient memory to some hundred MB


class Batch:
    """The factors of all layers of one shape as stacks in at least fp32: A [L, r, in], B [L, out, r], s [L].

    `trained` names those of the two factors that the optimizer updates.
    """

    def __init__(self, members: list[Steered], trained: tuple[str, ...]):
        self.members, self.config, self.trained = members, members[0].config, trained
        device = members[0].A.device
        self.dtype = torch.promote_types(members[0].A.dtype, torch.float32)
        stack = Stack.of(members, device)
        self.prior = [t.to(self.dtype) for t in (stack.U, stack.S, stack.Vh)]
        self.delta_norm = stack.delta_norm.to(self.dtype)
        self.A = torch.stack([m.A.detach() for m in members]).to(self.dtype)
        self.B = torch.stack([m.B.detach() for m in members]).to(self.dtype)
        self.s = stack.scaling(members, self.dtype)

    def direction(self) -> guidance.Direction:
        args = self.A, self.B, self.s, *self.prior
        if self.config.drift_target == "factors":
            return guidance.factors(self.A, self.B, *guidance.balanced_targets(*self.prior, self.s))
        if self.config.drift_target == "delta":
            return guidance.delta(*args, self.delta_norm)
        return guidance.residual(*args, self.delta_norm, *self._all_adapters())

    def bias_gradients(self, loss_scale: Tensor | float | None) -> None:
        direction, alpha = self.direction(), self.config.drift_alpha
        if self.config.drift_scale == "absolute" and loss_scale is not None:
            alpha = alpha * loss_scale
        for factor in self.trained:
            grads = [getattr(m, factor).grad for m in self.members]
            D, floor = getattr(direction, factor), getattr(direction, f"floor_{factor}")
            g = torch.stack(grads).to(self.dtype)
            biased = guidance.bias(g, D, floor, direction.share, alpha, self.config.drift_scale)
            torch._foreach_copy_(grads, list(biased.unbind()))

    def pull_factors(self, lr: dict[int, float | Tensor | None], applied: Tensor | float) -> None:
        targets = guidance.start_targets(*self.prior, self.s)
        for factor, value, target in zip("AB", (self.A, self.B), targets, strict=True):
            if factor in self.trained:
                parameters = [getattr(m, factor) for m in self.members]
                moves = list((self.config.drift_alpha * applied * (target - value)).unbind())
                rates = [lr[id(p)] for p in parameters]
                if None in rates:
                    raise RuntimeError(
                        "drift_scale='decoupled' moves by the learning rate, and this optimizer's parameter groups "
                        "name none ('lr'): give it one, or use another drift_scale."
                    )
                torch._foreach_mul_(moves, rates[0] if all(rate is rates[0] for rate in rates) else rates)
                torch._foreach_add_(moves, list(value.unbind()))
                torch._foreach_copy_([p.data for p in parameters], moves)

    def _all_adapters(self) -> tuple[Tensor, Tensor] | tuple[()]:
        """A_all [L, R, in] and B_all [L, out, R] with the scaling in it, where further adapters are active."""
        if not self.members[0].others:
            return ()
        A, B = [self.A], [self.s[:, None, None] * self.B]
        for i in range(len(self.members[0].others)):
            layers = [(m.layer, m.others[i]) for m in self.members]
            A.append(torch.stack([layer.lora_A[a].weight.detach() for layer, a in layers]).to(self.dtype))
            B.append(torch.stack([layer.scaling[a] * layer.lora_B[a].weight.detach() for layer, a in layers]))
        return torch.cat(A, 1), torch.cat([b.to(self.dtype) for b in B], 2)


def _batches(steered: Iterable[Steered], parameters: Container[int]) -> Iterator[Batch]:
    groups: dict[tuple, list[Steered]] = {}
    for s in steered:
        A, B = s.A, s.B
        sharded = not type(A.data) is type(B.data) is Tensor or A.dim() != 2 or len(A) != s.layer.r[s.adapter]
        if sharded:
            raise RuntimeError(
                f"The adapter of {s.name} is sharded: guidance under FSDP or tensor parallelism is not available yet; "
                "train on one GPU or with DDP."
            )
        others = tuple(s.layer.lora_A[a].weight.shape for a in s.others)
        trained = tuple(name for name, p in (("A", A), ("B", B)) if id(p) in parameters)
        key = trained, A.device, A.dtype, A.shape, B.shape, s.S.shape, others, id(s.config)
        groups.setdefault(key, []).append(s)
    for key, members in groups.items():
        size = max(1, BATCH_ELEMENTS // members[0].B.numel())
        for i in range(0, len(members), size):
            yield Batch(members[i : i + size], key[0])


@torch.no_grad()
def bias_gradients(
    steered: Iterable[Steered], parameters: Container[int], loss_scale: Tensor | float | None = None
) -> None:
    """Bias the gradients of these adapters in place (METHOD: DRIFT eq. 3 and 4 on the factors).

    Only factors whose id() is in `parameters` are touched; they have a gradient. `loss_scale` is the factor a
    GradScaler has left in the gradients of a fused optimizer; only `absolute` needs it, the other scales follow the
    gradient's own norm.
    """
    guided = [s for s in steered if s.config.drift_alpha and s.config.drift_scale != "decoupled"]
    for batch in _batches(guided, parameters):
        batch.bias_gradients(loss_scale)
        del batch  # before the next one is made


@torch.no_grad()
def pull_factors(
    steered: Iterable[Steered], lr: dict[int, float | Tensor | None], applied: Tensor | float = 1.0
) -> None:
    """The `decoupled` scale, after the optimizer's update: p ← p + lr·a·(p* − p), with the targets of the `drift`
    start. `lr` maps id(parameter) to its group's learning rate; `applied` is 0 where a GradScaler undid the update."""
    for batch in _batches((s for s in steered if s.config.drift_alpha and s.config.drift_scale == "decoupled"), lr):
        batch.pull_factors(lr, applied)
        del batch


# The hooks


def _trained_by(
    optimizer: torch.optim.Optimizer, enclosing: list[torch.optim.Optimizer]
) -> tuple[list[Steered], dict[int, dict]]:
    """The adapters to guide in this step, and id(parameter) -> its group for the parameters with a gradient.

    Parameters of an enclosing step are left to it.
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
    for outer in enclosing:
        for group in outer.param_groups:
            for p in group["params"]:
                groups.pop(id(p), None)
    present = [s for s in _STEERED if (layer := s.layer) is not None and s.adapter in layer.lora_A]  # not deleted since
    for s in present:
        if hasattr(s.A, "ds_id") or hasattr(s.A, "_hp_mapping"):
            raise RuntimeError(
                "DeepSpeed ZeRO trains copies of the parameters, which guidance does not reach yet: train on one GPU "
                "or with DDP."
            )
    return [s for s in present if id(s.A) in groups or id(s.B) in groups], groups


def _enclosing_steps() -> list[torch.optim.Optimizer]:
    """The optimizers in whose `step()` the hook's caller, torch's wrapper of `step()`, was called.

    Optimizers that call `super().step()` or wrap another optimizer fire the hook again in the middle of one step. The
    call stack says so without a flag that an exception within a step would leave behind.
    """
    wrapper = sys._getframe(2)
    frame, optimizers = wrapper.f_back, []
    while frame is not None:
        if frame.f_code is wrapper.f_code:
            optimizers.append(frame.f_locals["args"][0])
        frame = frame.f_back
    return optimizers


def _before_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    if not _STEERED:
        return None
    enclosing = _enclosing_steps()
    # A fused optimizer unscales within its kernel: its gradients still carry the GradScaler's factor here.
    loss_scale = getattr(optimizer, "grad_scale", None)
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if closure is None:
        bias_gradients(*_trained_by(optimizer, enclosing), loss_scale)
        return None

    def guided_closure():  # the gradients of this step come into being only when the optimizer calls it
        loss = closure()
        bias_gradients(*_trained_by(optimizer, enclosing), loss_scale)
        return loss

    if len(args) > 1:
        return (args[0], guided_closure, *args[2:]), kwargs
    return args, {**kwargs, "closure": guided_closure}


def _after_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    if not _STEERED:
        return
    steered, groups = _trained_by(optimizer, _enclosing_steps())
    found_inf = getattr(optimizer, "found_inf", None)  # a tensor: reading it here would wait for the device
    applied = 1 if found_inf is None else 1 - found_inf
    pull_factors(steered, {p: group.get("lr") for p, group in groups.items()}, applied)
    # Counted in the optimizer's state too: a Trainer's checkpoint brings it back to a config that starts at 0.
    restored = optimizer.param_groups[0].get("drift_steps", 0)
    for config in {id(s.config): s.config for s in steered if s.config.drift_alpha}.values():
        fresh = isinstance(config.drift_steps, int) and config.drift_steps == 0  # a tensor after loss scaling
        config.drift_steps = (restored if fresh else config.drift_steps) + applied
        for group in optimizer.param_groups:
            group["drift_steps"] = config.drift_steps


for _handle in globals().get("_HANDLES", ()):  # reloading the module must not guide twice
    _handle.remove()
_HANDLES = (register_optimizer_step_pre_hook(_before_step), register_optimizer_step_post_hook(_after_step))


# What has happened so far


def lora_layers(model: torch.nn.Module, adapter: str | None = None) -> Iterator[tuple[str, LoraLayer, str]]:
    """(canonical weight name, layer, adapter) of every LoRA layer on a language-model weight, in module order."""
    config = getattr(model, "config", None)
    skipped = cross_attention_layers(config) if config is not None else ()
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and (canonical := canonical_name(f"{name}.weight", skipped)):
            for a in layer.active_adapters if adapter is None else [adapter]:
                if a in layer.lora_A:
                    yield canonical, layer, a


@torch.no_grad()
def telemetry(model: torch.nn.Module, prior: ReasoningPrior | None = None) -> dict[str, float | int]:
    """Where the adapters of a model stand against the prior; one device synchronization.

    Returns `guided_steps`, and over all steered layers, in total and per module kind (`alignment/attn`, …):
    `alignment`, the cosine of s·B·A and Δ_r, and `absorbed`, ⟨s·B·A, Δ_r⟩/‖Δ_r‖². With `prior` any LoRA model is
    measured against it, steered or not.

    Raises:
        ValueError: no layer of the model is steered (or, with `prior`, none has a Δ).
    """
    if prior is None:
        found = [layer.drift[a] for _, layer, a in lora_layers(model) if a in getattr(layer, "drift", {})]
    else:
        settings = DriftConfig(prior=prior.source)
        found = [
            Steered(layer, a, name, prior[name], settings) for name, layer, a in lora_layers(model) if name in prior
        ]
    if not found:
        raise ValueError("No layer of this model is steered: wrap it with DriftConfig or guide(model, prior) first.")
    sums: dict[str, Tensor] = {}
    device = found[0].A.device
    for s in found:
        A, B = s.A.float(), s.B.float()
        U, S, Vh = (t.to(A.device, torch.float32) for t in (s.U, s.S, s.Vh))
        inner = s.scaling * (S * ((U.mT @ B) * (A @ Vh.mT).mT).sum(-1)).sum()  # ⟨s·B·A, Δ_r⟩
        adapter = s.scaling**2 * ((B.mT @ B) * (A @ A.mT)).sum()  # ‖s·B·A‖²
        row = torch.stack([inner, adapter, guidance.gram_norm(U, S, Vh) ** 2]).to(device)
        for kind in ("", f"/{module_kind(s.name)}"):
            sums[kind] = sums[kind] + row if kind in sums else row
    steps = {id(s.config): int(s.config.drift_steps) for s in found}
    result: dict[str, float | int] = {"guided_steps": max(steps.values())}
    for kind, (inner, adapter, delta) in zip(sums, torch.stack([*sums.values()]).cpu(), strict=True):
        result[f"alignment{kind}"] = (inner / (adapter * delta).sqrt()).item() if adapter > 0 else 0.0
        result[f"absorbed{kind}"] = (inner / delta).item()
    return result
