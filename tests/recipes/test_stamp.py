"""What lies at a recipe's paths: a comparison does not go on with another model, prior, keep set or image there."""

import json
import os
import re
import shutil
from pathlib import Path

import compare
import pytest
import yaml
from parts.journal import Journal
from parts.stamp import hold
from PIL import Image


def test_what_lies_at_the_paths_of_a_recipe_is_not_replaced_meanwhile(tmp_path):
    """Be it there at first, or made by the first run. What is no longer there is not another one."""
    folders = {role: tmp_path / role for role in ("base", "expert", "reference")}
    files = {role: tmp_path / f"{role}.safetensors" for role in ("prior", "keep")}
    settings = {role: str(path) for role, path in (folders | files).items()}
    with Journal(tmp_path / "l.jsonl", {}, text=None) as ledger:
        hold(ledger, settings | {"base": "org/on-the-hub", "reference": None})
        assert not ledger.answers
        weights = {role: folder / "model.safetensors" for role, folder in folders.items()} | files
        for file in weights.values():
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(b"one")
            hold(ledger, settings)
    for role, file in weights.items():
        with Journal(tmp_path / "l.jsonl", {}, text=None) as ledger:
            (folders.get(role, tmp_path) / "README.md").write_text("Written later.")
            hold(ledger, settings)
            content = file.read_bytes()
            file.write_bytes(b"another")
            told = f"l.jsonl holds answers with another content of {role}, which is {settings[role]}: put back what was"
            with pytest.raises(ValueError, match=told):
                hold(ledger, settings)
            if role in files:
                file.write_bytes(content)
                hold(ledger, settings)
                file.unlink()
                hold(ledger, settings)
                file.write_bytes(content)
            else:
                del settings[role]


def test_what_was_made_of_another_base_is_not_taken_for_the_bases(monkeypatch, data, tmp_path):
    """Nor once the base that the comparison was begun with is back."""
    base, asked = tmp_path / "base", []
    base.mkdir()
    weights = base / "model.safetensors"
    weights.write_bytes(b"one")
    settings = {"base": str(base), "data": str(data), "method": "sft", "use_cpu": True, "output_dir": "o"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))

    def launch(*command):
        given = [*map(str, command)]
        asked.append((Path(given[given.index("-o") + 1]).name, weights.read_bytes()))
        rows = {"samples": [{"category": "all", "correct": True}], "answers": {"model": [{"kl": 0, "agreement": 1}]}}
        Path(given[given.index("-o") + 1]).write_text(json.dumps(rows))
        if len(asked) == 1:  # while the first way is examined
            weights.write_bytes(b"another")

    monkeypatch.setattr(compare, "launch", launch)
    flags = [str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "out"), "--held-out", "2", "--ways", "base"]
    made = tmp_path / "out" / "ways" / "base" / "seed0"
    told = f"content of base, which is {base}: put back what was there, or name another output ({made}, which may be "
    with pytest.raises(SystemExit, match=re.escape(f"{told}made of the other, is deleted)")):
        compare.main(flags)
    with pytest.raises(SystemExit, match=r"put back what was there, or name another output$"):
        compare.main(flags)
    asked_first = asked.copy()
    weights.write_bytes(b"one")
    compare.main(flags)
    assert [("right.json", b"one"), ("kept.json", b"one")] == asked[len(asked_first) :]


def test_a_folder_that_was_touched_or_copied_holds_the_same(tmp_path):
    """But not where as many other bytes were written at the same time."""
    folder = tmp_path / "base"
    folder.mkdir()
    files = {"model.safetensors": b"one" * 10**6, "tokenizer.json": b"two" * 10**6, "generation_config.json": b"{}"}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    settings, copied = {"base": str(folder)}, {"base": str(tmp_path / "copy")}
    with Journal(tmp_path / "l.jsonl", {}, text=None) as ledger:
        hold(ledger, settings)
        for file in (*folder.iterdir(), folder):
            os.utime(file, (1, 1))
        (folder / "training_args.bin").write_bytes(b"of a run that was saved there")
        shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
        hold(ledger, settings)
        hold(ledger, copied)
        for name, content in files.items():
            file = folder / name
            times = file.stat()
            file.write_bytes(content[:-2] + b"!!" if name == "tokenizer.json" else content[::-1])
            os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
            with pytest.raises(ValueError, match="another content of base"):
                hold(ledger, settings)
            file.write_bytes(content)


def test_a_comparison_does_not_go_on_with_another_base_or_other_images(monkeypatch, data, tmp_path):
    base, own = tmp_path / "base", shutil.copytree(data.parent, tmp_path / "own") / data.name
    base.mkdir()
    (base / "model.safetensors").write_bytes(b"one")
    settings = {"base": str(base), "data": str(data), "method": "sft", "use_cpu": True, "output_dir": "o"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    measured = []

    def launch(*command):
        given = [*map(str, command)]
        measured.append(given)
        rows = {"samples": [{"category": "all", "correct": True}], "answers": {"model": [{"kl": 0, "agreement": 1}]}}
        Path(given[given.index("-o") + 1]).write_text(json.dumps(rows))

    monkeypatch.setattr(compare, "launch", launch)
    flags = [str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "out"), "--test", str(own), "--ways", "base"]
    compare.main(flags)
    compare.main(flags)
    assert len(measured) == 3  # the keep set to measure with, and two exams
    (base / "model.safetensors").write_bytes(b"another")
    with pytest.raises(SystemExit, match=f"holds answers with another content of base, which is {base}: put back"):
        compare.main(flags)
    picture = next(own.parent.glob("*.png"))
    Image.new("RGB", (8, 8)).save(picture)
    with pytest.raises(SystemExit, match=r"holds answers of other settings: images' SHA-256 \(they are others now\):"):
        compare.main(flags)
