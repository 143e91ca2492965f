"""DRIFT for PEFT: LoRA adapters of a vision-language model, steered toward a text-only reasoning expert.

In the examples of docstrings EXPERT and VLM are folders or hub ids of one family, `vlm` is the VLM as transformers
loads it, `processor` its processor, IMAGES a folder of pictures, and `train` a training loop. The tests run them on the
demo's checkpoints.

Public names are loaded on first use (PEP 562), so that `import drift_peft` and the command line's help take no time.
"""

from importlib import import_module

__version__ = "0.1.0"

_ROOMS = {  # public name -> the room that it comes from
    "DriftConfig": "tuner",  # which registers the tuner with PEFT, and the hooks with torch.optim
    "DriftModel": "tuner",
    "KeepSet": "keeping",
    "ReasoningPrior": "prior",
    "build_prior": "prior",
    "gate_prior": "merge",
    "guide": "tuner",
    "keep": "keeping",
    "language_model_targets": "checkpoints",
    "make_keep_set": "keeping",
    "merge_adapter": "merge",
    "merge_baseline": "merge",
    "telemetry": "tuner",
    "transplant": "merge",
}
__all__ = [*_ROOMS]


def __getattr__(name: str):
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        value = getattr(import_module(f".{_ROOMS[name]}", __name__), name)
    except (ImportError, RuntimeError) as error:
        from .builds import explained

        raise explained(error) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOMS})
