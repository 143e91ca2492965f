"""A prior, a VLM's keep set and an expert's answers in text -> the same prior with each singular direction weighed.

Only one model is in memory at a time: the expert answers first, into a file, and then the gates are trained on the VLM.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..arguments import check_whole, is_number, typed
from ..checkpoints import PROJECTIONS, Checkpoint, claimed_output, is_same_origin, module_kind, named
from ..choices import SAID_TOKENS, SAID_TOP_K, Objective
from ..keeping import Feed, KeepSet, Vlm, keep_4bit_differentiable, make_answer_set, refuse_offloaded
from ..prior import ReasoningPrior, write_gated
from ..tuner import check_fingerprint, fitting_modules, weight_products
from ..warn import warn
from .gates import Gate, frozen, gated, train_gates

LAST = 20  # steps whose mean divergences the header gives


@typed
def gate_prior(
    prior: ReasoningPrior | str | Path,
    base: nn.Module | str | Path,
    expert: str | Path | None,
    keep_set: KeepSet | str | Path,
    texts: str | Path | Sequence[str] | None,
    output: str | Path,
    objective: Objective = "expert",
    keep_weight: float | None = None,
    alpha: float | None = None,
    steps: int = 200,
    rate: float = 0.1,
    batch_size: int = 8,
    max_tokens: int = 512,
    answers: str | Path | None = None,
    max_new_tokens: int | None = None,
    top_k: int | None = None,
    load_in_4bit: bool = False,
    gradient_checkpointing: bool = True,
    seed: int = 0,
    processor: Any = None,
    overwrite: bool = False,
    progress: bool = True,
) -> ReasoningPrior:
    """Weigh each singular direction of a prior, and write U diag(σ(γ)·S) Vh as a new one.

    One γ for each direction is trained with Adam, from 0 on, where every direction is half taken; nothing needs labels.
    What is minimized is κ·KL(VLM || gated) on the keep set + KL(expert || gated) on the expert's own answers to prompts
    in text (`objective="expert"`), or that of FRISM (arXiv 2601.21187), KL(VLM || gated) on the keep set −
    α·‖σ(γ)·S‖²/‖S‖², which asks for as much of Δ as the VLM's answers allow and needs no expert.

    The expert's answers are made first and kept beside the output. A run that is interrupted there goes on with the
    same call; the gates, which take minutes, are trained from the start.

    Args:
        prior: of attention and MLP projections, or its path or hub id.
        base: the VLM that it was built for: folder, hub id or `id@revision`; or the model in memory, with a processor.
        expert: text-only model: folder, hub id or `id@revision`. None with `objective="frism"`.
        keep_set: of the VLM, from `make_keep_set`, or its path or hub id.
        texts: prompts for the expert, or a file of them, one a line (.jsonl: a string of JSON a line). None with
            `objective="frism"`.
        output: file to write.
        objective: "expert" or "frism".
        keep_weight: κ of "expert": the larger, the more the VLM stays as it is; 0.3 if None.
        alpha: α of "frism": the larger, the more of Δ is taken; 1 if None.
        steps: of Adam.
        rate: its learning rate.
        batch_size: answers of the keep set, and of the expert, a step.
        max_tokens: how many go through the model at a time; what is longer is one sample.
        answers: file of the expert's answers; `<output>` with `.answers.safetensors` by default. One that is there
            already is used if it was made of the same expert, prompts and settings.
        max_new_tokens, top_k: of the expert's answers, as of `make_keep_set`; 512 and 32 if None.
        load_in_4bit: load the projections of both language models in NF4, and the rest as it is.
        gradient_checkpointing: less memory, a third more time.
        seed: of the order of the answers.
        processor: of the VLM, if not the one that lies with it; or settings of that one.
        overwrite: replace an existing output, and what an interrupted run of other settings has left; answers that are
            complete are kept.
        progress: show progress bars on stderr.

    Raises:
        ValueError: an argument is out of range, or of the other objective; the prior holds other weights than
            projections, is gated already, or is of another base; the keep set is of another VLM; the expert's tokens
            are not the VLM's; the GPU has no room; a divergence or a gradient is not finite.
        OSError: something is not found; the output exists or is what it is made of, or the answers were made in
            another way.

    Example:
        >>> gated = gate_prior(
        ...     "prior.safetensors", VLM, EXPERT, "keep.safetensors", ["7-3+4solve?", "1+8solve?"], "gated.safetensors",
        ...     steps=2, batch_size=2, max_new_tokens=8, top_k=8, progress=False,
        ... )
        >>> {round(gate, 1) for weight in gated.metadata["weights"].values() for gate in weight["gates"]} >= {0.5}
        True
    """
    of_answers = {"answers": answers, "max_new_tokens": max_new_tokens, "top_k": top_k}
    _check_objective(objective, expert, texts, keep_weight, alpha, of_answers)
    keep_weight = (0.3 if objective == "expert" else 1.0) if keep_weight is None else keep_weight
    alpha = 1.0 if alpha is None else alpha
    for name, value in (("keep_weight", keep_weight), ("alpha", alpha), ("rate", rate)):
        if not is_number(value) or value <= 0:
            raise ValueError(f"{name} must be a number > 0, got {value!r}")
    whole = {"steps": steps, "batch_size": batch_size, "max_tokens": max_tokens}
    max_new_tokens = SAID_TOKENS if max_new_tokens is None else max_new_tokens
    top_k = SAID_TOP_K if top_k is None else top_k
    check_whole(**whole, top_k=top_k, max_new_tokens=max_new_tokens)
    output = Path(output)
    if answers is not None and Path(answers).resolve() == output.resolve():
        raise ValueError(f"answers and output are both {output}: name a file of its own for the expert's answers")
    prior = prior if isinstance(prior, ReasoningPrior) else ReasoningPrior.load(prior)
    keep_set = keep_set if isinstance(keep_set, KeepSet) else KeepSet.load(keep_set)
    sources = [prior.path, keep_set.path, *([texts] if isinstance(texts, str | Path) else [])]
    with claimed_output(output, overwrite, "gated.safetensors", sources):
        pass  # written in the end, and refused now if it could not be
    _check_prior(prior)
    vlm = Vlm(base, processor, load_in_4bit)
    keep_set.check(vlm.processor)
    keep_set.check_config(vlm.config)
    fitting_modules(vlm.skeleton, prior)
    answer_set = None
    if objective == "expert":
        _warn_of_other_expert(prior, expert)
        file = output.with_suffix(".answers.safetensors") if answers is None else Path(answers)
        answer_set = make_answer_set(
            expert, vlm, texts, file, max_new_tokens, top_k, load_in_4bit, batch_size, progress, overwrite
        )
    kept = Feed(keep_set, vlm.processor, batch_size, seed)
    answered = None if answer_set is None else Feed(answer_set, vlm.processor, batch_size, seed)
    model = vlm.model
    refuse_offloaded(model, vlm.origin["id"], "gating")
    modules = fitting_modules(model, prior)
    keep_4bit_differentiable(model)
    if merged := check_fingerprint(model, modules, prior):
        raise ValueError(
            f"the model is {merged.words}, and gates weigh what is added to a VLM without any of it: give "
            f"{merged.base['id']} (--base)"
        )
    gates = {name: Gate(prior[name], next(modules[name].parameters()).device, model.dtype) for name in prior}
    train = train_gates(model, [*gates.values()], kept, answered, keep_weight, alpha, steps, rate, max_tokens)
    try:
        with frozen(model, gradient_checkpointing), gated(modules, gates):
            losses = [*tqdm(train, desc="gates", total=steps, unit="step", disable=not progress)][-LAST:]
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"the GPU has no room for {max_tokens} tokens at a time: pass a smaller max_tokens (--max-tokens), or "
            "load_in_4bit=True (--load-in-4bit)"
        ) from error
    origin = _origin(answer_set, keep_weight, alpha, losses)
    origin |= {"keep_set": keep_set.sha256, "base": vlm.origin, "load_in_4bit": load_in_4bit}
    origin |= {"steps": steps, "rate": rate, "batch_size": batch_size, "seed": seed}
    products = {name: weight_products(model, modules[name], prior[name].U, prior[name].Vh) for name in prior}
    taken = {name: gate.taken.detach().cpu() for name, gate in gates.items()}
    return write_gated(prior, taken, products, output, origin, overwrite)


def _origin(answer_set: Any, keep_weight: float, alpha: float, losses: list[tuple[float, float]]) -> dict:
    """What the header says of the objective, and of the divergences that were left in these steps.

    Args:
        answer_set: of the expert, from `make_answer_set`; None with `objective="frism"`.
    """
    if answer_set is None:
        origin, names = {"objective": "frism", "alpha": alpha}, ("keep_kl",)
    else:
        origin, names = {"objective": "expert", "keep_weight": keep_weight}, ("keep_kl", "text_kl")
        origin |= {"expert": answer_set.metadata["expert"], "answers": answer_set.sha256, "prompts": len(answer_set)}
    return origin | {name: math.fsum(step[i] for step in losses) / len(losses) for i, name in enumerate(names)}


def _check_objective(objective: str, expert: Any, texts: Any, keep_weight: Any, alpha: Any, of_answers: dict) -> None:
    if objective == "expert" and (expert is None or texts is None):
        raise ValueError("objective 'expert' needs an expert and texts that it answers: give both, or take 'frism'")
    if objective == "frism" and (expert is not None or texts is not None):
        raise ValueError("objective 'frism' asks no expert: give neither an expert nor texts, or take 'expert'")
    others = {"alpha": alpha} if objective == "expert" else {"keep_weight": keep_weight, **of_answers}
    if foreign := next((name for name, value in others.items() if value is not None), None):
        raise ValueError(f"objective {objective!r} has no {foreign}, which is of the other one: leave it out")


def _warn_of_other_expert(prior: ReasoningPrior, expert: str | Path) -> None:
    """An adapter cannot answer by itself: the model that stands for it has another name."""
    built, asked = prior.metadata.get("expert"), Checkpoint(expert).origin
    if built is not None and "base" not in built and not is_same_origin(built, asked):
        warn(
            f"{prior.source} was built from {named(built)}, and its directions are weighed by the answers of "
            f"{named(asked)}: unless that is the same model, give the prior's own (--expert)."
        )


def _check_prior(prior: ReasoningPrior) -> None:
    if "gated" in prior.metadata:
        raise ValueError(f"{prior.source} is gated already: gate the prior that it was made of")
    others = [name for name in prior if module_kind(name) not in PROJECTIONS]
    if others:
        raise ValueError(
            f"{prior.source} holds {others[0]}, and gates weigh attention and MLP projections alone: build a prior of "
            "these (--modules attn mlp)"
        )
