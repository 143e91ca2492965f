"""JSON that others write, read through a schema: whatever has another form is one sentence that names the place."""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    PlainValidator,
    PositiveInt,
    ValidationError,
    model_validator,
)

from ..choices import MOST_LAYERS

SHOWN = 60  # characters of a value in an error
_ALTERNATIVE = re.compile(r"(?:list|dict|function-\w+)\[.*\]")  # what pydantic calls one of several forms
_COUNT = re.compile(r"(?:^|_)(?:layers?|depths?|blocks?|stages|experts)$")  # keys that say how often a part is built


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("should be a text")
    return value


Text = Annotated[Any, PlainValidator(_text)]
"""Any text, that of a file name outside of UTF-8 as well, which pydantic's own `str` refuses."""


class Schema(BaseModel):
    """The fields that are read; what else there is stays unread. No text is taken for a number, and no NaN for one."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, protected_namespaces=())


S = TypeVar("S", bound=Schema)


class Origin(Schema):
    """Where weights come from."""

    id: Text
    revision: Text | None = None
    base: Origin | None = None  # of an adapter


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or PureWindowsPath(name).drive or not path.name:
        raise ValueError("leaves the folder")
    return str(path)


class Index(Schema):
    """`*.index.json`: key of a tensor -> the file that holds it, in the folder or in one below it."""

    weight_map: dict[str, Annotated[str, AfterValidator(_inside)]] = Field(min_length=1)


class ModelConfig(Schema):
    """config.json: what is looked at before transformers reads it."""

    auto_map: dict | None = None
    quantization_config: dict | None = None
    text_config: ModelConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _count(cls, content: Any) -> Any:
        for key, value in content.items() if isinstance(content, dict) else ():
            if _COUNT.search(key):
                for count in value if isinstance(value, list) else [value]:
                    if isinstance(count, int) and count > MOST_LAYERS:
                        raise ValueError(f"{key} is {count}, and no model has more than {MOST_LAYERS}")
            for part in value if isinstance(value, list) else [value]:
                cls._count(part)
        return content


class AdapterConfig(Schema):
    """adapter_config.json: types that PEFT takes unchecked."""

    peft_type: str
    base_model_name_or_path: Text | None = None
    revision: Text | None = None
    r: PositiveInt = 8
    lora_alpha: FiniteFloat = 8
    rank_pattern: dict[str, PositiveInt] | None = None
    alpha_pattern: dict[str, FiniteFloat] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    bias: str = "none"
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None


class NamedTemplate(Schema):
    """One of several chat templates."""

    name: Text
    template: Text


class ChatTemplate(Schema):
    """The template that older versions of transformers kept in tokenizer_config.json and the like; several by name."""

    chat_template: Text | list[NamedTemplate] | dict[str, Text] | None = None


class DriftRecord(Schema):
    """drift_config.json: what a merge reads of it."""

    quantization: dict[str, Any] | None = None


class FourBitState(Schema):
    """`quant_state.bitsandbytes__*`, the JSON beside a 4-bit weight."""

    shape: list[PositiveInt] = Field(min_length=2, max_length=2)
    dtype: Literal["float32", "float16", "bfloat16"]
    quant_type: Literal["nf4", "fp4"]
    blocksize: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096]
    nested_blocksize: PositiveInt | None = None
    nested_dtype: Literal["float32"] | None = None
    nested_offset: FiniteFloat | None = None


def read_json(file: Path) -> Any:
    """ValueError if the file is no JSON."""
    try:
        return json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no valid JSON, so it may be truncated: {error}") from error


def check(content: Any, schema: type[S]) -> S:
    """The content as the schema has it. ValueError, which says what is wrong in which place, if it has another form."""
    try:
        try:
            return schema.model_validate(content)
        except ValidationError as error:
            raise ValueError(_words(error.errors()[0])) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _words(first: dict) -> str:
    parts = [str(part) for part in first["loc"] if not _ALTERNATIVE.fullmatch(str(part))]
    place, message = ".".join(parts), first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"{place} is missing"
    if first["type"] == "value_error" and not place:  # of a whole, and names the place itself
        return message
    shown = json.dumps(first["input"], default=str)
    shown = shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}…"
    return f"{place or 'it'} {message.removeprefix('Input ').partition(' or instance of')[0]}, got {shown}"
