"""What recipes/sft_vlm.py says of settings that do nothing in a run, or cannot work: before anything is made."""

import json
import re
import shutil
import warnings

import pytest
import sft_vlm
import trl.models
from parts.arguments import parse
from parts.rehearsal import rehearse_loading
from recipe_runs import FAST, flags
from transformers import PreTrainedModel

from drift_peft import build_prior, merge_baseline
from drift_peft.checkpoints import Checkpoint


@pytest.fixture
def written(tmp_path):
    """The settings of a recipe and of flags."""

    def read(line, *flags):
        (tmp_path / "a.yaml").write_text(f"base: b\ndata: d\nprior: p.safetensors\nuse_cpu: true\n{line}\n")
        return parse(["--config", str(tmp_path / "a.yaml"), *flags], sft_vlm.__doc__)

    return read


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"keep_images": "pictures"}, "keep_images is said of a keep set, and none is named: name its file with keep"),
        ({"keep_every": 1}, "keep_every is said of a keep set, and none is named"),
        ({"keep_weight": 3.0, "method": "sft"}, "keep_weight is said of a keep set, and none is named"),
        ({"max_steps": 0}, "max_steps=0 trains no step: name their number, or leave it out to train in epochs"),
        ({"lora_dropout": 2}, "lora_dropout is the probability that a number is left out, at most 1, got 2"),
        ({"data": ""}, "data is empty: give it a value, or leave it out"),
        ({"keep": ""}, "keep is empty: give it a value, or leave it out"),
    ],
)
def test_what_would_do_nothing_is_refused(settings, told, train, monkeypatch):
    monkeypatch.setattr(sft_vlm, "prepare", lambda *_: pytest.fail("something was loaded"))
    with pytest.raises(SystemExit, match=told):
        train(**settings)


@pytest.mark.parametrize("of_keeping", ["keep_samples: 4", "keep_images: pictures\nkeep_weight: 3"])
def test_a_recipe_that_forgets_its_keep_set_is_refused(of_keeping, written):
    with pytest.raises(ValueError, match=r"is said of a keep set, and none is named: .*, or set keep to null, which"):
        written(of_keeping)
    for unsaid in ("keep_images: null", "keep_questions:"):
        assert written(unsaid)[0].keep is None
    for said in ("keep: null", "keep: none", "keep: None", "keep_weight: 0"):
        assert written(f"keep_samples: 4\n{said}")[0].keep is None
    assert written(of_keeping, "--keep", "k")[0].keep == "k"
    assert written(f"{of_keeping}\nkeep: k", "--keep_weight=0")[0].keep is None


@pytest.mark.parametrize("value", ["keep_1", "keep-1", "keep", "drift_alpha"])
def test_the_value_of_a_flag_is_no_flag(value, written, recwarn):
    assert written("", "--output-dir", value)[2].output_dir == value
    with pytest.raises(ValueError, match="keep_samples is said of a keep set, and none is named"):
        written("keep_samples: 4", "--output-dir", value)
    written("", "--method", "sft", "--output-dir", value)
    assert not [warning for warning in recwarn if "does nothing here" in str(warning.message)]


def test_a_flag_of_guidance_does_nothing_in_sft_and_that_is_said(written):
    with pytest.warns(UserWarning, match=r"^method sft steers nothing, and so drift_start does nothing here\.$"):
        run, adapter, _ = written("", "--method", "sft", "--drift-start", "0.5")
    assert run.prior is None and adapter.drift_start == 0


def test_what_a_recipe_says_of_guidance_is_for_its_other_method(written):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*does nothing here")
        run, adapter, _ = written("drift_alpha: 0.7\ndrift_start: 0.5", "--method", "sft")
    assert run.prior is None and (adapter.drift_alpha, adapter.drift_start) == (0, 0)
    assert written("", "--drift-start", "0.5")[1].drift_start == 0.5


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"keep_top_k": 10**6}, r"keep_top_k=1000000 is more than the \d+ tokens that .*base has: lower it"),
        ({"keep_questions": "gone.txt"}, "there is no file of questions gone.txt"),
        ({"keep_images": "gone.parquet"}, "there is no file gone.parquet"),
        ({"keep_images": "empty"}, "there are no images in empty"),
    ],
)
def test_a_keep_set_that_cannot_be_made_is_told_before_the_prior_is_built(settings, told, train, tmp_path, monkeypatch):
    monkeypatch.setattr(sft_vlm, "open_prior", lambda _: pytest.fail("the prior was opened"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=told):
        train(**FAST, keep=tmp_path / "k.safetensors", **settings)
    assert not (tmp_path / "k.safetensors").exists()


def test_a_base_that_takes_no_images_is_named(train, pair, tmp_path):
    """As where base and expert have changed places. The expert's folder has a tokenizer alone."""
    folder = pair("qwen2_5_vl")
    text = shutil.copytree(folder / "expert", tmp_path / "text")
    shutil.copy(folder / "base" / "tokenizer.json", text)
    (text / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(SystemExit, match=r"text has no processor of images but \w+: name a vision-language model"):
        train(**FAST, base=text)


def test_a_prior_of_another_base_is_told(train, pair, tmp_path):
    """In 4 bits its fingerprint cannot tell."""
    folder = pair("qwen2_5_vl")
    other = shutil.copytree(folder / "base", tmp_path / "other")
    build_prior(folder / "expert", other, tmp_path / "p.safetensors", rank=8, reference=folder / "base", progress=False)
    with pytest.warns(UserWarning, match=r"p\.safetensors was built for .*other, and this run trains .*base: unless"):
        train(**{**FAST, "max_steps": 1}, prior=tmp_path / "p.safetensors")


@pytest.mark.parametrize("which", ["the same by another path", "a base with a part of Δ"])
def test_the_priors_own_base_is_not(which, train, pair, tmp_path):
    folder = pair("qwen2_5_vl")
    build_prior(folder / "expert", folder / "base", folder / "own.safetensors", rank=8, exist_ok=True, progress=False)
    base = tmp_path / "half"
    if which == "the same by another path":
        base.symlink_to(folder / "base")
    else:
        merge_baseline("task_arithmetic", folder / "expert", folder / "base", base, scale=0.5, progress=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*was built for")
        train(**{**FAST, "max_steps": 1}, base=base, prior=folder / "own.safetensors", reference=None)


@pytest.mark.parametrize(("steps", "told"), [(50, True), (2, True), (1, False)])
def test_a_strength_that_is_never_reached_is_told(steps, told, written, recwarn):
    run, drift, training = written("max_steps: 2", "--drift-warmup-steps", str(steps))
    recwarn.clear()
    sft_vlm.check_together(run, drift, vars(training))
    assert [str(warning.message) for warning in recwarn] == told * [
        f"drift_warmup_steps={steps} is no less than max_steps=2: the full strength is never reached."
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {"optim": "paged_adamw_8bit"},
        {"optim": "schedule_free_adamw"},
        {"optim": "adamw_torch", "optim_target_modules": "names of the real model"},
        {"optim": "adamw_torch", "learning_rate": 0},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": '{"min_lr": 1e-6}'},
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": '{"num_decay_steps": 1}'},
        {"dataloader_num_workers": 2, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 4},
        {"max_steps": -1, "warmup_steps": 0.1},
    ],
)
def test_what_trainer_can_make_of_its_settings_is_taken(settings):
    parse(
        flags(base="b", data="d", method="sft", output_dir="o", use_cpu=True, bf16=False, **settings), sft_vlm.__doc__
    )


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("model_init_kwargs: {revision: v2}", "model_init_kwargs has revision, while prior, .*: name it there"),
        ("model_init_kwargs: {subfolder: a}", "model_init_kwargs has subfolder, which may load other weights than"),
        ("model_init_kwargs: {torch_dtype: float32}", "has torch_dtype, the former name of dtype, .*: write dtype"),
        ("accelerator_config: {split_batch: true}", "has the unknown key split_batch; did you mean split_batches"),
        ("accelerator_config: {dispatch_batches: true}", "has dispatch_batches, which cannot be: it would cut a batch"),
        ("accelerator_config: {gradient_accumulation_kwargs: {num_steps: 2}}", "set gradient_accumulation_steps inst"),
        (
            "accelerator_config: {gradient_accumulation_kwargs: {sync: true}}",
            r"\{'sync': True\} in accelerator_config c",
        ),
        ("seed: -1", r"^seed is a number of at least 0 and below 2\*\*32, got -1"),
        ("data_seed: 4294967296", r"^data_seed is a number of at least 0 and below 2\*\*32, got 4294967296"),
        ("fsdp: full_shard", "^fsdp=.* is for several processes, and this is one: leave it out"),
    ],
)
def test_settings_inside_a_setting_are_refused(line, told, written):
    with pytest.raises(ValueError, match=told):
        written(line)


def test_settings_inside_a_setting_are_yaml_on_the_command_line_too(written):
    flags = "--model-init-kwargs", "{attn_implementation: eager}", "--gradient-checkpointing-kwargs={use_reentrant: no}"
    train = written("", *flags, "--accelerator-config", '{"even_batches": "false"}')[2]
    assert train.model_init_kwargs == {"attn_implementation": "eager"}
    assert train.gradient_checkpointing_kwargs == {"use_reentrant": False}
    assert train.accelerator_config.even_batches is False
    for flag, name in (("--model-init-kwargs", "model_init_kwargs"), ("--lr-scheduler-kwargs", "lr_scheduler_kwargs")):
        for text in ("{dtype:", "eager", "[1]", "settings.json"):
            told = f"{name} takes settings such as {{name: value}}, got {text!r}"
            with pytest.raises(ValueError, match=rf"^{re.escape(told)}$"):
                written("", flag, text)
        assert getattr(written("", flag, "null")[2], name) is None


def test_a_setting_that_checkpointing_does_not_have_is_refused(written):
    told = r"_kwargs=\{'reentrant': False\} cannot be: it has no reentrant, but use_reentrant, .*: leave out"
    with pytest.raises(ValueError, match=told):
        written("gradient_checkpointing_kwargs: {reentrant: false}")
    for line in ("{early_stop: false}", "{debug: true}", "{use_reentrant: true, preserve_rng_state: no}"):
        assert written(f"gradient_checkpointing_kwargs: {line}")
    if hasattr(PreTrainedModel, "activation_checkpointing_enable"):
        assert written("gradient_checkpointing_kwargs: {use_reentrant: false, every_n_layers: 2, offload: false}")
    selective = "gradient_checkpointing_kwargs: {use_reentrant: false, selective: false}"
    if hasattr(trl.models, "enable_selective_activation_checkpointing"):
        assert written(selective)
    else:
        with pytest.raises(ValueError, match=r"cannot be: .*selective"):
            written(selective)


@pytest.mark.parametrize(
    ("kwargs", "told"),
    [
        (
            {"attn_implementation": "flash_attention_2"},
            r"attn_implementation': 'flash_attention_2'} cannot be: .*: inst",
        ),
        (
            {"attn_implementation": "flash"},
            r"cannot be: Specified `attn_implementation=.*: install what it takes, name",
        ),
        ({"dtype": "float17"}, "has dtype 'float17': it takes one of auto, bfloat16"),
        ({"atn_implementation": "eager"}, r"has atn_implementation, .*base; did you mean attn_implementation\?"),
        (
            {"attn_implementation": {"text_confg": "eager"}},
            r"names text_confg, which .*base does not have; did you mean text_config\?",
        ),
        (
            {"attn_implementation": {"language": "eager"}},
            r"names language, which .*base does not have; it has .*text_config",
        ),
    ],
)
def test_what_the_base_is_not_loaded_with_is_told_before_the_prior_is_built(kwargs, told, train, monkeypatch):
    monkeypatch.setattr(sft_vlm, "open_prior", lambda _: pytest.fail("the prior was opened"))
    with pytest.raises(SystemExit, match=told):
        train(**FAST, model_init_kwargs=json.dumps(kwargs))


def test_what_the_base_is_loaded_with(train):
    kwargs = {"attn_implementation": {"text_config": "eager"}, "low_cpu_mem_usage": True}
    trainer, _ = train(**{**FAST, "max_steps": 1}, model_init_kwargs=json.dumps(kwargs))
    assert trainer.model.config.text_config._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["eos_token", "pad_token"])
def test_a_token_that_the_base_does_not_have_is_told_before_the_prior_is_built(name, train, monkeypatch):
    monkeypatch.setattr(sft_vlm, "open_prior", lambda _: pytest.fail("the prior was opened"))
    with pytest.raises(SystemExit, match=f"error: {name}=<none> is none of the base's tokens: name one"):
        train(**FAST, **{name: "<none>"})


def test_an_attention_that_loading_alone_allows_is_not_tried_before(pair, monkeypatch):
    base = Checkpoint(pair("qwen2_5_vl") / "base")
    kwargs = {"attn_implementation": "someone/kernel", "allow_all_kernels": True}
    rehearse_loading(base, kwargs)
    with pytest.raises(ValueError, match="someone/kernel"):
        rehearse_loading(base, {**kwargs, "allow_all_kernels": False})
