"""The folder of merge_baseline: transformers loads it, all else stays as it is, and one of the same merge is taken."""

import json

import pytest
import torch
from command import run
from older import scales_what_dare_keeps
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import SELF_LAYERS, save_layout, tiny_expert, tiny_vlm
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from trios import CROSS, FAMILIES, Q, merge, tensors, text_weights

from drift_peft import merge_baseline
from drift_peft.checkpoints.naming import canonical_name

IDS = torch.arange(7, 27).reshape(2, 10)


@pytest.mark.parametrize("family", FAMILIES)
def test_at_scale_1_the_vlm_has_the_experts_language_model(trios, tmp_path, family):
    folder = trios[family]
    report = merge(folder, output=tmp_path / "merged", scale=1)
    auto = AutoModelForCausalLM if family == "llama" else AutoModelForImageTextToText
    base, merged = (auto.from_pretrained(path, dtype=torch.float32).eval() for path in (folder / "base", report.output))
    with torch.no_grad():
        before = base(input_ids=IDS).logits
        swap_decoder(base, AutoModelForCausalLM.from_pretrained(folder / "expert", dtype=torch.float32), family)
        expected = base(input_ids=IDS).logits
        assert (merged(input_ids=IDS).logits - expected).norm() < 1e-5 * expected.norm()
    assert (before - expected).norm() > 0.1 * expected.norm()
    assert bool(report.without_counterpart) == (family in SELF_LAYERS)  # the cross-attention layers


def test_experts_of_a_mixture_stay_and_are_named(tmp_path):
    """Both models have them, but no kind of weight that is merged."""
    vlm = tiny_vlm("qwen3_vl_moe")
    for role, model in (("base", vlm), ("expert", tiny_expert("qwen3_vl_moe", vlm)[0])):
        save_layout(model, tmp_path / role)
    told = r"\d\d% of the weights in the layers of base .*, or they are experts or routers: .*gate_up_proj \(1, \d\d%"
    with pytest.warns(UserWarning, match=told):
        report = merge(tmp_path, output="merged", scale=0.5)
    before, after = tensors(tmp_path / "base"), tensors(report.output)
    stay = [key for key in before if "experts" in key or "mlp.gate." in key]
    assert stay and all(torch.equal(before[key], after[key]) for key in stay)
    assert report.without_counterpart["layers.*.mlp.experts.gate_up_proj"] == 1


def swap_decoder(vlm, expert, family):
    """Layers and final norm of the expert into a loaded model, by transformers' own names."""
    theirs, ours = expert.get_decoder(), vlm.get_decoder()
    places = SELF_LAYERS.get(family, range(len(theirs.layers)))
    for place, layer in zip(places, theirs.layers, strict=True):
        ours.layers[place].load_state_dict(layer.state_dict())
    ours.norm.load_state_dict(theirs.norm.state_dict())


@scales_what_dare_keeps
@pytest.mark.parametrize("family", FAMILIES)
def test_everything_else_stays_as_it_is(trios, tmp_path, family):
    base = trios[family] / "base"
    report = merge(trios[family], "dare_linear", tmp_path / "merged", scale=0.5)
    before, after = tensors(base), tensors(report.output)
    differ = {key for key in before if not torch.equal(before[key], after[key])}
    assert list(before) == list(after) and report.tensors == len(before)
    text = {key for key in before if (canonical_name(key, CROSS.get(family, ())) or "").startswith(("layers.", "norm"))}
    assert differ == text and len(text) == report.merged
    for file in base.iterdir():
        copy = report.output / file.name
        if file.suffix == ".safetensors":
            assert safe_open(file, "pt").metadata() == safe_open(copy, "pt").metadata()
            assert copy.stat().st_size == file.stat().st_size
        elif file.name != "config.json":
            assert copy.read_bytes() == file.read_bytes()
    config, merged = (json.loads((folder / "config.json").read_text()) for folder in (base, report.output))
    settings = merged.pop("drift_merge_baseline")
    assert config == merged and (settings["method"], settings["weights"]) == ("dare_linear", [0.5])
    assert not list(tmp_path.glob("*.partial")) and not (report.output / ".drift_peft").exists()


@pytest.mark.parametrize("ways", [{"scale": 0.5}, {"scale": 0.5, "only_layers": [0], "modules": ["attn"]}], ids=str)
def test_another_setting_is_another_merge(trio, tmp_path, ways):
    """Of folders without a claim, too, and wherever the few weights that are compared are the same in both."""
    sources = trio / "expert", trio / "base", tmp_path / "m"
    merge_baseline("ties", *sources, **ways, progress=False)
    merge_baseline("ties", *sources, **ways, exist_ok=True, progress=False)
    others = [{"scale": 0.5}, {"only_layers": [0]}, {"modules": ["attn"]}, {"modules": ["attn", "mlp"]}]
    others += [{"skip_first": 1}, {"density": 0.3}, {"scale": 0.4}, {"only_layers": [0], "modules": ["attn"]}]
    for other in ({"scale": 0.5, **other} for other in others):
        if other != ways:
            with pytest.raises(FileExistsError, match=r"exists and was merged with .*, not .*: name another output"):
                merge_baseline("ties", *sources, **other, exist_ok=True, progress=False)
    if "modules" not in ways:  # in another order, and all of them
        merge_baseline("ties", *sources, **ways, modules=["norm", "mlp", "attn"], exist_ok=True, progress=False)
    file = tmp_path / "m" / "config.json"
    written = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in written.items() if key != "drift_merge_baseline"}))
    with pytest.raises(FileExistsError, match="exists and does not say how it was merged: name another output"):
        merge_baseline("ties", *sources, **ways, exist_ok=True, progress=False)
    file.write_text(json.dumps(written))
    config = trio / "base" / "config.json"
    config.write_text((tmp_path / "m" / "config.json").read_text())  # its base says so, and is merged further
    merge_baseline("task_arithmetic", *sources, scale=0.5, overwrite=True, progress=False)
    assert "drift_merge_baseline" not in json.loads((tmp_path / "m" / "config.json").read_text())


def test_modules(trios, tmp_path):
    folder = trios["qwen2_5_vl"]
    V = text_weights(folder / "base")
    kinds = {"attn": "_proj.weight", "bias": "bias", "norm": "norm"}
    for module, part in kinds.items():
        merged = text_weights(merge(folder, output=tmp_path / "merged", scale=0.5, modules=[module]).output)
        differ = {name for name in V if not torch.equal(V[name], merged[name])}
        assert differ == {name for name in V if part in name and (module != "attn" or "self_attn" in name)}


def test_an_expert_given_as_an_adapter(trio):
    """On the base itself: Δ = s·B·A."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(trio / "base", dtype=torch.float32),
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=False),
    )
    model.save_pretrained(trio / "adapter")
    merged = text_weights(merge(trio, expert=trio / "adapter", scale=0.5).output)
    V, layer = text_weights(trio / "base"), model.get_base_model().model.layers[0].self_attn.q_proj
    torch.testing.assert_close(merged[Q], V[Q] + 0.5 * layer.get_delta_weight("default").detach())
    assert {name for name in V if not torch.equal(V[name], merged[name])} == {Q, Q.replace("0", "1")}


@scales_what_dare_keeps
def test_the_command_line(trio, capsys):
    where = "--expert", trio / "expert", "--base", trio / "base", "-o", trio / "merged"
    status, out, _ = run(capsys, "merge-baseline", "--method", "ties", *where, "--scale", "0.5", "--json")
    report = json.loads(out)
    assert status == 0 and report["weights"] == [0.5] and report["density"] == 0.2 and report["merged"] == 19
    expected = tensors(merge(trio, "ties", "again", scale=0.5).output)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in tensors(trio / "merged").items())
    status, _, err = run(capsys, "merge-baseline", "--method", "ties", *where, "--overwrite")
    assert status == 1 and "needs the model that base and expert were trained from" in err
    flags = "--reference", trio / "reference", "--weights", "1", "0.3", "--skip-first", "1", "--overwrite"
    status, out, _ = run(capsys, "merge-baseline", "--method", "dare_ties", *where, *flags, "--modules", "attn", "mlp")
    assert status == 0 and "1, 0.3" in out and "0.2" in out and "weights merged" in out
    status, _, err = run(capsys, "merge-baseline", "--method", "ties", *where, "--density", "few")
    assert status == 2 and "--density takes a number, got few" in err


@scales_what_dare_keeps
def test_a_folder_of_the_same_models_and_settings_is_taken(trio, tmp_path):
    """Whatever the method; any other is refused and stays as it is."""
    sources = trio / "expert", trio / "base"
    for name, method, ways in (
        ("task", "task_arithmetic", {"scale": 0.3}),
        ("ties", "ties", {"reference": trio / "reference"}),
    ):
        output = tmp_path / name
        merge_baseline(method, *sources, output, **ways, progress=False)
        before = {file: file.stat().st_mtime_ns for file in output.iterdir()}
        report = merge_baseline(method, *sources, output, **ways, exist_ok=True, progress=False)
        assert report.relative_change is None and report.merged > 0
        others = [
            (method, sources[::-1], ways),
            ("task_arithmetic", sources, {"scale": 0.25}),
            ("task_arithmetic", sources, {"scale": 0.3, "reference": trio / "reference"}),
            ("task_arithmetic", sources, {"scale": 0.3, "only_layers": [0]}),
            ("dare_linear", sources, {"scale": 0.3}),
        ]
        for method_of_other, roles, other in others:
            with pytest.raises(FileExistsError, match="name another output, or pass overwrite=True"):
                merge_baseline(method_of_other, *roles, output, **other, exist_ok=True, progress=False)
        assert before == {file: file.stat().st_mtime_ns for file in output.iterdir()}
    shard = next(iter(sorted(output.glob("*.safetensors"))))
    spoilt = load_file(shard)
    save_file({key: tensor + 1 for key, tensor in spoilt.items()}, shard, metadata={"format": "pt"})
    with pytest.raises(FileExistsError, match=r"holds another .*embed_tokens"):  # which no merge touches
        merge_baseline(method, *sources, output, **ways, exist_ok=True, progress=False)
    with pytest.raises(FileExistsError, match="is no merged model"):
        merge_baseline("task_arithmetic", *sources, tmp_path, scale=0.5, exist_ok=True, progress=False)
    with pytest.raises(ValueError, match=r"give exist_ok=True.*or overwrite=True"):
        merge_baseline("task_arithmetic", *sources, output, scale=0.5, exist_ok=True, overwrite=True, progress=False)


def test_a_change_of_nothing_known_says_why(trio, tmp_path, capsys):
    """--exist-ok writes the folder where there is none."""
    for shard in (trio / "base").glob("*.safetensors"):
        zeroed = {key: 0 * tensor if "self_attn" in key else tensor for key, tensor in load_file(shard).items()}
        save_file(zeroed, shard, metadata={"format": "pt"})
    sources = ["--expert", trio / "expert", "--base", trio / "base", "-o", tmp_path / "m"]
    how = ["--method", "task_arithmetic", "--scale", 0.5, "--modules", "attn", "--force", "--exist-ok"]
    for told in ("they were zero", "not measured again"):
        status, out, _ = run(capsys, "merge-baseline", *sources, *how)
        assert status == 0 and told in " ".join(out.split())


def test_the_merged_config_says_what_was_added(trio, tmp_path):
    """Of one task vector by task arithmetic, and of nothing else."""
    said = {}
    for name, method, ways in (
        ("scaled", "task_arithmetic", {"scale": 0.5}),
        ("cancelled", "layer_swap", {"weights": (0.75, 0.25), "skip_first": 1}),
        ("two", "task_arithmetic", {"weights": (1.0, 0.5), "reference": trio / "reference"}),
        ("ties", "ties", {"scale": 0.5}),
    ):
        merge_baseline(method, trio / "expert", trio / "base", tmp_path / name, **ways, progress=False)
        said[name] = json.loads((tmp_path / name / "config.json").read_text()).get("drift_merge")
    assert said["two"] is said["ties"] is None
    origin = {role: {"id": str(trio / role), "revision": None} for role in ("base", "expert")}
    everywhere = {"reference": None, "modules": ["attn", "mlp", "norm"], "only_layers": None}
    assert said["scaled"] == {**origin, **everywhere, "scale": 0.5, "skip_first": 0}
    assert said["cancelled"] == {**origin, **everywhere, "scale": 0.25, "skip_first": 1}
