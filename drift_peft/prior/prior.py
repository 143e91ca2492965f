"""ReasoningPrior: the file of a prior with all that can be done with it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import ModelCard
from torch import Tensor

from ..arguments import check_type, check_whole, plain, typed
from ..checkpoints import gathered
from ..warn import warn
from .combine import (
    NOTHING,
    Weight,
    checked_parents,
    combined_header,
    combined_weights,
    gated_weights,
    truncated_weights,
)
from .file import FILE_NAME, PriorFile, partial_output, write_prior
from .report import prior_html, prior_summary
from .share import export_lora, model_card

Part = TypeVar("Part", bound="str | Path | ReasoningPrior")


class ReasoningPrior(PriorFile):
    """Canonical weight name -> PriorWeight, or PriorVector for a vector, read from the file on access.

    Make one with `load`, `build_prior` or `combine`.

    Attributes:
        path: the file.
        source: path or hub id as given to `load`.
        metadata: the header, as described at the top of `file`.

    Example:
        >>> prior = ReasoningPrior.load("prior.safetensors")
        >>> len(prior), prior.rank
        (28, 8)
        >>> round(prior["layers.0.mlp.up_proj.weight"].cosine, 2)  # of the weight in both models
        0.95
    """

    @classmethod
    def combine(
        cls,
        parts: Mapping[Part, float] | Iterable[tuple[Part, float]],
        output: str | Path,
        rank: int | None = None,
        overwrite: bool = False,
    ) -> ReasoningPrior:
        """Write Δ = Σ c_j Δ_j of several priors of one base, recompressed, as a new prior.

        The sum of what the parents hold is exact up to the rank. Its norm is an estimate, since what they did not
        capture is not known: these parts are taken as orthogonal to each other (see `combined_weights`). A weight that
        a parent lacks is zero there.

        Args:
            parts: prior (or its path or hub id) -> coefficient, or pairs of these. The coefficients of a prior that is
                named twice are added; one with 0 is left out.
            output: file to write.
            rank: ceiling of the rank; by default the largest in the parents.
            overwrite: replace an existing output.

        Raises:
            ValueError: the priors are of different bases, a coefficient is not finite, all are 0, or the sum is.
            OSError: a prior is not found, or the output exists, is one of the priors or cannot be written.

        Example:
            >>> both = ReasoningPrior.combine({"prior.safetensors": 0.7, "far.safetensors": 0.3}, "both.safetensors")
            >>> both.rank
            8
        """
        check_type("parts", parts, Mapping[Any, Any] | Iterable[tuple[Any, Any]])
        check_type("output", output, str | Path)
        check_type("overwrite", overwrite, bool)
        check_whole(**({} if rank is None else {"rank": rank}))
        pairs = [*(parts.items() if isinstance(parts, Mapping) else parts)]
        check_type("parts", pairs, list[tuple[Any, Any]])
        parents = checked_parents([(p if isinstance(p, cls) else cls.load(p), plain(c)) for p, c in pairs])
        rank = max(prior.rank for prior, _ in parents) if rank is None else rank
        files, header = [prior for prior, _ in parents], combined_header(parents, rank)
        return _write_weights(output, overwrite, files, combined_weights(parents, rank), header)

    @typed
    def truncate(self, rank: int, output: str | Path, overwrite: bool = False) -> ReasoningPrior:
        """Write the prior with min(rank, k) singular directions per weight as a new one. Vectors stay as they are.

        A gated prior becomes a combined one, of itself alone.

        Raises:
            ValueError: rank < 1.
            OSError: the output exists, is this prior or cannot be written.

        Example:
            >>> ReasoningPrior.load("prior.safetensors").truncate(4, "small.safetensors")
            ReasoningPrior('small.safetensors', 28 weights, rank 4)
        """
        check_whole(rank=rank)
        if rank >= self.rank:
            warn(f"rank={rank} cuts nothing: no weight of {self.source} has more than {self.rank} directions.")
        if "gated" in self.metadata:  # whose gates are those of all directions of the prior that it was made of
            return self.combine({self: 1.0}, output, rank, overwrite)
        header = {**self.metadata, "rank": min(rank, self.metadata["rank"] or self.rank)}
        if rank < self.rank:  # what is captured is no longer what `energy` asked for
            header |= {key: None for key in ("energy", "max_rank") if key in header}
        return _write_weights(output, overwrite, [self], truncated_weights(self, rank), header)

    @typed
    def as_lora(
        self, scale: float, output: str | Path, base: str | Path | None = None, overwrite: bool = False
    ) -> Path:
        """Write scale·U diag(S) Vh of the attention and MLP projections as a plain LoRA adapter for stock PEFT.

        That is task arithmetic without training: `PeftModel.from_pretrained(vlm, output)`. The scale is in the factors,
        and the LoRA scaling is 1. Norms, biases, head and embedding are left out, with a warning.

        Args:
            scale: how much of Δ to add; negative takes it away.
            output: folder to write.
            base: where the base's config is found now, if not where the prior was built.
            overwrite: replace an existing adapter folder.

        Raises:
            ValueError: the scale is 0 or not finite, the base is another model, or there is no projection in the prior.
            OSError: the base is not found, or the output exists or cannot be written.

        Example:
            >>> ReasoningPrior.load("prior.safetensors").as_lora(0.5, "half").name
            'half'
        """
        return export_lora(self, scale, output, base, overwrite)

    def model_card(self, repo_id: str | None = None, token: str | None = None) -> ModelCard:
        """What `push_to_hub` writes as README.md; looks the parents' licences up in their cards.

        Example:
            >>> ReasoningPrior.load("prior.safetensors").model_card("me/prior").data.pipeline_tag
            'image-text-to-text'
        """
        return model_card(self, repo_id, token)

    def _repr_html_(self) -> str:
        """In a notebook: how far apart the two models are, and what the prior holds."""
        return prior_html(prior_summary(self))

    @typed
    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the prior to another file, byte for byte the same. Raises what `partial_output` raises.

        Example:
            >>> ReasoningPrior.load("prior.safetensors").save("copy.safetensors")
        """
        with partial_output(path, overwrite) as folder:
            shutil.copyfile(self.path, folder / FILE_NAME)
            self.refuse_changed()
            os.replace(folder / FILE_NAME, path)


def write_gated(
    prior: PriorFile,
    gates: Mapping[str, Tensor],
    products: Mapping[str, Tensor],
    output: str | Path,
    origin: dict,
    overwrite: bool = False,
) -> ReasoningPrior:
    """Write U diag(g·S) Vh, each singular direction of a prior times its gate, as a new prior.

    Args:
        gates: canonical name of each weight -> g [k], in the order of its directions.
        products: likewise u_iᵀ·W_base·v_i [k].
        output: file to write.
        origin: where the gates came from, as JSON holds it: `gated` of the header, beside the hash of this prior.
        overwrite: replace an existing output.

    Raises:
        OSError: the output exists, is the prior or cannot be written.
    """
    header = {**prior.metadata, "gated": {"prior": prior.sha256, **origin}}
    header["not_steered"] = sorted({*prior, *prior.metadata["not_steered"]})
    nothing = "every gate has closed, so that the prior would steer nothing: train them at a smaller rate"
    return _write_weights(output, overwrite, [prior], gated_weights(prior, gates, products), header, nothing)


def _write_weights(
    output: str | Path,
    overwrite: bool,
    parents: Collection[PriorFile],
    weights: Iterable[Weight],
    header: dict,
    nothing: str = NOTHING,
) -> ReasoningPrior:
    """Write these weights of the parents as a prior; what the header calls not steered is so unless it is among them.

    ValueError if a parent's file is changed meanwhile.
    """
    stats = {}

    def parts() -> Iterator[dict[str, Tensor]]:
        for name, tensors, measured in weights:
            stats[name] = measured
            yield {f"{name}.{key}": tensor for key, tensor in tensors.items()}

    sources = [parent.path for parent in parents]
    with partial_output(output, overwrite, sources) as folder, gathered(folder, parts()) as tensors:
        if not stats:
            raise ValueError(nothing)
        for parent in parents:
            parent.refuse_changed()
        header = {**header, "weights": stats, "not_steered": [n for n in header["not_steered"] if n not in stats]}
        write_prior(folder, output, tensors, header)
    return ReasoningPrior.load(output)
