"""A prior for others: a hub repository with its model card, or a plain LoRA adapter."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData

from ..arguments import is_number
from ..checkpoints import (
    PROJECTIONS,
    TASK,
    Checkpoint,
    as_peft_reads,
    at_revision,
    gathered,
    in_markdown,
    language_model_targets,
    module_kind,
    named,
    pinned,
    replaced_when_complete,
    repository_of,
    shown,
    state_licences,
    write_adapter,
)
from ..warn import warn
from .combine import formula
from .delta import fingerprint_of
from .file import FILE_NAME, FINGERPRINT_TOLERANCE, ROUNDING_TOLERANCE, PriorFile
from .header import cosine_of
from .report import prior_summary

PROBED = 3  # weights that tell another base
CARD = """\
---
{data}
---

# Reasoning prior for {base}

Δ = {formula} of the language model's weights, as truncated SVDs of rank {rank} at most:
what a text-only reasoning model has beyond the language model of {base}. It steers LoRA fine-tuning of {base} toward
that reasoning (DRIFT, [arXiv 2510.15050](https://arxiv.org/abs/2510.15050)).

## What it holds

| modules | weights | captured energy | ‖Δ‖/‖W‖ | lowest cosine |
|---|---|---|---|---|
{table}

Captured energy is ΣS²/‖Δ‖²; the cosine is that of {cosine_of}. SHA-256 of the file: `{sha256}`.

## Use

```python
from peft import get_peft_model
from drift_peft import DriftConfig, ReasoningPrior

prior = ReasoningPrior.load("{source}")  # to look inside; a DriftConfig needs the name alone
model = get_peft_model(vlm, DriftConfig(prior="{source}", r=16, lora_alpha=32, task_type="CAUSAL_LM"))
```

where `vlm` is {base}, in full precision or 4 bit. A prior is no model: what is trained with it is loaded and served as
any LoRA adapter. `drift-peft prior export {source} --scale 0.5 -o adapter` makes one of the prior itself, to compare
with.

The prior was made with

```python
{recipe}
```

## Licences

The weights here are differences of other models' weights. Their cards give these licences:

{licences}
"""


# The hub


def model_card(prior: PriorFile, repo_id: str | None = None, token: str | None = None) -> ModelCard:
    """What a prior is, how to use it, and the licences of the models it was made from, as their own cards give them.

    Args:
        repo_id: where the prior will be found, maybe `id@revision`; without it the card says prior.safetensors.
        token: for the cards of private or gated models.
    """
    header = prior.metadata
    origins = origins_of(header)
    license, licences = state_licences(origins, token)
    models = [repository[0] for _, origin in origins if (repository := repository_of(origin))]
    data = ModelCardData(
        base_model=list(dict.fromkeys(models)) or None,
        pipeline_tag=TASK,
        tags=["drift-peft", "peft"],
        **license,
    )
    content = CARD.format(
        data=data.to_yaml(),
        base=in_markdown(named(header["base"])),
        formula=in_markdown(formula(header)),
        rank=prior.rank,
        table=_table(prior),
        cosine_of=cosine_of(header),
        sha256=prior.sha256,
        source=repo_id or FILE_NAME,
        recipe=_recipe(header),
        licences=licences,
    )
    return ModelCard(content)


def origins_of(header: dict) -> list[tuple[str, dict]]:
    """(role, id and revision) of the models that a prior was made from, each once."""
    own = [(role, header[role]) for role in ("base", "expert", "reference") if header.get(role)]
    adapted = [(f"{role}'s base", origin["base"]) for role, origin in own if "base" in origin]  # the expert is a LoRA
    inherited = [origin for parent in header.get("parents", ()) for origin in origins_of(parent)]
    once = {(role, origin["id"], origin["revision"]): origin for role, origin in own + adapted + inherited}
    return [(role, origin) for (role, *_), origin in once.items()]


def _table(prior: PriorFile) -> str:
    """Rows of the card's table: a module kind's weights taken together, and all."""
    summary = prior_summary(prior)
    rows = []
    for row in [*summary["kinds"], {"modules": "all", **summary["total"]}]:
        relative = "–" if row["relative_norm"] is None else f"{row['relative_norm']:.3f}"
        rows.append(f"| {row['modules']} | {row['weights']} | {row['energy']:.1%} | {relative} | {row['cosine']:.3f} |")
    return "\n".join(rows)


def _recipe(header: dict) -> str:
    """The call that makes such a prior again."""
    if "gated" in header:
        return _gate_recipe(header)
    if "parents" in header:
        parts = (f"    (ReasoningPrior.load(…), {p['weight']:g}),  # sha256 {p['sha256']}" for p in header["parents"])
        return "\n".join(["ReasoningPrior.combine([", *parts, f'], "{FILE_NAME}", rank={header["rank"]})'])
    roles = [role for role in ("expert", "base", "reference") if header[role]]
    given = {role: pinned(header[role]) for role in roles}
    ranks = ("energy", "max_rank") if header.get("energy") else ("rank",)
    settings = (key for key in (*ranks, "modules", "only_layers", "skip_first", "seed") if header.get(key))
    given |= {"output": FILE_NAME, **{key: header[key] for key in settings}}
    lines = [f"    {key}={json.dumps(value)}," for key, value in given.items()]
    lines += ["    dequantize=True,"] if any("dequantize" in origin for _, origin in origins_of(header)) else []
    lines += ["    force=True,"] if header.get("force") else []
    return "\n".join(["build_prior(", *lines, ")"])


def _gate_recipe(header: dict) -> str:
    """The calls that make the prior that was gated, and gate it."""
    gated, settings = header["gated"], ("objective", "keep_weight", "alpha", "steps", "rate", "batch_size", "seed")
    base = gated["base"]  # in memory, a hub id may have no revision
    expert = json.dumps(pinned(gated["expert"])) if "expert" in gated else None
    lines = [
        "gate_prior(",
        f'    "{FILE_NAME}",  # sha256 {gated["prior"]}',
        f"    base={json.dumps(at_revision(shown(base['id']), base['revision']))},",
        f"    expert={expert},",
        f"    keep_set=…,  # sha256 {gated['keep_set']}",
        f"    texts={'…' if expert else None},",
        '    output="gated.safetensors",',
        *(f"    {key}={json.dumps(gated[key])}," for key in settings if key in gated),
        *(["    load_in_4bit=True,"] if gated.get("load_in_4bit") else []),
        ")",
    ]
    return "\n".join([_recipe({key: value for key, value in header.items() if key != "gated"}), *lines])


# Stock PEFT


@torch.no_grad()
def export_lora(prior: PriorFile, scale: float, output: str | Path, base: str | Path | None, overwrite: bool) -> Path:
    """`ReasoningPrior.as_lora`."""
    if not is_number(scale) or scale == 0:
        raise ValueError(f"scale must be a finite number other than 0, got {scale!r}")
    with replaced_when_complete(Path(output), overwrite, sources=(prior.path,), kind="adapter") as folder:
        origin = prior.metadata["base"]
        source, revision = (base, None) if base else (origin["id"], origin["revision"])
        try:
            if not Path(source).exists() and not base and repository_of(origin) is None:  # which is no hub id
                raise FileNotFoundError(f"{prior.source} was built for the folder {source}, which is not there")
            checkpoint = Checkpoint(source, revision, dequantize=True)  # compared at most, so 4 bit will do
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}; name the place of the prior's base with base= (--base)") from error
        targets, modules = _in_memory(prior, checkpoint)
        probed = [checkpoint.language_model[name] for name, *_ in islice(prior.probes(), PROBED)]
        if all(file.exists() for raw in probed for file in checkpoint.files_of(raw)):
            _refuse_other_weights(prior, checkpoint)
        elif repository_of(origin) != repository_of(checkpoint.origin):  # whose weights are not fetched for this
            warn(
                f"{prior.source} was built for {pinned(origin)}. Whether {pinned(checkpoint.origin)} has the same "
                "weights was not compared, since they are on the hub: name a folder as base= (--base) to have them "
                "compared."
            )

        def factors() -> Iterator[dict[str, torch.Tensor]]:
            for name, module in modules.items():
                weight = prior[name]
                root = (abs(scale) * weight.S).sqrt()
                A, B = root[:, None] * weight.Vh.float(), math.copysign(1, scale) * weight.U.float() * root
                if not all(factor.isfinite().all() for factor in (A, B)):
                    raise ValueError(f"scale={scale} makes {name} larger than fp32 can hold: choose a smaller one")
                # B·A = scale·U diag(S) Vh
                yield {f"base_model.model.{module}.lora_{key}.weight": t for key, t in (("A", A), ("B", B))}

        ranks = {module: prior.metadata["weights"][name]["rank"] for name, module in modules.items()}
        (r, _), *_ = Counter(ranks.values()).most_common(1)
        pattern = {module: rank for module, rank in ranks.items() if rank != r}
        lora = {"r": r, "lora_alpha": r, "rank_pattern": pattern, "alpha_pattern": pattern, "target_modules": targets}
        with gathered(folder, factors()) as tensors:
            prior.refuse_changed()
            write_adapter(folder, checkpoint, tensors, untrained=True, **lora)
    if left := sum(module_kind(name) not in PROJECTIONS for name in prior):
        warn(
            f"{left} of the prior's {len(prior)} weights are norms, biases, head or embedding: a LoRA adapter of "
            f"projections cannot hold them, so {output} leaves them out."
        )
    return Path(output)


def _refuse_other_weights(prior: PriorFile, checkpoint: Checkpoint) -> None:
    """ValueError if the prior's fingerprint, u_iᵀ·W·v_i, is far from that of the base's first weights, and a warning
    where it is off by more than rounding and nothing is in 4 bits."""
    fingerprints, known = [], []
    for name, U, Vh, stored in islice(prior.probes(), PROBED):
        fingerprints.append(fingerprint_of(checkpoint.tensor(checkpoint.language_model[name]), U, Vh))
        known.append(stored)
    here, stored = torch.cat(fingerprints), torch.cat(known)
    off = (here - stored).norm() / stored.norm()
    if off > FINGERPRINT_TOLERANCE:
        raise ValueError(
            f"{prior.source} was built for another model than {checkpoint.source}: its fingerprint is off by "
            f"{off:.0%}; name the place of {named(prior.metadata['base'])} as base= (--base)"
        )
    if off > ROUNDING_TOLERANCE and not any("dequantize" in o for o in (checkpoint.origin, prior.metadata["base"])):
        warn(
            f"{prior.source} was built for {pinned(prior.metadata['base'])}, and the weights of "
            f"{pinned(checkpoint.origin)} are nearly but not quite the same: its fingerprint is off by {off:.0%}."
        )


def _in_memory(prior: PriorFile, checkpoint: Checkpoint) -> tuple[str | list[str], dict[str, str]]:
    """PEFT's `target_modules`, and projection of the prior that they hit -> its module's name in the loaded base."""
    projections = [name for name in prior if module_kind(name) in PROJECTIONS]
    if not projections:
        raise ValueError(f"{prior.source} holds no attention or MLP projection, so there is nothing for a LoRA adapter")
    model = checkpoint.model
    modules = checkpoint.decoder.projection_modules
    for name in projections:
        stored = prior.metadata["weights"][name]["shape"]
        here = list(model.get_submodule(modules[name]).weight.shape) if name in modules else "not there"
        if here != stored:
            raise ValueError(
                f"{prior.source} was built for another model than {checkpoint.source}: {name} is {stored} in the prior "
                f"and {here} in the model"
            )
    targets = language_model_targets(model, projections)
    hit = as_peft_reads(model, targets)
    return targets, {name: modules[name] for name in projections if modules[name] in hit}
