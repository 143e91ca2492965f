"""The adapter folder: plain LoRA for everybody else, and enough beside it to go on with guided training."""

import json
import textwrap
import warnings

import pytest
import torch
from peft import LoraConfig, LoraModel, PeftModel, get_peft_model, get_peft_model_state_dict
from processes import run_program
from safetensors.torch import load_file
from tiny import TEXT, save_layout, tiny_expert, tiny_llm, tiny_vlm
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Trainer, TrainingArguments

from drift_peft import DriftConfig, ReasoningPrior, build_prior, telemetry

IDS = torch.arange(7, 27).reshape(2, 10)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A folder with `base`, `expert`, their `prior.safetensors`, and an `adapter` after three guided steps."""
    folder = tmp_path_factory.mktemp("qwen2_5_vl")
    vlm = tiny_vlm("qwen2_5_vl")
    save_layout(vlm, folder / "base")
    save_layout(tiny_expert("qwen2_5_vl", vlm)[0], folder / "expert")
    build_prior(folder / "expert", folder / "base", folder / "prior.safetensors", rank=8, progress=False)
    model = get_peft_model(load(folder), drift(folder, drift_alpha=0.7, drift_target="delta"))
    train(model, 3).save_pretrained(folder / "adapter")
    torch.save(logits(model), folder / "logits.pt")
    return folder


def load(folder):
    return AutoModelForImageTextToText.from_pretrained(folder / "base", dtype=torch.float32)


def drift(folder, **settings):
    return DriftConfig(prior=folder / "prior.safetensors", r=4, lora_alpha=8, task_type="CAUSAL_LM", **settings)


def train(model, steps):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def resume(folder, config, adapter="adapter"):
    return PeftModel.from_pretrained(load(folder), folder / adapter, config=config, is_trainable=True)


# For everybody else


def test_stock_peft_loads_it_without_a_warning(pair, tmp_path):
    # Every warning is an error, but for the one that this transformers gives for any PEFT model.
    script = """
        import sys
        import warnings
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        import torch
        from peft import PeftModel, get_peft_model_state_dict
        from transformers import AutoModelForImageTextToText

        folder = sys.argv[1]
        base = AutoModelForImageTextToText.from_pretrained(folder + "/base", dtype=torch.float32)
        model = PeftModel.from_pretrained(base, folder + "/adapter").eval()
        with torch.no_grad():
            logits = model(input_ids=torch.arange(7, 27).reshape(2, 10)).logits
        assert torch.equal(logits, torch.load(folder + "/logits.pt")), "other logits"
        with torch.no_grad(), model.disable_adapter():
            base_logits = model(input_ids=torch.arange(7, 27).reshape(2, 10)).logits
        assert (logits - base_logits).norm() > 0.01 * logits.norm(), "no adapter"
        assert len(get_peft_model_state_dict(model)) == 28
        assert "drift_peft" not in sys.modules
        model.save_pretrained(sys.argv[2])
    """
    run_program(tmp_path, "-c", textwrap.dedent(script), pair, tmp_path / "again", cwd=tmp_path)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / name).exists()


def test_what_the_folder_says(pair):
    files = {file.name for file in (pair / "adapter").iterdir()}
    assert files - {"README.md"} == {"adapter_config.json", "adapter_model.safetensors", "drift_config.json"}
    stock = json.loads((pair / "adapter" / "adapter_config.json").read_text())
    get_peft_model(load(pair), LoraConfig(target_modules=["q_proj"])).save_pretrained(pair / "stock")
    assert stock.keys() == json.loads((pair / "stock" / "adapter_config.json").read_text()).keys()
    assert (stock["peft_type"], stock["init_lora_weights"], stock["r"]) == ("LORA", True, 4)
    own = json.loads((pair / "adapter" / "drift_config.json").read_text())
    assert own == {
        "prior": str(pair / "prior.safetensors"),
        "prior_sha256": ReasoningPrior.load(pair / "prior.safetensors").sha256,
        "drift_alpha": 0.7,
        "drift_scale": "adaptive",
        "drift_target": "delta",
        "drift_rank": None,
        "drift_norm": "factor",
        "drift_sketch": 64,
        "drift_spectrum": "full",
        "drift_start": 0.0,
        "drift_modules": None,
        "drift_alpha_pattern": {},
        "drift_warmup_steps": 0,
        "drift_decay_steps": None,
        "drift_steps": 3,
        "quantization": {},
        "init_lora_weights": "drift",
    }
    keys = load_file(pair / "adapter" / "adapter_model.safetensors")
    assert len(keys) == 28 and all(key.startswith("base_model.model.model.language_model.layers.") for key in keys)


def test_peft_loads_it_for_inference_with_drift_peft_imported(pair):
    model = PeftModel.from_pretrained(load(pair), pair / "adapter")
    assert type(model.peft_config["default"]) is LoraConfig
    assert torch.equal(logits(model), torch.load(pair / "logits.pt"))
    with pytest.raises(ValueError, match="No layer of this model is steered"):
        telemetry(model)


# For more training


def test_training_continues(pair, tmp_path):
    config = DriftConfig.from_pretrained(pair / "adapter")
    assert (config.drift_alpha, config.drift_target, config.drift_steps) == (0.7, "delta", 3)
    model = resume(pair, config)
    assert torch.equal(logits(model), torch.load(pair / "logits.pt"))
    before = telemetry(model)
    assert before["guided_steps"] == 3 and before["alignment"] > 0
    after = telemetry(train(model.train(), 2))
    assert after["guided_steps"] == 5 and after["absorbed"] > before["absorbed"]
    model.save_pretrained(tmp_path)
    assert DriftConfig.from_pretrained(tmp_path).drift_steps == 5

    plain = PeftModel.from_pretrained(load(pair), pair / "adapter", is_trainable=True)
    unguided = telemetry(train(plain.train(), 2), ReasoningPrior.load(pair / "prior.safetensors"))
    assert unguided["absorbed"] < after["absorbed"]


def test_a_prior_that_is_taken_away_is_missed_as_by_a_new_config(pair):
    with pytest.raises(ValueError, match="DriftConfig needs a prior to train"):
        DriftConfig.from_pretrained(pair / "adapter", prior=None)


def test_inference_and_merging_never_open_the_prior(pair, tmp_path):
    config = DriftConfig.from_pretrained(pair / "adapter", prior=tmp_path / "nowhere.safetensors")
    config.inference_mode = True
    model = PeftModel.from_pretrained(load(pair), pair / "adapter", config=config)
    assert torch.equal(logits(model), torch.load(pair / "logits.pt"))
    assert torch.isfinite(logits(model.merge_and_unload())).all()


def test_loaded_weights_are_not_reported_as_unguided(pair, tmp_path):
    model = get_peft_model(load(pair), drift(pair))
    model.load_adapter(pair / "adapter", "default", is_trainable=True)  # what Trainer does when it resumes
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)


def copy_adapter(pair, folder, **changes):
    """A copy of the adapter folder whose drift_config.json is changed."""
    folder.mkdir()
    for file in (pair / "adapter").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    own = json.loads((folder / "drift_config.json").read_text())
    (folder / "drift_config.json").write_text(json.dumps({**own, **changes}))
    return folder


def test_a_prior_that_has_moved(pair, tmp_path):
    folder = copy_adapter(pair, tmp_path / "adapter", prior=str(tmp_path / "moved.safetensors"))
    with pytest.raises(
        FileNotFoundError, match=r"moved\.safetensors. that this adapter was trained with is not here: name it"
    ):
        resume(pair, DriftConfig.from_pretrained(folder))
    model = resume(pair, DriftConfig.from_pretrained(folder, prior=pair / "prior.safetensors"))
    assert telemetry(train(model, 1))["guided_steps"] == 4


def test_a_prior_that_has_changed(pair, tmp_path):
    other = tmp_path / "prior.safetensors"
    build_prior(pair / "expert", pair / "base", other, rank=4, progress=False)
    folder = copy_adapter(pair, tmp_path / "adapter", prior=str(other))
    with pytest.raises(ValueError, match=r"has changed since this adapter was trained .* accept this one with"):
        resume(pair, DriftConfig.from_pretrained(folder))
    model = resume(pair, DriftConfig.from_pretrained(folder, prior=other))
    assert model.peft_config["default"].prior_sha256 == ReasoningPrior.load(other).sha256


def test_refused_folders(pair, tmp_path):
    get_peft_model(load(pair), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "stock")
    with pytest.raises(
        ValueError,
        match=r"has no drift_config.json, the settings of what was steered: load .*guide",
    ):
        DriftConfig.from_pretrained(tmp_path / "stock")
    folder = copy_adapter(pair, tmp_path / "adapter", drift_colour="red")
    with pytest.raises(ValueError, match="holds the unknown setting 'drift_colour'"):
        DriftConfig.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json' at"):
        DriftConfig.from_pretrained(tmp_path / "nothing")


def test_a_hub_repository(pair, monkeypatch):
    asked = []

    def hf_hub_download(repo_id, filename, subfolder=None, revision=None, **kwargs):
        asked.append((repo_id, filename, subfolder, revision))
        return str(pair / "adapter" / filename)

    monkeypatch.setattr("peft.config.hf_hub_download", hf_hub_download)
    monkeypatch.setattr("drift_peft.tuner.config.hf_hub_download", hf_hub_download)
    config = DriftConfig.from_pretrained("org/adapter", subfolder="last", revision="v1")
    assert config.to_dict() == DriftConfig.from_pretrained(pair / "adapter").to_dict()
    names = ("adapter_config.json", "drift_config.json")
    assert asked == [("org/adapter", name, "last", "v1") for name in names]


# transformers' Trainer


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, i):
        ids = torch.randint(7, TEXT["vocab_size"], (12,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two trainers after 4 steps: uninterrupted, and resumed by a new one from the first one's checkpoint of step 2."""
    folder = tmp_path_factory.mktemp("trainer")
    expert = tiny_llm("llava")
    save_layout(expert, folder / "base")
    for parameter in expert.get_decoder().layers.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    save_layout(expert, folder / "expert")
    build_prior(folder / "expert", folder / "base", folder / "prior.safetensors", rank=8, progress=False)

    def trainer(output):
        model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        model = get_peft_model(model, drift(folder, lora_dropout=0.1))
        arguments = TrainingArguments(
            folder / output, per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=4, save_steps=2,
            learning_rate=5e-3, report_to="none", use_cpu=True, seed=0, disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        return Trainer(model, arguments, train_dataset=Rows())

    whole, resumed = trainer("whole"), trainer("resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-2"))
    return folder, whole.model, resumed.model


def test_trainer_resumes_from_its_checkpoint(runs):
    folder, whole, resumed = runs
    files = {file.name for file in (folder / "whole" / "checkpoint-2").iterdir()}
    assert {"adapter_config.json", "drift_config.json", "optimizer.pt"} <= files
    halfway = load_file(folder / "whole" / "checkpoint-2" / "adapter_model.safetensors")
    assert any(not torch.equal(halfway[name], tensor) for name, tensor in get_peft_model_state_dict(whole).items())
    for (name, expected), (_, found) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(found, expected), name


def test_trainer_resumes_the_count_of_guided_steps(runs):
    folder, whole, resumed = runs
    assert telemetry(whole)["guided_steps"] == 4
    assert telemetry(resumed)["guided_steps"] == 4
    for checkpoint, steps in (("whole/checkpoint-2", 2), ("resumed/checkpoint-4", 4)):
        assert DriftConfig.from_pretrained(folder / checkpoint).drift_steps == steps


# Beside other adapters


def test_adapters_side_by_side(pair, tmp_path):
    """A stock adapter and one of ours are loaded into a steered model; only what trains with a prior is guided."""
    stock = get_peft_model(load(pair), LoraConfig(r=2, target_modules=["q_proj"]))
    train(stock, 1).save_pretrained(tmp_path / "stock")
    model = get_peft_model(load(pair), drift(pair))
    model.load_adapter(tmp_path / "stock", "stock")
    model.load_adapter(pair / "adapter", "ours")
    model.set_adapter("stock")
    assert torch.equal(logits(model), logits(stock))
    model.set_adapter("ours")
    assert torch.equal(logits(model), torch.load(pair / "logits.pt"))
    model.set_adapter("default")
    train(model.train(), 2)
    assert telemetry(model)["guided_steps"] == 2
    assert all(set(m.drift_peft) == {"default"} for m in model.modules() if hasattr(m, "drift_peft"))


def test_plain_lora_stays_plain(pair):
    """With this package imported, a LoraConfig makes a LoraModel that nobody steers, saved as ever."""
    model = get_peft_model(load(pair), LoraConfig(r=2, target_modules=["q_proj"]))
    assert isinstance(model.base_model, LoraModel) and type(model.peft_config["default"]) is LoraConfig
    assert not any(hasattr(m, "drift_peft") for m in model.modules())
    with pytest.raises(ValueError, match="No layer of this model is steered"):
        telemetry(train(model, 1))
    with pytest.raises(ValueError, match="Unknown initialization"):
        get_peft_model(load(pair), LoraConfig(init_lora_weights="drift", target_modules=["q_proj"]))
