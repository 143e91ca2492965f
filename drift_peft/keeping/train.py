"""Training stays near the VLM's own answers, whatever the loop (METHOD, "Keeping what the VLM can do").

Before each step of the optimizer, and before the guidance, the gradient of

    L_keep = mean over answer tokens t of KL( p_vlm(. | x, y_<t) || p_model(. | x, y_<t) )

over a fresh batch of the keep set is added to the task's: k = w·∇L_keep, g ← g + k·min(1, ρ·‖g‖/‖k‖), norms over all
parameters that this optimizer trains. It comes after the loop's clipping, so that without the bound ρ it would drown
the task's gradient.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .answers import Sample, answer_logits, answered, prompts
from .distance import bucketed_kl
from .steps import enclosing_steps, once_gradients_are_there, trained_by

STEPS = "keep_steps"  # in an optimizer's parameter groups, so that a checkpoint brings the order back


class Keeping:
    """What keeps one model near a keep set.

    Attributes:
        steps: optimizer steps so far, kept or not.
        kl: L_keep of the last batch in nats, a tensor on the model's device; None before the first.
        ratio: ‖what was added‖/‖g‖ of the last kept step.
    """

    def __init__(
        self,
        model: nn.Module,
        keep_set: Sequence[Sample],
        processor: Any,
        weight: float,
        bound: float | None,
        batch_size: int,
        every: int,
        seed: int,
    ):
        self._model = weakref.ref(model)
        self.keep_set, self.weight, self.bound = keep_set, weight, bound
        self.batch_size, self.every, self.seed = batch_size, every, seed
        self._processor = copy.deepcopy(processor)  # the data loader uses the other one meanwhile
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="keep")
        self._ahead: tuple[int, Future] | None = None
        self.steps = 0
        self.kl: Tensor | None = None
        self.ratio: Tensor | None = None

    @property
    def model(self) -> nn.Module:
        return self._model()

    def add(self, optimizer: torch.optim.Optimizer, trained: dict[int, dict]) -> None:
        """Add to the gradients of what this optimizer trains, if it is this step's turn."""
        parameters = [p for p in self.model.parameters() if p.requires_grad and id(p) in trained]
        if not parameters:
            return
        self.steps = max(self.steps, optimizer.param_groups[0].get(STEPS, 0))
        number, self.steps = self.steps, self.steps + 1
        for group in optimizer.param_groups:
            group[STEPS] = self.steps
        if number % self.every == 0:
            _refuse_sharded(parameters)
            self._add(parameters, number // self.every, getattr(optimizer, "grad_scale", None))

    def _add(self, parameters: list[nn.Parameter], turn: int, loss_scale: Tensor | None) -> None:
        gradients = self._gradients(parameters, turn)
        task = [p.grad for p in parameters]
        scale = 1.0 if loss_scale is None else loss_scale.to(gradients[0])  # a fused optimizer unscales in its kernel
        kept, asked = _norm(gradients) * self.weight * scale, _norm(task)
        factor = torch.ones_like(kept)
        if self.bound is not None:
            factor = torch.where(kept > 0, (self.bound * asked / kept).clamp(max=1.0), 1.0)
        for gradient, added in zip(task, gradients, strict=True):
            gradient.add_((added * (factor * self.weight * scale)).to(gradient.dtype))
        self.ratio = torch.where(asked > 0, factor * kept / asked, 0.0)

    def _gradients(self, parameters: list[nn.Parameter], turn: int) -> list[Tensor]:
        """∇L_keep of each parameter in fp32, over the answer tokens of all processes, without a trace in the training's
        random numbers."""
        devices = sorted({p.device.index for p in parameters if p.device.type == "cuda"})
        inputs, said, samples = self._batch(turn)
        device = parameters[0].device
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            torch.manual_seed(self.seed * 1_000_003 + turn)
            inputs = {name: value.to(device) for name, value in inputs.items()}
            logits = answer_logits(self.model, inputs, said.shape[1])[said.to(device)]
            top_tokens = torch.cat([sample.top_tokens for sample in samples]).to(device)
            top_logprobs = torch.cat([sample.top_logprobs for sample in samples]).to(device)
            loss = bucketed_kl(logits, top_tokens, top_logprobs)
            found = torch.autograd.grad(loss.mean(), parameters, allow_unused=True)
        self.kl = loss.detach().mean()
        pairs = zip(found, parameters, strict=True)
        gradients = [torch.zeros_like(p, dtype=torch.float32) if g is None else g.float() for g, p in pairs]
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            _average(gradients, len(loss))
        return gradients

    def _batch(self, turn: int) -> tuple[dict[str, Tensor], Tensor, list[Sample]]:
        """Inputs, which of their last columns are answers, and samples; the next ones are read meanwhile."""
        ahead = self._ahead if self._ahead is not None and self._ahead[0] == turn else None
        future = self._reader.submit(self._read, turn) if ahead is None else ahead[1]
        batch = future.result()
        self._ahead = turn + 1, self._reader.submit(self._read, turn + 1)
        return batch

    def _read(self, turn: int) -> tuple[dict[str, Tensor], Tensor, list[Sample]]:
        samples = [self.keep_set[i] for i in self._indices(turn)]
        asked = prompts(self._processor, [s.image for s in samples], [s.question for s in samples])
        inputs, said = answered(asked, [s.tokens for s in samples], self._processor.tokenizer.pad_token_id or 0)
        return inputs, said, samples

    def _indices(self, turn: int) -> list[int]:
        """Of this process's batch: each sample once in an order of its own, then all in another one."""
        parallel = dist.is_available() and dist.is_initialized()
        rank, processes = (dist.get_rank(), dist.get_world_size()) if parallel else (0, 1)
        start = (turn * processes + rank) * self.batch_size
        places = range(start, start + self.batch_size)
        return [self._order(place // len(self.keep_set))[place % len(self.keep_set)] for place in places]

    def _order(self, round: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + round)
        return torch.randperm(len(self.keep_set), generator=generator).tolist()

    def numbers(self) -> dict[str, float]:
        """`keep_kl` and `keep_ratio` of the last kept step; none before it."""
        return {} if self.kl is None else {"keep_kl": self.kl.item(), "keep_ratio": self.ratio.item()}

    def __getstate__(self):
        raise TypeError("what keeps a model belongs to this process: call keep again on the copy")


KEPT: weakref.WeakKeyDictionary[nn.Module, Keeping] = globals().get("KEPT") or weakref.WeakKeyDictionary()


def keeping_of(model: nn.Module | None) -> Keeping | None:
    """What keeps a model, or a part of it."""
    if model is None or not KEPT:
        return None
    return next((KEPT[module] for module in model.modules() if module in KEPT), None)


def _refuse_sharded(parameters: list[nn.Parameter]) -> None:
    sharded = {"FSDP": lambda p: isinstance(p, DTensor)}
    sharded["DeepSpeed ZeRO"] = lambda p: hasattr(p, "ds_id") or hasattr(p, "_hp_mapping")
    for name, of in sharded.items():
        if any(map(of, parameters)):
            raise RuntimeError(
                f"keep is not available under {name}: train with DDP or on one GPU, or mix the answers into the data "
                "(drift-peft keep samples)."
            )


def _norm(tensors: list[Tensor]) -> Tensor:
    """Of all of them together, in fp32."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm([t.float() for t in tensors])))


def _average(tensors: list[Tensor], tokens: int) -> None:
    """Over all processes, each as heavy as it has tokens, in place."""
    flat = torch.cat([tokens * tensor.flatten() for tensor in tensors] + [tensors[0].new_tensor([float(tokens)])])
    dist.all_reduce(flat)
    flat = flat[:-1] / flat[-1]
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def _before_step(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    if not KEPT:
        return None
    enclosing = enclosing_steps()

    def act() -> None:
        trained = trained_by(optimizer, enclosing)
        for keeping in [*KEPT.values()] if trained else ():
            keeping.add(optimizer, trained)

    return once_gradients_are_there(act, args, kwargs)


if _handle := globals().get("_HANDLE"):  # reloading the module must not keep twice
    _handle.remove()
_HANDLE = register_optimizer_step_pre_hook(_before_step)
