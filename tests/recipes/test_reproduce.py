"""recipes/reproduce_drift.sh: its commands are such as the scripts take; and all of it on a tiny pair (slow)."""

import json
import os
import shlex
import subprocess
import sys

import pytest
import sft_vlm
import yaml
from parts.arguments import parse
from recipe_runs import CONFIGS, FAST, RECIPES

pytestmark = pytest.mark.skipif(os.name == "nt", reason="bash")
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


def reproduce(*arguments, **variables):
    environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
    command = ["bash", str(RECIPES / "reproduce_drift.sh"), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_its_commands_are_ones_that_the_scripts_take(tmp_path):
    told = reproduce("--max-steps", 9, OUT=tmp_path / "out", DRY_RUN=1, VLMEVALKIT="kit", LMMS_EVAL_PYTHON="python3")
    commands = [shlex.split(line[1:]) for line in told if line.startswith("+ ") and "$'" not in line]
    trained = [command[2:] for command in commands if command[1].endswith("sft_vlm.py")]
    found = {}
    for command in trained:
        run, drift, train = parse([*command, "--use-cpu"], sft_vlm.__doc__)
        assert run.merge and train.max_steps == 9 and run.base == "Qwen/Qwen2.5-VL-7B-Instruct"
        found[train.output_dir.rpartition("/")[2]] = (
            run.method,
            run.merge_first,
            run.keep is not None,
            drift.drift_alpha,
        )
    assert found == {
        "sft": ("sft", None, False, 0),
        "merged": ("sft", 0.2, False, 0),
        "drift": ("drift", None, False, 0.3),
        "drift-keep": ("drift", None, True, 0.3),
    }
    assert [command[1:3] for command in commands[4:6]] == [["kit"], ["run.py", "--config"]]
    assert [command[1] for command in commands[6:9]] == [str(RECIPES / "score.py")] * 3
    asked = [command[command.index("--model_args") + 1] for command in commands[9:]]
    merged = [f"pretrained={tmp_path}/out/{name}-merged,device_map=auto" for name in found]
    assert asked == ["pretrained=Qwen/Qwen2.5-VL-7B-Instruct,device_map=auto", *merged]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_tiny_pair_goes_the_whole_way(pair, data, tmp_path):
    """Twice: nothing that is finished is done again."""
    folder, out, kit = pair("qwen2_5_vl"), tmp_path / "out", tmp_path / "kit"
    settings = yaml.safe_load((CONFIGS / "qwen2_5_vl_7b_r1.yaml").read_text())
    names = {key: str(folder / key) for key in ("base", "expert")} | {"data": str(data)}
    made = {key: str(tmp_path / f"{key}.safetensors") for key in ("prior", "keep")}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**settings, **names, **made, **FAST, "use_cpu": True, "optim": "adamw_torch"}))
    kit.mkdir()
    (kit / "run.py").write_text(STAND_IN)
    reproduce(recipe, OUT=out, PYTHON=sys.executable, VLMEVALKIT=kit)
    for name in ("sft-drift", "merged-drift", "sft-drift-keep"):
        columns = json.loads((out / f"scores-{name}.json").read_text())["columns"]
        assert [*columns] == ["MathVista"] and columns["MathVista"]["samples"] == 9
    (kit / "run.py").write_text("")
    for name in ("sft-drift", "merged-drift", "sft-drift-keep"):
        (out / f"scores-{name}.json").unlink()
    told = reproduce(recipe, OUT=out, PYTHON=sys.executable, VLMEVALKIT=kit)
    assert not any("sft_vlm.py" in line for line in told) and (out / "scores-sft-drift.json").exists()
