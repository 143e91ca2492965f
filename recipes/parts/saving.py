"""What a run leaves behind, each file whole or as it was before."""

import json
import os
import shutil
import tempfile
from pathlib import Path

from safetensors import SafetensorError
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTTrainer

SAVING = (OSError, RuntimeError, SafetensorError)  # what a full disk raises: torch.save has no error of its own


class Trainer(SFTTrainer):
    """TRL's. A checkpoint that cannot be written leaves nothing half-written, and its adapter is kept nevertheless.

    The adapter's model card stays, where TRL's `push_to_hub` puts one of its own in its place.
    """

    def create_model_card(self, *args, **kwargs):
        super().create_model_card(*args, **kwargs)
        self.model.create_or_update_model_card(self.args.output_dir)

    def _save_checkpoint(self, model, trial):
        try:
            super()._save_checkpoint(model, trial)
        except SAVING as error:
            step = self.state.global_step
            shutil.rmtree(Path(self.args.output_dir, f"checkpoint-{step}"), ignore_errors=True)  # makes room, too
            save_adapter(self)
            raise OSError(
                f"checkpoint-{step} could not be written ({error}); the adapter as of this step is in "
                f"{self.args.output_dir}, without its optimizer: {_way_on(self)}"
            ) from error


def save_adapter(trainer: SFTTrainer) -> None:
    """Adapter, model card and processor into output_dir.

    Raises:
        OSError: they cannot be written; it names the checkpoint to go on from.
    """
    output = Path(trainer.args.output_dir)
    try:
        with tempfile.TemporaryDirectory(dir=output) as folder:
            trainer.save_model(folder)
            for file in Path(folder).iterdir():
                os.replace(file, output / file.name)
    except SAVING as error:
        raise OSError(f"the adapter could not be written to {output} ({error}): {_way_on(trainer)}") from error


def _way_on(trainer: SFTTrainer) -> str:
    last = get_last_checkpoint(trainer.args.output_dir)
    return f"make room, then go on with --resume-from-checkpoint {last}" if last else "make room, then start again"


def write_json(content: dict, file: Path) -> None:
    unfinished = file.with_name(f"{file.name}.tmp")
    try:
        unfinished.write_text(json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)
