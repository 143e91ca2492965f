"""Weights that several modules hold: an adapter on one of these would be merged into all. DiffusionGemma has such."""

import pytest
import torch
from every_type import tiny_base, tiny_text_expert
from older import known_type
from pairs import untouched
from peft import LoraConfig, get_peft_model
from tiny import tiny_llm

from drift_peft import DriftConfig, build_prior, guide, language_model_targets, merge_adapter
from drift_peft.checkpoints.decoder import shared_weights

pytestmark = known_type("diffusion_gemma")
TARGET = r"model\.decoder\.layers\.0\.self_attn\.q_proj"
REFUSED = r"1 of the weights that are adapted, such as model.*layers.0.self_attn.q_proj.weight, are shared with"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Base, a text expert with a prior of it, and an adapter of stock PEFT."""
    folder = tmp_path_factory.mktemp("shared")
    base = tiny_base("diffusion_gemma")
    base.save_pretrained(folder / "base")
    tiny_text_expert(base)[0].save_pretrained(folder / "expert")
    build_prior(folder / "expert", folder / "base", folder / "prior.safetensors", rank=4, progress=False)
    stock = get_peft_model(base, LoraConfig(r=2, target_modules=TARGET, init_lora_weights=False))
    stock.save_pretrained(folder / "adapter")
    return folder


def test_targets_name_none_of_them(folder):
    with pytest.raises(ValueError, match="cannot be adapted: PEFT merges their adapters into weights that"):
        language_model_targets(tiny_base("diffusion_gemma"))


@pytest.mark.parametrize("targets", [TARGET, []])
def test_they_are_refused_as_targets(folder, targets):
    model = tiny_base("diffusion_gemma")
    parameters = None if targets else ["language_model.layers.0.self_attn.q_proj.weight"]  # PEFT knows the first name
    config = DriftConfig(prior=folder / "prior.safetensors", r=2, target_modules=targets, target_parameters=parameters)
    with pytest.raises(ValueError, match=REFUSED):
        get_peft_model(model, config)
    assert untouched(model)


def test_guide_refuses_them(folder):
    model = get_peft_model(tiny_base("diffusion_gemma"), LoraConfig(r=2, target_modules=TARGET))
    with pytest.raises(ValueError, match=REFUSED):
        guide(model, folder / "prior.safetensors")


def test_an_adapter_on_one_of_them_is_not_merged(folder, tmp_path):
    with pytest.raises(ValueError, match=r"other modules share the weight of .*decoder.layers.0.self_attn.q_proj"):
        merge_adapter(folder / "base", folder / "adapter", tmp_path / "merged", progress=False)
    assert not [*tmp_path.iterdir()]


def test_a_head_that_is_the_embedding_is_none_of_them():
    model = tiny_llm("llava", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight and not shared_weights(model)
    model.lm_head.bias = model.model.layers[0].self_attn.q_proj.bias = torch.nn.Parameter(torch.zeros(1))  # as BERT's
    model.model.layers[0].self_attn.q_proj.weight = model.model.layers[1].self_attn.q_proj.weight
    assert shared_weights(model) == {f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)}
