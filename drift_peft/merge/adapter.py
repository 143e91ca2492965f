"""A LoRA adapter and its full-precision base on disk -> a standalone checkpoint on disk.

The model is never in memory: each shard is copied and the changed tensors are overwritten in the copy, one at a time,
so that everything else stays byte for byte what it was.
"""

from dataclasses import dataclass
from pathlib import Path

from ..arguments import typed
from ..checkpoints import (
    DRIFT_CONFIG,
    EMBEDDING,
    HEAD,
    TEMPLATES,
    TEMPLATES_INSIDE,
    TOKENIZER,
    Checkpoint,
    DequantizedCheckpoint,
    LowRank,
    Update,
    adapter_folder,
    adapter_updates,
    chat_templates,
    folder_of,
    has_tokenizer,
    in_markdown,
    quantization_in_training,
    replaced_when_complete,
    shown,
    take_tokenizer,
    watched_adapter,
    write_model,
)
from ..choices import Onto
from ..prior import forget_merge
from ..warn import warn
from .belongs import refuse_other_base
from .card import write_card
from .verify import Verification, check_memory, verify_merge


@dataclass(frozen=True)
class MergeReport:
    """What `merge_adapter` did.

    Attributes:
        output: the merged folder.
        modules: adapter modules that were merged, which are all that the adapter has.
        tensors: tensors in the merged folder.
        relative_change: ‖W' − W‖/‖W‖ (Frobenius) over all merged weights, as stored, or None where these were zero;
            with onto="dequantized", W is what the 4-bit base computes with.
        onto: "base" or "dequantized".
        trained_on: how the base was quantized in training, and whether that is recorded or assumed; None where it was
            not asked for.
        logits_error: ‖logits of the merged folder − logits of base + adapter‖/‖the latter‖; None without verify.
        verification: the ways to serve the adapter, compared with what was trained; None without verify.
    """

    output: Path
    modules: int
    tensors: int
    relative_change: float | None
    onto: str
    trained_on: str | None
    logits_error: float | None
    verification: Verification | None


@typed
def merge_adapter(
    base: str | Path,
    adapter: str | Path,
    output: str | Path,
    *,
    onto: Onto = "base",
    verify: bool = False,
    force: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> MergeReport:
    """Merge a LoRA adapter (ours or stock PEFT's) into its full-precision base: W' = W + s·B·A.

    W [out, in], B [out, r], A [r, in] (LoRA, arXiv 2106.09685, section 4), with s = α/r or as the adapter says.

    DoRA's magnitudes, `modules_to_save`, biases, trained tokens, and adapters on embedding, head and vision tower are
    merged too. W' is computed in fp32 and cast once to the dtype of W. Shards, tensor names and all tensors without an
    adapter stay as they are in the base folder; tokenizer, processor, chat template and configs come from there too.
    Where embedding or head were trained, tokenizer and chat template are the adapter's, if it has them. A card says
    what was merged: README.md.
    Works in `<output>.partial/`, which is renamed when it is complete and is gone if anything fails.

    Args:
        base: folder or hub id (`id@revision`) of the model in full precision, whatever it was quantized to in training.
        adapter: folder or hub id of the adapter.
        output: folder to write.
        onto: "dequantized" adds the adapter to what the base was in training, dequantize(quantize(W)), for each weight
            that was in 4 bits there: exactly the trained function, with the noise of the quantization. How it was
            quantized comes from drift_config.json; without that, NF4 with double quantization of the language model's
            projections is assumed.
        verify: also compare the logits of base + adapter (by PEFT) with those of the merged folder and of other ways to
            serve the adapter, in fp32 on the CPU. This loads the whole model, twice in turn.
        force: merge even into another model than the one that the adapter was trained on.
        overwrite: replace an existing model folder, once the new one is complete.
        progress: show a progress bar on stderr.

    Raises:
        FileExistsError, FileNotFoundError, OSError: the output, the adapter or the base cannot be written or read.
        ValueError: the base is no full-precision model, or not the one that the adapter was trained on (see `force`);
            the adapter has a part that cannot be merged, or that does not fit the base; it was not trained on a 4-bit
            base, where that is asked for; nothing changed; a merged weight is not finite; the base or the adapter was
            written to meanwhile; the verification failed, or the model in fp32 is larger than the memory that is free
            for it.

    Example:
        >>> report = merge_adapter(base=VLM, adapter="adapter", output="merged", progress=False)
        >>> report.modules, report.output.name
        (28, 'merged')
    """
    with replaced_when_complete(Path(output), overwrite, sources=(base, adapter)) as folder:
        folder_of_adapter = adapter_folder(adapter)
        folder_of(adapter, None, (DRIFT_CONFIG, *TEMPLATES_INSIDE, *TEMPLATES))  # of the hub: into the same snapshot
        watch = watched_adapter(folder_of_adapter, str(adapter))
        if Path(base, "adapter_config.json").is_file():
            raise ValueError(f"base {base} is an adapter itself: name the full-precision base that it was trained on")
        checkpoint = Checkpoint(base)
        if verify:
            check_memory(checkpoint)
        updates = adapter_updates(folder_of_adapter, checkpoint, str(adapter))
        if not force:
            refuse_other_base(checkpoint, folder_of_adapter, str(adapter), updates)
        ends = {checkpoint.language_model.get(end) for end in (EMBEDDING, HEAD)}
        own_tokenizer = not ends.isdisjoint(updates) and has_tokenizer(folder_of(adapter, None, TOKENIZER))
        if own_tokenizer:
            chat_templates(folder_of_adapter)  # an error comes before anything is written
        trained = None
        if verify or onto == "dequantized":
            trained = quantization_in_training(folder_of_adapter, checkpoint)
        start, written = checkpoint, updates
        if onto == "dequantized":
            if trained.config is None:
                raise ValueError(
                    f"adapter {adapter} belongs to the full-precision base, not to a 4-bit one: merge it onto that"
                )
            start = DequantizedCheckpoint(checkpoint.source, checkpoint.revision, trained.config)
            written = {raw: updates.get(raw, Update(module)) for raw, module in start.four_bit.items()} | updates
        if all(isinstance(u, LowRank) and u.magnitude is None and u.start is None for u in updates.values()):
            if not any(u.scaling and u.B.any() for u in updates.values()):  # plain before anything is copied
                raise ValueError(f"the adapter changes no weight of {checkpoint.source}: {_why_zero(updates)}")
        change = write_model(start, folder, written, lambda raw, W: written[raw].blocks(W), progress)
        forget_merge(folder)
        if change == 0:
            raise ValueError(f"the adapter changes no weight of {checkpoint.source}: {_why_zero(updates)}")
        if own_tokenizer:
            take_tokenizer(folder_of_adapter, folder)  # the base's need not know the tokens that were trained
        else:
            _compare_templates(adapter, folder_of_adapter, checkpoint.source, folder, output)
        what, into = (in_markdown(shown(str(source))) for source in (adapter, checkpoint.source))
        made = f"The LoRA adapter {what}, merged into {into}."
        sources = {"adapter": {"id": str(folder_of_adapter), "revision": None}}
        how = {"onto": None if onto == "base" else onto, "force": force}
        write_card(folder, output, checkpoint, made, merge_adapter.__name__, sources, how)
        verification = None
        if verify:
            verification = verify_merge(checkpoint, folder_of_adapter, folder, updates, onto, trained, progress)
        watch.check()
    return MergeReport(
        Path(output),
        modules=len({update.module for update in updates.values()}),
        tensors=len(checkpoint.keys),
        relative_change=change,
        onto=onto,
        trained_on=trained and trained.words,
        logits_error=verification and verification.logits_error,
        verification=verification,
    )


def _compare_templates(adapter: str | Path, source: Path, base: str, folder: Path, output: str | Path) -> None:
    """Warn where the adapter has another chat template than its base, or one of the two cannot be read."""
    try:
        trained = chat_templates(source)
        if trained and not trained <= chat_templates(folder):
            warn(
                f"Adapter {adapter} has another chat template than base {base}, and the merged folder has the base's: "
                f"if it was trained with its own, copy that into {output}."
            )
    except ValueError as error:
        warn(f"Whether adapter {adapter} has the chat template of base {base} was not compared: {error}.")


def _why_zero(updates: dict[str, Update]) -> str:
    low_rank = [u for u in updates.values() if isinstance(u, LowRank)]
    if not any(u.B.any() for u in low_rank):
        return "its lora_B are zero, as before training"
    if not any(u.scaling for u in low_rank):
        return "its lora_alpha is 0"
    return "all is lost in rounding to the base's dtype"
