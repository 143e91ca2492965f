"""recipes/reproduce_drift.sh: its commands are such as the scripts take; and all of it on a tiny pair (slow)."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import sft_vlm
import yaml
from parts import asked_models, reproduced
from parts.arguments import parse
from recipe_runs import CONFIGS, FAST, KEEPING, RECIPES

pytestmark = pytest.mark.skipif(os.name == "nt", reason="bash")
ADAPTERS = ("sft", "merged", "drift", "drift-keep")
STAND_IN = """
import csv, json, sys
from pathlib import Path
config, folder = (Path(sys.argv[sys.argv.index(flag) + 1]) for flag in ("--config", "--work-dir"))
for i, (name, settings) in enumerate(json.loads(config.read_text())["model"].items()):
    assert (Path(settings["model_path"]) / "config.json").is_file(), settings
    file = folder / name / "T20261122-093000" / f"{name}_MathVista_MINI.tsv"
    file.parent.mkdir(parents=True)
    with open(file, "w", newline="") as out:
        rows = csv.writer(out, delimiter="\\t", quoting=csv.QUOTE_ALL)
        rows.writerow(["index", "question", "answer", "prediction"])
        rows.writerows([j, f"What is {j} + 1?", j + 1, rf"\\boxed{{{j + 1 if j < 2 + i else 0}}}"] for j in range(9))
"""


def started(*arguments, cwd=None, **variables):
    environment = {**os.environ, "PYTHON": sys.executable, **{name: str(value) for name, value in variables.items()}}
    command = ["bash", str(RECIPES / "reproduce_drift.sh"), *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True)


def reproduce(*arguments, **variables):
    done = started(*arguments, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def refused(*arguments, **variables):
    done = started(*arguments, **variables)
    assert done.returncode and "Traceback" not in done.stderr, done.stderr
    return done.stderr.splitlines()[-1]


@pytest.fixture
def recipe(pair, data, tmp_path):
    """The paper's recipe, on a tiny pair."""
    folder = pair("qwen2_5_vl")
    settings = yaml.safe_load((CONFIGS / "qwen2_5_vl_7b_r1.yaml").read_text())
    names = {key: str(folder / key) for key in ("base", "expert")} | {"data": str(data)}
    made = {key: str(tmp_path / f"{key}.safetensors") for key in ("prior", "keep")}
    settings |= {**names, **made, **FAST, **KEEPING, "use_cpu": True, "optim": "adamw_torch"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "recipe.yaml"


def test_its_commands_are_ones_that_the_scripts_take(recipe, pair, tmp_path):
    """Each way is what it is called, whatever the recipe replays and merges first."""
    settings = yaml.safe_load(recipe.read_text()) | {"replay": 0.5, "merge_first": 0.5, "keep_weight": 3.0}
    recipe.write_text(yaml.safe_dump(settings))
    base, variables = pair("qwen2_5_vl") / "base", {"VLMEVALKIT": "kit", "LMMS_EVAL_PYTHON": "python3"}
    flags = ["--base", "base", "--keep-weight", 2]  # the path starts from the folder that it is called in
    told = reproduce(recipe, *flags, cwd=base.parent, OUT=tmp_path / "out", DRY_RUN=1, **variables)
    assert f"vlmevalkit_qwen2_5_vl.json {tmp_path}/out/vlmevalkit.json base={base} sft=" in "\n".join(told)
    commands = [shlex.split(line[1:]) for line in told if line.startswith("+ ") and "$'" not in line]
    trained = [command[2:] for command in commands if command[1].endswith("sft_vlm.py")]
    found = {}
    for command in trained:
        run, drift, train = parse(command, sft_vlm.__doc__)
        assert run.merge and run.replay == 0 and run.base == "base"
        keeps = run.keep is not None and run.keep_weight
        way = run.method, run.merge_first, keeps, drift.drift_alpha
        found[train.output_dir.rpartition("/")[2]] = way
    assert found == {
        "sft": ("sft", None, False, 0),
        "merged": ("sft", 0.2, False, 0),
        "drift": ("drift", None, False, 0.3),
        "drift-keep": ("drift", None, 2, 0.3),
    }
    assert commands[4][0] == "env" and commands[4][3:5] == ["-m", "parts.asked_models"]
    assert [command[1:3] for command in commands[5:7]] == [["kit"], ["run.py", "--config"]]
    assert [command[1] for command in commands[7:10]] == [str(RECIPES / "score.py")] * 3
    models = [command[command.index("--model_args") + 1] for command in commands[10:]]
    merged = [f"pretrained={tmp_path}/out/{name}-merged,device_map=auto" for name in found]
    assert models == [f"pretrained={base},device_map=auto", *merged]
    assert all(command[command.index("--model") + 1] == "qwen2_5_vl" for command in commands[10:])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("family", "settings"), [
    ("qwen2_5_vl", "vlmevalkit_qwen2_5_vl.json"), ("qwen2_vl", "vlmevalkit_qwen2_5_vl.json"),
    ("qwen3_vl", "vlmevalkit_qwen3_vl.json"),
])  # fmt: skip
def test_the_base_is_the_one_that_is_trained_on_and_its_kind_decides_how_it_is_asked(
    family, settings, pair, recipe, capsys, monkeypatch
):
    folder, rest = pair(family), yaml.safe_load(recipe.read_text())
    monkeypatch.setenv("VLMEVALKIT", "kit")
    monkeypatch.chdir(folder)
    for base, flags in (("base", []), ("no/where", ["--base=base"]), ("no/where", ["--base", "./base"])):
        recipe.write_text(yaml.safe_dump({**rest, "base": base}))
        reproduced.main(["--config", str(recipe), *flags])
        assert capsys.readouterr().out.splitlines() == [str(RECIPES / "eval" / settings), family, str(folder / "base")]
    assert (RECIPES / "eval" / settings).is_file()


def test_what_cannot_be_asked_is_refused(pair, monkeypatch):
    monkeypatch.setenv("VLMEVALKIT", "kit")
    base, config = pair("llava_next") / "base", ["--config", str(CONFIGS / "qwen2_5_vl_7b_r1.yaml")]
    for flags, told in (
        (["--base", str(base)], f"base {base} is llava_next: leave out VLMEVALKIT"),
        (["--base", "a/b@main"], "VLMEvalKit takes no revision, as of base a/b@main: download it"),
        (["--bsae", str(base)], "unknown flag --bsae; did you mean --base?"),
    ):
        with pytest.raises(SystemExit, match=re.escape(told)):
            reproduced.main([*config, *flags])


def test_what_is_refused_ends_it_before_anything_else_is_run(tmp_path):
    """Be it what cannot be asked or what cannot be trained: here every command fails."""
    done = started(OUT=tmp_path / "out", PYTHON="false", VLMEVALKIT="kit")
    assert done.returncode == 1 and not done.stdout and not (tmp_path / "out").exists()
    checks = tmp_path / "python"
    checks.write_text('#!/bin/sh\n[ "$1" = -m ]\n')
    checks.chmod(0o755)
    done = started(OUT=tmp_path / "out", PYTHON=checks)
    assert done.returncode == 1 and len(done.stdout.splitlines()) == 1 and "--method sft" in done.stdout


@pytest.mark.parametrize(
    ("lacks", "flags", "told"),
    [
        (("keep",), [], "drift-keep keeps by a keep set, and the recipe names none in keep: set it"),
        ((), ["--keep", "null"], "drift-keep keeps by a keep set, and the recipe names none in keep: set it"),
        ((), ["--keep-weight", "0"], "and the recipe has keep_weight=0, which keeps nothing: set it"),
        (("expert", "prior"), [], "merge_first=0.2 merges a part of expert − base: set expert"),
        (("prior",), [], "method drift needs a prior"),
        ((), ["--drift-norm", "weight"], "drift_norm: weight does not see the gradient that keep adds"),
        ((), ["--method", "sft"], "--method is set for each way by the script itself: leave it out"),
        ((), ["--merge_first=0.3"], "--merge-first is set for each way by the script itself: leave it out"),
    ],
)
def test_what_one_of_the_ways_cannot_do_is_refused_before_the_first_is_trained(lacks, flags, told, recipe):
    settings = yaml.safe_load(recipe.read_text())
    of_keeping = [key for key in settings if key.startswith("keep_")] if "keep" in lacks else []
    recipe.write_text(yaml.safe_dump({key: settings[key] for key in settings if key not in (*lacks, *of_keeping)}))
    with pytest.raises(SystemExit, match=re.escape(told)):
        reproduced.main(["--config", str(recipe), *flags])


@pytest.mark.slow
def test_a_model_of_another_recipe_is_not_taken_for_this_ones(recipe, tmp_path):
    (tmp_path / "out/sft-merged").mkdir(parents=True)
    first, *_ = reproduce(recipe, OUT=tmp_path / "out", DRY_RUN=1)
    told = f"{tmp_path}/out/sft-merged exists, and --merge would write there: move it away"
    with pytest.raises(SystemExit, match=re.escape(told)):
        sft_vlm.main(shlex.split(first)[3:])


def ask(out):
    """What reproduce_drift.sh does before it has VLMEvalKit ask."""
    models = {"base": out.parent / "base"} | {name: out / f"{name}-merged" for name in ADAPTERS}
    named = [f"{name}={path}" for name, path in models.items()]
    asked_models.main(str(RECIPES / "eval" / "vlmevalkit_qwen2_5_vl.json"), str(out / "vlmevalkit.json"), *named)


def not_asked(out):
    with pytest.raises(SystemExit) as refusal:
        ask(out)
    return str(refusal.value)


@pytest.fixture
def out(tmp_path):
    """Its folder where all has been trained and asked."""
    out, base = tmp_path / "out", tmp_path / "base"
    for folder in (base, *(out / name for name in ADAPTERS), *(out / f"{name}-merged" for name in ADAPTERS)):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"one")
    ask(out)
    for name in ("base", *ADAPTERS):
        (out / "answers" / name / "T20261122-093000").mkdir()
        (out / "answers" / name / "T20261122-093000" / f"{name}_MMStar.tsv").touch()
    return out


def test_answers_of_an_earlier_model_are_not_reused(out, tmp_path):
    base = tmp_path / "base"
    ask(out)
    models = {"base": base, "drift": out / "drift"}
    for name, model in models.items():
        (model / "model.safetensors").write_bytes(b"two")
        told = f"{out}/answers/{name} holds answers of another model than {model} is now: move them away"
        for _ in range(2):
            assert not_asked(out) == f"reproduce_drift.sh: error: {told}"
        (out / "answers" / name).rename(tmp_path / f"{name} of before")
        ask(out)
        (model / "model.safetensors").write_bytes(b"three")  # before it was asked
        ask(out)
    for name, model in models.items():
        shutil.rmtree(out / "answers" / name)
        (tmp_path / f"{name} of before").rename(out / "answers" / name)
        assert f"{out}/answers/{name} holds answers of another model than {model}" in not_asked(out)
        (model / "model.safetensors").write_bytes(b"one")
    ask(out)


def test_answers_are_reused_after_a_touch_a_copy_and_another_merge(out, tmp_path):
    for file in tmp_path.rglob("*"):
        os.utime(file, (9e9, 9e9) if file.name == "model.safetensors" else (1, 1))
    (out / "drift-merged" / "model.safetensors").write_bytes(b"merged again")
    ask(out)
    shutil.copytree(out, tmp_path / "copied", copy_function=shutil.copyfile)
    ask(tmp_path / "copied")


def test_answers_without_a_mark_are_reused_with_a_word(out, capsys):
    answers = out / "answers" / "sft"
    (answers / "model.json").unlink()
    told = f"note: {answers} does not say which model has answered, and is taken for that of {out}/sft"
    for lines in ([told], []):
        ask(out)
        assert capsys.readouterr().err.splitlines() == lines


def test_answers_to_other_settings_are_not_reused(out):
    file = out / "vlmevalkit.json"
    content = file.read_text()
    file.write_text(content.replace('"max_new_tokens": 16384', '"max_new_tokens": 2048'))
    told = f"reproduce_drift.sh: error: {out}/answers holds answers to the settings of {file}, and "
    assert not_asked(out).startswith(told)
    for torn in ("{", "{}", "[]", '{"model": {"base": 5}}'):
        file.write_text(torn)
        assert not_asked(out).startswith(f"reproduce_drift.sh: error: {file} is damaged (")
    file.write_text(content.replace(str(out), "/moved/since"))
    ask(out)
    assert file.read_text() == content
    file.unlink()
    ask(out)
    assert file.read_text() == content


@pytest.mark.slow
def test_a_tiny_pair_goes_the_whole_way(recipe, tmp_path):
    """Twice: nothing that is finished is done again, and it is said. Another recipe's is refused."""
    out, kit = tmp_path / "out", tmp_path / "kit"
    kit.mkdir()
    (kit / "run.py").write_text(STAND_IN)
    reproduce(recipe, OUT=out, VLMEVALKIT=kit)
    for name in ("sft-drift", "merged-drift", "sft-drift-keep"):
        columns = json.loads((out / f"scores-{name}.json").read_text())["columns"]
        assert [*columns] == ["MathVista"] and columns["MathVista"]["samples"] == 9
    (kit / "run.py").write_text("")
    for name in ("sft-drift", "merged-drift", "sft-drift-keep"):
        (out / f"scores-{name}.json").unlink()
    told = "\n".join(reproduce(recipe, OUT="out", VLMEVALKIT=kit, cwd=tmp_path))
    for name in ("sft", "merged", "drift", "drift-keep"):
        assert f"The run in {out / name} was finished before, after 2 steps." in told
    assert (out / "scores-sft-drift.json").exists()
    told = refused(recipe, "--learning-rate", 0.002, OUT=out, VLMEVALKIT=kit)
    assert f"{out}/sft-merged exists, and --merge would write there: move it away" in told
