"""torchvision for CUDA beside a torch for CPUs, or no torchvision where a processor needs it: one sentence."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from transformers.utils.import_utils import TORCHVISION_IMPORT_ERROR

from drift_peft import builds, cli, make_keep_set
from drift_peft.builds import explained
from drift_peft.checkpoints import Checkpoint
from drift_peft.merge.verify import _prompts

ROOT = Path(__file__).parents[2]
VLM = ROOT / "drift_peft/demo/checkpoints/vlm"
RECIPE = "recipes/configs/qwen2_5_vl_7b_r1.yaml"


STAND_IN = """
cause = RuntimeError("operator torchvision::nms does not exist")
raise ModuleNotFoundError("Could not import module 'BloomPreTrainedModel'.") from cause
"""


@pytest.fixture
def environment(tmp_path):
    """A torchvision of some version, and in place of torch, which takes longer to import, what transformers raises."""
    for name, text in (
        ("torch/__init__.py", STAND_IN),
        ("torchvision-0.28.0.dist-info/METADATA", "Name: torchvision\nVersion: 0.28.0\n"),
    ):
        tmp_path.joinpath(name).parent.mkdir()
        tmp_path.joinpath(name).write_text(text)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}


@pytest.mark.parametrize(
    "command",
    [
        ["-m", "drift_peft", "targets", str(VLM)],
        ["recipes/sft_vlm.py", "--config", RECIPE],
        ["-c", "from drift_peft import DriftConfig"],
    ],
)
def test_another_build_is_one_sentence(environment, command):
    ran = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    *others, last = ran.stderr.strip().splitlines()
    assert ran.returncode == 1 and "torchvision 0.28.0 is of another build than torch " in last
    assert "install both from one place" in last
    assert command[0] == "-c" or not others  # in Python, an ImportError with its traceback


NEEDED = "Qwen2VLVideoProcessor needs torchvision, which is missing: pip install torch=="


@pytest.fixture
def without_torchvision(monkeypatch):
    """As transformers says it where it loads a processor; here, torchvision may be installed."""

    def load(*arguments, **options):
        raise ImportError(TORCHVISION_IMPORT_ERROR.format("Qwen2VLVideoProcessor"))

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", load)


@pytest.mark.parametrize(
    ("torch", "installed"),
    [
        ("2.13.0", "2.13.0 torchvision"),
        ("2.13.0+cu130", "2.13.0+cu130 torchvision --index-url https://download.pytorch.org/whl/cu130"),
    ],
)
def test_a_missing_torchvision_is_to_be_of_the_build_of_torch(torch, installed, without_torchvision, monkeypatch):
    monkeypatch.setattr(builds, "version", lambda package: torch)
    with pytest.raises(ImportError) as error:
        transformers.AutoProcessor.from_pretrained(VLM)
    assert str(explained(error.value)) == NEEDED + installed


@pytest.mark.parametrize("torch", ["2.8.0a0+34c6371d24.nv25.08", "2.8.0+gitba56102", "2.9.1.post200"])
def test_no_command_is_given_for_a_torch_that_pip_does_not_find(torch, without_torchvision, monkeypatch):
    monkeypatch.setattr(builds, "version", lambda package: torch)
    with pytest.raises(ImportError) as error:
        transformers.AutoProcessor.from_pretrained(VLM)
    told = str(explained(error.value))
    assert "pip" not in told and told.endswith(f"install the one that belongs to torch {torch}, from where that came")


def test_a_keep_set_names_the_missing_torchvision(without_torchvision, tmp_path, capsys):
    with pytest.raises(ImportError, match=f"^{NEEDED}"):
        make_keep_set(VLM, tmp_path, tmp_path / "keep.safetensors")
    command = ["keep", "make", "--base", VLM, "--images", tmp_path, "-o", tmp_path / "keep.safetensors"]
    assert cli.main([*map(str, command)]) == 1
    assert capsys.readouterr().err.startswith(f"drift-peft: error: {NEEDED}")


def test_a_verification_names_the_missing_torchvision(without_torchvision):
    assert _prompts(Checkpoint(VLM), VLM)[1].startswith(NEEDED)


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("evaluate", ["--model", VLM, "--data", "data.jsonl", "-o", "r.json"]),
        ("distill", ["data.jsonl", "--model", VLM, "-o", "r.parquet"]),
        ("data", ["data.jsonl", "--model", VLM, "-o", "r.parquet"]),
        ("sft_vlm", ["--base", VLM, "--data", "data.jsonl", "--method", "sft", "--output-dir", "run", "--use-cpu"]),
    ],
)
def test_a_recipe_names_the_missing_torchvision(script, flags, without_torchvision, tmp_path, monkeypatch, capsys):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    Path("data.jsonl").write_text('{"problem": "1 + 1?", "answer": "2"}')
    with pytest.raises(SystemExit) as end:
        importlib.import_module(script).main([*map(str, flags)])
    assert end.value.code == 1 and capsys.readouterr().err.splitlines()[-1].startswith(f"{script}.py: error: {NEEDED}")


def test_other_errors_stay_as_they_are():
    error = ImportError("no module named x")
    assert explained(error) is error
