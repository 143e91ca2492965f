"""merge_baseline: every method equals its formula in float64, transformers loads it, and all else stays as it is."""

import json
import math
import shutil
import warnings
from unittest.mock import patch

import peft
import pytest
import torch
from command import run
from hypothesis import given, settings
from hypothesis import strategies as st
from older import scales_what_dare_keeps
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import SELF_LAYERS, save_layout, tiny_expert, tiny_llm, tiny_vlm
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import drift_peft.checkpoints.update
from drift_peft import merge_baseline
from drift_peft.checkpoints.naming import canonical_name
from drift_peft.merge.baseline import METHODS, _merge

FAMILIES = ("qwen2_5_vl", "llava_next", "idefics2", "mllama", "llama")
CROSS = {"mllama": (1, 3)}
IDS = torch.arange(7, 27).reshape(2, 10)
Q = "layers.0.self_attn.q_proj.weight"
every_method = pytest.mark.parametrize(
    "method", [pytest.param(name, marks=scales_what_dare_keeps if "dare" in name else ()) for name in METHODS]
)


def disturb(model, seed, share=0.3):
    """Move every weight, norm and bias of the text model's layers, and its final norm."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.get_decoder().named_parameters():
        if "embed" not in name:
            size = share * (parameter.std() if parameter.dim() == 2 else 0.1)
            parameter.data += size * torch.randn(parameter.shape, generator=generator)
    return model


def save_trio(folder, family, dtype=torch.float32, shard="20KB", **changes):
    """Write base, expert, and reference, which is near both, but nearer to each than they are to one another."""
    if family == "llama":
        models = [tiny_llm("llava", **changes) for _ in range(3)]
    else:
        vlm = tiny_vlm(family)
        models = [vlm, tiny_expert(family, vlm)[0], tiny_expert(family, vlm, seed=2)[0]]
    for seed, (role, model) in enumerate(zip(("base", "expert", "reference"), models, strict=True)):
        save_layout(disturb(model, seed).to(dtype), folder / role, max_shard_size=shard)
    return folder


@pytest.fixture(scope="module")
def trios(tmp_path_factory):
    return {family: save_trio(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.fixture
def trio(trios, tmp_path):
    """A small one of its own, to spoil."""
    return shutil.copytree(trios["llama"], tmp_path, dirs_exist_ok=True)


def merge(folder, method="task_arithmetic", output="merged", **options):
    where = {"expert": folder / "expert", "base": folder / "base", "output": folder / output}
    return merge_baseline(method, **where | options, overwrite=True, progress=False)


def tensors(folder):
    """Raw key -> tensor."""
    return {key: tensor for shard in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(shard).items()}


def text_weights(folder, cross=()):
    """Canonical name -> tensor, of what is merged: all but embedding and head."""
    names = {canonical_name(key, cross): tensor for key, tensor in tensors(folder).items()}
    return {name: tensor for name, tensor in names.items() if name and name.startswith(("layers.", "norm."))}


# The formulas, in float64 and one weight at a time; τ as stored numbers give it in fp32, since trimming compares sizes.


def trim(tau, density):
    kept = int(density * tau.numel())
    least = tau.abs().flatten().sort(descending=True)[0][kept - 1] if kept else math.inf
    return torch.where(tau.abs() >= least, tau, 0)


def elect(taus, weights):
    sign = torch.where(sum(taus) >= 0, 1, -1)
    agreeing = [tau.sign() == sign for tau in taus]
    total = sum(w * tau * agrees for w, tau, agrees in zip(weights, taus, agreeing, strict=True))
    return total / sum(agrees.double() for agrees in agreeing).clamp(min=1)


def combine(taus, weights):
    return sum(w * tau for w, tau in zip(weights, taus, strict=True))


def outcomes(method, taus, weights, density):
    """Every value that an entry may take: one, or with dare one for each choice of what is kept."""
    if method in ("task_arithmetic", "layer_swap"):
        return [combine(taus, weights)]
    if method == "ties":
        return [elect([trim(tau, density) for tau in taus], weights)]
    join = elect if method == "dare_ties" else combine
    choices = [[0 * tau, tau / density] for tau in taus]
    return [join(chosen, weights) for chosen in ([[a] for a in choices[0]] if len(taus) == 1 else pairs(*choices))]


def pairs(first, second):
    return [[a, b] for a in first for b in second]


def error(found, expected):
    """Largest distance of an entry from the nearest of the values that it may take."""
    return torch.stack([(found.double() - value).abs() for value in expected]).amin(0).max().item()


# What is merged


@every_method
@pytest.mark.parametrize("family", FAMILIES)
def test_the_formula(trios, tmp_path, monkeypatch, family, method):
    monkeypatch.setattr(drift_peft.checkpoints.update, "BLOCK", 3000)  # several blocks of rows a weight
    folder, cross = trios[family], CROSS.get(family, ())
    skipped = {"skip_first": 1} if method == "layer_swap" else {}
    report = merge(folder, method, tmp_path / "merged", reference=folder / "reference", **skipped)
    weights = {"task_arithmetic": (0.9, 0.1), "layer_swap": (0.9, 0.1)}.get(method, (1.6, 0.2))  # table 9
    density = None if weights == (0.9, 0.1) else 0.2
    V, E, R, merged = (
        text_weights(path, c)
        for path, c in [
            (folder / "base", cross),
            (folder / "expert", ()),
            (folder / "reference", ()),
            (report.output, cross),
        ]
    )
    moved = [name for name in E if method != "layer_swap" or not name.startswith("layers.0.")]
    assert report.weights == weights and report.density == density and report.merged == len(moved) > 8
    for name in moved:
        taus = [(V[name] - R[name]).double(), (E[name] - R[name]).double()]
        values = [R[name].double() + value for value in outcomes(method, taus, weights, density)]
        assert error(merged[name], values) < 1e-5 * V[name].abs().max(), name
        if density is None:
            assert error(values[0], [V[name].double()]) > 1e-4, name
    change = sum((merged[name] - V[name]).double().square().sum() for name in moved)
    assert report.relative_change == pytest.approx(
        math.sqrt(change / sum(V[name].double().square().sum() for name in moved)), rel=1e-4
    )


@every_method
@pytest.mark.parametrize("reference", [None, "reference"])
def test_one_scaled_task_vector(trios, tmp_path, method, reference):
    folder = trios["llama"]
    path = None if reference is None else folder / reference
    report = merge(folder, method, tmp_path / "merged", scale=0.7, reference=path, skip_first=0)
    V, E, merged = text_weights(folder / "base"), text_weights(folder / "expert"), text_weights(report.output)
    origin = V if path is None else text_weights(path)
    for name in E:
        values = outcomes(method, [(E[name] - origin[name]).double()], [0.7], 0.2)
        assert error(merged[name], [V[name].double() + value for value in values]) < 1e-5 * V[name].abs().max(), name
    assert report.weights == (0.7,)


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
        else:
            assert copy.read_bytes() == file.read_bytes()
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sum_is_fp32_and_cast_once(tmp_path, dtype):
    save_trio(tmp_path, "llama", dtype)
    for options in ({"scale": 0.3}, {"reference": tmp_path / "reference", "weights": (0.8, 0.3)}):
        merged, V, E, R = (
            text_weights(merge(tmp_path, **options).output if role is None else tmp_path / role)
            for role in (None, "base", "expert", "reference")
        )
        for name in merged:
            v, e, r = V[name].double(), E[name].double(), R[name].double()
            exact = v + 0.3 * (e - v) if "scale" in options else r + 0.8 * (v - r) + 0.3 * (e - r)
            half_step = torch.finfo(dtype).eps / 2 * exact.abs() + 1e-6
            assert merged[name].dtype == dtype and ((merged[name].double() - exact).abs() <= half_step).all()


def test_layer_swap_is_br2vs(tmp_path):
    """Table 9: k = 5, and BR2V's code leaves layers 0 to 5 as they are. As first published, it transplants layers."""
    save_trio(tmp_path, "llama", shard="5GB", num_hidden_layers=8)
    V, E = text_weights(tmp_path / "base"), text_weights(tmp_path / "expert")
    swapped = text_weights(merge(tmp_path, "layer_swap").output)
    for name in V:
        kept = name.startswith("layers.") and int(name.split(".")[1]) <= 5
        torch.testing.assert_close(swapped[name], V[name] if kept else 0.9 * V[name] + 0.1 * E[name])
    whole = text_weights(merge(tmp_path, "layer_swap", scale=1, only_layers=[2], modules=["attn", "mlp"]).output)
    for name in V:
        torch.testing.assert_close(whole[name], (E if "layers.2." in name and "proj" in name else V)[name])


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


# Identities


def test_the_reference_cancels_out_of_weights_that_add_up_to_one(trios, tmp_path):
    folder = trios["llama"]
    plain, scaled = merge(folder, output=tmp_path / "plain"), merge(folder, output=tmp_path / "scaled", scale=0.1)
    same = merge(folder, output=tmp_path / "same", reference=folder / "reference")
    assert plain.weights == scaled.weights == (0.1,) and same.weights == (0.9, 0.1)
    for key, tensor in tensors(plain.output).items():
        assert torch.equal(tensor, tensors(scaled.output)[key])
        torch.testing.assert_close(tensor, tensors(same.output)[key], atol=1e-6, rtol=1e-5)


@scales_what_dare_keeps
def test_with_one_task_vector_and_all_entries_every_method_is_task_arithmetic(trios, tmp_path):
    folder = trios["llama"]
    expected = tensors(merge(folder, output=tmp_path / "merged", scale=0.6).output)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for method in ("ties", "dare_linear", "dare_ties"):
            merged = tensors(merge(folder, method, tmp_path / "merged", scale=0.6, density=1).output)
            assert all(torch.equal(merged[key], expected[key]) for key in expected), method
    assert not any("density" in str(warning.message) for warning in caught)  # of which PEFT warns


shapes = st.one_of(st.tuples(st.integers(1, 40)), st.tuples(st.integers(1, 12), st.integers(1, 30)))
numbers = st.floats(-2, 2, width=32)


@every_method
@settings(max_examples=40, deadline=None, derandomize=True)
@given(shapes, st.tuples(numbers, numbers), st.floats(0.05, 1), st.integers(1, 2), st.data())
def test_merge_of_one_weight(method, shape, weights, density, count, data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    V, E, R = (torch.randn(shape, generator=generator) for _ in range(3))
    weights, recipe = weights[:count], METHODS[method]
    with patch.object(drift_peft.checkpoints.update, "BLOCK", data.draw(st.sampled_from([1, 20, 10**6]))):
        sources = {"base": V, "expert": E, "reference": R}
        density = None if recipe.density is None else density
        blocks = list(_merge(recipe.merge, sources, weights, density, "0 name"))
    taus = [(E - R).double()] if count == 1 else [(V - R).double(), (E - R).double()]
    anchor = (V if count == 1 else R).double()
    values = [anchor + value for value in outcomes(method, taus, weights, density)]
    assert error(torch.cat(blocks), values) < 1e-5 / (density or 1)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_blocks_of_rows_make_no_difference(method, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    sources = {role: torch.randn(12, 30, generator=generator) for role in ("base", "expert", "reference")}
    arguments = METHODS[method].merge, sources, (0.7, 0.4), 0.3 if method == "ties" else None, "0"
    (whole,) = _merge(*arguments)
    monkeypatch.setattr(drift_peft.checkpoints.update, "BLOCK", 70)
    blocks = list(_merge(*arguments))
    assert [len(block) for block in blocks] == [2] * 6 and torch.equal(torch.cat(blocks), whole)


def test_ties_where_all_agree_is_the_mean():
    R = torch.randn(30, 20, generator=torch.Generator().manual_seed(0))
    step = R.sign() * R.abs().clamp(min=0.1)
    sources = {"base": R + step, "expert": R + 2 * step, "reference": R}
    (merged,) = _merge(METHODS["ties"].merge, sources, (1.6, 0.2), 1.0, "0")
    torch.testing.assert_close(merged, R + (1.6 + 2 * 0.2) / 2 * step)


@scales_what_dare_keeps
@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_keeps_the_expectation(method):
    generator = torch.Generator().manual_seed(0)
    W, delta = (torch.randn(64, 64, generator=generator) for _ in range(2))
    sources, runs, density = {"base": W, "expert": W + delta}, 200, 0.2
    steps = [next(_merge(METHODS[method].merge, sources, (0.5,), density, f"{seed} w")) - W for seed in range(runs)]
    kept = torch.stack([(step.abs() > 1e-3 * delta.abs()).float().mean() for step in steps])
    assert kept.mean().item() == pytest.approx(density, abs=0.002)  # six standard errors
    assert kept.std().item() == pytest.approx(math.sqrt(density * (1 - density) / W.numel()), rel=0.2)
    deviation = ((sum(steps) / runs - 0.5 * delta).norm() / (0.5 * delta).norm()).item()
    assert deviation == pytest.approx(math.sqrt((1 / density - 1) / runs), rel=0.1)


# The random choice


@scales_what_dare_keeps
def test_the_seed_decides(trios, tmp_path):
    folder, state = trios["llama"], torch.get_rng_state()
    first = merge(folder, "dare_ties", tmp_path / "first", scale=0.5)
    again = merge(folder, "dare_ties", tmp_path / "again", scale=0.5)
    other = merge(folder, "dare_ties", tmp_path / "other", scale=0.5, seed=1)
    few = merge(folder, "dare_ties", tmp_path / "few", scale=0.5, only_layers=[1], modules=["mlp"])
    for file in {*first.output.iterdir()} - {first.output / "README.md"}:  # the card names its folder
        assert file.read_bytes() == (again.output / file.name).read_bytes()
    first, other, few = tensors(first.output), tensors(other.output), tensors(few.output)
    name = "model.layers.1.mlp.up_proj.weight"
    assert not torch.equal(first[name], other[name])
    assert torch.equal(first[name], few[name])  # whatever else is merged
    base = tensors(folder / "base")
    kept = [first[key] != base[key] for key in (name, name.replace("1", "0"))]
    assert not torch.equal(*kept)  # each weight has a choice of its own
    assert torch.equal(state, torch.get_rng_state())


# Refusals: the message, and nothing left behind


def spoil(role, value):
    def change(folder):
        for shard in (folder / role).glob("*.safetensors"):
            held = load_file(shard)
            if f"model.{Q}" in held:
                held[f"model.{Q}"][3, 3] = value
                save_file(held, shard, metadata={"format": "pt"})

    return change


def replace_expert(make):
    def change(folder):
        shutil.rmtree(folder / "expert")
        save_layout(make(), folder / "expert")

    return change


def eight_bits(folder):
    for shard in (folder / "expert").glob("*.safetensors"):
        held = {key: t.to(torch.float8_e4m3fn) if "q_proj" in key else t for key, t in load_file(shard).items()}
        save_file(held, shard, metadata={"format": "pt"})


def scaled(folder):
    """In 16 bits, as whoever knows no integers casts them, and with a scale of which the class knows nothing."""
    for shard in (folder / "base").glob("*.safetensors"):
        held = load_file(shard)
        if f"model.{Q}" in held:
            held |= {f"model.{Q}": held[f"model.{Q}"].half(), f"model.{Q}".replace("weight", "scales"): torch.ones(64)}
            save_file(held, shard, metadata={"format": "pt"})


def tiny_weights(folder):
    for role in ("base", "expert"):
        for shard in (folder / role).glob("*.safetensors"):
            held = {key: t * 1e-26 for key, t in load_file(shard).items()}
            save_file(held, shard, metadata={"format": "pt"})


def same(folder):
    shutil.rmtree(folder / "expert")
    shutil.copytree(folder / "base", folder / "expert")


REFUSED = {
    "unknown method": ({"method": "slerp"}, None, "method='slerp' is unknown: choose from task_arithmetic, ties"),
    "ties alone": ({"method": "ties"}, None, r"ties with weights \(1.6, 0.2\) needs the model .*--reference.*--scale"),
    "dare alone": ({"method": "dare_linear"}, None, "dare_linear with weights .* needs the model that base and expert"),
    "other sum": ({"weights": (0.9, 0.2)}, None, r"task_arithmetic with weights \(0.9, 0.2\) needs the model that"),
    "both": ({"weights": (0.9, 0.1), "scale": 1}, None, r"scale=1 .* and weights=\(0.9, 0.1\) for two: give one"),
    "three": ({"weights": (0.9, 0.1, 0)}, None, r"weights are two, .*; got \(0.9, 0.1, 0\)"),
    "infinite": ({"scale": math.inf}, None, "scale is one finite number"),
    "density": ({"method": "ties", "scale": 1, "density": 0}, None, "density must be above 0 and at most 1, got 0"),
    "no density": ({"density": 0.5}, None, "density=0.5 has no meaning for task_arithmetic, which keeps every entry"),
    "module": ({"modules": "head"}, None, r"modules=\['head'\] are not all merged: choose from attn, mlp, norm, bias"),
    "no module": ({"modules": []}, None, r"modules=\[\] are not all merged"),
    "eight bits": ({}, eight_bits, f"{Q} is torch.float8_e4m3fn in the expert .*: name the full-precision one"),
    "scaled": ({}, scaled, rf"{Q} is scaled by model\..*q_proj\.scales in the base .*: name the full-precision one"),
    "no layer": ({"method": "layer_swap"}, None, "skip_first=6 leaves none of the 2 layers of"),
    "other layer": ({"only_layers": [4]}, None, "only_layers names layer 4, but .* has the layers 0 to 1"),
    "zero": ({"scale": 0}, None, r"task_arithmetic with weights \(0.0,\) changes no weight of .*base: .*expert is the"),
    "same": ({}, same, "changes no weight of .* is the same model there"),
    "nan": ({}, spoil("expert", math.nan), f"{Q} of the expert .*expert holds NaN or infinite values"),
    "inf": ({}, spoil("base", math.inf), f"{Q} of the base .*base holds NaN or infinite values"),
    "overflow": (
        {"scale": 3e38},
        None,
        r"model\.layers\..* is not finite after the merge: NaN, Inf or an overflow of torch.float32",
    ),
    "stranger": (
        {},
        replace_expert(lambda: tiny_llm("llava", seed=9)),
        r"has cosine -?0\.0\d\d with that of .*: no common ancestor, or shifted layers; force=True \(--force\)",
    ),
    "other depth": (
        {},
        replace_expert(lambda: tiny_llm("llava", num_hidden_layers=3)),
        "differ in number of layers 3 and 2",
    ),
    "no expert": ({"expert": "no/where"}, None, "no/where"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(trio, case, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    options, change, message = REFUSED[case]
    if change:
        change(trio)
    before = {file: file.stat().st_mtime_ns for file in trio.rglob("*")}
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        merge(trio, **options)
    assert "\n" not in str(caught.value)
    assert {file: file.stat().st_mtime_ns for file in trio.rglob("*") if file != trio} == before


def test_dare_is_refused_where_peft_does_not_divide_by_the_density(trio, monkeypatch):
    monkeypatch.setattr(peft, "__version__", "0.18.1")
    message = (
        r"^method 'dare_ties' needs PEFT 0\.19 or newer, since PEFT 0\.18\.1 does not divide .* merge by 'ties'\.$"
    )
    with pytest.raises(ValueError, match=message):
        merge(trio, "dare_ties", reference=trio / "reference")


def test_a_reference_must_be_related_too(trio):
    shutil.rmtree(trio / "reference")
    save_layout(tiny_llm("llava", seed=9), trio / "reference")
    with pytest.raises(ValueError, match=r"expert has cosine -?0\.0\d\d with that of .*reference: no common ancestor"):
        merge(trio, "ties", reference=trio / "reference")
    assert merge(trio, "ties", reference=trio / "reference", force=True).relative_change > 0.04


def test_weights_whose_squares_vanish_are_merged(trio):
    expected = merge(trio, output=trio / "first").relative_change
    tiny_weights(trio)
    assert merge(trio).relative_change == pytest.approx(expected, rel=1e-3)


def test_warns_of_other_rotations(trio):
    file = trio / "expert" / "config.json"
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    file.write_text(json.dumps({**json.loads(file.read_text()), "rope_parameters": rope}))
    with pytest.warns(UserWarning, match="rope type is linear in the expert and default in the base, rope factor is"):
        merge(trio)


def test_force_merges_strangers(trio):
    replace_expert(lambda: tiny_llm("llava", seed=9))(trio)
    assert merge(trio, force=True).relative_change > 0.04


def test_an_existing_output_is_replaced_only_when_asked(trio):
    output = merge(trio).output
    before = {file.name: file.read_bytes() for file in output.iterdir()}
    where = {"expert": trio / "expert", "base": trio / "base", "progress": False}
    with pytest.raises(FileExistsError, match=r"exists: name another folder, or pass overwrite=True"):
        merge_baseline("task_arithmetic", **where, output=output)
    for role in ("expert", "base", "reference"):
        with pytest.raises(FileExistsError, match=rf"holds .*{role}, which is merged: name another folder"):
            merge(trio, output=trio / role, reference=trio / "reference")
    spoil("expert", math.nan)(trio)
    with pytest.raises(ValueError, match="holds NaN"):
        merge(trio)
    assert {file.name: file.read_bytes() for file in output.iterdir()} == before


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


# An existing output


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
