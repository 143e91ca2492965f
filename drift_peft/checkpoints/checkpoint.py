"""Checkpoint: lazy tensors of a local folder or hub repository, one open shard at a time.

Everything that cannot be right is refused when the checkpoint is opened, before anybody works with it: adapters,
quantized weights, truncated or missing shards. Tensors stay memory-mapped until they are used, and a hub repository's
shards stay on the hub until one of their tensors is read.
"""

import copy
import os
import re
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from ..warn import warn
from .adapter import named_adapters
from .conversion import Layout
from .decoder import Decoder
from .hub import Repository, download, split_revision
from .naming import EMBEDDING, HEAD, canonical_name, says_tied
from .schema import FourBitState, Index, ModelConfig, check, read_json
from .serving import auto_class_of
from .shards import FOUR_BIT, STATE, Header, dequantize, four_bit_state, open_shard
from .tokenizer import TOKENIZER, has_tokenizer
from .watch import Watch

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LAYOUTS = (SINGLE, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")  # in the order of transformers

_QUANTIZED_KEY = re.compile(r".*\.(?:absmax|quant_map|SCB|weight_scale|weight_scale_inv|qweight|qzeros)")
# What belongs to a quantized weight, whose name stands in front.
_SCALE = re.compile(r"(.+?)(?:\.weight)?[._]q?(?:scales?|zeros|zero_points?)(?:_(?:weight|inv))?")
_FOUR_BIT_WAY_OUT = "give the full-precision model, or, for a prior, pass dequantize=True (--dequantize)"


class Checkpoint:
    """A model's weights on disk or on the hub, read as transformers would read them.

    Args:
        source: folder, hub id or `id@revision`; an existing local path wins over a hub id without a revision.
        revision: branch, tag or commit of a hub repository.
        dequantize: take bitsandbytes' 4-bit weights for the matrices that they stand for, instead of refusing them.
        record: JSON file that tells a restarted program what `release` may delete; see `hub.Repository`.

    Attributes:
        source: path or hub id as given, without the revision.
        revision: commit that a hub repository was resolved to; None for a local folder.
        folder: where the files are, or will be when they are fetched.
        config, text_config: transformers configs of the whole model and of its language model.
        files: the shards, safetensors or .bin.
        keys: key in the files -> shard that holds it.

    A tensor is asked for by its key in the files; one that transformers makes of others as it reads them, such as
    q_proj of a fused qkv, by its name in memory.

    Raises:
        FileNotFoundError: no such folder or repository, or a file is missing from it.
        PermissionError, OSError: the hub does not give it.
        ValueError: what is there is no full-precision model.
    """

    def __init__(
        self, source: str | Path, revision: str | None = None, dequantize: bool = False, record: Path | None = None
    ):
        self.source, self.revision, self._hub = str(source), None, None
        if revision is None and Path(source).exists():
            self.folder = Path(source)
            self._names = {path.name for path in self.folder.glob("*")}
        else:
            self._hub = Repository(*split_revision(self.source, revision), record)
            self.source, self.revision, self.folder = self._hub.name, self._hub.commit, self._hub.folder
            self._names = self._hub.files()

        self._refuse_what_is_no_model()
        self._watch = Watch(self.source, self.folder.glob("*.json") if self._hub is None else ())
        self.config = read_config(self.folder, self.source)
        self.text_config = self.config.get_text_config()
        refuse_quantized(self.config, self.source, dequantize)
        layout = self._choose_layout()
        weight_map = self._read_index(layout) if layout.endswith(".index.json") else {}
        self.files = [self.folder / name for name in sorted(set(weight_map.values())) or [layout]]
        if self._hub is None and (missing := [file.name for file in self.files if not file.is_file()]):
            why = "named in its index" if weight_map else "a link to nothing"
            raise FileNotFoundError(f"{self.source} lacks {', '.join(missing)}, {why}: fetch it again")
        if self._hub is None:
            self._watch.add(self.files)
        self._open: tuple | None = None  # a shard and its path
        with ThreadPoolExecutor(8) as pool:  # on the hub, each header is a request or two
            self._headers = dict(zip(self.files, pool.map(self._header, self.files), strict=True))
        self._where = self._place_keys(weight_map)
        self._four_bit = self._find_four_bit() if dequantize else {}
        companions = {key for parts in self._four_bit.values() for key in parts.values()}
        self.keys = {key: file for key, file in self._where.items() if key not in companions}
        if quantized := next(filter(_QUANTIZED_KEY.fullmatch, self.keys), None):
            way_out = _FOUR_BIT_WAY_OUT if FOUR_BIT.fullmatch(quantized) else "give the full-precision model"
            raise ValueError(f"{self.source} is quantized (it holds {quantized}): {way_out}")

    @cached_property
    def model(self) -> PreTrainedModel:
        """The class that transformers builds of the configuration, without weights.

        Raises:
            ValueError: it cannot be built.
        """
        return skeleton(self.config, self.source)

    @cached_property
    def decoder(self) -> Decoder:
        """The language model in `model`. ValueError if it is not found."""
        try:
            return Decoder(self.model)
        except ValueError as error:
            kind = type(self.model).__name__
            raise ValueError(f"{self.source} is a {kind}, which has no decoder whose layers are in one list") from error

    @cached_property
    def layout(self) -> Layout:
        """Which keys transformers reads into which parameter of `model`."""
        return Layout(self.model, self.keys)

    @cached_property
    def claims(self) -> dict[str, list[str]]:
        """Canonical name of each weight that the class has -> keys that hold it; more than one is ambiguous."""
        claims: dict[str, list[str]] = defaultdict(list)
        for name, keys in self.layout.names.items():
            if canonical := self.decoder.name(name):
                claims[canonical] += keys
        for key in self.layout.unread:  # in forms that no version of transformers reads, such as a doubled prefix
            if (canonical := canonical_name(key, self.decoder.skipped)) in self.decoder.kinds:
                claims[canonical].append(key)
        return claims

    @cached_property
    def language_model(self) -> dict[str, str]:
        """Canonical name -> key. ValueError if two keys claim the same name."""
        if twice := {name: keys for name, keys in self.claims.items() if len(keys) > 1}:
            raise ValueError(f"{self.source} names weights twice: {'; '.join(' and '.join(k) for k in twice.values())}")
        return {name: keys[0] for name, keys in self.claims.items()}

    @cached_property
    def in_memory(self) -> dict[str, str]:
        """What this version of transformers calls a tensor in memory -> its key."""
        return {name: keys[0] for name, keys in self.layout.names.items()}

    @cached_property
    def tied(self) -> bool:
        """Whether embedding and head are one weight to transformers: its configuration says so, and the files hold no
        head that differs."""
        ends = [self.language_model.get(end) for end in (EMBEDDING, HEAD)]
        return says_tied(self.config) and (None in ends or torch.equal(*map(self.stored_tensor, ends)))

    @property
    def origin(self) -> dict:
        """Where the weights come from, for a prior's header; `dequantize` if they are in 4 bits there."""
        return {"id": self.source, "revision": self.revision} | ({"dequantize": True} if self._four_bit else {})

    @property
    def identity(self) -> list:
        """What tells these weights from others: a hub repository's commit, or a folder's files with size and time."""
        if self._hub is not None:
            return [self._hub.name, self._hub.commit]
        files = sorted((file.relative_to(self.folder).as_posix(), *s) for file, s in self._watch.states().items())
        return [os.path.abspath(self.folder), [[*file] for file in files]]

    def refuse_changed(self) -> None:
        """ValueError if a file of a local folder is no longer what it was when this object was made."""
        self._watch.check()

    @property
    def auto_class(self):
        """The transformers auto class that loads this model."""
        return auto_class_of(self.config)

    @property
    def sees(self) -> bool:
        """Whether the model takes images."""
        return self.auto_class is not AutoModelForCausalLM

    def files_of(self, key: str) -> list[Path]:
        """The shards that `tensor(key)` is read from."""
        if key in self.keys:
            return [self.keys[key]]
        return list(dict.fromkeys(self.keys[source] for source in self.layout.conversions[key].sources))

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of `tensor(key)`, without reading it."""
        if key in self._four_bit:
            return tuple(self._state(key).shape)
        if key in self.keys:
            return self._headers[self.keys[key]][key][0]
        conversion = self.layout.conversions[key]
        return conversion.shapes({source: self.shape(source) for source in conversion.sources})[key]

    def dtype(self, key: str) -> torch.dtype:
        """Dtype of `tensor(key)`, without reading it."""
        return self.stored_dtype(key)

    def stored_dtype(self, key: str) -> torch.dtype:
        """Dtype of `stored_tensor(key)`, without reading it."""
        if key in self._four_bit:
            return getattr(torch, self._state(key).dtype)
        if key in self.keys:
            return self._headers[self.keys[key]][key][1]
        return self.stored_dtype(next(iter(self.layout.conversions[key].sources)))

    def quantization_sign(self, key: str) -> str | None:
        """What shows that `tensor(key)` is not in full precision, as words that follow its name; None if nothing does.

        Its dtype does, or a scale beside it that the class has no parameter for: not all that is quantized has a
        quantization_config, nor integers.
        """
        for raw in [key] if key in self.keys else self.layout.conversions[key].sources:
            dtype = self.stored_dtype(raw)
            if not dtype.is_floating_point or dtype.itemsize < 2:
                return f"is {dtype}"
            if beside := self._scales.get(raw.removesuffix(".weight")):
                return f"is scaled by {beside}"
        return None

    @cached_property
    def _scales(self) -> dict[str, str]:
        """Name of a weight without `.weight` -> key of its scale."""
        return {match[1]: match[0] for match in map(_SCALE.fullmatch, self.layout.unread) if match}

    def tensor(self, key: str) -> torch.Tensor:
        """`stored_tensor`, or what a subclass makes of it; copy it before writing to it."""
        return self.stored_tensor(key)

    def stored_tensor(self, key: str) -> torch.Tensor:
        """What the files hold, on the CPU: memory-mapped, dequantized from 4 bits, or made of others as transformers
        makes it."""
        if key in self._four_bit:
            return dequantize(self._read(key), {part: self._read(at) for part, at in self._four_bit[key].items()})
        if key in self.keys:
            return self._read(key)
        conversion = self.layout.conversions[key]
        return conversion.convert({source: self.stored_tensor(source) for source in conversion.sources})[key]

    def fetch(self, file: Path) -> Path:
        """One of `files`, downloaded if it is still on the hub."""
        return file if self._hub is None else self._hub.fetch(file.relative_to(self.folder).as_posix())

    def release(self, file: Path) -> None:
        """Delete one of `files` from the hub's cache if this checkpoint, or one with the same record, brought it there;
        else do nothing. Reading one of its tensors fetches it again."""
        if self._open is not None and self._open[0] == file:
            self._open = None
        if self._hub is not None:
            self._hub.release(file.relative_to(self.folder).as_posix())

    def vocabulary(self) -> dict[str, int]:
        """Token string -> its row in embedding and head. ValueError if there is no tokenizer that can be read."""
        if self._hub is not None:
            download(self._hub.name, self._hub.commit, TOKENIZER)
        if not has_tokenizer(self.folder):
            raise ValueError(f"{self.source} holds no tokenizer, which tells the rows of head and embedding apart")
        try:
            return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False).get_vocab()
        except Exception as error:  # the tokenizers library raises nothing more specific
            raise ValueError(f"transformers cannot read the tokenizer of {self.source}: {_reason(error)}") from error

    def _read(self, key: str) -> torch.Tensor:
        return self._shard(self._where[key]).tensor(key)

    def _shard(self, file: Path):
        self._watch.check(file)  # which also spares the process a SIGBUS where a mapped file was cut
        opened = self._open
        if opened is None or opened[0] != file:
            opened = self._open = file, open_shard(self.fetch(file))
        return opened[1]

    def _header(self, file: Path) -> Header:
        if self._hub is not None and not file.exists():
            return self._hub.header(file.relative_to(self.folder).as_posix())
        return open_shard(file).header()

    def _state(self, raw: str) -> FourBitState:
        key = next(key for part, key in self._four_bit[raw].items() if part.startswith(STATE))
        return four_bit_state(self._read(key))

    def _refuse_what_is_no_model(self) -> None:
        where = self.source
        alone = self._names.isdisjoint(("adapter_config.json", *LAYOUTS))
        if self.folder.suffix == ".gguf" or (alone and any(name.endswith(".gguf") for name in self._names)):
            raise ValueError(f"{where} is GGUF, which is quantized: give the safetensors model that it was made from")
        if self.folder.is_file():
            raise ValueError(f"{where} is a file: give the folder with config.json and the safetensors files")
        if not self._names:
            raise FileNotFoundError(f"{where} is an empty folder")
        if "adapter_config.json" in self._names:
            raise ValueError(f"{where} is an adapter, not a model: merge it into its base and give the merged folder")
        if "config.json" not in self._names:
            if named := named_adapters(self.folder):
                raise FileNotFoundError(f"{where} holds the adapters {', '.join(named)}: name one of these folders")
            raise FileNotFoundError(f"{where} has no config.json: give the folder that save_pretrained wrote")

    def _choose_layout(self) -> str:
        """The single file or the index that transformers would read."""
        layouts = [name for name in LAYOUTS if name in self._names]
        if not layouts:
            offline = "" if self._hub is None else ", on the hub or, if that cannot be reached, in the cache"
            raise FileNotFoundError(
                f"{self.source} holds none of {', '.join(LAYOUTS)}{offline}: give a model that save_pretrained wrote"
            )
        single, index = layouts[0], f"{layouts[0]}.index.json"
        if index in layouts and set(self._read_index(index).values()) != {single}:
            warn(
                f"{self.source} holds {single} and, named in {index}, other files of weights: read is {single}, as "
                "transformers does; delete what is out of date"
            )
        return single

    def _read_index(self, name: str) -> dict[str, str]:
        """Key -> path of its shard, relative to the folder."""
        try:
            return check(read_json(self.folder / name), Index).weight_map
        except ValueError as error:
            raise ValueError(f"{self.folder / name} is no index of weights ({error}): fetch it again") from error

    def _place_keys(self, weight_map: dict[str, str]) -> dict[str, Path]:
        """Every key -> the one shard that holds it."""
        where: dict[str, Path] = {}
        for file in self.files:
            for key in self._headers[file]:
                if key in where:
                    both = " and ".join(f.relative_to(self.folder).as_posix() for f in (where[key], file))
                    raise ValueError(f"{self.source} holds {key} in both {both}")
                where[key] = file
        for key, name in weight_map.items():
            dropped = says_tied(self.config) and canonical_name(key) == HEAD  # which the embedding stands for
            if key not in self._headers[self.folder / name] and not dropped:
                raise ValueError(f"{self.folder / name} lacks {key}, which the index of {self.source} places there")
        return where

    def _find_four_bit(self) -> dict[str, dict[str, str]]:
        """4-bit weight -> what is beside it (as FOUR_BIT names it) -> key."""
        companions: dict[str, dict[str, str]] = defaultdict(dict)
        for match in filter(None, map(FOUR_BIT.fullmatch, self._where)):
            companions[match[1]][match[2]] = match[0]
        for raw, parts in companions.items():
            if raw not in self._where or not any(part.startswith(STATE) for part in parts):
                raise ValueError(f"{self.source} holds {min(parts.values())}, but not all of a 4-bit {raw}")
        return dict(companions)


def skeleton(config: PreTrainedConfig, source: str) -> PreTrainedModel:
    """The class that transformers builds of a configuration, without weights. ValueError if it cannot be built."""
    config = copy.deepcopy(config)
    config.quantization_config = None
    if config._attn_implementation not in (None, "eager", "sdpa"):  # needs kernels, and nothing is computed here
        config._attn_implementation = None
    try:
        with torch.device("meta"):
            return auto_class_of(config).from_config(config)
    except Exception as error:  # each class has its own way to say that its configuration is not for it
        what = f"transformers cannot build the model of {source} from its config.json"
        raise ValueError(f"{what}: {_reason(error)}") from error


def read_config(folder: Path, source: str) -> PreTrainedConfig:
    """The config.json of a folder, as transformers reads it. No code that comes with it is run.

    Raises:
        ValueError: it cannot be read, or speaks of more layers than any model has.
    """
    given = None
    try:
        given = check(read_json(folder / "config.json"), ModelConfig)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        config.get_text_config()
        return config
    except Exception as error:  # each class has its own way to say that its configuration is not for it
        if given is not None and given.auto_map is not None:
            raise ValueError(
                f"{source} brings its own code, which is not run: give the repository that was converted for "
                "transformers, whose name mostly ends in -hf"
            ) from error
        raise ValueError(f"transformers cannot read the config.json of {source}: {_reason(error)}") from error


def refuse_quantized(config: PreTrainedConfig, source: str, four_bit_too: bool = False) -> None:
    """ValueError if a configuration, or that of its language model, says that the weights are quantized."""
    for part in (config, config.get_text_config()):
        mlx = getattr(part, "quantization", None)
        mlx = mlx | {"quant_method": "MLX"} if isinstance(mlx, dict) and "bits" in mlx else {}
        if quantization := dict(getattr(part, "quantization_config", None) or {}) | mlx:
            method = quantization.get("quant_method", "an unnamed method")
            if method != "bitsandbytes" or not quantization.get("load_in_4bit"):
                raise ValueError(f"{source} is quantized ({method}): give the full-precision model")
            if not four_bit_too:
                raise ValueError(f"{source} is quantized ({method}, 4 bits): {_FOUR_BIT_WAY_OUT}")


def _reason(error: Exception) -> str:
    """The first sentence of another library's message, on one line."""
    return " ".join(re.split(r"\.\s|\n\n", str(error).strip())[0].split())
