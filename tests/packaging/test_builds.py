"""torchvision for CUDA beside a torch for CPUs: one sentence."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from drift_peft.builds import explained

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


def test_other_errors_stay_as_they_are():
    error = ImportError("no module named x")
    assert explained(error) is error
