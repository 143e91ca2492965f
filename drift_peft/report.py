"""Tables of priors, targets and merges: what the command line prints, as rich tables or as JSON."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable

import torch
from rich.table import Table
from torch import nn

from .checkpoint import Checkpoint
from .naming import canonical_name, cross_attention_layers, language_model_targets, layer_order, module_kind
from .prior import ReasoningPrior


def prior_summary(prior: ReasoningPrior, rank: int | None = None) -> dict:
    """The header of a prior with its statistics per layer and module kind.

    Each row: `relative_norm` ‖Δ‖/‖W_base‖ and captured `energy` ΣS²/‖Δ‖² over the row's weights taken together, and the
    smallest `cosine` of W_expert and W_base among them. With `rank`, the energy of Δ truncated to it, which is what an
    adapter of this rank is steered by.

    Raises:
        ValueError: rank < 1.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    weights = prior.metadata["weights"]
    if rank is not None:
        kept = {name: prior[name].S[:rank].double().square().sum().item() for name in prior}
        weights = {name: {**w, "energy": kept[name] / w["delta_norm"] ** 2} for name, w in weights.items()}
    groups: dict[tuple[int, str], list[dict]] = defaultdict(list)
    for name in prior:
        groups[layer_order(name)[1], module_kind(name)].append(weights[name])
    rows = [{"layer": layer, "modules": kind, **_statistics(stats)} for (layer, kind), stats in sorted(groups.items())]
    header = {key: value for key, value in prior.metadata.items() if key != "weights"}
    header["rank"] = header["rank"] if rank is None else min(rank, header["rank"])
    return {**header, "sha256": prior.sha256, "rows": rows, "total": _statistics(weights.values())}


def _statistics(weights: Iterable[dict]) -> dict:
    weights = list(weights)
    delta, base = (math.fsum(w[key] ** 2 for w in weights) for key in ("delta_norm", "base_norm"))
    return {
        "weights": len(weights),
        "relative_norm": math.sqrt(delta / base),
        "cosine": min(w["cosine"] for w in weights),
        "energy": math.fsum(w["energy"] * w["delta_norm"] ** 2 for w in weights) / delta,
    }


def prior_table(summary: dict) -> Table:
    """`prior_summary` as a table, a line per layer and module kind."""
    origins = [summary[role] for role in ("expert", "base", "reference") if summary[role]]
    names = [origin["id"] + (f"@{origin['revision'][:8]}" if origin["revision"] else "") for origin in origins]
    title = f"Δ = {names[0]} − {names[-1]}, rank {summary['rank']}"
    caption = (
        f"{len(summary['not_steered'])} weights have Δ = 0 and are not steered" if summary["not_steered"] else None
    )
    table = Table("layer", "modules", "weights", "‖Δ‖/‖W‖", "cosine", "captured energy", title=title, caption=caption)
    for column in table.columns:
        column.justify = "right"
    for row in [*summary["rows"], {"layer": "all", "modules": "", **summary["total"]}]:
        values = f"{row['relative_norm']:.3f}", f"{row['cosine']:.3f}", f"{row['energy']:.1%}"
        if row["layer"] == "all":
            table.add_section()
        table.add_row(str(row["layer"]), row["modules"], str(row["weights"]), *values)
    return table


def targets_summary(checkpoint: Checkpoint, prior: ReasoningPrior | None = None) -> dict:
    """What `target_modules=None` adapts and steers on this model, from its config alone: no weight is loaded.

    Per module type (q_proj, …): how many modules are adapted, how many of them have a Δ in the prior (None without a
    prior), and how many modules of the same name outside the language model are left alone.

    Raises:
        ValueError: the model has no such module, or none that the prior covers.
    """
    with torch.device("meta"):
        model: nn.Module = checkpoint.auto_class.from_config(checkpoint.config)
    skipped = cross_attention_layers(checkpoint.config)
    targets = language_model_targets(model)
    if prior is not None:
        language_model_targets(model, prior)  # raises when the prior covers none of them
    rows: dict[str, dict] = {}
    modules = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    adapted = [name for name in modules if re.fullmatch(targets, name)]
    for name in adapted:
        kind = name.rpartition(".")[2]
        row = rows.setdefault(kind, {"module": kind, "adapted": 0, "steered": None if prior is None else 0, "left": 0})
        row["adapted"] += 1
        if prior is not None:
            row["steered"] += canonical_name(f"{name}.weight", skipped) in prior
    for name in set(modules) - set(adapted):
        if (kind := name.rpartition(".")[2]) in rows:
            rows[kind]["left"] += 1
    return {
        "model": checkpoint.source,
        "class": type(model).__name__,
        "target_modules": targets,
        "rows": [*rows.values()],
    }


def targets_table(summary: dict) -> Table:
    """`targets_summary` as a table."""
    title = f"LoRA targets of {summary['model']} ({summary['class']})"
    table = Table("module", "adapted", "steered", "left alone elsewhere", title=title)
    for row in summary["rows"]:
        steered = "no prior given" if row["steered"] is None else str(row["steered"])
        table.add_row(row["module"], str(row["adapted"]), steered, str(row["left"]))
    return table
