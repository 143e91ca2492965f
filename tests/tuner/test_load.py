"""load.py: weights that are loaded bring their count of guided steps, and training that would be plain LoRA is said."""

import copy
import json
import shutil
import warnings

import pytest
import torch
from older import transformers_takes_it
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from drift_peft import DriftConfig, guide, telemetry

ROWS = [{"input_ids": ids, "labels": ids} for ids in torch.arange(7, 63).reshape(7, 8)]


def wrapped(pair):
    return get_peft_model(copy.deepcopy(pair.base), DriftConfig(prior=pair.path, r=2, target_modules=["q_proj"]))


def trainer(pair, output, **settings):
    arguments = TrainingArguments(
        output, per_device_train_batch_size=1, max_steps=4, save_steps=1, learning_rate=1e-2, report_to="none",
        use_cpu=True, disable_tqdm=True, logging_strategy="no", **settings,
    )  # fmt: skip
    return Trainer(wrapped(pair), arguments, train_dataset=ROWS, eval_dataset=ROWS[:1])


@pytest.fixture(scope="module")
def trained(pair, tmp_path_factory):
    """A trainer's folder, whose checkpoints hold a model and no optimizer, and the model that it has loaded at the end:
    the worst one, which is the first."""
    folder = tmp_path_factory.mktemp("trained")
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    run = trainer(pair, folder, eval_strategy="steps", eval_steps=1, save_only_model=True, **best)
    run.train()
    return folder, run


def test_the_best_model_has_its_own_count(trained, tmp_path):
    folder, run = trained
    steps = int(run.state.best_model_checkpoint.rpartition("-")[2])
    assert steps < 4 and DriftConfig.from_pretrained(folder / "checkpoint-4").drift_steps == 4
    assert telemetry(run.model)["guided_steps"] == steps
    run.save_model(tmp_path)
    assert DriftConfig.from_pretrained(tmp_path).drift_steps == steps


def test_a_checkpoint_without_its_optimizer_has_the_count(pair, trained, tmp_path):
    run = trainer(pair, tmp_path)
    run.train(resume_from_checkpoint=str(trained[0] / "checkpoint-3"))
    assert telemetry(run.model)["guided_steps"] == 4
    assert DriftConfig.from_pretrained(tmp_path / "checkpoint-4").drift_steps == 4


def test_a_count_that_was_given_is_kept(pair, trained):
    folder = trained[0] / "checkpoint-2"
    for given, steps in (({}, 2), ({"drift_steps": 0}, 0)):
        config = DriftConfig.from_pretrained(folder, **given)
        model = PeftModel.from_pretrained(copy.deepcopy(pair.base), folder, config=config, is_trainable=True)
        assert telemetry(model)["guided_steps"] == steps
        model.load_adapter(trained[0] / "checkpoint-3", "default")
        assert telemetry(model)["guided_steps"] == 3


def test_a_new_adapter_begins_its_schedule(pair, trained):
    """Wherever the settings were read: no weights came with them. Those that are loaded bring their count."""
    read = DriftConfig.from_pretrained(trained[0] / "checkpoint-3", drift_decay_steps=2)
    by_hand = DriftConfig(prior=pair.path, r=2, target_modules=["q_proj"], drift_steps=50)
    for config in (read, by_hand, wrapped(pair).peft_config["default"], copy.deepcopy(read)):
        steps = config.drift_steps
        model = get_peft_model(copy.deepcopy(pair.base), config)
        assert telemetry(model)["guided_steps"] == 0 and config.drift_steps == steps
        model.load_state_dict(model.state_dict())  # the start, as FSDP spreads it
        assert telemetry(model)["guided_steps"] == 0
        model.load_state_dict({k: v + 0.1 if ".lora_B." in k else v for k, v in model.state_dict().items()})
        assert telemetry(model)["guided_steps"] == steps
    model = get_peft_model(copy.deepcopy(pair.base), read)
    model.peft_config["default"].drift_steps = 1  # it has been trained itself since
    model.load_state_dict({k: v + 0.1 if ".lora_B." in k else v for k, v in model.state_dict().items()})
    assert telemetry(model)["guided_steps"] == 1


@transformers_takes_it
def test_what_transformers_loads_brings_its_count(pair, trained):
    folder = trained[0] / "checkpoint-3"
    model = copy.deepcopy(pair.base)
    model.load_adapter(str(folder), peft_config=DriftConfig.from_pretrained(folder), is_trainable=True)
    assert telemetry(model)["guided_steps"] == 3


def test_a_count_that_is_not_stored_is_none(pair, trained, tmp_path):
    """As `from_pretrained` has it."""
    folder = shutil.copytree(trained[0] / "checkpoint-2", tmp_path / "adapter")
    settings = json.loads((folder / "drift_config.json").read_text(encoding="utf-8"))
    del settings["drift_steps"]
    (folder / "drift_config.json").write_text(json.dumps(settings), encoding="utf-8")
    model = wrapped(pair)
    model.load_adapter(folder, "default", is_trainable=True)
    assert telemetry(model)["guided_steps"] == 0


def test_a_loaded_config_is_for_training(pair, trained):
    """Beside another adapter, and for a new one with the same settings; PEFT stores inference_mode=True."""
    folder = trained[0] / "checkpoint-2"
    model = get_peft_model(copy.deepcopy(pair.base), LoraConfig(target_modules=["v_proj"]))
    model.add_adapter("ours", DriftConfig.from_pretrained(folder))
    model.load_adapter(folder, "ours", is_trainable=True)
    model.set_adapter("ours")
    assert telemetry(model)["guided_steps"] == 2
    new = get_peft_model(copy.deepcopy(pair.base), DriftConfig.from_pretrained(folder, drift_steps=0))
    optimizer = torch.optim.SGD([p for p in new.parameters() if p.requires_grad], lr=1e-2)
    new(input_ids=ROWS[0]["input_ids"][None], labels=ROWS[0]["labels"][None]).loss.backward()
    optimizer.step()
    assert telemetry(new)["guided_steps"] == 1
    config = DriftConfig.from_pretrained(folder)
    served = PeftModel.from_pretrained(copy.deepcopy(pair.base), folder, config=config)
    assert not any(p.requires_grad for p in served.parameters())


def second_adapter(base, folder, is_trainable=False):
    model = get_peft_model(base, LoraConfig(target_modules=["v_proj"]))
    model.load_adapter(folder, "ours", is_trainable)
    model.set_adapter("ours")
    return model


def into_plain_lora(base, folder):
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    model.load_adapter(folder, "default", True)
    return model


def made_trainable(model, how="set_adapter"):
    if how == "set_adapter":
        model.set_adapter("default")
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
    return model


def settings(folder):
    return DriftConfig.from_pretrained(folder)


FOR_INFERENCE = {
    "set_adapter": lambda base, folder: made_trainable(PeftModel.from_pretrained(base, folder)),
    "by hand": lambda base, folder: made_trainable(PeftModel.from_pretrained(base, folder), "by hand"),
    "DriftConfig": lambda base, folder: made_trainable(
        PeftModel.from_pretrained(base, folder, config=settings(folder))
    ),
    "a second adapter": second_adapter,
    "a copy": lambda base, folder: copy.deepcopy(made_trainable(PeftModel.from_pretrained(base, folder))),
    "transformers": lambda base, folder: base.load_adapter(str(folder)) and made_trainable(base, "by hand"),
}
TO_TRAIN = {
    "PeftModel.from_pretrained": lambda base, folder: PeftModel.from_pretrained(base, folder, is_trainable=True),
    "a config": lambda base, folder: PeftModel.from_pretrained(
        base, folder, config=LoraConfig.from_pretrained(folder), is_trainable=True
    ),
    "a second adapter": lambda base, folder: second_adapter(base, folder, is_trainable=True),
    "into plain LoRA": into_plain_lora,
    "transformers": lambda base, folder: base.load_adapter(str(folder), is_trainable=True) and base,
}
WAYS = [("for inference", how) for how in FOR_INFERENCE] + [("to train", how) for how in TO_TRAIN]


def step(model, optimizer=None):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.SGD(trained, lr=1e-2)
    model(input_ids=ROWS[0]["input_ids"][None], labels=ROWS[0]["labels"][None]).loss.backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ("loaded", "how"),
    [pytest.param(*way, marks=transformers_takes_it if way[1] == "transformers" else ()) for way in WAYS],
)
def test_what_was_guided_and_is_trained_without_is_said_once(pair, trained, loaded, how):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ways = {"for inference": FOR_INFERENCE, "to train": TO_TRAIN}[loaded]
        model = ways[how](copy.deepcopy(pair.base), trained[0] / "checkpoint-1")
        assert not [w for w in caught if "guidance" in str(w.message)]
        step(model, step(model))
    [said] = [str(w.message) for w in caught if "guidance" in str(w.message)]
    assert "checkpoint-1' was trained with guidance, and without" in said and "load it with " in said


@pytest.mark.parametrize(("loaded", "how"), [way for way in WAYS if way[1] != "transformers"])
def test_where_an_optimizer_has_no_hooks_saving_says_it_once(pair, trained, tmp_path, loaded, how):
    ways = {"for inference": FOR_INFERENCE, "to train": TO_TRAIN}[loaded]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = ways[how](copy.deepcopy(pair.base), trained[0] / "checkpoint-1")
        model.save_pretrained(tmp_path)
        assert not [w for w in caught if "guidance" in str(w.message)]  # nothing has moved
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter -= 0.01
        model.save_pretrained(tmp_path)
        model.save_pretrained(tmp_path)
    [said] = [str(w.message) for w in caught if "guidance" in str(w.message)]
    assert "checkpoint-1' was trained with guidance, and without" in said


def test_what_is_not_trained_or_steered_again_is_not_said(pair, trained):
    folder = trained[0] / "checkpoint-1"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*guidance")
        served = PeftModel.from_pretrained(copy.deepcopy(pair.base), folder)
        step(wrapped(pair))
        step(get_peft_model(copy.deepcopy(pair.base), LoraConfig(target_modules=["q_proj"])))
        step(guide(made_trainable(PeftModel.from_pretrained(copy.deepcopy(pair.base), folder)), pair.prior))
        step(guide(PeftModel.from_pretrained(copy.deepcopy(pair.base), folder, is_trainable=True), pair.prior))
        served.add_adapter("other", LoraConfig(target_modules=["q_proj"]))
        served.set_adapter("other")
        served.delete_adapter("default")
        served.add_adapter("default", LoraConfig(target_modules=["q_proj"]))
        step(made_trainable(served))


@pytest.mark.parametrize("guided_by", ["DriftConfig", "guide"])
def test_layers_without_a_delta_make_no_guided_training_plain(pair, tmp_path, guided_by):
    """As after Trainer's load_best_model_at_end, which loads into the steered model, and not to train."""
    targets = ["q_proj", "lm_head"]
    config = DriftConfig(prior=pair.path, r=2, target_modules=targets)
    get_peft_model(copy.deepcopy(pair.base), config).save_pretrained(tmp_path)
    if guided_by == "DriftConfig":
        model = get_peft_model(copy.deepcopy(pair.base), config)
        model.load_adapter(tmp_path, "default")
    else:
        model = guide(PeftModel.from_pretrained(copy.deepcopy(pair.base), tmp_path), pair.prior)
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    assert 0 < sum("drift_peft" in vars(layer) for layer in layers) < len(layers)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*guidance")
        step(made_trainable(model))


def test_a_strength_that_has_ended_is_said(pair, trained, tmp_path):
    folder = trained[0] / "checkpoint-1"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for decay in (1, 2, None):
            config = DriftConfig.from_pretrained(folder, drift_decay_steps=decay)
            PeftModel.from_pretrained(copy.deepcopy(pair.base), folder, config=config, is_trainable=True)
    said = [str(warning.message) for warning in caught if "its strength ended" in str(warning.message)]
    assert len(said) == 1 and "has had 1 guided steps, and its strength ended after 1" in said[0]


@transformers_takes_it
def test_nothing_is_said_where_nothing_is_wrong(pair, trained, tmp_path):
    def base():
        return copy.deepcopy(pair.base)

    folder = trained[0] / "checkpoint-1"
    get_peft_model(base(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*guidance")
        PeftModel.from_pretrained(base(), folder)
        PeftModel.from_pretrained(base(), folder, config=DriftConfig.from_pretrained(folder), is_trainable=True)
        guide(PeftModel.from_pretrained(base(), tmp_path, is_trainable=True), pair.prior)
        model = AutoModelForCausalLM.from_pretrained(pair.folder / "base")
        model.load_adapter(str(folder))
