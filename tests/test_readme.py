"""The README's Python runs twice from an empty folder, and its commands are those of the Makefile."""

import re
import warnings
from pathlib import Path
from textwrap import dedent

from peft import LoraConfig

ROOT = Path(__file__).parent.parent


def blocks(text, language="python"):
    """The fenced blocks of a page that are of this language; "" for those that name none."""
    fenced = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", text, re.M | re.S)
    return [dedent(block) for named, block in fenced if named == language]


def test_python_blocks_run_twice(tmp_path, monkeypatch, capsys):
    python = blocks((ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(python) == 2
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        names = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for block in python:
                exec(compile(block, "README.md", "exec"), names)
        assert "guided_steps': 2" in capsys.readouterr().out
        assert type(names["model"].peft_config["default"]) is LoraConfig  # loaded by PEFT alone
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_commands_exist():
    """The commands that the README shows are those of the Makefile and the command line."""
    readme, makefile = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "Makefile"))
    targets = re.findall(r"^make (\w+)", readme, re.M)
    assert {"demo", "test"} <= {*targets}
    for target in targets:
        assert f"\n{target}:" in makefile
    assert "@@" not in readme
