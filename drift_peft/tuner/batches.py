"""One step's guidance: the gradients of everything steered are biased, a batched call for all that has one shape."""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..keeping import LeftGradient
from ..warn import warn
from . import guidance
from .capture import weight_gradient
from .sharding import Storage, values
from .steered import BATCH_ELEMENTS, Stack, Steered, SteeredAdapter, lora_factor

TORCH = Storage()


@torch.no_grad()
def bias_gradients(groups: Iterable[Group], loss_scale: Tensor | float | None = None) -> None:
    """Bias the gradients of these in place (METHOD: DRIFT eq. 3 and 4, on LoRA pulled back onto the factors).

    `loss_scale` is the factor a GradScaler has left in the gradients of a fused optimizer; only `absolute` needs it,
    the other scales follow the gradient's own norm.
    """
    repeated = {}
    for group in groups:
        if group.config.drift_scale == "decoupled":
            continue
        with group.exact():
            batch = group.batch()
            if batch.biased_already():
                repeated[id(batch.config)] = batch.config
            else:
                batch.bias_gradients(loss_scale)
        del batch  # before the next one is made
    for config in repeated.values():
        if not config.repeated_steps:
            warn(
                "optimizer.step() was called twice on the same gradients: they are biased toward the expert once, and "
                "not again."
            )
        config.repeated_steps += 1


@torch.no_grad()
def pull_parameters(
    groups: Iterable[Group],
    lr: dict[int, float | Tensor | None],
    applied: Tensor | float = 1.0,
    second: Mapping[int, Tensor] = MappingProxyType({}),
) -> None:
    """The `decoupled` scale, after the optimizer's update: p ← p + lr·a·(p* − p).

    `lr` maps id(parameter) to its group's learning rate; `applied` is 0 where a GradScaler undid the update. `second`
    has of each id(parameter) what a schedule-free optimizer keeps beside it. The weights that are saved in the end are
    a mean of both, so both are pulled.
    """
    for group in groups:
        if group.config.drift_scale == "decoupled":
            with group.exact():
                group.batch().pull_parameters(lr, applied)
                if second:
                    group.of(second).batch().pull_parameters(
                        lr | {id(z): lr.get(p) for p, z in second.items()}, applied
                    )


def warn_of_rounding(groups: Iterable[Group], settings: Mapping[int, Mapping]) -> None:
    """`decoupled` moves p by a part lr·a of the way. A 16-bit p rounds away what is less than its precision.

    `settings` maps id(parameter) to its group of the optimizer, where a scheduler writes the rate that it starts from.
    """
    for group in groups:
        if group.config.drift_scale != "decoupled":
            continue
        for p in itertools.chain.from_iterable(group.parameters.values()):
            rates = [settings[id(p)].get(key) for key in ("lr", "initial_lr")] if id(p) in settings else []
            part = group.alpha * max((float(rate) for rate in rates if rate is not None), default=0.0)
            if 0 < part < torch.finfo(p.dtype).eps and p.dtype.itemsize <= 2:
                warn(
                    f"drift_scale='decoupled' goes lr·drift_alpha = {part:.1g} of the way to its target at each step, "
                    f"and weights in {str(p.dtype).removeprefix('torch.')} round most of that away: train them in "
                    "float32."
                )
                return


class Group:
    """What goes through one batched call, looked up once for many steps.

    Attributes:
        trained: names of those of the parameters that the optimizer updates; they have a gradient.
        alpha: their strength, before warm-up and decay.
        storage: where the optimizer finds its gradients.
        parameters: factor -> the parameters of all members.
    """

    def __init__(self, members: Sequence[Steered], trained: tuple[str, ...], storage: Storage):
        self.config, self.trained, self.storage = members[0].config, trained, storage
        self.alpha = members[0].alpha
        self.parameters = {factor: [m.parameter(factor) for m in members] for factor in members[0].factors}
        self._members = [weakref.ref(m) for m in members]  # which belong to their modules
        self._batch = AdapterBatch if isinstance(members[0], SteeredAdapter) else TensorBatch

    def of(self, second: Mapping[int, Tensor]) -> Group:
        """The same with other tensors in place of the parameters that have them there."""
        other = copy.copy(self)
        other.parameters = {f: [second.get(id(p), p) for p in members] for f, members in self.parameters.items()}
        return other

    def exact(self) -> torch.autocast:
        """Within, nothing is cast down: a step may stand where the loss is computed in 16 bits."""
        return torch.autocast(next(iter(self.parameters.values()))[0].device.type, enabled=False)

    def batch(self) -> Batch:
        """This step's numbers of it."""
        return self._batch([member() for member in self._members], self)


def groups_of(steered: Iterable[Steered], parameters: Container[int], storage: Storage = TORCH) -> list[Group]:
    """What is guided of these, by what goes through one call; of parameters whose id() is in `parameters` alone."""
    groups: dict[tuple, list[Steered]] = {}
    for s in steered:
        if not s.alpha:
            continue
        trained = s.among(parameters)
        prior = tuple((key, t.shape) for key, t in s.prior.items())
        key = trained, type(s), id(s.config), s.alpha, prior, s.batch_key()
        groups.setdefault(key, []).append(s)
    found = []
    for (trained, *_), members in groups.items():
        size = members[0].batch_size()
        found += [Group(members[i : i + size], trained, storage) for i in range(0, len(members), size)]
    return found


class Batch:
    """What L things of one shape have in common at one step: settings, strength, the stacked prior."""

    def __init__(self, members: list[Steered], group: Group):
        self.members, self.config, self.trained, self.storage = members, group.config, group.trained, group.storage
        self.parameters = group.parameters
        first = self.parameters[members[0].factors[0]][0]
        self.dtype = torch.promote_types(first.dtype, torch.float32)
        self.stack = Stack.of(members, first.device)
        steps = self.config.iteration, self.config.drift_warmup_steps, self.config.drift_decay_steps
        self.alpha = group.alpha * self.here(guidance.schedule(*steps))

    def here(self, number: Tensor | float) -> Tensor | float:
        """On this batch's device: a GradScaler's tensors are on one, and the model may be on several."""
        return number.to(self.stack.device) if isinstance(number, Tensor) else number

    def strength(self, loss_scale: Tensor | float | None) -> Tensor | float:
        scaled = self.config.drift_scale == "absolute" and loss_scale is not None
        return self.alpha * self.here(loss_scale) if scaled else self.alpha

    def biased_already(self) -> bool:
        """Has nothing touched these gradients since they were biased? Then a second `step()` uses them again."""
        left = self.stack.biased.get(self.trained)
        return left is not None and left.is_still(self.parameters[self.trained[0]][0].grad)

    def remember(self, *measured: Tensor) -> None:
        """‖g‖, ‖D‖, ⟨g, D⟩ and c of g̃ = g − c·D, each [factors, L]. For telemetry, and for `biased_already`."""
        gradient = self.parameters[self.trained[0]][0].grad
        if gradient is not None:  # else DeepSpeed keeps it, and discards it after its step
            self.stack.biased[self.trained] = LeftGradient(gradient)
        self.stack.measured = measured

    def rates(self, factor: str, lr: dict[int, float | Tensor | None]) -> Tensor | float:
        """lr [L, 1, 1] of the parameters' own groups, or the number that they share."""
        rates = [lr[id(p)] for p in self.parameters[factor]]
        if None in rates:
            raise RuntimeError(
                "drift_scale='decoupled' moves by the learning rate, and this optimizer's parameter groups "
                "name none ('lr'): give it one, or use another drift_scale."
            )
        known = not isinstance(self.alpha, Tensor) and not any(isinstance(rate, Tensor) for rate in rates)
        if known and self.alpha * max(rates) > 1:
            warn(
                "drift_scale='decoupled' goes lr·drift_alpha of the way to its target at each step, and that is more "
                "than 1 here, so it goes past it: lower one of them."
            )
        if all(rate is rates[0] for rate in rates):
            return self.here(rates[0])
        rates = [torch.as_tensor(rate, device=self.stack.device, dtype=self.dtype) for rate in rates]
        return torch.stack(rates)[:, None, None]


class AdapterBatch(Batch):
    """The factors of L adapters as stacks in at least fp32: A [L, r, in], B [L, out, r], s [L]."""

    def __init__(self, members: list[SteeredAdapter], group: Group):
        super().__init__(members, group)
        self.A, self.B = (values(self.parameters[factor]).to(self.dtype) for factor in "AB")
        self.s = self.stack.scaling(self.dtype)
        self.prior = [self.stack.prior[key].to(self.dtype) for key in ("U", "S", "Vh") if key in self.stack.prior]

    def direction(self) -> guidance.Direction:
        args = self.A, self.B, self.s, *self.prior
        if self.config.drift_target == "factors":
            return guidance.factors(self.A, self.B, *guidance.balanced_targets(*self.prior, self.s))
        delta_norm = self.stack.norm.to(self.dtype)
        if self.config.drift_target == "delta":
            return guidance.delta(*args, delta_norm)
        return guidance.residual(*args, delta_norm, *self._all_adapters())

    def bias_gradients(self, loss_scale: Tensor | float | None) -> None:
        direction = self.direction()
        g = {factor: self.storage.gradients(self.parameters[factor]).to(self.dtype) for factor in self.trained}
        measure = self._of_weight if self.config.drift_norm == "weight" else self._of_factors
        g_norm, D_norm, inner, floor = measure(direction, g)
        strength = self.strength(loss_scale)
        c = guidance.multiplier(g_norm, D_norm, inner, floor, direction.share, strength, self.config.drift_scale)
        for factor, own in zip(g, c.unbind(), strict=True):
            biased = g[factor] - guidance.column(own) * getattr(direction, factor)
            self.storage.set_gradients(self.parameters[factor], biased)
        self.remember(g_norm, D_norm, inner, c)

    def _of_factors(self, direction: guidance.Direction, g: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """‖g‖, ‖D‖, ⟨g, D⟩ and the floor of ‖D‖ of each factor itself, each [factors, L]."""
        measured = []
        for factor, gradient in g.items():
            D = getattr(direction, factor)
            inner = (gradient * D).sum((-2, -1))
            floor = getattr(direction, f"floor_{factor}")
            measured.append((guidance.gradient_norm(gradient), guidance.norm(D), inner, floor))
        return tuple(map(torch.stack, zip(*measured, strict=True)))

    def _of_weight(self, direction: guidance.Direction, g: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """‖G‖, ‖X‖, ⟨G, X⟩ and the floor of ‖X‖ of the weight gradient, the same for both factors: [factors, L]."""
        if "B" not in g:
            raise RuntimeError("drift_norm='weight' needs lora_B to be trained: use drift_norm='factor'.")
        if isinstance(self.parameters["B"][0].data, DTensor) or self.storage is not TORCH:
            raise RuntimeError(
                "drift_norm='weight' is not available under FSDP and DeepSpeed: use drift_norm='factor', or DDP."
            )
        if any(m.capture is None for m in self.members):
            raise RuntimeError(
                "drift_norm='weight' measures what has a strength when its guidance is made: make it with a "
                "drift_alpha above 0."
            )
        G_norm, inner = weight_gradient([m.capture for m in self.members], g["B"], self.A.shape[-2], self.s)
        if self.config.drift_target == "residual":  # ⟨G, s·B·A⟩ = ⟨s·G·Aᵀ, B⟩ = ⟨g_B, B⟩
            if self.members[0].others:
                raise RuntimeError(
                    "drift_norm='weight' with drift_target='residual' is not available while several adapters are "
                    "active: use drift_target='delta' or drift_norm='factor'."
                )
            inner = inner - (g["B"] * self.B).sum((-2, -1))
        floor = 1e-6 * self.stack.norm.to(self.dtype)
        return tuple(measured.expand(len(g), -1) for measured in (G_norm, direction.norm, inner, floor))

    def pull_parameters(self, lr: dict[int, float | Tensor | None], applied: Tensor | float) -> None:
        if self.config.drift_target == "base":  # B* = 0, and A is left alone
            targets = {"B": torch.zeros_like(self.B)}
        else:
            targets = dict(zip("AB", guidance.start_targets(*self.prior, self.s), strict=True))
        for factor in self.trained:
            if factor in targets:
                parameters = self.parameters[factor]
                value = self.storage.weights(parameters).to(self.dtype)
                move = self.alpha * self.here(applied) * self.rates(factor, lr) * (targets[factor] - value)
                self.storage.set_weights(parameters, value + move)

    def _all_adapters(self) -> tuple[Tensor, Tensor] | tuple[()]:
        """A_all [L, R, in] and B_all [L, out, R] with the scaling in it, where further adapters are active."""
        if not self.members[0].others:
            return ()
        A, B = [self.A], [self.s[:, None, None] * self.B]
        for i in range(len(self.members[0].others)):
            layers = [(m.module, m.others[i]) for m in self.members]
            scaling = [layer.scaling[a] for layer, a in layers]
            scaling = torch.tensor(scaling, device=self.stack.device, dtype=self.dtype)
            A.append(values([lora_factor(layer, "A", a) for layer, a in layers]).to(self.dtype))
            others_B = values([lora_factor(layer, "B", a) for layer, a in layers]).to(self.dtype)
            B.append(scaling[:, None, None] * others_B)
        return torch.cat(A, 1), torch.cat(B, 2)


class TensorBatch(Batch):
    """L tensors that are trained themselves, as [L, m, n]; vectors have m = 1.

    D = Δ_r for the target `delta`, else X = Δ_r − (W − W_0): for these, what is missing and the way to the target are
    the same. Large ones go through in blocks of rows.
    """

    def __init__(self, members: list[Steered], group: Group):
        super().__init__(members, group)
        self.W = self._matrices(values(self.parameters["W"]))
        self.prior = {
            key: self._matrices(value) if key in ("delta", "W0") else value for key, value in self.stack.prior.items()
        }

    @staticmethod
    def _matrices(stack: Tensor) -> Tensor:
        """[L, m, n], m = 1 for vectors."""
        return stack[:, None] if stack.dim() == 2 else stack

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows, and D [L, rows, n] of them."""
        L, m, n = self.W.shape
        step = max(1, BATCH_ELEMENTS // (L * n))
        for start in range(0, m, step):
            rows = slice(start, start + step)
            yield rows, self.direction(rows)

    def direction(self, rows: slice) -> Tensor:
        D = self.delta(rows)
        if self.config.drift_target == "delta":
            return D
        return D - (self.W[:, rows].to(self.dtype) - self.prior["W0"][:, rows].to(self.dtype))

    def delta(self, rows: slice) -> Tensor | float:
        """Δ_r of these rows; 0 for `drift_target="base"`, which goes back to where training began."""
        if self.config.drift_target == "base":
            return 0.0
        if "delta" in self.prior:
            return self.prior["delta"].to(self.dtype)
        U, S, Vh = (self.prior[key].to(self.dtype) for key in ("U", "S", "Vh"))
        return (U[:, rows] * S[:, None, :]) @ Vh

    def bias_gradients(self, loss_scale: Tensor | float | None) -> None:
        parameters = self.parameters["W"]
        g = self.storage.gradients(parameters)
        matrices = self._matrices(g)  # a view: what is written to it is in g
        g_norm, D_norm, inner = torch.zeros(3, len(g), device=g.device, dtype=self.dtype)
        for rows, D in self.blocks():
            part = matrices[:, rows].to(self.dtype)
            g_norm, D_norm = g_norm.hypot(guidance.gradient_norm(part)), D_norm.hypot(guidance.norm(D))
            inner = inner + (part * D).sum((1, 2))
        share = (D_norm / self.stack.norm).clamp_max(1) if self.config.drift_target == "residual" else 1.0
        c = guidance.multiplier(g_norm, D_norm, inner, 0.0, share, self.strength(loss_scale), self.config.drift_scale)
        for rows, D in self.blocks():
            matrices[:, rows] = (matrices[:, rows].to(self.dtype) - guidance.column(c) * D).to(g.dtype)
        self.storage.set_gradients(parameters, g)
        self.remember(g_norm[None], D_norm[None], inner[None], c[None])

    def pull_parameters(self, lr: dict[int, float | Tensor | None], applied: Tensor | float) -> None:
        parameters = self.parameters["W"]
        moved = self.storage.weights(parameters)
        matrices, rate = self._matrices(moved), self.alpha * self.here(applied) * self.rates("W", lr)
        for rows, D in self.blocks():
            matrices[:, rows] = (matrices[:, rows].to(self.dtype) + rate * D).to(moved.dtype)
        self.storage.set_weights(parameters, moved)
