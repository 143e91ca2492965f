"""What is pushed to the hub keeps our model card, whoever pushes it: PEFT, transformers or Trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from peft import PeftModel

from ..checkpoints import DRIFT_CONFIG
from ..keeping import keep_words
from .card import update_card
from .config import DriftConfig
from .patches import in_place_of

PUSHED = "This is the model card of a 🤗 transformers model"  # in the empty card of transformers' push_to_hub


@in_place_of(PeftModel, "create_or_update_model_card")
def _kept(write: Callable, model: PeftModel, output_dir: str):
    """Trainer's push_to_hub puts a card of its own in place of ours, and has PEFT add to that: here ours comes back."""
    write(model, output_dir)
    for name, config in model.peft_config.items():
        if isinstance(config, DriftConfig):
            config.keeping = keep_words(model)
            folder = Path(output_dir, "" if name == "default" else name)
            if (folder / DRIFT_CONFIG).is_file():
                update_card(folder, config)


@in_place_of(PeftModel, "_upload_modified_files")
def _filled_in(upload: Callable, model: PeftModel, working_dir: str, *args, **kwargs):
    """`push_to_hub` puts the card of the repository, or an empty one, in place of what was saved: fill in that one."""
    card = Path(working_dir, "README.md")
    if any(isinstance(config, DriftConfig) for config in model.peft_config.values()):
        if PUSHED in card.read_text(encoding="utf-8"):
            card.unlink()
        model.create_or_update_model_card(working_dir)
    return upload(model, working_dir, *args, **kwargs)
