"""The README's Python runs twice from an empty folder, and its commands are those of the Makefile."""

import re
import warnings
from pathlib import Path
from textwrap import dedent

import torch
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

import drift_peft.demo

ROOT = Path(__file__).parent.parent
CHECKPOINTS = Path(drift_peft.demo.__file__).parent / "checkpoints"


def blocks(text, language="python"):
    """The fenced blocks of a page that are of this language; "" for those that name none."""
    fenced = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", text, re.M | re.S)
    return [dedent(block) for named, block in fenced if named == language]


def load():
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["model.visual", "lm_head"],
    )
    return AutoModelForImageTextToText.from_pretrained(
        CHECKPOINTS / "vlm", quantization_config=quantization, dtype=torch.float32
    )


def run(page_blocks, page, given):
    """Run blocks one after the other, each with these names and a fresh model in 4 bit; returns their names."""
    ran = []
    for block in page_blocks:
        names = {**given, "vlm": load()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(compile(block, page, "exec"), names)
        ran.append(names)
    return ran


def test_python_blocks_run_twice(tmp_path, monkeypatch, capsys):
    python = blocks((ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(python) == 1
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        run(python, "README.md", {})
        assert "guided_steps': 2" in capsys.readouterr().out
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_commands_exist():
    """The commands that the README shows are those of the Makefile and the command line."""
    readme, makefile = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "Makefile"))
    targets = re.findall(r"^make (\w+)", readme, re.M)
    assert {"demo", "test"} <= {*targets}
    for target in targets:
        assert f"\n{target}:" in makefile
    assert "@@" not in readme
