"""Training that goes on from a checkpoint with something else than before: said once, and done as it is set now."""

import warnings

import pytest
import torch
from keep_sets import make, save_folder
from pairs import IDS, drift, load
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

from drift_peft import DriftConfig, build_prior, keep, telemetry


def trainer(model, folder, steps):
    args = TrainingArguments(folder, max_steps=steps, save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True)
    return Trainer(model, args, train_dataset=[{"input_ids": row, "labels": row} for row in IDS])


@pytest.fixture(scope="module")
def checkpoint(pairs, tmp_path_factory):
    """Of two steps, by Trainer."""
    folder = tmp_path_factory.mktemp("run")
    trainer(get_peft_model(load(pairs("llama"), "llama"), drift(pairs("llama"))), folder, 2).train()
    return folder / "checkpoint-2"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"drift_alpha": 2.0},
            r"checkpoint-2' was trained with drift_alpha=1.0, which is 2.0 now: unless that is meant",
        ),
        (
            {"drift_modules": ["attn"], "drift_rank": 2},
            r"drift_modules=None, which is \['attn'\] now, and with drift_rank",
        ),
        ({"prior": "other"}, r"was trained with another prior than '.*other.safetensors': unless"),
    ],
)
def test_other_settings_than_the_checkpoints(pairs, checkpoint, tmp_path, changes, told):
    folder = pairs("llama")
    if "prior" in changes:
        changes = {"prior": tmp_path / "other.safetensors"}
        build_prior(folder / "expert", folder / "base", changes["prior"], rank=2, progress=False)
    settings = {"prior": folder / "prior.safetensors", "drift_alpha": 1.0, "r": 4, "lora_alpha": 8} | changes
    model = get_peft_model(load(folder, "llama"), DriftConfig(**settings, task_type="CAUSAL_LM"))
    with pytest.warns(UserWarning, match=told):
        trainer(model, tmp_path, 4).train(resume_from_checkpoint=str(checkpoint))
    assert telemetry(model)["guided_steps"] == 4


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"lora_alpha": 64}, "lora_alpha=8, which is 64 now"),
        ({"use_rslora": True}, "use_rslora=False, which is True now"),
        ({"drift_start": 0.5}, r"drift_start=0\.0, which is 0\.5 now"),
    ],
)
def test_what_makes_another_adapter_of_the_same_weights(pairs, tmp_path, changes, told):
    folder = pairs("llama")
    get_peft_model(load(folder, "llama"), drift(folder)).save_pretrained(tmp_path)
    model = get_peft_model(load(folder, "llama"), DriftConfig(**{**drift(folder).to_dict(), **changes}))
    with pytest.warns(UserWarning, match=f"was trained with {told}: unless that is meant"):
        model.load_adapter(str(tmp_path), "default", is_trainable=True)
    assert model.peft_config["default"].drift_start == 0  # that of the weights that are there now


@pytest.mark.parametrize("changes", [{"r": 3}, {"rank_pattern": {"q_proj": 2}}])
def test_another_rank_is_refused_before_a_weight_is_loaded(pairs, tmp_path, changes):
    folder = pairs("llama")
    get_peft_model(load(folder, "llama"), drift(folder)).save_pretrained(tmp_path)
    model = get_peft_model(load(folder, "llama"), DriftConfig(**{**drift(folder).to_dict(), **changes}))
    ((name, value),) = changes.items()
    with pytest.raises(ValueError, match=rf"has {name}=.*, and the model was wrapped with {name}={value}: wrap it as"):
        model.load_adapter(str(tmp_path), "default", is_trainable=True)
    with pytest.raises(ValueError, match=rf"has {name}=.*: leave out {name}={value}\.$"):
        DriftConfig.from_pretrained(tmp_path, **changes)


def test_the_checkpoints_own_settings(pairs, checkpoint, tmp_path):
    model = get_peft_model(load(pairs("llama"), "llama"), drift(pairs("llama")))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*was trained with")
        trainer(model, tmp_path, 4).train(resume_from_checkpoint=str(checkpoint))
    assert telemetry(model)["guided_steps"] == 4


@pytest.mark.parametrize(
    ("stored", "now"),
    [
        ({"drift_spectrum": "flat"}, {"drift_spectrum": 0.0}),
        ({"drift_modules": ["attn", "mlp"]}, {"drift_modules": ["mlp", "attn"]}),
        ({"drift_modules": ["attn"]}, {"drift_modules": "attn"}),
        ({"drift_sketch": 64}, {"drift_sketch": 32}),  # of drift_norm="weight" alone
    ],
)
def test_settings_that_mean_the_same(pairs, tmp_path, stored, now):
    folder = pairs("llama")
    get_peft_model(load(folder, "llama"), drift(folder, **stored)).save_pretrained(tmp_path)
    model = get_peft_model(load(folder, "llama"), drift(folder, **now))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*was trained with")
        model.load_adapter(str(tmp_path), "default", is_trainable=True)


def test_a_change_by_name_is_meant(pairs, tmp_path, monkeypatch):
    """Wherever the same folder is named from."""
    folder = pairs("llama")
    get_peft_model(load(folder, "llama"), drift(folder)).save_pretrained(tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    config = DriftConfig.from_pretrained("adapter", drift_alpha=0.2)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*was trained with")
        PeftModel.from_pretrained(load(folder, "llama"), "./adapter", config=config, is_trainable=True)


@pytest.mark.parametrize("guided", [True, False])
def test_a_keep_set_that_is_not_given_again(tmp_path, guided):
    folder = save_folder(tmp_path, "qwen2_5_vl")
    make(folder)

    def model(kept):
        torch.manual_seed(0)
        base = AutoModelForImageTextToText.from_pretrained(folder / "base", dtype=torch.float32)
        settings = {"drift_scale": "decoupled", "drift_target": "base"} if guided else {}
        config = (DriftConfig if guided else LoraConfig)(r=2, target_modules=["q_proj"], **settings)
        adapted = get_peft_model(base, config)
        processor = AutoProcessor.from_pretrained(folder / "base")
        return keep(adapted, folder / "keep.safetensors", processor) if kept else adapted

    def optimizer(model, state=None):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        if state is not None:
            optimizer.load_state_dict(state)
        return optimizer

    def step(model, optimizer):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        return optimizer.state_dict()

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*nothing keeps its model")
        first, fresh = model(True), model(False)
        state = step(first, optimizer(first))
        step(fresh, optimizer(fresh))  # which never was kept
        again = model(True)
        step(again, optimizer(again, state))
    lost = model(False)
    resumed = optimizer(lost, state)
    with pytest.warns(
        UserWarning, match=r"goes on from steps that were kept .* call keep\(model, keep_set, processor\)"
    ):
        step(lost, resumed)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*nothing keeps its model")
        step(lost, resumed)  # said once
        ended = keep(model(False), None)  # as the user says
        step(ended, optimizer(ended, state))
    late = model(False)
    stepped = optimizer(late)
    step(late, stepped)  # as where a distributed checkpoint is loaded
    stepped.load_state_dict(state)
    with pytest.warns(UserWarning, match="now nothing keeps its model"):
        step(late, stepped)
