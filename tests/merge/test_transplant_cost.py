"""What a transplant costs: KL from the VLM on its own answers, and the largest scale below a budget."""

import json
import re
import shutil

import accelerate
import pytest
import torch
from command import run
from keep_sets import make, save_folder
from peft import PeftModel
from safetensors.torch import load_file
from tiny import save_layout, tiny_expert, tiny_llm
from transformers import AutoModelForImageTextToText, AutoProcessor
from transplants import LORA, go, save_lora

from drift_peft import KeepSet
from drift_peft.keeping import measure, summarize, vlm
from drift_peft.merge.cost import Cost, cost_table


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """`base` with its keep set, a text fine-tune and a LoRA adapter."""
    folder = save_folder(tmp_path_factory.mktemp("kept"), "qwen2_5_vl")
    make(folder, samples=6)
    shutil.copytree(folder / "base", folder / "vlm")
    vlm = AutoModelForImageTextToText.from_pretrained(folder / "vlm")
    save_layout(tiny_expert("qwen2_5_vl", vlm, scale=0.3)[0], folder / "expert")
    save_lora(folder / "lora", tiny_llm("qwen2_5_vl"))
    return folder


def distance(kept, model):
    processor = AutoProcessor.from_pretrained(kept / "base")
    found = measure(model, KeepSet.load(kept / "keep.safetensors"), processor, progress=False)
    return summarize(found)["total"]["kl"]


@pytest.mark.parametrize("options", [{"expert": "lora"}, {"rank": 4}, {"merged": True}])
def test_the_cost_is_that_of_what_is_written(kept, tmp_path, options):
    report = go(kept, output=tmp_path / "out", scale=0.7, keep=kept / "keep.safetensors", **options)
    assert [cost.scale for cost in report.costs] == [0, 0.7] and report.costs[0].kl < 1e-6
    if "merged" in options:
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    else:
        model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(kept / "vlm"), tmp_path / "out")
        assert f"{report.costs[1].kl:.3g} nats" in (tmp_path / "out" / "README.md").read_text()
    assert report.costs[1].kl == pytest.approx(distance(kept, model), rel=1e-4)
    low, high = report.costs[1].kl_interval
    assert 1e-3 < low <= report.costs[1].kl <= high


@pytest.mark.parametrize("fault", ["unrelated", "merged already"])
def test_what_is_no_merge_is_refused_before_its_cost_is_measured(fault, kept, tmp_path, monkeypatch):
    monkeypatch.setattr("drift_peft.merge.cost.measure", lambda *_: pytest.fail("it was measured"))
    options = {"merged": True, "scale": 0.3, "keep": kept / "keep.safetensors", "base": kept / "vlm"}
    if fault == "unrelated":
        save_layout(tiny_llm("qwen2_5_vl", seed=5), tmp_path / "expert")
        options["expert"], said = tmp_path / "expert", "has cosine .* no common ancestor"
    else:
        go(kept, output=tmp_path / "half", merged=True, scale=0.5)
        options["base"], said = tmp_path / "half", "half is .* already: merge into .*vlm at another scale"
    with pytest.raises(ValueError, match=said):
        go(kept, output=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_in_4_bit_the_vlm_itself_is_at_a_distance(kept, tmp_path):
    """Whatever the adapter is measured beside, it is the same."""
    options = {"expert": "lora", "keep": kept / "keep.safetensors"}
    report = go(kept, output=tmp_path / "out", load_in_4bit=True, **options)
    whole = go(kept, output=tmp_path / "other", **options)
    assert report.costs[0].kl > 1e-4 and report.costs[1].kl == pytest.approx(whole.costs[1].kl, rel=0.2)
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "other"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(ValueError, match=r"at .* nats a token from its own answers already"):
        go(kept, output=tmp_path / "none", load_in_4bit=True, scale="auto", budget=1e-5, **options)


@pytest.mark.parametrize("merged", [True, False])
def test_a_part_of_the_vlm_outside_the_gpu_is_no_free_part(merged, kept, tmp_path, monkeypatch):
    """As device_map="auto" leaves it: its weights are on meta, where they cannot be moved by Δ."""
    load_model = vlm.load_model

    def offloaded(*given):
        model = load_model(*given)
        accelerate.cpu_offload(model.model.language_model.layers[1], execution_device=torch.device("cpu"))
        return model

    monkeypatch.setattr(vlm, "load_model", offloaded)
    with pytest.raises(
        ValueError, match=r"measuring what Δ costs needs all weights of .*vlm in one place, and the GPU"
    ):
        go(kept, output=tmp_path / "out", merged=merged, scale=0.7, keep=kept / "keep.safetensors")
    assert not [*tmp_path.iterdir()]


def test_a_cost_that_is_nothing_has_no_sign():
    """KL of float32 may come out a little below zero."""
    cells = [list(column.cells) for column in cost_table([Cost(0, -1e-9, (-2e-8, 1e-9), 1.0)], 1).columns]
    assert cells[1:3] == [["0.0000"], ["0.0000 to 0.0000"]]


def test_auto_takes_the_largest_scale_below_the_budget(kept, tmp_path):
    options = {"expert": "lora", "keep": kept / "keep.safetensors", "output": tmp_path / "out"}
    budget = go(kept, scale=0.45, **options).costs[-1].kl
    report = go(kept, scale="auto", budget=budget, **options)
    costs = {cost.scale: cost.kl for cost in report.costs}
    assert report.scale == 0.4 and costs.keys() >= {0, 0.4, 0.45, 1} and len(costs) == len(report.costs) < 8
    assert {scale for scale, kl in costs.items() if kl < budget} == {scale for scale in costs if scale <= 0.4}
    assert f"{costs[0.4]:.3g} nats" in (tmp_path / "out" / "README.md").read_text()
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == pytest.approx(0.4 * LORA["lora_alpha"])
    with pytest.raises(ValueError, match=r"even scale 0.05 costs .* raise the budget"):
        go(kept, scale="auto", budget=1e-5, **options)


def test_the_command_line(kept, capsys):
    argv = ["transplant", "--expert", kept / "lora", "--base", kept / "vlm", "-o", kept / "adapter"]
    status, out, _ = run(capsys, *argv, "--scale", "auto", "--budget", 9, "--keep", kept / "keep.safetensors", "--json")
    report = json.loads(out)
    assert (status, report["scale"], len(report["costs"])) == (0, 1, 2)
    status, out, _ = run(capsys, *argv, "--overwrite", "--scale", 0.5)
    assert status == 0 and "modules of the adapter" in out and "0.5" in out
    status, _, err = run(capsys, *argv, "--scale", "all")
    assert status == 2 and "--scale takes a number or auto, got all" in err


@pytest.mark.parametrize(
    ("options", "helps"),
    [
        ({"expert": "lora"}, "(--batch-size), or load_in_4bit=True (--load-in-4bit)"),
        ({"expert": "lora", "load_in_4bit": True}, "(--batch-size)"),
        ({"merged": True}, "(--batch-size)"),  # which measures its weights in full precision
    ],
)
def test_a_gpu_without_room_says_what_helps(options, helps, kept, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("drift_peft.merge.cost.measure", full)
    said = re.escape(f"the GPU has no room for 8 answers at a time: pass a smaller batch_size {helps}")
    with pytest.raises(ValueError, match=f"^{said}$"):
        go(kept, output=tmp_path / "out", keep=kept / "keep.safetensors", **options)
    assert not list(tmp_path.iterdir())
