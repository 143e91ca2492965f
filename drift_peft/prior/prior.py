"""ReasoningPrior: Δ of every steered weight as a truncated SVD, and of vectors whole, in one safetensors file.

Keys are `<canonical name>.U`, `.S` and `.Vh` for matrices, `<canonical name>.delta` for vectors (norms, biases). The
header holds one JSON string (several keys would be written in random order, and the same prior would not be the same
bytes): format, expert, base, reference, rank, dtype, seed, modules, the weights whose Δ is zero (`not_steered`), and
the statistics of each weight (`weights`). A combined prior names its `parents` in place of an expert.
"""

import contextlib
import difflib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from huggingface_hub import ModelCard
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from ..checkpoints import download, layer_order, partial_folder, refuse_output, split_revision, write_tensors
from .combine import Weight, check_parents, check_rank, combined_header, combined_weights, truncated_weights
from .share import FILE_NAME, export_lora, model_card, push

HEADER_KEY, FORMAT = "drift_prior", 1
PROBES = 16  # weights that are compared to recognize the base
MEASURED = ("delta_norm", "base_norm", "cosine")  # what the header says of every weight, beside its energy


@dataclass(frozen=True)
class PriorWeight:
    """Δ ≈ U diag(S) Vh of one weight W [out, in], and what was measured when it was taken.

    Attributes:
        U, S, Vh: bf16 [out, k], fp32 [k] in descending order, bf16 [k, in], on the CPU, memory-mapped.
        delta_norm, base_norm: ‖Δ‖_F of the whole Δ, ‖W_base‖_F.
        cosine: cos(W_expert, W_base).
        energy: captured energy ΣS² / ‖Δ‖_F².
        fingerprint: u_iᵀ W_base v_i for the first min(8, k) i, to recognize the base, quantized or not; empty in a
            combined prior, which has probes instead (`ReasoningPrior.probes`).
    """

    U: torch.Tensor
    S: torch.Tensor
    Vh: torch.Tensor
    delta_norm: float
    base_norm: float
    cosine: float
    energy: float
    fingerprint: tuple[float, ...]


@dataclass(frozen=True)
class PriorVector:
    """Δ of one vector (a norm's weight or a bias), whole, and what was measured when it was taken.

    Attributes:
        delta: fp32 [n], on the CPU, memory-mapped.
        delta_norm, base_norm: ‖Δ‖, ‖w_base‖; the latter may be 0.
        cosine: cos(w_expert, w_base).
    """

    delta: torch.Tensor
    delta_norm: float
    base_norm: float
    cosine: float


class ReasoningPrior(Mapping[str, PriorWeight | PriorVector]):
    """Canonical weight name -> PriorWeight, or PriorVector for a vector, read from the file on access.

    Make one with `load`, `build_prior` or `combine`.

    Attributes:
        path: the file.
        source: path or hub id as given to `load`.
        metadata: the header, as described at the top of this module.
    """

    def __init__(self, path: Path, source: str):
        self.path, self.source = path, source
        try:
            self._file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{source} is no prior: it is truncated or no safetensors file ({error})") from error
        header = (self._file.metadata() or {}).get(HEADER_KEY)
        if header is None:
            raise ValueError(f"{source} is a safetensors file but no prior: make one with `drift-peft prior build`")
        try:
            self.metadata = json.loads(header)
            written = self.metadata["format"]
            if written == FORMAT:
                self._names = sorted(self.metadata["weights"], key=layer_order)
                promised = {key: kind for name in self._names for key, kind in self._promised(name).items()}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{source} is no prior: its header is damaged, so build or fetch it again") from error
        if written != FORMAT:
            raise ValueError(f"{source} is a prior of format {written}, not {FORMAT}: read it with another drift_peft")
        self._check_tensors(promised)

    @classmethod
    def load(cls, source: str | Path, revision: str | None = None) -> "ReasoningPrior":
        """Open a prior: a file, a folder or hub repository that holds prior.safetensors, or `id@revision`.

        Raises:
            FileNotFoundError: there is no such path or repository, or no prior in it.
            ValueError: the file is no prior, or a damaged one.
        """
        path = Path(source)
        if not path.exists():
            if path.suffix == ".safetensors":  # no hub id ends like this, so do not ask there
                raise FileNotFoundError(f"there is no file {source}")
            repository, revision = split_revision(str(source), revision)
            path = download(repository, revision, [FILE_NAME])
        if path.is_dir():
            path /= FILE_NAME
            if not path.is_file():
                raise FileNotFoundError(f"{source} holds no {FILE_NAME}")
        return cls(path, str(source))

    @classmethod
    def combine(
        cls,
        parts: "Mapping[str | Path | ReasoningPrior, float] | Iterable[tuple[str | Path | ReasoningPrior, float]]",
        output: str | Path,
        rank: int | None = None,
        overwrite: bool = False,
    ) -> "ReasoningPrior":
        """Write Δ = Σ c_j Δ_j of several priors of one base, recompressed, as a new prior.

        The sum of what the parents hold is exact up to the rank. Its norm is an estimate, since what they did not
        capture is not known: these parts are taken as orthogonal to each other (see `combined_weights`). A weight that
        a parent lacks is zero there.

        Args:
            parts: prior (or its path or hub id) -> coefficient, or pairs of these.
            output: file to write.
            rank: ceiling of the rank; by default the largest in the parents.
            overwrite: replace an existing output.

        Raises:
            ValueError: the priors are of different bases, a coefficient is not finite, all are 0, or the sum is.
            OSError: a prior is not found, or the output exists or cannot be written.
        """
        pairs = parts.items() if isinstance(parts, Mapping) else parts
        parents = [(prior if isinstance(prior, cls) else cls.load(prior), c) for prior, c in pairs]
        check_parents(parents)
        rank = max(prior.rank for prior, _ in parents) if rank is None else check_rank(rank)
        return _write_weights(output, overwrite, combined_weights(parents, rank), combined_header(parents, rank))

    def truncate(self, rank: int, output: str | Path, overwrite: bool = False) -> "ReasoningPrior":
        """Write the prior with min(rank, k) singular directions per weight as a new one. Vectors stay as they are.

        Raises:
            ValueError: rank < 1.
            OSError: the output exists or cannot be written.
        """
        header = {**self.metadata, "rank": min(check_rank(rank), self.metadata["rank"])}
        if rank < self.rank:  # what is captured is no longer what `energy` asked for
            header |= {key: None for key in ("energy", "max_rank") if key in header}
        return _write_weights(output, overwrite, truncated_weights(self, rank), header)

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
        """
        return export_lora(self, scale, output, base, overwrite)

    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str | None = None,
        revision: str | None = None,
    ) -> str:
        """Upload the prior with a model card to a hub repository, made if need be. Returns the commit's URL.

        A README.md in the repository is replaced.

        Raises:
            ValueError: `repo_id` is no hub id.
            OSError: the hub does not take it: no network, no token, no permission.
        """
        return push(self, repo_id, private, token, commit_message, revision)

    def model_card(self, repo_id: str | None = None, token: str | None = None) -> ModelCard:
        """What `push_to_hub` writes as README.md; looks the parents' licences up in their cards."""
        return model_card(self, repo_id, token)

    @cached_property
    def sha256(self) -> str:
        """Hash of the file, as a hexadecimal string."""
        digest = hashlib.sha256()
        with open(self.path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()

    @property
    def rank(self) -> int:
        """The largest rank of any weight."""
        return max((stats.get("rank", 1) for stats in self.metadata["weights"].values()), default=1)

    def __getitem__(self, name: str) -> PriorWeight | PriorVector:
        tensors = self.tensors(name)
        stats = self.metadata["weights"][name]
        measured = {key: stats[key] for key in MEASURED}
        if "delta" in tensors:
            return PriorVector(tensors["delta"], **measured)
        factors = {key: tensors[key] for key in ("U", "S", "Vh")}
        return PriorWeight(**factors, **measured, energy=stats["energy"], fingerprint=tuple(stats["fingerprint"]))

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """All that the file holds of one weight, memory-mapped: last part of the key -> tensor. KeyError if nothing."""
        if name not in self.metadata["weights"]:
            near = difflib.get_close_matches(str(name), self, n=3)
            why = "its Δ is zero" if name in self.metadata["not_steered"] else f"nearest: {', '.join(near) or 'none'}"
            raise KeyError(f"{self.source} has no weight {name} ({why})")
        return {key.rpartition(".")[2]: self._file.get_tensor(key) for key in self._promised(name)}

    def probes(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """What recognizes the base: (name, U [out, i], Vh [i, in], u_iᵀ·W_base·v_i [i]), i ≤ 8, of at most 16 weights.

        They are the first singular directions of the weights' own Δ, or of a parent's in a combined prior. Names alone
        decide which weights these are. The embedding and the head, twenty times as large as the others, are among them
        only where there is nothing else.
        """
        stats = self.metadata["weights"]
        names = [name for name in self if stats[name].get("probe") or stats[name].get("fingerprint")]
        names = [name for name in names if name.startswith("layers.")] or names
        for name in sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())[:PROBES]:
            tensors, values = self.tensors(name), stats[name].get("probe") or stats[name]["fingerprint"]
            U, Vh = (tensors.get(f"probe_{factor}", tensors[factor]) for factor in ("U", "Vh"))
            yield name, U[:, : len(values)], Vh[: len(values)], torch.tensor(values)

    def __contains__(self, name: object) -> bool:
        return name in self.metadata["weights"]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    # A prior is its file, so it can be a key of `combine`; a Mapping would compare contents and have no hash.
    __eq__, __hash__ = object.__eq__, object.__hash__

    def __repr__(self) -> str:
        return f"ReasoningPrior({self.source!r}, {len(self)} weights, rank {self.rank})"

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the prior to another file, byte for byte the same. Raises what `partial_output` raises."""
        with partial_output(path, overwrite) as folder:
            shutil.copyfile(self.path, folder / FILE_NAME)
            os.replace(folder / FILE_NAME, path)

    def _promised(self, name: str) -> dict[str, tuple[list[int], str]]:
        """Key -> (shape, dtype) of each tensor that the header speaks of; a header that does not say raises."""
        stats = self.metadata["weights"][name]
        if not all(math.isfinite(stats[key]) for key in (*MEASURED, "energy")):
            raise ValueError(f"the statistics of {name} are not finite")
        if len(stats["shape"]) == 1:
            return {f"{name}.delta": (stats["shape"], "F32")}
        (rows, columns), rank, probes = stats["shape"], stats["rank"], len(stats.get("probe", ()))
        if len(stats["fingerprint"]) > rank:
            raise ValueError(f"the fingerprint of {name} is longer than its rank")
        factors = {"U": ([rows, rank], "BF16"), "S": ([rank], "F32"), "Vh": ([rank, columns], "BF16")}
        if probes:
            factors |= {"probe_U": ([rows, probes], "BF16"), "probe_Vh": ([probes, columns], "BF16")}
        return {f"{name}.{factor}": kind for factor, kind in factors.items()}

    def _check_tensors(self, promised: dict[str, tuple[list[int], str]]) -> None:
        """The file holds what its header promises, in shape and dtype. No tensor is read for that."""
        slices = {key: self._file.get_slice(key) for key in self._file.keys()}
        held = {key: (part.get_shape(), part.get_dtype()) for key, part in slices.items()}
        for key in sorted(promised.keys() | held.keys()):
            if promised.get(key) != held.get(key):
                says, holds = ("{1} {0}".format(*of[key]) if key in of else "none" for of in (promised, held))
                raise ValueError(
                    f"{self.source} is damaged: for {key} its header promises {says} and the file holds {holds}, so "
                    "build or fetch it again"
                )


@contextlib.contextmanager
def partial_output(output: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Folder `<output>.partial/` to work in. It is gone afterwards, whatever happened.

    Raises:
        FileExistsError, IsADirectoryError, FileNotFoundError, OSError: the output could not be written in the end.
    """
    refuse_output(Path(output), overwrite, example=FILE_NAME)
    with partial_folder(Path(output)) as partial:
        yield partial


def write_prior(folder: Path, output: str | Path, tensors: dict[str, torch.Tensor], metadata: dict) -> None:
    """Write a prior inside the folder of `partial_output` and rename it when it is complete."""
    header = {HEADER_KEY: json.dumps(metadata, sort_keys=True, allow_nan=False)}
    write_tensors(folder / FILE_NAME, tensors, header)
    os.replace(folder / FILE_NAME, output)


def _write_weights(output: str | Path, overwrite: bool, weights: Iterable[Weight], header: dict) -> ReasoningPrior:
    """Write these weights as a prior; what the header calls not steered is so unless it is among them."""
    with partial_output(output, overwrite) as folder:
        stats, files = {}, []
        for name, tensors, measured in weights:
            stats[name] = measured
            # To disk at once: mapped back below, the weights do not add up in memory.
            files.append(folder / f"{len(files)}.safetensors")
            write_tensors(files[-1], {f"{name}.{key}": tensor for key, tensor in tensors.items()})
        if not stats:
            raise ValueError("the sum is zero in every weight, so it would steer nothing: choose other coefficients")
        header = {**header, "weights": stats, "not_steered": [n for n in header["not_steered"] if n not in stats]}
        # No variable for the mapped tensors: Windows deletes no file that is still mapped.
        write_prior(folder, output, {k: t for file in files for k, t in load_file(file).items()}, header)
    return ReasoningPrior.load(output)
