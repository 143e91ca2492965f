"""What a run leaves behind, each file and each checkpoint whole or as it was before."""

import os
import shutil
from pathlib import Path

from transformers import TrainerCallback
from transformers.trainer_utils import TrainOutput
from trl import SFTTrainer

from drift_peft import DriftConfig
from drift_peft.atomic import reason_of, write_json

from .checkpoints import checkpoints, newest_whole
from .trained_with import FILE

PARTIAL = "checkpoint.partial"  # which Trainer takes for no checkpoint
ADAPTER = "adapter.partial"
OF_THE_REST = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss")


class NothingLeft(Exception):
    """The checkpoint to go on from has taken all steps."""


class _Ends(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            raise NothingLeft


class Trainer(SFTTrainer):
    """TRL's. A checkpoint is written under another name and renamed when it is complete; one that cannot be written
    leaves nothing behind, and its adapter is kept nevertheless. A run that has taken all its steps takes no more. One
    that goes on does not say how long it took, nor its mean loss: Trainer knows those of the rest alone.

    The adapter's model card stays, where TRL's `push_to_hub` puts one of its own in its place.

    Attributes:
        held: what each checkpoint says that it was trained with; see trained_with.py.
    """

    held: dict | None = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(_Ends())  # after the others, which note the data and Δ
        self._place: str | None = None  # where a checkpoint is being written

    def train(self, resume_from_checkpoint: str | None = None, **kwargs) -> TrainOutput:
        try:
            result = super().train(resume_from_checkpoint, **kwargs)
        except NothingLeft:  # adapter and state are those of the checkpoint by now, but for what a step would count on
            held = DriftConfig.from_pretrained(resume_from_checkpoint)
            self.model.peft_config[self.model.active_adapter].drift_steps = held.drift_steps
            return TrainOutput(self.state.global_step, 0.0, {})
        unknown = OF_THE_REST if resume_from_checkpoint else ()
        return result._replace(metrics={key: value for key, value in result.metrics.items() if key not in unknown})

    def create_model_card(self, *args, **kwargs):
        super().create_model_card(*args, **kwargs)
        self.model.create_or_update_model_card(self.args.output_dir)

    def _get_output_dir(self, trial) -> str:
        return self._place or super()._get_output_dir(trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._place is None:  # else it has another name in a moment
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model, trial) -> None:
        output, name = Path(self.args.output_dir), f"checkpoint-{self.state.global_step}"
        partial = output / PARTIAL
        try:
            shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
            self._place = str(partial)
            super()._save_checkpoint(model, trial)
            self._place = None
            write_json(partial / name / FILE, self.held)
            if (output / name).exists():  # of a run that was taken up from an earlier one
                os.replace(output / name, partial / f"{name}.old")
            os.replace(partial / name, output / name)
            limit = self.args.save_total_limit or 0
            for old in checkpoints(output)[:-limit] if limit > 0 else ():
                os.replace(old, partial / old.name)
        except Exception as error:  # a full disk has no error of its own: torch, safetensors and tokenizers have theirs
            shutil.rmtree(partial, ignore_errors=True)  # makes room, too
            self._place = None
            save_adapter(self)
            raise OSError(
                f"{name} could not be written ({reason_of(error)}); the adapter as of this step is in "
                f"{self.args.output_dir}, without its optimizer: {_way_on(self)}"
            ) from error
        finally:
            self._place = None
        shutil.rmtree(partial, ignore_errors=True)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(output / name))


def save_adapter(trainer: SFTTrainer) -> None:
    """Adapter, model card and processor into output_dir.

    Raises:
        OSError: they cannot be written; it names the checkpoint to go on from.
    """
    output = Path(trainer.args.output_dir)
    partial = output / ADAPTER
    try:
        shutil.rmtree(partial, ignore_errors=True)
        trainer.save_model(str(partial))
        for file in partial.iterdir():
            os.replace(file, output / file.name)
    except Exception as error:
        reason = reason_of(error)
        raise OSError(f"the adapter could not be written to {output} ({reason}): {_way_on(trainer)}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def clear(output: Path) -> None:
    """What a killed run was writing is gone."""
    for name in (PARTIAL, ADAPTER):
        shutil.rmtree(output / name, ignore_errors=True)


def _way_on(trainer: SFTTrainer) -> str:
    last = newest_whole(trainer.args.output_dir)
    return f"make room, then go on with --resume-from-checkpoint {last}" if last else "make room, then start again"
