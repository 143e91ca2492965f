"""What training takes on the GPU: weights, what is trained, what steers it, and activations.

Weights are counted on a model without memory, activations by a step on tensors without memory (dry_run.py). What is not
alive at the same time is not added up: the estimate is the largest of the moments of a step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import get_type_hints

import torch
from torch import nn
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, PretrainedConfig
from transformers.training_args import OptimizerNames

from ..arguments import check_whole
from ..checkpoints import EMBEDDING, HEAD, Decoder, cross_attention_layers, skeleton
from ..recipe import check_value
from ..tuner import BATCH_ELEMENTS, is_guided
from .dry_run import MEASURE, Step, step_peaks
from .images import LARGEST, Cut, cut, patches_per_token, pixel_bytes
from .loading import check_loading, is_eager

# No tensors of ours, and cards and drivers differ: measured on an H200 (driver 580; benchmarks/results/preflight.txt).
CONTEXT = 1.05e9  # with the kernels in use
WORKSPACES = 0.2e9  # what PyTorch's allocator holds beside what is counted here
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes a weight: 4 bits, 8 bits per 64 weights, 32 bits per 256 of those
_8_BIT = 1 + 4 / 256  # bytes a number of bitsandbytes' optimizers: 8 bits, and 32 bits per 256 of them
COUNTED = ("max_pixels", "longest_edge", "max_soft_tokens", "max_tiles", "max_image_tokens", "tile_size", "max_patches",
           "pan_and_scan_max_num_crops")  # of processor_kwargs  # fmt: skip
FOUR_BIT = "language model's projections, 4 bits"
SIXTEEN_BIT = "embedding and head", "per-layer embeddings", "experts", "vision tower and the rest"
STATE = {  # transformers' name of an optimizer, without paged_ -> bytes it keeps for each trained number
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_32bit", "schedule_free_adamw"), 8),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit"), 2 * _8_BIT),
    **dict.fromkeys(("lion_32bit", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_32bit", "adagrad", "schedule_free_sgd"), 4),
    **dict.fromkeys(("lion_8bit", "rmsprop_bnb_8bit"), _8_BIT),
    "ademamix_32bit": 12,
    "ademamix": 12,
    "ademamix_8bit": 3 * _8_BIT,
    "adafactor": 0,  # see optimizer_state
    "sgd": 0,
}


WHOLE = ("r", "prior_rank", "max_tokens", "images_per_sample", "per_device_train_batch_size")
WHOLE += ("gradient_accumulation_steps", "keep_batch_size", "keep_every", "keep_max_new_tokens")
IMAGES = "images of a step, 32 bits"
KEEPING = ", keeping"  # how the names of its moments end
QUESTION = 32  # tokens of a keep set's question in its chat template, about


@dataclass(frozen=True)
class Settings:
    """The keys of a recipe that decide what memory it takes; defaults as in run.py."""

    base: str
    method: str = "drift"
    r: int = 8
    lora_dropout: float = 0.0
    prior_rank: int = 64
    drift_rank: int | None = None
    drift_norm: str = "factor"
    drift_sketch: int | None = 64
    drift_modules: str | list | None = None
    max_tokens: int = 4096
    images_per_sample: int = 1
    processor_kwargs: dict | None = None
    think_tokens: bool = False
    per_device_train_batch_size: int = 8
    gradient_checkpointing: bool = True
    activation_checkpointing: bool | None = None
    label_smoothing_factor: float = 0.0
    gradient_accumulation_steps: int = 1
    keep: str | None = None
    keep_images: str | None = None
    keep_weight: float = 1.0
    keep_batch_size: int = 1
    keep_every: int = 1
    keep_max_new_tokens: int = 64
    model_init_kwargs: dict | None = None
    replay: float = 0.0
    optim: str = "adamw_torch_fused"
    bf16: bool | None = None
    fp16: bool = False

    def __post_init__(self):
        check_whole(**{name: getattr(self, name) for name in WHOLE})
        if not isinstance(self.processor_kwargs, dict | None):
            raise ValueError(f"processor_kwargs takes settings of the processor, got {self.processor_kwargs!r}")
        kwargs = self.processor_kwargs or {}
        size = kwargs["size"] if isinstance(kwargs.get("size"), dict) else {}
        for key, value in {**kwargs, **size}.items():
            if key in COUNTED and value is not None:
                check_whole(**{key: value})
        for name, hint in get_type_hints(Settings).items():
            check_value(name, getattr(self, name), hint)
        check_loading(self.model_init_kwargs, self.dtype)
        if self.lora_dropout > 1:  # what is not above 0 is none, to PEFT too
            raise ValueError(
                f"lora_dropout is the probability that a number is left out, at most 1, got {self.lora_dropout}"
            )
        if self.bf16 and self.fp16:
            raise ValueError("bf16 and fp16 are both true, and training is in one of them: leave one out")
        known = [name.value for name in OptimizerNames if name.value.removeprefix("paged_") in STATE]
        if self.optim not in known:
            ways_out = ", ".join(known)
            raise ValueError(f"what optim {self.optim} keeps is not known here: for an estimate name one of {ways_out}")

    @property
    def dtype(self) -> torch.dtype:
        if self.fp16:
            return torch.float16
        return torch.float32 if self.bf16 is False else torch.bfloat16

    @property
    def checkpoints(self) -> bool:
        """Are activations computed again? transformers goes by the old name only where its new one is not set."""
        return self.gradient_checkpointing if self.activation_checkpointing is None else self.activation_checkpointing

    @property
    def keeps(self) -> bool:
        """Is the gradient of a keep set added? With `replay` its answers are training samples instead."""
        return self.keep is not None and self.keep_weight > 0 and not self.replay

    @property
    def steering_rank(self) -> int:
        """How many directions of Δ steer a projection; none without guidance."""
        return 0 if self.method == "sft" else min(self.drift_rank or self.r, self.prior_rank)

    @property
    def step(self) -> Step:
        return Step(
            batch=self.per_device_train_batch_size,
            tokens=self.max_tokens,
            dtype=self.dtype,
            r=self.r,
            lora_dropout=self.lora_dropout,
            checkpointing=self.checkpoints,
            label_smoothing=self.label_smoothing_factor,
            think_tokens=self.think_tokens,
            eager=is_eager(self.model_init_kwargs),
        )


def optimizer_state(settings: Settings) -> float:
    """Bytes that the optimizer keeps for each trained number. Adafactor: 32 bits for each row and column."""
    return 4 / settings.r if settings.optim == "adafactor" else STATE[settings.optim.removeprefix("paged_")]


@dataclass
class Estimate:
    """Bytes by part at the moment of a step that takes most."""

    settings: Settings
    parts: dict[str, float]
    moment: str

    @property
    def bytes(self) -> float:
        return sum(self.parts.values())

    def summary(self) -> dict:
        """In GB, for reports."""
        parts = {part: size / 1e9 for part, size in self.parts.items()}
        return {"moment": self.moment, "parts_gb": parts, "total_gb": self.bytes / 1e9}


class Memory:
    """What training a vision-language model takes, under any settings.

    Args:
        config: its transformers config.
        name: what to call it.

    Raises:
        ValueError: it is no vision-language model that transformers knows, or one with layers of cross-attention.
    """

    def __init__(self, config: PretrainedConfig, name: str):
        self.config = config
        if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING or getattr(config, "vision_config", None) is None:
            raise ValueError(f"{name} is no vision-language model that transformers knows")
        if cross := cross_attention_layers(config):
            raise ValueError(
                f"{name} sees its images in {len(cross)} layers of cross-attention, and what these keep is not counted "
                f"here: {MEASURE}"
            )
        self.model = skeleton(config, name)
        decoder = Decoder(self.model)
        head = self.model.get_output_embeddings()
        if head is None:
            raise ValueError(
                f"{name} does not say where its head is, and what its loss takes is not counted: {MEASURE}"
            )
        self.names = decoder.projections
        modules = {name: self.model.get_submodule(name) for name in self.names}
        self.shapes = {name: (module.out_features, module.in_features) for name, module in modules.items()}
        self.weights = dict.fromkeys((FOUR_BIT, *SIXTEEN_BIT), 0)
        for name, parameter in self.model.named_parameters():
            self.weights[self._part(decoder, name)] += parameter.numel()
        self.layers = len(decoder)
        self.step_peaks = lru_cache(partial(step_peaks, decoder, head.weight.shape))

    def _part(self, decoder: Decoder, parameter: str) -> str:
        """Where a weight is counted. Expert stacks are no linear layers, so bitsandbytes leaves them in 16 bit."""
        if parameter.removesuffix(".weight") in self.shapes:
            return FOUR_BIT
        canonical = decoder.name(parameter) or ""
        if canonical in (EMBEDDING, HEAD):
            return "embedding and head"
        if canonical.startswith("embed_tokens_per_layer."):
            return "per-layer embeddings"
        return "experts" if ".experts." in canonical else "vision tower and the rest"

    def _always(self, settings: Settings) -> dict[str, float]:
        size, weights, trained = settings.dtype.itemsize, self.weights, self._trained(settings)
        return {
            FOUR_BIT: NF4 * weights[FOUR_BIT],
            **{part: size * weights[part] for part in SIXTEEN_BIT},
            "adapter, 32 bits": 4 * trained,
            "its gradients, 32 bits": 4 * trained,
            f"optimizer ({settings.optim})": trained * optimizer_state(settings),
            IMAGES: settings.gradient_accumulation_steps
            * self._pixels(settings),  # the Trainer reads all of them first
            **self._steering(settings),
        }

    def _pixels(self, settings: Settings) -> float:
        """Bytes of a batch's images, as the model takes them."""
        number = settings.per_device_train_batch_size * patches(self.config, settings)
        return number * pixel_bytes(self.config)

    def _trained(self, settings: Settings) -> int:
        return settings.r * sum(map(sum, self.shapes.values()))

    def estimate(self, settings: Settings) -> Estimate:
        moments = self._moments(settings, settings.step)
        if settings.keeps:
            moments |= self._keeping(settings, self._trained(settings))
        moments["step of the optimizer"] = {"guidance, 32 bits": self._guidance(settings)}
        images = settings.gradient_accumulation_steps * self._pixels(settings)  # the last ones are let go of after that
        moments["reading of the next step's samples"] = {"their images, 32 bits": images}
        return self._largest(settings, self._always(settings), moments)

    def least(self, settings: Settings, now: Estimate) -> float:
        """Bytes that an estimate is not below, without a step: what is always there, and of another rank's activations
        its share, since no tensor has the rank in it twice."""
        share = settings.r / now.settings.r if replace(settings, r=now.settings.r) == now.settings else 0
        always, before = (sum(self._always(s).values()) + WORKSPACES + CONTEXT for s in (settings, now.settings))
        return always + min(share, 1) * (now.bytes - before)

    def _moments(self, settings: Settings, step: Step, suffix: str = "", beside: dict | None = None) -> dict[str, dict]:
        """Moment of a pass forward and back -> what is there then alone, and `beside` it."""
        moments = {f"pass of the vision tower{suffix}": {"vision tower's activations": self.tower(settings)}}
        for phase, (layers, rest) in self.step_peaks(step).items():
            parts = {"activations kept in all layers": layers, "other activations at that moment": rest}
            moments[f"{phase} of the language model{suffix}"] = parts
        return {moment: parts | (beside or {}) for moment, parts in moments.items()}

    def _largest(self, settings: Settings, always: dict, moments: dict[str, dict]) -> Estimate:
        """What is always there, and the most that is added to it at some moment."""
        moment, parts = max(moments.items(), key=lambda item: sum(item[1].values()))
        outside = {"workspaces of cuBLAS and the like": WORKSPACES, "CUDA context": CONTEXT}
        return Estimate(settings, {**always, **parts, **outside}, moment)

    def gating(self, settings: Settings, tokens: int) -> Estimate:
        """What gate_prior takes in its place, with so many tokens at a time. The base is in 4 bits, and so is the
        expert, which answers before it is loaded and takes no more."""
        size = settings.dtype.itemsize
        k, shapes = settings.prior_rank, self.shapes.values()
        settings = replace(
            settings, per_device_train_batch_size=1, images_per_sample=1, max_tokens=tokens, model_init_kwargs=None
        )
        step = Step(1, tokens, settings.dtype, checkpointing=settings.checkpoints, gated=k)
        always = {
            FOUR_BIT: NF4 * self.weights[FOUR_BIT],
            **{part: size * self.weights[part] for part in SIXTEEN_BIT},
            "prior, 16 bits": size * sum(min(k, *shape) * sum(shape) for shape in shapes),
            "gates, their gradients and Adam": 5 * 4 * sum(min(k, *shape) for shape in shapes),
        }
        images = {"images, 32 bits": self._pixels(settings)}
        return self._largest(settings, always, self._moments(settings, step, beside=images))

    def _steering(self, settings: Settings) -> dict[str, float]:
        """U [out, k] and Vh [k, in] of what is steered, and capture.py's sums."""
        if not (k := settings.steering_rank):
            return {}
        steered = [shape for name, shape in self.shapes.items() if is_guided(settings, self.names[name])]
        parts = {"steering factors, 16 bits": 2 * k * sum(out + inner for out, inner in steered)}
        if settings.drift_norm == "weight":
            columns = settings.drift_sketch
            sums = sum(out * ((columns or inner) + settings.r) for out, inner in steered)
            parts["sums of drift_norm='weight', 32 bits"] = 4 * sums
        return parts

    def keep_step(self, settings: Settings) -> Step:
        """A part of a keep batch, which is no larger than a training batch (keeping/feed.py)."""
        tokens = keep_tokens(self.config, settings)
        fit = settings.per_device_train_batch_size * settings.max_tokens // tokens
        samples = min(settings.keep_batch_size, max(1, fit))
        return replace(
            settings.step, batch=samples, tokens=tokens, answer=min(settings.keep_max_new_tokens, tokens - 1)
        )

    def _keeping(self, settings: Settings, trained: int) -> dict[str, dict[str, float]]:
        """The moments of a pass of keeping, whose gradients are there beside the task's."""
        step = self.keep_step(settings)
        earlier = {"keeping's gradients so far, 32 bits": 4 * trained * (step.batch < settings.keep_batch_size)}
        one = replace(kept(settings), per_device_train_batch_size=step.batch)
        return self._moments(one, step, KEEPING, earlier | {"keeping's images, 32 bits": self._pixels(one)})

    def _guidance(self, settings: Settings) -> float:
        """A batch of the largest projections in batches.py, in fp32: parameters, gradients, direction, biased gradients
        and one more while they are computed; and the factors of the prior."""
        if not (k := settings.steering_rank):
            return 0.0
        out, inner = max(self.shapes.values())
        batch = min(self.layers, max(1, BATCH_ELEMENTS // (out * settings.r)))
        return 4 * batch * (out + inner) * (5 * settings.r + k)

    def tower(self, settings: Settings) -> float:
        """Bytes of the vision tower's activations, which runs without autograd: those of one block, and the outputs of
        all of them where the model asks for an inner one's."""
        tower = self.model.get_encoder("image")
        lists = [m for m in tower.modules() if isinstance(m, nn.ModuleList)]
        if not lists:
            raise ValueError(
                f"what a vision tower without blocks takes, {type(tower).__name__}, is not counted: {MEASURE}"
            )
        blocks = max(lists, key=len)
        widths = [(m.in_features, m.out_features) for m in blocks[0].modules() if isinstance(m, nn.Linear)]
        last = self.config.model_type == "internvl" and self.config.vision_feature_layer == -1
        outputs = len(blocks) * widths[0][0] if hasattr(self.config, "vision_feature_layer") and not last else 0
        found, samples = _cut(self.config, settings), settings.per_device_train_batch_size
        scores = self._scores(found, samples) if is_eager(settings.model_init_kwargs) else 0
        return settings.dtype.itemsize * samples * found.all_patches * (sum(map(sum, widths)) + outputs) + scores

    def _scores(self, found: Cut, samples: int) -> int:
        """Bytes of eager attention in the tower: 16 bits before the softmax, 32 in it, and 16 of what it is rounded to,
        for each head and two patches of a piece."""
        vision = self.config.vision_config
        heads = max(getattr(vision, name, 1) for name in ("num_heads", "num_attention_heads"))
        if getattr(vision, "spatial_merge_size", 1) > 1:  # Qwen: one image after the other
            return 8 * heads * found.patches**2
        if vision.model_type == "pixtral":  # all images are one sequence
            return 8 * heads * (samples * found.all_patches) ** 2
        return 8 * heads * samples * found.pieces * found.patches**2


def patches(config: PretrainedConfig, settings: Settings) -> int:
    """Into how many patches a sample's images are cut."""
    return _cut(config, settings).all_patches


def fixed_tokens(config: PretrainedConfig, settings: Settings) -> int:
    """Tokens of a sample's images at most, whatever max_tokens is: none where they shrink with it, as of Qwen."""
    fixed = cut(config, settings.processor_kwargs, settings.images_per_sample, tokens=0)
    return math.ceil(fixed.all_patches / patches_per_token(config))


def _cut(config: PretrainedConfig, settings: Settings) -> Cut:
    return cut(config, settings.processor_kwargs, settings.images_per_sample, settings.max_tokens)


def kept(settings: Settings) -> Settings:
    """With samples of one image, as the keep set's are. Those of the data are no larger than max_tokens lets through;
    other pictures are as large as the processor does."""
    return replace(settings, images_per_sample=1, max_tokens=LARGEST if settings.keep_images else settings.max_tokens)


def keep_tokens(config: PretrainedConfig, settings: Settings) -> int:
    """Tokens of one of the keep set's samples: an image, a question, and the longest answer."""
    image = math.ceil(patches(config, kept(settings)) / patches_per_token(config))
    tokens = image + QUESTION + settings.keep_max_new_tokens
    return tokens if settings.keep_images else min(tokens, settings.max_tokens)
