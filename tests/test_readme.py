"""Every Python block of the README runs, in order, on the demo's checkpoints with a 4-bit base."""

import re
import warnings
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

import drift_peft.demo

ROOT = Path(__file__).parent.parent
CHECKPOINTS = Path(drift_peft.demo.__file__).parent / "checkpoints"


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


def train(model):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ids = torch.arange(10, 20)[None]
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_python_blocks_run(tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) == 4
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        names = {"EXPERT": CHECKPOINTS / "reasoner", "VLM": CHECKPOINTS / "vlm", "vlm": load(), "train": train}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(compile(block, "README.md", "exec"), names)
    assert "guided_steps': 2" in capsys.readouterr().out
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert names["model"].peft_config["default"].drift_steps == 2  # continued from the saved adapter


def test_commands_exist():
    """The commands that the README shows are those of the Makefile and the command line."""
    readme, makefile = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "Makefile"))
    for target in re.findall(r"^make (\w+)", readme, re.M):
        assert f"\n{target}:" in makefile
    assert "@@" not in readme
