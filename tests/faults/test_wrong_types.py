"""Wrong types in every JSON document that others write: a sentence, whatever it is."""

import copy
import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file
from steered_files import Q, save_steered

from drift_peft import DriftConfig, KeepSet, ReasoningPrior
from drift_peft.checkpoints.checkpoint import INDEX, Checkpoint
from drift_peft.checkpoints.dequantized import quantization_in_training
from drift_peft.checkpoints.lora import open_expert
from drift_peft.prior.combine import formula

FEW = 25  # values that are put in somewhere, where not each is put into each place
WRONG = [None, [], {}, "", "x", 0, -1, 1.5, float("nan"), True, [None], {"a": None}, [[]], "\ud800", 10**30]
WRONG += [{"a": {"b": [1]}}, ["x"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_steered(tmp_path_factory.mktemp("schema"))


def places(content, path=()):
    """The path of each value in a JSON document; of lists, the first two entries."""
    yield path
    parts = (
        content.items() if isinstance(content, dict) else enumerate(content[:2] if isinstance(content, list) else ())
    )
    for key, part in parts:
        yield from places(part, (*path, key))


def put(content, path, value):
    if not path:
        return value
    content = copy.deepcopy(content)
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return content


def read_base(folder):
    opened = Checkpoint(folder / "base")
    assert opened.language_model and opened.model is not None
    opened.tensor(Q)


def read_steered(folder):
    DriftConfig.from_pretrained(folder / "steered")
    quantization_in_training(folder / "steered", Checkpoint(folder / "base"))


JSON = {
    "config.json": ("base/config.json", read_base),
    "index": (f"base/{INDEX}", read_base),
    "adapter_config.json": ("adapter/adapter_config.json", lambda folder: open_expert(folder / "adapter").tensor(Q)),
    "drift_config.json": ("steered/drift_config.json", read_steered),
}


def attack(content, ledger, fault, read):
    """Put each wrong value into each place, one at a time: read(document) ends well or in a sentence."""
    cases, broken = [(path, value) for path in places(content) for value in WRONG], []
    for path, value in cases if ledger.seconds is not None else random.Random(0).sample(cases, FEW):
        said = None
        try:
            read(json.dumps(put(content, path, value)))  # what is not looked at may be anything
        except Exception as error:
            said = error
        held = said is None or (isinstance(said, (ValueError, OSError)) and is_sentence(str(said)))
        ledger.add(fault, said is not None, held)
        broken += [] if held else [(path, value, said)]
    assert not broken


def is_sentence(message):
    return "\n" not in message and message.count(" ") >= 4


@pytest.mark.parametrize("kind", JSON)
@pytest.mark.filterwarnings("ignore")
def test_wrong_types_are_a_sentence(kind, folder, ledger):
    name, read = JSON[kind]
    file = folder / name
    before = file.read_text()

    def write(document):
        file.write_text(document)
        read(folder)

    try:
        attack(json.loads(before), ledger, f"wrong types in {kind}", write)
    finally:
        file.write_text(before)


def test_wrong_types_in_the_header_of_a_prior(folder, tmp_path, ledger):
    tensors = load_file(folder / "p.safetensors")

    def write(header):
        save_file(tensors, tmp_path / "q.safetensors", metadata={"drift_prior": header})
        prior = ReasoningPrior.load(tmp_path / "q.safetensors")
        assert formula(prior.metadata) and [*prior.values()]
        list(prior.probes())  # a combination has none
        prior.truncate(1, tmp_path / "r.safetensors", overwrite=True)

    header = ReasoningPrior.load(folder / "p.safetensors").metadata
    attack(header, ledger, "wrong types in the header of a prior", write)


def test_wrong_types_in_the_header_of_a_keep_set(tmp_path, ledger):
    tensors = {
        "images": torch.zeros(4, dtype=torch.uint8),
        "image_ends": torch.tensor([4]),
        "samples": torch.zeros(1, 2, dtype=torch.int32),
        "tokens": torch.zeros(2, dtype=torch.int32),
        "token_ends": torch.tensor([2]),
        "top_tokens": torch.zeros(2, 3, dtype=torch.int32),
        "top_logprobs": -torch.ones(2, 3),
    }
    header = {"format": 1, "vlm": {"id": "org/vlm", "revision": None}, "model_type": "llava", "vocabulary": 9, "k": 3}
    header |= {"tokenizer": {"size": 9, "sha256": "0"}, "processor": "P", "image_mode": "RGB", "seed": 0}
    header |= {"prompt_tokens": 5, "ends": [2]}
    header |= {"generation": {"max_new_tokens": 2}, "questions": [["kind", "what?"]], "answers": ["this"]}

    def write(document):
        save_file(tensors, tmp_path / "k.safetensors", metadata={"drift_keep": document})
        keep_set = KeepSet.load(tmp_path / "k.safetensors")
        assert keep_set.kinds and keep_set.image_file(0) and repr(keep_set)

    write(json.dumps(header))
    attack(header, ledger, "wrong types in the header of a keep set", write)
