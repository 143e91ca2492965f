"""drift-peft preflight on the command line: its tables, its advice, and mistakes in a recipe."""

import inspect
import json
import sys
from dataclasses import fields, replace

import preflight as benchmark
import pytest
import tiny_memory
import transformers as tf
import yaml
from command import run
from hub import Hub
from parts.arguments import RecipeParser
from peft import LoraConfig
from tiny import FAMILIES, save_layout, tiny_llm
from tiny_memory import TINY, settings, slow
from transformers import TrainingArguments
from trl import SFTConfig

from drift_peft import gate_prior
from drift_peft.choices import SAID_TOKENS
from drift_peft.preflight import cards
from drift_peft.preflight.cards import TRL, USABLE, advise, cards_table, read_settings, recipe_keys, trl_keys
from drift_peft.preflight.gating import gating_table
from drift_peft.preflight.memory import Memory, Settings

memory = tiny_memory.memory  # fixture


@pytest.fixture
def recipe(tmp_path):
    """A recipe whose base is a config.json without weights."""
    TINY().save_pretrained(tmp_path / "base")
    content = {
        "base": str(tmp_path / "base"),
        "data": "d.jsonl",
        "prior": "p.safetensors",
        "r": 16,
        "max_tokens": 128,
        "learning_rate": 1e-4,
    }
    content |= {"per_device_train_batch_size": 1, "optim": "paged_adamw_8bit", "processor_kwargs": {"max_pixels": 256}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "recipe.yaml"


def save_base(folder, **content):
    """A base's config.json, with what else it holds."""
    TINY().save_pretrained(folder)
    known = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(known | content))


def card(estimate):
    """GB of the card that this just fits."""
    return estimate.bytes * (1 + 1e-9) / USABLE / 1e9


def test_advice_names_the_one_setting_that_helps_most(memory):
    now = memory.estimate(settings(r=8, per_device_train_batch_size=8, gradient_checkpointing=False))
    fewer, lean = (
        memory.estimate(replace(now.settings, **change))
        for change in ({"per_device_train_batch_size": 1}, {"optim": "paged_adamw_8bit"})
    )
    assert fewer.bytes < lean.bytes < now.bytes
    advice = advise(memory, now, card(lean))  # either would do
    assert (advice["setting"], advice["value"], advice["fits"]) == ("per_device_train_batch_size", 1, True)
    assert advice["total_gb"] == fewer.bytes / 1e9
    assert advice["all"].keys() == {"per_device_train_batch_size", "optim", "gradient_checkpointing", "max_tokens"}


def test_advice_takes_no_step_that_cannot_matter(monkeypatch):
    memory = Memory(TINY(), "tiny")
    now, taken, take = memory.estimate(settings(max_tokens=4096)), [], memory.step_peaks
    monkeypatch.setattr(memory, "step_peaks", lambda step: (taken.append((step.tokens, step.r)), take(step))[1])
    few, low = (memory.estimate(replace(now.settings, **change)) for change in ({"max_tokens": 512}, {"r": 8}))
    both = memory.estimate(replace(few.settings, r=8))
    for least, estimate in ((low, now), (both, few)):
        assert memory.least(least.settings, estimate) <= least.bytes
    assert memory.least(both.settings, now) <= both.bytes < few.bytes < low.bytes < now.bytes
    taken.clear()
    optim = {"optim": "paged_adamw_8bit"}
    assert advise(memory, now, 0.3)["all"] == {**optim, "r": 8, "max_tokens": 512}  # less than the context
    assert not taken or {*taken} == {(512, 16), (4096, 16)}
    advice = advise(memory, now, card(few))
    assert (advice["setting"], advice["value"], advice["fits"]) == ("max_tokens", 512, True)
    assert advice["fits_with_all"] and {*taken} == {(512, 16), (4096, 16)}
    assert advise(memory, now, card(both))["fits_with_all"]


@pytest.mark.parametrize(
    "kwargs, least",
    [
        pytest.param(None, 13 * 256 + 512, marks=slow),
        pytest.param({"max_patches": 4}, 5 * 256 + 512, marks=slow),
        pytest.param({"crop_to_patches": False}, 256 + 512, marks=slow),
    ],
)
def test_advice_leaves_room_for_images_that_are_cut_into_tiles(kwargs, least):
    """Below their tokens, training would drop the samples that have them."""
    text = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2}
    config = tf.InternVLConfig(text_config={"model_type": "qwen2", "num_key_value_heads": 2, "vocab_size": 64, **text})
    memory = Memory(config, "tiles")
    now = memory.estimate(settings(max_tokens=8192, processor_kwargs=kwargs))
    assert advise(memory, now, 1e-3)["all"]["max_tokens"] == least
    few = memory.estimate(settings(max_tokens=512, processor_kwargs=kwargs))
    assert advise(memory, few, 1e-3)["all"]["max_tokens"] == 512


@pytest.mark.slow
def test_advice_lowers_max_tokens_no_further_than_needed(memory):
    now = memory.estimate(settings(max_tokens=8192, r=8, optim="paged_adamw_8bit"))
    few = memory.estimate(replace(now.settings, max_tokens=3000))
    advice = advise(memory, now, card(few))
    assert advice["setting"] == "max_tokens" and advice["fits"]
    assert 2560 <= advice["value"] <= 3000 and advice["value"] % 256 == 0
    assert not advise(memory, now, 0.3)["fits_with_all"]  # less than the context


def test_the_verdict_says_what_to_change():
    advice = {"setting": "r", "value": 8, "total_gb": 7.0, "fits": True, "all": {"r": 8, "max_tokens": 512}}
    told = []
    for card in (
        {"fits": True},
        {"fits": False, "advice": {**advice, "fits_with_all": True}},
        {"fits": False, "advice": {**advice, "fits": False, "fits_with_all": True}},
        {"fits": False, "advice": {**advice, "fits": False, "fits_with_all": False}},
    ):
        table = cards_table({"total_gb": 7.4, "cards": [{"gb": 8, "usable_gb": 7.5, **card}]})
        told.append(str(next(table.columns[2].cells)))
    assert told == [
        "fits, with 0.1 GB to spare",
        "does not fit; with r: 8 it does (7.0 GB)",
        "does not fit; r: 8 helps most (7.0 GB), and enough is only r: 8, max_tokens: 512",
        "fits no card of this size at any of these settings",
    ]


def test_the_command(recipe, capsys):
    both = "--set", "max_tokens=256", "--set", "bf16=true", "r=8", "--json"
    status, out, _ = run(capsys, "preflight", recipe, *both)
    summary = json.loads(out)
    settings = summary["settings"]
    assert status == 0 and (settings["max_tokens"], settings["bf16"], settings["r"]) == (256, True, 8)
    assert summary["total_gb"] == pytest.approx(sum(summary["parts_gb"].values()))
    assert [(c["gb"], c["fits"]) for c in summary["cards"]] == [(8, True), (12, True), (16, True), (24, True)]
    several = json.loads(run(capsys, "preflight", recipe, "--set", "images_per_sample=4", "--json")[1])
    assert several["patches"] == 4 * summary["patches"] and several["settings"]["images_per_sample"] == 4
    assert "each with 4 images of at most 64 patches" in " ".join(
        run(capsys, "preflight", recipe, "--set", "images_per_sample=4")[1].split()
    )
    status, out, _ = run(capsys, "preflight", recipe)
    out = " ".join(out.split())
    assert status == 0 and "CUDA context" in out and "1 x 128 tokens, each with 1 image of at most 16 patches" in out
    assert "24 GB" in out and "fits, with" in out and "94% of a card" in out


def test_eager_attention_is_counted_in_tower_and_language_model(recipe, capsys):
    plain, eager, same = (
        json.loads(run(capsys, "preflight", recipe, "--json", "--set", f"model_init_kwargs={kwargs}")[1])
        for kwargs in ("null", "{attn_implementation: eager, low_cpu_mem_usage: true}", "{dtype: bfloat16}")
    )
    assert eager["total_gb"] > plain["total_gb"] and same["parts_gb"] == plain["parts_gb"]


@pytest.mark.parametrize("flags", [(), ("--gates",)])
def test_a_setting_of_the_processor_that_is_not_counted_is_told(flags, recipe, capsys):
    with pytest.warns(UserWarning, match="^crop_size in processor_kwargs is not counted for qwen2_5_vl: if images"):
        status = run(capsys, "preflight", recipe, "--set", "processor_kwargs={crop_size: 64, max_pixels: 256}", *flags)[
            0
        ]
    assert status == 0


def test_a_base_that_asks_for_kernels_of_attention_needs_none_here(recipe, capsys, tmp_path):
    """transformers writes no such key, people do."""
    known = run(capsys, "preflight", recipe, "--json")[1]
    save_base(tmp_path / "base", _attn_implementation="flash_attention_2")
    status, out, err = run(capsys, "preflight", recipe, "--json")
    assert (status, err, out) == (0, "", known)


def test_data_may_come_by_a_flag_of_the_run(recipe, capsys):
    known = run(capsys, "preflight", recipe, "--json")
    content = yaml.safe_load(recipe.read_text())
    del content["data"]
    recipe.write_text(yaml.safe_dump(content))
    assert run(capsys, "preflight", recipe, "--json") == known


def test_what_gating_takes(recipe, capsys):
    status, out, _ = run(capsys, "preflight", recipe, "--gates", "--json")
    summary = json.loads(out)
    assert status == 0 and summary["total_gb"] == pytest.approx(sum(summary["parts_gb"].values()))
    shapes = Memory(TINY(), "tiny").shapes.values()
    prior = 2 * sum(min(64, *shape) * sum(shape) for shape in shapes)
    assert summary["parts_gb"]["prior, 16 bits"] == pytest.approx(prior / 1e9)
    assert summary["tokens"] == 200 * 8 * (400 + 512) and summary["sequences"] == summary["tokens"] / 128
    defaults = {name: p.default for name, p in inspect.signature(gate_prior).parameters.items()}
    assert (defaults["steps"], defaults["batch_size"], SAID_TOKENS) == (200, 8, 512)
    assert "1.5 million tokens: as long as training on 11400 sequences" in str(gating_table(summary).caption)


@pytest.mark.parametrize("beside", [[], ["preprocessor_config.json", "processor_config.json"]])
def test_nothing_but_configurations_is_downloaded(beside, recipe, capsys, tmp_path, monkeypatch):
    save_layout(FAMILIES["qwen2_5_vl"][1](TINY()), tmp_path / "whole")
    for name in beside:
        (tmp_path / "whole" / name).write_text(json.dumps({"name": name}))  # the hub keeps the same bytes once
    with Hub() as hub:
        hub.use(monkeypatch, tmp_path / "cache")
        hub.add("user/base", tmp_path / "whole")
        assert run(capsys, "preflight", recipe, "--set", "base=user/base", "--json")[0] == 0
        assert sorted(hub.fetched("user/base")) == ["config.json", *beside] and not hub.peeked("user/base")


def test_a_recipe_may_have_the_keys_that_training_takes():
    parser = RecipeParser("a\n\nb\n\nc")
    taken = {action.dest for action in parser._actions} - {"help", "config"} | {"env"}
    ours = taken - {field.name for field in fields(SFTConfig)}
    assert taken <= recipe_keys() and ours == recipe_keys() - {field.name for field in fields(SFTConfig)}


def test_keys_of_a_newer_trl_are_those_that_it_has(tmp_path, monkeypatch):
    here = {field.name for field in fields(SFTConfig)} - {field.name for field in fields(TrainingArguments)}
    assert here <= {*trl_keys()}
    trainer = tmp_path / "trl" / "trainer"
    trainer.mkdir(parents=True)
    (tmp_path / "trl" / "__init__.py").write_text("raise ImportError('not to be imported')")
    (trainer / "sft_config.py").write_text("class SFTConfig:\n    brand_new: int = 1\n    other = 2\n")
    monkeypatch.delitem(sys.modules, "trl")
    monkeypatch.syspath_prepend(tmp_path)
    assert trl_keys() == {*TRL, "brand_new"} and "brand_new" in recipe_keys()
    monkeypatch.setattr(cards, "find_spec", lambda name: None)
    assert trl_keys() == {*TRL}


@pytest.mark.parametrize(("key", "way_out"), [
    ("max_token", "did you mean max_tokens?"), ("lora_r", "did you mean r?"),
    ("per_device_train_batchsize", "did you mean per_device_train_batch_size?"),
    ("use_dora", "did you mean use_rslora?"), ("xyz", "take it out"),
])  # fmt: skip
def test_a_key_that_no_recipe_has_is_not_passed_over(key, way_out, recipe, capsys):
    recipe.write_text(f"{recipe.read_text()}{key}: 8\n")
    for flags in ((), ("--gates",)):
        status, _, err = run(capsys, "preflight", recipe, *flags)
        assert status == 1 and err.endswith(f"has the key {key}, which no recipe has: {way_out}\n")


@pytest.mark.parametrize(
    "changes, message",
    [
        (["max_token=5"], "max_token does not decide what memory a recipe takes; did you mean max_tokens?"),
        (["max_tokens"], "--set max_tokens names no value: write key=value"),
        (["max_tokens=many"], "max_tokens takes a whole number, got 'many'"),
        (["images_per_sample=0"], "images_per_sample must be a whole number ≥ 1, got 0"),
        (
            ["optim=adamm"],
            "apollo_adamw, apollo_adamw_layerwise, stable_adamw, not adamm; did you mean",
        ),
        (["processor_kwargs=5"], "processor_kwargs takes a text or settings such as {name: value}, got 5"),
        (["processor_kwargs={max_pixels: many}"], "max_pixels must be a whole number ≥ 1, got 'many'"),
        (["processor_kwargs={size: {longest_edge: 0}}"], "longest_edge must be a whole number ≥ 1, got 0"),
        (["processor_kwargs={max_soft_tokens: 1.5}"], "max_soft_tokens must be a whole number ≥ 1, got 1.5"),
        (
            ["drift_norm=wieght"],
            "drift_norm takes one of factor, weight, not wieght; did you mean weight?",
        ),
        (["drift_rank=0"], "drift_rank must be None or a whole number ≥ 1, got 0"),
        (["drift_sketch=-5"], "drift_sketch must be None or a whole number ≥ 1, got -5"),
        (["drift_modules=[]"], "drift_modules must be None, or name presets"),
        (["keep_weight=-1"], "keep_weight is a number of at least 0, and 0 keeps nothing, got -1"),
        (["keep_weight=.nan"], "keep_weight is a number of at least 0, and 0 keeps nothing, got nan"),
        (["lora_dropout=2"], "lora_dropout is the probability that a number is left out, at most 1, got 2"),
        (["bf16=true", "fp16=true"], "bf16 and fp16 are both true, and training is in one of them: leave one out"),
        (["model_init_kwargs=5"], "model_init_kwargs takes settings such as {name: value}, got 5"),
        (
            ["model_init_kwargs={device_map: cpu}"],
            "what device_map in model_init_kwargs takes is not counted: leave it",
        ),
        (["model_init_kwargs={torch_dtype: float32}"], "has torch_dtype, the former name of dtype"),
        (["model_init_kwargs={dtype: float32}"], "dtype float32, while training computes in bfloat16 by bf16 and fp16"),
        (["model_init_kwargs={quantization_config: {}}"], "has quantization_config, which the recipe sets itself"),
        (["processor_kwargs={max_patches: many}"], "max_patches must be a whole number ≥ 1, got 'many'"),
        (["base=no/where"], "no/where"),
        (["base=EMPTY"], "has no config.json"),
        (["base=TEXT"], "is no vision-language model"),
        (["base=QUANTIZED"], "is quantized (awq): give the full-precision model"),
        (["base=PART"], "is quantized (gptq): give the full-precision model"),
        (["base=MLX"], "is quantized (MLX): give the full-precision model"),
        (["base=null"], "is no recipe: it names no base"),
        (["base=[a, b]"], "base takes a text, got ['a', 'b']"),
        (["base=ADAPTER"], "ADAPTER is an adapter, not a model: name the model that it was trained on"),
    ],
)
def test_mistakes_are_one_sentence(changes, message, recipe, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "ADAPTER").mkdir()
    (tmp_path / "ADAPTER" / "adapter_config.json").write_text("{}")
    tiny_llm("llava").config.save_pretrained(tmp_path / "TEXT")
    save_base(tmp_path / "QUANTIZED", quantization_config={"quant_method": "awq"})
    save_base(tmp_path / "MLX", quantization={"group_size": 64, "bits": 4})
    part = {**TINY().to_dict()["text_config"], "quantization_config": {"quant_method": "gptq", "bits": 4}}
    save_base(tmp_path / "PART", text_config=part)
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, "preflight", recipe, "--set", *changes)
    assert status == 1 and out == "" and err.count("\n") == 1 and message in err


def test_a_recipe_is_read_as_it_is_meant(tmp_path):
    """As by recipes/sft_vlm.py: tests/recipes/test_interrupted.py."""
    lines = [
        "base: b",
        "data: d",
        "prior: p",
        "max_tokens: 2e3",
        "r: '16'",
        "think_tokens: 'no'",
        "bf16: 'off'",
        "gradient_checkpointing: 0",
    ]
    lines += ["processor_kwargs: {max_pixels: 1e6}", "lora_dropout: '5e-2'", "drift_modules: attn"]
    (tmp_path / "a.yaml").write_text("\n".join(lines))
    wanted = dict(max_tokens=2000, r=16, think_tokens=False, bf16=False, gradient_checkpointing=False)
    wanted |= dict(processor_kwargs={"max_pixels": 10**6}, lora_dropout=0.05, drift_modules="attn")
    assert read_settings(tmp_path / "a.yaml") == Settings("b", **wanted)
    (tmp_path / "a.yaml").write_text("\n".join([*lines, "keep: none", "keep_samples: 4"]))
    assert read_settings(tmp_path / "a.yaml").keep is None
    for line, sentence in (("think_tokens: 'perhaps'", "think_tokens takes yes or no, got 'perhaps'"),
                           ("optim: null", "optim has no value: give it one, or leave the key out"),
                           ("lora_dropout: [1]", r"lora_dropout takes a number, got \[1\]")):  # fmt: skip
        (tmp_path / "a.yaml").write_text(f"base: b\ndata: d\nprior: p\n{line}")
        with pytest.raises(ValueError, match=f"^{sentence}$"):
            read_settings(tmp_path / "a.yaml")


@pytest.mark.skipif(not hasattr(TrainingArguments, "activation_checkpointing"), reason="transformers has the old name")
def test_the_new_name_of_checkpointing_wins_as_in_training(tmp_path, memory):
    for old, new in ((True, False), (False, True), (False, None)):
        keys = {"base": "b", "data": "d", "prior": "p", "gradient_checkpointing": old, "activation_checkpointing": new}
        (tmp_path / "a.yaml").write_text(yaml.safe_dump(keys))
        found = read_settings(tmp_path / "a.yaml")
        training = TrainingArguments(str(tmp_path), gradient_checkpointing=old, activation_checkpointing=new)
        assert found.checkpoints == found.step.checkpointing == training.activation_checkpointing
    off = settings(r=8, activation_checkpointing=False)
    advice = advise(memory, memory.estimate(off), 1e-3)
    assert advice["all"]["activation_checkpointing"] is True and "gradient_checkpointing" not in advice["all"]
    assert read_settings(tmp_path / "a.yaml", {"activation_checkpointing": True}).checkpoints


@pytest.mark.parametrize("name", cards.CHECKPOINTING)
def test_layers_that_are_left_out_of_checkpointing_are_not_counted(tmp_path, name):
    if f"{name}_kwargs" not in recipe_keys():
        pytest.skip("transformers has the old name")
    recipe = "base: b\ndata: d\nprior: p\n{}_kwargs: {{every_n_layers: {}}}"
    (tmp_path / "a.yaml").write_text(recipe.format(name, 1))
    read_settings(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text(recipe.format(name, 2))
    with pytest.raises(
        ValueError, match=f"^what every_n_layers: 2 in {name}_kwargs takes is not counted: leave it out"
    ):
        read_settings(tmp_path / "a.yaml")


def test_what_training_takes_is_not_refused():
    """It leaves nothing out below 0, smooths by any factor, and with sft does not look at the guidance's settings."""
    LoraConfig(lora_dropout=-1)
    SFTConfig(label_smoothing_factor=2, use_cpu=True, bf16=False)
    settings(lora_dropout=-1.0, label_smoothing_factor=2.0)
    settings(method="sft", drift_rank=0)


def test_a_file_that_is_no_recipe(capsys, tmp_path):
    for content, message in (("a: [", "is no YAML"), ("just words", "is no recipe")):
        (tmp_path / "recipe.yaml").write_text(content)
        status, _, err = run(capsys, "preflight", tmp_path / "recipe.yaml")
        assert status == 1 and message in err
    assert "No such file" in run(capsys, "preflight", tmp_path / "none.yaml")[2]
    with pytest.raises(
        FileNotFoundError, match=r"recipe none\.yaml cannot be read: .*; name a YAML file such as recipes/"
    ):
        read_settings("none.yaml")


def test_the_benchmark_in_its_smallest_size(capsys):
    benchmark.main(["--smallest", "--tokens", "64", "--image", "56"])
    printed = capsys.readouterr().out
    (row,) = json.loads(printed.splitlines()[-1])["rows"]
    assert row["tokens"] == 64 and 0 < row["estimated_gb"] < row["total_gb"]
    assert "measured_gb" not in row and "not measured: no CUDA device" in printed
