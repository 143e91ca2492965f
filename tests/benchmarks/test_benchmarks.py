"""benchmarks/: each runs in its smallest size, and measures what it says."""

import json
import multiprocessing.util
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import families
import fits_24gb
import gates
import keep_cost
import merge
import prior_build
import pytest
import spectrum as spectra
import step_overhead
import torch
import yaml
from known_pair import make_base, make_expert, read_delta, shapes, spectrum
from rich.console import Console

import drift_peft
from drift_peft.tuner import step as step_module
from drift_peft.tuner.steered import steered_of

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("decay", [1 / 2, 1 / 4])
def test_the_pair_has_the_spectrum_that_it_claims(decay, tmp_path):
    make_base(tmp_path / "base", layers=1, shrink=32)
    make_expert(tmp_path / "expert", tmp_path / "base", decay, layers=1, shrink=32)
    deltas = []
    for module, shape in shapes(32).items():
        deltas.append(read_delta(module, tmp_path / "expert", tmp_path / "base"))
        assert deltas[-1].shape == shape
        claimed = spectrum(shape, decay)
        found = torch.linalg.svdvals(deltas[-1].double())
        assert torch.allclose(found, claimed, rtol=0, atol=0.02 * float(claimed[0]))  # rounding to bf16
        assert float(found.norm()) == pytest.approx(float(claimed.norm()), rel=5e-3)
    assert not torch.equal(deltas[0], deltas[3])  # q_proj and o_proj, of one shape


@pytest.mark.slow
def test_prior_build_in_its_smallest_size(tmp_path, monkeypatch, capsys):
    multiprocessing.util.get_temp_dir()  # that of the processes, which stays
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    prior_build.main(["--shrink", "32", "--rank", "8", "--decay", "0.25"])
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    (row,) = result["rows"]
    assert (result["layers"], result["extrapolated"], row["decay"]) == (1, True, 0.25)
    assert 0.995 <= row["build"]["energy_of_best"] <= 1.0001
    assert row["build"]["seconds_28_layers"] == pytest.approx(28 * row["build"]["seconds"], rel=1e-3)
    assert [matrix["shape"] for matrix in row["matrices"]] == [[112, 592], [592, 112], [112, 112], [16, 112]]
    for matrix in row["matrices"]:
        assert 0.995 * matrix["best_energy"] <= matrix["energy"] <= matrix["best_energy"] * 1.0001
        assert matrix["times_as_fast"] == pytest.approx(matrix["exact"]["seconds"] / matrix["seconds"], rel=1e-3)
    if sys.platform == "linux":
        assert 0.05 < row["build"]["peak_gb"] < 2
    else:
        assert row["build"]["peak_gb"] is None and "not measured" in printed
    assert "extrapolated from 1 layer" in printed
    assert not list(tmp_path.iterdir())


def ran(benchmark, capsys, *arguments):
    """What it printed, and its last line's JSON."""
    benchmark.main(list(map(str, arguments)))
    printed = capsys.readouterr().out
    return printed, json.loads(printed.splitlines()[-1])


@pytest.mark.slow
def test_step_overhead_in_its_smallest_size(capsys):
    sizes = "--smallest", "--tokens", 64, 128, "--steps", 2, "--published", "--digits", "--device", "cpu"
    printed, result = ran(step_overhead, capsys, *sizes)
    assert [(row["norm"], row["tokens"]) for row in result["rows"][:3]] == [
        ("factor", 64),
        ("factor", 128),
        ("weight", 64),
    ]
    assert "demo" in result["rows"][3]["model"]
    for row in result["rows"]:
        assert row["ratio"] > 0 and row["drift_s"] > 0 and row["lora_alone_s"] > 0 and row["lora_peak_gb"] is None
    assert result["published"]["published_s"] > 0 and "not measured: no CUDA device" in printed


@pytest.fixture
def narrow():
    """A LoRA model of one narrow layer that is not guided yet, the file of a prior, and a batch."""
    model = step_overhead.random_nf4(step_overhead.qwen2_5_vl_7b(1, smallest=True), torch.device("cpu"))
    prior, targets = step_overhead.random_prior(model, rank=2), step_overhead.language_model_targets(model)
    config = step_overhead.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")
    ids = torch.arange(8)[None]
    yield step_overhead.get_peft_model(model, config).train(), prior, {"input_ids": ids, "labels": ids}
    shutil.rmtree(prior.parent)


@pytest.mark.slow
def test_plain_and_guided_steps_alternate(narrow, monkeypatch):
    model, prior, inputs = narrow
    alone = step_overhead.lora_alone(model, inputs, 1)
    assert alone["lora_alone_s"] > 0 and alone["lora_peak_gb"] is None and not steered_of(model)
    plans, plan = [], step_module.Plan
    monkeypatch.setattr(step_module, "Plan", lambda *given: plans.append(plan(*given)) or plans[-1])
    step_overhead.guide(model, str(prior), drift_norm="weight")
    row = step_overhead.compare(model, inputs, 2)
    assert row["ratio"] > 0 and row["prior_gb"] > 0
    assert [bool(plan.groups) for plan in plans] in ([True, False], [False, True])  # found once, as in training
    steered = steered_of(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = {}
    for kind in ("plain", "guided"):
        step_overhead.listen(steered, kind == "guided")
        taps = sum(bool(s.module.lora_B[s.adapter]._forward_hooks) for s in steered)
        assert taps == (len(steered) if kind == "guided" else 0)
        model.zero_grad()
        model(**inputs).loss.backward()
        backward = [p.grad.clone() for p in parameters]
        torch.optim.SGD(parameters, lr=0.0).step()
        gradients[kind] = all(map(torch.equal, backward, (p.grad for p in parameters)))
    assert gradients == {"plain": True, "guided": False}


def test_the_processors_time_of_tiny_adapters(capsys):
    printed, result = ran(step_overhead, capsys, "--python", "--smallest", "--steps", 2)
    (row,) = result["rows"]
    assert row["adapters"] == 14 and row["before_ms"] > 0 and row["after_ms"] > 0 and "together" in printed
    _, again = ran(step_overhead, capsys, "--python", "--smallest", "--steps", 2)
    assert again["rows"][0]["updates"] == row["updates"]
    _, longer = ran(step_overhead, capsys, "--python", "--smallest", "--steps", 3)
    assert longer["rows"][0]["updates"] != row["updates"]


@pytest.mark.slow
def test_keep_cost_in_its_smallest_size(capsys):
    settings = "--tokens", 64, "--answers", 1, 2, "--micro-batches", 2, 1, "--every", 1, 2, "--steps", 1
    printed, result = ran(keep_cost, capsys, "--smallest", *settings, "--device", "cpu")
    found = [(row["tokens"], row["answers"], row["keep_tokens"], row["every"]) for row in result["rows"]]
    assert found == [(128, 1, 78, 1), (128, 1, 78, 2), (64, 2, 156, 1), (64, 2, 156, 2)]
    for row in result["rows"]:
        assert row["plain_s"] > 0 and row["kept_s"] > 0 and 0 < row["keep_ratio"] <= 1 + 1e-6
        assert 0 < row["plain_peak_gb"] <= row["kept_peak_gb"]
    assert "their tokens" in printed and "not measured: no CUDA device" in printed


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--tokens", "64"], "leave out --tokens"),
        (["--micro-batches", "1", "2"], "leave out --micro-batches"),
        (["--smallest"], "leave out --smallest"),
        (["--device", "cuda"], "add --device cpu"),
    ],
)
def test_the_demo_s_cost_of_keeping_takes_no_other_sizes(given, told, capsys):
    with pytest.raises(SystemExit):
        keep_cost.main(["--digits", "--device", "cpu", *given])
    assert told in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="no CPU time of children there")
def test_startup_in_its_smallest_size(capsys):
    import startup

    printed, result = ran(startup, capsys, "--smallest", "--repeats", 2)
    assert [row["call"] for row in result["rows"]] == ["--version", "--help"] and "Python alone" in printed
    assert all(0 < row["least_s"] <= row["median_s"] <= row["most_s"] for row in result["rows"])
    assert ["prior", "build", "--help"] in startup.CALLS and ["preflight", "--help"] in startup.CALLS


@pytest.mark.slow
def test_fits_24gb_in_its_smallest_size(capsys):
    printed, result = ran(fits_24gb, capsys, "--smallest", "--tokens", 64)
    assert result["guided_steps"] == 2 and "no CUDA device" in printed
    assert result["computed_28_layers_gb"]["language model, NF4"] == pytest.approx(3.36, abs=0.02)


@pytest.mark.slow
def test_spectrum_in_its_smallest_size(capsys, monkeypatch):
    monkeypatch.setattr(spectra, "SPECTRA", {"flat": "flat", "p = 2": 2.0})
    for name in spectra.SPECTRA:  # gone again afterwards: the demo's own tests look at all methods
        monkeypatch.setitem(spectra.METHODS, name, None)
    _, result = ran(spectra, capsys, "--seeds", 1, "--steps", 1, "--size", 2)
    assert list(result["scores"]) == ["flat", "p = 2"]
    assert all(0 <= score <= 1 for scores in result["scores"].values() for score in scores.values())


def test_gates_in_their_smallest_size(tmp_path, capsys, monkeypatch):
    for name, value in (("FULL_RANK", 2), ("PROMPTS", 2), ("KEEP_SET", {**gates.KEEP_SET, "samples": 4})):
        monkeypatch.setattr(gates, name, value)
    merge = "DARE, linear, weights (1.6, 0.2), density 0.2"
    sizes = "--seeds", 1, "--steps", 1, "--size", 2, "--out", tmp_path
    printed, result = ran(gates, capsys, *sizes, "--only", "κ = 0.1", merge)
    assert [*result["rows"]] == ["gates, Δ, κ = 0.1", merge] and "merge without training" in printed
    assert result["merges"] == 1 and result["beaten"] == result["beaten_by_best_row"] <= 1
    file = tmp_path / "gates.jsonl"
    before = file.read_bytes()
    assert ran(gates, capsys, *sizes, "--only", "κ = 0.1", merge)[1] == result and file.read_bytes() == before
    file.write_bytes(before + before[:50])  # killed while it wrote
    assert ran(gates, capsys, *sizes, "--report")[1] == result
    monkeypatch.setattr(gates, "PROMPTS", 3)
    with pytest.raises(ValueError, match=r"line 1 of .*gates\.jsonl was measured when .* was something else"):
        gates.main(["--report", "--out", str(tmp_path)])
    monkeypatch.setattr(gates, "fingerprint", lambda world: "other")
    with pytest.raises(ValueError, match=r"line 1 of .* on other checkpoints .*, or give --out another folder$"):
        gates.main(["--report", "--out", str(tmp_path)])


def test_merges_that_gates_beat_are_counted_for_all_rows_and_for_the_best(capsys):
    points = {
        "gates, Δ, κ = 1": (5, 5),
        "gates, Δ from the ancestor, κ = 1": (9, 2),
        "gates, Δ, FRISM, α = 1": (9, 9),
        "task arithmetic, scale 0.1": (4, 4),
        "task arithmetic, scale 0.2": (3, 1),
        "task arithmetic, scale 0.3": (8, 1),
        "task arithmetic, scale 0.4": (5, 5),
    }
    names = "text", "perception", "2-3 operations"
    found = {t: {name: [v / 100, 0.0] for name, v in zip(names, (*p, 0), strict=True)} for t, p in points.items()}
    counts = gates.report(found, Console(width=200))
    del counts["rows"]
    best = {"best_row": "gates, Δ, κ = 1", "beaten_by_best_row": 2}
    assert counts == {"merges": 4, "beaten": 3, **best} and "than 2 of them" in capsys.readouterr().out


def test_merge_in_its_smallest_size(tmp_path, monkeypatch, capsys):
    multiprocessing.util.get_temp_dir()  # that of the processes, which stays
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    merge.main(["--smallest", "--no-memory"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["smallest"] and list(result["rows"]) == list(merge.PASSES)[:-1]
    floor = result["rows"]["read, write and sync"]["seconds"]
    for row in result["rows"].values():
        assert row["times_the_floor"] == pytest.approx(row["seconds"] / floor, rel=1e-3)
        assert row["peak_gb"] is None if sys.platform != "linux" else 0.05 < row["peak_gb"] < 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("step", ["save_pretrained", "from_pretrained"])
def test_a_type_that_transformers_does_not_save_or_load_gets_a_row(tmp_path, monkeypatch, step):
    class Model(torch.nn.Linear):
        def save_pretrained(self, folder):
            if step == "save_pretrained":
                raise RuntimeError("shared tensors")

    def fails(folder):
        raise RuntimeError("shared tensors")

    monkeypatch.setattr(families, "tiny_base", lambda _: Model(1, 1))
    monkeypatch.setattr(families, "tiny_text_expert", lambda _: (Model(1, 1), {}))
    monkeypatch.setattr(families, "_load", fails)
    row = families.take("a_type", tmp_path)
    assert row == {"result": "not built here", "steered": 0, "said": "shared tensors"}


def test_mutants_that_need_no_test_are_of_the_code_as_it_is():
    explained = yaml.safe_load((FOLDER / "survivors.yaml").read_text(encoding="utf-8"))
    for name, mutants in explained.items():
        source = (Path(drift_peft.__file__).parent / f"{name}.py").read_text(encoding="utf-8")
        code = " ".join(line.strip() for line in source.splitlines())
        assert not [mutant for mutant in mutants if mutant.split(" => ")[0] not in code], name


def test_what_mutants_lack_is_said_in_a_sentence():
    script = f"import sys; sys.modules['libcst'] = None; sys.path.insert(0, {str(FOLDER)!r}); import mutants"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("mutants.py needs libcst, which is not installed: run make mutants")
