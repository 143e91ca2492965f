"""What the plugins share, and what they say where their tool is not installed."""

import importlib
import sys

import pytest
import torch
from datasets import Dataset
from pairs import IDS, drift, load
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from drift_peft import telemetry
from drift_peft.integrations.settings import PluginSettings
from drift_peft.integrations.steer import SteerCallback

TOOLS = {"axolotl": "axolotl", "ms_swift": "swift", "llama_factory": "llamafactory"}  # file -> what it imports
REFUSED = [
    (
        {"drift_prior": "p", "drift_alhpa": 0.3},
        "'drift_alhpa' is no setting of drift_peft; did you mean drift_alpha?",
    ),
    ({"drift_steps": 3, "drift_prior": "p"}, "'drift_steps' is no setting"),  # DriftConfig's own count
    ({"drift_prior": "p", "drift_alpha": -1.0}, "set drift_alpha=1.0"),
    ({"drift_alpha": 0.3}, "drift_prior is missing"),
    ({"lora_r": 16}, "drift_prior is missing"),
    ({"drift_alpha": 0.3, "drift_keep": "k"}, "drift_prior is missing"),
    ({"drift_prior": "p", "drift_keep_weight": 1.0}, "drift_keep is missing"),
]


@pytest.mark.parametrize("name", TOOLS)
def test_without_the_tool_one_sentence_says_so(name, monkeypatch):
    monkeypatch.setitem(sys.modules, TOOLS[name], None)
    monkeypatch.delitem(sys.modules, f"drift_peft.integrations.{name}", raising=False)
    with pytest.raises(
        ImportError, match=f"drift_peft.integrations.{name} .* cannot be imported .*: install .* beside"
    ):
        importlib.import_module(f"drift_peft.integrations.{name}")


@pytest.mark.parametrize(("values", "told"), REFUSED, ids=[told for _, told in REFUSED])
def test_settings_that_are_refused(values, told):
    with pytest.raises(ValueError) as error:
        PluginSettings.read(values)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_the_keys_are_the_fields_of_drift_config_and_the_arguments_of_keep():
    values = {"drift_prior": "p", "drift_sketch": None, "drift_keep": "k", "drift_keep_bound": None, "lora_r": 16}
    settings = PluginSettings.read(values)
    assert settings.guidance == {"prior": "p", "drift_sketch": None}
    assert settings.keeping == {"keep_set": "k", "bound": None}
    assert settings.config(r=3).drift_sketch is None and settings.config(r=3).r == 3
    held = PluginSettings.read({"drift_target": "base", "drift_scale": "decoupled"})  # which needs no prior
    assert held.steers and not held.keeps


OPTIONS = {"max_steps": 2, "logging_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
DATA = Dataset.from_dict({"input_ids": IDS.tolist(), "labels": IDS.tolist()})
TARGETS = ["q_proj", "up_proj"]
LORA = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS}


def trainer(folder, output, model, **keys):
    """A Trainer that a tool has made of a model which it has wrapped, with these keys in its file."""
    settings = PluginSettings.read({"drift_prior": str(folder / "prior.safetensors"), **keys})
    callback = SteerCallback(settings, processor=lambda: pytest.fail("nothing is kept"))
    return Trainer(model, TrainingArguments(output, **OPTIONS), train_dataset=DATA, callbacks=[callback])


@pytest.mark.parametrize("full", [False, True])
def test_a_trainer_with_the_callback_is_steered_at_every_step_and_logs_it(folder, tmp_path, full):
    model = load(folder, "llama")
    if not full:
        model = get_peft_model(model, LoraConfig(**LORA))
    run = trainer(folder, tmp_path, model)
    run.train()
    assert telemetry(run.model)["guided_steps"] == 2
    assert [logs["drift/guided_steps"] for logs in run.state.log_history[:2]] == [1, 2]


@pytest.mark.parametrize("drift_start", [0.0, 0.5])
def test_a_new_adapter_has_the_start_of_a_drift_config_and_a_restart_its_weights(folder, tmp_path, drift_start):
    def model():
        torch.manual_seed(1)
        return get_peft_model(load(folder, "llama"), LoraConfig(**LORA))

    def factors(run):
        return [p.detach().clone() for name, p in run.model.named_parameters() if "lora_" in name]

    run = trainer(folder, tmp_path, model(), drift_start=drift_start)
    ours = get_peft_model(load(folder, "llama"), drift(folder, drift_start=drift_start, target_modules=TARGETS))
    same = dict(ours.named_parameters())
    assert all(torch.equal(p, same[name]) for name, p in run.model.named_parameters() if "lora_" in name)
    run.train()
    trained = factors(run)
    again = trainer(folder, tmp_path, model(), drift_start=drift_start)
    again.train(resume_from_checkpoint=True)  # which has all its steps
    assert telemetry(again.model)["guided_steps"] == 2
    assert all(torch.equal(a, b) for a, b in zip(trained, factors(again), strict=True))


@pytest.mark.parametrize("kind", ["trained in full", "trained before", "with a start of its own"])
def test_a_part_of_delta_is_for_a_new_adapter(folder, tmp_path, kind):
    model = load(folder, "llama")
    if kind != "trained in full":
        start = "gaussian" if kind == "with a start of its own" else True
        model = get_peft_model(model, LoraConfig(init_lora_weights=start, **LORA))
    if kind == "trained before":
        trainer(folder, tmp_path, model).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"^drift_start=0\.5 is for a new LoRA adapter .*: leave drift_start out, or"):
        trainer(folder, tmp_path, model, drift_start=0.5)
    trainer(folder, tmp_path, model)  # without it, what is there is steered from where it is
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_what_has_no_prior_is_held_where_it_starts(folder, tmp_path):
    model = get_peft_model(load(folder, "llama"), LoraConfig(**LORA))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings = PluginSettings.read({"drift_scale": "decoupled", "drift_target": "base", "drift_alpha": 10.0})
    settings.guide(model)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert telemetry(model)["guided_steps"] == 0  # and is steered


def test_a_loop_that_makes_no_trainer_with_the_callback_does_not_begin():
    """As LLaMA-Factory's PPO: it makes its own handler of callbacks."""
    callback = SteerCallback(PluginSettings.read({"drift_prior": "p"}), processor=lambda: None)
    with pytest.raises(RuntimeError, match=r"^Nothing was steered or kept: .* leave out the drift_… keys"):
        CallbackHandler([callback], None, None, None, None).on_train_begin(None, TrainerState(), TrainerControl())


@pytest.mark.parametrize("ours", [True, False])
def test_an_adapter_is_trained_further_under_the_settings(folder, tmp_path, ours):
    config = drift(folder) if ours else LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(load(folder, "llama"), config).save_pretrained(tmp_path)
    settings = PluginSettings.read({"drift_prior": str(folder / "prior.safetensors"), "drift_alpha": 0.2})
    model = settings.load(load(folder, "llama"), str(tmp_path))
    assert telemetry(model)["guided_steps"] == 0 and any(p.requires_grad for p in model.parameters())
    if ours:
        assert model.peft_config["default"].drift_alpha == 0.2


def test_a_trainer_with_the_callback_is_kept(monkeypatch):
    """With the processor, which is asked for only then."""
    told = {}
    monkeypatch.setattr("drift_peft.integrations.settings.keep", lambda model, **said: told.update(said, model=model))
    settings = PluginSettings.read({"drift_keep": "k.safetensors", "drift_keep_weight": 0.5})
    SteerCallback(settings, processor=lambda: "processor").on_init_end(None, None, None, model="model")
    assert told == {"model": "model", "processor": "processor", "keep_set": "k.safetensors", "weight": 0.5}
