"""The file of a prior: Δ of every steered weight as a truncated SVD, and of vectors whole, in one safetensors file.

Keys are `<canonical name>.U`, `.S` and `.Vh` for matrices, `<canonical name>.delta` for vectors (norms, biases). The
header is one JSON string. It has format, expert, base, reference, rank, dtype, seed, modules, the weights whose Δ is
zero (`not_steered`), the statistics of each weight (`weights`), and `force` where it was needed. A combined prior names
its `parents` in place of an expert. A gated one says where its gates came from (`gated`). For each weight it also has
the gate of every direction of the prior that it was made of (`gates`), in that prior's order, and ‖U diag(S) Vh‖ there
(`ungated_norm`).
"""

from __future__ import annotations

import contextlib
import difflib
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..checkpoints import SharedFile, Watch, claimed_output, layer_order, partial_folder, sampled, write_headed
from .header import Header

HEADER_KEY, FORMAT = "drift_prior", 1
FILE_NAME = "prior.safetensors"  # what a prior is called in a folder or hub repository
PROBES = 16  # weights that are compared to recognize the base
# How far off their products may be. NF4 moves them by about 9 %; those of an unrelated base are off by about 140 %.
FINGERPRINT_TOLERANCE = 0.3
ROUNDING_TOLERANCE = 0.02  # where nothing is quantized: several times what rounding to 16 bits explains
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
            combined or gated prior, which has probes instead (`ReasoningPrior.probes`).
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


class PriorFile(SharedFile, Mapping[str, PriorWeight | PriorVector]):
    """Canonical weight name -> PriorWeight, or PriorVector for a vector, read from the file on access.

    Attributes:
        path: the file.
        source: path or hub id as given to `load`.
        metadata: the header, as described at the top of this module.
    """

    NOUN, MAKE = "prior", "make one with `drift-peft prior build`"
    HEADER_KEY, FORMAT, HEADER = HEADER_KEY, FORMAT, Header
    FILE_NAME, COMMIT = FILE_NAME, "Upload a reasoning prior"

    def __init__(self, path: Path, source: str):
        self._watch = Watch(source, [path])
        super().__init__(path, source)
        self._names = sorted(self.metadata["weights"], key=layer_order)
        self._check_tensors({key: kind for name in self._names for key, kind in self._promised(name).items()})
        self._check_numbers()

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
        """All that the file holds of one weight, memory-mapped: last part of the key -> tensor. KeyError if nothing.

        Example:
            >>> sorted(ReasoningPrior.load("prior.safetensors").tensors("layers.0.mlp.up_proj.weight"))
            ['S', 'U', 'Vh']
        """
        if name not in self.metadata["weights"]:
            near = difflib.get_close_matches(str(name), self, n=3)
            why = "its Δ is zero" if name in self.metadata["not_steered"] else f"nearest: {', '.join(near) or 'none'}"
            raise KeyError(f"{self.source} has no weight {name} ({why})")
        return {key.rpartition(".")[2]: self._file.get_tensor(key) for key in self._promised(name)}

    def refuse_changed(self) -> None:
        """ValueError if the file is another one by now, or has been written to."""
        self._watch.check()

    def probes(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """What recognizes the base: (name, U [out, i], Vh [i, in], u_iᵀ·W_base·v_i [i]), i ≤ 8, of at most 16 weights.

        They are the first singular directions of the weights' own Δ, or of a parent's in a combined prior. Names alone
        decide which weights these are. The embedding and the head, twenty times as large as the others, are among them
        only where there is nothing else.

        Example:
            >>> name, U, Vh, values = next(ReasoningPrior.load("prior.safetensors").probes())
            >>> U.shape[1] == len(Vh) == len(values) == 8
            True
        """
        stats = self.metadata["weights"]
        names = [name for name in self if stats[name].get("probe") or stats[name].get("fingerprint")]
        names = [name for name in names if name.startswith("layers.")] or names
        for name in sampled(names, PROBES):
            tensors, values = self.tensors(name), stats[name].get("probe") or stats[name]["fingerprint"]
            U, Vh = (tensors.get(f"probe_{factor}", tensors[factor]) for factor in ("U", "Vh"))
            yield name, U[:, : len(values)], Vh[: len(values)], torch.tensor(values, dtype=torch.float32)

    def __contains__(self, name: object) -> bool:
        return name in self.metadata["weights"]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.source!r}, {len(self)} weights, rank {self.rank})"

    def _promised(self, name: str) -> dict[str, tuple[list[int], str]]:
        """Key -> (shape, dtype) of each tensor that the header speaks of."""
        stats = self.metadata["weights"][name]
        if len(stats["shape"]) == 1:
            return {f"{name}.delta": (stats["shape"], "F32")}
        (rows, columns), rank, probes = stats["shape"], stats["rank"], len(stats.get("probe", ()))
        factors = {"U": ([rows, rank], "BF16"), "S": ([rank], "F32"), "Vh": ([rank, columns], "BF16")}
        if probes:
            factors |= {"probe_U": ([rows, probes], "BF16"), "probe_Vh": ([probes, columns], "BF16")}
        return {f"{name}.{factor}": kind for factor, kind in factors.items()}

    def _check_tensors(self, promised: dict[str, tuple[list[int], str]]) -> None:
        """The file holds what its header promises, in shape and dtype. No tensor is read for that."""
        held = self._held()
        for key in sorted(promised.keys() | held.keys()):
            if promised.get(key) != held.get(key):
                says, holds = ("{1} {0}".format(*of[key]) if key in of else "none" for of in (promised, held))
                raise ValueError(
                    f"{self.source} is damaged: for {key} its header promises {says} and the file holds {holds}, so "
                    "build or fetch it again"
                )

    def _check_numbers(self) -> None:
        """Each tensor is finite, no singular value is negative, and no Δ is zero. What is not would end as NaN in what
        is trained. Reads the whole file once, at some GB/s."""
        for name in self._names:
            for part, tensor in self.tensors(name).items():
                least, largest = map(float, tensor.aminmax())
                if not (math.isfinite(least) and math.isfinite(largest)):
                    wrong = "NaN or infinite values"
                elif part == "S" and least < 0:
                    wrong = "a negative singular value"
                elif part in ("S", "delta") and least == largest == 0:
                    wrong = "zeros alone"
                else:
                    continue
                raise ValueError(f"{self.source} is damaged: {name}.{part} holds {wrong}, so build or fetch it again")


@contextlib.contextmanager
def partial_output(output: str | Path, overwrite: bool = False, sources: Collection[str | Path] = ()) -> Iterator[Path]:
    """Folder `<output>.partial/` to work in. It is gone afterwards, whatever happened.

    Args:
        sources: files that the output is made of, none of which it may replace.

    Raises:
        FileExistsError, IsADirectoryError, FileNotFoundError, OSError: the output could not be written in the end.
    """
    output = Path(output)
    claimed = claimed_output(output, overwrite, FILE_NAME, sources)
    with claimed, partial_folder(output, overwrite) as partial:
        yield partial


def write_prior(folder: Path, output: str | Path, tensors: dict[str, torch.Tensor], metadata: dict) -> None:
    """Write a prior inside the folder of `partial_output` and rename it when it is complete."""
    write_headed(PriorFile, folder, output, tensors, metadata)
