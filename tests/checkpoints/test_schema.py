"""schema.py, and the form of every file that others write: another one is a sentence, whatever it is, and at once."""

import json
import re
import shutil

import pytest
import torch
from steered_files import Q, save_steered

from drift_peft.checkpoints.checkpoint import INDEX, Checkpoint
from drift_peft.checkpoints.naming import pattern_matches
from drift_peft.checkpoints.schema import AdapterConfig, ChatTemplate, ModelConfig, Origin, check
from drift_peft.checkpoints.shards import load_bin
from drift_peft.cli import layers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_steered(tmp_path_factory.mktemp("schema"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"num_hidden_layers": 10_000_000}, r"num_hidden_layers is 10000000, and no model has more than 2000"),
        ({"text_config": {"num_hidden_layers": 10_000_000}}, "num_hidden_layers is 10000000"),
        ({"vision_config": {"depths": [2, 10_000_000]}}, "depths is 10000000"),
        ({"thinker_config": {"audio_config": {"encoder_layers": 9999}}}, "encoder_layers is 9999"),
        ({"auto_map": []}, r"auto_map should be a valid dictionary, got \[\]"),
        (None, "it should be a valid dictionary, got null"),
    ],
)
def test_what_is_said_of_a_config(content, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        check(content, ModelConfig)


@pytest.mark.parametrize(
    ("schema", "content", "message"),
    [
        (ChatTemplate, {"chat_template": 3}, "chat_template should be a text, got 3"),
        (ChatTemplate, {"chat_template": {"default": 3}}, 'chat_template should be a text, got {"default": 3}'),
        (
            AdapterConfig,
            {"trainable_token_indices": ["a"]},
            'trainable_token_indices.0 should be a valid integer, got "a"',
        ),
        (AdapterConfig, {"target_modules": 3}, "target_modules should be a valid list, got 3"),
        (AdapterConfig, {"exclude_modules": ["x", 3]}, "exclude_modules.1 should be a valid string, got 3"),
        (AdapterConfig, {"rank_pattern": {"[0-9]": "a"}}, 'rank_pattern.[0-9] should be a valid integer, got "a"'),
    ],
)
def test_a_field_of_several_forms_is_called_as_the_file_has_it(schema, content, message):
    """Without pydantic's name of one of the forms."""
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check({"peft_type": "LORA", **content}, schema)


def test_a_document_that_is_nested_too_deeply():
    content = {}
    for _ in range(10_000):
        content = {"base": content, "id": "x"}
    with pytest.raises(ValueError):
        check(content, Origin)


def test_a_deep_model_is_refused_before_it_is_built(folder):
    file = folder / "base" / "config.json"
    before = file.read_text()
    try:
        file.write_text(json.dumps(json.loads(before) | {"num_hidden_layers": 10_000_000}))
        with pytest.raises(ValueError, match=r"cannot read the config.json of \S+base: num_hidden_layers is 10000000"):
            Checkpoint(folder / "base")
    finally:
        file.write_text(before)


def test_many_layers_on_the_command_line():
    assert layers.layers(["0", "4-6"]) == [0, 4, 5, 6]
    with pytest.raises(ValueError, match="--only-layers names layer 99999999, and no model has more than 2000"):
        layers.layers(["0-99999999"])


def test_a_catastrophic_regular_expression_ends():
    with pytest.raises(ValueError, match=r"takes too long for 'a+': write a simpler one"):
        pattern_matches(r"(a|aa)+\.x", "a" * 60)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "a/../../x", "C:\\x", "", "."])
def test_an_index_does_not_leave_its_folder(name, folder, tmp_path):
    base = shutil.copytree(folder / "base", tmp_path / "base")
    index = json.loads((base / INDEX).read_text())
    index["weight_map"][Q] = name
    (base / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"is no index of weights \(weight_map.\S*q_proj.weight leaves the folder"):
        Checkpoint(base)


BIN = {
    "integer key": {3: torch.ones(2)},
    "sparse": {"w": torch.eye(3).to_sparse()},
    "meta": {"w": torch.ones(2, device="meta")},
    "quantized": {"w": torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)},
    "nested": {"w": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])},
}


@pytest.mark.parametrize("kind", BIN)
@pytest.mark.filterwarnings("ignore")
def test_bin_files_hold_plain_tensors(kind, tmp_path):
    torch.save(BIN[kind], tmp_path / "model.bin")
    with pytest.raises(
        ValueError, match=r"model\.bin holds \w+, which is no plain tensor by name|model\.bin calls \S+"
    ):
        load_bin(tmp_path / "model.bin", "model.bin", map_location="cpu")
