"""DriftPlugin: axolotl's `adapter: lora` or `qlora`, or full fine-tuning, steered by a prior. In axolotl's YAML:

    plugins: [drift_peft.integrations.axolotl.DriftPlugin]
    adapter: qlora
    drift_prior: prior.safetensors
    drift_alpha: 0.3
    drift_keep: keep.safetensors  # if the VLM's own answers shall be kept

Where drift_peft is not installed, axolotl ends there since 0.21; before, it prints "Failed to load plugin" and trains
without it.
"""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from typing import Any, get_type_hints

from pydantic import Field, create_model

from ..keeping import keep
from ..tuner import DriftConfig
from .settings import GUIDANCE, KEEPING, PluginSettings
from .steer import SteerCallback

try:
    from axolotl.integrations.base import BasePlugin
    from axolotl.loaders import load_processor, load_tokenizer
except ImportError as error:
    raise ImportError(
        f"drift_peft.integrations.axolotl is a plugin of axolotl, which cannot be imported here ({error}): install "
        "axolotl beside drift_peft."
    ) from error


class DriftPlugin(BasePlugin):
    """Steers and keeps the model of every Trainer that axolotl makes.

    Not in `post_lora_load`: axolotl calls it for inference and for reference models too, and leaves it to DPO, IPO
    and KTO's trainers to wrap the model afterwards.
    """

    def register(self, cfg: dict) -> None:
        """Read the settings before anything is loaded, from the file itself: axolotl forgets keys that are null.

        Raises:
            ValueError: as of PluginSettings.read; relora, or a null key under use_ray.
        """
        self.settings = PluginSettings.read(cfg)
        if cfg.get("relora") and self.settings.steers:
            raise ValueError(
                "relora merges the adapter and starts it anew, and each time Δ would be added once more: leave out "
                "relora, or the plugin."
            )
        lost = [key for key in cfg if key.startswith("drift_") and cfg[key] is None]
        if cfg.get("use_ray") and lost:  # a worker reads what axolotl has made of the file
            raise ValueError(
                f"{lost[0]}: null does not reach the workers of use_ray, which would take its default: leave it out, "
                "or train without use_ray."
            )

    def get_input_args(self) -> str:
        return f"{__name__}.DriftArgs"

    def add_callbacks_pre_trainer(self, cfg, model) -> list[SteerCallback]:
        return [SteerCallback(self.settings, partial(_processor, cfg))]


def _processor(cfg):
    return load_processor(cfg, load_tokenizer(cfg))


def _drift_args():
    """A pydantic model of the keys, with their types, defaults and help, from where they are defined."""
    types, config = get_type_hints(DriftConfig), {f.name: f for f in fields(DriftConfig)}
    keys: dict[str, Any] = {}
    for key, name in GUIDANCE.items():
        keys[key] = (types[name] | None, Field(default=None, description=config[name].metadata["help"]))
    types = get_type_hints(keep)
    for key, name in KEEPING.items():
        keys[key] = (str | None if key == "drift_keep" else types[name] | None, Field(default=None))
    return create_model("DriftArgs", **keys)


DriftArgs = _drift_args()
