"""The card of a merged model says what was merged, without a path of this disk, and its call makes the same again."""

import re
import shutil

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from drift_peft import make_keep_set, merge_adapter, merge_baseline, transplant
from drift_peft.checkpoints import language_model_targets
from drift_peft.demo.compare import CHECKPOINTS, QUESTIONS
from drift_peft.demo.train import load
from drift_peft.demo.world import Digits, make_samples

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`vlm`, `reasoner` and `base`, the demo's, and `adapter`, a LoRA adapter of the VLM."""
    folder = tmp_path_factory.mktemp("disk-of-mine")
    for source in CHECKPOINTS.iterdir():
        (folder / source.name).symlink_to(source, target_is_directory=True)
    model, _ = load(folder / "vlm")
    model = get_peft_model(model, LoraConfig(r=2, target_modules=language_model_targets(model)))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder / "adapter")
    return folder


def by_adapter(folder, **settings):
    merge_adapter(folder / "vlm", folder / "adapter", folder / "made", overwrite=True, progress=False, **settings)


def by_baseline(folder, method, **settings):
    given = {"reference": folder / "base"} if "scale" not in settings else {}
    models = folder / "reasoner", folder / "vlm", folder / "made"
    merge_baseline(method, *models, overwrite=True, progress=False, **given, **settings)


def by_transplant(folder, expert, **settings):
    models = folder / expert, folder / "vlm", folder / "made"
    transplant(*models, merged=True, overwrite=True, progress=False, **settings)


WAYS = {
    "adapter": (by_adapter, {}),
    "task arithmetic": (by_baseline, {"method": "task_arithmetic", "scale": 0.5, "only_layers": range(1, 3)}),
    "ties": (by_baseline, {"method": "ties", "modules": ["attn", "mlp"]}),
    "NumPy's numbers": (
        by_baseline,
        {
            "method": "task_arithmetic",
            "weights": np.array([0.8, 0.3]),
            "only_layers": np.arange(4),
            "skip_first": np.int64(1),
        },
    ),
    "dare": (by_baseline, {"method": "dare_linear", "seed": 3, "density": 0.4}),
    "layer swap": (by_baseline, {"method": "layer_swap", "skip_first": 0}),
    "transplanted fine-tune": (by_transplant, {"expert": "reasoner", "scale": 0.3}),
    "transplanted adapter": (by_transplant, {"expert": "adapter", "scale": 0.3}),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_call_in_the_card_makes_the_same_model_again(way, folder, monkeypatch):
    merge, settings = WAYS[way]
    merge(folder, **settings)
    made, card = load_file(folder / "made" / WEIGHTS), ModelCard.load(folder / "made" / "README.md")
    assert str(folder) not in card.content and folder.name not in card.content
    (call,) = re.findall(r"```python\n(from drift_peft .*?)\n```", card.content, re.DOTALL)
    assert call.count("output='made'") == 1
    monkeypatch.chdir(folder)
    exec(call.replace("'made'", "'again', overwrite=True, progress=False"), {})  # as a user would
    again = load_file(folder / "again" / WEIGHTS)
    assert made.keys() == again.keys() and all(torch.equal(made[name], again[name]) for name in made)


def test_the_card_loads_the_model(folder, monkeypatch):
    by_adapter(folder)
    card = ModelCard.load(folder / "made" / "README.md")
    assert "The LoRA adapter adapter, merged into vlm." in card.content
    (use,) = re.findall(r"## Use\n\n```python\n(.*?)\n```", card.content, re.DOTALL)
    monkeypatch.chdir(folder)
    names = {}
    exec(use.replace("path/or/hub-id", "made").replace(', device_map="auto"', ""), names)
    assert type(names["model"]).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert names["processor"].tokenizer is not None


def test_models_of_the_hub_are_named_by_their_ids_and_commits(folder, tmp_path, hub):
    commits = [hub.add(f"org/{name}", {"README.md": b"---\nlicense: mit\n---\n"}) for name in ("expert", "vlm")]
    parts = zip(("expert", "vlm"), commits, strict=True)
    models = [tmp_path / f"me@work/hub/models--org--{name}/snapshots/{commit}" for name, commit in parts]
    for snapshot, source in zip(models, ("reasoner", "vlm"), strict=True):
        snapshot.parent.mkdir(parents=True)
        snapshot.symlink_to((folder / source).resolve(), target_is_directory=True)  # without a card
    merge_baseline("task_arithmetic", *models, tmp_path / "made", scale=0.5, progress=False)
    card = ModelCard.load(tmp_path / "made" / "README.md")
    assert card.data.base_model == ["org/vlm", "org/expert"] and card.data.base_model_relation == "merge"
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "image-text-to-text"
    expert, vlm = commits
    assert f"base='org/vlm@{vlm}'" in card.content and f"expert='org/expert@{expert}'" in card.content
    assert card.data.license == "mit" and "- base org/vlm: mit\n- expert org/expert: mit" in card.content


@pytest.mark.parametrize("own", ["license: apache-2.0", "license: other\nlicense_name: Llama Licence", "language: en"])
def test_licences(folder, tmp_path, own):
    for name, source, card in (("vlm", "vlm", "license: apache-2.0"), ("expert", "reasoner", own)):
        shutil.copytree(folder / source, tmp_path / name)
        (tmp_path / name / "README.md").write_text(f"---\n{card}\n---\n")
    merge_baseline(
        "task_arithmetic", tmp_path / "expert", tmp_path / "vlm", tmp_path / "made", scale=0.5, progress=False
    )
    card = ModelCard.load(tmp_path / "made" / "README.md")
    found = {"license: apache-2.0": "apache-2.0", "language: en": "not stated in its card"}.get(own, "Llama Licence")
    assert f"- base vlm: apache-2.0\n- expert expert: {found}" in card.content
    assert card.data.license == ("apache-2.0" if found == "apache-2.0" else "other")
    kind = {"apache-2.0": None, "Llama Licence": "llama-licence"}.get(found, "unstated")
    assert card.data.license_name == (kind and f"apache-2.0-and-{kind}")
    merge_adapter(tmp_path / "vlm", folder / "adapter", tmp_path / "mine", force=True, progress=False)
    card = ModelCard.load(tmp_path / "mine" / "README.md")
    assert card.data.license == "apache-2.0" and "- base vlm: apache-2.0" in card.content  # whose adapter, says its own


def test_a_folder_is_named_as_it_is(folder, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    (tmp_path / "vlm😀@v1").symlink_to((folder / "vlm").resolve(), target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    merge_adapter("vlm😀@v1", folder / "adapter", "runs/merged", force=True, progress=False)  # no id of the hub
    card = ModelCard.load("runs/merged/README.md")
    assert card.data.base_model is None and "base='vlm😀@v1'" in card.content and "force=True" in card.content
    assert "# merged\n" in card.content and "output='merged'" in card.content


def test_what_a_scale_costs_stands_there(folder, tmp_path):
    digits = make_samples(4, ["read"], np.random.default_rng(0), Digits("train"))
    settings = {"samples": 4, "max_new_tokens": 4, "top_k": 4, "progress": False}
    make_keep_set(folder / "vlm", [s.image for s in digits], tmp_path / "keep.safetensors", QUESTIONS, **settings)
    given = {"keep": tmp_path / "keep.safetensors", "scale": "auto", "budget": 1.0, "merged": True, "progress": False}
    report = transplant(folder / "adapter", folder / "vlm", tmp_path / "made", **given)
    card = ModelCard.load(tmp_path / "made" / "README.md")
    assert "nats a token away from it" in card.content and f"scale={report.scale}," in card.content


def test_a_merged_language_model_has_a_tokenizer(folder, tmp_path):
    merge_baseline(
        "task_arithmetic", folder / "reasoner", folder / "base", tmp_path / "made", scale=0.5, progress=False
    )
    card = ModelCard.load(tmp_path / "made" / "README.md")
    assert card.data.pipeline_tag is None and "AutoModelForCausalLM, AutoTokenizer" in card.content
