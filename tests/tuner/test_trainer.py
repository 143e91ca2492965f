"""transformers' Trainer and TRL's SFTTrainer: what they log, their steps against the oracle's, what they save."""

import importlib
import json
import warnings

import numpy as np
import pytest
import torch
import transformers as tf
from datasets import Dataset, load_dataset
from huggingface_hub import ModelCard
from pairs import IDS, drift, load
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.trainer_callback import DefaultFlowCallback
from trl import SFTConfig, SFTTrainer
from twin import ALPHA, assert_same_update, bias_by_oracle, pull_by_oracle, randomized, state

import drift_peft.tuner.trainer
from drift_peft import DriftConfig, ReasoningPrior, guide, telemetry
from drift_peft.keeping import add_to_trainers
from drift_peft.tuner.steered import steered_of

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated", "ignore:Switched off bitsandbytes")
FAMILY = "llava"
WORDS = ["<pad>", "<s>", "</s>", "<image>", "<unk>", "user:", "assistant:", *"0123456789+=?"]
CHAT = """\
{% for message in messages %}{{ message.role }}: {% for part in message.content %}\
{% if part.type == 'image' %}<image> {% else %}{{ part.text }} {% endif %}{% endfor %}</s> {% endfor %}"""
two_scales = pytest.mark.parametrize(("scale", "target"), [("adaptive", "residual"), ("decoupled", "factors")])


def processor():
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, extra_special_tokens={"image_token": "<image>"}, **named
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return tf.LlavaProcessor(images, tokenizer, 4, "default", CHAT, num_additional_image_tokens=1)


def pictures(rows=16):
    """Questions on an image, as chats."""
    generator = np.random.default_rng(0)
    found = []
    for _ in range(rows):
        a, b = generator.integers(5, size=2)
        image = Image.fromarray(generator.integers(256, size=(16, 16, 3), dtype=np.uint8))
        chat = [{"role": "user", "content": f"{a} + {b} = ?"}, {"role": "assistant", "content": str(a + b)}]
        found.append({"images": [image], "messages": chat})
    return Dataset.from_list(found)


def tokens(rows=16):
    ids = torch.randint(7, 64, (rows, 10), generator=torch.Generator().manual_seed(0))
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})


def arguments(output, make=TrainingArguments, **changes):
    settings = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }
    return make(output, **{**settings, **changes})


def trainer(model, output, data=None, callbacks=None, **changes):
    return Trainer(model, arguments(output, **changes), train_dataset=data or tokens(), callbacks=callbacks)


def sft_trainer(model, output, callbacks=None, peft_config=None, **changes):
    return SFTTrainer(
        model,
        arguments(output, SFTConfig, max_length=None, **changes),
        train_dataset=pictures(),
        processing_class=processor(),
        peft_config=peft_config,
        callbacks=callbacks,
    )


@pytest.fixture
def folder(pairs):
    return pairs(FAMILY)


# The logs


class Report(TrainerCallback):
    """What a reporting integration is given."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def of_drift(logs):
    return {key: value for key, value in logs.items() if key.startswith("drift/")}


def test_the_numbers_reach_the_logs_and_who_reports_them(pairs, tmp_path, capsys):
    model = get_peft_model(load(pairs("llama"), "llama"), drift(pairs("llama"), drift_log_kinds=True))
    report = Report()
    run = trainer(
        model, tmp_path, callbacks=[report], logging_steps=2, max_steps=4, save_strategy="steps", save_steps=4
    )
    run.train()
    run.evaluate(tokens(4))
    told = [of_drift(logs) for logs in run.state.log_history]
    assert [bool(numbers) for numbers in told] == [True, True, False, False]  # summary and evaluation have none
    assert told[1] == {f"drift/{key}": value for key, value in telemetry(model).items()}
    assert [numbers["drift/guided_steps"] for numbers in told[:2]] == [2, 4]
    assert {"drift/alignment", "drift/absorbed/mlp", "drift/gradient_cosine/attn", "drift/bias_ratio"} <= set(told[0])
    assert [of_drift(logs) for logs in report.logs] == told
    assert capsys.readouterr().out.count("'drift/bias_ratio/mlp'") == 2  # transformers' own PrinterCallback
    stored = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    assert [of_drift(logs) for logs in stored] == told[:2]


def test_kinds_are_logged_on_request_alone(pairs, tmp_path):
    model = get_peft_model(load(pairs("llama"), "llama"), drift(pairs("llama")))
    run = trainer(model, tmp_path, logging_steps=2, max_steps=2)
    run.train()
    totals = {f"drift/{key}": value for key, value in telemetry(model).items() if "/" not in key}
    assert of_drift(run.state.log_history[0]) == totals and "drift/absorbed" in totals


def test_it_registers_itself_once(pairs, tmp_path):
    for _ in range(2):
        model = get_peft_model(load(pairs("llama"), "llama"), drift(pairs("llama")))
        importlib.reload(drift_peft.tuner.trainer)
        add_to_trainers(drift_peft.tuner.trainer.DriftCallback)
    names = [type(callback).__name__ for callback in trainer(model, tmp_path).callback_handler.callbacks]
    assert names.count("DriftCallback") == 1
    assert names.index("DriftCallback") < names.index("PrinterCallback")


def test_a_trainer_that_was_made_before_guide(pairs, tmp_path, monkeypatch):
    """In a process where nothing was steered before; what reports the logs comes after it."""
    monkeypatch.setattr("transformers.trainer.DEFAULT_CALLBACKS", [DefaultFlowCallback])
    model = get_peft_model(load(pairs("llama"), "llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    run = trainer(model, tmp_path, max_steps=1, logging_steps=1)
    guide(model, pairs("llama") / "prior.safetensors")
    guide(model, pairs("llama") / "prior.safetensors")
    names = [type(callback).__name__ for callback in run.callback_handler.callbacks]
    assert names.count("DriftCallback") == 1 and names.index("DriftCallback") < names.index("PrinterCallback")
    run.train()
    assert of_drift(run.state.log_history[0])["drift/guided_steps"] == 1
    [config] = {id(s.config): s.config for s in steered_of(model)}.values()
    assert config.training.startswith("1 steps of ")


def test_models_that_are_not_steered_are_left_alone(pairs, tmp_path):
    get_peft_model(load(pairs("llama"), "llama"), drift(pairs("llama")))  # from here on the callback is registered

    def log_history(without):
        torch.manual_seed(0)
        model = get_peft_model(load(pairs("llama"), "llama"), LoraConfig(r=2, target_modules=["q_proj"]))
        run = trainer(model, tmp_path)
        if without:
            run.remove_callback(next(c for c in run.callback_handler.callbacks if type(c).__name__ == "DriftCallback"))
        run.train()
        return [
            {k: v for k, v in logs.items() if "second" not in k and "time" not in k} for logs in run.state.log_history
        ]

    histories = [log_history(without) for without in (False, True)]
    assert histories[0] == histories[1] and not any(of_drift(logs) for logs in histories[0])
    run = trainer(load(pairs("llama"), "llama"), tmp_path)  # nor is one without any adapter
    run.train()
    assert not any(of_drift(logs) for logs in run.state.log_history)


# The steps


class Oracle(TrainerCallback):
    """Guides a twin that is plain LoRA, at the same place in the step."""

    def __init__(self, prior, scale, target):
        self.settings = prior, scale, target

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        bias_by_oracle(model, *self.settings)

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        prior, scale, target = self.settings
        pull_by_oracle(model, prior, scale, optimizer, target)


def lora_like(model, base):
    """Plain LoRA with the same weights, on a base of its own."""
    config = model.peft_config["default"]
    lora = LoraConfig(r=config.r, lora_alpha=config.lora_alpha, target_modules=config.target_modules)
    twin = get_peft_model(base, lora)
    twin.load_state_dict({name: p for name, p in model.state_dict().items() if "lora_" in name}, strict=False)
    for p, q in zip(twin.parameters(), model.parameters(), strict=True):
        p.data = p.data.to(q.dtype)
    return twin


def assert_trained_like_the_oracle(run, make, twins, prior, scale, target, tolerance=1e-4):
    """A run like that of a twin which the oracle guides; and see that plain LoRA would have gone elsewhere."""
    start = state(run.model)
    run.train()
    assert run.state.global_step == telemetry(run.model)["guided_steps"] == 3
    twin, plain = twins
    make(twin, callbacks=[Oracle(prior, scale, target)]).train()
    make(plain).train()
    assert_same_update(run.model, twin, start, tolerance)
    with pytest.raises(AssertionError):
        assert_same_update(plain, twin, start, 0.05)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adafactor"])
@two_scales
def test_trainer_steps_as_the_oracle(pairs, tmp_path, scale, target, optim):
    folder = pairs("llama")
    model = get_peft_model(
        load(folder, "llama"), drift(folder, drift_scale=scale, drift_target=target, drift_alpha=ALPHA[scale])
    )
    twins = [lora_like(randomized(model, dtype=torch.float32), load(folder, "llama")) for _ in range(2)]

    def make(model, callbacks=None):
        return trainer(model, tmp_path, callbacks=callbacks, optim=optim)

    prior = ReasoningPrior.load(folder / "prior.safetensors")
    assert_trained_like_the_oracle(make(model), make, twins, prior, scale, target)


@pytest.mark.parametrize(("scale", "target", "how"), [
    ("adaptive", "residual", "peft_config"), ("decoupled", "factors", "wrapped"),
    pytest.param("adaptive", "residual", "wrapped", marks=pytest.mark.slow),
    pytest.param("decoupled", "factors", "peft_config", marks=pytest.mark.slow),
])  # fmt: skip
def test_sft_trainer_steps_as_the_oracle(folder, tmp_path, scale, target, how):
    """With images, gradient checkpointing (TRL's default) and accumulation."""
    config = drift(folder, drift_scale=scale, drift_target=target, drift_alpha=ALPHA[scale])

    def make(model, callbacks=None, peft_config=None):
        return sft_trainer(model, tmp_path, callbacks, peft_config)

    vlm = load(folder, FAMILY)
    run = make(get_peft_model(vlm, config)) if how == "wrapped" else make(vlm, peft_config=config)
    assert run.args.gradient_checkpointing
    twins = [lora_like(randomized(run.model, dtype=torch.float32), load(folder, FAMILY)) for _ in range(2)]
    prior = ReasoningPrior.load(folder / "prior.safetensors")
    assert_trained_like_the_oracle(run, make, twins, prior, scale, target)
    assert all(of_drift(logs) for logs in run.state.log_history[:3])


def test_sft_trainer_casts_the_adapter_of_a_4bit_base_to_bf16(folder, tmp_path):
    """One step: gradients are rounded to 8 bits, but the bias is taken in fp32."""
    settings = {"max_steps": 1, "optim": "sgd", "learning_rate": 100.0}  # so far that rounding the factors is no matter
    config = drift(folder, drift_alpha=ALPHA["adaptive"])
    run = sft_trainer(load(folder, FAMILY, "nf4"), tmp_path, None, config, **settings)
    factors = [p for p in run.model.parameters() if p.requires_grad]
    assert len(factors) == 28 and {p.dtype for p in factors} == {torch.bfloat16}
    generator = torch.Generator().manual_seed(0)
    for p in factors:
        p.data.copy_(0.1 * torch.randn(p.shape, generator=generator))
    twin, start = lora_like(run.model, load(folder, FAMILY, "nf4")), state(run.model)
    run.train()
    assert telemetry(run.model)["guided_steps"] == 1
    prior = ReasoningPrior.load(folder / "prior.safetensors")
    sft_trainer(twin, tmp_path, [Oracle(prior, "adaptive", "residual")], **settings).train()
    assert_same_update(run.model, twin, start, 2e-2)


# What is left on disk


def test_what_the_trainer_saves_is_plain_lora(folder, tmp_path):
    run = sft_trainer(load(folder, FAMILY), tmp_path / "run", None, drift(folder), save_strategy="steps", save_steps=3)
    run.train()
    run.save_model(tmp_path / "saved")
    with torch.no_grad():
        expected = run.model.eval()(input_ids=IDS).logits
    for output in (tmp_path / "run" / "checkpoint-3", tmp_path / "saved"):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys|Unexpected keyword")
            model = PeftModel.from_pretrained(load(folder, FAMILY), output).eval()
        assert type(model.peft_config["default"]) is LoraConfig
        with torch.no_grad():
            assert torch.equal(model(input_ids=IDS).logits, expected)
        assert DriftConfig.from_pretrained(output).drift_steps == 3
        card = ModelCard.load(output / "README.md")
        assert "steered toward expert" in card.text and "| guided optimizer steps | 3 |" in card.text


@pytest.mark.parametrize("named", [True, False])
def test_the_card_names_the_data(pairs, tmp_path, named):
    """By the name that datasets knows; of somebody's own file it knows the format alone."""
    source = tmp_path / "sums"
    source.mkdir()
    rows = [json.dumps({"input_ids": row["input_ids"], "labels": row["labels"]}) for row in tokens(4)]
    (source / "train.jsonl").write_text("\n".join(rows))
    where = {"path": str(source)} if named else {"path": "json", "data_files": str(source / "train.jsonl")}
    data = load_dataset(**where, split="train", cache_dir=tmp_path / "cache")
    model = get_peft_model(load(pairs("llama"), "llama"), drift(pairs("llama")))
    run = trainer(model, tmp_path / "run", data, max_steps=1)
    run.train()
    run.save_model(tmp_path / "saved")
    told = "sums" if named else "not recorded"
    assert f"| training data | {told} |" in (tmp_path / "saved" / "README.md").read_text()


def test_the_card_that_trainer_pushes_has_ours_in_it(pairs, tmp_path):
    """Trainer.push_to_hub saves into output_dir, and then writes a card of its own there."""
    run = trainer(get_peft_model(load(pairs("llama"), "llama"), drift(pairs("llama"))), tmp_path)
    run.train()
    for _ in range(2):
        run.save_model(_internal_call=True)
        run.create_model_card(model_name="mine")
        card = ModelCard.load(tmp_path / "README.md")
        assert card.text.count("<!-- drift_peft: ") == 1 and "| guided optimizer steps | 3 |" in card.text
        assert "## Training procedure" in card.text and {"drift-peft", "lora"} <= set(card.data.tags)
