"""The command line through its entry point: results on stdout, one sentence on stderr, exit status."""

import json
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from command import entry, run
from hub import Hub
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from processes import Program
from tiny import save_layout, tiny_expert, tiny_vlm

from drift_peft import DriftConfig, ReasoningPrior, __version__, merge_baseline

BUILD = ("prior", "build", "--expert", "x", "--base", "y", "-o", "z")
MERGE = ("--base", "x", "--adapter", "y", "-o", "z")


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


def test_prior_build_of_chosen_weights(folder, capsys, tmp_path):
    where = "--expert", folder / "expert", "--base", folder / "vlm", "-o", tmp_path / "p.safetensors", "--overwrite"
    chosen = "--modules", "attn", "norm", "bias", "--only-layers", "0-1", "--skip-first", 1
    status, out, _ = run(capsys, "prior", "build", *where, *chosen, "--energy", 0.7, "--max-rank", 12, "--json")
    built = json.loads(out)
    assert status == 0 and built["modules"] == ["attn", "norm", "bias"] and built["not_steered"]
    assert (built["only_layers"], built["skip_first"], built["energy"], built["max_rank"]) == ([0, 1], 1, 0.7, 12)
    assert {name for name in built["weights"]} == {f"layers.1.self_attn.{p}_proj.weight" for p in "qkvo"}
    status, out, _ = run(capsys, "prior", "build", *where, "--energy", 0.7, "--max-rank", 3, "--dequantize")
    assert status == 0 and "14 of 14 weights are capped at rank 3, below 70.0%" in out


def test_targets(folder, capsys):
    status, out, _ = run(capsys, "targets", folder / "vlm", "--prior", folder / "prior.safetensors", "--json")
    rows = {row["module"]: row for row in json.loads(out)["rows"]}
    assert status == 0 and len(rows) == 7
    assert rows["q_proj"] == {"module": "q_proj", "adapted": 2, "steered": 2, "left": 0}
    assert rows["gate_proj"] == {"module": "gate_proj", "adapted": 2, "steered": 2, "left": 1}  # the vision tower's
    status, out, err = run(capsys, "targets", folder / "vlm")
    assert (status, err) == (0, "") and "no prior given" in out
    assert r"target_modules = r'model\.language_model\.layers" in out


def test_targets_name_the_base_of_a_prior_that_was_built_for_another(folder, capsys, tmp_path):
    other = shutil.copytree(folder / "vlm", tmp_path / "other")
    with pytest.warns(UserWarning, match=r"was built for vlm: whether the weights of .*other are the same is seen in"):
        status, out, _ = run(capsys, "targets", other, "--prior", folder / "prior.safetensors")
    assert status == 0 and "q_proj" in out
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*was built for")
        run(capsys, "targets", folder / "vlm", "--prior", folder / "prior.safetensors")
        merge_baseline("task_arithmetic", folder / "expert", folder / "vlm", tmp_path / "half", scale=0.5)
        run(capsys, "targets", tmp_path / "half", "--prior", folder / "prior.safetensors")


def test_targets_are_those_that_the_prior_covers(folder, capsys, tmp_path):
    assert build(folder, tmp_path / "p", "--modules", "attn", "--only-layers", "1") == 0
    capsys.readouterr()
    status, out, _ = run(capsys, "targets", folder / "vlm", "--prior", tmp_path / "p", "--json")
    summary = json.loads(out)
    assert status == 0 and summary["rows"] == [
        {"module": f"{name}_proj", "adapted": 1, "steered": 1, "left": 1} for name in "qkvo"
    ]
    model = get_peft_model(tiny_vlm("qwen2_5_vl"), DriftConfig(prior=tmp_path / "p", r=2))
    assert model.peft_config["default"].target_modules == summary["target_modules"]


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


def test_prior_combine_and_truncate(folder, capsys, tmp_path):
    prior, low, total = folder / "prior.safetensors", tmp_path / "low.safetensors", tmp_path / "sum.safetensors"
    status, out, _ = run(capsys, "prior", "truncate", prior, "--rank", 3, "-o", low)
    assert status == 0 and "captured energy" in out and ReasoningPrior.load(low).rank == 3
    status, out, _ = run(capsys, "prior", "combine", f"{prior}=0.7", f"{low}=-0.2", "-o", total, "--rank", 5, "--json")
    combined = ReasoningPrior.load(total)
    assert status == 0 and json.loads(out)["sha256"] == combined.sha256 and combined.rank == 5
    assert [parent["weight"] for parent in json.loads(out)["parents"]] == [0.7, -0.2]
    status, out, _ = run(capsys, "prior", "combine", f"{prior}=1", "-o", total, "--overwrite")
    assert status == 0 and ReasoningPrior.load(total).rank == 8
    with pytest.warns(UserWarning, match=r"^rank=8 cuts nothing: no weight of .* has more than 8 directions\.$"):
        run(capsys, "prior", "truncate", prior, "--rank", 8, "-o", tmp_path / "same.safetensors")
    status, _, err = run(capsys, "prior", "truncate", prior, "--rank", 3, "-o", low)
    assert status == 1 and "low.safetensors exists: name another file" in err


def test_prior_export(folder, capsys, tmp_path):
    flags = "prior", "export", folder / "prior.safetensors", "-o", tmp_path / "lora", "--scale"
    status, out, _ = run(capsys, *flags, "-0.5", "--json")
    assert status == 0 and json.loads(out) == {"output": str(tmp_path / "lora"), "scale": -0.5}
    model = PeftModel.from_pretrained(tiny_vlm("qwen2_5_vl"), tmp_path / "lora")
    assert sum(isinstance(module, LoraLayer) for module in model.modules()) == 14
    status, out, _ = run(capsys, *flags, 0.1, "--overwrite", "--base", folder / "vlm")
    assert status == 0 and "PeftModel.from_pretrained" in out


def test_prior_push(folder, capsys, tmp_path, monkeypatch):
    with Hub() as hub:
        hub.use(monkeypatch, tmp_path / "cache")
        flags = "prior", "push", folder / "prior.safetensors", "user/prior"
        status, out, _ = run(capsys, *flags, "--private", "--revision", "v1", "--message", "First", "--json")
        said = json.loads(out)
        assert (
            status == 0 and said["sha256"] == ReasoningPrior.load("user/prior@v1").sha256 and said["revision"] == "v1"
        )
        _, out, _ = run(capsys, *flags, "--revision", "v1")
        assert 'ReasoningPrior.load("user/prior@v1")' in out
        assert run(capsys, *flags)[0] == 0 and hub.files("user/prior").keys() >= {"prior.safetensors", "README.md"}
        status, _, err = run(capsys, *flags[:-1], "nobody's prior")
        assert status == 1 and "nobody's prior is no hub id: name it as user/repository" in err


@pytest.mark.parametrize(
    "argv, status, message",
    [
        (
            ["prior", "build", "--expert", "x", "--base", "y", "-o", "z", "--rnak", "3"],
            2,
            "--rnak; did you mean --rank?",
        ),
        (["prior", "build", "--expert", "x", "--base", "y", "-o", "z", "--rank", "many"], 2, "whole number, got many"),
        (["prior", "inspect", "x", "--overwrite"], 1, "--overwrite replaces files of --plot and --html: name one, or"),
        (["keep", "inspect", "x", "--overwrite"], 1, "--overwrite replaces a page: name it with --html, or leave"),
        (
            ["prior", "build", "--expert", "x", "--base", "y", "-o", "z", "--rank", "0"],
            1,
            "rank must be a whole number ≥ 1, got 0",
        ),
        (["prior", "build", "--base", "y", "-o", "z"], 2, "expert"),
        ([*BUILD, "--energy", "most"], 2, "--energy takes a number, got most"),
        ([*BUILD, "--energy", "90"], 1, "energy must be a number between 0 and 1, got 90.0"),
        ([*BUILD, "--energy", "0.9", "--rank", "8"], 1, "give rank=8 or energy=0.9, not both"),
        ([*BUILD, "--max-rank", "much"], 2, "--max-rank takes a whole number, got much"),
        ([*BUILD, "--skip-first", "half"], 2, "--skip-first takes a whole number, got half"),
        ([*BUILD, "--only-layers", "0", "few"], 1, "--only-layers takes numbers and ranges, such as 0 4 8-27, got few"),
        ([*BUILD, "--only-layers", "27-8"], 1, "--only-layers takes numbers and ranges, such as 0 4 8-27, got 27-8"),
        ([*BUILD, "--modules", "attention"], 2, "choose from attn, mlp, norm, bias, head, embed"),
        ([*BUILD, "--modules", "attn", "mpl"], 2, "unknown --modules mpl; did you mean mlp? (choose from attn, mlp, "),
        (["merge", *MERGE, "--onto", "dequantised"], 2, "did you mean dequantized? (choose from base, dequantized)"),
        (["merge", *MERGE, "--onto", "zero"], 2, "unknown --onto zero: choose from base, dequantized"),
        (["merge-baseline", *MERGE[:2], "--method", "TIES"], 2, "unknown --method TIES; did you mean ties?"),
        (["merge", "--bse", "x", "--adapter", "y"], 2, "unknown flag --bse; did you mean --base?"),
        (["targets", "x", "--piror=y"], 2, "unknown flag --piror; did you mean --prior?"),
        (["demo", "--sed", "1"], 2, "unknown flag --sed; did you mean --seed?"),
        (["preflight", "x", "-json"], 2, "unknown flag -json; did you mean --json?"),
        (["--json", "prior", "inspect", "x"], 2, "unknown flag --json; see drift-peft --help"),
        (["prior", "--rank", "3", "inspect", "x"], 2, "unknown flag --rank; see drift-peft prior --help"),
        (["prior", "inspect", "x", "y"], 2, "unexpected argument y; see drift-peft prior inspect --help"),
        (["merge", "--base", "x"], 2, "the following arguments are required: --adapter, -o/--output"),
        (
            ["preflight", "nothere.yaml"],
            1,
            "recipe nothere.yaml cannot be read: No such file or directory; name a YAML",
        ),
        (["preflight", "."], 1, "recipe . cannot be read: Is a directory"),
        ([*BUILD, "--max_rank", "much"], 2, "--max-rank takes a whole number, got much"),
        (["prior", "buidl"], 2, "unknown command buidl; did you mean build?"),
        (["mrege"], 2, "unknown command mrege; did you mean merge?"),
        (
            ["mrege"],
            2,
            "(choose from prior, keep, targets, merge, merge-baseline, transplant, export, demo, preflight)",
        ),
        (
            ["train"],
            2,
            "unknown command train: choose from prior, keep, targets, merge, merge-baseline, transplant, export, ",
        ),
        (["prior"], 2, "a command is missing: one of build, inspect"),
        (["prior", "inspect", "no.safetensors", "--rank", "few"], 2, "--rank takes a whole number, got few"),
        (["prior", "inspect", "no.safetensors"], 1, "no.safetensors"),
        (["prior", "combine", "a.safetensors", "-o", "z"], 1, "write prior=coefficient, such as a.safetensors=0.7"),
        (["prior", "combine", "a=b=c", "-o", "z"], 1, "a=b=c names no coefficient"),
        (["prior", "combine", "=1", "-o", "z"], 1, "=1 names no coefficient"),
        (["prior", "combine", "no.safetensors=1", "-o", "z"], 1, "there is no file no.safetensors"),
        (["prior", "truncate", "no.safetensors", "-o", "z"], 2, "rank"),
        *(
            ([*argv, "new/"], 2, f"error: output new/ is a folder: name a file, such as new/{such}\n")
            for argv, such in (
                (BUILD[:-1], "prior.safetensors"),
                (["prior", "combine", "x=1", "-o"], "prior.safetensors"),
                (["prior", "truncate", "x", "--rank", "2", "-o"], "prior.safetensors"),
                (["prior", "gate", "x", "--base", "y", "--keep", "k", "-o"], "gated.safetensors"),
                (["prior", "gate", "x", "--base", "y", "--keep", "k", "-o", "z", "--answers"], "answers.safetensors"),
                (["prior", "inspect", "x", "--plot"], "prior.png"),
                (["prior", "inspect", "x", "--html"], "prior.html"),
                (["keep", "make", "--base", "x", "--images", "y", "-o"], "keep.safetensors"),
                (["keep", "inspect", "x", "--html"], "keep.html"),
            )
        ),
        ([*BUILD[:-1], "new/."], 2, "output new/. is a folder: name a file, such as new/./prior.safetensors"),
        ([*BUILD[:-1], ""], 1, "output is empty: name a file"),
        (["prior", "export", "no.safetensors", "--scale", "1", "-o", "new/"], 1, "there is no file no.safetensors"),
        (["prior", "export", "no.safetensors", "-o", "z", "--scale", "much"], 2, "--scale takes a number, got much"),
        (["prior", "export", "no.safetensors", "-o", "z", "--scale", "-5e-1"], 1, "there is no file no.safetensors"),
        (["prior", "push", "no.safetensors", "user/prior"], 1, "there is no file no.safetensors"),
        (["merge", "--base", "no/where", "--adapter", "no/where", "-o", "z"], 1, "no/where"),
        (["targets", "no/where"], 1, "no/where"),
        ([], 2, "a command is missing: one of prior, keep, targets, merge, merge-baseline, transplant"),
        ([], 2, "merge-baseline, transplant, export, demo, preflight\n"),
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
    result = subprocess.run([sys.executable, "-m", "drift_peft", "--version"], capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.strip().endswith(__version__)
    result = subprocess.run([sys.executable, "-m", "drift_peft", "prior"], capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.splitlines()[-1].startswith(
        "drift-peft: error: a command is missing"
    )


def test_a_mistake_as_a_program(tmp_path):
    status, _, err = Program(tmp_path, "-m", "drift_peft", "targets", "x").ended()
    assert status == 1 and err.splitlines()[-1].startswith("drift-peft: error: x ")


def test_a_bare_key_is_no_sentence(capsys, monkeypatch):
    """Of another library: where it comes from is more use."""

    def merge_adapter(**_):
        raise KeyError("base_model.model.lm_head.weight")

    monkeypatch.setattr("drift_peft.merge.merge_adapter", merge_adapter)
    with pytest.raises(KeyError, match="lm_head"):
        run(capsys, "merge", *MERGE)


@pytest.mark.parametrize(
    "interrupt", ["signal.raise_signal(signal.SIGINT)", "exec('signal.raise_signal(signal.SIGINT)')"]
)
def test_interrupted_while_a_verb_imports(interrupt, tmp_path):
    """Ctrl-C in the middle of `import torch`, also where that executes a string, as dataclasses do."""
    handled = "signal.signal(signal.SIGINT, signal.default_int_handler)"  # a shell's background jobs ignore it
    (tmp_path / "torch.py").write_text(f"import signal\n{handled}\n{interrupt}\n")
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from drift_peft.cli import main; sys.exit(main())"
    for verb in (["targets", "x"], ["prior", "inspect", "x"], [*BUILD], ["merge", *MERGE], ["preflight", __file__]):
        result = subprocess.run([sys.executable, "-c", program, *verb], capture_output=True, text=True)
        assert (result.returncode, result.stdout, result.stderr) == (130, "", "drift-peft: error: interrupted\n")
