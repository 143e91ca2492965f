"""What PEFT saves has our settings and our card beside it, whatever steers it; and so has what is pushed to the hub, by
PEFT, transformers or Trainer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

from peft import PeftModel

from ..checkpoints import DRIFT_CONFIG, auto_class_of, quantization_of
from ..keeping import keep_words
from .card import update_card
from .patches import in_place_of
from .steered import settings_of

PUSHED = "This is the model card of a 🤗 transformers model"  # in the empty card of transformers' push_to_hub


@in_place_of(PeftModel, "save_pretrained")
def _with_settings(save: Callable, model: PeftModel, save_directory: str, *args, **kwargs) -> None:
    """PEFT asks an adapter's config to save itself, and that of one which `guide` steers knows nothing of it."""
    save(model, save_directory, *args, **kwargs)
    given = inspect.signature(save).bind(model, save_directory, *args, **kwargs)
    given = {**kwargs, **given.arguments}  # by name alone where another library has wrapped it
    selected, here = given.get("selected_adapters"), given.get("is_main_process", True)
    for name in (model.peft_config if selected is None else selected) if here else ():
        lora, config = model.peft_config[name], settings_of(model, name)
        if config is not None and config is not lora:
            config.quantization = quantization_of(model)
            config.loaded_by = auto_class_of(getattr(model, "config", None)).__name__
            config.beside(lora).save_settings(_folder(save_directory, name))


@in_place_of(PeftModel, "create_or_update_model_card")
def _kept(write: Callable, model: PeftModel, output_dir: str):
    """Trainer's push_to_hub puts a card of its own in place of ours, and has PEFT add to that: here ours comes back."""
    write(model, output_dir)
    for name, lora in model.peft_config.items():
        if config := settings_of(model, name):
            config.keeping = keep_words(model)
            folder = _folder(output_dir, name)
            if (folder / DRIFT_CONFIG).is_file():
                update_card(folder, config.beside(lora))


@in_place_of(PeftModel, "_upload_modified_files")
def _filled_in(upload: Callable, model: PeftModel, working_dir: str, *args, **kwargs):
    """`push_to_hub` puts the card of the repository, or an empty one, in place of what was saved: fill in that one."""
    card = Path(working_dir, "README.md")
    if any(settings_of(model, name) for name in model.peft_config):
        if PUSHED in card.read_text(encoding="utf-8"):
            card.unlink()
        model.create_or_update_model_card(working_dir)
    return upload(model, working_dir, *args, **kwargs)


def _folder(save_directory: str, adapter: str) -> Path:
    """Where PEFT saves it."""
    return Path(save_directory, "" if adapter == "default" else adapter)
