"""The command line through its entry point: results on stdout, one sentence on stderr, exit status."""

import json
import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import torch
from peft import get_peft_model
from tiny import save_layout, tiny_expert, tiny_vlm

from drift_peft import DriftConfig, ReasoningPrior, __version__

(entry,) = entry_points(group="console_scripts", name="drift-peft")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    vlm = tiny_vlm("qwen2_5_vl")
    expert, _ = tiny_expert("qwen2_5_vl", vlm)
    save_layout(vlm, folder / "vlm")
    save_layout(expert, folder / "expert")
    build(folder, folder / "prior.safetensors")
    model = get_peft_model(vlm, DriftConfig(prior=folder / "prior.safetensors", r=4, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    with pytest.warns(UserWarning, match="the guidance never ran"):
        model.save_pretrained(folder / "adapter")
    return folder


def build(folder, output, *flags):
    where = "--expert", f"{folder / 'expert'}", "--base", f"{folder / 'vlm'}", "-o", str(output)
    return entry.load()(["prior", "build", *where, "--rank", "8", *flags])


def run(capsys, *argv):
    """(status, stdout, stderr without progress bars)"""
    try:
        status = entry.load()([str(a) for a in argv])
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    return status, out, "".join(line for line in err.splitlines(keepends=True) if line.startswith("drift-peft:"))


def test_prior_build_and_inspect(folder, capsys, tmp_path):
    capsys.readouterr()
    assert build(folder, tmp_path / "p.safetensors", "--json") == 0
    out, err = capsys.readouterr()
    built = json.loads(out)
    assert built["total"]["weights"] == 14 and "layers.1.self_attn.v_proj.weight" in err  # the progress bar
    status, out, _ = run(capsys, "prior", "inspect", tmp_path / "p.safetensors", "--json")
    inspected = json.loads(out)
    prior = ReasoningPrior.load(tmp_path / "p.safetensors")
    assert status == 0 and inspected["sha256"] == prior.sha256 == built["sha256"]
    assert inspected["weights"].keys() == set(prior)
    row = next(r for r in inspected["rows"] if (r["layer"], r["modules"]) == (1, "mlp"))
    mlp = [prior[f"layers.1.mlp.{p}_proj.weight"] for p in ("gate", "up", "down")]
    delta, base = (sum(getattr(w, n) ** 2 for w in mlp) for n in ("delta_norm", "base_norm"))
    assert row["relative_norm"] == pytest.approx((delta / base) ** 0.5)
    assert row["energy"] == pytest.approx(sum(w.energy * w.delta_norm**2 for w in mlp) / delta)
    assert row["cosine"] == min(w.cosine for w in mlp)
    status, out, _ = run(capsys, "prior", "inspect", tmp_path / "p.safetensors")
    assert status == 0 and "captured energy" in out and f"{row['energy']:.1%}" in out
    status, out, _ = run(capsys, "prior", "inspect", tmp_path / "p.safetensors", "--rank", 2, "--json")
    low = json.loads(out)
    kept, whole = (sum((w.S[:k] ** 2).sum().item() for w in prior.values()) for k in (2, 8))
    assert low["rank"] == 2 and low["total"]["energy"] < built["total"]["energy"]
    assert low["total"]["energy"] / built["total"]["energy"] == pytest.approx(kept / whole, rel=1e-4)


def test_targets(folder, capsys):
    status, out, _ = run(capsys, "targets", folder / "vlm", "--prior", folder / "prior.safetensors", "--json")
    rows = {row["module"]: row for row in json.loads(out)["rows"]}
    assert status == 0 and len(rows) == 7
    assert rows["q_proj"] == {"module": "q_proj", "adapted": 2, "steered": 2, "left": 0}
    assert rows["gate_proj"] == {"module": "gate_proj", "adapted": 2, "steered": 2, "left": 1}  # the vision tower's
    status, out, _ = run(capsys, "targets", folder / "vlm")
    assert status == 0 and "no prior given" in out and r"target_modules = r'model\.language_model\.layers" in out


def test_merge(folder, capsys, tmp_path):
    flags = "--base", folder / "vlm", "--adapter", folder / "adapter", "-o", tmp_path / "merged"
    status, out, _ = run(capsys, "merge", *flags, "--verify", "--json")
    report = json.loads(out)
    assert status == 0 and report["modules"] == 14 and report["logits_error"] < 1e-5
    assert (tmp_path / "merged" / "config.json").is_file()
    status, _, err = run(capsys, "merge", *flags)
    assert status == 1 and "exists: name another folder" in err
    status, out, _ = run(capsys, "merge", *flags, "--overwrite")
    assert status == 0 and "not verified (--verify)" in out


@pytest.mark.parametrize(
    "argv, status, message",
    [
        (
            ["prior", "build", "--expert", "x", "--base", "y", "-o", "z", "--rnak", "3"],
            2,
            "--rnak; did you mean --rank?",
        ),
        (["prior", "build", "--expert", "x", "--base", "y", "-o", "z", "--rank", "many"], 2, "whole number, got many"),
        (["prior", "build", "--expert", "x", "--base", "y", "-o", "z", "--rank", "0"], 1, "at least 1, got 0"),
        (["prior", "build", "--base", "y", "-o", "z"], 2, "expert"),
        (["prior", "buidl"], 2, "unknown command buidl; did you mean build?"),
        (["mrege"], 2, "unknown command mrege; did you mean merge?"),
        (["prior"], 2, "a command is missing: one of build, inspect"),
        (["prior", "inspect", "no.safetensors", "--rank", "few"], 2, "--rank takes a whole number, got few"),
        (["prior", "inspect", "no.safetensors"], 1, "no.safetensors"),
        (["merge", "--base", "no/where", "--adapter", "no/where", "-o", "z"], 1, "no/where"),
        (["targets", "no/where"], 1, "no/where"),
        ([], 2, "a command is missing: one of prior, targets, merge, demo"),
    ],
)
def test_errors_are_one_sentence(argv, status, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    got, out, err = run(capsys, *argv)
    assert got == status and out == ""
    assert err.count("\n") == 1 and err.startswith("drift-peft: error: ") and message in err
    assert not any(tmp_path.iterdir())


def test_as_a_program():
    result = subprocess.run([sys.executable, "-m", "drift_peft.cli", "--version"], capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.strip().endswith(__version__)
    result = subprocess.run([sys.executable, "-m", "drift_peft.cli", "targets", "x"], capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.splitlines()[-1].startswith("drift-peft: error: x ")
