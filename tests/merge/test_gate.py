"""Gating a prior: the gradient of the gates against float64, what gates of 0 and 1 are, and what is written."""

import json
import re
import shutil
import warnings
from unittest.mock import Mock

import accelerate
import experts
import keep_sets
import pytest
import torch
from command import run
from dense_prior import dense_prior, stored
from kept_models import assert_close, kl_of_sample, load, processor_of
from peft import get_peft_model
from torch.func import functional_call

from drift_peft import DriftConfig, KeepSet, ReasoningPrior, build_prior, gate_prior, merge_baseline
from drift_peft.keeping import Feed, Vlm, generation
from drift_peft.keeping.answer_set import AnswerSet
from drift_peft.merge.gate import _warn_of_other_expert
from drift_peft.merge.gates import Gate, frozen, gated, train_gates
from drift_peft.prior.combine import formula
from drift_peft.prior.report import prior_summary
from drift_peft.prior.report.page import render_page
from drift_peft.tuner import fitting_modules

FRISM = {"objective": "frism", "expert": None, "texts": None}
FEW = {**experts.SETTINGS, "steps": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = experts.save_folder(tmp_path_factory.mktemp("gates"))
    gate(folder, folder / "gated.safetensors")
    return folder


def gate(folder, output, **changes):
    given = {"expert": folder / "expert", "texts": experts.PROMPTS, "keep_set": folder / "keep.safetensors", **FEW}
    if changes.get("objective") != "frism":
        given["answers"] = folder / "answers.safetensors"
    else:
        given |= {"max_new_tokens": None, "top_k": None}
    given |= {"base": folder / "base", **changes}
    return gate_prior(folder / "prior.safetensors", output=output, **given)


@pytest.fixture
def setup(folder):
    """A model in fp64, its gates as in the middle of training, and feeds of both kinds of answers."""
    model, prior = load(folder).double(), ReasoningPrior.load(folder / "prior.safetensors")
    modules, generator = fitting_modules(model, prior), torch.Generator().manual_seed(0)
    gates = {name: Gate(prior[name], torch.device("cpu"), torch.float64) for name in prior}
    for each in gates.values():
        each.gamma.data = torch.randn(each.gamma.shape, generator=generator).double()
    sets = KeepSet.load(folder / "keep.safetensors"), AnswerSet.load(folder / "answers.safetensors")
    feeds = [Feed(each, processor_of(folder), 3, 0) for each in sets]
    return model, prior, modules, gates, sets, feeds


class Dense:
    """The model with W + U diag(σ(γ)·S) Vh in place of each W, formed whole."""

    def __init__(self, model, prior, modules, gammas):
        names = {id(module): name for name, module in model.named_modules()}
        self.model, self.weights = model, {}
        for name, gamma in gammas.items():
            weight, module = prior[name], modules[name]
            delta = weight.U.double() @ torch.diag(gamma.sigmoid() * weight.S.double()) @ weight.Vh.double()
            self.weights[f"{names[id(module)]}.weight"] = module.weight.detach() + delta

    def __call__(self, **inputs):
        return functional_call(self.model, self.weights, kwargs=inputs)


def mean_kl(model, processor, samples):
    return sum(kl_of_sample(model, processor, s) for s in samples) / sum(len(s.tokens) for s in samples)


@pytest.fixture
def single_text(monkeypatch):
    """The oracle's inputs of a sample without an image."""
    with_image = keep_sets.single_inputs

    def inputs(processor, sample):
        if sample.image is not None:
            return with_image(processor, sample)
        turn = {"role": "user", "content": [{"type": "text", "text": sample.question}]}
        text = processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False)
        return dict(processor.tokenizer(text, return_tensors="pt"))

    monkeypatch.setattr(keep_sets, "single_inputs", inputs)


@pytest.mark.parametrize(("objective", "tokens"), [("expert", 1), ("expert", 10**6), ("frism", 10**6)])
def test_the_gates_gradient_is_its_definition(objective, tokens, setup, folder, single_text):
    """Whole batches and parts of one sample alike, with gradient checkpointing; and nothing is left on the model."""
    model, prior, modules, gates, (kept, said), (keep_feed, text_feed) = setup
    gammas = {name: each.gamma.detach().clone().requires_grad_() for name, each in gates.items()}
    dense, processor = Dense(model, prior, modules, gammas), processor_of(folder)
    loss = 0.3 * mean_kl(dense, processor, [kept[i] for i in keep_feed.indices(0)])
    if objective == "expert":
        loss = loss + mean_kl(dense, processor, [said[i] for i in text_feed.indices(0)])
    else:
        taken = [(gamma.sigmoid() * prior[name].S.double()).square().sum() for name, gamma in gammas.items()]
        loss = loss / 0.3 - 2.0 * sum(taken) / sum(prior[name].S.double().square().sum() for name in gammas)
    expected = torch.autograd.grad(loss, [*gammas.values()])
    before = state(model)
    with frozen(model, checkpointing=True), gated(modules, gates):
        answers, weight = (text_feed, 0.3) if objective == "expert" else (None, 1.0)
        next(train_gates(model, [*gates.values()], keep_feed, answers, weight, 2.0, 1, 0.1, tokens))
    assert_close([each.gamma.grad for each in gates.values()], expected, 1e-5)  # fp32 of the stored probabilities
    assert state(model) == before and model.training is False


def state(model):
    """What gating must not leave on a model."""
    layers = [getattr(m, "gradient_checkpointing", None) for m in model.modules()]
    hooks = [len(m._forward_hooks) for name, m in model.named_modules() if name.endswith("_proj")]
    return [(p.requires_grad, p.grad) for p in model.parameters()], [m.training for m in model.modules()], layers, hooks


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_gates_of_0_and_1(share, setup):
    model, prior, modules, gates, _, (feed, _) = setup
    (part,) = feed.read(0, 10**6)
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in part.inputs.items()}
    for each in gates.values():
        each.gamma.data.fill_(50.0 if share else -50.0)
    with torch.no_grad():
        plain = model(**inputs).logits
        with gated(modules, gates):
            found = model(**inputs).logits
        for name in prior:
            modules[name].weight += share * stored(prior[name])
        expected = model(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert share == 0 or not torch.allclose(found, plain, atol=1e-3)


def test_training_nears_both(setup, folder):
    """From gates that are half open: the expert's answers come nearer, and with a large κ the VLM's."""
    model, _, modules, gates, sets, _ = setup
    feeds = [Feed(each, processor_of(folder), len(each), 0) for each in sets]  # the same batch each time
    found = {}
    for weight in (1e-3, 100.0):
        for each in gates.values():
            each.gamma.data.zero_()
        with frozen(model, False), gated(modules, gates):
            steps = [*train_gates(model, [*gates.values()], *feeds, weight, 0.0, 4, 0.3, 10**6)]
        found[weight] = [*zip(*steps, strict=True)]
    (_, text), (keep, _) = found[1e-3], found[100.0]
    assert text[-1] < 0.99 * text[0] and keep[-1] < 0.9 * keep[0]


# What is written


def test_a_gated_prior_is_the_prior_times_its_gates(folder):
    prior, made = (ReasoningPrior.load(folder / f"{name}.safetensors") for name in ("prior", "gated"))
    assert [*made] == [*prior]
    base = {name: module.weight.detach() for name, module in fitting_modules(load(folder), made).items()}
    for name in prior:
        gates, whole, W = torch.tensor(made.metadata["weights"][name]["gates"]), prior[name], base[name].double()
        assert ((gates > 0) & (gates < 1)).all() and gates.std() > 0
        expected = whole.U.double() @ torch.diag(gates.double() * whole.S.double()) @ whole.Vh.double()
        weight = made[name]
        torch.testing.assert_close(stored(weight), expected, rtol=0, atol=2e-4 * float(whole.S[0]))
        assert (weight.S.diff() <= 0).all() and weight.energy == 1.0
        assert weight.delta_norm == pytest.approx(float(expected.norm()), rel=2e-2)  # of directions in bf16
        cosine = torch.cosine_similarity(W.flatten(), (W + expected).flatten(), dim=0)
        assert weight.cosine == pytest.approx(float(cosine), abs=2e-3)


def test_the_header_says_where_the_gates_came_from(folder):
    prior, made = (ReasoningPrior.load(folder / f"{name}.safetensors") for name in ("prior", "gated"))
    said, kept = AnswerSet.load(folder / "answers.safetensors"), KeepSet.load(folder / "keep.safetensors")
    origin = made.metadata["gated"]
    assert (origin["prior"], origin["keep_set"], origin["answers"]) == (prior.sha256, kept.sha256, said.sha256)
    assert origin["expert"]["id"] == str(folder / "expert") and origin["base"]["id"] == str(folder / "base")
    assert (origin["objective"], origin["keep_weight"], origin["steps"], origin["prompts"]) == ("expert", 0.3, 3, 5)
    assert origin["keep_kl"] > 0 and origin["text_kl"] > 0
    assert formula(made.metadata) == f"gated({formula(prior.metadata)})" and "gate_prior(" in str(made.model_card())
    assert prior_summary(made)["total"]["taken"] < 1 and "taken" not in prior_summary(prior)["total"]


def test_a_gated_prior_is_a_prior(folder, tmp_path):
    """It steers its base and no other, is truncated, combined and exported; and is not taken for the whole one."""
    made = ReasoningPrior.load(folder / "gated.safetensors")
    config = DriftConfig(prior=made.source, r=2, task_type="CAUSAL_LM")
    get_peft_model(load(folder), config)
    other = load(folder)
    for p in other.get_decoder().parameters():
        p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * p.std()
    with pytest.raises(ValueError, match="built for other base weights"):
        get_peft_model(other, config)
    assert made.truncate(2, tmp_path / "small.safetensors").rank == 2
    both = ReasoningPrior.combine({made: 0.5, folder / "prior.safetensors": 1.0}, tmp_path / "both.safetensors")
    assert "gated" in formula(both.metadata)
    name = next(iter(made))
    sums = 0.5 * stored(made[name]) + stored(ReasoningPrior.load(folder / "prior.safetensors")[name])
    torch.testing.assert_close(stored(both[name]), sums, rtol=0, atol=2e-2 * float(sums.abs().max()))
    shutil.copyfile(made.path, tmp_path / "p.safetensors")
    with pytest.raises(FileExistsError, match="exists and was gated"):
        build_prior(folder / "expert", folder / "base", tmp_path / "p.safetensors", rank=4, exist_ok=True)


def test_frisms_objective_has_no_weight_of_its_own(folder, tmp_path, monkeypatch):
    """What is documented is KL − α·‖σ(γ)·S‖²/‖S‖²."""
    given = {}
    monkeypatch.setattr("drift_peft.merge.gate.train_gates", lambda *args: given.update(args=args) or [(0.0, 0.0)])
    gate(folder, tmp_path / "g.safetensors", objective="frism", expert=None, texts=None)
    assert given["args"][3:6] == (None, 1.0, 1.0)  # the expert's answers, κ and α
    gate(folder, tmp_path / "h.safetensors")
    assert given["args"][4] == 0.3


def test_frism_asks_no_expert(folder, tmp_path):
    made = gate(folder, tmp_path / "g.safetensors", objective="frism", expert=None, texts=None, alpha=50.0, steps=8)
    gates = torch.cat([torch.tensor(stats["gates"]) for stats in made.metadata["weights"].values()])
    assert gates.mean() > 0.6 and "expert" not in made.metadata["gated"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["g.safetensors"]


@pytest.mark.filterwarnings("ignore:Switched off bitsandbytes")
def test_four_bit_and_a_model_in_memory(folder, tmp_path):
    """The same gates from a folder and from memory; in NF4 others, of the same base."""
    memory = gate(folder, tmp_path / "m.safetensors", base=load(folder), processor=processor_of(folder))
    whole = ReasoningPrior.load(folder / "gated.safetensors")
    assert all(made["gates"] == stats["gates"] for made, stats in zip(*weights(memory, whole), strict=True))
    four = gate(folder, tmp_path / "4.safetensors", answers=tmp_path / "a.safetensors", load_in_4bit=True, steps=1)
    assert four.metadata["gated"]["load_in_4bit"] and AnswerSet.load(tmp_path / "a.safetensors")
    assert "load_in_4bit=True" in str(four.model_card()) and "load_in_4bit" not in str(memory.model_card())
    assert any(made["gates"] != stats["gates"] for made, stats in zip(*weights(four, whole), strict=True))


def weights(*priors):
    return [prior.metadata["weights"].values() for prior in priors]


# What is refused, before any model is loaded


def test_an_expert_that_is_not_the_priors_is_told(folder, tmp_path):
    """Before it answers. The same folder by another path is the same."""
    other = shutil.copytree(folder / "expert", tmp_path / "other")
    with pytest.warns(UserWarning, match=r"was built from expert, and .* by the answers of other: unless that is the"):
        gate(folder, tmp_path / "g.safetensors", expert=other, answers=tmp_path / "a.safetensors", steps=1)
    adapter = {"id": "lora", "revision": None, "base": {"id": "base", "revision": None}}
    (tmp_path / "by").symlink_to(folder)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*was built from")
        own = {"expert": tmp_path / "by" / "expert", "answers": tmp_path / "b.safetensors"}
        gate(folder, tmp_path / "h.safetensors", **own, steps=1)
        for unknown in (None, adapter):  # of several experts, and of one that cannot answer by itself
            _warn_of_other_expert(Mock(metadata={"expert": unknown}, source="p"), other)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 0}, "steps must be a whole number ≥ 1, got 0"),
        ({"top_k": 0}, "top_k must be a whole number ≥ 1, got 0"),
        ({"max_new_tokens": -1}, "max_new_tokens must be a whole number ≥ 1, got -1"),
        ({"keep_weight": -1}, "keep_weight must be a number > 0, got -1"),
        ({"rate": float("nan")}, "rate must be a number > 0, got nan"),
        ({"max_tokens": 1.5}, "max_tokens must be a whole number, got 1.5"),
        ({"objective": "ours"}, "objective must be 'expert' or 'frism', got 'ours'"),
        ({"texts": None}, "objective 'expert' needs an expert and texts"),
        ({"objective": "frism"}, "objective 'frism' asks no expert"),
        ({"alpha": 1.0}, "objective 'expert' has no alpha"),
        (FRISM | {"keep_weight": 0.3}, "objective 'frism' has no keep_weight"),
        (FRISM | {"answers": "nowhere/a.safetensors"}, "objective 'frism' has no answers"),
        (FRISM | {"max_new_tokens": 8}, "objective 'frism' has no max_new_tokens"),
        (FRISM | {"top_k": 8}, "objective 'frism' has no top_k"),
        ({"keep_set": "gated.safetensors"}, "is a safetensors file but no keep set"),
        ({"keep_set": "none.safetensors"}, "none.safetensors"),
        ({"texts": []}, "there are no prompts"),
        ({"texts": ["1 + <image>"]}, "texts holds the prompt '1 + <image>', in which <image> stands for an image"),
        ({"top_k": 65}, "top_k=65 (--top-k) is larger than the vocabulary"),
        ({"base": "expert"}, "has no processor"),
        ({"prior": "gated.safetensors"}, "is gated already: gate the prior that it was made of"),
        ({"prior": "norms.safetensors"}, "holds norm.weight, and gates weigh attention and MLP projections alone"),
        ({"prior": "other.safetensors"}, "was built for another model: layers.0.mlp.up_proj.weight is"),
        ({"answers": "new.safetensors"}, "answers and output are both new.safetensors: name a file of its own for the"),
        ({"output": "gated.safetensors"}, "exists: name another file, or pass overwrite=True"),
        ({"output": "prior.safetensors", "overwrite": True}, "is prior.safetensors, which it is made of: name another"),
        ({"output": "keep.safetensors", "overwrite": True}, "is keep.safetensors, which it is made of: name another"),
        (FRISM | {"prior": ".", "output": "prior.safetensors", "overwrite": True}, "is prior.safetensors, which it is"),
        ({"texts": "norms.safetensors", "output": "norms.safetensors", "overwrite": True}, "which it is made of: name"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_gated_is_refused_in_one_sentence(changes, said, folder, monkeypatch):
    vectors = {"norm.weight": (torch.ones(8), torch.ones(8))}
    matrices = {"layers.0.mlp.up_proj.weight": (torch.eye(8), torch.eye(8))}
    for name, weights in (("norms", vectors), ("other", matrices)):
        if not (folder / f"{name}.safetensors").exists():
            dense_prior(folder / f"{name}.safetensors", weights)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(generation, "load_model", None)
    before = sorted(file.name for file in folder.iterdir())
    given = {"prior": "prior.safetensors", "base": "base", "expert": "expert", "texts": experts.PROMPTS}
    given |= {"keep_set": "keep.safetensors", "output": "new.safetensors"}
    given |= {} if changes.get("objective") == "frism" else {"answers": "new.answers.safetensors"}
    with pytest.raises((ValueError, OSError), match=re.escape(said)) as caught:
        gate_prior(**given | changes)
    assert "\n" not in str(caught.value) and sorted(file.name for file in folder.iterdir()) == before


@pytest.mark.parametrize("objective", ["expert", "frism"])
def test_a_step_that_is_not_finite_ends_it_in_one_sentence(objective, folder, tmp_path):
    """As in fp16, where activations overflow."""
    model = load(folder)
    hook = model.lm_head.register_forward_hook(lambda module, args, output: output * float("inf"))
    others = FRISM if objective == "frism" else {}
    with pytest.raises(ValueError, match=r"is NaN or infinite in step 1: load the VLM in bfloat16 .* lower rate"):
        gate(folder, tmp_path / "p.safetensors", base=model, processor=processor_of(folder), **others)
    hook.remove()
    assert not any(tmp_path.iterdir())


def test_the_command(folder, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\n".join(experts.PROMPTS), encoding="utf-8")
    given = "--base", folder / "base", "--keep", folder / "keep.safetensors", "-o", tmp_path / "g.safetensors"
    asked = "--expert", folder / "expert", "--texts", tmp_path / "prompts.txt", "--top-k", 5, "--max-new-tokens", 6
    few = "--steps", 3, "--batch-size", 2
    status, out, err = run(capsys, "prior", "gate", folder / "prior.safetensors", *given, *asked, *few)
    assert (
        (status, err) == (0, "") and "taken" in out and "the gates of its directions run from" in " ".join(out.split())
    )
    made, whole = (ReasoningPrior.load(file) for file in (tmp_path / "g.safetensors", folder / "gated.safetensors"))
    assert all(a["gates"] == b["gates"] for a, b in zip(*weights(made, whole), strict=True))
    assert (tmp_path / "g.answers.safetensors").read_bytes() == (folder / "answers.safetensors").read_bytes()
    status, _, err = run(capsys, "prior", "gate", folder / "prior.safetensors", *given, *asked, "--steps", 0)
    assert status == 1 and err == "drift-peft: error: steps must be a whole number ≥ 1, got 0\n"


def test_its_page_shows_what_was_taken(folder):
    summary = prior_summary(ReasoningPrior.load(folder / "gated.safetensors"))
    whole = prior_summary(ReasoningPrior.load(folder / "prior.safetensors"))
    for kind in summary["gates"]:
        gates = [w["gates"] for w in summary["weights"].values() if w["modules"] == kind["modules"]]
        columns = [*zip(*gates, strict=True)]
        assert kind["least"] == [*map(min, columns)] and kind["most"] == [*map(max, columns)]
        assert kind["mean"] == pytest.approx([sum(column) / len(column) for column in columns])
    for row, before in zip(summary["rows"], whole["rows"], strict=True):
        held = before["relative_norm"] ** 2 * before["energy"]
        assert row["taken"] == pytest.approx(row["relative_norm"] ** 2 / held, rel=1e-5)
    page = render_page(summary)
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert data["gates"] == summary["gates"] and "What the gates take" in page
    assert "What the gates take" not in render_page(whole)


def test_a_vlm_with_a_part_of_delta_in_it_is_refused(folder, tmp_path):
    merge_baseline("task_arithmetic", folder / "expert", folder / "base", tmp_path / "b", scale=0.1, progress=False)
    with pytest.raises(ValueError, match=r"the model is .*base \+ 0\.1.*, and gates weigh what is added to a VLM"):
        gate(folder, tmp_path / "g.safetensors", base=tmp_path / "b")
    assert not (tmp_path / "g.safetensors").exists()


def test_a_vlm_with_a_part_outside_the_gpu_is_refused(folder, tmp_path, monkeypatch):
    model = load(folder)
    accelerate.cpu_offload(model.model.language_model.layers[1], execution_device=torch.device("cpu"))
    monkeypatch.setattr(Vlm, "model", model)
    with pytest.raises(ValueError, match=r"^gating needs all weights of .*base in one place, and the GPU has no room"):
        gate(folder, tmp_path / "g.safetensors", **FRISM)
    assert not [*tmp_path.iterdir()]


def test_small_gradients_survive_fp16(folder):
    """A mean over many tokens, each of which has little to say, is below what fp16 holds."""
    prior, vlm = ReasoningPrior.load(folder / "prior.safetensors"), Vlm(folder / "base")
    keep_set, found = KeepSet.load(folder / "keep.safetensors"), []
    for dtype, weight in ((torch.float32, 1.0), (torch.float16, 1e-4)):
        model = vlm.model.to(dtype)
        gates = {name: Gate(prior[name], torch.device("cpu"), dtype) for name in prior}
        with frozen(model, False), gated(fitting_modules(model, prior), gates):
            kept = Feed(keep_set, vlm.processor, 6, 0)
            next(train_gates(model, [*gates.values()], kept, None, weight, 1e-30, 1, 0.1, 10**6))
        found.append(torch.cat([gate.gamma.grad for gate in gates.values()]))
    assert torch.cosine_similarity(*found, 0) > 0.99 and (found[1] != 0).all()
