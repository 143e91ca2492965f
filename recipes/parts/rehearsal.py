"""What Trainer makes of its settings once all else is there, made first of next to nothing: its optimizer, schedule and
workers. What it refuses of them is told before anything is loaded."""

from __future__ import annotations

import contextlib
import copy
import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import trl.models
from accelerate.utils import GradientAccumulationPlugin
from huggingface_hub import HfApi
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainingArguments, get_scheduler
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.training_args import ParallelMode
from transformers.utils import is_liger_kernel_available

from drift_peft.arguments import nearest
from drift_peft.checkpoints import Checkpoint
from drift_peft.warn import first_line

STEPS = 1000  # of a run in epochs, whose length is not known yet
# Keys of model_init_kwargs that are tried on a model without weights, and those that from_pretrained takes besides.
TRIED = "attn_implementation", "experts_implementation"
DTYPES = "auto", "bfloat16", "float16", "float32"  # as TRL has them
ALSO_TAKEN = ("dtype", "trust_remote_code", "low_cpu_mem_usage", "device_map", "max_memory", "offload_folder",
              "offload_buffers", "proxies", "key_mapping", "use_kernels", "allow_all_kernels", "kernel_config",
              "tp_plan", "tp_size", "device_mesh", "distributed_config")  # fmt: skip


def rehearse(train: TrainingArguments) -> None:
    """ValueError for settings that a run would end with after its prior and its keep set are made."""
    for name in ("seed", "data_seed"):
        if not 0 <= (getattr(train, name) or 0) < 2**32:
            raise ValueError(f"{name} is a number of at least 0 and below 2**32, got {getattr(train, name)}")
    if train.fsdp and train.parallel_mode != ParallelMode.DISTRIBUTED:
        raise ValueError(f"fsdp={train.fsdp} is for several processes, and this is one: leave it out")
    _rehearse_accelerator(train.accelerator_config)
    if train.use_liger_kernel and not is_liger_kernel_available():
        raise ValueError(
            "use_liger_kernel=True needs liger-kernel, which is not installed here: install it, or leave it out"
        )
    if train.use_cpu and getattr(train, "activation_offloading", False):
        raise ValueError("activation_offloading=True moves what a GPU holds, and use_cpu takes none: leave it out")
    with _refused(f"optim={train.optim.value}", "name another, or see to optim_args, learning_rate and adam_…"):
        optimizer = _optimizer(train)
    with _refused(f"lr_scheduler_type={train.lr_scheduler_type.value}", "set what it takes in lr_scheduler_kwargs"):
        steps = train.max_steps if train.max_steps > 0 else STEPS
        warmup, kwargs = train.get_warmup_steps(steps), train.lr_scheduler_kwargs
        get_scheduler(train.lr_scheduler_type, optimizer, warmup, steps, scheduler_specific_kwargs=kwargs)
    workers = {name: getattr(train, f"dataloader_{name}", None) for name in ("num_workers", "persistent_workers")}
    context = getattr(train, "dataloader_multiprocessing_context", None)
    way_out = "change it, or leave out what else is said of dataloader_…"
    with _refused(f"dataloader_num_workers={train.dataloader_num_workers}", way_out):
        DataLoader([0], multiprocessing_context=context, **workers)
    if train.torch_compile:
        backend, mode = train.torch_compile_backend, train.torch_compile_mode
        with _refused(
            f"torch_compile_backend={backend} with torch_compile_mode={mode}", "name others, or leave them out"
        ):
            torch.compile(torch.nn.Linear(1, 1), backend=backend, mode=mode)
    if train.gradient_checkpointing:
        kwargs = train.gradient_checkpointing_kwargs or {}
        with _refused(f"gradient_checkpointing_kwargs={kwargs}", "leave out what is no setting of it"):
            _checkpoint(kwargs)
    if train.push_to_hub:
        with _refused("push_to_hub=True", "run hf auth login, or leave it out"):
            HfApi(token=train.hub_token).whoami()


def _rehearse_accelerator(config: AcceleratorConfig) -> None:
    if config.dispatch_batches:
        why = "it would cut a batch's images by the number of its samples"
        raise ValueError(f"accelerator_config has dispatch_batches, which cannot be: {why}: leave it out")
    kwargs = config.gradient_accumulation_kwargs or {}
    if "num_steps" in kwargs:
        way_out = "set gradient_accumulation_steps instead"
        raise ValueError(f"accelerator_config has num_steps in gradient_accumulation_kwargs: {way_out}")
    with _refused(f"gradient_accumulation_kwargs={kwargs} in accelerator_config", "leave out what is no setting of it"):
        GradientAccumulationPlugin(num_steps=1, **kwargs)


def rehearse_loading(base: Checkpoint, kwargs: dict[str, Any]) -> None:
    """ValueError for model_init_kwargs with which the base is not loaded in the end."""
    own = inspect.signature(PreTrainedModel.from_pretrained).parameters.values()
    taken = {*TRIED, *ALSO_TAKEN, *(p.name for p in own if p.kind is p.KEYWORD_ONLY)} - {"config", "revision"}
    for key in kwargs:
        if key not in taken and not hasattr(base.config, key):
            meant = nearest(key, [*taken]) or "leave it out"
            raise ValueError(f"model_init_kwargs has {key}, with which nothing loads {base.source}; {meant}")
    if kwargs.get("dtype", "auto") not in DTYPES:
        raise ValueError(f"model_init_kwargs has dtype {kwargs['dtype']!r}: it takes one of {', '.join(DTYPES)}")
    parts = kwargs.get("attn_implementation")
    for part in parts if isinstance(parts, dict) else ():
        if part not in ("", *base.config.sub_configs):
            known = nearest(part, [*base.config.sub_configs]) or f"it has {', '.join(base.config.sub_configs)}"
            raise ValueError(f"attn_implementation names {part}, which {base.source} does not have; {known}")
    if kwargs.get("allow_all_kernels"):  # which loading alone allows
        return
    if tried := {key: value for key, value in kwargs.items() if key in TRIED}:
        config = copy.deepcopy(base.config)
        config.quantization_config = None
        way_out = "install what it takes, name another, or leave it out"
        with _refused(f"model_init_kwargs={tried}", way_out), torch.device("meta"):
            base.auto_class.from_config(config, **tried)


def _checkpoint(kwargs: dict[str, Any]) -> None:
    """A layer's, with what transformers and TRL leave of them."""
    enable = getattr(PreTrainedModel, "activation_checkpointing_enable", PreTrainedModel.gradient_checkpointing_enable)
    theirs = {*inspect.signature(enable).parameters}
    if hasattr(trl.models, "enable_selective_activation_checkpointing"):
        theirs.add("selective")
    own = [p.name for p in inspect.signature(checkpoint).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for key in kwargs:  # without reentrance, a layer would be given what is unknown, and may take it in silence
        if key not in (*own, "preserve_rng_state", *theirs):
            raise ValueError(f"it has no {key}, but {', '.join(own)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # which come again where they are meant
        rest = {"use_reentrant": False} | {key: kwargs[key] for key in kwargs if key not in theirs}  # as TRL has it
        checkpoint(torch.nn.Linear(1, 1), torch.ones(1, requires_grad=True), **rest)


def _optimizer(train: TrainingArguments) -> torch.optim.Optimizer:
    """As Trainer's create_optimizer makes it, of one weight."""
    model, train = torch.nn.Linear(1, 1), copy.copy(train)
    if train.optim_target_modules is not None:  # names of the real model's
        train.optim_target_modules = "all-linear"
    kind, options = Trainer.get_optimizer_cls_and_kwargs(train, model)
    if not isinstance(kind, type) or not issubclass(kind, torch.optim.Optimizer):  # which splits the real model
        return torch.optim.SGD(model.parameters())
    weights = [{"params": [*model.parameters()], "weight_decay": train.weight_decay}]
    for own in ("params", "model", "optimizer_dict"):  # in place of these
        weights = options.pop(own, weights)
    return kind(weights, **options)


@contextlib.contextmanager
def _refused(setting: str, way_out: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of any kind: each library has its own
        raise ValueError(f"{setting} cannot be: {first_line(error).rstrip('.')}: {way_out}") from error
