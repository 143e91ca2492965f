"""What PEFT promises for LoRA holds for a steered adapter: one table of cases, and PEFT's common tests over it."""

import copy
import dataclasses
import io
import json
import warnings
from functools import cache, cached_property

import pytest
import torch
import transformers
from dense_prior import dense_prior
from hub import Hub
from older import (
    FORGETS_CONFIG,
    deletes_saved_modules,
    known,
    tells_adapters_apart,
    trains_what_was_swapped,
    transformers_adds_it,
    transformers_takes_it,
    weighs_alone,
    weighs_by_svd,
)
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from safetensors.torch import load_file
from tiny import save_layout, tiny_llm, tiny_vlm
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from twin import assert_same_update, state, trainable

from drift_peft import DriftConfig, telemetry
from drift_peft.checkpoints.naming import canonical_name, module_kind
from drift_peft.tuner.steered import STEERED

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated"),
    pytest.mark.filterwarnings("ignore:.*targeted modules have no Δ"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
]

CASES = {  # -> family, settings beside SETTINGS
    "plain": ("llama", {}),
    "patterns": (
        "llama",
        {
            "rank_pattern": {"q_proj": 2, "up_proj": 6},
            "alpha_pattern": {"layers.1.mlp.down_proj": 1},
            "use_rslora": True,
        },
    ),
    "one layer": ("llama", {"layers_to_transform": [1]}),
    "weight norm": ("llama", {"drift_norm": "weight", "drift_modules": "attn"}),
    "head and norm": ("llama", {"modules_to_save": ["lm_head", "norm"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "tokens": ("llama", {"trainable_token_indices": [8, 12]}),
    "decoupled": ("qwen2_5_vl", {"drift_scale": "decoupled", "drift_target": "factors"}),
    "base": ("llava", {"drift_scale": "decoupled", "drift_target": "base", "prior": None}),
    "all linear": ("llava", {"target_modules": "all-linear"}),
    "biases": ("qwen2_5_vl", {"bias": "lora_only"}),
    "another start": ("llava", {"init_lora_weights": "gaussian", "lora_dropout": 0.1}),
}
SETTINGS = {"r": 4, "lora_alpha": 6}
every_case = pytest.mark.parametrize("case", [known(case, settings) for case, (_, settings) in CASES.items()])
some_cases = pytest.mark.parametrize("case", ["plain", "decoupled", "another start"])  # of each family one


def cases_but(*names):
    """Without those that PEFT itself does not do this for."""
    return pytest.mark.parametrize("case", [case for case in CASES if case not in names])


several_adapters = cases_but("biases")
generator = torch.Generator().manual_seed(0)
TEXT = torch.arange(7, 17)[None]
INPUTS = {  # with an image, where the model sees
    "llama": {"input_ids": TEXT},
    "llava": {
        "input_ids": torch.cat([torch.full((1, 16), 3), TEXT], 1),
        "pixel_values": torch.randn(1, 3, 16, 16, generator=generator),
    },
    "qwen2_5_vl": {
        "input_ids": torch.cat([torch.tensor([[5, 3, 3, 3, 3, 6]]), TEXT], 1),
        "pixel_values": torch.randn(16, 96, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": torch.tensor([[0, 1, 1, 1, 1, 0] + [0] * 10]),
    },
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """family -> folder with `base` and a prior of all its language model's tensors; made once."""

    @cache
    def make(family):
        folder = tmp_path_factory.mktemp(family)
        base = tiny_llm("llava") if family == "llama" else tiny_vlm(family)
        weights = {canonical_name(key) or "": W for key, W in base.named_parameters()}
        noise = torch.Generator().manual_seed(1)
        weights = {n: (W, 0.1 * torch.randn(W.shape, generator=noise)) for n, W in weights.items() if module_kind(n)}
        dense_prior(folder / "prior.safetensors", weights)
        save_layout(base, folder / "base")
        return folder

    return make


@pytest.fixture(scope="module")
def table(folders):
    return cache(lambda case: Case(case, folders(CASES[case][0])))


@pytest.fixture
def at(case, table):
    return table(case)


class Case:
    """A row of the table, with what its tests do over and over."""

    def __init__(self, name, folder):
        self.family, self.settings = CASES[name]
        self.folder, self.inputs = folder, INPUTS[self.family]

    @cached_property
    def _base(self):
        auto = AutoModelForCausalLM if self.family == "llama" else AutoModelForImageTextToText
        return auto.from_pretrained(self.folder / "base", dtype=torch.float32)

    @cached_property
    def _trained(self):
        return self.train(self.model())

    def base(self):
        return copy.deepcopy(self._base)

    def trained(self):
        """After two steps; copied, which is quicker than to train again."""
        return copy.deepcopy(self._trained)

    def config(self, **changes):
        return DriftConfig(**{"prior": self.folder / "prior.safetensors", **SETTINGS, **self.settings, **changes})

    def model(self, **changes):
        return get_peft_model(self.base(), self.config(**changes))

    def train(self, model, steps=2, seed=0):
        torch.manual_seed(seed)
        optimizer = torch.optim.SGD(trainable(model.train()), lr=0.5)
        labels = self.inputs["input_ids"].roll(seed)
        for _ in range(steps):
            optimizer.zero_grad()
            model(**self.inputs, labels=labels).loss.backward()
            optimizer.step()
        return model

    @torch.no_grad()
    def logits(self, model):
        return model.eval()(**self.inputs).logits

    def same(self, one, other):
        return torch.equal(self.logits(one), self.logits(other))

    def stock(self, folder, **options):
        """The adapter as stock PEFT loads it; nothing may be missing or unknown."""
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys|Unexpected keyword")
            model = PeftModel.from_pretrained(self.base(), folder, **options)
        assert {type(config) for config in model.peft_config.values()} == {LoraConfig}
        return model

    def resumed(self, folder, **options):
        config = DriftConfig.from_pretrained(folder)
        return PeftModel.from_pretrained(self.base(), folder, config=config, is_trainable=True, **options)


def files(folder):
    return {file.name for file in folder.iterdir() if file.is_file()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def steering(model):
    return [s for m in model.modules() for s in vars(m).get("drift", {}).values()]


def lora_layers(model):
    return [m for m in model.modules() if isinstance(m, LoraLayer)]


# Saved and loaded


@every_case
def test_stock_peft_loads_what_is_saved(at, tmp_path):
    model = at.trained()
    assert telemetry(model)["guided_steps"] == 2 and not at.same(model, at.base())
    model.save_pretrained(tmp_path / "ours")
    assert files(tmp_path / "ours") == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "drift_config.json",
    }
    told = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert not {field.name for field in dataclasses.fields(DriftConfig)} & set(told) - set(LoraConfig().to_dict())

    loaded = at.stock(tmp_path / "ours")
    assert at.same(loaded, model)
    assert equal(get_peft_model_state_dict(loaded), get_peft_model_state_dict(model))
    loaded.save_pretrained(tmp_path / "stock")
    assert "drift_config.json" not in files(tmp_path / "stock")
    weights = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "stock")]
    assert equal(*weights)


@some_cases
def test_adapter_model_bin(at, tmp_path):
    model = at.trained()
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert "adapter_model.bin" in files(tmp_path) and at.same(at.stock(tmp_path), model)


@tells_adapters_apart
@several_adapters
def test_selected_adapters(at, tmp_path):
    """Though the names of some hold the names of others."""
    model = at.trained()
    for name in ("default2", "efault"):
        model.add_adapter(name, at.config())
    model.set_adapter("default2")
    at.train(model, seed=1)
    second = at.logits(model)
    model.save_pretrained(tmp_path / "one", selected_adapters=["default"])
    assert [path.name for path in (tmp_path / "one").iterdir() if path.is_dir()] == []
    keys = load_file(tmp_path / "one" / "adapter_model.safetensors").keys()
    model.save_pretrained(tmp_path / "all")
    assert {path.name for path in (tmp_path / "all").iterdir() if path.is_dir()} == {"default2", "efault"}
    for folder in (tmp_path / "all", tmp_path / "all" / "default2", tmp_path / "all" / "efault"):
        assert load_file(folder / "adapter_model.safetensors").keys() == keys
        assert DriftConfig.from_pretrained(folder).drift_steps == {"all": 2, "default2": 2, "efault": 0}[folder.name]

    model.set_adapter("default")
    loaded = at.stock(tmp_path / "all")
    assert at.same(loaded, model)
    assert not loaded.load_adapter(tmp_path / "all" / "default2", "two").missing_keys
    loaded.set_adapter("two")
    assert torch.equal(at.logits(loaded), second)


@every_case
def test_state_dicts(at):
    model, other = at.trained(), at.model()
    result = set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert result.unexpected_keys == [] and at.same(other, model)


@every_case
def test_low_cpu_mem_usage(at, tmp_path):
    """Adapters made on the meta device, and filled from the file; for inference, and to train on."""
    model = at.trained()
    model.save_pretrained(tmp_path)
    loaded = at.stock(tmp_path, low_cpu_mem_usage=True)
    if "bias" not in at.settings:
        loaded.load_adapter(tmp_path, "other", low_cpu_mem_usage=True)
    resumed = at.resumed(tmp_path, low_cpu_mem_usage=True)
    for m in (loaded, resumed):
        assert {p.device.type for p in m.parameters()} == {"cpu"} and at.same(m, model)
    start = state(model)
    assert_same_update(at.train(resumed), at.train(model), start)


@every_case
def test_training_goes_on(at, tmp_path):
    model = at.trained()
    model.save_pretrained(tmp_path)
    resumed = at.resumed(tmp_path)
    assert at.same(resumed, model)
    start = state(model)
    assert_same_update(at.train(resumed), at.train(model), start)
    assert telemetry(resumed) == pytest.approx(telemetry(model)) and telemetry(resumed)["guided_steps"] == 4


# Merged, disabled, unloaded


@every_case
def test_merging(at):
    model = at.trained()
    merged, before = copy.deepcopy(model), at.logits(model)
    model.merge_adapter()
    assert all(layer.merged for layer in lora_layers(model))
    torch.testing.assert_close(at.logits(model), before, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(at.logits(model), before, rtol=1e-4, atol=1e-5)
    assert telemetry(at.train(model))["guided_steps"] == 4

    merged = merged.merge_and_unload(safe_merge=True)
    assert not any(isinstance(m, BaseTunerLayer) for m in merged.modules())
    assert hasattr(merged, "peft_config") != FORGETS_CONFIG
    assert {n: p.shape for n, p in merged.state_dict().items()} == {
        n: p.shape for n, p in at.base().state_dict().items()
    }
    torch.testing.assert_close(at.logits(merged), before, rtol=1e-4, atol=1e-5)
    assert not at.same(merged, at.base())


@pytest.mark.parametrize("case", ["plain", "embedding", "all linear"])
def test_an_adapter_with_nan_is_not_merged(at):
    model = at.trained()
    weights = {n: p.clone() for n, p in model.named_parameters() if "proj.base_layer" in n}
    for name, p in model.named_parameters():
        if "lora_B" in name or "lora_embedding_B" in name:
            p.data.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter default"):
        model.merge_adapter(safe_merge=True)
    assert weights and equal({n: p for n, p in model.named_parameters() if n in weights}, weights)


@cases_but("biases")
def test_disabling(at):
    base, model = at.base(), at.trained()
    before = at.logits(model)
    with model.disable_adapter():
        assert torch.equal(at.logits(model), at.logits(base))
    assert torch.equal(at.logits(model), before) and not torch.equal(before, at.logits(base))
    assert telemetry(at.train(model))["guided_steps"] == 4


@every_case
def test_unloading(at):
    """The base comes back bitwise, but for what PEFT leaves in the model: trained biases and modules to save."""
    base, model = at.base(), at.trained()
    steered = steering(model)
    unloaded = model.unload()
    assert not any(isinstance(m, BaseTunerLayer) for m in unloaded.modules())
    assert steered and not any(s in STEERED for s in steered)
    expected, found = base.state_dict(), unloaded.state_dict()
    assert expected.keys() == found.keys()
    moved = {name for name in expected if not torch.equal(expected[name], found[name])}
    left = ("norm.weight", "lm_head.weight") if "modules_to_save" in at.settings else ("bias",)
    assert all(name.endswith(left) for name in moved)
    assert bool(moved) == (not {"bias", "modules_to_save"}.isdisjoint(at.settings))


# Several adapters


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=deletes_saved_modules if c == "head and norm" else ()) for c in CASES if c != "biases"],
)
def test_adapters_come_and_go(at):
    base, model = at.base(), at.trained()
    first, steered = at.logits(model), steering(model)
    model.add_adapter("other", at.config())
    assert torch.equal(at.logits(model), first)
    both = [s.adapter for s in steering(model)]
    assert both.count("default") == both.count("other") == len(steered)
    model.set_adapter("other")
    other = at.logits(at.train(model, 3, seed=1))
    assert not torch.equal(other, first)
    model.set_adapter("default")
    assert torch.equal(at.logits(model), first)
    assert [config.drift_steps for config in model.peft_config.values()] == [2, 3]

    model.delete_adapter("default")  # the active one
    assert model.active_adapters == ["other"] and torch.equal(at.logits(model), other)
    assert {s.adapter for s in steering(model)} == {"other"} and not any(s in STEERED for s in steered)
    assert telemetry(at.train(model, 1))["guided_steps"] == 4
    model.delete_adapter("other")
    assert model.active_adapters == [] and not steering(model)
    assert torch.equal(at.logits(model.base_model), at.logits(base))


@pytest.mark.parametrize("kind", ["linear", "cat", pytest.param("svd", marks=weighs_by_svd), "dare_ties"])
@pytest.mark.parametrize("case", ["plain", "decoupled"])
def test_a_weighted_adapter_is_plain_lora(at, tmp_path, kind):
    model = at.trained()
    model.add_adapter("other", at.config())
    model.set_adapter("other")
    at.train(model, seed=1)
    density = {} if kind in ("linear", "cat", "svd") else {"density": 0.5}
    model.add_weighted_adapter(["default", "other"], [0.75, -0.5], "mixed", combination_type=kind, **density)
    assert [type(config) for config in model.peft_config.values()] == [DriftConfig, DriftConfig, LoraConfig]
    assert not any(s.adapter == "mixed" for s in steering(model))
    if kind == "cat":
        for layer in lora_layers(model):
            expected = 0.75 * layer.get_delta_weight("default") - 0.5 * layer.get_delta_weight("other")
            torch.testing.assert_close(layer.get_delta_weight("mixed"), expected)
    model.set_adapter("mixed")
    mixed = at.logits(model)
    model.save_pretrained(tmp_path, selected_adapters=["mixed"])
    assert files(tmp_path / "mixed") == {"adapter_config.json", "adapter_model.safetensors"}
    torch.testing.assert_close(at.logits(at.stock(tmp_path / "mixed")), mixed)
    model.set_adapter("default")
    assert telemetry(at.train(model, 1))["guided_steps"] == 3


@weighs_alone
@cases_but("biases", "patterns")  # of rank-stabilized scalings PEFT takes no account
def test_one_weighted_adapter(at):
    model = at.trained()
    model.add_weighted_adapter(["default"], [-0.5], "scaled")
    for layer in lora_layers(model):
        torch.testing.assert_close(layer.get_delta_weight("scaled"), -0.5 * layer.get_delta_weight("default"))


# Hot-swapping: PEFT swaps the factors alone


@pytest.mark.parametrize(
    ("rank", "prepared"), [pytest.param(4, False, marks=trains_what_was_swapped), (2, False), (8, False), (8, True)]
)
@pytest.mark.parametrize("case", ["plain", "decoupled"])
def test_hot_swapping(at, tmp_path, rank, prepared):
    """Into a model that stock PEFT loaded, and into one that is steered; factors of another rank are padded."""
    at.trained().save_pretrained(tmp_path / "first")
    second = at.train(at.model(r=rank, lora_alpha=9), seed=1)
    second.save_pretrained(tmp_path / "second")
    for model in (at.stock(tmp_path / "first"), at.trained()):
        if prepared:
            prepare_model_for_compiled_hotswap(model, target_rank=8)
        hotswap_adapter(model, tmp_path / "second", "default", torch_device="cpu")
        torch.testing.assert_close(at.logits(model), at.logits(second), rtol=1e-4, atol=1e-5)
    if rank == 4 and not prepared:
        assert telemetry(at.train(model))["guided_steps"] == 4


# Other ways in


@some_cases
def test_auto_classes(at, tmp_path):
    model = at.trained()
    model.save_pretrained(tmp_path)
    loaded = AutoPeftModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(loaded.get_base_model()) is type(model.get_base_model()) and at.same(loaded, model)
    if at.family == "llama":
        model = at.train(at.model(task_type="CAUSAL_LM"))
        model.save_pretrained(tmp_path / "causal")
        assert at.same(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "causal", dtype=torch.float32), model)


@transformers_takes_it
@every_case
def test_transformers_loads_it(at, tmp_path):
    model = at.trained()
    model.save_pretrained(tmp_path)
    loaded = at.base()
    loaded.load_adapter(tmp_path)
    assert type(loaded.peft_config["default"]) is LoraConfig
    assert at.same(loaded, model)


@transformers_adds_it
@every_case
def test_transformers_adds_and_saves_it(at, tmp_path):
    model = at.base()
    model.add_adapter(at.config(), "default")
    at.train(model)
    assert telemetry(model)["guided_steps"] == 2
    model.save_pretrained(tmp_path)
    assert {"adapter_config.json", "adapter_model.safetensors", "drift_config.json"} <= files(tmp_path)
    assert at.same(at.stock(tmp_path), model)
    assert telemetry(at.train(at.resumed(tmp_path), 1))["guided_steps"] == 3


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


# A Llava that has run holds hooks of transformers that cannot be pickled.
COPIES = [(copy.deepcopy, case) for case in CASES] + [(pickled, case) for case in CASES if CASES[case][0] != "llava"]


@pytest.mark.parametrize(("case", "how"), [known(case, CASES[case][1], how) for how, case in COPIES])
def test_copies(at, how):
    model = at.trained()
    clone, start = how(model), state(model)
    assert at.same(clone, model)
    assert_same_update(at.train(clone), at.train(model), start)
    assert telemetry(clone) == pytest.approx(telemetry(model))


@some_cases
def test_the_hub(at, tmp_path, monkeypatch):
    """push_to_hub uploads the adapter with both its configurations and the filled-in card, and it loads from there."""
    model = at.trained()
    monkeypatch.setattr(
        transformers.utils.hub, "_hf_api", None, raising=False
    )  # it would keep the address of an earlier hub
    with Hub() as hub:
        hub.use(monkeypatch, tmp_path)
        model.push_to_hub("user/adapter", token="hf_x")
        uploaded = hub.files("user/adapter")
        names = {"README.md", "adapter_config.json", "adapter_model.safetensors", "drift_config.json"}
        assert uploaded.keys() == {".gitattributes", *names}
        card = uploaded["README.md"].decode()
        assert "| expert | org/expert |" in card and "| guided optimizer steps | 2 |" in card
        assert "library_name: peft" in card and "[More Information Needed]" not in card
        assert at.same(at.stock("user/adapter"), model)
        resumed = at.resumed("user/adapter")

        hub.add("user/adapter", {**uploaded, "README.md": (card + "\nMine.\n").encode()})
        at.train(model, 1).push_to_hub("user/adapter", token="hf_x")
        again = hub.files("user/adapter")["README.md"].decode()
        assert again.strip() == (card.replace("steps | 2 |", "steps | 3 |") + "\nMine.").strip()
    assert telemetry(at.train(resumed, 1))["guided_steps"] == 3
