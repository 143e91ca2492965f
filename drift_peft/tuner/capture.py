"""Norm and inner products of the weight gradient G that LoRA never forms, for `drift_norm="weight"`.

With x_t [in] what enters lora_A and y'_t [out] the gradient of the layer's output, G = Σ_t y'_t x_tᵀ over the tokens of
all micro-batches and processes. Whatever is linear in G can be summed as it comes, without G [out, in] itself:

    s·G·Ω [out, m]    ‖G·Ω‖ estimates ‖G‖; Ω [in, m] has independent normal entries of variance 1/m, so the relative
                      standard deviation of ‖G·Ω‖² is √(2/m)·‖GᵀG‖_F/‖G‖_F² ≤ √(2/m), reached where G has rank 1
    s·G·Aᵀ [out, r]   the gradient of lora_B as this backward pass makes it. Its ratio to the gradient that the step
                      finds brings the sums to the step's gradient, after unscaling, averaging and clipping
    s·⟨G, Δ_r⟩        = Σ_t (s·y'_tᵀ U) diag(S) (Vh x_t), exact

The tap is an autograd function around what lora_B returns, so that under gradient checkpointing x_t is kept or
recomputed as every other activation is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from . import guidance


class Capture:
    """The sums of one adapter over the backward passes of one optimizer step.

    Args:
        name: canonical name of the weight.
        factor: "A" or "B" -> lora_A [r, in] or lora_B [out, r] as it is now.
        prior: U [out, k], S [k] and Vh [k, in], whatever stands there at a backward pass.
        sketch: m, or None.

    Attributes:
        sums: [out, m + r] in fp32, s·G·[Ω | Aᵀ]; with `drift_sketch=None` Ω is the identity and m = in.
        inner: [] in fp32, s·⟨G, Δ_r⟩.
        stale: the sums belong to a step that is over.
    """

    def __init__(self, name: str, factor: Callable[[str], nn.Parameter], prior: dict[str, Tensor], sketch: int | None):
        self.name, self.factor, self.prior, self.sketch = name, factor, prior, sketch
        self.x: Tensor | None = None
        self.sums: Tensor | None = None
        self.inner: Tensor | None = None
        self.stale = True
        self.task = -1
        self.handles: list = []

    def attach(self, layer: LoraLayer, adapter: str) -> None:
        """Begin to listen: the forward pass of the layer's adapter goes through the tap."""
        self.handles = [
            layer.lora_A[adapter].register_forward_pre_hook(self.see_input),
            layer.lora_B[adapter].register_forward_hook(self.see_output),
        ]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def __getstate__(self):  # a copy starts its own sums
        return {**self.__dict__, "x": None, "sums": None, "inner": None, "stale": True}

    # What a compiled model would trace into its graph happens in Python here, at every pass.
    @torch.compiler.disable
    def see_input(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.x = args[0] if torch.is_grad_enabled() else None
        if self.x is None:
            return
        if getattr(module, "_is_replica", False):
            raise RuntimeError(
                "drift_norm='weight' is not available under DataParallel, whose replicas run at the same time: use "
                "drift_norm='factor', or DDP."
            )

    @torch.compiler.disable
    def see_output(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        x, self.x = self.x, None
        return _Tap.apply(output, x, self) if x is not None and output.requires_grad else None

    @torch.no_grad()
    def add(self, gradient: Tensor, x: Tensor) -> None:
        """Add the tokens of one backward pass: gradient […, out] = s·y', x […, in]."""
        A, B = self.factor("A"), self.factor("B")
        # In fp16, sums of what a GradScaler has scaled are infinite.
        dtype = torch.float32 if gradient.dtype == torch.float16 else gradient.dtype
        Y, X = gradient.reshape(-1, gradient.shape[-1]).to(dtype), x.reshape(-1, x.shape[-1]).to(dtype)
        # Gradients that are gone were discarded: by a step, by zero_grad, or by a GradScaler that skipped the step. Two
        # forward passes under one backward pass come with no gradient both, but belong together.
        task = torch._C._current_graph_task_id()
        if self.sums is None or self.stale or (B.grad is None and task != self.task):
            width = (self.sketch or X.shape[-1]) + len(A)
            wide = torch.promote_types(Y.dtype, torch.float32)
            self.sums = torch.zeros(Y.shape[-1], width, device=Y.device, dtype=wide)
            self.inner = torch.zeros((), device=Y.device, dtype=wide)
        elif B.grad is not None:  # zeroed in place counts as discarded too; asked on the device, without waiting
            kept = (B.grad != 0).any()
            self.sums, self.inner = self.sums * kept, self.inner * kept
        self.stale, self.task = False, task
        sketched = X if self.sketch is None else X @ _omega(X.shape[-1], self.sketch, X.device, X.dtype)
        self.sums += Y.mT @ torch.cat([sketched, X @ A.to(X.dtype).mT], -1)
        U, Vh = (self.prior[key].to(X.device, X.dtype) for key in ("U", "Vh"))
        self.inner += ((Y @ U).float() * self.prior["S"].to(X.device).float() * (X @ Vh.mT).float()).sum()


class _Tap(torch.autograd.Function):
    """Identity on lora_B's output that hands its gradient and lora_A's input to a Capture."""

    @staticmethod
    def forward(ctx, output: Tensor, x: Tensor, capture: Capture) -> Tensor:
        ctx.save_for_backward(x)
        ctx.capture = capture
        return output.view_as(output)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.capture.add(gradient, *ctx.saved_tensors)
        return gradient, None, None


@functools.lru_cache
def _omega(rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Ω [rows, columns], the same in all processes and steps."""
    generator = torch.Generator().manual_seed(rows)
    return (torch.randn(rows, columns, generator=generator, dtype=torch.float32) / columns**0.5).to(device, dtype)


def weight_gradient(captures: list[Capture], g_B: Tensor, A_rows: int, s: Tensor) -> tuple[Tensor, Tensor]:
    """‖G‖ and ⟨G, Δ_r⟩, both [L], of L adapters' weight gradients as the step finds them.

    Args:
        g_B: [L, out, r], the gradient of lora_B at the step.
        A_rows: r.
        s: [L], the LoRA scaling.

    Raises:
        RuntimeError: a layer's backward pass was not seen.
    """
    for capture in captures:
        if capture.stale:
            raise RuntimeError(
                f"drift_norm='weight' saw no backward pass through the adapter of {capture.name}, though it "
                "has a gradient: use drift_norm='factor' with this training loop."
            )
    sums = torch.stack([capture.sums for capture in captures])
    inner = torch.stack([capture.inner for capture in captures])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for total in (sums, inner):
            torch.distributed.all_reduce(total)
    sketch, seen = sums[..., :-A_rows], sums[..., -A_rows:].to(g_B.dtype)  # s·G·Ω and s·G·Aᵀ
    seen_norm = guidance.gradient_norm(seen)
    unit = seen / guidance.column(torch.where(seen_norm > 0, seen_norm, 1.0))
    ratio = torch.where(seen_norm > 0, (g_B * unit).sum((-2, -1)) / seen_norm, 0.0)  # ⟨g_B, seen⟩/‖seen‖²
    G_norm = ratio.abs() * guidance.gradient_norm(sketch).to(g_B.dtype) / s.abs()
    return G_norm, ratio * inner.to(g_B.dtype) / s
