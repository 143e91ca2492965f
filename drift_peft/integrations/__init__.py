"""The same guidance inside the tools that people train with, each through the interface that the tool has for it.

settings       the keys that steer and keep, one list for all tools
steer          a callback of transformers' Trainer that steers and keeps the model which it is given
axolotl        DriftPlugin, named under `plugins:` in axolotl's YAML
ms_swift       the tuner `drift` of ms-swift, imported by a file of --external_plugins
llama_factory  LLaMA-Factory's own training, started with the `drift_…` keys in its YAML

Importing one of the last three needs its tool. TRL and Unsloth need no plugin: `peft_config=DriftConfig(…)` there, and
`guide` after `get_peft_model` here.
"""
