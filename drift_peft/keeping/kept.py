"""A model that is kept near the VLM: what is added to its gradients at each step (METHOD, "Keeping what the VLM can
do").

    k  =  w·∇L_keep,  L_keep the mean KL(p_vlm || p_θ) over the answer tokens of one batch of the keep set
    g  ←  g + k·min(1, ρ·‖g‖/‖k‖)   over all parameters that the optimizer trains

What keeps a model lives on the base model itself (`drift_keep`), outside any state dict, so it follows the weights
through copies, pickling, whatever wraps the model, and adapters that come and go.
"""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Container, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..warn import warn
from .distance import answer_rows, divergence
from .feed import Feed, Part, mixed
from .file import KeepSet
from .processes import average, place
from .registry import Known, Registry
from .steps import Act, LeftGradient, act_in_steps
from .undisturbed import (
    buffers_as_they_are,
    differentiable_checkpoints,
    random_numbers,
    uncompiled,
    without_grad_hooks,
    without_noise,
)

STEPS = "keep_steps"  # how many steps an optimizer has taken with keeping, in its parameter groups
GRADIENT_SCALE = 2.0**12  # of the loss, taken out of its gradient: in fp16 a small one would be rounded to 0
NO_PART = (
    "keep() passes its answers through the model when the optimizer steps, and what is trained has no part in that "
    "now: enable the adapter, or unmerge it, before step()."
)
WAY_OUT = "use DDP or one GPU, or mix the keep set's answers into the training data (drift-peft keep samples)"

_KEPT: Registry[Keeping] = globals().get("_KEPT") or Registry()  # in the order of keeping
_KNOWN: weakref.WeakKeyDictionary[torch.optim.Optimizer, Known[Keeping]] = weakref.WeakKeyDictionary()
_ENDED: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # what is kept no more, because the user says so
_TOLD: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()  # optimizers whose keep set was missed


class Keeping:
    """Keeps one model; see `keep` for the settings.

    Attributes:
        seen: tokens of the last batch that the model was trained on; 0 before it.
        stepped: an optimizer has called for it, whether at a step that keeps or between two of these.
        kl: L_keep of the last batch in nats, the mean over the processes; None before the first one.
        ratio: ‖what was added‖/‖g‖ then.
        passes: [2] of those whose g was finite: how many were added, and how many are lost, since L_keep or its
            gradient is not finite at any `scale`.
        told: that most of them are lost.
    """

    def __init__(
        self,
        model: nn.Module,
        keep_set: KeepSet,
        processor: Any,
        weight: float,
        bound: float | None,
        batch_size: int,
        every: int,
        seed: int,
    ):
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        self._called, self._base = weakref.ref(model), weakref.ref(base)
        self.weight, self.bound, self.every, self.seed = weight, bound, every, seed
        self.feed = Feed(keep_set, processor, batch_size, seed)
        self.autocast: torch.dtype | None = None
        self.seen = self.tokens = 0  # of the last and the largest batch trained on: none of ours is to be larger
        self.stepped = False
        self.scale: Tensor | None = None
        self.kl: Tensor | None = None
        self.ratio: Tensor | None = None
        self.passes, self.told = torch.zeros(2, dtype=torch.int32, device="cpu"), False
        self._left: dict[int, LeftGradient] = {}  # by the first parameter of an optimizer
        self._handle = model.get_input_embeddings().register_forward_pre_hook(self._see_training, with_kwargs=True)
        vars(base)["drift_keep"] = self
        _KEPT.add(self)

    @property
    def model(self) -> nn.Module | None:
        """As the training loop calls it, or without its adapters once these are merged or taken off."""
        return self._called() or self._base()

    def release(self) -> None:
        """Keep no more."""
        if vars(self._base()).get("drift_keep") is self:
            del vars(self._base())["drift_keep"]
        self._handle.remove()
        _KEPT.discard(self)

    def __getstate__(self):
        return {**self.__dict__, "_called": self.model, "_base": self._base(), "_left": {}}

    def __setstate__(self, state):  # a copied or unpickled model is kept like the one it came from
        self.__dict__.update(state, **{name: weakref.ref(state[name]) for name in ("_called", "_base")})
        _KEPT.add(self)

    def __deepcopy__(self, memo: dict) -> Keeping:
        """A copy of the model is kept by a copy. One of its embedding alone, as PEFT makes for `modules_to_save`, still
        tells this one what it sees."""
        if id(self._base()) not in memo:
            return self
        copied, state = object.__new__(type(self)), self.__getstate__()
        memo[id(self)] = copied
        if id(state["_called"]) not in memo:  # the base alone is copied
            state["_called"] = state["_base"]
        copied.__setstate__(copy.deepcopy(state, memo))
        return copied

    def _see_training(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """The size of its batches, and what it computes in: a plain loop leaves autocast before its optimizer steps."""
        if torch.is_grad_enabled():
            # Written and not read: a compiled model would be compiled anew for each new size.
            for ids in (*args, *kwargs.values())[:1]:
                self.seen, kind = ids.numel(), ids.device.type  # the module of a DataParallel replica has no parameters
                self.autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

    # A step

    def among(self, parameters: Container[int]) -> list[nn.Parameter]:
        """Of the model's parameters those in `parameters`, by their id()."""
        model = self.model  # another thread may free it
        return [] if model is None else [p for p in model.parameters() if id(p) in parameters]

    def before_step(self, parameters: Sequence[nn.Parameter], step: int, loss_scale: Tensor | None) -> None:
        """Add what belongs to step number `step` to the gradients of these."""
        self.stepped = True
        self.tokens = max(self.tokens, self.seen)
        left = self._left.get(id(parameters[0]))
        if step % self.every or (left is not None and left.is_still(parameters[0].grad)):
            return
        rank, processes = place()
        number = step // self.every * processes + rank
        parts = self.feed.batch(number, self.tokens)
        device = parameters[0].device
        if self.scale is None or self.scale.device != device:
            self.scale = torch.tensor(GRADIENT_SCALE, device=device, dtype=torch.float32)
        with random_numbers(self.model, mixed(self.seed, step, rank)), buffers_as_they_are(self.model):
            loss, gradients = self._gradients(parts, parameters)
        self.feed.read_ahead(number + processes, self.tokens)
        self.kl = loss.detach().float().to(device, copy=True)
        if processes > 1:
            average([self.kl, *gradients])
        self._add(parameters, gradients, 1.0 if loss_scale is None else loss_scale.to(device))

    def counts(self) -> tuple[int, int]:
        """How many passes were added so far, and how many are lost; this waits for the device."""
        added, lost = self.passes.tolist()
        return added, lost

    def after_step(self, parameters: Sequence[nn.Parameter], step: int) -> None:
        if step % self.every == 0:
            self._left.pop(id(parameters[0]), None)
            if parameters[0].grad is not None:
                self._left[id(parameters[0])] = LeftGradient(parameters[0].grad)

    def _gradients(self, parts: Sequence[Part], parameters: Sequence[nn.Parameter]) -> tuple[Tensor, list[Tensor]]:
        """L_keep, and `scale` times its gradient; nothing of it comes into `grad`, or to who listens there."""
        answer_tokens, losses, total = sum(len(part.top_tokens) for part in parts), [], []
        for part in parts:
            with torch.enable_grad():  # a step may stand under no_grad
                loss = self._divergence(part).sum() / answer_tokens
                if not loss.requires_grad:
                    raise RuntimeError(NO_PART)
                scaled = loss * self.scale.to(loss.device)
            with without_grad_hooks(parameters):
                found = torch.autograd.grad(scaled, parameters, allow_unused=True)
            if any(gradient is None for gradient in found):
                _refuse_hidden(scaled)
            gradients = [torch.zeros_like(p) if k is None else k for p, k in zip(parameters, found, strict=True)]
            total = total or gradients
            for i, gradient in enumerate(gradients if losses else ()):  # one by one, which takes no third copy of all
                total[i] = total[i] + gradient
            losses.append(loss.detach())
        return torch.stack(losses).sum(), total

    def _divergence(self, part: Part) -> Tensor:
        """[N] of each answer token."""
        kind = self.model.device.type
        with differentiable_checkpoints(self.model), without_noise(self.model), uncompiled(self.model):
            with torch.autocast(kind, dtype=self.autocast, enabled=self.autocast is not None):
                rows = answer_rows(self.model, part)
            return divergence(rows, part)

    @torch.no_grad()
    def _add(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor], loss_scale: Tensor | float) -> None:
        """g ← g + k·min(1, ρ·‖g‖/‖k‖). Where a gradient is not finite, nothing is added; all of it on the device."""
        g_norm, norm = _norm([p.grad for p in parameters]), _norm(gradients)
        factor = self.weight * loss_scale / self.scale.to(g_norm.dtype)  # of `gradients`, to make them k
        k_norm = norm * factor
        if self.bound is not None:
            factor = factor * torch.where(k_norm > 0, (self.bound * g_norm / k_norm).clamp_max(1), 1.0)
        finite = k_norm.isfinite() & g_norm.isfinite()
        for p, gradient in zip(parameters, gradients, strict=True):
            k = gradient * factor.to(p.device)
            p.grad.add_(k.where(finite.to(p.device), 0))
        self.ratio = torch.where(finite & (g_norm > 0), norm * factor / g_norm, 0.0)
        lost = g_norm.isfinite() & ~k_norm.isfinite() & (~self.kl.isfinite() | (self.scale <= 1))
        counted = torch.stack([finite, lost]).int()
        self.passes = self.passes.to(counted.device) + counted
        self.scale = torch.where(k_norm.isfinite(), self.scale, self.scale / 2).clamp_min(1)  # fp16 has overflowed


def _refuse_hidden(loss: Tensor) -> None:
    """RuntimeError if a reentrant checkpoint is in its graph, which ends in the checkpoint's input, and not in what is
    trained there; or if no parameter is."""
    nodes, seen, reached = [loss.grad_fn], set(), False
    while nodes:
        node = nodes.pop()
        reached |= isinstance(getattr(node, "variable", None), nn.Parameter)
        if "checkpoint" in node.name().lower():
            raise RuntimeError(
                f"keep() finds no gradient of what is trained within {node.name()}: the model checkpoints its layers "
                "in a way that serves backward() alone. Use torch's checkpoints with use_reentrant=False."
            )
        after = {function for function, _ in node.next_functions if function is not None} - seen
        nodes += after
        seen |= after
    if not reached:
        raise RuntimeError(NO_PART)


def _refuse(model: nn.Module, parameters: Sequence[nn.Parameter], groups: dict[int, dict]) -> None:
    """RuntimeError for what is not reached."""
    if _in_deepspeed(model):
        raise RuntimeError(f"keep() is not available under DeepSpeed: {WAY_OUT}")
    if any(getattr(p, "_fsdp_flattened", False) for group in groups.values() for p in group["params"]):
        raise RuntimeError(f"keep() is not available under FSDP1, which flattens parameters: {WAY_OUT}")
    if any(isinstance(p, DTensor) for p in parameters):
        raise RuntimeError(
            f"keep() is not available for sharded parameters, such as those of FSDP2 (fully_shard): {WAY_OUT}"
        )
    if any(groups[id(p)].get("maximize") for p in parameters):
        raise RuntimeError("an optimizer with maximize=True moves away from the VLM: negate the loss instead")
    if frozen := {id(p) for p in parameters if not p.requires_grad}:
        name = next(name for name, p in model.named_parameters() if id(p) in frozen)
        raise RuntimeError(
            f"keep() reaches what is trainable when the optimizer steps, and this step moves {len(frozen)} parameters "
            f"that are frozen by now, such as {name}: enable their adapter and make it the active one before step(), "
            "each of several in a step of its own, or clear the gradients of what was frozen."
        )


def _in_deepspeed(model: nn.Module) -> bool:
    """Is this the step of an engine that trains the model? It steps copies, and calls a torch optimizer for them."""
    if "deepspeed.runtime.engine" not in sys.modules:
        return False
    engine, frame = sys.modules["deepspeed.runtime.engine"].DeepSpeedEngine, sys._getframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, engine) and _related(model, caller.module):
            return True
        frame = frame.f_back
    return False


# What is kept


def keepings_of(model: nn.Module) -> list[Keeping]:
    """What keeps this model, a part of it, or a model that it is part of."""
    return [keeping for keeping in _alive() if _related(keeping._base(), model)]  # which other wrappers have, too


def is_kept(parameters: Container[int]) -> bool:
    """Is something added to the gradient of any of these, by their id()?"""
    return any(keeping.among(parameters) for keeping in _alive())


def end_keeping(model: nn.Module) -> None:
    """Keep this model no more, which is meant."""
    for keeping in keepings_of(model):
        keeping.release()
    _ENDED.add(model)


def _alive() -> list[Keeping]:
    return [keeping for keeping in _KEPT.since() if keeping.model is not None]


def _related(one: nn.Module, other: nn.Module) -> bool:
    return one in set(other.modules()) or other in set(one.modules())


def _trained(optimizer: torch.optim.Optimizer, groups: dict[int, dict]) -> dict[Keeping, list[nn.Parameter]]:
    """Who keeps what of these groups."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    known = _KNOWN.get(optimizer)
    if known is None or not known.are_of(parameters):
        known = _KNOWN[optimizer] = Known(_KEPT, parameters)
    trained = {keeping: keeping.among(groups) for keeping in known.entries()}
    return {keeping: parameters for keeping, parameters in trained.items() if parameters}


def _before_step(optimizer: torch.optim.Optimizer, groups: dict[int, dict], loss_scale: Tensor | None) -> None:
    trained = _trained(optimizer, groups)
    if not trained:
        _warn_of_lost(optimizer)
    for keeping in _alive():
        _refuse(keeping.model, trained.get(keeping, []), groups)
    for keeping, parameters in trained.items():
        keeping.before_step(parameters, optimizer.param_groups[0].get(STEPS, 0), loss_scale)


def _warn_of_lost(optimizer: torch.optim.Optimizer) -> None:
    """A keep set is not saved with a checkpoint, but the optimizer's state tells of it."""
    if not optimizer.param_groups[0].get(STEPS) or optimizer in _TOLD or _KNOWN[optimizer].entries():
        return
    _TOLD.add(optimizer)
    trains = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in trains for model in _ENDED for p in model.parameters()):
        warn(
            "This optimizer goes on from steps that were kept near the VLM, and now nothing keeps its model: call "
            "keep(model, keep_set, processor) before training, too."
        )


def _after_step(optimizer: torch.optim.Optimizer, groups: dict[int, dict], applied: Tensor | int | None) -> None:
    """The count goes on where an update was skipped, too: to look at it would wait for the device."""
    step, trained = optimizer.param_groups[0].get(STEPS, 0), _trained(optimizer, groups)
    for keeping, parameters in trained.items() if applied is not None else ():
        keeping.after_step(parameters, step)
    for group in optimizer.param_groups if trained else ():
        group[STEPS] = step + (applied is not None)


def _wanted(optimizer: torch.optim.Optimizer) -> bool:
    return bool(_KEPT) or any(STEPS in group for group in getattr(optimizer, "param_groups", ()))


act_in_steps("keep", Act(_wanted, _before_step, _after_step))


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    """Of all of them together, in at least fp32."""
    norms = [torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in tensors]
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
