"""What is adapted is what was meant, whatever PEFT makes of target_modules; and it is steered, whatever its name."""

import copy
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from older import rewrites_omni_targets, rewrites_targets
from pairs import IDS, Pair, untouched
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from tiny import TEXT, edit_config, save_layout, tiny_expert, tiny_llm, tiny_vlm

from drift_peft import DriftConfig, build_prior, guide, language_model_targets, telemetry
from drift_peft.tuner.compatibility import adapted_modules

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def qwen3_moe(**changes):
    torch.manual_seed(0)
    return tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**{**TEXT, **EXPERTS, **changes})).eval()


def moved(model, other):
    """`model` with all linear layers of its decoder moved, saved beside it by the caller."""
    state = {k: v + 0.1 * v.std() * torch.randn(v.shape) if v.dim() == 2 else v for k, v in model.state_dict().items()}
    other.load_state_dict(state)
    return other


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    """Qwen3-MoE whose first layer is dense, an expert, and the prior of both."""
    folder = tmp_path_factory.mktemp("moe")
    base = qwen3_moe(mlp_only_layers=[0])
    save_layout(base, folder / "base")
    save_layout(moved(base, qwen3_moe(mlp_only_layers=[0])), folder / "expert")
    build_prior(folder / "expert", folder / "base", folder / "prior.safetensors", rank=8, progress=False)
    return Pair(folder, base, {})


def drift(pair, **settings):
    return DriftConfig(prior=pair.path, r=4, lora_alpha=8, drift_alpha=1.0, **settings)


ATTENTION = {f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qkvo"}


@rewrites_targets
def test_a_mixture_is_adapted_where_peft_can_say_so(moe, tmp_path):
    with pytest.warns(
        UserWarning, match=r"3 projections, such as model.layers.0.mlp.gate_proj, cannot be adapted: PEFT"
    ):
        model = get_peft_model(qwen3_moe(mlp_only_layers=[0]), drift(moe))
    assert adapted_modules(model.get_base_model(), ["default"]) == ATTENTION
    assert not any(isinstance(module, ParamWrapper) for module in model.modules())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(qwen3_moe(mlp_only_layers=[0]), tmp_path)
    assert adapted_modules(again.get_base_model(), ["default"]) == ATTENTION
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(qwen3_moe(mlp_only_layers=[0]), tmp_path)
        assert torch.equal(model(IDS).logits, again(IDS).logits)


@pytest.mark.filterwarnings("ignore:.* projections, such as")
@pytest.mark.parametrize("layers", [1, [1]])
def test_the_layers_of_a_mixture_that_are_asked_for(moe, layers, tmp_path):
    model = get_peft_model(qwen3_moe(mlp_only_layers=[0]), drift(moe, layers_to_transform=layers))
    one = {name for name in ATTENTION if ".1." in name}
    assert adapted_modules(model.get_base_model(), ["default"]) == one
    prior = tmp_path / "one.safetensors"
    build_prior(moe.folder / "expert", moe.folder / "base", prior, rank=8, only_layers=[1], progress=False)
    model = get_peft_model(qwen3_moe(mlp_only_layers=[0]), DriftConfig(prior=prior, r=4))
    assert adapted_modules(model.get_base_model(), ["default"]) == one


@rewrites_targets
def test_all_linear_is_what_peft_takes_it_for():
    plain = get_peft_model(qwen3_moe(), LoraConfig(r=4, target_modules="all-linear"))
    held = DriftConfig(r=4, target_modules="all-linear", drift_target="base", drift_scale="decoupled")
    ours = get_peft_model(qwen3_moe(), held)
    names = [{n for n, m in model.named_modules() if isinstance(m, LoraLayer)} for model in (plain, ours)]
    assert names[0] == names[1] and len(names[0]) == 14


@rewrites_targets
@pytest.mark.parametrize(
    ("targets", "difference"),
    [
        (
            ["q_proj", "gate_proj", "up_proj", "down_proj"],
            "PEFT leaves out model.layers.0.mlp.down_proj, model.layers.0",
        ),
        (r"model\.layers\.1\.self_attn\.q_proj", "PEFT adds model.layers.0.self_attn.q_proj"),
        ("all-linear", "PEFT leaves out model.layers.0.mlp.down_proj"),
    ],
)
def test_targets_that_peft_reads_as_something_else_are_refused(moe, targets, difference):
    model = qwen3_moe(mlp_only_layers=[0])
    with pytest.raises(ValueError, match=re.escape(difference) + ".*: name them as language_model_targets") as refused:
        get_peft_model(model, drift(moe, target_modules=targets))
    asked = repr(targets) if isinstance(targets, str) else f"[{', '.join(sorted(targets))}]"
    assert str(refused.value).startswith(f"target_modules={asked} names")  # as it was asked for, not as it was read
    assert untouched(model)


@rewrites_omni_targets
def test_language_model_targets_of_an_omni_thinker_miss_the_audio_tower():
    """PEFT's conversion leaves of an expression only the last parts of the names, which the towers have too."""
    model = tf.Qwen3OmniMoeThinkerForConditionalGeneration._from_config(omni_thinker())
    targets = language_model_targets(model)
    assert isinstance(targets, list)
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=targets))
    assert adapted_modules(wrapped.get_base_model(), ["default"]) == {*targets}
    assert all(name.startswith("model.language_model.layers.") for name in targets)


def omni_thinker():
    audio = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 40, "output_dim": 64}
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 4, "out_hidden_size": 64, "intermediate_size": 40}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
    return tf.models.qwen3_omni_moe.Qwen3OmniMoeThinkerConfig(
        audio_config={**audio, "downsample_hidden_size": 8},
        vision_config={**vision, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        text_config={**TEXT, **EXPERTS, "rope_parameters": rope},
    )


@pytest.mark.parametrize("targets", [r".*\.self_attn\..*", r".*(?:q|v)_proj.*"])
def test_an_expression_that_also_fits_what_is_inside_an_adapted_layer(pair, targets):
    """PEFT looks into no layer that it has adapted already: a second adapter, or guide, means the layers themselves."""
    settings = {"drift_modules": ["attn"]}
    first = get_peft_model(copy.deepcopy(pair.base), drift(pair, target_modules=targets, **settings))
    meant = adapted_modules(first.get_base_model(), ["default"])
    assert meant and not any("lora" in name for name in meant)
    for one, other in [(["q_proj"], targets), (targets, targets)]:
        model = get_peft_model(copy.deepcopy(pair.base), LoraConfig(r=4, target_modules=one))
        model.add_adapter("second", drift(pair, target_modules=other, **settings))
        assert adapted_modules(model.get_base_model(), ["second"]) == meant
    model = get_peft_model(copy.deepcopy(pair.base), LoraConfig(r=4, target_modules=targets))
    guide(model, pair.prior)
    assert {n for n, m in model.get_base_model().named_modules() if vars(m).get("drift_peft", {})} == meant


def test_the_layers_that_are_asked_for_are_loaded_again(pair, tmp_path):
    config = drift(pair, layers_to_transform=1, layers_pattern="layers")
    model = get_peft_model(copy.deepcopy(pair.base), config)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(pair.base), tmp_path)
    assert len(adapted_modules(again.get_base_model(), ["default"])) == 7


UNUSED = {
    "target_modules names k_porj too, and": {"target_modules": ["q_proj", "k_porj"]},
    "layers_to_transform names 7, 8 too, and": {"target_modules": ["q_proj"], "layers_to_transform": [0, 7, 8]},
}


@pytest.mark.parametrize(("message", "settings"), UNUSED.items(), ids=UNUSED)
def test_what_is_named_and_adapts_nothing_is_told(pair, message, settings):
    with pytest.warns(UserWarning, match=message):
        get_peft_model(copy.deepcopy(pair.base), drift(pair, **settings))


@pytest.mark.parametrize(
    ("layers", "unknown"),
    [([0, 99], "99"), (-1, "-1"), (True, "True"), ("0", "'0'"), (["0"], "'0'"), ((i for i in (1, 2)), "2")],
)
def test_layers_that_the_model_does_not_have_are_refused(pair, layers, unknown):
    with pytest.raises(ValueError, match=f"layers names {unknown}, and LlamaForCausalLM has those from 0 to 1"):
        language_model_targets(pair.base, layers=layers)


@pytest.mark.parametrize(
    "layers", [iter([1, 0]), np.arange(2), range(2), {0, 1}], ids=lambda given: type(given).__name__
)
def test_layers_come_in_any_form(pair, layers):
    assert language_model_targets(pair.base, layers=layers) == language_model_targets(pair.base)
    assert language_model_targets(pair.base, layers=np.int64(1)) == language_model_targets(pair.base, layers=[1])


@pytest.mark.parametrize(
    ("model", "names", "said"),
    [
        ("vlm", None, "model must be"),
        (None, "q_proj", "names must be"),
        (None, Path("prior.safetensors"), "names must be .*, got 'prior.safetensors'"),
    ],
)
def test_what_is_no_model_and_no_list_of_names_is_refused(pair, model, names, said):
    with pytest.raises(ValueError, match=said):
        language_model_targets(model or pair.base, names)


# Held at the base: everything that is adapted


@dataclass
class OwnConfig:
    hidden_size: int = 16


class Own(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.config = OwnConfig()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x).tanh()
        return x


SMALL = {"vocab_size": 64, "max_position_embeddings": 128}
MODELS = {
    "gpt2": (lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)), ["c_attn"]),
    "opt": (
        lambda: tf.OPTForCausalLM(
            tf.OPTConfig(**SMALL, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
                         word_embed_proj_dim=32)
        ),
        ["q_proj", "fc1"],
    ),
    "gpt_neox": (
        lambda: tf.GPTNeoXForCausalLM(
            tf.GPTNeoXConfig(**SMALL, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
        ),
        ["query_key_value"],
    ),
    "own": (Own, ["blocks.0", "blocks.1"]),
    "qwen3_moe": (qwen3_moe, "all-linear"),
    "mixtral": (
        lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**TEXT, num_local_experts=2)), ["q_proj", "w1", "w2", "w3"],
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("error:target_modules names")
@pytest.mark.parametrize("name", [pytest.param(n, marks=rewrites_targets if n == "mixtral" else ()) for n in MODELS])
def test_what_is_held_at_the_base_is_all_that_is_adapted(name):
    make, targets = MODELS[name]
    torch.manual_seed(0)
    config = DriftConfig(r=4, target_modules=targets, drift_target="base", drift_scale="decoupled", drift_alpha=10.0)
    if name == "gpt2":
        config.fan_in_fan_out = True
    model = get_peft_model(make(), config)
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert layers and all(module.drift_peft for module in layers)
    with torch.no_grad():
        for layer in layers:
            layer.lora_B["default"].weight.fill_(1.0)
    factors = [p for p in model.parameters() if p.requires_grad]
    for factor in factors:
        factor.grad = torch.zeros_like(factor)
    torch.optim.SGD(factors, lr=0.05).step()  # no gradient: B goes to 0 by lr·a alone
    for layer in layers:
        assert torch.allclose(layer.lora_B["default"].weight, torch.tensor(0.5))
    assert model.peft_config["default"].drift_steps == 1


# target_parameters


def test_parameters_of_linear_layers_are_steered_as_their_modules_would_be(pair):
    torch.manual_seed(0)
    base = pair.base
    parameters = ["0.self_attn.q_proj.weight", "1.mlp.up_proj.weight"]
    settings = {"drift_target": "factors", "drift_modules": ["attn", "mlp"]}
    by_name = drift(pair, target_modules=[p.removesuffix(".weight") for p in parameters], **settings)
    by_parameter = drift(pair, target_modules=[], target_parameters=parameters, **settings)
    found = []
    for config in (by_name, by_parameter):
        model = get_peft_model(copy.deepcopy(base), config)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        assert len(layers) == 2 and all(module.drift_peft for module in layers)
        found.append([layer.lora_B["default"].weight.detach() for layer in layers])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_none_beside_parameters_adapts_all_the_others(pair):
    config = drift(pair, target_parameters=["q_proj.weight"])
    model = get_peft_model(copy.deepcopy(pair.base), config)
    wrappers = [n for n, m in model.named_modules() if isinstance(m, ParamWrapper)]
    assert len(wrappers) == 2 and all(name.endswith("q_proj") for name in wrappers)
    assert len(adapted_modules(model, ["default"])) == 12


def test_weight_norms_of_parameters_are_refused(pair):
    model = copy.deepcopy(pair.base)
    with pytest.raises(ValueError, match=r"drift_norm='weight' is not available for .* by target_parameters"):
        get_peft_model(model, drift(pair, target_modules=[], target_parameters=["q_proj.weight"], drift_norm="weight"))
    assert not any(isinstance(module, LoraLayer) for module in model.modules())


def test_a_model_without_a_decoder_wants_targets(pair):
    with pytest.raises(ValueError, match="Own does not say where its language model is: pass target_modules yourself"):
        get_peft_model(Own(), DriftConfig(r=4, drift_target="base", drift_scale="decoupled"))


# guide


@rewrites_targets
def test_guide_sees_what_peft_has_adapted(moe):
    with pytest.warns(UserWarning, match="cannot be adapted"):
        targets = language_model_targets(qwen3_moe(mlp_only_layers=[0]))
    model = get_peft_model(qwen3_moe(mlp_only_layers=[0]), LoraConfig(r=4, target_modules=targets))
    guide(model, moe.prior)
    assert {s.name for m in model.modules() for s in vars(m).get("drift_peft", {}).values()} == {
        f"{name.removeprefix('model.')}.weight" for name in ATTENTION
    }
    model = get_peft_model(qwen3_moe(mlp_only_layers=[0]), LoraConfig(r=4, target_modules=["q_proj", "k_proj"]))
    model.peft_config["default"].target_modules = {"q_proj", "o_proj"}
    with pytest.raises(ValueError, match=r"PEFT leaves out .*o_proj.* and adds .*k_proj"):
        guide(model, moe.prior)


def test_hybrids_are_adapted_whole(tmp_path):
    vlm = tiny_vlm("qwen3_5")
    expert, delta = tiny_expert("qwen3_5", vlm)
    save_layout(vlm, tmp_path / "base")
    save_layout(expert, tmp_path / "expert")
    build_prior(tmp_path / "expert", tmp_path / "base", tmp_path / "prior.safetensors", rank=8, progress=False)
    model = get_peft_model(vlm, DriftConfig(prior=tmp_path / "prior.safetensors", r=4))
    names = {f"model.language_model.{name}".removesuffix(".weight") for name in delta}
    assert adapted_modules(model.get_base_model(), ["default"]) == names
    assert any("linear_attn.in_proj_qkv" in name for name in names)


def test_a_second_adapter_by_an_expression_that_its_neighbours_insides_would_match(pair):
    """Names inside what is adapted already are no targets."""
    model = get_peft_model(copy.deepcopy(pair.base), drift(pair, target_modules=r".*layers\.\d+\.self_attn\.q_proj.*"))
    model.add_adapter("second", drift(pair, target_modules=r".*layers\.\d+\.self_attn\.q_proj.*"))
    names = {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}
    assert adapted_modules(model.get_base_model(), ["second"]) == names


@pytest.mark.parametrize("end", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("stored", ["tied", "apart"])
def test_adapters_that_peft_ties_are_refused_by_what_it_does(tmp_path, end, stored):
    """Also where the configuration alone says that embedding and head are one."""
    save_layout(tiny_llm("llava", tie_word_embeddings=stored == "tied"), tmp_path / "base")
    edit_config(tmp_path / "base", tie_word_embeddings=True)
    expert = tiny_llm("llava")
    expert.model.layers[0].self_attn.q_proj.weight.data += 0.01
    save_layout(expert, tmp_path / "expert")
    prior = build_prior(tmp_path / "expert", tmp_path / "base", tmp_path / "p.safetensors", rank=2, progress=False)
    settings = {"r": 2, "target_modules": [end, "q_proj"], "ensure_weight_tying": True}
    message = "ensure_weight_tying=True has PEFT adapt embedding and head by the same factors.*modules_to_save"

    def base():
        return tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")

    model = base()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = get_peft_model(base(), LoraConfig(**settings))
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, DriftConfig(prior=prior.path, **settings))
    assert untouched(model)
    with pytest.raises(ValueError, match=message):
        guide(plain, prior)
    saved = {**settings, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    assert telemetry(get_peft_model(model, DriftConfig(prior=prior.path, **saved)))["guided_steps"] == 0
