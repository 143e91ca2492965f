"""A prior on the hub, with its model card, and as a LoRA adapter for stock PEFT."""

import json
import re
import warnings

import pytest
import torch
from dense_prior import dense_prior, stored
from huggingface_hub import ModelCard, snapshot_download
from older import rewrites_targets
from pairs import load
from peft import PeftConfig, PeftModel
from tiny import edit_tensors, save_layout, tiny_expert, tiny_llm, tiny_vlm

from drift_peft import ReasoningPrior, build_prior, merge_adapter
from drift_peft.checkpoints import lora, output
from drift_peft.checkpoints.naming import PROJECTIONS, canonical_name, cross_attention_layers, module_kind

NAMES = ["layers.0.self_attn.q_proj.weight", "layers.0.self_attn.q_proj.bias", "layers.1.mlp.up_proj.weight"]


def random_prior(path, **header):
    generator = torch.Generator().manual_seed(0)
    shapes = [(6, 5), (6,), (8, 5)]
    weights = {n: [torch.randn(s, generator=generator) for _ in range(2)] for n, s in zip(NAMES, shapes, strict=True)}
    return dense_prior(path, weights, rank=2, **header)


# The model card


def model_folder(folder, *lines):
    folder.mkdir()
    if lines:
        (folder / "README.md").write_text("\n".join(["---", *lines, "---", "# A model"]))
    return folder


def test_card_of_a_prior(tmp_path):
    expert = model_folder(tmp_path / "expert", "license: mit")
    prior = random_prior(tmp_path / "p", base=model_folder(tmp_path / "vlm", "license: mit"), expert=expert)
    card = prior.model_card("user/prior")
    assert card.data.license == "mit" and card.data.license_name is None
    assert card.data.tags == ["drift-peft", "peft"] and card.data.base_model is None  # local folders are no hub ids
    assert 'prior="user/prior"' in card.text and 'base="vlm",' in card.text and str(tmp_path) not in str(card)
    assert "- base vlm: mit\n- expert expert: mit" in card.text and prior.sha256 in card.text
    assert "Δ = expert − vlm" in card.text and "rank 2" in card.text and "force" not in card.text
    prior.metadata["force"] = True
    assert "    force=True,\n)" in prior.model_card("user/prior").text
    del prior.metadata["force"]
    assert card.data.pipeline_tag == "image-text-to-text"
    rows = dict(re.findall(r"^\| (\w+) \| (.*) \|$", card.text, re.M))
    q, bias, up = (prior[name] for name in NAMES)
    for kind, weights in {"attn": [q], "bias": [bias], "mlp": [up], "all": [q, bias, up]}.items():
        delta, base = (sum(getattr(w, norm) ** 2 for w in weights) for norm in ("delta_norm", "base_norm"))
        kept = sum(stored(w).square().sum().item() for w in weights)
        count, energy, relative, cosine = rows[kind].split(" | ")
        assert int(count) == len(weights) and float(relative) == pytest.approx((delta / base) ** 0.5, abs=1e-3)
        assert float(energy.rstrip("%")) / 100 == pytest.approx(kept / delta, abs=5e-3)
        assert float(cosine) == pytest.approx(min(w.cosine for w in weights), abs=1e-3)
    python = re.findall(r"```python\n(.*?)```", card.text, re.S)
    assert len(python) == 2
    for code in python:
        compile(code, "card", "exec")
    again = ModelCard(str(card))
    assert again.data.to_dict() == card.data.to_dict()


@pytest.mark.parametrize(
    "base, expert, metadata, lines",
    [
        (["license: mit"], ["license: apache-2.0"], ("other", "mit-and-apache-2.0"), ["mit", "apache-2.0"]),
        (
            ["license: other", "license_name: llama3.2", "license_link: LICENSE"],
            ["license: other", "license_name: Tongyi Qianwen"],
            ("other", "llama3.2-and-tongyi-qianwen"),
            ["llama3.2", "Tongyi Qianwen"],
        ),
        (
            ["license: mit"],
            ["language: en"],
            ("other", "mit-and-unstated"),
            ["mit", "not stated in its card"],
        ),
        ([], ["language: en"], (None, None), ["not stated in its card"] * 2),
        (["license: other", "license_name: a"], ["license: other", "license_name: a"], ("other", "a"), ["a", "a"]),
    ],
)
def test_licences(tmp_path, base, expert, metadata, lines):
    folders = [model_folder(tmp_path / name, *given) for name, given in (("vlm", base), ("expert", expert))]
    card = random_prior(tmp_path / "p", base=folders[0], expert=folders[1]).model_card()
    assert (card.data.license, card.data.license_name) == metadata
    assert re.findall(r"^- (?:base|expert) \S+: (.+)$", card.text, re.M) == lines


def test_card_of_weights_of_no_known_kind(tmp_path):
    W, delta = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
    names = (NAMES[0], "layers.0.mlp.router.weight")
    card = dense_prior(tmp_path / "p", dict.fromkeys(names, (W, delta))).model_card()
    assert re.findall(r"^\| (\w+) \| (\d+) \|", card.text, re.M) == [("attn", "1"), ("other", "1"), ("all", "2")]


def test_card_of_a_combined_and_a_hierarchical_prior(tmp_path):
    folders = {name: str(model_folder(tmp_path / name, f"license: {name}")) for name in ("vlm", "math", "code", "llm")}
    math = random_prior(tmp_path / "m", base=folders["vlm"], expert=folders["math"])
    reference = {"id": folders["llm"], "revision": None}
    code = random_prior(tmp_path / "c", base=folders["vlm"], expert=folders["code"], reference=reference)
    card = code.model_card()
    assert "reference llm: llm" in card.text and "Δ = code − llm" in card.text
    card = ReasoningPrior.combine({math: 0.7, code: -0.3}, tmp_path / "sum").model_card()
    assert card.data.license_name == "vlm-and-math-and-code-and-llm"
    assert "Δ = 0.7·(math − vlm) -0.3·(code − llm)" in card.text
    assert f"0.7),  # sha256 {math.sha256}" in card.text
    assert "the cosine is that of farthest expert and base." in card.text
    assert "the cosine is that of expert and base." in math.model_card().text
    for python in re.findall(r"```python\n(.*?)```", card.text, re.S):
        compile(python.replace("…", "'p'"), "card", "exec")
    lora = {
        "id": str(model_folder(tmp_path / "lora")),
        "revision": None,
        "base": {"id": folders["math"], "revision": None},
    }
    card = random_prior(tmp_path / "a", base=folders["vlm"], expert=lora, energy=0.9, max_rank=8).model_card()
    assert "- expert's base math: math" in card.text
    assert "    energy=0.9,\n    max_rank=8,\n    modules=" in card.text and " rank=" not in card.text


def test_a_folder_is_no_hub_id_wherever_the_prior_is_read(tmp_path, hub, monkeypatch):
    """Built of models/expert and models/vlm, and read where these are not."""
    folders = {role: f"models/{name}" for role, name in (("base", "vlm"), ("expert", "expert"))}
    prior = random_prior(tmp_path / "p", **folders)
    for name in folders.values():
        hub.add(name, {"README.md": b"---\nlicense: mit\n---\n", "config.json": b"{}"})
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match=r"licence of models/\w+ is not known: .* \(the folder is not there\)"):
        card = prior.model_card()
    assert card.data.base_model is None and "models/" not in card.content.replace("/models/", "")
    assert "- base vlm: its card could not be read" in card.text and "Reasoning prior for vlm" in card.text
    with pytest.raises(FileNotFoundError, match=r"built for the folder models/vlm, which is not there; name the place"):
        prior.as_lora(0.5, tmp_path / "lora")
    assert not hub.requests


def test_the_call_that_makes_it_again_dequantizes(tmp_path):
    text = {"id": str(tmp_path), "revision": None, "dequantize": True}
    for expert, four_bit in ((text, True), ({**text, "base": text}, True), (tmp_path, False)):
        prior = random_prior(tmp_path / "p", base=tmp_path, expert=expert)
        assert ("    dequantize=True,\n)" in prior.model_card().text) == four_bit


# The hub


def test_push_and_load(tmp_path, hub):
    commit = hub.add("org/vlm", {"README.md": b"---\nlicense: apache-2.0\n---\n"})
    hub.add("org/vlm", {"README.md": b"---\nlicense: mit\n---\n"})
    expert = {"id": "org/expert", "revision": hub.add("org/expert", {"config.json": b"{}"})}
    prior = random_prior(tmp_path / "p", base={"id": "org/vlm", "revision": commit}, expert=expert)
    url = prior.push_to_hub("user/prior", commit_message="First", token="hf_x")
    files = hub.files("user/prior")
    assert files["prior.safetensors"] == prior.path.read_bytes() and url.startswith(f"{hub.url}/user/prior/commit/")
    card = ModelCard(files["README.md"].decode())
    assert card.data.base_model == ["org/vlm", "org/expert"]
    assert "- base org/vlm: apache-2.0\n- expert org/expert: not stated in its card" in card.text
    assert 'ReasoningPrior.load("user/prior")' in card.text

    low = prior.truncate(1, tmp_path / "low")
    low.push_to_hub("user/prior", revision="rank1")
    card = hub.files("user/prior", "rank1")["README.md"].decode()
    assert all(f'{call}"user/prior@rank1"' in card for call in ("ReasoningPrior.load(", "DriftConfig(prior="))
    assert "drift-peft prior export user/prior@rank1 --scale" in card
    hub.forget()
    assert ReasoningPrior.load("user/prior").sha256 == prior.sha256
    assert ReasoningPrior.load("user/prior", revision="rank1").rank == 1
    assert ReasoningPrior.load("user/prior@rank1").sha256 == low.sha256
    assert hub.fetched("user/prior") == ["prior.safetensors"] * 2  # and nothing else


def test_without_network_the_card_does_not_wait_for_the_licences(tmp_path, hub, monkeypatch):
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    origins = {name: {"id": f"org/{name}", "revision": "0a1b"} for name in ("base", "expert")}
    prior = random_prior(tmp_path / "p", **origins)
    hub.stop()
    with pytest.warns(UserWarning, match=r"licence of org/base is not known: its card cannot be read \(.*refused"):
        card = prior.model_card()
    assert "- expert org/expert: its card could not be read" in card.text and not waits


def test_the_hub_says_no(tmp_path, hub, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client tries again, later and later
    base = {"id": "org/vlm", "revision": hub.add("org/vlm", {"README.md": b"# A model"})}
    prior = random_prior(tmp_path / "p", base=base, expert={"id": "org/expert", "revision": "0a1b"})
    hub.fail("org/expert", status=403, code="GatedRepo")
    with pytest.warns(UserWarning, match=r"licence of org/expert is not known: its card cannot be read \(.*"):
        card = prior.model_card()
    assert "- expert org/expert: its card could not be read" in card.text
    hub.fail("api/repos/create", status=401)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(OSError, match=r"p could not be uploaded to user/prior: .*401"):
            prior.push_to_hub("user/prior")
        with pytest.raises(ValueError, match="no name at all is no hub id: name it as user/repository"):
            prior.push_to_hub("no name at all")
        hub.stop()
        with pytest.raises(OSError, match=r"p could not be uploaded to user/prior: "):
            prior.push_to_hub("user/prior")
    for source in ("user/none", "user/none@v1"):
        with pytest.raises(OSError, match=r"user/none.*") as caught:
            ReasoningPrior.load(source)
        assert "\n" not in str(caught.value)


# The prior as a LoRA adapter


def family_prior(folder, family, ranks=(4,), extras=False):
    """Write a tiny `base`, and a prior of it whose projections have the given ranks in turn."""
    model = tiny_llm("llava") if family == "llama" else tiny_vlm(family)
    save_layout(model, folder / "base")
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for key, W in model.named_parameters():
        name = canonical_name(key, cross_attention_layers(model.config)) or ""
        if module_kind(name) in PROJECTIONS or (extras and name.endswith(("norm.weight", "bias"))):
            weights[name] = W, 0.05 * torch.randn(W.shape, generator=generator)
    rank = {name: ranks[index % len(ranks)] for index, name in enumerate(weights)}
    return dense_prior(folder / "p", weights, rank, base=folder / "base")


@pytest.mark.parametrize("scale", [0.1, -1.5])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "mllama", "llava_next", "idefics2", "llama"])
def test_stock_peft_adds_scale_times_delta(tmp_path, family, scale):
    prior = family_prior(tmp_path, family)
    assert prior.as_lora(scale, tmp_path / "lora") == tmp_path / "lora"
    base = load(tmp_path, family)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        model = PeftModel.from_pretrained(base, tmp_path / "lora")
    config = model.peft_config["default"]
    assert type(config).__name__ == "LoraConfig" and config.base_model_name_or_path == str(tmp_path / "base")
    assert {layer.scaling["default"] for layer in model.modules() if hasattr(layer, "lora_A")} == {1.0}
    after = model.merge_and_unload().state_dict()
    cross, added = cross_attention_layers(base.config), set()
    for key, tensor in before.items():
        name = canonical_name(key, cross)
        if name in prior:
            added.add(name)
            tensor = tensor.double() + scale * stored(prior[name])
        torch.testing.assert_close(after[key].double(), tensor.double(), rtol=0, atol=1e-6)
    assert added == set(prior)


def test_merge_adapter_takes_it(tmp_path):
    prior = family_prior(tmp_path, "mllama", ranks=[3, 3, 1, 5])
    prior.as_lora(0.5, tmp_path / "lora")
    report = merge_adapter(tmp_path / "base", tmp_path / "lora", tmp_path / "merged", verify=True, progress=False)
    assert report.modules == 14 and report.logits_error < 1e-4
    assert report.trained_on == "full precision" and report.verification.verdict.startswith("Serve this folder: ")


def test_ranks_that_differ(tmp_path):
    prior = family_prior(tmp_path, "qwen2_5_vl", ranks=[3, 3, 1, 5])
    prior.as_lora(1, tmp_path / "lora")
    config = PeftConfig.from_pretrained(tmp_path / "lora")
    assert config.r == 3 and set(config.rank_pattern.values()) == {1, 5} and config.rank_pattern == config.alpha_pattern
    model = PeftModel.from_pretrained(load(tmp_path, "qwen2_5_vl"), tmp_path / "lora")
    ranks = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            name = canonical_name(f"{name}.weight")
            ranks[name] = layer.r["default"]
            torch.testing.assert_close(
                layer.get_delta_weight("default").double(), stored(prior[name]), rtol=0, atol=1e-6
            )
    assert ranks == {name: len(weight.S) for name, weight in prior.items()}


def test_what_a_lora_adapter_cannot_hold(tmp_path):
    prior = family_prior(tmp_path, "qwen2_5_vl", extras=True)
    assert len(prior) == 14 + 5 + 6
    with pytest.warns(
        UserWarning, match=r"11 of the prior's 25 weights are norms, biases, head or embedding: .* leaves"
    ):
        prior.as_lora(1, tmp_path / "lora")
    with pytest.warns(UserWarning, match="11 of the prior's 25"):
        assert prior.as_lora(1, tmp_path / "lora", overwrite=True) == tmp_path / "lora"
    vectors = dense_prior(tmp_path / "v", {"norm.weight": (torch.ones(64), torch.ones(64))}, base=tmp_path / "base")
    with pytest.raises(
        ValueError, match="v holds no attention or MLP projection, so there is nothing for a LoRA adapter"
    ):
        vectors.as_lora(1, tmp_path / "none")


@rewrites_targets
def test_what_peft_cannot_adapt_is_left_out(tmp_path):
    """Of mixtures whose first layers are dense, PEFT takes the projections there for experts."""
    base = tiny_vlm("glm4v_moe")
    expert, delta = tiny_expert("glm4v_moe", base)
    save_layout(base, tmp_path / "base")
    save_layout(expert, tmp_path / "expert")
    prior = build_prior(tmp_path / "expert", tmp_path / "base", tmp_path / "p", rank=64, progress=False)
    assert any(".mlp." in name for name in prior)
    with pytest.warns(UserWarning, match=r"\d+ projections, such as .*mlp.* cannot be adapted: PEFT") as told:
        prior.as_lora(1, tmp_path / "lora")
    assert not any("norms, biases, head or embedding" in str(w.message) for w in told)
    model = PeftModel.from_pretrained(base, tmp_path / "lora")
    adapted = {canonical_name(f"{n}.weight"): m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert adapted.keys() == {name for name in prior if ".self_attn." in name}
    for name, layer in adapted.items():
        torch.testing.assert_close(layer.get_delta_weight("default"), delta[name], rtol=0.02, atol=1e-3)


def test_a_base_on_the_hub_is_not_downloaded(tmp_path, hub):
    prior = family_prior(tmp_path, "qwen2_5_vl")
    prior.metadata["base"] = {"id": "org/vlm", "revision": hub.add("org/vlm", tmp_path / "base")}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*was not compared")
        prior.as_lora(1, tmp_path / "lora")
    config = PeftConfig.from_pretrained(tmp_path / "lora")
    assert (config.base_model_name_or_path, config.revision) == ("org/vlm", prior.metadata["base"]["revision"])
    assert not [name for name in hub.fetched("org/vlm") if name.endswith(".safetensors")]


def test_a_base_is_named_with_its_revision(tmp_path, hub):
    prior = family_prior(tmp_path, "qwen2_5_vl")
    commit = hub.add("org/vlm", tmp_path / "base", "v1")
    with pytest.warns(UserWarning, match=r"built for base\. Whether org/vlm@\S+ has the same weights was not compared"):
        prior.as_lora(1, tmp_path / "lora", base="org/vlm@v1")
    config = PeftConfig.from_pretrained(tmp_path / "lora")
    assert (config.base_model_name_or_path, config.revision) == ("org/vlm", commit)


def test_another_commit_of_the_base_is_compared_where_it_is_here(tmp_path, hub):
    prior = family_prior(tmp_path, "qwen2_5_vl")
    prior.metadata["base"] = {"id": "org/vlm", "revision": (first := hub.add("org/vlm", tmp_path / "base"))}
    save_layout(tiny_vlm("qwen2_5_vl", seed=1), tmp_path / "newer")
    commit = hub.add("org/vlm", tmp_path / "newer")
    with pytest.warns(UserWarning, match=rf"built for org/vlm@{first}\. Whether org/vlm@{commit} has .* not compared"):
        prior.as_lora(1, tmp_path / "lora", base="org/vlm")
    snapshot_download("org/vlm")
    with pytest.raises(ValueError, match=r"another model than org/vlm: its fingerprint is off by \d+%"):
        prior.as_lora(1, tmp_path / "other", base="org/vlm")
    snapshot_download("org/vlm", revision=first)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*was not compared")
        prior.as_lora(1, tmp_path / "own", base=f"org/vlm@{first}")


def test_a_base_that_is_nearly_the_priors_is_a_warning(tmp_path):
    prior = family_prior(tmp_path, "qwen2_5_vl")
    noise = torch.Generator().manual_seed(1)
    edit_tensors(
        tmp_path / "base",
        lambda t: [W.add_(0.1 * W.std() * torch.randn(W.shape, generator=noise)) for W in t.values() if W.dim() == 2],
    )
    with pytest.warns(UserWarning, match=r"built for base, and the weights of base are nearly but not quite the same"):
        prior.as_lora(1, tmp_path / "lora")


def test_a_base_that_has_moved_or_is_another(tmp_path):
    prior = family_prior(tmp_path, "qwen2_5_vl")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=r"base.*; name the place of the prior's base with base= \(--base\)"):
        prior.as_lora(1, tmp_path / "lora")
    prior.as_lora(1, tmp_path / "lora", base=tmp_path / "moved")
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["base_model_name_or_path"].endswith(
        "moved"
    )
    for changes, message in (
        (
            {"num_hidden_layers": 1},
            r"another model than .*other: layers.1.\S+ is \[\d+, \d+\] in the prior and not there",
        ),
        ({"intermediate_size": 64}, r"mlp.\S+ is \[64, 128\] in the prior and \[64, 64\] in the model"),
    ):
        save_layout(tiny_llm("llava", **changes), tmp_path / "other")
        with pytest.raises(ValueError, match=message):
            prior.as_lora(1, tmp_path / "wrong", base=tmp_path / "other")
    save_layout(tiny_vlm("qwen2_5_vl", seed=1), tmp_path / "alike")  # of the same shapes
    with pytest.raises(ValueError, match=r"another model than .*alike: its fingerprint is off by \d+%; name the"):
        prior.as_lora(1, tmp_path / "wrong", base=tmp_path / "alike")
    (tmp_path / "alike").rename(tmp_path / "base")  # where the prior's own base was
    with pytest.raises(ValueError, match=r"another model than .*base: its fingerprint is off by \d+%; name the"):
        prior.as_lora(1, tmp_path / "wrong")
    assert {path.name for path in tmp_path.iterdir()} == {"p", "moved", "lora", "other", "base"}


@pytest.mark.parametrize("scale", [0, float("nan"), float("inf"), True, "1", 1e39, 10**400])
def test_scales_that_are_none(tmp_path, scale):
    prior = random_prior(tmp_path / "p")
    with pytest.raises(ValueError, match=r"scale must be a (finite number other than 0|number), got"):
        prior.as_lora(scale, tmp_path / "lora")


def test_nothing_but_an_adapter_is_overwritten(tmp_path):
    prior = family_prior(tmp_path, "llama")
    prior.as_lora(1, tmp_path / "lora")
    (tmp_path / "lora" / "old").touch()
    with pytest.raises(
        FileExistsError, match=r"lora exists: name another folder, or pass overwrite=True \(--overwrite\)"
    ):
        prior.as_lora(1, tmp_path / "lora")
    prior.as_lora(2, tmp_path / "lora", overwrite=True)
    assert not (tmp_path / "lora" / "old").exists()
    with pytest.raises(FileExistsError, match="base exists and is no adapter folder, so it is not overwritten"):
        prior.as_lora(1, tmp_path / "base", overwrite=True)
    (tmp_path / "lora" / "q").write_bytes((tmp_path / "p").read_bytes())
    with pytest.raises(FileExistsError, match=r"holds .*q, which"):
        ReasoningPrior.load(tmp_path / "lora" / "q").as_lora(1, tmp_path / "lora", overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"p", "base", "lora"}


# What others put in


def test_a_card_holds_no_markup_of_others(tmp_path):
    hostile = "x\n```\n[click](https://evil.example) ![](http://evil.example/x.png) <img src=x> www.evil.example | y"
    base = {"id": hostile.replace("/", ":"), "revision": hostile}  # of a path, the card would have the last part alone
    expert = model_folder(tmp_path / "expert", f"license: {json.dumps(hostile)}")
    prior = random_prior(tmp_path / "p", base=base, expert=expert)
    card = prior.model_card("user/prior")
    assert not [line for line in card.text.splitlines() if line.startswith("```") and line not in ("```", "```python")]
    outside = re.sub(r"^```.*?^```$", "", card.text, flags=re.M | re.S)
    assert "evil" in outside and "evil" not in re.sub(r"`[^`\n]+`", "", outside)
    assert outside.count("evil") == 3 * outside.count("click")  # all of them in one line each


def test_export_writes_each_weight_at_once(tmp_path, monkeypatch):
    """Not all factors in fp32 at the end: what is joined is mapped from files."""
    vlm = tiny_vlm("qwen2_5_vl")
    save_layout(vlm, tmp_path / "base")
    save_layout(tiny_expert("qwen2_5_vl", vlm)[0], tmp_path / "expert")
    prior = build_prior(tmp_path / "expert", tmp_path / "base", tmp_path / "p", rank=2, progress=False)
    written = []

    def write(file, tensors, metadata=None, real=output.write_tensors):
        written.append(len(tensors))
        real(file, tensors, metadata)

    monkeypatch.setattr(output, "write_tensors", write)
    monkeypatch.setattr(lora, "write_tensors", write)
    adapter = prior.as_lora(1.0, tmp_path / "adapter")
    assert written == [2] * 14 + [28]
    assert {file.name for file in adapter.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert len([*adapter.glob("*.safetensors")]) == 1
