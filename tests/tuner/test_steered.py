"""steered.py: what is found in a model, grouped and steered, on layers with given gradients."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from reference import Layer
from steered_layers import (
    IN,
    OUT,
    Layers,
    R,
    Tensors,
    assert_steps_as_the_oracle,
    close,
    prior_weight,
    randn,
    settings,
    step,
)
from torch import nn

from drift_peft.tuner.batches import groups_of
from drift_peft.tuner.steered import (
    STEERED,
    Stack,
    SteeredAdapter,
    lora_factor,
    lora_layers,
    steered_of,
    trainable_tensors,
)

# Stacks


def test_a_stack_serves_the_batch_that_it_was_made_of_and_no_other():
    a, b, c = Layers(settings()).steered
    cpu = torch.device("cpu")
    stack = Stack.of([a, b], cpu)
    assert Stack.of([a, b], cpu) is stack and a.stack is b.stack is stack
    assert a.prior["U"].data_ptr() == stack.prior["U"][0].data_ptr()  # in memory once
    for batch in ([a, c], [a], [a, b, c], [b, a]):  # of another size, of other members, in another order
        again = Stack.of(batch, cpu)
        assert again is not stack and [member() for member in again.members] == batch
        for i, member in enumerate(batch):
            assert torch.equal(again.prior["U"][i], member.prior["U"])
        stack = Stack.of([a, b], cpu)


def test_another_batch_of_the_same_size_is_guided_by_its_own_delta():
    model = Layers(settings("absolute", "delta"))
    for first, second in ((0, 1), (0, 2), (1, 2)):  # layers that train together, in turn
        model.grads()
        expected = model.expected(0.7, "absolute", "delta", 0.1)
        for i in {0, 1, 2} - {first, second}:
            for j in (2 * i, 2 * i + 1):
                model.trained()[j].grad, expected[j] = None, model.trained()[j].detach().clone()
        step(model)
        for p, value in zip(model.trained(), expected, strict=True):
            close(p, value)


def test_the_scaling_is_read_at_each_step():
    model = Layers(settings("absolute", "delta"))
    for factor in (1.0, 2.0, 2.0):
        for layer in model.layers:
            layer.scaling["default"] *= factor
        assert_steps_as_the_oracle(model.grads(), "absolute", "delta")
    stack = model.steered[0].stack
    first = stack.scaling(torch.float32)
    assert first.dtype == torch.float32 and first.tolist() == [4.0, 6.0, 8.0] and stack.scaling(torch.float32) is first
    assert stack.scaling(torch.float64).dtype == torch.float64


# Who is steered


def test_who_is_steered():
    model = Layers(settings(), others=["second"])
    assert steered_of(model) == model.steered and all(s in STEERED and s.present for s in model.steered)
    model.layers[1].set_adapter("second")
    assert steered_of(model) == []  # its adapter is idle in one of the layers
    model.layers[1].set_adapter("default")
    first = model.steered[0]
    again = model.steer(0)  # in place of what was there
    assert steered_of(model) == [again, *model.steered[1:]] and first not in STEERED
    again.release()
    assert again not in STEERED and model.layers[0].drift_peft == {}
    model.layers[2].delete_adapter("default")
    assert (
        not model.steered[2].present and model.steered[2].among({1}) == () and steered_of(model) == [model.steered[1]]
    )
    layer, entry = model.layers[1], model.steered[1]
    ids = {id(lora_factor(layer, "B", "default"))}
    assert entry.among(ids) == ("B",) and entry.among(()) == ()
    assert entry.state() == (0.7, ("default",), 2)
    del model, layer
    assert not entry.present and entry.among(ids) == () and entry.state() == ()


def test_a_tensor_that_is_gone():
    model = Tensors(settings())
    entry = model.steered[0]
    assert entry.present and entry.state() == (0.7,) and steered_of(model) == model.steered
    del model
    assert not entry.present and entry.among({1}) == ()


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_steered_like_what_they_came_from(how):
    model = Layers(settings())
    step(model)
    twin = how(model)
    twin.steered = steered_of(twin)
    assert [s.module for s in twin.steered] == [*twin.layers] and all(s in STEERED for s in twin.steered)
    assert all(s.stack is None for s in twin.steered) and model.steered[0].stack is not None
    assert_steps_as_the_oracle(twin.grads(), "adaptive", "residual")


def test_embeddings_are_steered_by_the_transposed_delta():
    model, w = nn.ModuleDict({"embed_tokens": nn.Embedding(OUT, IN)}), prior_weight(3)
    inject_adapter_in_model(LoraConfig(r=R, lora_alpha=6, target_modules=["embed_tokens"]), model)
    layer = model["embed_tokens"]
    p = [lora_factor(layer, factor, "default") for factor in "AB"]
    for i, each in enumerate(p):
        each.data, each.grad = randn(*each.shape, seed=i), randn(*each.shape, seed=5 + i)
    entry = SteeredAdapter(layer, "default", "embed_tokens.weight", settings("gradnorm"), w)
    entry.register()
    assert entry.present and entry.prior["U"].is_contiguous() and entry.prior["Vh"].is_contiguous()
    oracle = Layer(p[0], p[1], 2.0, w.U, w.S, w.Vh, embedding=True)
    expected = oracle.biased(p[0].grad, p[1].grad, 0.7, "gradnorm", "residual")
    torch.optim.SGD(p, lr=0.0).step()
    for each, g in zip(p, expected, strict=True):
        close(each.grad, g, 1e-6)
    with pytest.raises(ValueError, match=r"on an embedding or by target_parameters, such as embed_tokens\.weight"):
        SteeredAdapter(layer, "default", "embed_tokens.weight", settings(drift_norm="weight"), w).register()


def test_a_scaling_that_is_changed_in_place():
    """As a hot swap does after prepare_model_for_compiled_hotswap, which makes tensors of them."""
    model = Layers(settings())
    for layer in model.layers:
        layer.scaling["default"] = torch.tensor(2.0)
    step(model)
    stack = model.steered[0].stack
    assert stack.scaling(torch.float32).tolist() == [2.0] * len(stack.members)
    for layer in model.layers:
        layer.scaling["default"].fill_(8.0)
    assert stack.scaling(torch.float32).tolist() == [8.0] * len(stack.members)


def test_adapters_whose_factors_are_not_what_peft_says():
    model = Layers(settings())
    model.layers[0].r["default"] = model.steered[0].rank = 2
    with pytest.raises(RuntimeError, match="has rank 2 but 3 rows: prepare_model_for_compiled_hotswap pads it"):
        step(model)
    stacked = Layers(settings())
    for layer in stacked.layers:  # as of target_parameters, where each expert has rows of its own
        layer.r["default"], layer.num_experts = 1, R
    for steered in stacked.steered:
        steered.rank = 1
    assert len(groups_of(stacked.steered, {*map(id, stacked.trained())})) == 1
    flat = Layers(settings())
    flat.layers[0].lora_A["default"].weight.data = torch.zeros(R * IN)
    with pytest.raises(RuntimeError, match="is flattened: guidance under FSDP1 is not available"):
        flat.steered[0].batch_key()


# What there is in a model


class Text(nn.Module):
    """One projection with a bias and a norm, both under the names that a text model has."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"mlp": nn.ModuleDict({"up_proj": nn.Linear(IN, OUT)})})])
        self.norm = nn.LayerNorm(IN)
        self.other = nn.Linear(IN, IN)  # which no text model has
        for name in ("default", "second"):
            config = LoraConfig(r=R, target_modules=["up_proj"], modules_to_save=["norm"])
            inject_adapter_in_model(config, self, name)


def test_layers_of_an_adapter_or_of_the_active_ones():
    model = Text()
    layer = model.layers[0]["mlp"]["up_proj"]
    name = "layers.0.mlp.up_proj.weight"
    layer.set_adapter("second")
    assert [*lora_layers(model)] == [(name, layer, "second")]
    assert [*lora_layers(model, "default")] == [(name, layer, "default")]
    assert [*lora_layers(model, "third")] == []
    assert [*lora_layers(nn.ModuleDict({"model": model}))] == [(name, layer, "second")]  # whatever is around it
    inject_adapter_in_model(LoraConfig(r=R, target_modules=["other"]), model, "third")
    assert [*lora_layers(model, "third")] == [("other.weight", model.other, "third")]  # the model's own name


@pytest.mark.filterwarnings("ignore:.*target_parameters")
def test_layers_of_parameters_have_the_names_of_these():
    """As those of stacked experts; PEFT wraps the layer of one around that of the other."""
    experts, model = nn.Module(), nn.ModuleDict()
    for name in ("gate_up_proj", "down_proj"):
        experts.register_parameter(name, nn.Parameter(randn(2, IN, IN)))
    model["layers"] = nn.ModuleList([nn.ModuleDict({"mlp": nn.ModuleDict({"experts": experts})})])
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    inject_adapter_in_model(LoraConfig(r=R, target_modules=[], target_parameters=parameters), model)
    assert {(name, layer.parameter_name) for name, layer, _ in lora_layers(model)} == {
        ("layers.0.mlp.experts.gate_up_proj", "gate_up_proj"),
        ("layers.0.mlp.experts.down_proj", "down_proj"),
    }


def test_tensors_that_train():
    model = Text()
    base = model.layers[0]["mlp"]["up_proj"].base_layer
    model.norm.set_adapter("second")
    for p in model.parameters():
        p.requires_grad_(False)
    assert [*trainable_tensors(model)] == []
    saved, kept = model.norm.modules_to_save, model.norm.original_module
    saved["second"].weight.requires_grad_(True)
    base.bias.requires_grad_(True)
    model.other.bias.requires_grad_(True)
    kept.bias.requires_grad_(True)  # which is not what the forward pass uses
    found = [*trainable_tensors(model)]
    assert [each[:3] for each in found] == [
        ("layers.0.mlp.up_proj.bias", base, "bias"),
        ("norm.weight", saved["second"], "weight"),
    ]
    assert found[0].start is None and torch.equal(found[1].start, kept.weight) and not found[1].start.requires_grad
    assert [each.owner for each in found] == [None, "second"]
    base.bias.requires_grad_(False)
    of_one = [each[:3] for each in trainable_tensors(model, "default")]  # active or not
    assert of_one == [("norm.weight", saved["default"], "weight"), ("norm.bias", saved["default"], "bias")]


def test_modules_to_save_inside_layers_are_found_once():
    """By the name that they have in the model; the copies inside PEFT's wrapper have names of their own."""
    model, mlp = nn.ModuleDict(), nn.Module()
    mlp.up_proj, mlp.scale = nn.Linear(IN, OUT), nn.Parameter(randn(IN))
    model["layers"] = nn.ModuleList([nn.ModuleDict({"mlp": mlp, "input_layernorm": nn.LayerNorm(IN, bias=False)})])
    config = LoraConfig(r=R, target_modules=["other"], modules_to_save=["mlp", "input_layernorm"])
    model["other"] = nn.Linear(IN, IN)  # which no text model has
    inject_adapter_in_model(config, model)
    found = [*trainable_tensors(model)]
    own = {each.name: each.module for each in found if getattr(each.module, each.attribute).requires_grad}
    assert len(own) == len(found)
    mlp, norm = (model["layers"][0][name].modules_to_save["default"] for name in ("mlp", "input_layernorm"))
    assert own == {
        "layers.0.mlp.scale": mlp,
        "layers.0.mlp.up_proj.weight": mlp.up_proj,
        "layers.0.mlp.up_proj.bias": mlp.up_proj,
        "layers.0.input_layernorm.weight": norm,
    }
