"""Two checkpoints -> prior file, one weight at a time, resumable.

Δ = W_expert − W_base (DRIFT, arXiv 2510.15050, equation 2), or W_expert − W_reference where the expert was trained from
another model (table 10). Names, shapes and configurations are checked for all weights before the first one is read.
Only one Δ exists at any time, and while it is decomposed another thread reads the next weight. Each result goes to disk
at once, so that an interrupted build loses one weight at most.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from tqdm.auto import tqdm

from ..arguments import check_whole, typed
from ..checkpoints import (
    Checkpoint,
    Match,
    claimed_output,
    describe,
    finish,
    finished,
    match_weights,
    open_expert,
    partial_path,
    refuse_both,
    refuse_exchanged,
    refuse_other,
    resumable_folder,
    warn_of_other_rotations,
    with_full_path,
)
from ..choices import DEFAULT_MODULES, MAX_RANK, MODULES, MOST_LAYERS, RANK
from ..warn import first_line, warn
from .delta import LEAST_COSINE, refuse_unrelated, take_delta
from .file import FORMAT, write_prior
from .prior import ReasoningPrior
from .reading import Weights
from .same import difference

PARTS = 2  # counts up when what is kept of a weight, or how it is taken, changes: no build goes on from older parts


@typed
def build_prior(
    expert: str | Path,
    base: str | Path,
    output: str | Path,
    rank: int | None = None,
    energy: float | None = None,
    max_rank: int | None = None,
    reference: str | Path | None = None,
    modules: str | Sequence[str] = DEFAULT_MODULES,
    only_layers: Sequence[int] | None = None,
    skip_first: int = 0,
    dequantize: bool = False,
    delete_shards: bool = False,
    seed: int = 0,
    device: str | int | torch.device | None = None,
    force: bool = False,
    overwrite: bool = False,
    exist_ok: bool = False,
    progress: bool = True,
) -> ReasoningPrior:
    """Take Δ between a text-only expert and the language model of a VLM, and write it as a low-rank prior.

    Δ = W_expert − W_base of each weight W [out, in] (DRIFT, arXiv 2510.15050, equation 2), or W_expert − W_reference
    (table 10), as U diag(S) Vh with U [out, k], S [k], Vh [k, in], decomposed in fp32.

    A build that was interrupted or killed leaves `<output>.partial/`. The same call goes on from there and ends in the
    same bytes as an uninterrupted one; a call with other settings is refused until that folder is gone.

    Args:
        expert: text LLM that reasons, or a LoRA adapter on one; folder, hub id or `id@revision`, as all models here.
        base: the VLM, in full precision.
        output: file to write, such as prior.safetensors.
        rank: ceiling of the rank, at least 1, 64 if not given; each weight gets k = min(rank, out, in).
        energy: instead of a rank, the captured energy ΣS²/‖Δ‖² to reach, between 0 and 1: each weight gets the smallest
            rank that does.
        max_rank: ceiling of the rank with `energy`, 256 if not given.
        reference: the model that the expert was trained from, if that is not the base (hierarchical prior).
        modules: which weights: "attn", "mlp" (projections, low-rank), "norm", "bias" (vectors, kept whole; a bias only
            where all models have it), "head", "embed" (low-rank; only the rows of tokens that all tokenizers have, the
            others are zero).
        only_layers: these layers alone, in the text model's count.
        skip_first: not the first so many layers.
        dequantize: accept models that are 4-bit on disk, at the precision that is left.
        delete_shards: free each shard of the expert that this build has downloaded as soon as it is used up.
        seed: of the randomized SVD. Same inputs, seed, device and thread count give the same bytes.
        device: where the arithmetic runs; a GPU if there is one.
        force: build even where a matrix of the expert has nothing in common with the base's, or with the reference's.
        overwrite: replace an existing output, and throw away what an interrupted build with other settings has left.
        exist_ok: take an existing output that was built of the same models with the same settings; any other is
            refused. At once if all models are on the hub; else Δ is taken again, without its SVD.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: an argument is out of range, a model cannot be used as it is, weights do not match or are not
            finite, the expert has nothing in common with base or reference (see `force`), two are the same model, or
            one was written to meanwhile. Of such a build nothing is kept.
        OSError: a checkpoint is not found, the output exists or cannot be written, another process writes it, it holds
            another build's work, or the device has no room.

    Example:
        >>> prior = build_prior(expert=EXPERT, base=VLM, output="prior.safetensors", rank=8, progress=False)
        >>> prior
        ReasoningPrior('prior.safetensors', 28 weights, rank 8)
        >>> weight = prior["layers.0.self_attn.q_proj.weight"]
        >>> weight.U.shape, weight.S.shape, weight.Vh.shape
        (torch.Size([128, 8]), torch.Size([8]), torch.Size([8, 128]))
    """
    settings = _check_ranks(rank, energy, max_rank)
    settings |= {"modules": _check_modules(modules), "only_layers": _check_layers(only_layers, skip_first)}
    settings |= {"skip_first": skip_first, "seed": seed}
    device = _check_device(device)
    output = Path(output)
    refuse_both(exist_ok, overwrite)
    with claimed_output(output, overwrite or exist_ok, example="prior.safetensors"):
        # Also frees what a killed build has downloaded. 4-bit weights are looked into before there is this folder.
        record = partial_path(output) / "downloads.json" if delete_shards and not dequantize else None
        sources = {"expert": open_expert(expert, dequantize=dequantize, record=record)}
        sources["base"] = Checkpoint(base, dequantize=dequantize)
        if reference is not None:
            sources["reference"] = open_expert(reference, dequantize=dequantize)
        if not force:
            refuse_exchanged(sources["expert"], sources["base"])
        match = match_weights(sources, settings["modules"], settings["only_layers"], skip_first)
        if exist_ok and output.exists():
            prior = ReasoningPrior.load(output)
            try:
                refuse_other(output, difference(prior, sources, match, settings, force, delete_shards))
            finally:
                for file in sources["expert"].files if delete_shards else ():
                    sources["expert"].release(file)
            return prior
        if match.without_counterpart:
            unsteered = describe(match.without_counterpart, match.shares)
            warn(f"not steered, without a counterpart or a preset that names them: {unsteered}")
        warn_of_other_rotations(sources)

        inputs = {role: with_full_path(source.origin) for role, source in sources.items()}
        inputs |= {f"files of the {role}": source.identity for role, source in sources.items()}
        machine = {"device": device.type, "threads": torch.get_num_threads(), "torch": torch.__version__}
        everything = {**inputs, **settings, "dequantize": dequantize, **machine, "format": FORMAT}
        everything["version of the parts"] = PARTS
        with resumable_folder(output, everything, afresh=overwrite, final=(ValueError,)) as folder:
            files = {name: folder / f"{name}.safetensors" for name in match.keys}
            for name, file in files.items() if not force else ():  # what a build with `force` has left
                _refuse_unrelated(name, finished(file) or {}, sources)
            _take_deltas(sources, match, files, settings, device, force, delete_shards, progress)
            for source in sources.values():
                source.refuse_changed()
            weights = {name: finished(file) for name, file in files.items()}
            steered = {name: stats for name, stats in weights.items() if stats["delta_norm"] > 0}
            if steered:
                metadata = {"format": FORMAT, "dtype": "bfloat16", "reference": None, **settings}
                metadata |= {role: source.origin for role, source in sources.items()}
                cosines = [c for stats in steered.values() for c in stats.pop("cosines").values() if "rank" in stats]
                metadata |= {"force": True} if any(abs(cosine) < LEAST_COSINE for cosine in cosines) else {}
                metadata |= {"without_counterpart": match.without_counterpart, "weights": steered}
                metadata["not_steered"] = [name for name in weights if name not in steered]
                # No variable for the mapped tensors: Windows deletes no file that is still mapped.
                write_prior(folder, output, {k: t for n in steered for k, t in load_file(files[n]).items()}, metadata)
        if not steered:
            models = f"{expert} and {reference or base}"
            raise ValueError(
                f"Δ is zero in all {len(weights)} weights that were asked for: {models} are the same there, so choose "
                "other modules or layers, or another expert"
            )
        return ReasoningPrior.load(output)


def _check_ranks(rank: int | None, energy: float | None, max_rank: int | None) -> dict:
    """As the header says it: `rank` is the ceiling in any case."""
    check_whole(**{name: k for name, k in (("rank", rank), ("max_rank", max_rank)) if k is not None})
    if energy is None:
        if max_rank is not None:
            raise ValueError(f"max_rank={max_rank} goes with energy: without it, rank is the ceiling")
        return {"rank": rank or RANK, "energy": None, "max_rank": None}
    if rank is not None:
        raise ValueError(f"give rank={rank} or energy={energy}, not both: with energy, max_rank is the ceiling")
    if not 0 < energy < 1:
        raise ValueError(f"energy must be a number between 0 and 1, got {energy!r}")
    return {"rank": max_rank or MAX_RANK, "energy": energy, "max_rank": max_rank or MAX_RANK}


def _check_modules(modules: str | Sequence[str]) -> list[str]:
    """The presets in a fixed order."""
    modules = (modules,) if isinstance(modules, str) else tuple(modules)
    if unknown := [module for module in modules if module not in MODULES]:
        raise ValueError(f"modules={unknown[0]!r} is unknown: choose from {', '.join(MODULES)}")
    if not modules:
        raise ValueError(f"modules is empty: choose from {', '.join(MODULES)}")
    return [module for module in MODULES if module in modules]


def _check_layers(only_layers: Sequence[int] | None, skip_first: int) -> list[int] | None:
    """The layers in order; whether the base has them is not known yet."""
    if only_layers is not None and not len(only_layers):
        raise ValueError("only_layers is empty: leave it out for all layers")
    if only_layers is not None and len(only_layers) > MOST_LAYERS:
        raise ValueError(f"only_layers names {len(only_layers)} layers, and no model has more than {MOST_LAYERS}")
    check_whole(0, skip_first=skip_first)
    for layer in only_layers or ():
        check_whole(0, **{"each of only_layers": layer})
    return None if only_layers is None else sorted(set(only_layers))


def _check_device(device: str | int | torch.device | None) -> torch.device:
    wanted = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
    try:
        found = torch.empty(0, device=wanted).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device} is not available: {first_line(error)}") from error
    if found.type == "meta":
        raise ValueError(f"device {device} computes nothing: name one that does, such as cpu")
    return found


def _take_deltas(
    sources: dict[str, Checkpoint],
    match: Match,
    files: dict[str, Path],
    settings: dict,
    device: torch.device,
    force: bool,
    delete_shards: bool,
    progress: bool,
) -> None:
    """Write Δ of each weight that is not done yet into its file."""
    names = [name for name, file in files.items() if finished(file) is None]
    counted = {"total": len(files), "initial": len(files) - len(names)}
    weights = Weights(sources, match, names, device, delete_shards)
    bar = tqdm(weights, "prior", unit="weight", disable=not progress, **counted)
    with _with_room(device), weights, bar:
        for name, tensors in bar:
            bar.set_postfix_str(name, refresh=False)
            labels = {role: f"{key} of {sources[role].source}" for role, key in match.keys[name].items()}
            # Each weight has a seed of its own, so that it does not depend on which other weights are selected.
            seed = int.from_bytes(hashlib.sha256(f"{settings['seed']} {name}".encode()).digest()[:7], "big")
            rows = match.rows_of(name, tensors)
            factors, stats = take_delta(tensors, rows, settings["rank"], settings["energy"], seed, labels)
            if not force:
                _refuse_unrelated(name, stats, sources)
            finish(files[name], {f"{name}.{key}": factor for key, factor in factors.items()}, stats)


@contextlib.contextmanager
def _with_room(device: torch.device) -> Iterator[None]:
    """An OSError says what to do where a GPU has no room: unlike a ValueError, it leaves what is done to go on from."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OSError(
            f"the device {device} has no room for a weight of each model and their Δ: free it and go on with the same "
            'call, or begin anew on the CPU, with device="cpu" (--device cpu) and overwrite=True (--overwrite)'
        ) from error


def _refuse_unrelated(name: str, stats: dict, sources: dict[str, Checkpoint]) -> None:
    """ValueError if this is a matrix of the expert that has nothing in common with that of another model."""
    for role, cosine in stats["cosines"].items() if "rank" in stats else ():
        refuse_unrelated(name, cosine, sources["expert"].source, sources[role].source)
