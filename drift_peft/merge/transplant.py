"""A text fine-tune into the VLM without training: as an adapter of the VLM, or merged into it.

    a LoRA adapter of the text sibling    W_vlm + λ·s·B·A, its own factors under the VLM's names
    a full fine-tune, as an adapter       W_vlm + λ·Δ_r, with Δ = W_expert − W_reference, or − W_vlm, of rank r
    a full fine-tune, merged              W_vlm + λ·Δ

That is task arithmetic (arXiv 2212.04089). What a λ costs is measured on the VLM's own answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig

from ..arguments import check_whole, is_number, shortened, typed
from ..checkpoints import (
    TASK,
    Checkpoint,
    adapter_folder,
    carry_adapter,
    how_to_load,
    how_to_serve,
    in_markdown,
    is_adapter,
    match_weights,
    named,
    open_expert,
    refuse_exchanged,
    refuse_other_files,
    replaced_when_complete,
    repository_of,
    scale_adapter,
    shown,
)
from ..keeping import KeepSet
from ..prior import build_prior
from ..prior.report import prior_summary
from .adapter import merge_adapter
from .baseline import kinds_in, merge_baseline, read_checked, refuse_again
from .card import licences_of, write_card
from .cost import Cost, Scales

LISTED = 5  # weights that an error spells out
CARD = """\
---
{data}
---

# {expert} in {base}

W + {scale:g}·Δ: a plain LoRA adapter of {base}, made without training by `drift-peft transplant`. Δ is {delta}.{cost}

## Use

With PEFT alone:

{load}

{serve}

## Licences

It is made of other models' weights. Their cards give these licences:

{licences}
"""


@dataclass(frozen=True)
class TransplantReport:
    """What `transplant` did.

    Attributes:
        output: the folder.
        modules: how many modules the adapter has; weights that were changed, if a fine-tune was merged.
        scale: λ, as given or as found.
        energy: ‖Δ_r‖²/‖Δ‖² over the modules of an adapter made of a fine-tune; 1 where nothing of Δ is left out.
        left_alone: patterns of the language model's weights that stay the VLM's, of a fine-tune -> how many.
        costs: of each scale that was measured, in this order; empty without a keep set.
    """

    output: Path
    modules: int
    scale: float
    energy: float
    left_alone: dict[str, int]
    costs: list[Cost]


@typed
def transplant(
    expert: str | Path,
    base: str | Path,
    output: str | Path,
    *,
    reference: str | Path | None = None,
    rank: int | None = None,
    energy: float | None = None,
    merged: bool = False,
    scale: float | Literal["auto"] = 1.0,
    keep: str | Path | None = None,
    budget: float | None = None,
    load_in_4bit: bool = False,
    batch_size: int | None = None,
    processor: Any = None,
    force: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> TransplantReport:
    """Bring what a text-only fine-tune has learned into a VLM of its family, without training.

    A LoRA adapter becomes one of the VLM without loss. Of a full fine-tune, an adapter holds Δ of the attention and MLP
    projections at a rank; `merged` adds all of Δ, with norms and biases: W + λ·Δ, task arithmetic (arXiv 2212.04089,
    section 2). Embedding, head and everything beside the language model stay the VLM's. Works in `<output>.partial/`,
    renamed when complete and gone if anything fails.

    Args:
        expert: LoRA adapter of the text sibling or of the VLM; or a full fine-tune of either, saved as a text model or
            as a VLM. Folder, hub id or `id@revision`, as all models here.
        base: the VLM, in full precision.
        output: folder to write.
        reference: the model that the expert was trained from, so that Δ = W_expert − W_reference; the VLM if None.
        rank, energy: of Δ in an adapter, as in `build_prior`. With one of these or a reference, an expert that is an
            adapter is taken as the fine-tune that it makes of its base.
        merged: write a VLM in the base's precision instead of an adapter.
        scale: λ, not 0. "auto": the largest of 0.05, 0.1, …, 1 that costs less than `budget`, found by bisection, since
            the cost grows with the scale.
        keep: keep set of the VLM, by which the cost is measured: KL(p_vlm || p) on its answers, in nats a token. This
            loads the VLM.
        budget: for scale="auto".
        load_in_4bit: measure on the VLM in NF4, which has a distance of its own: scale 0 in the costs.
        batch_size: answers at a time, where the cost is measured; 8 if None.
        processor: of the VLM there, if not the one that lies with it; or settings of that one.
        force: go on where a weight of a full fine-tune has nothing in common with the base's.
        overwrite: replace an existing folder of the same kind, once the new one is complete.
        progress: show progress bars on stderr.

    Raises:
        ValueError: an argument is out of range or has no meaning here; a module of the expert has no counterpart in the
            VLM, with the names on both sides; an adapter holds more than s·B·A of linear layers, by name; the expert
            adds nothing; the keep set is of another model; or no scale costs less than the budget.
        OSError: something is not found, or the output exists or cannot be written.

    Example:
        >>> report = transplant(expert=EXPERT, base=VLM, output="untrained", rank=8, scale=0.5, progress=False)
        >>> report.modules, 0 < report.energy < 1
        (28, True)
    """
    _check_arguments(scale, keep, budget, load_in_4bit, batch_size, processor)
    if None not in (rank, energy):
        raise ValueError(f"give rank={rank} or energy={energy}, not both")
    batch_size = batch_size or 8
    scale = scale if scale == "auto" else float(scale)
    given = [source for source in (expert, base, reference, keep) if source is not None]
    options = {"reference": reference, "force": force, "progress": progress}
    kind = "model" if merged else "adapter"
    # The work is done inside the folder, since it takes as much room as the result, and is gone before that is renamed.
    with replaced_when_complete(Path(output), overwrite, given, kind) as folder, TemporaryDirectory(dir=folder) as work:
        as_it_is = is_adapter(expert) and (reference, rank, energy) == (None, None, None)
        if merged and not as_it_is:
            _refuse_adapters_settings(rank, energy, load_in_4bit)
        vlm, result, scales = Checkpoint(base), Path(work, "result"), None
        if merged:
            refuse_other_files(vlm)
        if keep is not None:
            scales = Scales(base, KeepSet.load(keep), load_in_4bit, batch_size, progress, processor)
        if as_it_is:
            delta = _of_adapter(expert, vlm, Path(work, "adapter"))
        elif merged:
            delta = _of_fine_tune(expert, vlm, reference, force, checked=scales is not None)
        else:
            delta = _of_truncated(expert, base, vlm, rank, energy, Path(work), options)

        if scales is not None:
            delta.scaled_by(scales)
            if scale == "auto":
                scale = scales.largest_below(budget)
            scales.cost(scale)

        if delta.adapter is None:
            merge_baseline("task_arithmetic", expert, base, result, scale=scale, **options)
        else:
            scale_adapter(delta.adapter, scale)
            if merged:
                merge_adapter(base, delta.adapter, result, progress=progress)
            else:
                result = delta.adapter
        costs = [] if scales is None else scales.costs
        report = TransplantReport(Path(output), delta.modules, scale, delta.energy, delta.left_alone, costs)
        if merged:
            what, into = (in_markdown(shown(str(source))) for source in (expert, vlm.source))
            made = f"What {what} has learned, {scale:g} times, merged into {into}.{_cost(report)}"
            how = {"merged": True, "scale": scale, "force": force}
            write_card(result, output, vlm, made, transplant.__name__, delta.origins, how)
        else:
            _card(report, result, expert, vlm, delta).save(result / "README.md")
        for part in result.iterdir():
            part.rename(folder / part.name)
    return report


@dataclass(frozen=True)
class _Delta:
    """What is transplanted, before its scale is known.

    Attributes:
        modules: of its adapter; weights, if all of Δ is merged.
        origins: role -> id and revision of the models that it is made of.
        scaled_by: has the scale be a factor of it.
        adapter: folder of Δ as an adapter of the VLM; None if all of Δ is merged, which no adapter holds.
        words: what Δ is, for the card of an adapter.
        left_alone, energy: as in the report.
    """

    modules: int
    origins: dict[str, dict]
    scaled_by: Callable[[Scales], None]
    adapter: Path | None = None
    words: str = ""
    left_alone: dict[str, int] = field(default_factory=dict)
    energy: float = 1.0


def _of_adapter(expert: str | Path, vlm: Checkpoint, folder: Path) -> _Delta:
    """Of a LoRA adapter, as it is."""
    modules = carry_adapter(expert, vlm, folder)
    origins = {"base": vlm.origin, "expert": {"id": str(adapter_folder(expert)), "revision": None}}
    words = f"that of the LoRA adapter {in_markdown(shown(str(expert)))}, as it is"
    return _Delta(modules, origins, lambda scales: scales.of_adapter(folder), folder, words)


def _of_truncated(
    expert: str | Path,
    base: str | Path,
    vlm: Checkpoint,
    rank: int | None,
    energy: float | None,
    work: Path,
    options: dict,
) -> _Delta:
    """Of a full fine-tune's attention and MLP projections, at a rank."""
    _refuse_lost(open_expert(expert), vlm)
    try:
        prior = build_prior(expert, base, work / "prior.safetensors", rank, energy, **options)
    except BaseException as error:
        notes = getattr(error, "__notes__", [])  # that a part of it is kept: here it goes with the folder
        notes[:] = [note for note in notes if str(work) not in note]
        raise
    folder, header = work / "adapter", prior.metadata
    # Carried over, too: what is exported has alpha_pattern, beside which lora_alpha alone is no scale.
    modules = carry_adapter(prior.as_lora(1.0, work / "exported"), vlm, folder)
    origins = {role: header[role] for role in ("expert", "base", "reference") if header[role]}
    held = prior_summary(prior)["total"]["energy"]
    minuend, subtrahend = (in_markdown(shown(str(source))) for source in (expert, options["reference"] or base))
    words = f"{minuend} − {subtrahend}, with {held:.1%} of its energy"
    left_alone = header["without_counterpart"]
    return _Delta(modules, origins, lambda scales: scales.of_adapter(folder), folder, words, left_alone, held)


def _of_fine_tune(
    expert: str | Path, vlm: Checkpoint, reference: str | Path | None, force: bool, checked: bool
) -> _Delta:
    """All of a full fine-tune's Δ, with norms and biases. `checked`: refuse now what merging would, since measuring
    what it costs takes its time."""
    sources = {"expert": open_expert(expert), "base": vlm}
    if reference is not None:
        sources["reference"] = open_expert(reference)
    _refuse_lost(sources["expert"], vlm)
    refuse_again(vlm, sources["expert"])
    match = match_weights(sources, kinds_in(vlm))
    for name in match.keys if checked else ():
        read_checked(name, match, sources, force)
    origins = {role: source.origin for role, source in sources.items()}
    left_alone = match.without_counterpart
    return _Delta(len(match.keys), origins, lambda scales: scales.of_weights(sources, match), left_alone=left_alone)


def _check_arguments(scale, keep, budget, load_in_4bit: bool, batch_size: int | None, processor) -> None:
    if scale != "auto" and not (is_number(scale) and scale):
        raise ValueError(f'scale must be "auto" or a finite number other than 0, got {scale!r}')
    if scale == "auto" and (keep is None or budget is None):
        missing = " and ".join(n for n, v in (("keep (--keep)", keep), ("budget (--budget)", budget)) if v is None)
        raise ValueError(
            f'scale="auto" takes the largest scale that costs less than a budget, and {missing} is missing'
        )
    if budget is not None and scale != "auto":
        raise ValueError(f'budget={budget} goes with scale="auto" (--scale auto), and the scale is {scale}')
    if budget is not None and not 0 < budget < math.inf:
        raise ValueError(f"budget must be a number of nats above 0, got {budget!r}")
    if load_in_4bit and keep is None:
        raise ValueError("load_in_4bit goes with keep (--keep): the model is loaded only where a cost is measured")
    if processor is not None and keep is None:
        raise ValueError("processor (--processor-kwargs) goes with keep (--keep): nothing else asks about images")
    if batch_size is not None:
        check_whole(batch_size=batch_size)
        if keep is None:
            raise ValueError(f"batch_size={batch_size} goes with keep (--keep): nothing else is asked")


def _refuse_adapters_settings(rank: int | None, energy: float | None, load_in_4bit: bool) -> None:
    for name, value in (("rank", rank), ("energy", energy)):
        if value is not None:
            raise ValueError(f"{name}={value} goes with an adapter: merged (--merged) adds all of a fine-tune's Δ")
    if load_in_4bit:
        raise ValueError(
            "load_in_4bit measures an adapter beside 4-bit weights, and merged (--merged) moves the weights of a "
            "fine-tune themselves: measure them in full precision, or leave out merged"
        )


def _refuse_lost(expert: Checkpoint, base: Checkpoint) -> None:
    """Refuse a fine-tune that sees where its base does not, or with weights in its layers that the base lacks."""
    refuse_exchanged(expert, base, force_helps=False)
    ours, theirs = base.decoder.kinds, expert.decoder.kinds
    lost, other = (
        [name for name in one if name.startswith("layers.") and name not in two]
        for one, two in ((theirs, ours), (ours, theirs))
    )
    if lost:
        alone = f"; {base.source} alone has {shortened(other, LISTED)}" if other else ""
        raise ValueError(
            f"{len(lost)} weights of {expert.source} have no counterpart in {base.source}: {shortened(lost, LISTED)}"
            f"{alone}"
        )


def _card(report: TransplantReport, folder: Path, expert: str | Path, vlm: Checkpoint, delta: _Delta) -> ModelCard:
    """Of an adapter in a folder."""
    license, licences = licences_of(delta.origins)
    repository = repository_of(vlm.origin)
    revision = repository and repository[1]
    expert, base = in_markdown(shown(str(expert))), in_markdown(named(vlm.origin))
    data = ModelCardData(
        base_model=repository and repository[0],
        library_name="peft",
        pipeline_tag=TASK if vlm.sees else None,
        tags=["drift-peft", "lora"],
        **license,
    )
    called, adapter, loaded_by = named(vlm.origin), "path/or/hub-id", vlm.auto_class.__name__
    names = {"expert": expert, "base": base, "scale": report.scale, "delta": delta.words, "cost": _cost(report)}
    names["load"] = how_to_load(called, base, loaded_by, adapter, revision=revision)
    rank = LoraConfig.from_pretrained(folder).r
    names["serve"] = how_to_serve(called, loaded_by, adapter, rank, revision)
    names["licences"] = licences
    return ModelCard(CARD.format(data=data.to_yaml(), **names))


def _cost(report: TransplantReport) -> str:
    """What the scale costs, for a card; empty where it was not measured."""
    if not report.costs:
        return ""
    (measured,) = (each for each in report.costs if each.scale == report.scale)
    return (
        f"\n\nOn the VLM's own answers it is {measured.kl:.3g} nats a token away from it, and would have chosen "
        f"{measured.agreement:.1%} of their tokens too."
    )
