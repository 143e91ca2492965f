"""Fine-tune a vision-language model on chains of thought, steered toward a text-only reasoning expert, on one GPU.

    python recipes/sft_vlm.py --config recipes/configs/qwen2_5_vl_7b_r1.yaml
    python recipes/sft_vlm.py --config recipes/configs/qwen2_5_vl_7b_r1.yaml --r 32 --output-dir runs/r32 --merge
    python recipes/sft_vlm.py --config recipes/configs/qwen2_5_vl_7b_r1.yaml --method sft --output-dir runs/sft
    python recipes/sft_vlm.py --config recipes/configs/qwen2_5_vl_7b_r1.yaml --merge-first 0.5 --output-dir runs/half

The base is loaded in NF4 with double quantization, everything but its language model's projections in 16 bit, and TRL's
SFTTrainer trains it with DriftConfig. `output_dir` then holds the adapter with its model card and processor,
`telemetry.png` and `run.json`; with --merge, `<output_dir>-merged` is the standalone model, and with --merge-first,
`<output_dir>-base` is what was trained on. Its keys stand in drift_peft/preflight/recipe_settings.py.
"""

from drift_peft.cli.interrupt import begin

if __name__ == "__main__":  # before what takes its time to import
    begin("sft_vlm.py")
    from parts.command_line import look_for_config

    look_for_config("sft_vlm.py")

import contextlib
import os
import platform
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
import yaml
from datasets import Dataset
from parts.arguments import RunArguments, TrainArguments, parse
from parts.checkpoints import checkpoints, earlier_record, is_whole, newest_whole, steps_of
from parts.command_line import in_one_sentence, run_script, stop
from parts.curves import plot_run
from parts.processing import check_tokens, load_processor, processor_settings
from parts.rehearsal import rehearse_loading
from parts.replay import with_replay
from parts.saving import Trainer, clear, save_adapter
from parts.stamp import is_missing
from parts.trained_with import (
    Held,
    files_of,
    is_finished,
    mark_of,
    mark_of_template,
    refuse_other_files,
    settings_of,
    settings_to_hold,
)
from parts.training_data import load_data, prompts_and_completions

from drift_peft import (
    DriftConfig,
    KeepSet,
    ReasoningPrior,
    build_prior,
    keep,
    make_keep_set,
    merge_adapter,
    merge_baseline,
    telemetry,
)
from drift_peft.atomic import write_json
from drift_peft.checkpoints import (
    Checkpoint,
    assumed_quantization,
    at_revision,
    is_same_origin,
    shown,
    split_revision,
)
from drift_peft.keeping import check_source, read_questions, vocabulary_rows
from drift_peft.merge import check_memory
from drift_peft.preflight import check_together
from drift_peft.prior import read_merge
from drift_peft.warn import warn

PACKAGES = ("drift_peft", "torch", "transformers", "peft", "trl", "datasets", "accelerate", "bitsandbytes")
THINK = ["<think>", "</think>"]


def beside(output: str | Path, what: str) -> Path:
    """`<output_dir>-base` and `<output_dir>-merged`."""
    return Path(f"{Path(output)}-{what}")


def check(run: RunArguments, drift: DriftConfig, train: TrainArguments) -> None:
    """Refuse before anything is loaded what would fail in the end."""
    output, merged = Path(train.output_dir).resolve(), beside(train.output_dir, "merged")
    place = next(path for path in (output, *output.parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise OSError(f"output_dir {output} cannot be written: {place} is no folder, or not yours to write to")
    earlier, start = checkpoints(output) or (output / "adapter_config.json").exists(), train.resume_from_checkpoint
    if earlier and not start:
        same = is_finished(earlier_record(output), settings_of(run, drift, train))
        way_on = "add --resume-from-checkpoint true, or " if same or newest_whole(output) else ""
        raise FileExistsError(f"{output} holds an earlier run: {way_on}change output_dir")
    if start and not Path(start).exists():  # see `_checkpoint` of TrainArguments
        message = "was finished with other settings, and left no checkpoint to go on from"
        raise FileExistsError(f"the run in {output} {message}: change them back, or change output_dir")
    if run.merge and merged.exists():
        raise FileExistsError(f"{merged} exists, and --merge would write there: move it away")
    if run.prior is not None and is_missing(run.prior) and run.expert is None:
        raise FileNotFoundError(f"there is no prior {run.prior}, and no expert to build it from: set expert")
    for made, kind in ((run.prior, ReasoningPrior), (run.keep, KeepSet)):
        if made is not None and not is_missing(made):
            kind.load(made)  # which refuses a file that is none
    check_together(run, drift, vars(train))


def open_prior(run: RunArguments) -> ReasoningPrior | None:
    """The prior, built if it is not there. One that was built from something else than the run names is refused."""
    if run.prior is None:
        return None
    if is_missing(run.prior):
        Path(run.prior).parent.mkdir(parents=True, exist_ok=True)
        build_prior(run.expert, run.base, run.prior, rank=run.prior_rank, reference=run.reference)
        print(f"The prior is built: {run.prior} serves all further runs on this pair.")
    prior = ReasoningPrior.load(run.prior)
    for role in ("expert", "reference"):
        expected, origin = getattr(run, role), prior.metadata.get(role)
        if expected is not None and not is_same_model(expected, origin):
            built = f"without a {role}" if origin is None else f"with the {role} {run_or_prior(None, origin)}"
            raise ValueError(f"{run.prior} was built {built}, not with {expected}: change {role} or prior")
    other = prior.metadata.get("reference")
    if None not in (run.expert, other) and run.reference is None and not is_same_model(run.base, other):
        built = run_or_prior(None, other)
        message = f"{run.prior} was built with the reference {built}, not without"
        raise ValueError(f"{message}: name it in reference, or change prior")
    stored = prior.metadata.get("rank")
    if stored not in (None, run.prior_rank):
        message = f"The rank of {run.prior} is {stored}, and it is used as it is"
        print(f"{message}: prior_rank={run.prior_rank} is for one that is built.")
    return prior


def warn_of_other_base(run: RunArguments, base: Checkpoint, prior: ReasoningPrior) -> None:
    """In 4 bits, the fingerprint cannot tell a base from its near relatives. One with a part of Δ in it says so."""
    built = prior.metadata.get("base")
    if built is not None and read_merge(base.config) is None and not is_same_origin(base.origin, built):
        warn(
            f"{run.prior} was built for {run_or_prior(None, built)}, and this run trains {run.base}: unless their "
            "weights are the same, name another file in prior, and it is built for this base."
        )


def is_same_model(model: str, origin: dict | None) -> bool:
    """Whether a model as the run names it is the one of a prior's header: two paths may lead to one folder. Of a
    revision that is no commit, nobody knows what it was when the prior was built."""
    if origin is None or model == origin["id"]:
        return origin is not None
    if Path(model).exists():
        return Path(origin["id"]).exists() and Path(model).samefile(origin["id"])
    name, revision = split_revision(model)
    is_commit = re.fullmatch("[0-9a-f]{40}", revision or "")
    return name == origin["id"] and (not is_commit or revision == origin["revision"])


def open_start(run: RunArguments, base: Checkpoint, prior: ReasoningPrior | None, folder: Path) -> Checkpoint:
    """What is trained on: the base, or base + merge_first·Δ in a folder that is made if it is not there. Δ is that of
    the prior, if there is one."""
    if run.merge_first is None:
        return base
    roles = {"expert": run.expert, "reference": run.reference}
    if prior is not None:
        if prior.metadata.get("expert") is None:
            raise ValueError(f"{run.prior} was combined from several experts, and merge_first merges one: leave it out")
        roles = {role: run_or_prior(roles[role], prior.metadata[role]) for role in roles}
    folder.parent.mkdir(parents=True, exist_ok=True)
    merge_baseline("task_arithmetic", base=run.base, output=folder, **roles, scale=run.merge_first, exist_ok=True)
    print(f"{folder} is the base with {run.merge_first:g}·Δ merged into it: training goes on from there.")
    if prior is not None and run.merge_first > 1:  # what is left is (1 − λ)Δ
        print(f"merge_first={run.merge_first:g} is more than all of Δ: DRIFT steers back, toward base + Δ.")
    return Checkpoint(folder)


def run_or_prior(named: str | None, origin: dict | None) -> str | None:
    """A model as the run names it, else as the prior's header does."""
    if named is not None or origin is None:
        return named
    return at_revision(origin["id"], origin["revision"])


def check_keep(run: RunArguments, base: Checkpoint, images: int | None) -> None:
    """Refuse a keep set that cannot be made, before a prior is; `images` is how many the data have, None of streams."""
    if run.keep is None or not is_missing(run.keep):
        return
    if run.keep_images is None and not images:
        why = "none is made of a stream" if images is None else f"{run.data} has no images to make it of"
        raise ValueError(f"there is no keep set {run.keep}, and {why}: name a folder of pictures in keep_images")
    if run.keep_top_k > (tokens := vocabulary_rows(base.config)):
        raise ValueError(f"keep_top_k={run.keep_top_k} is more than the {tokens} tokens that {run.base} has: lower it")
    read_questions(run.keep_questions)
    if run.keep_images is not None:
        check_source(run.keep_images)


def open_keep_set(run: RunArguments, dataset: Dataset, processor: dict, load_in_4bit: bool) -> KeepSet | None:
    """The VLM's own answers to questions about the data's images, or about others, made if they are not there."""
    if run.keep is None:
        return None
    if is_missing(run.keep):
        Path(run.keep).parent.mkdir(parents=True, exist_ok=True)
        how = {"questions": run.keep_questions, "samples": run.keep_samples, "top_k": run.keep_top_k}
        how |= {"max_new_tokens": run.keep_max_new_tokens, "load_in_4bit": load_in_4bit}
        how["processor"] = processor or None  # it answers to images and chats as they are trained on
        make_keep_set(run.base, dataset if run.keep_images is None else run.keep_images, run.keep, **how)
        print(f"The keep set is made: {run.keep} serves all further runs on this base.")
        return KeepSet.load(run.keep)
    keep_set = KeepSet.load(run.keep)
    vlm = keep_set.metadata["vlm"]
    other = "" if is_same_model(run.base, vlm) else f" with {run_or_prior(None, vlm)}, which is not {run.base}"
    message = (
        f"{run.keep} was made before{other}, and its {len(keep_set)} answers and their images are used as they are"
    )
    print(f"{message}: for others, name another file in keep.")
    return keep_set


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


def prepare(run: RunArguments, drift: DriftConfig, train: TrainArguments, held: Held) -> tuple[Trainer, dict]:
    """All that a mistake in the settings may break. Returns the trainer, and what run.json says so far."""
    base = Checkpoint(run.base)
    held.add("base", run.base, mark_of(base))
    rehearse_loading(base, train.model_init_kwargs or {})
    if run.merge and run.verify:
        check_memory(base)
    settings = processor_settings(run.processor_kwargs, train.chat_template_path)
    processor = load_processor(base.source, base.revision, settings, train.trust_remote_code)
    check_tokens(processor, eos_token=train.eos_token, pad_token=train.pad_token)
    held.add("chat_template", train.chat_template_path or run.base, mark_of_template(processor))
    if run.think_tokens:
        drift.trainable_token_indices = think_tokens(processor.tokenizer, base)
    dataset, data = load_data(run, processor)
    held.add("data", run.data, data["sha256"])
    check_keep(run, base, data["images"])
    prior = open_prior(run)
    if prior is not None:
        warn_of_other_base(run, base, prior)
    start = open_start(run, base, prior, beside(train.output_dir, "base"))
    keep_set = open_keep_set(run, dataset, settings, load_in_4bit=not train.use_cpu)
    for key, file in {"prior": prior, "keep": keep_set}.items():
        held.add(key, getattr(run, key), file and file.sha256)
    record = {
        "settings": settings_of(run, drift, train),
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "base": base.origin,
        "merged_first": (merged := read_merge(start.config)) and asdict(merged),
        "prior": prior
        and {"sha256": prior.sha256, **{key: prior.metadata.get(key) for key in ("expert", "reference", "rank")}},
        "keep": keep_set and {"sha256": keep_set.sha256, "samples": len(keep_set)},
        "replay": None,
        "data": data,
        "files": files_of(settings_of(run, drift, train)),
    }
    if run.replay:
        keep_set.check(processor)
        dataset, record["replay"] = with_replay(
            dataset, keep_set, run.replay, processor, run.max_tokens, seed=train.seed
        )
        left_out = ", ".join(f"{count} {reason}" for reason, count in record["replay"]["left_out"].items()) or "none"
        print(f"{record['replay']['samples']} answers of {run.keep} among them; left out of the keep set: {left_out}")
    dataset = prompts_and_completions(dataset, train)
    dataset.info.dataset_name = shown(run.data)  # as the model card calls it
    trainer = make_trainer(drift, train, base, start, dataset, processor)
    trainer.held = held.content
    if keep_set is not None and not run.replay:
        how = {"weight": run.keep_weight, "bound": run.keep_bound, "batch_size": run.keep_batch_size}
        keep(trainer.model, keep_set, processor, every=run.keep_every, seed=train.seed, **how)
    return trainer, record


def make_trainer(
    drift: DriftConfig, train: TrainArguments, base: Checkpoint, start: Checkpoint, dataset: Dataset, processor
) -> Trainer:
    """TRL's trainer of an adapter on `start`, in 4 bit as the base would be."""
    dtype = torch.bfloat16 if train.bf16 else torch.float16 if train.fp16 else torch.float32
    train.model_init_kwargs = {"dtype": dtype, "revision": start.revision, **(train.model_init_kwargs or {})}
    nf4 = assumed_quantization(base, dtype)
    pieces = {"train_dataset": dataset, "processing_class": processor, "quantization_config": nf4, "peft_config": drift}
    trainer = Trainer(start.source, train, **pieces)
    if drift.trainable_token_indices:  # TRL's loss reads the head's bias, which PEFT's wrapper around the head lacks
        trainer.model.get_output_embeddings().bias = None
    for parameter in trainer.model.parameters():  # TRL rounds the adapter to bf16, which is too coarse for its steps
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    # With gradient checkpointing, transformers lets the output of every embedding require gradients: the tower's too,
    # which is frozen, and whose activations would be kept, computed again and differentiated for nothing.
    tower = trainer.model.get_base_model().get_encoder("image")
    tower.forward = torch.no_grad()(tower.forward)
    return trainer


def fine_tune(run: RunArguments, drift: DriftConfig, train: TrainArguments) -> tuple[Trainer, dict]:
    """Train, and leave everything but the merged model in output_dir. Returns the trainer, and what run.json says."""
    output, start = Path(train.output_dir), train.resume_from_checkpoint
    with in_one_sentence("sft_vlm.py", ValueError, OSError, ImportError, yaml.YAMLError):
        check(run, drift, train)
        held = Held(settings_to_hold(settings_of(run, drift, train)), start)
        clear(output)
        trainer, record = prepare(run, drift, train, held)
        if start:
            torn = [path.name for path in checkpoints(output) if not is_whole(path)]
            aside = f"; {' and '.join(torn)}, which a run was writing when it was killed, is not used" if torn else ""
            print(f"Training goes on from {start}{aside}.")
            if held.before is None:
                print("It does not say with which settings it was trained: see that they are these.")
        begun = steps_of(Path(start)) if start else None  # asked now: save_total_limit may delete it meanwhile
    with in_one_sentence("sft_vlm.py", OSError):
        try:
            result = trainer.train(resume_from_checkpoint=start)
        except torch.OutOfMemoryError:
            message = f"the GPU has no room for a step of {train.per_device_train_batch_size} samples at a time"
            ways_out = "lower per_device_train_batch_size, max_tokens, or max_pixels in processor_kwargs"
            stop("sft_vlm.py", f"{message}: {ways_out}; drift-peft preflight says what that saves", 1)
        if result.global_step == begun and earlier_record(output):
            message = f"{start} has taken {result.global_step} steps, these settings ask for no more"
            way_out = "raise num_train_epochs or max_steps, or change output_dir"
            stop("sft_vlm.py", f"{message}, and the run was finished with others: {way_out}", 1)
        save_adapter(trainer)
        record["results"] = {**result.metrics, "steps": result.global_step, **telemetry(trainer.model)}
        if torch.cuda.is_available():
            record["results"]["peak_gpu_gb"] = torch.cuda.max_memory_allocated() / 1e9
        record["history"] = trainer.state.log_history
        write_json(output / "run.json", record)
        plot_run(record["history"], output / "telemetry.png")
        trainer.model.create_or_update_model_card(str(output))  # which shows the picture
    return trainer, record


def merge(run: RunArguments, output: Path, record: dict) -> None:
    """Into the base that was trained on, with what the comparison says of it."""
    base = run.base if run.merge_first is None else beside(output, "base")
    report = merge_adapter(base, output, beside(output, "merged"), verify=run.verify)
    record["merge"] = asdict(report)
    write_json(output / "run.json", record)
    print(f"The merged model is in {report.output}" + ("." if run.verify else ", and was compared with nothing."))
    if report.verification is not None:
        print(report.verification.verdict)


@contextlib.contextmanager
def telling_the_way_on(argv: list[str] | None, output: Path) -> Iterator[None]:
    """Ctrl-C says what is kept, and with what command the run goes on."""
    try:
        yield
    except KeyboardInterrupt:
        called = sys.orig_argv if argv is None else ["python", __file__, *argv]
        again, last = shlex.join(called), newest_whole(output)
        if last is None:
            message = f"stopped before the first checkpoint: start again with {again}"
        else:
            message = f"stopped; {last} is kept: go on with {again} --resume-from-checkpoint true"
        raise KeyboardInterrupt(message) from None


def main(argv: list[str] | None = None) -> Trainer | None:
    """Returns the trainer; None if nothing was left to train."""
    with in_one_sentence("sft_vlm.py", ValueError, OSError, ImportError, yaml.YAMLError):
        run, drift, train = parse(argv, __doc__)
        output = Path(train.output_dir)
        record = earlier_record(output) if train.resume_from_checkpoint else None
        finished = is_finished(record, settings := settings_of(run, drift, train))
        if finished:
            refuse_other_files(record, settings, output)
    with telling_the_way_on(argv, output):
        if finished:
            trainer = None
            print(f"The run in {output} was finished before, after {record['results']['steps']} steps.")
        else:
            trainer, record = fine_tune(run, drift, train)
        if run.merge and "merge" in record and beside(output, "merged").exists():
            print(f"The merged model is in {beside(output, 'merged')}.")
        elif run.merge:
            with in_one_sentence("sft_vlm.py", ValueError, OSError):
                merge(run, output, record)
    print(f"The adapter is in {output}.")
    return trainer


if __name__ == "__main__":
    run_script("sft_vlm.py", main)
