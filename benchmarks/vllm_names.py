"""Does vLLM put an adapter of ours onto its modules? Its own loading, with a tiny model of every type, on a CPU.

pip install --no-deps --target VLLM -r benchmarks/vllm_needs.txt
python benchmarks/vllm_names.py VLLM [TYPE ...]

Of each image-text-to-text type: an adapter is saved by DriftConfig; vLLM builds its model of the same configuration on
the meta device, reads the adapter with its WorkerLoRAManager, and activates it. Counted are the modules of the adapter
that are then in a layer of vLLM's: it says nothing of those that are not. No kernel runs, so what the layers compute is
not checked. What vLLM imports for a GPU and does not call on this way is replaced by empty names.
"""

import argparse
import importlib.abc
import importlib.machinery
import importlib.metadata
import json
import logging
import multiprocessing
import os
import re
import sys
import tempfile
import types
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from every_type import TYPES, tiny_base
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from tiny import FAMILIES, tiny_vlm

from drift_peft import DriftConfig
from drift_peft.checkpoints import export_for_vllm

os.environ |= {"VLLM_LOGGING_LEVEL": "CRITICAL", "VLLM_NO_USAGE_STATS": "1", "VLLM_TARGET_DEVICE": "cpu"}
EMPTY = "torchvision torchaudio llguidance outlines_core lmformatenforcer cv2 numba".split()
RANK = 4
BESIDE = {  # type -> what vLLM reads of its text config beyond what transformers has by default: the hub's files say it
    "glm4v_moe": {"head_dim": 16},
    "lfm2_vl": {"conv_dim": 64, "conv_use_xavier_init": True, "block_dim": 64, "block_norm_eps": 1e-5},
    "qwen3_vl_moe": {"norm_topk_prob": True},
}
FROM_MIXED = "gemma4", "lfm2_vl"  # of tiny.py, where the type's default lacks a vision tower or is too large
PARTIAL = "glm4v", "glm_ocr"  # of whose heads vLLM rotates the half that the hub's files name
ALL, SOME, NONE = "all", "SOME", "NONE"
NO_MODEL, NO_LORA, REFUSES, OURS, NOT_BUILT = "no model", "no LoRA", "refuses", "not adapted", "not built here"


class Name(type):
    """Of a class that stands for whatever a missing package has: it is also its own attributes and what it returns."""

    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls

    def __call__(cls, *args, **kwargs):
        if cls is not Anything:
            return super().__call__(*args, **kwargs)
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else cls

    def __or__(cls, _):
        return cls

    __ror__ = __getitem__ = __or__


class Anything(metaclass=Name):
    def __init__(self, *args, **kwargs):
        pass


class Empty(types.ModuleType):
    __path__ = ()
    __spec__ = None

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the packages of EMPTY where nothing else does."""

    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] in EMPTY else None

    def create_module(self, spec):
        return Empty(spec.name)

    def exec_module(self, module):
        pass


def prepare(vllm: Path) -> None:
    """Make vLLM importable here, as on a machine without a GPU."""
    sys.path.insert(0, str(vllm))
    sys.meta_path.append(Finder())
    version = importlib.metadata.version
    importlib.metadata.version = lambda name: "0.28.0" if name == "torchvision" else version(name)
    import vllm.platforms as platforms
    from vllm.platforms.cpu import CpuPlatform

    platforms.current_platform = CpuPlatform()
    torch.ops._C.gelu_quick = None  # of the compiled part: layers look it up when they are made
    from vllm.lora.layers import FusedMoE3DWithLoRA, FusedMoEWithLoRA
    from vllm.model_executor.models import registry
    from vllm.model_executor.models.transformers import multimodal

    # Experts have kernels for GPUs alone; an adapter of ours never holds them.
    for experts in (FusedMoEWithLoRA, FusedMoE3DWithLoRA):
        experts.can_replace_layer = classmethod(lambda *_, **__: False)
    # The models of transformers itself ask the processor, of which there is none, for the kinds of their inputs.
    multimodal.MultiModalProcessingInfo.get_hf_processor = lambda *_, **__: SimpleNamespace(image_processor=None)
    # In this process, not in one of its own for each class, which would lack the lines above
    registry._LazyRegisteredModel.inspect_model_cls = lambda self: registry._ModelInfo.from_model_cls(
        self.load_model_cls()
    )


def save_adapter(model_type: str, folder: Path) -> int:
    """A config.json and an adapter of ours for it. Returns the number of its modules."""
    base = tiny_vlm(model_type) if model_type in {*FAMILIES, *FROM_MIXED} else tiny_base(model_type)
    base.config.architectures = [type(base).__name__]
    text = base.config.get_text_config()
    vars(text).update(BESIDE.get(model_type, {}))
    if model_type in PARTIAL:
        text.rope_parameters["mrope_section"] = [2, 1, 1]
    base.config.save_pretrained(folder / "base")
    model = get_peft_model(base, DriftConfig(drift_alpha=0, r=RANK, task_type="CAUSAL_LM"))
    model.save_pretrained(folder / "adapter")
    return len(model.base_model.targeted_module_names)


def served(folder: Path, name: str = "adapter") -> tuple[int, str]:
    """Number of the adapter's modules that are in a layer of vLLM's; the class of its model."""
    from vllm.config import DeviceConfig, LoRAConfig, ModelConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.lora.request import LoRARequest
    from vllm.lora.worker_manager import WorkerLoRAManager
    from vllm.model_executor.model_loader.utils import initialize_model

    settings = ModelConfig(
        str(folder / "base"), skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=64
    )
    config = VllmConfig(
        model_config=settings, device_config=DeviceConfig("cpu"), lora_config=LoRAConfig(max_lora_rank=8)
    )
    with set_current_vllm_config(config):
        if not torch.distributed.is_initialized():
            init_distributed_environment(1, 0, f"file://{folder}/group", 0, "gloo")
            initialize_model_parallel(1, 1)
        with torch.device("meta"):
            model = initialize_model(config)
            loader = WorkerLoRAManager(config, torch.device("meta"), {})
            loader.create_lora_manager(model, config)
        adapter = loader._load_adapter(LoRARequest("ours", 1, str(folder / name)))
        manager = loader._adapter_manager
        manager.add_adapter(adapter)
        manager.activate_adapter(adapter.id)
    found = filter(None, (manager._get_lora_layer_weights(adapter, module) for module in manager.modules))
    return sum(_parts(weights) for weights in found), type(model).__name__


def _parts(weights) -> int:
    """Modules of the adapter in one layer of vLLM's, which may have packed several."""
    return sum(part is not None for part in weights.lora_a) if isinstance(weights.lora_a, list) else 1


def take(folder: Path, ours: int) -> dict:
    """What comes of an adapter of `ours` modules."""
    try:
        matched, model = served(folder)
    except Exception as error:
        said = _sentence(error)
        words = {
            NO_LORA: "LoRA is not supported for",
            NO_MODEL: "are not supported for now",
            REFUSES: "expected target",
        }
        result = next((result for result, start in words.items() if start in said), NOT_BUILT)
        return {"ours": ours, "result": result, "said": said}
    row = {"ours": ours, "matched": matched, "class": model, "result": ALL if matched == ours else SOME}
    if matched < ours:
        try:
            export_for_vllm(folder / "adapter", folder / "exported", folder / "base")
            row["said"] = f"after drift-peft export: {served(folder, 'exported')[0]}"
        except ValueError as error:
            row |= {"result": row["result"] if matched else NONE, "said": _sentence(error)}
    return row


def _sentence(error: Exception) -> str:
    said = " ".join(str(error).split()).partition("[type=")[0]
    said = re.sub(r"\(?/tmp/\S+\)?|Supported \w+(:| implement).*|\d+ validation error for \w+ Value error, ", "", said)
    return f"{type(error).__name__}: {said}"[:200]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("vllm", type=Path, help="folder that vLLM is installed in")
    parser.add_argument("types", nargs="*", metavar="TYPE", help="default: all")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        rows = _rows(args.vllm.resolve(), args.types or TYPES, Path(folder))
    import vllm

    table = Table(title=f"our adapters in vLLM {vllm.__version__}, with transformers {transformers.__version__}")
    for column in ("type", "vLLM's class", "result", "ours", "matched", "why not"):
        table.add_column(column, justify="right" if column in ("ours", "matched") else "left", overflow="fold")
    for model_type, row in rows.items():
        table.add_row(model_type, *(str(row.get(key, "")) for key in ("class", "result", "ours", "matched", "said")))
    Console(width=None if sys.stdout.isatty() else 180).print(table)
    counts = Counter(row["result"] for row in rows.values())
    print(json.dumps({"vllm": vllm.__version__, "transformers": transformers.__version__, **counts}))


def _rows(vllm: Path, model_types: list[str], folder: Path) -> dict[str, dict]:
    """All adapters first, and then a process for each: vLLM changes classes of transformers, and of itself."""
    rows = {}
    for model_type in model_types:
        try:
            rows[model_type] = {"ours": save_adapter(model_type, folder / model_type)}
        except Exception as error:
            rows[model_type] = {"result": OURS, "said": _sentence(error)}
    prepare(vllm)
    for model_type, row in rows.items():
        if "ours" in row:
            with multiprocessing.get_context("fork").Pool(1) as process:
                rows[model_type] = process.apply(take, (folder / model_type, row["ours"]))
        print(f"{model_type}: {rows[model_type]}", file=sys.stderr)
    return rows


if __name__ == "__main__":
    main()
