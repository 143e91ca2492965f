"""recipes/compare.py: what is chosen of the ways, what is refused, and the whole way on a tiny pair."""

import importlib
import json
import re
from argparse import Namespace
from pathlib import Path

import compare
import digits_pair
import evaluate
import numpy as np
import pytest
import yaml
from comparisons import SETTINGS, found
from older import loads_processors
from parts.choice import columns, summarize, write_choice
from parts.frontier import choose, draw, frontier, over_budget, read_measured
from parts.held_out import has_images
from parts.intervals import interval
from parts.search import space
from parts.ways import KINDS, ways_of
from peft import LoraConfig
from PIL import Image
from recipe_runs import FAST, KEEPING

from drift_peft import ReasoningPrior
from drift_peft.cli import main as drift_peft

pytestmark = pytest.mark.filterwarnings(
    "ignore:Switched off bitsandbytes", "ignore:.*gradient_checkpointing.*:FutureWarning"
)


def test_the_gated_prior_is_chosen_with_the_commands_that_make_it(tmp_path):
    (way,) = ways_of(SETTINGS, ["gated"], [], [], "k", "0123")
    result = {"recipe": "r", "seeds": [0], **summarize({way.name: found([0, 1], 0)}, {way.name: way.title}, way.name)}
    write_choice(result, way, {**SETTINGS, "keep": "k"}, None, tmp_path / "c.yaml", "t.txt")
    text = (tmp_path / "c.yaml").read_text(encoding="utf-8")
    asked = "--expert e --base b --keep k --texts t.txt --load-in-4bit"
    assert f"\n#   drift-peft prior gate p.safetensors {asked} -o gated.safetensors\n" in text
    assert "\n#   drift-peft prior export gated.safetensors --scale 1 -o gated\n" in text and "nothing" not in text
    assert yaml.safe_load(text) == {"base": "b", "expert": "e", "prior": "p.safetensors", "keep": "k"}


@pytest.mark.parametrize("adapter", [True, False])
def test_a_transplant_is_chosen_as_it_was_measured(adapter, tmp_path, monkeypatch):
    """Also where the expert is an adapter: with a rank or a reference it would be taken as a full fine-tune."""
    expert = tmp_path / "expert"
    expert.mkdir()
    (expert / ("adapter_config.json" if adapter else "config.json")).write_text("{}")
    settings = {**SETTINGS, "expert": str(expert), "reference": "a", "prior_rank": 8}
    (way,) = ways_of(settings, ["transplant"], [0.5], [], None)
    measured = []
    monkeypatch.setattr("drift_peft.transplant", lambda **given: measured.append(given))
    compare.Comparison(None, settings, {}, None, {}, None).transplant(way, tmp_path / "adapter")
    assert measured[0].pop("output") == tmp_path / "adapter"
    result = {"recipe": "r", "seeds": [0], **summarize({way.name: found([0, 1], 0)}, {way.name: way.title}, way.name)}
    write_choice(result, way, settings, None, tmp_path / "c.yaml")
    text, delta = (tmp_path / "c.yaml").read_text(encoding="utf-8"), {} if adapter else {"reference": "a", "rank": 8}
    assert yaml.safe_load(text) == measured[0] == {"expert": str(expert), "base": "b", **delta, "scale": 0.5}
    flags = "" if adapter else " --reference a --rank 8"
    assert f"\n#   drift-peft transplant --expert {expert} --base b{flags} --scale 0.5 -o transplanted\n" in text


def test_numbers_of_a_recipe_are_what_training_takes_them_for(tmp_path):
    """YAML 1.1 knows `1e-4` as a text, and so is what stands in quotes."""
    (tmp_path / "r.yaml").write_text(
        "{base: b, data: d, prior: p.safetensors, use_cpu: true, learning_rate: 1e-4, drift_alpha: '0.2'}"
    )
    settings = compare.read_recipe(tmp_path / "r.yaml")
    (way,) = ways_of(settings, ["drift"], [], [], None)
    assert {key: bounds["high"] for key, bounds in space(way, settings).items()} == pytest.approx(
        {"learning_rate": 5e-4, "drift_alpha": 1.0}
    )


def test_the_choice_keeps_most_of_what_cannot_be_told_from_the_best():
    """20 samples: 19 and 17 right are told apart no more than their paired interval says; 10 are."""
    best, alike, worse, beaten = (np.arange(20) < n for n in (19, 18, 10, 9))
    measured = {"base": found(worse, 0), "a": found(best, 0.9), "b": found(alike, 0.3), "c": found(beaten, 0.5)}
    assert frontier(measured) == ["base", "a", "b"]
    assert interval(best - alike.astype(float))[0] == 0 and interval(best - worse.astype(float))[0] > 0
    assert choose(measured) == "b"
    assert choose(measured, budget=0.2) == "base"
    assert choose({"a": measured["a"], "b": measured["b"]}, budget=0.1) is None
    assert over_budget("way", [0.9, 0.3], 0.1) == "no way costs at most 0.1 nats a token: the least is 0.3"


def test_the_picture_shows_every_way(tmp_path):
    measured = {"base": found([0, 1] * 5, 0), "a": found([1, 1] * 5, 2)}
    draw(measured, {"base": "VLM", "a": "DRIFT"}, "a", tmp_path / "c.png")
    assert Image.open(tmp_path / "c.png").width > 500


def test_the_demos_world_is_a_pair_as_users_have_them(tmp_path, capsys):
    """With exams by category, which its VLM answers as in the demo, from images of a single channel."""
    digits_pair.main([str(tmp_path / "d"), "--size", "9"])
    told = capsys.readouterr().out
    assert told.startswith(f"python recipes/compare.py {tmp_path / 'd' / 'recipe.yaml'} -o ")
    for recipe, images in (("recipe", True), ("text", False)):
        settings = compare.read_recipe(tmp_path / "d" / f"{recipe}.yaml")
        dataset, _, _ = compare.read_data(Namespace(test=None), settings)
        assert len(dataset) == 200 and has_images(dataset) == images
    flags = ["--model", settings["base"], "--data", tmp_path / "d" / "test.jsonl", "--prompt", ""]
    evaluate.main([*map(str, flags), "--max-new-tokens", "48", "-o", str(tmp_path / "r.json"), "--batch-size", "36"])
    result = json.loads((tmp_path / "r.json").read_text())
    categories = result["categories"]
    assert result["total"]["samples"] == 36
    assert [*categories] == ["2-3 operations", "4-5 operations", "perception", "text reasoning"]
    assert categories["perception"]["correct"] >= 8 > 4 >= categories["4-5 operations"]["correct"]


@pytest.fixture
def launched(monkeypatch):
    """The commands that were run, in this process."""
    commands = []

    def launch(*command):
        script, *flags = map(str, command)
        commands.append([script, *flags])
        if script == "-m":
            return drift_peft(flags[1:])
        importlib.import_module(Path(script).stem).main(flags)

    monkeypatch.setattr(compare, "launch", launch)
    monkeypatch.setattr("sft_vlm.plot_run", lambda history, output: None)
    return commands


def test_a_comparison_goes_on_where_it_was_stopped_and_ends_in_one_recipe(
    launched, pair, data, tmp_path, monkeypatch, capsys
):
    folder = pair("qwen2_5_vl")
    settings = {key: str(folder / key) for key in ("base", "expert")} | {"prior": str(folder / "p.safetensors")}
    settings |= {**FAST, **KEEPING, "data": str(data), "output_dir": str(tmp_path / "run"), "use_cpu": True}
    recipe, output = tmp_path / "recipe.yaml", tmp_path / "compared"
    recipe.write_text(yaml.safe_dump(settings))
    flags = [recipe, "-o", output, "--held-out", 3, "--steps", 1, "--keep-samples", 3, "--max-new-tokens", 3]
    flags += ["--scales", 0.5, "--ways", "base", "transplant", "merged-keep"]
    run = compare.launch

    def stopped(*command):
        if "--adapter" in command and "--keep" in command and "transplant-0.5" not in str(command):
            raise KeyboardInterrupt
        run(*command)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="stopped; the same command goes on"):
        patch.setattr(compare, "launch", stopped)
        compare.main([*map(str, flags)])
    launched.clear()
    compare.main([*map(str, flags)])
    (again,) = launched
    assert "--keep" in again and "merged-keep-0.5" in str(again)
    capsys.readouterr()
    compare.main([*map(str, flags), "--json"])
    assert len(launched) == 1
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((output / "compared.json").read_text())

    assert result["samples"] == 3 and [*result["ways"]] == ["base", "transplant-0.5", "merged-keep-0.5"]
    base, transplanted, trained = result["ways"].values()
    assert base["kl"][0] < min(transplanted["kl"][0], trained["kl"][0]) and base["agreement"] == 100
    assert trained["steps"] == 1 and "steps" not in base
    assert base["above_first"] == [0, 0, 0]
    place = output / "ways" / "merged-keep-0.5" / "seed0"
    run_record = json.loads((place / "adapter" / "run.json").read_text())
    assert run_record["data"]["samples"] == 5 and run_record["merged_first"]["scale"] == 0.5 and run_record["keep"]
    assert not (place / "adapter-base").exists() and not [*(place / "adapter").glob("checkpoint-*")]
    assert Image.open(output / "compared.png").width > 500
    text = (output / "choice.yaml").read_text(encoding="utf-8")
    assert re.match(
        r"# VLM as it is: the choice of recipes/compare.py .*recipe.yaml\n#\n#   nothing is trained: ", text
    )
    assert all(f"# {way['title']}" in text for way in result["ways"].values())
    assert yaml.safe_load(text) == {"base": settings["base"]}
    with pytest.raises(SystemExit, match=r"ledger.jsonl holds answers of other settings: --steps \(1, now 2\)"):
        compare.main([*map(str, flags), "--steps", "2"])


@loads_processors
def test_what_gates_take_is_made_once(launched, tmp_path, monkeypatch):
    """The prior and the keep set that the recipe names, and the expert's answers; then an adapter like the others."""
    digits_pair.main([str(tmp_path / "d"), "--size", "1"])
    settings = compare.read_recipe(tmp_path / "d" / "recipe.yaml") | {"keep_samples": 4, "prior_rank": 2}
    settings["processor_kwargs"] = {"do_resize": True, "min_pixels": 36, "max_pixels": 576}
    texts = tmp_path / "two.txt"
    texts.write_text("".join((tmp_path / "d" / "prompts.txt").read_text().splitlines(keepends=True)[:2]))
    (way,) = ways_of(settings, ["gated"], [], [], settings["keep"], "0123")
    args = Namespace(output=tmp_path, texts=texts, seeds=[0, 1])
    comparison = compare.Comparison(args, settings, {}, settings["keep"], {}, None)
    ((seed, folder),) = comparison.runs(way, "test").values()
    folder.mkdir(parents=True)
    run = compare.launch
    monkeypatch.setattr(compare, "launch", lambda *told: run(*told, *["--steps", 2] * ("gate" in told)))
    for _ in range(2):
        comparison.gate(folder)
    verbs = [["prior", "build"], ["keep", "make"], ["prior", "gate"], ["prior", "export"]]
    assert [told[2:4] for told in launched] == verbs
    for told in launched[1:3]:  # the images are those of training in both
        assert json.loads(told[told.index("--processor-kwargs") + 1]) == settings["processor_kwargs"]
    gated = ReasoningPrior.load(folder / "gated.safetensors").metadata["gated"]
    assert seed == 0 and gated["prompts"] == 2 and gated["steps"] == 2
    assert LoraConfig.from_pretrained(folder / "adapter").r == 2


def test_all_ways_see_images_as_they_are_trained_on(monkeypatch, data, tmp_path, capsys):
    """And chats, in keep sets to measure with and in each exam; a ledger of other exams is not gone on with."""
    kwargs, template = {"size": {"shortest_edge": 64, "longest_edge": 64}}, tmp_path / "chat.jinja"
    template.write_text("{{ messages }}")
    settings = {"base": "b", "data": str(data), "method": "sft", "use_cpu": True, "processor_kwargs": kwargs}
    settings |= {"output_dir": "o", "chat_template_path": str(template)}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    kwargs = {**kwargs, "chat_template": "{{ messages }}"}
    shown = []

    def launch(*command):
        *_, told = given = [*map(str, command)]
        if "--config" in given:
            folder = Path(yaml.safe_load(Path(told).read_text())["output_dir"])
            folder.mkdir()
            (folder / "run.json").write_text(json.dumps({"results": {"steps": 9, "train_runtime": 60}}))
            return
        shown.append(json.loads(given[given.index("--processor-kwargs") + 1]))
        rows = {"samples": [{"category": "all", "correct": True}], "answers": {"model": [{"kl": 0, "agreement": 1}]}}
        Path(given[given.index("-o") + 1]).write_text(json.dumps(rows))

    monkeypatch.setattr(compare, "launch", launch)
    output, ways = tmp_path / "out", ["--held-out", "2", "--ways", "base", "sft"]
    compare.main([str(tmp_path / "recipe.yaml"), "-o", str(output), *ways])
    assert shown == [kwargs] * 5
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("exams", "this exam"))]
    assert told[0] == "exams to come: 2, each of 2 answers of at most 16384 tokens (--max-new-tokens)"
    assert len(told) == 2 and "; exams to come: 1, " in told[1]
    asked, *lines = (output / "ledger.jsonl").read_text().splitlines(keepends=True)
    asked = json.loads(asked)
    assert asked.pop("examined with processor_kwargs") == kwargs
    (output / "ledger.jsonl").write_text("".join([json.dumps(asked) + "\n", *lines]))
    with pytest.raises(SystemExit, match=r"of other settings: examined with processor_kwargs \(None, now \{"):
        compare.main([str(tmp_path / "recipe.yaml"), "-o", str(output), *ways])


def test_samples_are_not_held_out_anew_for_other_settings(monkeypatch, data, tmp_path):
    """Nor where the first run was stopped before it had measured anything."""
    settings = {"base": "b", "data": str(data), "method": "sft", "use_cpu": True, "output_dir": "o"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    flags = [str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "out"), "--ways", "base"]

    def launch(*command):
        raise compare.Failed("stopped")

    monkeypatch.setattr(compare, "launch", launch)
    with pytest.raises(SystemExit, match="stopped"):
        compare.main([*flags, "--held-out", "2"])
    with pytest.raises(SystemExit, match=r"holds answers of other settings: --held-out \(2, now 1\)"):
        compare.main([*flags, "--held-out", "1"])


def test_minutes_are_as_many_steps_as_fit_by_the_pace_of_the_first(monkeypatch, tmp_path):
    """A kill between the two runs leaves nothing of the first one that would be taken for the second. The first alone
    is without warm-up, which its few steps would not get past."""
    (way,), args = ways_of(SETTINGS, ["drift"], [], [], None), Namespace(output=tmp_path, steps=None, minutes=0.5)
    settings, runs, warmups = {**SETTINGS, "drift_warmup_steps": 8}, [], []

    def launch(script, _, recipe, *flags):
        content = yaml.safe_load(Path(recipe).read_text())
        runs.append((content["max_steps"], content["data"], content["seed"], flags))
        warmups.append(content["drift_warmup_steps"])
        Path(content["output_dir"]).mkdir(parents=True)
        if len(runs) == 2:
            raise KeyboardInterrupt
        results = {"steps": content["max_steps"], "train_runtime": 2.0 * content["max_steps"]}
        (Path(content["output_dir"]) / "run.json").write_text(json.dumps({"results": results}))

    monkeypatch.setattr(compare, "launch", launch)
    (tmp_path / "drift").mkdir()
    with compare.Journal(tmp_path / "l.jsonl", {}) as ledger:
        comparison = compare.Comparison(args, settings, {"train": "t.parquet"}, None, {}, ledger)
        with pytest.raises(KeyboardInterrupt):
            comparison.train(way, tmp_path / "drift", 7, "train")
        facts = comparison.train(way, tmp_path / "drift", 7, "train")
        assert facts == comparison.train(way, tmp_path / "drift", 7, "train") == {"steps": 15, "minutes": 0.5}
    assert runs == [(5, "t.parquet", 7, ()), (15, "t.parquet", 7, ()), (15, "t.parquet", 7, ())]
    assert warmups == [0, 8, 8]


def test_minutes_are_told_where_they_are_known(tmp_path):
    """They are not of a run that was stopped and went on, and so not of its way."""
    (way,), lines = ways_of(SETTINGS, ["sft"], [], [], None), []
    for seed, seconds in enumerate(({"train_runtime": 90}, {})):
        folder = tmp_path / f"seed{seed}"
        (folder / "adapter").mkdir(parents=True)
        (folder / "adapter" / "run.json").write_text(json.dumps({"results": {"steps": 4, **seconds}}))
        (folder / "right.json").write_text(json.dumps({"samples": [{"category": "all", "correct": True}] * 2}))
        args = Namespace(output=tmp_path, steps=4, minutes=None)
        lines.append(
            compare.Comparison(args, SETTINGS, {"train": "t"}, None, {}, None).train(way, folder, seed, "train")
        )
    assert lines == [{"steps": 4, "minutes": 1.5}, {"steps": 4, "minutes": None}]
    folders = [tmp_path / "seed0", tmp_path / "seed1"]
    measured = {"one": read_measured(folders[:1], False, lines[:1]), "both": read_measured(folders, False, lines)}
    result = {"recipe": "r", "seeds": [0, 1], **summarize(measured, {"one": "one", "both": "both"}, "one")}
    assert [row[-2:] for row in columns(result)[1]] == [["4", "2"], ["4", ""]]
    assert result["ways"]["both"]["minutes"] is None


def test_what_cannot_be_compared_is_one_sentence(data, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"base": "b", "data": str(data), "method": "sft", "use_cpu": True}))
    usual = [str(recipe), "-o", str(tmp_path / "out")]
    for more, told in (
        (["--held-out", "5"], "5 of the 8 samples of the data would be held out: hold out fewer with --held-out"),
        (["--held-out", "0"], "--held-out is above 0, not 0"),
        (["--search", "-1"], "--search is a number of trials, and 0 for none, not -1"),
        (["--scales", "0.5", "0"], "--scales takes shares of Δ, such as 0.5, not 0"),
        (["--merge-first", "0.5", "nan"], "--merge-first takes shares of Δ, such as 0.5, not nan"),
        (["--scales", "0.3", "0.30000001"], "--scales names 0.3 twice: name each once"),  # one folder for both
        (["--merge-first", "1", "0.5", "1.0"], "--merge-first names 1 twice: name each once"),
        (["--seeds", "0", "1", "0"], "--seeds names 0 twice: name each once"),
        (["--ways", "base", "base"], "--ways names base twice: name each once"),
        (["--minutes", "nan"], "--minutes is a finite number, at least 0, not nan"),
        (["--budget", "-1"], "--budget is a finite number, at least 0, not -1"),
        (["--ways", "drfit"], r"--ways takes one of base, .*, not drfit; did you mean drift\?"),
        (["--held-out", "2", "--ways", "drift"], "drift cannot be compared: the recipe names no prior"),
    ):
        with pytest.raises(SystemExit, match=told):
            compare.main([*usual, *more])
    assert len(KINDS) == 14


def test_what_cannot_be_compared_leaves_nothing_behind(data, texts, tmp_path, monkeypatch):
    """So that the corrected command is not refused, and nothing is examined first."""
    monkeypatch.setattr(compare, "launch", lambda *command: pytest.fail("launched"))
    (empty := tmp_path / "empty.txt").write_text("\n")
    settings = {"base": "b", "method": "sft", "use_cpu": True, "output_dir": "o"}
    output, absent, usual = tmp_path / "out", tmp_path / "nope.txt", ["--held-out", "2"]
    drift = {"prior": "someone/prior", "drift_alpha": 0, "method": "drift"}
    for samples, own, more, told in (
        (data, {}, [], "100 of the 8 samples of the data would be held out: hold out fewer with --held-out"),
        (data, {}, [*usual, "--texts", absent], f"--texts {absent} is no file with prompts: name one, with a prompt a"),
        (data, {}, [*usual, "--texts", empty], f"--texts {empty} is no file with prompts: name one, with a prompt a"),
        (data, {}, [*usual, "--texts", __file__], "gated cannot be compared: the recipe names no expert"),
        (data, {}, [*usual, "--scales", "0.5"], "transplant cannot be compared: the recipe names no expert"),
        (data, {}, [*usual, "--merge-first", "0.2"], "merged cannot be compared: the recipe names no expert"),
        (data, {"learning_rate": 0}, [*usual, "--search", "2"], "--search tries learning_rate around .*, which is 0: "),
        (
            data,
            drift,
            [*usual, "--search", "2"],
            "drift_alpha around .*, which is 0: give it a value above 0, or leave --search out",
        ),
        (
            texts,
            {},
            [*usual, "--budget", "0.1"],
            "--budget is of the distance from the VLM's own answers, and there are",
        ),
        (
            texts,
            {},
            [*usual, "--search", "2", "--budget", "0.1", "--test", data],  # which has images, unlike validation
            "--budget is of the distance from the VLM's own answers, and there are",
        ),
        (
            texts,
            {"keep": str(tmp_path / "k.safetensors"), "keep_batch_size": 2},
            usual,
            "there is no keep set .*k.safetensors, and the samples to train on have no images to make it of: name a ",
        ),
        (data, {"replay": 0.2}, usual, r"replay=0\.2 takes the answers of a keep set: name one with keep"),
        (
            data,
            {"env": {"DRIFT_TEST": "1"}, "split": "test"},
            usual,
            "has no splits, so split test cannot be taken of it",
        ),
    ):
        (tmp_path / "r.yaml").write_text(yaml.safe_dump({**settings, **own, "data": str(samples)}))
        with pytest.raises(SystemExit, match=told):
            compare.main([str(tmp_path / "r.yaml"), "-o", str(output), *map(str, more)])
        assert not output.exists(), told


def test_a_folder_of_something_else_is_not_written_into(data, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "read_recipe", lambda file: pytest.fail("read"))
    for name in ("vlm/config.json", "vlm/model.safetensors", "file"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    before = {path: path.is_dir() or path.read_text() for path in tmp_path.rglob("*")}
    for output, told in (
        ("vlm", "vlm holds config.json, and no ledger.jsonl to go on from: name another folder"),
        ("file", "file cannot be written: .*file is no folder, or not yours to write to"),
        ("file/out", "out cannot be written: .*file is no folder, or not yours to write to"),
    ):
        with pytest.raises(SystemExit, match=f"output .*{told}"):
            compare.main(["r.yaml", "-o", str(tmp_path / output)])
    assert {path: path.is_dir() or path.read_text() for path in tmp_path.rglob("*")} == before
    monkeypatch.setattr(compare, "read_recipe", lambda file: {}["read"])
    for name in ("empty", "logged/log.txt", "killed/ledger.jsonl.lock"):  # a kill may leave no more than the lock
        (tmp_path / name).mkdir(parents=True)
        with pytest.raises(KeyError, match="read"):
            compare.main(["r.yaml", "-o", str(tmp_path / name.partition("/")[0])])


def test_another_script_says_what_is_wrong_with_it(tmp_path, capfd):
    compare.launch("-c", "print('it ran')")
    with pytest.raises(
        compare.Failed, match=r"python -c 'raise SystemExit\(3\)' has failed, .* the same command goes on"
    ):
        compare.launch("-c", "raise SystemExit(3)")
    assert capfd.readouterr().err == "it ran\n"  # stdout is for the result
