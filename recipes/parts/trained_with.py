"""What a checkpoint was trained with, written in it: training goes on with that alone, or the card and run.json would
tell of a run that there was not.

Free are the length of the run, what is logged and saved, and what only making a prior or a keep set asks for. So are
the batch sizes as long as a step has as many samples: then each step has the same ones, and a smaller batch is the way
out where memory is short.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from drift_peft import DriftConfig
from drift_peft.checkpoints import Checkpoint, is_adapter
from drift_peft.preflight import DRIFT, LORA, STEP

from .arguments import RunArguments, TrainArguments
from .sources import find_files
from .stamp import sampled, sha256_of_file, stamp

FILE = "trained_with.json"
PLACES = ("base", "expert", "prior", "reference", "data", "images", "keep", "chat_template_path")
RUN = tuple(
    "method base expert prior reference merge_first data split images streaming max_tokens processor_kwargs "
    "think_tokens keep_weight keep replay keep_bound keep_batch_size keep_every".split()
)
TRAIN = tuple(
    "learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps warmup_ratio optim optim_args weight_decay "
    "adam_beta1 adam_beta2 adam_epsilon max_grad_norm label_smoothing_factor neftune_noise_alpha bf16 fp16 seed "
    "data_seed train_sampling_strategy dataloader_drop_last shuffle_dataset chat_template_path packing "
    "completion_only_loss assistant_only_loss loss_type".split()
)
WAY_OUT = "or start again in another output_dir"


class Held:
    """What a run trains with, and what the checkpoint that it goes on from was trained with.

    Args:
        settings: from `settings_to_hold`.
        checkpoint: None of a run that starts.

    Attributes:
        content: what every checkpoint of the run has in FILE.
        before: what the checkpoint has there; None of a run that starts, and of a checkpoint that does not say.

    Raises:
        ValueError: the checkpoint was trained with other settings; it names the first.
    """

    def __init__(self, settings: dict, checkpoint: str | Path | None):
        self.content = {"settings": json.loads(json.dumps(settings, default=str)), "files": {}}
        self.checkpoint, self.before = checkpoint, None
        if checkpoint is None or not Path(checkpoint, FILE).exists():
            return
        self.before = json.loads(Path(checkpoint, FILE).read_text(encoding="utf-8"))
        for key, now in self.content["settings"].items():
            before = self.before["settings"].get(key, now)
            if not _same(before, now):
                raise ValueError(f"{checkpoint} was trained {_told(key, before, now)}: change it back, {WAY_OUT}")

    def add(self, key: str, name: str, mark: str | None) -> None:
        """Note what stands for a file's content; None if it is not known.

        Raises:
            ValueError: it is another one than the checkpoint was trained with.
        """
        before = None if self.before is None else self.before["files"].get(key)
        if None not in (before, mark) and before != mark:
            message = f"{self.checkpoint} was trained with another content of {key}, which is {name}"
            if key == "data":
                message += ", or this version reads it otherwise (see above what is dropped and noted)"
            raise ValueError(f"{message}: put back what was there, {WAY_OUT}")
        self.content["files"][key] = mark


def settings_of(run: RunArguments, drift: DriftConfig, train: TrainArguments) -> dict:
    return {**drift.to_dict(), **train.to_dict(), **asdict(run)}


def settings_to_hold(settings: dict) -> dict:
    """Those of `settings_of` that change what is learnt."""
    held = {key: settings[key] for key in (*RUN, *LORA, *DRIFT, *TRAIN) if key in settings and key != "drift_log_kinds"}
    if held.get("keep") is None:
        held = {key: value for key, value in held.items() if not key.startswith("keep_")}
    held = {key: _place(value) if key in PLACES else value for key, value in held.items()}
    return held | {" × ".join(STEP): settings[STEP[0]] * settings[STEP[1]]}


def is_finished(record: dict | None, settings: dict) -> bool:
    """Was this very run finished before, to these weights? What is logged and saved, where it lies now, and what is
    done with its adapter may differ."""
    if record is None:
        return False
    stored, expected = record["settings"], json.loads(json.dumps(settings, default=str))
    ends = ["max_steps"] if expected["max_steps"] > 0 else ["max_steps", "num_train_epochs"]
    held = settings_to_hold(stored)
    decisive = all(key in held and _same(held[key], value) for key, value in settings_to_hold(expected).items())
    return decisive and all(stored[key] == expected[key] for key in ends)


def files_of(settings: dict) -> dict[str, str | None]:
    """What stands for the content of what lies here, known without loading it: run.json keeps it, since a run that is
    finished is not prepared again. None of what lies elsewhere, or no longer lies here.

    Args:
        settings: from `settings_of`.
    """
    models = ("base", "expert", "reference") if settings["merge_first"] is not None else ("base",)
    marks = {key: _mark_here(settings[key]) for key in models}
    for key in ("data", "prior", "keep", "chat_template_path"):
        path = Path(settings[key] or "")
        if path.is_file():
            marks[key] = sha256_of_file(path)
    if Path(settings["data"]).is_dir():
        with contextlib.suppress(ValueError, OSError):  # its files are no longer there
            files, _ = find_files(settings["data"], settings["split"], images=None, streaming=False)
            marks["data"] = hashlib.sha256("".join(map(sha256_of_file, files)).encode()).hexdigest()
    return marks


def refuse_other_files(record: dict, settings: dict, output: Path) -> None:
    """ValueError if a run was finished with another content of a file than what is there now."""
    now = files_of(settings)
    for key, before in record["files"].items():
        if None not in (before, now.get(key)) and before != now[key]:
            message = f"the run in {output} was finished with another content of {key}, which is {settings[key]}"
            raise ValueError(f"{message}: put back what was there, or change output_dir")


def mark_of_template(processor: Any) -> str:
    """What stands for the chat template that a run is trained with: the recipe's, or that of the base."""
    return hashlib.sha256(json.dumps(processor.chat_template, sort_keys=True).encode()).hexdigest()


def mark_of(base: Checkpoint) -> str:
    """What tells the weights of a base from others of the same shapes, wherever they lie: a commit of the hub, or a
    SHA-256 over bytes here and there in each file."""
    return sampled(base.files) if base.revision is None else base.revision


def _mark_here(name: str | None) -> str | None:
    if name is None or not Path(name).is_dir():
        return None
    if is_adapter(name):
        return stamp(name)
    try:
        return mark_of(Checkpoint(name))
    except OSError:  # it has no weights any more, such as to make room
        return None


def _place(name: str | None) -> dict | None:
    """A file or folder, which may be named in several ways; `at` is None of what lies on the hub."""
    if name is None:
        return None
    here = Path(name).exists() or name.endswith(".safetensors")  # which is there when it is made
    return {"named": name, "at": str(Path(name).resolve()) if here else None}


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict) and "named" in one and "named" in other:
        return one["named"] == other["named"] or one["at"] == other["at"] is not None
    return one == other


def _told(key: str, before: Any, now: Any) -> str:
    before, now = (value["named"] if isinstance(value, dict) and "named" in value else value for value in (before, now))
    if before is None:
        return f"without {key}, not with {now}"
    return f"with {key}={before}, " + ("not without" if now is None else f"not {now}")
