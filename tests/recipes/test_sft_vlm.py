"""recipes/sft_vlm.py: what its training step computes, and the card that it pushes."""

import json
import shutil
import weakref
from unittest.mock import Mock

import data as data_command
import pytest
import sft_vlm
import torch
import yaml
from keep_sets import ENDS
from recipe_runs import CONFIGS, FAMILY, FAST
from transformers import GenerationConfig

from drift_peft import KeepSet
from drift_peft.preflight import Memory, Settings, base_config
from drift_peft.preflight.memory import IMAGES
from drift_peft.preflight.recipe_settings import WHOLE

pytestmark = pytest.mark.filterwarnings(
    "ignore:Switched off bitsandbytes", "ignore:.*gradient_checkpointing.*:FutureWarning"
)


@pytest.mark.parametrize(
    ("family", "kwargs"), [("qwen2_5_vl", {"max_pixels": 256}), ("smolvlm", {"size": {"longest_edge": 16}})]
)
def test_preflight_counts_the_images_that_are_there_in_a_step(family, kwargs, train, pair, monkeypatch):
    """The Trainer reads all batches of a step before its first pass, and the next one's before it lets go of them."""
    images, when_read, in_passes = [], [], []
    read, step = sft_vlm.Trainer.get_batch_samples, sft_vlm.Trainer.training_step

    def alive():
        return sum(image().nbytes for image in images if image() is not None)

    def reading(self, *args):
        batches, tokens = read(self, *args)
        found = (batch.get(name) for batch in batches for name in ("pixel_values", "pixel_attention_mask"))
        images.extend(weakref.ref(tensor) for tensor in found if tensor is not None)
        when_read.append(alive())
        return batches, tokens

    monkeypatch.setattr(sft_vlm.Trainer, "get_batch_samples", reading)
    monkeypatch.setattr(
        sft_vlm.Trainer, "training_step", lambda self, *args: (in_passes.append(alive()), step(self, *args))[1]
    )
    train(family, **FAST, processor_kwargs=kwargs)
    base = pair(family) / "base"
    steps = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "processor_kwargs": kwargs}
    counted = Memory(base_config(str(base)), family).estimate(Settings(str(base), **steps)).parts[IMAGES]
    assert in_passes == 4 * [counted] and when_read == [counted, 2 * counted]


def test_the_card_that_is_pushed_has_ours_in_it(train):
    """push_to_hub saves into output_dir, and then writes TRL's card there."""
    trainer, output = train(**FAST)
    trainer.save_model(_internal_call=True)
    trainer.create_model_card(model_name="mine")
    card = (output / "README.md").read_text(encoding="utf-8")
    assert card.count("<!-- drift_peft: ") == 1 and "| guided optimizer steps | 2 |" in card and "TRL" in card
    assert str(output.parent) not in card and "pipeline_tag: image-text-to-text" in card


def test_the_base_is_kept_near_its_own_answers(train, pair, tmp_path):
    """The keep set is made by the first run, of the data's images, and serves the next one."""
    place = tmp_path / "kept" / "keep.safetensors"
    trainer, output = train(**FAST, keep=place)
    made = place.read_bytes()
    keep_set = KeepSet.load(place)
    record = json.loads((output / "run.json").read_text())
    assert record["keep"] == {"sha256": keep_set.sha256, "samples": 4}
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 2 and all("drift/keep_kl" in log and "drift/alignment" in log for log in logs)
    assert record["results"]["keep_ratio"] >= 0
    train(**FAST, keep=place, output_dir=tmp_path / "again")
    assert place.read_bytes() == made


@pytest.mark.filterwarnings("error:.*another resolution of images")
def test_a_keep_set_is_of_images_as_they_are_trained_on(train, tmp_path):
    place, kwargs = tmp_path / "keep.safetensors", {"size": {"shortest_edge": 64, "longest_edge": 64}}
    trainer, _ = train("qwen2_5_vl", **{**FAST, "max_steps": 1}, keep=place, processor_kwargs=kwargs)
    KeepSet.load(place).check(trainer.processing_class)


def test_the_chat_template_that_is_named_makes_lengths_and_keep_set(train, pair, tmp_path):
    """Of a base that has none of its own; the processor that is saved has it, too."""
    folder, place = shutil.copytree(pair("qwen2_5_vl") / "base", tmp_path / "mute"), tmp_path / "keep.safetensors"
    own = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    (folder / "chat_template.jinja").unlink()
    (tmp_path / "long.jinja").write_text("{{ 'how ' * 50 }}" + own, encoding="utf-8")
    settings = {**FAST, "max_steps": 1, "base": folder, "chat_template_path": tmp_path / "long.jinja", "keep": place}
    with pytest.raises(SystemExit, match=r"has \d+ tokens, its images' included, and max_tokens allows 50"):
        train(**settings, max_tokens=50)
    _, output = train(**settings)
    assert KeepSet.load(place).metadata["prompt_tokens"] > 50
    assert (output / "chat_template.jinja").read_text(encoding="utf-8").startswith("{{ 'how ' * 50 }}")


def test_what_is_counted_beforehand_has_the_tokens_that_the_run_counts(train, pair, data, tmp_path, capsys):
    """With the run's template and its size of images, both of which change them."""
    base, template, counted = pair("qwen2_5_vl") / "base", tmp_path / "long.jinja", []
    template.write_text("{{ 'how ' * 50 }}" + (base / "chat_template.jinja").read_text(encoding="utf-8"))
    for kwargs in ('{"max_pixels": 576}', '{"max_pixels": 144}'):
        settings = {"processor_kwargs": kwargs, "chat_template_path": template, "output_dir": tmp_path / kwargs}
        _, output = train(**FAST, **settings)
        told = json.loads((output / "run.json").read_text(encoding="utf-8"))["data"]["tokens"]
        how = ["--model", base, "--processor-kwargs", kwargs, "--chat-template-path", template, "--json", "--overwrite"]
        capsys.readouterr()
        data_command.main([*map(str, [data, "-o", tmp_path / "out.parquet", *how])])
        counted.append(json.loads(capsys.readouterr().out)["tokens"])
        assert counted[-1] == told
    assert counted[0] != counted[1] and counted[1]["longest"] > 50


def test_a_chat_template_is_a_jinja_file(train, pair, tmp_path, monkeypatch):
    monkeypatch.setattr(sft_vlm, "prepare", lambda *_: pytest.fail("something was loaded"))
    for named in (pair("qwen2_5_vl") / "base", tmp_path / "gone.jinja"):
        with pytest.raises(SystemExit, match=f"chat_template_path={named} is no .jinja file that is here: name one"):
            train(chat_template_path=named)


def test_a_keep_set_that_is_there_is_said_to_be_used_as_it_is(train, tmp_path, capsys):
    made = {"keep": tmp_path / "keep.safetensors", "keep_samples": 4, "max_steps": 1}
    train(**{**FAST, **made})
    assert "was made before" not in capsys.readouterr().out
    train(**{**FAST, **made, "keep_samples": 6}, output_dir=tmp_path / "second")
    assert "was made before, and its 4 answers and their images are used as they are" in capsys.readouterr().out


def test_a_keep_set_of_another_vlm_is_named(train, pair, tmp_path, capsys):
    """As one of the VLM before a merge, which may be meant."""
    base, place = pair("qwen2_5_vl") / "base", tmp_path / "keep.safetensors"
    settings = {**FAST, "max_steps": 1, "keep": place, "keep_samples": 4}
    train(**settings)
    train(**settings, output_dir=tmp_path / "second")
    assert "was made before, and its 4 answers" in capsys.readouterr().out
    other = shutil.copytree(base, tmp_path / "other")
    train(**settings, base=other, output_dir=tmp_path / "third")
    assert f"{place} was made before with {base}, which is not {other}, and its 4 answers" in capsys.readouterr().out


def test_a_step_that_the_gpu_has_no_room_for_is_one_sentence(train, monkeypatch):
    full = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory"))
    monkeypatch.setattr(sft_vlm.Trainer, "training_step", full)
    with pytest.raises(SystemExit, match="no room for a step of 2 samples at a time: lower per_device_train_batch"):
        train(**FAST)


def test_replay_mixes_the_answers_into_the_data_instead(train, pair, data, tmp_path, monkeypatch):
    """The keep set is made by the first run here too; the loss is on the VLM's answer, and nothing is added to it."""
    folder = pair("qwen2_5_vl")
    GenerationConfig(eos_token_id=ENDS).save_pretrained(folder / "base")  # so that answers end
    place, seen = tmp_path / "keep.safetensors", []
    step = sft_vlm.Trainer.training_step

    def watched(self, model, inputs, *args):
        seen.append(inputs)
        return step(self, model, inputs, *args)

    monkeypatch.setattr(sft_vlm.Trainer, "training_step", watched)
    settings = {**FAST, "keep": place, "keep_samples": 20, "replay": 0.5, "max_steps": 4}
    trainer, output = train(**settings, drift_norm="weight")  # which does not go with the other form
    record, keep_set = json.loads((output / "run.json").read_text()), KeepSet.load(place)
    replay = record["replay"]
    assert replay["samples"] == 8 and replay["answers"] + sum(replay["left_out"].values()) == 20
    assert record["data"]["samples"] == 8 and len(trainer.train_dataset) == 16
    assert not any("drift/keep_kl" in log for log in trainer.state.log_history)
    words = trainer.processing_class.tokenizer
    rows = [row for inputs in seen for row in zip(inputs["input_ids"], inputs["labels"], strict=True)]
    told = {words.decode(label[label != -100]).removesuffix("</s>").strip() for _, label in rows}
    task = {text for text in told if "+" in text}  # the chains of thought of the data
    assert task and told - task and told - task <= {words.decode(words(s.answer)["input_ids"]) for s in keep_set}
    assert all((ids == 3).any() for ids, _ in rows)  # the image's places


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"replay": 1}, r"replay is a share of the training samples, at least 0 and below 1, got 1\.0"),
        ({"replay": 0.2}, r"replay=0\.2 takes the answers of a keep set: name one with keep"),
        ({"replay": 0.2, "keep": "k.safetensors", "streaming": True}, "whose size streaming does not know: leave out"),
        ({"keep_weight": -1}, r"keep_weight is a number of at least 0, and 0 keeps nothing, got -1\.0"),
        ({"keep_weight": "nan"}, "keep_weight is a number of at least 0, .* got nan"),
        ({"keep_bound": 0}, r"keep_bound is a number above 0, such as 1, got 0\.0"),
        *(({key: 0}, f"{key} must be a whole number ≥ 1, got 0") for key in WHOLE),
        ({"keep": "k.safetensors", "drift_norm": "weight"}, "does not see the gradient that keep adds: set drift_norm"),
    ],
)
def test_what_does_not_go_with_keeping_is_told_first(settings, told, train, monkeypatch):
    monkeypatch.setattr(sft_vlm, "prepare", lambda *_: pytest.fail("something was loaded"))
    with pytest.raises(SystemExit, match=told):
        train(**settings)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"eval_strategy": "steps", "eval_steps": 1}, "eval_strategy=steps cannot be: a recipe has no data for"),
        ({"eval_on_start": True}, "eval_on_start=True cannot be: .*: leave it out, and ask evaluate.py afterwards"),
        ({"per_device_eval_batch_size": 1}, "per_device_eval_batch_size=1 cannot be: a recipe has no data for an eval"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end=True cannot be: a recipe has no data for an eval"),
        ({"save_strategy": "best"}, "save_strategy=best cannot be: a recipe has no data for an evaluation"),
        ({"packing": True}, "packing=True cannot be: samples with images cannot be packed: leave it out"),
        ({"padding_free": True}, "padding_free=True cannot be: samples with images are padded"),
        ({"assistant_only_loss": True}, "assistant_only_loss=True cannot be: the loss is on the last turn alone"),
        ({"pad_to_multiple_of": 8}, "pad_to_multiple_of=8 cannot be: "),
        (
            {"gradient_checkpointing_kwargs": '{"selective": true}'},
            "gradient_checkpointing_kwargs=.* cannot be: TRL's",
        ),
        ({"save_only_model": True}, "save_only_model=True cannot be: training goes on from a checkpoint only with its"),
        ({"report_to": "swanlab"}, "report_to=swanlab needs swanlab, which is not installed here: install"),
        ({"report_to": "wandbb"}, r"report_to=wandbb is not known: did you mean wandb\?"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy=group_by_length cannot be: how long"),
        (
            {"use_liger_kernel": True},
            "use_liger_kernel=True needs liger-kernel, which is not installed here: install it",
        ),
        ({"activation_offloading": True}, "activation_offloading=True moves what a GPU holds, and use_cpu takes none"),
        ({"optim": "galore_adamw"}, "optim=galore_adamw cannot be: You need to install `galore_torch` in order"),
        (
            {"optim": "adamw_torch", "adam_beta1": 2},
            r"optim=adamw_torch cannot be: Invalid beta parameter .*: 2\.0: name",
        ),
        (
            {"optim_args": "a"},
            "optim=adamw_torch_fused cannot be: .*: name another, or see to optim_args, learning_rate",
        ),
        (
            {"lr_scheduler_type": "cosine_with_min_lr"},
            "lr_scheduler_type=cosine_with_min_lr cannot be: One of min_lr or",
        ),
        (
            {"lr_scheduler_type": "warmup_stable_decay"},
            "lr_scheduler_type=warmup_stable_decay cannot be: .*decay_steps",
        ),
        (
            {"dataloader_persistent_workers": True},
            "dataloader_num_workers=0 cannot be: persistent_workers option needs",
        ),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers=-1 cannot be: .*: change it, or leave out what else"),
        (
            {"torch_compile_mode": "x"},
            "torch_compile_backend=inductor with torch_compile_mode=x cannot be: Unrecognized",
        ),
        (
            {"push_to_hub": True, "hub_token": "none"},
            "push_to_hub=True cannot be: .*: run hf auth login, or leave it out",
        ),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be a whole number ≥ 1, got 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be a whole number ≥ 1, got 0"),
    ],
)
def test_what_can_never_work_is_refused_by_name(settings, told, train, monkeypatch):
    """What TRL refuses when the models are read, or not at all."""
    monkeypatch.setattr(sft_vlm, "prepare", lambda *_: pytest.fail("something was loaded"))
    with pytest.raises(SystemExit, match=rf"^sft_vlm\.py: error: {told}"):
        train(**settings)


def test_a_misspelt_setting_of_the_processor_is_told(train):
    with pytest.raises(SystemExit, match=r"Processor has no setting max_pixel: did you mean max_pixels\?"):
        train(processor_kwargs={"max_pixel": 64})


@pytest.mark.parametrize("name", FAMILY)
def test_every_configuration_names_a_keep_set(name):
    """Made by the first run: one a base and kind of images, under the same settings."""
    settings = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    base = settings["base"].partition("/")[2].lower().replace("-", "_").replace(".", "_")
    assert settings["keep"] == f"keep/{base}{'_pictures' * ('keep_images' in settings)}.safetensors"
    assert (settings["keep_weight"], settings["keep_samples"], settings["keep_questions"]) == (1.0, 300, None)
    assert settings["keep_batch_size"] == 4 and "replay" not in settings


def test_a_keep_set_of_text_alone_asks_for_pictures_before_anything_is_loaded(train, texts, tmp_path):
    with pytest.raises(
        SystemExit, match=r"no keep set .*k.safetensors, and .*data.jsonl has no images to make it of: "
    ):
        train(**FAST, data=texts, keep=tmp_path / "k.safetensors")
    assert not (tmp_path / "run").exists() and not (tmp_path / "k.safetensors").exists()
