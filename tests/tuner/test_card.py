"""The model card of an adapter: it fills itself in, and leaves alone what somebody wrote."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from pairs import drift, load, train
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

import drift_peft.demo
from drift_peft import DriftConfig, ReasoningPrior, build_prior, keep, make_keep_set, merge_baseline
from drift_peft.cli import main
from drift_peft.demo.world import Digits

CHECKPOINTS = Path(drift_peft.demo.__file__).parent / "checkpoints"
SECTION = "<!-- drift_peft: "


@pytest.fixture
def folder(pairs):
    return pairs("llama")


def saved(folder, output, **settings):
    model = get_peft_model(load(folder, "llama"), drift(folder, **settings))
    train(model).save_pretrained(output)
    return ModelCard.load(output / "README.md")


def rows(card):
    return dict(re.findall(r"^\| (.+?) \| (.*) \|$", card.text, re.M))


def test_it_says_what_the_adapter_is(folder, tmp_path):
    card = saved(folder, tmp_path, use_rslora=True, drift_alpha=0.3, drift_modules="q_proj|k_proj", drift_spectrum=0)
    prior = ReasoningPrior.load(folder / "prior.safetensors")
    assert rows(card) == {
        "base": "base",
        "expert": "expert",
        "prior": f"prior.safetensors (SHA-256 {prior.sha256[:16]})",
        "training data": "not recorded",
        "LoRA": "r = 4, alpha = 8, rank-stabilized",
        "start": "the main directions of Δ",
        "guidance": r"adaptive toward residual, strength 0.3, spectrum = 0, modules = q_proj\|k_proj",
        "guided optimizer steps": "3",
    }
    assert "# LoRA adapter for base, steered toward expert\n" in card.text
    assert "the gradient of the adapter was biased toward what" in card.text
    assert "[More Information Needed]" not in card.text and "- PEFT " in card.text
    assert card.data.tags == sorted({"drift-peft", "lora", *card.data.tags}) and card.data.library_name == "peft"


@pytest.mark.parametrize(
    ("settings", "start"), [({"drift_start": 0.5}, "0.5 of Δ"), ({"init_lora_weights": "gaussian"}, None)]
)
def test_it_says_where_the_adapter_started(folder, tmp_path, settings, start):
    assert rows(saved(folder, tmp_path, **settings)).get("start") == start


def test_it_names_what_is_trained_in_full_beside_the_factors(folder, tmp_path):
    card = saved(folder, tmp_path, target_modules=["q_proj"], modules_to_save=["mlp", "norm"])
    assert rows(card)["trained in full"] == "mlp, norm"


def test_its_code_runs(folder, tmp_path):
    card = saved(folder, tmp_path)
    (python,) = re.findall(r"```python\n(.*?)```", card.text, re.S)
    names = {"vlm": load(folder, "llama")}
    exec(python.replace("path/or/hub-id", str(tmp_path)), names)
    assert isinstance(names["model"], PeftModel)
    (command,) = re.findall(r"```\n(drift-peft merge .*)\n```", card.text)
    assert command == "drift-peft merge --base base --adapter path/or/hub-id -o merged --verify"


@pytest.mark.parametrize(
    ("settings", "expert", "method"),
    [
        ({"drift_target": "factors"}, True, "after each optimizer step the adapter went a part of the way to what"),
        ({"drift_target": "base"}, True, "after each optimizer step the adapter was drawn back"),
        ({"drift_target": "base", "prior": None}, False, "after each optimizer step the adapter was drawn back"),
    ],
)
def test_it_says_what_the_guidance_did(folder, tmp_path, settings, expert, method):
    settings = {"prior": folder / "prior.safetensors", "drift_scale": "decoupled", **settings}
    model = get_peft_model(load(folder, "llama"), DriftConfig(r=4, **settings))
    train(model).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert method in card.text
    assert rows(card)["expert"] == ("expert" if expert else "not recorded")
    assert rows(card)["prior"].startswith("prior.safetensors (" if expert else "none")
    assert ("steered toward" in card.text) == (settings["drift_target"] == "factors")


@pytest.mark.parametrize("prior", [True, False])
def test_at_strength_0_it_speaks_of_no_guidance(prior, folder, tmp_path):
    """Of the prior, if the adapter started in it."""
    config = drift(folder, drift_alpha=0) if prior else DriftConfig(drift_alpha=0, r=4, lora_alpha=8)
    train(get_peft_model(load(folder, "llama"), config)).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.text.count(SECTION) == 1 and rows(card)["LoRA"] == "r = 4, alpha = 8"
    assert not {"guidance", "guided optimizer steps"} & {*rows(card)} and "DRIFT]" not in card.text
    assert ("expert" in rows(card)) == ("prior" in rows(card)) == prior
    told = "without guidance, from a start in the main directions of what" if prior else "without a prior. The adapter"
    assert f"Trained by plain LoRA fine-tuning, {told}" in card.text and "steered toward" not in card.text


def test_it_says_that_the_base_is_a_merged_one_and_how_to_make_it_again(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    merge_baseline("task_arithmetic", folder / "expert", folder / "base", "base", scale=0.5, progress=False)
    made = (tmp_path / "base" / "model.safetensors").read_bytes()
    model = get_peft_model(load(Path(), "llama"), drift(folder))
    train(model).save_pretrained(tmp_path / "adapter")
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    words = "base + 0.5·(expert − base)"
    assert rows(card)["base"] == f"base, which is {words}"
    assert f"The adapter belongs to this base, to {words}, and to no other." in card.text
    (command,) = re.findall(r"```\n(drift-peft merge-baseline .*)\n```", card.text)
    (tmp_path / "base").rename(tmp_path / "before")
    for role in ("expert", "base"):  # which the card does not know the place of
        command = command.replace(f"--{role} {role}", f"--{role} {folder / role}")
    assert main(command.split()[1:]) == 0
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == made


def test_a_combined_prior_names_all_its_experts(folder, tmp_path):
    prior = ReasoningPrior.load(folder / "prior.safetensors")
    other = prior.truncate(1, tmp_path / "other")
    other.metadata["expert"] = {"id": "org/coder", "revision": "0a1b"}
    once = ReasoningPrior.combine({prior: 0.6, other: 0.2}, tmp_path / "once")
    ReasoningPrior.combine({once: 1, prior: 0.2}, tmp_path / "twice")
    get_peft_model(load(folder, "llama"), DriftConfig(prior=tmp_path / "twice", r=4)).save_pretrained(tmp_path / "a")
    assert rows(ModelCard.load(tmp_path / "a" / "README.md"))["expert"] == "expert and org/coder"


def test_every_save_writes_the_section_anew_and_once(folder, tmp_path):
    model = get_peft_model(load(folder, "llama"), drift(folder))
    texts = []
    for steps in (0, 0, 2):
        train(model, steps).save_pretrained(tmp_path)
        texts.append((tmp_path / "README.md").read_text())
        assert not list(tmp_path.glob("*.tmp"))
    assert texts[0] == texts[1] == texts[2].replace("steps | 2 |", "steps | 0 |")
    assert texts[0].count(SECTION) == texts[0].count("# LoRA adapter") == texts[0].count("### Framework versions") == 1


def test_what_somebody_wrote_stays(folder, tmp_path):
    """Around our section, in a card without one, and in a template that somebody has begun to fill in."""
    model = get_peft_model(load(folder, "llama"), drift(folder))
    readme = tmp_path / "README.md"
    model.save_pretrained(tmp_path)
    card = ModelCard.load(readme)
    card.data["license"] = "mit"
    card.text = f"\nMine, before.\n{card.text}\nMine, after: \\1 and {{expert}}."
    card.save(readme)
    for steps in (1, 2):
        train(model, 1).save_pretrained(tmp_path)
        again = ModelCard.load(readme)
        assert again.data.license == "mit" and "drift-peft" in again.data.tags
        assert again.text == card.text.replace("steps | 0 |", f"steps | {steps} |")

    readme.write_text("---\nlicense: mit\n---\n# My adapter\n\nMore on it.\n")
    model.save_pretrained(tmp_path)
    again = readme.read_text()
    assert again.count(SECTION) == 1 and "# My adapter\n\nMore on it.\n" in again and "license: mit" in again

    readme.unlink()
    get_peft_model(load(folder, "llama"), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    begun = readme.read_text().replace("Model Card for Model ID", "Model Card for my adapter")
    readme.write_text(begun)
    model.save_pretrained(tmp_path)
    again = ModelCard.load(readme).text
    assert again.count(SECTION) == 1 and again.endswith(ModelCard(begun).text.lstrip())


def test_an_adapter_with_a_name_has_a_section_in_the_card_above_its_folder(folder, tmp_path):
    model = get_peft_model(load(folder, "llama"), drift(folder), adapter_name="reasoning")
    train(model).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert rows(card)["guided optimizer steps"] == "3" and "[More Information Needed]" not in card.text
    assert "# LoRA adapter reasoning for base, steered" in card.text
    (python,) = re.findall(r"```python\n(.*?)```", card.text, re.S)
    names = {"vlm": load(folder, "llama")}
    exec(python.replace("path/or/hub-id", str(tmp_path)), names)
    assert isinstance(names["model"], PeftModel) and "--adapter path/reasoning -o" in card.text

    model.add_adapter("default", drift(folder, drift_alpha=0.3))
    for steps in (1, 2):
        train(model, 1).save_pretrained(tmp_path)
        text = (tmp_path / "README.md").read_text()
        assert text.count(SECTION[:-2]) == 2 and text.count("# LoRA adapter") == 2
        assert f"steps | {3 + steps} |" in text and "steps | 0 |" in text and "strength 0.3" in text


def test_a_card_above_that_is_no_adapters_stays(folder, tmp_path):
    (tmp_path / "README.md").write_text("# My project\n")
    drift(folder).save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "README.md").read_text() == "# My project\n"


@pytest.mark.parametrize("content", [b"---\n: [\n---\n", b"---\n- a\n---\n", b"\xff\xfe\x00"])
def test_what_is_no_card_stays(folder, tmp_path, content):
    """Above the folder it is somebody's README; inside it is ours to fill in, and that we cannot is said."""
    (tmp_path / "README.md").write_bytes(content)
    drift(folder).save_pretrained(tmp_path / "adapter")
    with pytest.warns(UserWarning, match=r"README.md is no model card, since its metadata cannot be read"):
        drift(folder).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == content
    assert {file.name for file in (tmp_path / "adapter").iterdir()} == {"adapter_config.json", "drift_config.json"}


def test_a_folder_without_a_card_gets_none(folder, tmp_path):
    drift(folder).save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"adapter_config.json", "drift_config.json"}


def test_what_goes_on_keeps_what_is_known(folder, tmp_path):
    """An adapter that is loaded to train on knows its prior's expert again."""
    saved(folder, tmp_path)
    config = DriftConfig.from_pretrained(tmp_path)
    model = PeftModel.from_pretrained(load(folder, "llama"), tmp_path, config=config, is_trainable=True)
    train(model, 2).save_pretrained(tmp_path)
    found = rows(ModelCard.load(tmp_path / "README.md"))
    assert found["expert"] == "expert" and found["guided optimizer steps"] == "5"


def test_a_vlms_card_is_ready_for_the_hub(tmp_path, monkeypatch):
    """Trained by Trainer and kept: the card says with what, shows the run, has no path, and its code runs."""
    monkeypatch.chdir(tmp_path)
    vlm, rows_of_digits = CHECKPOINTS / "vlm", Digits("train")
    prior = build_prior(CHECKPOINTS / "reasoner", vlm, tmp_path / "p.safetensors", rank=4, progress=False)
    images = [rows_of_digits.draw("7-3", np.random.default_rng(0))]
    how = {"samples": 2, "max_new_tokens": 4, "top_k": 4, "progress": False}
    keep_set = make_keep_set(vlm, images, tmp_path / "k.safetensors", [("read", "read?"), ("at", "at1?")], **how)
    model = AutoModelForImageTextToText.from_pretrained(vlm, dtype=torch.float32)
    model = get_peft_model(model, DriftConfig(prior=prior.source, r=4, rank_pattern={"q_proj": 2}))
    keep(model, keep_set, AutoProcessor.from_pretrained(vlm), batch_size=2)
    sample = {"input_ids": torch.arange(10, 20), "labels": torch.arange(10, 20)}
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-3}
    settings |= {"max_steps": 1, "report_to": [], "save_strategy": "no", "use_cpu": True, "warmup_steps": 1}
    Trainer(model, TrainingArguments("run", **settings), train_dataset=[sample] * 4).train()
    model.save_pretrained("adapter")
    assert "](telemetry.png)" not in Path("adapter", "README.md").read_text()
    Path("adapter", "telemetry.png").touch()
    model.create_or_update_model_card("adapter")

    text = Path("adapter", "README.md").read_text()
    card = ModelCard(text)
    assert str(tmp_path) not in text and str(CHECKPOINTS) not in text and "/vlm" not in text
    assert card.data.pipeline_tag == "image-text-to-text" and card.data.base_model is None
    found = rows(card)
    assert found["training"].startswith("1 steps of 4 samples, learning rate 0.001 (linear, 1 warm-up steps), adamw")
    assert found["kept near"] == (
        f"2 answers of vlm itself (k.safetensors, SHA-256 {keep_set.sha256[:16]}), 2 every step, weight 1, bound 1"
    )
    assert "](telemetry.png)" in card.text and "--enable-lora" not in card.text  # vLLM takes no rank pattern
    (python,) = re.findall(r"```python\n(.*?)```", card.text, re.S)
    Path("vlm").symlink_to(vlm)
    names = {}
    exec(python.replace("path/or/hub-id", "adapter"), names)
    assert isinstance(names["model"], PeftModel) and type(names["processor"]).__name__ == keep_set.metadata["processor"]


def test_a_hub_base_keeps_its_name(folder, tmp_path):
    """Also where transformers was given its snapshot in the cache."""
    model = get_peft_model(load(folder, "llama"), drift(folder))
    base = model.get_base_model()
    base.config._name_or_path = model.peft_config["default"].base_model_name_or_path = (
        "/cache/hub/models--org--vlm/snapshots/0a1b"
    )
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "org/vlm" and "base_model:adapter:org/vlm" in card.data.tags
    assert rows(card)["base"] == "org/vlm" and "/cache" not in str(card)
