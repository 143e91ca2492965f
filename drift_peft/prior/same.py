"""Is an existing prior what this build would make? Asked without decomposing anything."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ..checkpoints import Checkpoint, Match
from .delta import measure_delta
from .file import MEASURED, PriorFile

SAMPLED = 3  # weights whose Δ is measured again
TOLERANCE = 1e-4  # of a norm, between devices and numbers of threads


def refuse_other(prior: PriorFile, output: Path, sources: dict[str, Checkpoint], match: Match, settings: dict) -> None:
    """Refuse a prior that was built with other settings or of other models than these.

    Models are told apart by Δ itself, measured again on a few weights: a folder may have another place today.

    Raises:
        FileExistsError: the first thing that differs.
    """
    header, way_out = prior.metadata, "name another output, or pass overwrite=True (--overwrite)"
    if "parents" in header:
        raise FileExistsError(f"output {output} exists and was combined from other priors: {way_out}")
    if "gated" in header:
        raise FileExistsError(f"output {output} exists and was gated: {way_out}")
    for key, wanted in settings.items():
        if (had := header.get(key)) != wanted:
            raise FileExistsError(f"output {output} exists and was built with {key}={had}, not {wanted}: {way_out}")
    if (header.get("reference") is None) != ("reference" not in sources):
        raise FileExistsError(f"output {output} exists, and only one of the two builds has a reference: {way_out}")
    held = {*prior, *header["not_steered"]}
    if held != match.keys.keys():
        other = min(held ^ match.keys.keys())
        raise FileExistsError(f"output {output} exists and differs from this build in {other}: {way_out}")
    names = sorted(prior, key=lambda name: hashlib.sha256(name.encode()).digest())[:SAMPLED]
    for name in names:
        tensors = {role: source.tensor(match.keys[name][role]) for role, source in sources.items()}
        found = measure_delta(tensors, match.rows_of(name, tensors))
        had = header["weights"][name]
        if any(abs(found[key] - had[key]) > TOLERANCE * max(1, abs(had[key])) for key in MEASURED):
            models = " and ".join(source.source for source in sources.values())
            raise FileExistsError(f"output {output} exists and was built of other models than {models}: {way_out}")
