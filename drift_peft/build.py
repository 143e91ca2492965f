"""Two checkpoints -> prior file, one weight at a time.

Δ = W_expert − W_base (DRIFT, arXiv 2510.15050, equation 2), or W_expert − W_reference where the expert was trained from
another model (table 10). Names, shapes and configurations are checked for all weights before the first one is read, and
only one Δ exists at any time.
"""

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from tqdm.auto import tqdm

from .checkpoint import Checkpoint
from .naming import cross_attention_layers, layer_order, module_kind
from .prior import FORMAT, ReasoningPrior, partial_output, write_prior, write_tensors
from .svd import frobenius_norm, truncated_svd

MODULES = ("attn", "mlp")
NOT_YET = ("bias", "norm", "head", "embed")
SAME_IN_BOTH = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
LEAST_COSINE = 0.1  # weights of one ancestor have a cosine near 1; unrelated or shifted ones near 0
FINGERPRINT = 8  # how many singular directions recognize the base
LISTED = 20  # mismatches that an error spells out


def build_prior(
    expert: str | Path,
    base: str | Path,
    output: str | Path,
    rank: int = 64,
    reference: str | Path | None = None,
    modules: Sequence[str] = MODULES,
    seed: int = 0,
    device: str | torch.device | None = None,
    force: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> ReasoningPrior:
    """Take Δ between a text-only expert and the language model of a VLM, and write it as a low-rank prior.

    Args:
        expert: text LLM that reasons; folder, hub id or `id@revision`, as all checkpoints here.
        base: the VLM, in full precision.
        output: file to write, such as prior.safetensors.
        rank: ceiling of the rank, at least 1; each weight gets k = min(rank, out, in).
        reference: the model that the expert was trained from, if that is not the base (hierarchical prior).
        modules: which projections: "attn", "mlp".
        seed: of the randomized SVD. Same inputs, seed, device and thread count give the same bytes.
        device: where the SVD runs; a GPU if there is one.
        force: build even where a weight of the expert has nothing in common with the base's.
        overwrite: replace an existing output.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: an argument is out of range, a checkpoint is no full-precision model, weights do not match or are
            not finite, the expert has nothing in common with the base (see `force`), or the two are the same model.
        OSError: a checkpoint is not found, or the output exists or cannot be written. Nothing is left behind.
    """
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"rank must be an integer of at least 1, got {rank!r}")
    if not isinstance(seed, int):
        raise ValueError(f"seed must be an integer, got {seed!r}")
    modules = _check_modules(modules)
    device = _check_device(device)

    with partial_output(output, overwrite) as folder:
        sources = {"expert": Checkpoint(expert), "base": Checkpoint(base)}
        if reference is not None:
            sources["reference"] = Checkpoint(reference)
        names = match_weights(sources, modules)
        _warn_of_rope(sources)

        weights, not_steered, files = {}, [], []
        with tqdm(names, desc="prior", unit="weight", disable=not progress) as bar:
            for index, name in enumerate(bar):
                bar.set_postfix_str(name)
                factors, stats = _take_delta(name, sources, rank, seed, device, force)
                if stats["delta_norm"] == 0:
                    not_steered.append(name)
                    continue
                weights[name] = stats
                # To disk at once: mapped back below, the factors do not add up in memory.
                files.append(folder / f"{index}.safetensors")
                write_tensors(files[-1], {f"{name}.{key}": value for key, value in factors.items()})
        if not weights:
            raise ValueError(
                f"Δ is zero in all {len(names)} weights: {expert} and {reference or base} are the same model"
            )

        origins = {role: {"id": s.source, "revision": s.revision} for role, s in sources.items()}
        metadata = {"format": FORMAT, "reference": None, **origins, "rank": rank, "seed": seed, "dtype": "bfloat16"}
        metadata |= {"modules": list(modules), "not_steered": not_steered, "weights": weights}
        # No variable for the mapped tensors: Windows deletes no file that is still mapped.
        write_prior(folder, output, {k: t for file in files for k, t in load_file(file).items()}, metadata)
    return ReasoningPrior.load(output)


def _check_modules(modules: Sequence[str]) -> tuple[str, ...]:
    """The presets in a fixed order. ValueError for one that is unknown or not available yet."""
    modules = (modules,) if isinstance(modules, str) else tuple(modules)
    for module in modules:
        if module in NOT_YET:
            raise ValueError(f"modules={module!r} is not available yet: choose from {', '.join(MODULES)}")
        if module not in MODULES:
            raise ValueError(f"modules={module!r} is unknown: choose from {', '.join(MODULES)}")
    if not modules:
        raise ValueError(f"modules is empty: choose from {', '.join(MODULES)}")
    return tuple(module for module in MODULES if module in modules)


def _check_device(device: str | torch.device | None) -> torch.device:
    try:
        return torch.empty(0, device=device or ("cuda" if torch.cuda.is_available() else "cpu")).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device} is not available: {str(error).splitlines()[0]}") from error


def match_weights(sources: dict[str, Checkpoint], modules: Sequence[str]) -> list[str]:
    """Canonical names of the selected weights, in layer order; each one exists once in all sources, in one shape.

    Raises:
        ValueError: one error that lists everything that is missing, misshaped or claimed twice.
    """
    base = sources["base"]
    for role, other in sources.items():
        differing = [f"{key} {a} and {b}" for key, a, b in _dimensions(other, base) if a != b]
        if differing:
            raise ValueError(f"{role} {other.source} and base {base.source} differ in {', '.join(differing)}")

    expected = set()
    for source in sources.values():
        expected |= _configured(source) | {name for name in source.claims}
    expected = {name for name in expected if module_kind(name) in modules}
    if not expected:
        raise ValueError(f"{base.source} has no weight of {', '.join(modules)} in its language model")

    problems = []
    for name in sorted(expected, key=layer_order):
        shapes = {}
        for role, source in sources.items():
            keys = source.claims.get(name, [])
            if len(keys) == 1:
                shapes[role] = source.shape(keys[0])
            else:
                problems.append(f"{name} {'claimed by ' + ' and '.join(keys) if keys else 'missing'} in the {role}")
        if len(set(shapes.values())) > 1 or any(len(shape) != 2 for shape in shapes.values()):
            problems.append(f"{name} is {', '.join(f'{list(shape)} in the {role}' for role, shape in shapes.items())}")
    if problems:
        models = " and ".join(source.source for source in sources.values())
        more = f"; and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        raise ValueError(f"{models} do not match in {len(problems)} places: {'; '.join(problems[:LISTED])}{more}")
    return sorted(expected, key=layer_order)


def _warn_of_rope(sources: dict[str, Checkpoint]) -> None:
    """Δ of q and k then also carries the change of the rotary base, which no low rank can tell apart."""
    base = sources["base"]
    for role, other in sources.items():
        if (theirs := _rope_theta(other.text_config)) != (ours := _rope_theta(base.text_config)):
            warnings.warn(
                f"rope theta is {theirs} in the {role} and {ours} in the base: Δ of q_proj and k_proj carries this too",
                stacklevel=3,
            )


def _take_delta(
    name: str, sources: dict[str, Checkpoint], rank: int, seed: int, device: torch.device, force: bool
) -> tuple[dict[str, torch.Tensor], dict]:
    """Factors of one Δ, and its statistics as they stand in the header. No factors if Δ is zero."""
    W_base = _read(sources["base"], name).to(device, torch.float32)
    delta = _read(sources["expert"], name).to(device, torch.float32, copy=True)  # subtracted from in place below
    base_norm, expert_norm = frobenius_norm(W_base), frobenius_norm(delta)
    inner = float(torch.linalg.vecdot(delta, W_base).cpu().double().sum())
    cosine = inner / (expert_norm * base_norm) if inner else 0.0
    delta -= _read(sources["reference"], name).to(device) if "reference" in sources else W_base
    delta_norm = frobenius_norm(delta)
    stats = {"shape": list(delta.shape), "delta_norm": delta_norm, "base_norm": base_norm, "cosine": cosine}
    if delta_norm == 0:
        return {}, stats
    if abs(cosine) < LEAST_COSINE and not force:
        raise ValueError(
            f"{name} of {sources['expert'].source} has cosine {cosine:.3f} with that of {sources['base'].source}: no "
            "common ancestor, or shifted layers; force=True (--force) builds the prior nevertheless"
        )

    # Each weight has a seed of its own, so that it does not depend on which other weights are selected.
    weight_seed = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "big")
    U, S, Vh, energy = truncated_svd(delta, rank, seed=weight_seed)
    factors = {"U": U.bfloat16().cpu(), "S": S.cpu(), "Vh": Vh.bfloat16().cpu()}
    # u_iᵀ W v_i of the factors as stored: whoever checks it has no others.
    u, v = factors["U"][:, :FINGERPRINT].to(W_base), factors["Vh"][:FINGERPRINT].to(W_base)
    fingerprint = torch.linalg.vecdot(u.T @ W_base, v).tolist()
    return factors, {**stats, "rank": len(S), "energy": energy, "fingerprint": fingerprint}


def _read(source: Checkpoint, name: str) -> torch.Tensor:
    tensor = source.tensor(source.claims[name][0])
    if not tensor.isfinite().all():
        raise ValueError(f"{source.claims[name][0]} of {source.source} holds NaN or infinite values")
    return tensor


def _depth(config) -> int:
    return config.num_hidden_layers - len(cross_attention_layers(config))


def _dimensions(one: Checkpoint, other: Checkpoint):
    yield "number of layers", _depth(one.text_config), _depth(other.text_config)
    for key in SAME_IN_BOTH:
        values = getattr(one.text_config, key, None), getattr(other.text_config, key, None)
        if None not in values:
            yield key, *values


def _configured(source: Checkpoint) -> set[str]:
    """The projections that the configuration calls for: no attention in linear layers, no plain MLP beside experts."""
    config = source.text_config
    kinds = getattr(config, "layer_types", None) or []
    experts = any(getattr(config, key, None) for key in ("num_experts", "num_local_experts", "n_routed_experts"))
    names = set()
    for index in range(_depth(config)):
        if len(kinds) <= index or ("attention" in kinds[index] and "linear" not in kinds[index]):
            names |= {f"layers.{index}.self_attn.{p}_proj.weight" for p in "qkvo"}
        if not experts:
            names |= {f"layers.{index}.mlp.{p}_proj.weight" for p in ("gate", "up", "down")}
    return names


def _rope_theta(config):
    parameters = getattr(config, "rope_parameters", None) or {}
    if "rope_theta" in parameters:
        return parameters["rope_theta"]
    nested = {kind: p["rope_theta"] for kind, p in parameters.items() if isinstance(p, dict) and "rope_theta" in p}
    return nested or getattr(config, "rope_theta", None)
