"""A table of steered adapters, of several families and settings, to hold PEFT's promises for LoRA to."""

import copy
import warnings
from functools import cache, cached_property

import pytest
import torch
from dense_prior import dense_prior
from older import known
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from tiny import save_layout, tiny_llm, tiny_vlm
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from twin import trainable

from drift_peft import DriftConfig
from drift_peft.checkpoints.naming import canonical_name, module_kind

quiet = [  # the pytestmark of every file that uses the table
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
SELDOM = "one layer", "weight norm", "base", "all linear"  # whose files and layers are as others'
SEVERAL = [
    known(case, settings, marks=[pytest.mark.slow] if case in SELDOM else []) for case, (_, settings) in CASES.items()
]
every_case = pytest.mark.parametrize("case", SEVERAL)
some_cases = pytest.mark.parametrize("case", ["plain", "decoupled", "another start"])  # of each family one


def cases_but(*names):
    """Without those that PEFT itself does not do this for."""
    return pytest.mark.parametrize("case", [case for case in SEVERAL if case.values[0] not in names])


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
    return [s for m in model.modules() for s in vars(m).get("drift_peft", {}).values()]


def lora_layers(model):
    return [m for m in model.modules() if isinstance(m, LoraLayer)]
