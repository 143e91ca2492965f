"""The VLM's prior on a base that has taken λΔ in: recognized by its weights, and steered toward what is left."""

import json
import shutil
import warnings

import pytest
import torch
from pairs import drift, load, nearly, train, untouched, wrap
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from twin import make_whole_pair

from drift_peft import DriftConfig, ReasoningPrior, build_prior, guide, merge_adapter, merge_baseline, telemetry
from drift_peft.checkpoints.naming import canonical_name, module_kind
from drift_peft.prior.merged import MERGE_KEY, MergedDelta
from drift_peft.tuner.steered import steered_of

SCALES = (0.5, 1.0, 1.5, -0.25)


@pytest.fixture(scope="module")
def folder(pairs, tmp_path_factory):
    """`base`, `expert` and `prior.safetensors` of a Llama, and base + λΔ in a folder of the name λ."""
    folder = tmp_path_factory.mktemp("merged")
    shutil.copytree(pairs("llama"), folder, dirs_exist_ok=True)
    for scale in SCALES:
        merge(folder, str(scale), scale)
    return folder


def merge(folder, name, scale=0.5, expert="expert", **settings):
    output = folder / name / "base"  # where `load` looks
    output.parent.mkdir(exist_ok=True)
    merge_baseline("task_arithmetic", folder / expert, folder / "base", output, scale=scale, progress=False, **settings)
    return output


def claims(folder, **changes):
    """Change what a merged folder says of itself."""
    config = json.loads((folder / "config.json").read_text())
    config[MERGE_KEY] |= changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.filterwarnings("error:The prior")
@pytest.mark.parametrize("kind", ["fp32", "bf16", "nf4"])
@pytest.mark.parametrize("scale", [0.5, 1.5, -0.25])
def test_what_steers_is_what_is_left(folder, scale, kind):
    prior = ReasoningPrior.load(folder / "prior.safetensors")
    model = wrap(load(folder / str(scale), "llama", kind), drift(folder))
    found = steered_of(model)
    assert len(found) == len(prior) == 14
    for s in found:
        left = (s.prior["U"].float() * s.prior["S"]) @ s.prior["Vh"].float()
        weight = prior[s.name]
        whole = weight.U[:, :4].float() * weight.S[:4] @ weight.Vh[:4].float()
        assert torch.allclose(left, (1 - scale) * whole, atol=1e-6) and (s.prior["S"] >= 0).all()
    assert telemetry(train(model))["guided_steps"] == 3


def test_a_model_that_something_else_wrapped_too(folder):
    model = get_peft_model(load(folder / "0.5", "llama"), LoraConfig(r=4, target_modules=["q_proj"]))
    guide(model, str(folder / "prior.safetensors"))
    plain = get_peft_model(load(folder, "llama"), LoraConfig(r=4, target_modules=["q_proj"]))
    guide(plain, str(folder / "prior.safetensors"))
    for s, other in zip(steered_of(model), steered_of(plain), strict=True):
        assert torch.allclose(s.prior["S"], 0.5 * other.prior["S"])


@pytest.mark.parametrize("steered_by", ["DriftConfig", "guide"])
def test_a_card_without_a_prior_says_how_the_base_was_made(folder, tmp_path, steered_by):
    held, base = {"drift_target": "base", "drift_scale": "decoupled"}, load(folder / "0.5", "llama")
    if steered_by == "guide":
        model = guide(get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"])), **held)
    else:
        model = get_peft_model(base, DriftConfig(r=4, target_modules=["q_proj"], **held))
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "To make it again:\n\n```\n" in card and ", which is base + 0.5" in card


def test_vectors_too(tmp_path):
    """Norms and biases, whose Δ is kept whole."""
    pair = make_whole_pair(tmp_path)
    origins = {"base": {"id": "b"}, "expert": {"id": "e"}, "reference": None}
    kinds = {"modules": ["attn", "mlp", "norm", "bias"], "only_layers": None, "skip_first": 0}
    merged = MergedDelta(0.25, **origins, **kinds)
    vectors = [name for name in pair.prior if module_kind(name) in ("norm", "bias")]
    assert len(vectors) > 14
    for name in vectors:
        vector = pair.prior[name]
        assert torch.equal(merged.left(name, vector).delta, 0.75 * vector.delta)


def test_weights_that_were_not_merged_keep_their_whole_delta(folder):
    merge(folder, "attn", modules=["attn"], only_layers=[1])
    prior = ReasoningPrior.load(folder / "prior.safetensors")
    for s in steered_of(wrap(load(folder / "attn", "llama"), drift(folder))):
        share = 0.5 if s.name.startswith("layers.1.self_attn") else 1.0
        assert torch.allclose(s.prior["S"], share * prior[s.name].S[:4])


def test_a_base_that_is_nearly_the_merged_one(folder):
    model = nearly(load(folder / "0.5", "llama"), 0.07)
    with pytest.warns(UserWarning, match=r"by \d\.\d% on this base, .* explain, and it is said to be .*base \+ "):
        wrap(model, drift(folder))
    assert steered_of(model)


def test_a_claim_that_the_weights_do_not_bear_out_is_refused(folder, tmp_path):
    """Another λ, another Δ, no claim at all."""
    for changes in ({"scale": 3.0}, {"scale": -2.0}, {"modules": ["mlp"]}):
        shutil.rmtree(tmp_path / "base", ignore_errors=True)
        shutil.copytree(folder / "1.5" / "base", tmp_path / "base")
        claims(tmp_path / "base", **changes)
        model = load(tmp_path, "llama")
        with pytest.raises(ValueError, match=r"The base says that it is .*base \+ .*its fingerprint is off by \d+%"):
            wrap(model, drift(folder))
        assert untouched(model)
    config = load(folder / "1.5", "llama")
    delattr(config.config, MERGE_KEY)
    with pytest.raises(ValueError, match="built for other base weights"):
        wrap(config, drift(folder))


def test_an_expert_that_is_not_the_priors_is_refused(folder, tmp_path):
    other = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    for name, weight in other.named_parameters():
        if canonical_name(name) in ReasoningPrior.load(folder / "prior.safetensors"):
            weight.data += 0.3 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(9))
    other.save_pretrained(folder / "other")
    merge(folder, "by another", scale=1.5, expert="other")
    with pytest.raises(ValueError, match="its fingerprint is off"):
        wrap(load(folder / "by another", "llama"), drift(folder))


def test_a_delta_from_the_common_ancestor_is_one_of_its_own(folder, tmp_path):
    """VLM + λ(expert − ancestor) takes the prior of that Δ, and not that of expert − VLM."""
    ancestor = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    generator = torch.Generator().manual_seed(5)
    for name, weight in ancestor.named_parameters():
        if "proj" in name:
            weight.data += 0.3 * weight.std() * torch.randn(weight.shape, generator=generator)
    ancestor.save_pretrained(folder / "ancestor")
    where = {"reference": folder / "ancestor", "progress": False}
    prior = build_prior(folder / "expert", folder / "base", tmp_path / "prior.safetensors", rank=8, **where)
    merge(folder, "hierarchical", scale=1.5, reference=folder / "ancestor")
    for s in steered_of(wrap(load(folder / "hierarchical", "llama"), drift(tmp_path))):
        assert torch.allclose(s.prior["S"], 0.5 * prior[s.name].S[:4])
    with pytest.raises(ValueError, match=r"\(.*expert − .*ancestor\), but its weights are not what the prior"):
        wrap(load(folder / "hierarchical", "llama"), drift(folder))


DAMAGED = [7, {}, {"scale": "half"}, {"scale": True}, {"base": {}}, {"expert": None}, {"modules": "attn"}]
DAMAGED += [{"only_layers": ["x"]}, {"only_layers": [True]}, {"skip_first": -3}]


@pytest.mark.parametrize("claim", DAMAGED)
def test_a_damaged_claim_is_one_sentence(claim, folder):
    model = load(folder / "0.5", "llama")
    setattr(model.config, MERGE_KEY, {**getattr(model.config, MERGE_KEY), **claim} if claim and claim != 7 else claim)
    with pytest.raises(ValueError, match=r"^drift_merge in the base's config.json is damaged \(.*\): merge it again$"):
        wrap(model, drift(folder))


def test_a_prior_of_the_merged_base_itself_is_whole(folder, tmp_path):
    """Δ was taken from the merged base, so nothing of it was merged."""
    merged = folder / "0.5" / "base"
    build_prior(folder / "expert", merged, tmp_path / "prior.safetensors", rank=8, progress=False)
    prior = ReasoningPrior.load(tmp_path / "prior.safetensors")
    for s in steered_of(wrap(load(folder / "0.5", "llama"), drift(tmp_path))):
        assert torch.equal(s.prior["S"], prior[s.name].S[:4])


def test_the_same_expert_is_not_merged_twice(folder, tmp_path):
    """What is there in the end would be another multiple of Δ than the claim says."""
    with pytest.raises(ValueError, match=r"base .* is .*base \+ 0.5·\(.*\) already: merge into .*base at another"):
        merge_baseline("task_arithmetic", folder / "expert", folder / "0.5" / "base", tmp_path / "out", scale=0.2)
    assert not (tmp_path / "out").exists()
    shutil.copytree(folder / "expert", tmp_path / "expert")  # another one, for all that is known, of the same name
    merge_baseline(
        "task_arithmetic", tmp_path / "expert", folder / "0.5" / "base", tmp_path / "o", scale=0.2, progress=False
    )


ADAPTED = {
    "DriftConfig": lambda base, folder: get_peft_model(base, drift(folder)),
    "guide": lambda base, folder: guide(
        get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "up_proj"])), folder / "prior.safetensors"
    ),
    "for inference": lambda base, folder: PeftModel.from_pretrained(base, folder / "adapter"),
    "plain": lambda base, folder: get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"])),
}


def merged_in_memory(folder, how="DriftConfig", size=0.002, merge="merge_and_unload"):
    model = ADAPTED[how](load(folder, "llama"), folder)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data += size
    return getattr(model, merge)()


@pytest.mark.parametrize("how", ADAPTED)
def test_an_adapter_that_was_merged_in_memory(folder, how):
    """With the same prior again, it would be pulled along all of Δ once more."""
    get_peft_model(load(folder, "llama"), drift(folder)).save_pretrained(folder / "adapter")
    plain = "was built for slightly other base weights"
    with pytest.warns(UserWarning, match=plain if how == "plain" else "a part of Δ is in these weights") as told:
        get_peft_model(merged_in_memory(folder, how, 0.03 if how in ("guide", "plain") else 0.002), drift(folder))
    assert sum("fingerprint" in str(w.message) for w in told) == 1


def test_too_much_that_was_merged_in_memory_is_refused(folder):
    base = merged_in_memory(folder, size=0.5)
    with pytest.raises(ValueError, match=r"merged into this base in memory, .* go on with one adapter, or save this"):
        get_peft_model(base, drift(folder))
    assert untouched(base)


def test_what_was_merged_in_memory_and_is_none_of_the_priors(folder, tmp_path):
    """Taken off without merging, or with a prior of its own."""
    base = merged_in_memory(folder)
    base.save_pretrained(tmp_path / "base")
    build_prior(folder / "expert", tmp_path / "base", tmp_path / "prior.safetensors", rank=8, progress=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*fingerprint")
        get_peft_model(base, drift(tmp_path))
        get_peft_model(merged_in_memory(folder, merge="unload"), drift(folder))


def test_what_is_merged_further_claims_nothing(folder, tmp_path):
    settings = {"scale": 0.2, "density": 0.9, "progress": False}
    merge_baseline("ties", folder / "expert", folder / "0.5" / "base", tmp_path / "ties", **settings)
    model = train(get_peft_model(load(folder / "0.5", "llama"), LoraConfig(r=4, target_modules=["q_proj"])))
    model.save_pretrained(tmp_path / "adapter")
    merge_adapter(folder / "0.5" / "base", tmp_path / "adapter", tmp_path / "adapted", force=True, progress=False)
    for name in ("ties", "adapted"):
        assert MERGE_KEY not in json.loads((tmp_path / name / "config.json").read_text())
    assert MERGE_KEY in json.loads((folder / "0.5" / "base" / "config.json").read_text())


def test_a_combined_prior_is_not_what_was_merged(folder, tmp_path):
    """Of half of Δ, a base with 0.2 of Δ in it has taken two fifths; which no claim says."""
    merge(folder, "0.2", 0.2)
    ReasoningPrior.combine({str(folder / "prior.safetensors"): 0.5}, tmp_path / "prior.safetensors")
    for kind in ("fp32", "nf4"):
        with pytest.raises(ValueError, match=r"The base is .*base \+ 0.2.*was combined, so that is no part of its Δ"):
            wrap(load(folder / "0.2", "llama", kind), drift(tmp_path))


def test_nothing_is_left_of_a_delta_that_was_merged_whole(folder):
    with pytest.raises(ValueError, match=r"nothing is left of Δ to steer toward.*drift_alpha=0.*merge less"):
        wrap(load(folder / "1.0", "llama"), drift(folder))
    assert wrap(load(folder / "1.0", "llama"), drift(folder, drift_scale="decoupled", drift_target="base"))
    assert wrap(load(folder / "1.0", "llama"), drift(folder, drift_alpha=0.0))


@pytest.mark.parametrize("part", [{"modules": ("attn",)}, {"skip_first": 1}], ids=str)
def test_where_all_of_delta_was_merged_there_is_no_pull(folder, tmp_path, part):
    """Plain LoRA there, steered elsewhere; and in full fine-tuning likewise."""
    for name in ("base", "expert"):
        (tmp_path / name).symlink_to(folder / name)
    merge(tmp_path, "part", 1.0, **part)
    with pytest.warns(UserWarning, match=r"all of Δ in \d+ of 14 weights, such as .*: these are not steered"):
        model = train(wrap(load(tmp_path / "part", "llama"), drift(folder)))
    merged = model.peft_config["default"].merged
    taken = {s.name for s in steered_of(model)}
    covered = set(ReasoningPrior.load(folder / "prior.safetensors"))
    assert 0 < len(taken) < len(covered) and taken == {name for name in covered if merged.scale_of(name) != 1}
    moved = {name: p for name, p in model.named_parameters() if "lora_B" in name}
    assert len(moved) == 14 and all(p.isfinite().all() and p.any() for p in moved.values())
    with pytest.warns(UserWarning, match="these are not steered"):
        full = guide(load(tmp_path / "part", "llama"), str(folder / "prior.safetensors"))
    assert all(p.isfinite().all() for p in train(full).parameters())


def test_strength_0_needs_no_prior_and_is_plain_lora(folder):
    """Without a prior, and with one: what moves is the same but for the start."""
    settings = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "init_lora_weights": True}
    states = []
    for config in (DriftConfig(drift_alpha=0.0, **settings), drift(folder, drift_alpha=0.0, init_lora_weights=True)):
        torch.manual_seed(0)
        model = train(wrap(load(folder, "llama"), config))
        states.append({name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name})
    assert len(states[0]) == 28 and states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert DriftConfig(drift_alpha=0.0).init_lora_weights is True
    with pytest.raises(ValueError, match="needs a prior to train"):
        DriftConfig(drift_alpha=0.0, drift_alpha_pattern={"q_proj": 1.0})
