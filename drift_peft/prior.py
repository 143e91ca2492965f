"""ReasoningPrior: Δ of every steered weight as a truncated SVD, in one safetensors file.

Keys are `<canonical name>.U`, `.S` and `.Vh`. The header holds one JSON string (several keys would be written in random
order, and the same prior would not be the same bytes): format, expert, base, reference, rank, dtype, seed, modules,
the weights whose Δ is zero (`not_steered`), and the statistics of each weight (`weights`).
"""

import contextlib
import difflib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .checkpoint import download, split_revision
from .naming import layer_order
from .output import partial_folder

FILE_NAME, HEADER_KEY, FORMAT = "prior.safetensors", "drift_prior", 1


@dataclass(frozen=True)
class PriorWeight:
    """Δ ≈ U diag(S) Vh of one weight W [out, in], and what was measured when it was taken.

    Attributes:
        U, S, Vh: bf16 [out, k], fp32 [k] in descending order, bf16 [k, in], on the CPU, memory-mapped.
        delta_norm, base_norm: ‖Δ‖_F of the whole Δ, ‖W_base‖_F.
        cosine: cos(W_expert, W_base).
        energy: captured energy ΣS² / ‖Δ‖_F².
        fingerprint: u_iᵀ W_base v_i for the first min(8, k) i, to recognize the base, quantized or not.
    """

    U: torch.Tensor
    S: torch.Tensor
    Vh: torch.Tensor
    delta_norm: float
    base_norm: float
    cosine: float
    energy: float
    fingerprint: tuple[float, ...]


class ReasoningPrior(Mapping[str, PriorWeight]):
    """Canonical weight name -> PriorWeight, read from the file on access. Make one with `load` or `build_prior`.

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
            self._names = sorted(self.metadata["weights"], key=layer_order) if written == FORMAT else []
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{source} is no prior: its header is damaged, so build or fetch it again") from error
        if written != FORMAT:
            raise ValueError(f"{source} is a prior of format {written}, not {FORMAT}: read it with another drift_peft")

    @classmethod
    def load(cls, source: str | Path, revision: str | None = None) -> "ReasoningPrior":
        """Open a prior: a file, a folder or hub repository that holds prior.safetensors, or `id@revision`.

        Raises:
            FileNotFoundError: there is no such path or repository, or no prior in it.
            ValueError: the file is no prior.
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

    @cached_property
    def sha256(self) -> str:
        """Hash of the file, as a hexadecimal string."""
        digest = hashlib.sha256()
        with open(self.path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()

    def __getitem__(self, name: str) -> PriorWeight:
        if name not in self.metadata["weights"]:
            near = difflib.get_close_matches(str(name), self, n=3)
            why = "its Δ is zero" if name in self.metadata["not_steered"] else f"nearest: {', '.join(near) or 'none'}"
            raise KeyError(f"{self.source} has no weight {name} ({why})")
        stats = self.metadata["weights"][name]
        return PriorWeight(
            *(self._file.get_tensor(f"{name}.{factor}") for factor in ("U", "S", "Vh")),
            **{key: stats[key] for key in ("delta_norm", "base_norm", "cosine", "energy")},
            fingerprint=tuple(stats["fingerprint"]),
        )

    def __contains__(self, name: object) -> bool:
        return name in self.metadata["weights"]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return f"ReasoningPrior({self.source!r}, {len(self)} weights, rank {self.metadata['rank']})"

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the prior to another file, byte for byte the same. Raises what `partial_output` raises."""
        with partial_output(path, overwrite) as folder:
            tensors = {key: self._file.get_tensor(key) for key in self._file.keys()}
            write_prior(folder, path, tensors, self.metadata)


@contextlib.contextmanager
def partial_output(output: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Folder `<output>.partial/` to work in. It is gone afterwards, whatever happened.

    Raises:
        FileExistsError, IsADirectoryError, FileNotFoundError, OSError: the output could not be written in the end.
    """
    output = Path(output)
    if output.is_dir():
        raise IsADirectoryError(f"output {output} is a folder: name a file, such as {output / FILE_NAME}")
    if output.exists() and not overwrite:
        raise FileExistsError(f"output {output} exists: name another file, or pass overwrite=True (--overwrite)")
    with partial_folder(output) as partial:
        yield partial


def write_tensors(file: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """`save_file` with one kind of error: OSError that names the file and the reason."""
    try:
        save_file(tensors, file, metadata=metadata)
    except (SafetensorError, OSError) as error:
        raise OSError(f"{file} could not be written: {error}") from error


def write_prior(folder: Path, output: str | Path, tensors: dict[str, torch.Tensor], metadata: dict) -> None:
    """Write a prior inside the folder of `partial_output` and rename it when it is complete."""
    header = {HEADER_KEY: json.dumps(metadata, sort_keys=True, allow_nan=False)}
    write_tensors(folder / FILE_NAME, tensors, header)
    os.replace(folder / FILE_NAME, output)
