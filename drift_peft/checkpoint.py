"""Checkpoint: lazy tensors of a local folder or hub repository, one open shard at a time.

Everything that cannot be right is refused when the checkpoint is opened, before anybody works with it: adapters,
quantized weights, truncated or missing shards. Tensors stay memory-mapped until they are used.
"""

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

from .naming import canonical_name, cross_attention_layers

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"

_QUANTIZED_KEY = re.compile(r".*\.(?:absmax|quant_map|weight_scale|weight_scale_inv|qweight|qzeros)")


class Checkpoint:
    """A model's weights on disk, read as transformers would read them.

    Args:
        source: folder, hub id or `id@revision`; an existing local path wins over a hub id.
        revision: branch, tag or commit of a hub repository.

    Attributes:
        source: path or hub id as given, without the revision.
        revision: commit that a hub repository was resolved to; None for a local folder.
        folder: where the files are.
        config, text_config: transformers configs of the whole model and of its language model.
        files: the safetensors shards.
        keys: raw key -> shard that holds it.
        claims: canonical name -> raw keys that reduce to it; more than one is ambiguous.

    Raises:
        FileNotFoundError: no such folder or repository, or a file is missing from it.
        ValueError: what is there is no full-precision safetensors model.
    """

    def __init__(self, source: str | Path, revision: str | None = None):
        self.source, self.revision = str(source), None
        hub = not Path(source).exists()
        if hub:
            self.source, revision = split_revision(self.source, revision)
            self.folder = download(self.source, revision, ["*.json"])
            self.revision = self.folder.name  # the hub cache names a snapshot's folder after its commit
        else:
            self.folder = Path(source)

        self._refuse_what_is_no_model()
        self.config, self.text_config = self._read_config()
        # Only what the index names: Mistral repositories hold a second copy in consolidated*.safetensors.
        weight_map = self._read_index()
        names = sorted(set(weight_map.values())) or [SINGLE]
        if hub:
            download(self.source, self.revision, names)
        self.files = [self.folder / name for name in names]
        self._refuse_missing_files()

        self._open: tuple[Path, object] | None = None
        self.keys = {key: file for file in self.files for key in self._shard(file).keys()}
        self.keys |= {key: self.folder / name for key, name in weight_map.items()}
        self._refuse_bad_keys(weight_map)

        cross = cross_attention_layers(self.config)
        depth = self.text_config.num_hidden_layers - len(cross)
        self.claims: dict[str, list[str]] = defaultdict(list)
        for key in self.keys:
            name = canonical_name(key, cross)
            # Layers beyond the config's depth are extra heads (multi-token prediction) that transformers ignores.
            if name and not (name.startswith("layers.") and int(name.split(".")[1]) >= depth):
                self.claims[name].append(key)

    @cached_property
    def language_model(self) -> dict[str, str]:
        """Canonical name -> raw key. ValueError if two keys claim the same name."""
        if twice := {name: keys for name, keys in self.claims.items() if len(keys) > 1}:
            raise ValueError(f"{self.source} names weights twice: {'; '.join(' and '.join(k) for k in twice.values())}")
        return {name: keys[0] for name, keys in self.claims.items()}

    @property
    def auto_class(self):
        """The transformers auto class that loads this model."""
        vision = type(self.config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        return AutoModelForImageTextToText if vision else AutoModelForCausalLM

    def shape(self, raw: str) -> tuple[int, ...]:
        return tuple(self._shard(self.keys[raw]).get_slice(raw).get_shape())

    def dtype(self, raw: str) -> torch.dtype:
        return self.tensor(raw).dtype

    def tensor(self, raw: str) -> torch.Tensor:
        """The tensor as stored, memory-mapped on the CPU: copy before writing to it."""
        return self._shard(self.keys[raw]).get_tensor(raw)

    def _shard(self, file: Path):
        if self._open is None or self._open[0] != file:
            try:
                self._open = file, safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file} is truncated or no safetensors file ({error}); fetch it again") from error
        return self._open[1]

    def _refuse_what_is_no_model(self):
        where = self.source
        if self.folder.suffix == ".gguf" or (not self._has("config.json") and self._has("*.gguf")):
            raise ValueError(f"{where} is GGUF, which is quantized: give the safetensors model that it was made from")
        if self.folder.is_file():
            raise ValueError(f"{where} is a file: give the folder with config.json and the safetensors files")
        if self._has("adapter_config.json"):
            raise ValueError(f"{where} is an adapter, not a model: merge it into its base and give the merged folder")
        if self.revision is None and not self._has("*"):
            raise FileNotFoundError(f"{where} is an empty folder")
        if not self._has("config.json"):
            raise FileNotFoundError(f"{where} has no config.json: give the folder that save_pretrained wrote")

    def _read_config(self):
        try:
            config = AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
            text_config = config.get_text_config()
        except (ValueError, OSError, KeyError, StrictDataclassError) as error:
            reason = " ".join(re.split(r"\.\s|\n\n", str(error).strip())[0].split())  # the first sentence, on one line
            raise ValueError(f"transformers cannot read the config.json of {self.source}: {reason}") from error
        for part in (config, text_config):
            if quantization := getattr(part, "quantization_config", None):
                method = dict(quantization).get("quant_method", "an unnamed method")
                raise ValueError(f"{self.source} is quantized ({method}): give the full-precision model")
        return config, text_config

    def _read_index(self) -> dict[str, str]:
        index = self.folder / INDEX
        if not index.exists():
            return {}
        try:
            return json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError) as error:
            raise ValueError(f"{index} is no safetensors index: fetch it again") from error

    def _refuse_missing_files(self):
        if missing := [file.name for file in self.files if not file.is_file()]:
            if missing != [SINGLE]:
                raise FileNotFoundError(f"{self.source} lacks {', '.join(missing)}, named in its index: fetch it again")
            if self._has("*.bin"):
                raise ValueError(
                    f"{self.source} holds .bin weights: load it and save_pretrained it as safetensors first"
                )
            raise FileNotFoundError(
                f"{self.source} holds neither {SINGLE} nor {INDEX}: give a model saved as safetensors"
            )

    def _refuse_bad_keys(self, weight_map: dict[str, str]):
        for file in self.files:
            held = set(self._shard(file).keys())
            if lost := [key for key, name in weight_map.items() if name == file.name and key not in held]:
                raise ValueError(f"{file} lacks {lost[0]}, which the index of {self.source} places there")
        if quantized := next(filter(_QUANTIZED_KEY.fullmatch, self.keys), None):
            raise ValueError(f"{self.source} is quantized (it holds {quantized}): give the full-precision model")

    def _has(self, pattern: str) -> bool:
        return any(self.folder.glob(pattern))


def split_revision(source: str, revision: str | None = None) -> tuple[str, str | None]:
    """Hub id and revision of `id` or `id@revision`. ValueError when a revision is given twice."""
    repository, _, inline = source.partition("@")
    if inline and revision:
        raise ValueError(f"{source} names the revision {inline}, but revision={revision!r} was given as well")
    return repository, inline or revision


def download(repository: str, revision: str | None, files: Sequence[str]) -> Path:
    """Folder of a hub snapshot that holds `files` (patterns); FileNotFoundError if the hub does not give them."""
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(files)))
    except HFValidationError as error:
        raise FileNotFoundError(f"{repository} is neither an existing path nor a hub id") from error
    except Exception as error:  # the hub's client raises its own, httpx's and the system's errors
        reason = str(error).strip().split("\n")[0]
        at = f" at revision {revision}" if revision else ""
        raise FileNotFoundError(f"{repository}{at} is no local path and the hub does not give it: {reason}") from error
