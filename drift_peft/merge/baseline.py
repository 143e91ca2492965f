"""Parameter-space baselines: a text expert merged into a VLM's language model without training, streaming.

The rivals in table 2 of DRIFT (arXiv 2510.15050v2), with the hyper-parameters of its table 9. These are "sourced from
BR2V" (arXiv 2505.05464), whose published code says what they multiply. One weight at a time, in fp32:

    τ_vlm = W_vlm − W_reference     τ_expert = W_expert − W_reference      reference: the ancestor of both
    W' = W_reference + merge([τ_vlm, τ_expert], weights, density)          by default
    W' = W_vlm + merge([Δ], [λ], density)                                  with a scale λ; Δ as in a prior:
                                                                           W_expert − W_vlm, or τ_expert

    method           weights   density  merge
    task_arithmetic  0.9, 0.1           Σ w·τ                                                      (arXiv 2212.04089)
    ties             1.6, 0.2  0.2      trim each τ to its largest entries; per entry, elect the   (arXiv 2306.01708)
                                        sign of Στ and average the w·τ that have it
    dare_linear      1.6, 0.2  0.2      Σ w·τ·m/density, where m keeps entries at random           (arXiv 2311.03099)
    dare_ties        1.6, 0.2  0.2      dare's random choice, then the election of ties
    layer_swap       0.9, 0.1           task_arithmetic from layer 6 on                            (arXiv 2410.01335)

Table 9 writes (λ = 1.6, α = 0.2) and names no density: 0.2 is the default of BR2V's code. Its k = 5 is the last layer
that BR2V's code leaves as it is, so layers 0 to 5. That code merges all but embedding and head, and so do we. Layer
swapping as first published transplants whole layers: `scale=1` with `only_layers`.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft.utils.merge_utils import dare_linear, dare_ties, prune, task_arithmetic, ties

from ..arguments import check_whole, is_number, typed
from ..checkpoints import (
    Checkpoint,
    Match,
    block_rows,
    describe,
    in_markdown,
    match_weights,
    needs_peft,
    open_expert,
    place_of,
    refuse_both,
    refuse_exchanged,
    refuse_other,
    replaced_when_complete,
    shown,
    warn_of_other_rotations,
    with_full_path,
    write_model,
)
from ..choices import MERGED_MODULES, METHODS
from ..prior import MergedDelta, forget_merge, read_merge, refuse_unrelated
from ..warn import warn
from .card import write_card
from .same import difference

ROLES = ("base", "expert", "reference")
LEFT_OUT = 0.02  # share of the layers' weights from which on it is worth a warning that they are not merged
_DRAWING = threading.Lock()
MERGES = {
    "task_arithmetic": task_arithmetic,
    "ties": ties,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
    "layer_swap": task_arithmetic,
}


@dataclass(frozen=True)
class BaselineReport:
    """What `merge_baseline` did.

    Attributes:
        output: the merged folder.
        method: as asked for.
        weights: of the task vectors: those of the VLM and of the expert, or of Δ alone.
        density: share of the entries that were kept; None where none are dropped.
        merged: weights of the language model that were merged.
        tensors: tensors in the merged folder.
        without_counterpart: patterns of weights that were not merged because the expert has none, or because they are
            of none of the kinds that are merged, such as experts and routers -> how many.
        relative_change: ‖W' − W‖/‖W‖ (Frobenius) over all merged weights, as stored; None where these were zero, or
            where an existing folder was taken.
    """

    output: Path
    method: str
    weights: tuple[float, ...]
    density: float | None
    merged: int
    tensors: int
    without_counterpart: dict[str, int]
    relative_change: float | None


@typed
def merge_baseline(
    method: str,
    expert: str | Path,
    base: str | Path,
    output: str | Path,
    reference: str | Path | None = None,
    weights: Sequence[float] | None = None,
    scale: float | None = None,
    density: float | None = None,
    modules: str | Sequence[str] | None = None,
    only_layers: Sequence[int] | None = None,
    skip_first: int | None = None,
    seed: int = 0,
    force: bool = False,
    overwrite: bool = False,
    exist_ok: bool = False,
    progress: bool = True,
) -> BaselineReport:
    """Merge a text-only expert into the language model of a VLM by one of `choices.METHODS`.

    They are the rivals in table 2 of DRIFT (arXiv 2510.15050), with the settings of its table 9: task_arithmetic (arXiv
    2212.04089), ties (2306.01708), dare_linear and dare_ties (2311.03099), layer_swap (2410.01335). With the task
    vectors τ = W − W_reference, task_arithmetic is W_reference + Σ w·τ; with a scale λ, W_vlm + λ·Δ. The others'
    formulas stand at the top of the module.

    Each weight is cast once to its dtype in the base. Everything else, such as the vision tower, embedding and head,
    stays byte for byte as it is, but for config.json, which says how it was merged. What that calls W_vlm + λ·Δ, by
    task_arithmetic, can be trained with a prior of the VLM (see `prior.MergedDelta`). A card says what was merged:
    README.md. Works in `<output>.partial/`, renamed when complete and gone if anything fails. Memory holds a few blocks
    of rows, whatever the model's size; ties sorts one weight at a time, at 36 bytes an entry.

    Args:
        method: a key of `choices.METHODS`.
        expert: text LLM that reasons, or a LoRA adapter that makes one of its base; folder, hub id or `id@revision`, as
            all checkpoints here.
        base: the VLM, in full precision.
        output: folder to write.
        reference: the text LLM that both were trained from. Needed unless a scale is given or the weights of
            task_arithmetic or layer_swap add up to 1, when it cancels out.
        weights: of τ_vlm and τ_expert; table 9 if None.
        scale: λ of W_vlm + λ·Δ, instead of weights. With one task vector, ties only trims and dare_ties is dare_linear.
        density: share of the entries of a task vector that is kept, in (0, 1].
        modules: of "attn", "mlp", "norm", "bias"; all that the base has if None.
        only_layers, skip_first: which layers, as the text LLM counts them; the final norm is in none and always merged.
        seed: of the random choice of dare. Same inputs, seed and library versions give the same bytes.
        force: merge even where a weight of the expert has nothing in common with the base's, or with the reference's,
            or the expert is a VLM and the base is none.
        overwrite: replace an existing model folder, once the new one is complete.
        exist_ok: take an existing output that was merged of the same models with the same settings; any other is
            refused. To tell models in folders apart, all weights are read and merged again.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: an argument is out of range or has no meaning for the method, PEFT is too old for dare, a
            checkpoint is no full-precision model, weights do not match or are not finite, the expert has nothing in
            common with the base (see `force`), a model was written to meanwhile, or nothing changed.
        OSError: a checkpoint is not found, or the output exists or cannot be written.

    Example:
        >>> report = merge_baseline("task_arithmetic", EXPERT, VLM, "half-way", scale=0.5, progress=False)
        >>> report.merged  # weights
        49
    """
    weights, density = _check_numbers(method, reference, weights, scale, density)
    modules, only_layers, skip_first = _check_selection(method, modules, only_layers, skip_first)
    settings = _Settings(method, weights, density, modules, only_layers, skip_first, seed, force)
    if settings.draws:
        needs_peft((0, 19), f"method '{method}'", "does not divide what it keeps by the density", "merge by 'ties'")
    refuse_both(exist_ok, overwrite)
    output, given = Path(output), [source for source in (expert, base, reference) if source is not None]
    if exist_ok and output.exists():
        plan, change = _Plan(settings, expert, base, reference), None
        refuse_other(output, difference(output, plan.base, plan.names, plan.blocks, plan.claim, plan.how))
        plan.refuse_changed()
    else:
        with replaced_when_complete(output, overwrite, given) as folder:
            plan = _Plan(settings, expert, base, reference)
            change = _write(plan, folder, output, progress)
    without = plan.match.without_counterpart
    return BaselineReport(output, method, weights, density, len(plan.names), len(plan.base.keys), without, change)


@dataclass(frozen=True)
class _Settings:
    """Of a merge, checked. `modules` is None for all that the base has."""

    method: str
    weights: tuple[float, ...]
    density: float | None
    modules: list[str] | None
    only_layers: list[int] | None
    skip_first: int
    seed: int
    force: bool

    @property
    def merge(self) -> Callable[..., torch.Tensor]:
        return MERGES[self.method]

    @property
    def draws(self) -> bool:
        """Whether the seed decides anything."""
        return self.merge in (dare_linear, dare_ties)


class _Plan:
    """The models of a merge, opened and matched: what becomes of which weight, and what will be said of it.

    Attributes:
        names: key in the base of each weight that is merged -> its canonical name.
        claim: what others may take the result for: W_vlm + λ·Δ.
        how: the settings, as JSON holds them.
    """

    def __init__(self, settings: _Settings, expert: str | Path, base: str | Path, reference: str | Path | None) -> None:
        self.settings = settings
        self.sources = {"expert": open_expert(expert), "base": Checkpoint(base)}
        if reference is not None:
            self.sources["reference"] = open_expert(reference)
        self.base = self.sources["base"]
        if not settings.force:
            refuse_exchanged(self.sources["expert"], self.base)
        modules = kinds_in(self.base) if settings.modules is None else settings.modules
        chosen = {"modules": modules, "only_layers": settings.only_layers, "skip_first": settings.skip_first}
        self.match = match_weights(self.sources, **chosen)
        warn_of_other_rotations(self.sources)
        self.names = {keys["base"]: name for name, keys in self.match.keys.items()}
        if (share := sum(self.match.shares.values())) > LEFT_OUT:
            left = describe(self.match.without_counterpart, self.match.shares)
            warn(
                f"{share:.0%} of the weights in the layers of base {base} are not merged, since the expert has none of "
                f"their names, or they are experts or routers: {left}."
            )
        self.claim = None
        if settings.merge is task_arithmetic and len(settings.weights) == 1:
            placed = {role: with_full_path(source.origin) for role, source in self.sources.items()}
            refuse_again(self.base, self.sources["expert"])
            self.claim = MergedDelta(settings.weights[0], **{role: placed.get(role) for role in ROLES}, **chosen)
        self.how = {"method": settings.method, "weights": [*settings.weights], "density": settings.density, **chosen}
        self.how |= {"seed": settings.seed if settings.draws else None}

    def blocks(self, raw: str, W: torch.Tensor) -> Iterator[torch.Tensor]:
        """W' of a weight of the base, as `write_model` takes it."""
        name, settings = self.names[raw], self.settings
        tensors = read_checked(name, self.match, self.sources, settings.force)
        return _merge(settings.merge, tensors, settings.weights, settings.density, f"{settings.seed} {name}")

    def refuse_changed(self) -> None:
        for source in self.sources.values():
            source.refuse_changed()


def _write(plan: _Plan, folder: Path, output: Path, progress: bool) -> float | None:
    """The merged model with its card into a folder that will be called `output`. Returns what `write_model` does."""
    change = write_model(plan.base, folder, plan.names, plan.blocks, progress)
    plan.refuse_changed()
    method, weights, expert = plan.settings.method, plan.settings.weights, plan.sources["expert"].source
    if change == 0:
        raise ValueError(
            f"{method} with weights {weights} changes no weight of {plan.base.source}: {expert} is the same model "
            "there, or what is added is lost in rounding to the base's dtype, or left out by the density"
        )
    if plan.claim is not None:
        plan.claim.write(folder)
    else:
        forget_merge(folder, plan.how)
    made = f"{in_markdown(shown(expert))}, merged into {in_markdown(shown(plan.base.source))} by {method}."
    origins = {role: source.origin for role, source in plan.sources.items()}
    how = {**plan.how, "force": plan.settings.force}
    how |= {"scale": weights[0], "weights": None} if len(weights) == 1 else {}
    write_card(folder, output, plan.base, made, merge_baseline.__name__, origins, how)
    return change


def refuse_again(base: Checkpoint, expert: Checkpoint) -> None:
    """ValueError if the base has a part of this expert's Δ in it: W + λΔ with λ'Δ in it already is W + (λ + λ')Δ, or
    something else where Δ is taken from the base itself."""
    existing = read_merge(base.config)
    if existing is not None and place_of(existing.expert) == place_of(expert.origin):
        raise ValueError(
            f"base {base.source} is {existing.words} already: merge into {existing.base['id']} at another scale"
        )


def kinds_in(base: Checkpoint) -> list[str]:
    """Those of MERGED_MODULES that the base has."""
    present = {base.decoder.kinds.get(name) for name in base.claims}
    return [module for module in MERGED_MODULES if module in present]


def _check_numbers(method, reference, weights, scale, density) -> tuple[tuple[float, ...], float | None]:
    """Weights of the task vectors, one for Δ alone or two for the VLM's and the expert's, and the density."""
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown: choose from {', '.join(METHODS)}")
    recipe = METHODS[method]
    if density is not None and recipe.density is None:
        raise ValueError(f"density={density} has no meaning for {method}, which keeps every entry")
    density = recipe.density if density is None else density
    if density is not None and not 0 < density <= 1:
        raise ValueError(f"density must be above 0 and at most 1, got {density}")
    if scale is not None and weights is not None:
        raise ValueError(f"scale={scale} stands for one task vector and weights={tuple(weights)} for two: give one")
    weights = (scale,) if scale is not None else tuple(recipe.weights if weights is None else weights)
    if len(weights) != 2 - (scale is not None) or not all(map(is_number, weights)):
        raise ValueError(f"scale is one finite number and weights are two, the VLM's and the expert's; got {weights}")
    if weights[-1] == 0:
        raise ValueError("the expert's weight is 0, so that nothing of it is merged: give it another one")
    if scale is None and reference is None:
        if MERGES[method] is not task_arithmetic or not math.isclose(sum(weights), 1):
            raise ValueError(
                f"{method} with weights {weights} needs the model that base and expert were trained from: name it as "
                "reference (--reference), or give a scale (--scale) for base + scale·Δ"
            )
        weights = weights[1:]  # the reference cancels out: W_vlm + w_expert·Δ
    return tuple(map(float, weights)), density


def _check_selection(method, modules, only_layers, skip_first) -> tuple[list[str] | None, list[int] | None, int]:
    """Modules and layers in a fixed order, and the layers that are left out; by default those of the method."""
    modules = [modules] if isinstance(modules, str) else modules
    if modules is not None and not (modules and set(modules) <= set(MERGED_MODULES)):
        raise ValueError(f"modules={list(modules)} are not all merged: choose from {', '.join(MERGED_MODULES)}")
    modules = modules and [module for module in MERGED_MODULES if module in modules]
    only_layers = None if only_layers is None else sorted(set(only_layers))
    if skip_first is None:
        skip_first = METHODS[method].skip_first if only_layers is None else 0
    check_whole(0, skip_first=skip_first)
    return modules, only_layers, skip_first


def read_checked(name: str, match: Match, sources: dict[str, Checkpoint], force: bool) -> dict[str, torch.Tensor]:
    """Role -> this weight. ValueError if one is not finite, or the expert's has nothing in common with another."""
    tensors = {role: sources[role].tensor(key) for role, key in match.keys[name].items()}
    W, squares = tensors["base"], dict.fromkeys(tensors, 0.0)
    inner = dict.fromkeys([role for role in tensors if role != "expert"], 0.0)  # products with the expert
    for start in range(0, len(W), block_rows(W)):
        # In fp64: in fp32, squares of weights below 1e-22 vanish.
        blocks = {role: tensor[start : start + block_rows(W)].double() for role, tensor in tensors.items()}
        for role, block in blocks.items():
            squares[role] += block.square().sum().item()
        for role in inner:
            inner[role] += (blocks["expert"] * blocks[role]).sum().item()
    for role, square in squares.items():
        if not math.isfinite(square):
            raise ValueError(f"{name} of the {role} {sources[role].source} holds NaN or infinite values")
    for role, product in inner.items():
        norms = math.sqrt(squares["expert"]) * math.sqrt(squares[role])
        if W.dim() == 2 and norms and not force:
            refuse_unrelated(name, product / norms, sources["expert"].source, sources[role].source)
    return tensors


def _merge(
    merge: Callable[..., torch.Tensor],
    tensors: dict[str, torch.Tensor],
    weights: tuple[float, ...],
    density: float | None,
    seed: str,
) -> Iterator[torch.Tensor]:
    """W' of one weight in fp32, a block of rows at a time."""
    W = tensors["base"]
    origin = tensors.get("reference", W)
    anchor = W if len(weights) == 1 else origin
    ends = [tensors["expert"]] if len(weights) == 1 else [W, tensors["expert"]]  # of the task vectors
    trim = merge is ties  # the one step that needs the whole weight at once; the election then drops no more
    with _as_peft_does(seed):
        vectors = [prune(end.float() - origin.float(), density, "magnitude") for end in ends] if trim else []
    settings = () if density is None else (1.0 if trim else density,)
    for start in range(0, len(W), block_rows(W)):
        rows = slice(start, start + block_rows(W))
        taus = [v[rows] for v in vectors] if trim else [end[rows].float() - origin[rows].float() for end in ends]
        with _as_peft_does(f"{seed} {start}"):
            merged = merge(taus, torch.tensor(weights, dtype=torch.float32), *settings)
        yield anchor[rows].float() + merged


@contextlib.contextmanager
def _as_peft_does(seed: str) -> Iterator[None]:
    """PEFT's functions draw from torch's generator of the CPU, which all threads share, and warn of a density of 1."""
    with _DRAWING, torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.default_generator.manual_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "big"))
        warnings.filterwarnings("ignore", message="The density .* no pruning")
        yield
