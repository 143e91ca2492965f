"""Is an existing prior what this build would make? Asked without decomposing anything."""

from __future__ import annotations

from ..checkpoints import Checkpoint, Match, sampled
from .delta import measure_delta
from .file import MEASURED, PriorFile

SAMPLED = 3  # weights whose Δ is measured again
TOLERANCE = 1e-4  # of a norm, between devices and numbers of threads


def difference(prior: PriorFile, sources: dict[str, Checkpoint], match: Match, settings: dict) -> str | None:
    """The first thing in which a prior differs from what is built with these settings of these models, in words for
    `refuse_other`; None if there is none.

    Models are told apart by Δ itself, measured again on a few weights: a folder may have another place today.
    """
    header = prior.metadata
    if "parents" in header:
        return "was combined from other priors"
    if "gated" in header:
        return "was gated"
    for key, wanted in settings.items():
        if (had := header.get(key)) != wanted:
            return f"was built with {key}={had}, not {wanted}"
    if (had := header["reference"] is not None) != ("reference" in sources):
        return f"was built {'with' if had else 'without'} a reference, unlike this one"
    held = {*prior, *header["not_steered"]}
    if held != match.keys.keys():
        return f"differs from this build in {min(held ^ match.keys.keys())}"
    for name in sampled(prior, SAMPLED):
        tensors = {role: source.tensor(match.keys[name][role]) for role, source in sources.items()}
        found = measure_delta(tensors, match.rows_of(name, tensors))
        had = header["weights"][name]
        if any(abs(found[key] - had[key]) > TOLERANCE * max(1, abs(had[key])) for key in MEASURED):
            models = " and ".join(source.source for source in sources.values())
            return f"was built of other models than {models}"
    return None
