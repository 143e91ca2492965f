"""What the activations of a training step take, and of a pass of keeping: the model's own decoder runs on tensors that
have a shape and no memory.

What is kept for the backward pass is decided by transformers, PEFT and autograd themselves, so nothing here knows an
architecture. Layers of one kind are alike, so steps through two and through three of each kind give a step through all
of them. A step through two is one through three, less what the second made and freed. Linear attention is counted as
transformers' own code computes it: flash-linear-attention takes less. Where layers attend to the keys and values of
earlier ones (Gemma 3n, Gemma 4), these are there in every step, in their place.
"""

from __future__ import annotations

import copy
import logging
import warnings
import weakref
from dataclasses import dataclass
from functools import cache, partial

import torch
from peft import LoraConfig
from peft.tuners.lora.bnb import Linear4bit
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.trainer_pt_utils import LabelSmoother

from ..checkpoints import Decoder
from ..keeping import bucketed_kl
from ..merge import Gate
from ..prior import PriorWeight

PHASES = "forward pass", "loss", "backward pass"
# What there is in the layers and after them grows with their number, what there is before them does not.
MOMENTS = "before the layers", *PHASES, "gradient before the layers"
PHASE_OF = dict(zip(MOMENTS, (PHASES[0], *PHASES, PHASES[2]), strict=True))
MEASURE = "train a few steps instead, and read peak_gpu_gb in run.json"
DEVICE = torch.ops.prim.device.default
TOP_K = 32  # log probabilities that are known of each answer token
TILE = 4096, 32768  # tokens and tokens of the vocabulary whose logits TRL's loss has in memory at once


@dataclass(frozen=True)
class Step:
    """What activations depend on, beside the model: samples, tokens of each, and how it is trained."""

    batch: int
    tokens: int
    dtype: torch.dtype = torch.bfloat16
    r: int = 16
    lora_dropout: float = 0.0
    checkpointing: bool = True
    label_smoothing: float = 0.0
    think_tokens: bool = False
    eager: bool = False  # attention, with its scores as tensors
    answer: int = 0  # tokens at the end of each sample that a pass of keeping compares; 0 is a step on the task
    gated: int | None = None  # how many directions of each projection are gated, where that is what is trained


class Live(TorchDispatchMode):
    """Bytes of the tensors that were made inside and are alive, and the most there were at each moment."""

    def __init__(self):
        super().__init__()
        self.bytes, self.moment, self.layer = 0, MOMENTS[0], None
        # The moment of an operation that is done, or None; the layer; and by how much the bytes changed.
        self._events: list[tuple[str | None, int | None, int]] = []
        self._known: dict[int, tuple[int, int | None, weakref.ref]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is DEVICE:  # two of three calls: autograd asks each gradient where it is
            return args[0].fake_device
        self._see((args, kwargs), made_here=False)
        out = func(*args, **(kwargs or {}))
        self._see(out, made_here=True)
        self._events.append((self.moment, self.layer, 0))
        return out

    @property
    def peaks(self) -> dict[str, int]:
        return self.peaks_without()

    def peaks_without(self, *layers: int) -> dict[str, int]:
        """Moment -> the most bytes there were after an operation, had these layers not been there."""
        alive, peaks = 0, dict.fromkeys(MOMENTS, 0)
        for moment, layer, change in self._events:
            if layer is None or layer not in layers:
                alive += change
                if moment is not None:
                    peaks[moment] = max(peaks[moment], alive)
        return peaks

    def _see(self, value, made_here: bool) -> None:
        if isinstance(value, Tensor):
            if (key := (storage := value.untyped_storage())._cdata) not in self._known:
                size = storage.nbytes() if made_here else 0
                self._known[key] = size, self.layer, weakref.ref(storage, lambda _: self._forget(key))
                self._change(size, self.layer)
        elif isinstance(value, (list, tuple)):  # in place of tree_iter, which takes as long as the operation itself
            for inner in value:
                self._see(inner, made_here)
        elif isinstance(value, dict):
            for inner in value.values():
                self._see(inner, made_here)

    def _forget(self, storage: int) -> None:
        size, layer, _ = self._known.pop(storage)
        # A layer frees what the one before it made, whichever that is. What is freed outside is gone with who made it.
        self._change(-size, layer if self.layer is None else self.layer)

    def _change(self, size: int, layer: int | None) -> None:
        self.bytes += size
        self._events.append((None, layer, size))


class FourBit(nn.Linear):
    """As bitsandbytes' Linear4bit in memory: its weight is in 16 bit while it is multiplied, and no input is kept."""

    def forward(self, x: Tensor) -> Tensor:
        return _FourBit.apply(x.to(self.weight.dtype), self.weight.shape, self.bias).to(x.dtype)


class Gated(FourBit):
    """With a gate beside it, in place of LoRA."""

    def __init__(self, out: int, inner: int, bias: bool, dtype: torch.dtype, k: int):
        super().__init__(inner, out, bias, "meta", dtype)
        U, S, Vh = (torch.empty(shape, device="meta", dtype=torch.float32) for shape in ((out, k), (k,), (k, inner)))
        self.requires_grad_(False)
        self.gate = Gate(PriorWeight(U, S, Vh, 0.0, 0.0, 0.0, 0.0, ()), torch.device("meta"), dtype)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.gate(x)


class _FourBit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, shape: torch.Size, bias: Tensor | None) -> Tensor:
        ctx.shape = shape
        return linear(x, x.new_empty(shape), bias)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient @ gradient.new_empty(ctx.shape), None, None


class _ChunkedLoss(torch.autograd.Function):
    """As TRL's ChunkedLogProbFunction in memory: a tile of logits, and gradients summed in fp32."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        _tile(hidden)
        return hidden.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx, _) -> tuple[Tensor | None, ...]:
        hidden, _ = ctx.saved_tensors
        wanted = zip(ctx.saved_tensors, ctx.needs_input_grad, strict=True)
        sums = [torch.zeros_like(t, dtype=torch.float32) if needed else None for t, needed in wanted]
        _tile(hidden)
        return tuple(None if total is None else total.to(hidden.dtype) for total in sums)


def _tile(hidden: Tensor) -> Tensor:
    return hidden.new_empty(min(len(hidden), TILE[0]), TILE[1])


def step_peaks(decoder: Decoder, head: torch.Size, step: Step) -> dict[str, tuple]:
    """Phase of a step -> bytes at its peak: what all layers keep for the backward pass, and all else.

    Args:
        decoder: the language model of a model on the meta device; its projections are in 4 bits and adapted.
        head: shape of the weight that makes logits of its output.

    Raises:
        ValueError: it cannot be run without its weights.
    """
    lent = lenders(decoder)
    run = cache(partial(_run, decoder, head, step))
    # Where layers share more than what goes through all of them, one cannot be taken out: the run is without it.
    shared = lent or getattr(decoder.module, "hidden_size_per_layer_input", 0)

    @cache
    def less(order: tuple[int, ...], *places: int) -> dict[str, int]:
        """Moment -> bytes at its peak, with the layers at these places taken out."""
        if not shared:
            return run(order).peaks_without(*places)
        left = tuple(layer for place, layer in enumerate(order) if place not in places)
        return run(tuple(sorted(lent + left)) if lent else left).peaks

    found = kinds(decoder)
    firsts = [layers[0] for layers in found]
    others, second = range(len(firsts) - 1), len(firsts)
    orders = {i: (*(other for other in firsts if other != i), i, i, i) for i in firsts}
    peaks = {}
    for moment, phase in PHASE_OF.items():
        # Of a third layer: from the second on, gradients of an input that all layers share are there beside their sum.
        sizes = {i: less(o, *others)[moment] - less(o, *others, second)[moment] for i, o in orders.items()}
        keeps = {layer: sizes[layers[0]] for layers in found for layer in layers}
        # What there is beside it is largest at work on the last layer of some kind, when all others have kept theirs.
        rest = max(less(o, second)[moment] - sum(keeps[j] for j in lent + o[:-1]) for o in orders.values())
        peaks[phase] = max(peaks.get(phase, (0, 0)), (sum(keeps.values()), rest), key=sum)
    return peaks


def kinds(decoder: Decoder) -> list[list[int]]:
    """The layers by kind: those of one class, with parameters of the same shapes and the same sort of attention."""
    attention = getattr(decoder.module.config, "layer_types", None) or [None] * len(decoder.layers)
    groups: dict[tuple, list[int]] = {}
    for i, layer in enumerate(decoder.layers):
        shapes = tuple((name, p.shape) for name, p in layer.named_parameters())
        groups.setdefault((type(layer), attention[i], shapes), []).append(i)
    return [*groups.values()]


def lenders(decoder: Decoder) -> tuple[int, ...]:
    """The layers whose keys and values later ones use."""
    borrow, lend = (
        [i for i, layer in enumerate(decoder.layers) if any(getattr(m, says, False) for m in layer.modules())]
        for says in ("is_kv_shared_layer", "store_full_length_kv")
    )
    return tuple(lend) if borrow else ()  # older versions of transformers mark the last layer where none borrows


def _inside(decoder: Decoder) -> str:
    """What the module that holds the layers calls their list."""
    return decoder.path.rpartition(".")[2]


def _run(decoder: Decoder, head: torch.Size, step: Step, layers: tuple[int, ...]) -> Live:
    log = logging.getLogger(FakeTensorMode.__module__)
    log.disabled = True  # what goes wrong is told below
    try:
        module = _adapted(decoder, step, layers)
        with FakeTensorMode(allow_non_fake_inputs=True):
            module.to_empty(device="cpu")
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)  # kept over micro-batches; counted with the adapter
            return take(step, module, getattr(module, _inside(decoder)), torch.empty(head, dtype=step.dtype))
    except Exception as error:  # whatever the model's own code raises where it wants more than shapes
        reason = " ".join(str(error).split()) or type(error).__name__
        named = " and ".join(sorted({type(decoder.layers[i]).__name__ for i in layers}))
        raise ValueError(f"what {named} takes cannot be counted without its weights ({reason}): {MEASURE}") from error
    finally:
        log.disabled = False


def take(step: Step, decoder: nn.Module, layers: nn.ModuleList, weight: Tensor) -> Live:
    """A step's forward pass, loss and backward pass. Returns what there is at its moments, less what was there before.

    Args:
        decoder: the language model, as it is trained.
        layers: those of it that are run.
        weight: what makes logits of its output.
    """
    mixed = step.dtype != torch.float32
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", mixed)  # where PEFT looks, whatever the device, before it casts to fp32
    try:
        with Live() as live:
            _tell_moments(layers, live)
            with torch.autocast("cpu", step.dtype, enabled=mixed):
                hidden = _forward(step, decoder, weight.shape[1])
                live.moment, live.layer = "loss", None
                scored = hidden.detach().requires_grad_()
                loss = _loss(step, scored, weight)
            loss.backward()
            gradient = scored.grad
            del loss, scored
            live.moment, live.layer = "backward pass", len(layers) - 1
            if step.answer:  # nothing of it comes into `grad`
                torch.autograd.grad(hidden, [p for p in decoder.parameters() if p.requires_grad], gradient)
            else:
                hidden.backward(gradient)
    finally:
        torch.set_autocast_enabled("cuda", before)
    return live


def _tell_moments(layers: nn.ModuleList, live: Live) -> None:
    """Tell when the forward pass enters each layer, and when the backward pass has left it."""

    def add_hooks(place: int, layer: nn.Module) -> None:
        def enter(_, args: tuple, kwargs: dict) -> None:
            handle.remove()  # with checkpointing it is entered again
            live.moment, live.layer = "forward pass", place
            hidden = args[0] if args else kwargs["hidden_states"]
            hidden.register_hook(leave)

        def leave(_) -> None:
            live.moment, live.layer = ("backward pass", place - 1) if place else (MOMENTS[-1], None)

        handle = layer.register_forward_pre_hook(enter, with_kwargs=True)

    for place, layer in enumerate(layers):
        add_hooks(place, layer)


def _forward(step: Step, decoder: nn.Module, width: int) -> Tensor:
    shape = step.batch, step.tokens
    # As the input of all layers but the first; that one's has gradients too with checkpointing alone.
    embedded = torch.zeros(*shape, width, dtype=step.dtype).requires_grad_()
    # A single sample needs no mask; with several, the shorter ones are padded.
    mask = None if step.batch == 1 else torch.ones(step.batch, 1, step.tokens, step.tokens, dtype=torch.bool)
    inputs = {"inputs_embeds": embedded, "attention_mask": mask, "position_ids": torch.zeros(shape, dtype=torch.long)}
    if size := getattr(decoder, "hidden_size_per_layer_input", 0):  # else it asks the embedding which tokens these are
        looked_up = decoder.embed_tokens_per_layer(torch.zeros(shape, dtype=torch.long))
        inputs["per_layer_inputs"] = looked_up.reshape(*shape, -1, size)
    return decoder(**inputs, use_cache=False).last_hidden_state


def _loss(step: Step, hidden: Tensor, weight: Tensor) -> Tensor:
    if step.think_tokens:  # PEFT's copy of the head, with its trained rows
        weight = weight.clone().requires_grad_()
    if step.answer:  # all logits of its tokens at once
        logits = linear(hidden[:, -step.answer - 1 :], weight).float()[:, :-1].flatten(0, 1)
        known = len(logits), TOP_K
        return bucketed_kl(logits, torch.zeros(known, dtype=torch.long), torch.zeros(known)).sum()
    if step.gated:
        rows = linear(hidden, weight).flatten(0, 1)
        top = torch.zeros(len(rows), TOP_K, dtype=torch.long)
        return bucketed_kl(rows, top, torch.zeros(top.shape, dtype=torch.float32)).mean()
    if not step.label_smoothing:
        return _ChunkedLoss.apply(hidden.flatten(0, 1).clone(), weight)
    logits = linear(hidden, weight).float()  # accelerate hands them to the loss in fp32
    labels = torch.zeros(hidden.shape[:2], dtype=torch.long)
    return LabelSmoother(step.label_smoothing)({"logits": logits}, labels, shift_labels=True)


def _adapted(decoder: Decoder, step: Step, layers: tuple[int, ...]) -> nn.Module:
    """A copy with these layers alone, as it is trained: in 16 bit and frozen, with LoRA in fp32 on its projections."""
    module, inside = copy.copy(decoder.module), _inside(decoder)
    chosen = nn.ModuleList(copy.deepcopy(decoder.layers[i]) for i in layers)  # copies, so that one may come twice
    module._modules = {**module._modules, inside: chosen}
    module = copy.deepcopy(module).to(step.dtype).requires_grad_(False)
    if attention := getattr(module.config, "layer_types", None):
        module.config.layer_types = [attention[i] for i in layers]
    if len(layers) > module.config.num_hidden_layers:  # some stop there
        module.config.num_hidden_layers = len(layers)
    lora = LoraConfig(r=step.r, lora_dropout=step.lora_dropout)
    for name in decoder.projections:
        index, _, path = name.removeprefix(f"{decoder.path}.").partition(".")
        parent, _, child = path.rpartition(".")
        for layer in [layer for i, layer in zip(layers, getattr(module, inside), strict=True) if i == int(index)]:
            old = layer.get_submodule(path)
            parent_module = layer.get_submodule(parent)
            if step.gated:
                k = min(step.gated, old.out_features, old.in_features)
                gated = Gated(old.out_features, old.in_features, old.bias is not None, step.dtype, k)
                setattr(parent_module, child, gated)
                continue
            new = FourBit(old.in_features, old.out_features, old.bias is not None, "meta", step.dtype)
            new = Linear4bit(new.requires_grad_(False), "default", config=lora, r=step.r)
            for factor in (new.lora_A, new.lora_B):
                factor.float()  # PEFT gives them the dtype of a weight that is not packed
            setattr(parent_module, child, new)
    if step.eager:
        for part in module.modules():
            if hasattr(part, "config"):
                part.config._attn_implementation = "eager"
    if step.checkpointing:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # its new name is missing in older versions
            module.gradient_checkpointing_enable({"use_reentrant": False})
    return module.train()
