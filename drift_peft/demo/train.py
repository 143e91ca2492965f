"""What a user does with a 7B pair, on the small one: load in 4 bit, fine-tune a LoRA adapter, merge it, reload."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tqdm.auto import tqdm
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from ..checkpoints import Checkpoint, language_model_targets, write_tensors
from ..keeping import keep, keep_4bit_differentiable
from ..prior import ReasoningPrior
from ..tuner import DriftConfig, telemetry
from .evaluate import encode
from .world import Sample

ADAPTER = dict(r=8, lora_alpha=16, task_type="CAUSAL_LM")  # scaling 2, the same for every method
STEPS, BATCH = 150, 16
NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_compute_dtype=torch.float32,
    # The vision tower with its projector stays as it is: Qwen2.5-VL's, and LLaVA's.
    llm_int8_skip_modules=["model.visual", "model.vision_tower", "model.multi_modal_projector", "lm_head"],
)


def load(folder: str | Path, four_bit: bool = False):
    """Model and processor of a checkpoint folder, on the CPU, with nothing but transformers."""
    quantization = {"quantization_config": NF4} if four_bit else {}
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, device_map="cpu", **quantization)
    return model, AutoProcessor.from_pretrained(folder)


class History(TrainerCallback):
    """The training's progress bar, and a record of where the adapter stands against Δ."""

    def __init__(self, prior: ReasoningPrior, title: str, progress: bool):
        self.prior, self.title, self.progress, self.steps = prior, title, progress, []

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(total=state.max_steps, desc=self.title, unit="step", disable=not self.progress)

    def on_step_end(self, args, state, control, model, **kwargs):
        self.bar.update()
        if state.global_step % 5 == 0 or state.global_step == 1:
            measured = telemetry(model, self.prior)
            self.steps.append({"step": state.global_step, **{k: measured[k] for k in ("alignment", "absorbed")}})

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def fine_tune(
    base: str | Path,
    prior: ReasoningPrior,
    samples: list[Sample],
    output: str | Path,
    *,
    rate: float,
    drift: dict | None = None,
    keep_set: str | Path | None = None,
    steps: int = STEPS,
    seed: int = 0,
    title: str = "training",
    progress: bool = True,
) -> list[dict]:
    """Train an adapter on the 4-bit model and save it in `output`.

    Args:
        base: folder of the full-precision model.
        drift: settings of DriftConfig, `{}` for its defaults; None trains plain LoRA on the same modules.
        keep_set: the VLM's own answers, which the model is kept near; None keeps nothing.

    Returns:
        The adapter's `alignment` with Δ and the share `absorbed` of it, every fifth step.
    """
    set_seed(seed)  # the start of the adapter
    model, processor = load(base, four_bit=True)
    if drift is None:
        config = LoraConfig(target_modules=language_model_targets(model, prior), **ADAPTER)
        keep_4bit_differentiable(model)
    else:
        config = DriftConfig(prior=prior.source, **ADAPTER, **drift)
    model = get_peft_model(model, config)
    keep(model, keep_set, processor)
    history = History(prior, title, progress)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(output),
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            optim="adamw_torch",
            seed=seed,
            use_cpu=True,
            dataloader_pin_memory=False,
            remove_unused_columns=False,  # the collator wants whole samples
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=samples,
        data_collator=partial(encode, processor),
        callbacks=[history],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    model.save_pretrained(output)
    return history.steps


def task_arithmetic(vlm: str | Path, expert: str | Path, strength: float, output: str | Path) -> None:
    """The training-free rival: save W + strength · (W_expert − W), for every weight of the language model."""
    ours, theirs = Checkpoint(vlm), Checkpoint(expert)
    shutil.copytree(vlm, output, dirs_exist_ok=True)
    for file in ours.files:
        tensors = load_file(file)
        for name, key in ours.language_model.items():
            if ours.keys[key] == file:
                W, W_expert = tensors[key].float(), theirs.tensor(theirs.language_model[name]).float()
                tensors[key] = torch.lerp(W, W_expert, strength).to(tensors[key].dtype)
        write_tensors(Path(output, file.name), tensors, {"format": "pt"})
