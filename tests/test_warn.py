"""Warnings point at the user's line, whatever lies between it and what is wrong."""

import re
import warnings
from pathlib import Path

import pytest
import torch
from pairs import make_pair
from peft import LoraConfig, get_peft_model
from tiny import save_layout, tiny_expert, tiny_vlm
from transformers import AutoModelForImageTextToText

import drift_peft
from drift_peft import DriftConfig, ReasoningPrior, build_prior, guide, language_model_targets
from drift_peft.checkpoints import Checkpoint
from drift_peft.warn import first_line

IDS = torch.arange(7, 27).reshape(2, 10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("warn"), "qwen2_5_vl")


@pytest.fixture
def vlm(folder):
    return AutoModelForImageTextToText.from_pretrained(folder / "base", dtype=torch.float32)


def wrap(folder, vlm, **settings):
    settings = {"prior": folder / "prior.safetensors", "r": 4, "task_type": "CAUSAL_LM", **settings}
    return get_peft_model(vlm, DriftConfig(**settings))


def targets_without_a_delta(folder, vlm, tmp_path):
    wrap(folder, vlm, target_modules=["q_proj", "qkv"])


def a_rank_beyond_the_priors(folder, vlm, tmp_path):
    wrap(folder, vlm, r=50)


def guided_by_less(folder, vlm, tmp_path):
    prior = ReasoningPrior.load(folder / "prior.safetensors")
    model = get_peft_model(vlm, LoraConfig(r=4, target_modules=language_model_targets(vlm, prior)))
    guide(model, prior, drift_rank=60)


def the_same_gradients_twice(folder, vlm, tmp_path):
    model = wrap(folder, vlm)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    optimizer.step()


def trained_without_guidance(folder, vlm, tmp_path):
    model = wrap(folder, vlm)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    model.save_pretrained(tmp_path / "adapter")


def a_model_of_two_layouts(folder, vlm, tmp_path):
    vlm.save_pretrained(tmp_path / "model")
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(str(index).replace("'", '"'))
    Checkpoint(tmp_path / "model")


def weights_without_counterpart(folder, vlm, tmp_path):
    vlm = tiny_vlm("mllama")
    expert, _ = tiny_expert("mllama", vlm)
    save_layout(vlm, tmp_path / "vlm")
    save_layout(expert, tmp_path / "expert")
    build_prior(tmp_path / "expert", tmp_path / "vlm", tmp_path / "p.safetensors", rank=4, progress=False)


KINDS = [
    targets_without_a_delta,
    a_rank_beyond_the_priors,
    guided_by_less,
    the_same_gradients_twice,
    trained_without_guidance,
    a_model_of_two_layouts,
    weights_without_counterpart,
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_line_is_the_users(kind, folder, vlm, tmp_path):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        kind(folder, vlm, tmp_path)
    ours = [w for w in seen if re.search("Δ|prior|biased|guidance|holds|counterpart", str(w.message))]
    assert ours and {w.filename for w in ours} == {__file__}
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    called = re.compile(r"get_peft_model|guide|step|save_pretrained|Checkpoint|build_prior")
    assert all(called.search(lines[w.lineno - 1]) for w in ours)


def test_no_file_warns_by_itself():
    """What a fixed stack level would say depends on who calls."""
    for file in Path(drift_peft.__file__).parent.rglob("*.py"):
        assert file.name == "warn.py" or "warnings.warn(" not in file.read_text(encoding="utf-8"), file


def test_the_first_line_of_an_error_says_something():
    assert first_line(OSError(" the disk\nis full")) == "the disk" and first_line(TimeoutError()) == "TimeoutError"
    said = "\nIt needs timm. Install it with pip:\n`pip install timm`. Then restart.\n"  # as transformers says it
    assert first_line(ImportError(said)) == "It needs timm. Install it with pip: `pip install timm`. Then restart."
