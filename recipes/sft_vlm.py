"""Fine-tune a vision-language model on chains of thought, steered toward a text-only reasoning expert, on one GPU.

    python recipes/sft_vlm.py --config recipes/configs/qwen2_5_vl_7b_r1.yaml
    python recipes/sft_vlm.py --config recipes/configs/qwen2_5_vl_7b_r1.yaml --r 32 --output-dir runs/r32 --merge

The base is loaded in NF4 with double quantization, everything but its language model's projections in 16 bit, and TRL's
SFTTrainer trains it with DriftConfig. `output_dir` then holds the adapter with its model card and processor,
`telemetry.png` and `run.json`; with --merge, `<output_dir>-merged` is the standalone model. Its keys stand in
parts/arguments.py.
"""

from drift_peft.cli.interrupt import end_at_ctrl_c

if __name__ == "__main__":  # before what takes its time to import
    end_at_ctrl_c("sft_vlm.py: stopped")

import hashlib
import json
import os
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
import yaml
from datasets import Dataset, Features, Image, List
from parts.arguments import RunArguments, TrainArguments, parse
from parts.command_line import in_one_sentence, run_script
from parts.curves import plot_run
from parts.lengths import within_length
from parts.loading import load_messages
from parts.saving import Trainer, save_adapter, write_json
from parts.template import check_template
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig
from transformers.trainer_utils import get_last_checkpoint

from drift_peft import (
    DriftConfig,
    KeepSet,
    ReasoningPrior,
    build_prior,
    keep,
    make_keep_set,
    merge_adapter,
    telemetry,
)
from drift_peft.checkpoints import Checkpoint, Decoder, split_revision

PACKAGES = ("drift_peft", "torch", "transformers", "peft", "trl", "datasets", "accelerate", "bitsandbytes")
THINK = ["<think>", "</think>"]


def check(run: RunArguments, train: TrainArguments, merged: Path) -> None:
    """Refuse before anything is loaded what would fail in the end."""
    output = Path(train.output_dir).resolve()
    place = next(path for path in (output, *output.parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise OSError(f"output_dir {output} cannot be written: {place} is no folder, or not yours to write to")
    earlier = output.is_dir() and (get_last_checkpoint(output) or (output / "adapter_config.json").exists())
    if earlier and not train.resume_from_checkpoint:
        raise FileExistsError(f"{output} holds an earlier run: add --resume-from-checkpoint true, or change output_dir")
    if run.merge and merged.exists():
        raise FileExistsError(f"{merged} exists, and --merge would write there: move it away")
    if is_missing(run.prior) and run.expert is None:
        raise FileNotFoundError(f"there is no prior {run.prior}, and no expert to build it from: set expert")


def is_missing(prior: str) -> bool:
    return prior.endswith(".safetensors") and not Path(prior).exists()  # without the ending, it is a hub id


def open_prior(run: RunArguments) -> ReasoningPrior:
    """The prior, built if it is not there. One that was built from something else than the run names is refused."""
    if is_missing(run.prior):
        Path(run.prior).parent.mkdir(parents=True, exist_ok=True)
        build_prior(run.expert, run.base, run.prior, rank=run.prior_rank, reference=run.reference)
        print(f"The prior is built: {run.prior} serves all further runs on this pair.")
    prior = ReasoningPrior.load(run.prior)
    for role in ("expert", "reference"):
        wanted, built = getattr(run, role), (prior.metadata.get(role) or {"id": None})["id"]
        if wanted is not None and built not in (wanted, split_revision(wanted)[0]):
            raise ValueError(f"{run.prior} was built with the {role} {built}, not {wanted}: change {role} or prior")
    return prior


def open_keep_set(run: RunArguments, dataset: Dataset, load_in_4bit: bool) -> KeepSet | None:
    """The VLM's own answers to questions about the data's images, made if they are not there."""
    if run.keep is None:
        return None
    if is_missing(run.keep):
        if not isinstance(dataset, Dataset):
            raise ValueError(f"there is no keep set {run.keep}, and none is made of a stream: make one beforehand")
        Path(run.keep).parent.mkdir(parents=True, exist_ok=True)
        options = {"questions": run.keep_questions, "samples": run.keep_samples, "load_in_4bit": load_in_4bit}
        make_keep_set(run.base, dataset, run.keep, **options)
        print(f"The keep set is made: {run.keep} serves all further runs on this base.")
    return KeepSet.load(run.keep)


def not_quantized(config) -> list[str]:
    """Full names of all linear layers but the language model's projections: the vision tower, projector and head."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    projections = Decoder(model).projections
    linear = (name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear))
    return [name for name in linear if name not in projections]


def think_tokens(tokenizer, base: Checkpoint) -> dict[str, list[int]]:
    """PEFT's trainable_token_indices for the think tags: the tokenizer's own, or rows that pad the vocabulary."""
    tokenizer.add_tokens(THINK)  # those that it has stay as they are
    ids = tokenizer.convert_tokens_to_ids(THINK)
    rows = base.shape(base.language_model["embed_tokens.weight"])[0]
    if max(ids) >= rows:
        raise ValueError(
            f"{base.source} has no row left for {' and '.join(THINK)} among its {rows} embeddings, and more rows would "
            "break merging and serving: leave out think_tokens, and the tags are plain text"
        )
    return {name: ids for name in ("embed_tokens", "lm_head") if f"{name}.weight" in base.language_model}


def split_last(turns: list[dict]) -> dict:
    return {"prompt": turns[:-1], "completion": turns[-1:]}


def describe(dataset: Dataset) -> dict:
    """Number of samples, and SHA-256 over conversations and images; of a stream neither is known."""
    if not isinstance(dataset, Dataset):
        return {"samples": None, "sha256": None}
    digest = hashlib.sha256()
    for row in dataset.cast_column("images", List(Image(decode=False))):
        digest.update(json.dumps(row["messages"], sort_keys=True).encode())
        for image in row["images"]:
            digest.update(image["bytes"] or Path(image["path"]).read_bytes())
    return {"samples": len(dataset), "sha256": digest.hexdigest()}


def prepare(run: RunArguments, drift: DriftConfig, train: TrainArguments) -> tuple[Trainer, dict]:
    """All that a mistake in the settings may break. Returns the trainer, and what run.json says so far."""
    base = Checkpoint(run.base)
    processor = AutoProcessor.from_pretrained(
        base.source, revision=base.revision, trust_remote_code=train.trust_remote_code, **run.processor_kwargs
    )
    if run.think_tokens:
        drift.trainable_token_indices = think_tokens(processor.tokenizer, base)
    options = {"images": run.images, "streaming": run.streaming, "on_bad": run.on_bad}
    dataset, dropped = load_messages(run.data, split=run.split, **options)
    dataset = within_length(dataset, processor, run.max_tokens, on_long=run.on_long, dropped=dropped)
    check_template(dataset, processor, train.chat_template_path)
    data = {**dropped.report(), "dropped": dropped, **describe(dataset)}  # a stream's grows
    told = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "none"
    print(f"{data['samples'] or 'streamed'} samples; dropped: {told}")
    for key, text in dropped.unread.items():
        print(f"not read: {key}, such as {text}")
    prior = open_prior(run)
    keep_set = open_keep_set(run, dataset, load_in_4bit=not train.use_cpu)
    record = {
        "settings": {**drift.to_dict(), **train.to_dict(), **asdict(run)},
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "base": base.origin,
        "prior": {"sha256": prior.sha256, **{key: prior.metadata.get(key) for key in ("expert", "reference", "rank")}},
        "keep": keep_set and {"sha256": keep_set.sha256, "samples": len(keep_set)},
        "data": data,
    }
    # Prompt and completion: the loss is on the last turn alone, not on the question and its images' placeholders.
    turns = dataset.features["messages"]
    columns = Features(prompt=turns, completion=turns, images=dataset.features["images"])  # else streams lose the types
    dataset = dataset.map(split_last, input_columns="messages", remove_columns="messages", features=columns)
    dataset.info.dataset_name = run.data  # as the model card calls it

    dtype = torch.bfloat16 if train.bf16 else torch.float16 if train.fp16 else torch.float32
    train.model_init_kwargs = {"dtype": dtype, "revision": base.revision, **(train.model_init_kwargs or {})}
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=not_quantized(base.config),
    )
    pieces = {"train_dataset": dataset, "processing_class": processor, "quantization_config": nf4, "peft_config": drift}
    trainer = Trainer(base.source, train, **pieces)
    if run.think_tokens:  # TRL's loss reads the head's bias, which PEFT's wrapper around the head does not have
        trainer.model.get_output_embeddings().bias = None
    for parameter in trainer.model.parameters():  # TRL rounds the adapter to bf16, which is too coarse for its steps
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if keep_set is not None:
        how = {"weight": run.keep_weight, "bound": run.keep_bound, "batch_size": run.keep_batch_size}
        keep(trainer.model, keep_set, processor, every=run.keep_every, seed=train.seed, **how)
    # With gradient checkpointing, transformers lets the output of every embedding require gradients: the tower's too,
    # which is frozen, and whose activations would be kept, computed again and differentiated for nothing.
    tower = trainer.model.get_base_model().get_encoder("image")
    tower.forward = torch.no_grad()(tower.forward)
    return trainer, record


def main(argv: list[str] | None = None) -> Trainer:
    with in_one_sentence("sft_vlm.py", ValueError, OSError, ImportError, yaml.YAMLError):
        run, drift, train = parse(argv, __doc__)
        output, merged = Path(train.output_dir), Path(f"{Path(train.output_dir)}-merged")
        check(run, train, merged)
        trainer, record = prepare(run, drift, train)
    with in_one_sentence("sft_vlm.py", OSError):
        result = trainer.train(resume_from_checkpoint=train.resume_from_checkpoint)
        save_adapter(trainer)
        record["results"] = {**result.metrics, "steps": result.global_step, **telemetry(trainer.model)}
        if torch.cuda.is_available():
            record["results"]["peak_gpu_gb"] = torch.cuda.max_memory_allocated() / 1e9
        record["history"] = trainer.state.log_history
        write_json(record, output / "run.json")
        plot_run(record["history"], output / "telemetry.png")
    if run.merge:
        with in_one_sentence("sft_vlm.py", ValueError, OSError):
            record["merge"] = asdict(merge_adapter(run.base, output, merged, verify=True))
            write_json(record, output / "run.json")
    print(f"The adapter is in {output}" + (f", and the merged model in {merged}." if run.merge else "."))
    return trainer


if __name__ == "__main__":
    run_script("sft_vlm.py", main)
