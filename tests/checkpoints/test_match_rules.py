"""match.py at its lowest level: sources that are lists of names and shapes, so that each rule stands alone."""

from types import SimpleNamespace

import pytest
import torch

from drift_peft.checkpoints.match import Match, describe, match_weights
from drift_peft.checkpoints.naming import module_kind

LAYER = {
    "self_attn.q_proj.weight": (8, 8),
    "self_attn.q_proj.bias": (8,),
    "mlp.up_proj.weight": (16, 8),
    "mlp.experts.gate_up_proj": (4, 16, 8),
    "input_layernorm.weight": (8,),
}
ENDS = {"embed_tokens.weight": (10, 8), "norm.weight": (8,), "lm_head.weight": (10, 8)}


class Source:
    """What `match_weights` asks of a checkpoint."""

    def __init__(self, name, depth=3, tied=False, vocabulary=None, beside=(), **dimensions):
        self.source = name
        shapes = {f"layers.{i}.{rest}": shape for i in range(depth) for rest, shape in LAYER.items()} | ENDS
        self.shapes = {f"{name}.{key}": shape for key, shape in shapes.items()}
        self.claims = {key: [f"{name}.{key}"] for key in shapes}
        self.config = SimpleNamespace(tie_word_embeddings=tied, get_text_config=lambda: self.text_config)
        dimensions = {"hidden_size": 8, **dimensions}
        self.text_config = SimpleNamespace(to_dict=lambda: dimensions)
        self.decoder = Decoder({key: module_kind(key) for key in shapes}, depth, shapes, beside)
        self.model, self.words, self.in_4_bits = object(), vocabulary or {"a": 0, "b": 1}, None

    def lose(self, *names):
        """Files and class lack these."""
        for name in names:
            self.claims.pop(name), self.decoder.kinds.pop(name), self.decoder.shapes.pop(name)
        return self

    def shape(self, key):
        return self.shapes[key]

    def quantization_sign(self, key):
        return "is in 4 bits" if key == self.in_4_bits else None

    def vocabulary(self):
        return self.words


class Decoder:
    def __init__(self, kinds, depth, shapes, beside):
        self.kinds, self.depth, self.shapes, self.lacking = kinds, depth, dict(shapes), beside

    def __len__(self):
        return self.depth

    def sizes(self):
        for name, shape in self.shapes.items():
            if name.startswith("layers."):
                yield name, f"model.{name}", torch.Size(shape).numel()  # its canonical name, and the model's own
        for name, size in self.lacking:  # in layers that the text model lacks
            yield None, name, size

    def beside(self):
        return ()


def match(expert=None, base=None, modules=("attn", "mlp"), **selection):
    return match_weights({"expert": expert or Source("e"), "base": base or Source("b")}, modules, **selection)


def names(rests, layers=range(3)):
    return [f"layers.{i}.{rest}" for i in layers for rest in rests]


def refused(*args, **kwargs):
    with pytest.raises(ValueError) as caught:
        match(*args, **kwargs)
    return str(caught.value)


# What is asked for


@pytest.mark.parametrize(
    ("modules", "rests"),
    [
        (["attn"], ["self_attn.q_proj.weight"]),
        (["mlp", "attn"], ["mlp.up_proj.weight", "self_attn.q_proj.weight"]),
        (["bias"], ["self_attn.q_proj.bias"]),
        (["norm"], ["input_layernorm.weight"]),
    ],
)
def test_modules(modules, rests):
    found = match(modules=modules)
    assert [*found.keys] == names(rests) + ["norm.weight"] * (modules == ["norm"])
    assert found.keys[f"layers.1.{rests[0]}"] == {role: f"{role[0]}.layers.1.{rests[0]}" for role in ("expert", "base")}
    assert found.rows is None and found.rows_of(names(rests)[0], {}) is None


@pytest.mark.parametrize(
    ("selection", "layers"),
    [
        ({}, [0, 1, 2]),
        ({"only_layers": [2, 0]}, [0, 2]),
        ({"skip_first": 1}, [1, 2]),
        ({"only_layers": [0, 1], "skip_first": 1}, [1]),
        ({"skip_first": 2}, [2]),
    ],
)
def test_layers(selection, layers):
    found = match(modules=["attn", "norm"], **selection)
    expected = names(["input_layernorm.weight", "self_attn.q_proj.weight"], layers)
    assert [*found.keys] == [*expected, "norm.weight"]  # what stands in no layer is not restricted
    assert found.without_counterpart == {"layers.*.mlp.experts.gate_up_proj": len(layers)}


def test_layers_that_are_not_there():
    assert "only_layers names layer 3, but b has the layers 0 to 2" in refused(only_layers=[0, 3])
    assert "only_layers names layer -1, but" in refused(only_layers=[-1])
    assert "skip_first=3 leaves none of the 3 layers of b" in refused(skip_first=3)
    assert "only_layers=[0] and skip_first=1 leave no layer" in refused(only_layers=[0], skip_first=1)
    assert "only_layers=[] and skip_first=0 leave no layer" in refused(only_layers=[])


def test_modules_that_are_not_there():
    tied = Source("b", tied=True)
    tied.claims.pop("lm_head.weight")
    assert "the head of b is its embedding: ask for embed instead of head" in refused(base=tied, modules=["head"])
    assert match(base=tied).keys  # nobody asked for it
    assert match(base=tied, modules=["embed"]).keys.keys() == {"embed_tokens.weight"}
    plain = Source("b").lose(*names(["self_attn.q_proj.bias"]))
    assert "modules='bias': the language model of b has none" in refused(base=plain, modules=["attn", "bias"])
    bare = Source("b").lose("norm.weight", *names(["input_layernorm.weight"]))
    assert "modules='norm': the language model of b has none" in refused(base=bare, modules=["norm"])


@pytest.mark.parametrize("key", ["hidden_size", "num_attention_heads", "num_key_value_heads"])
def test_dimensions_that_differ(key):
    ours, theirs = Source("e", **{key: 5}), Source("b", **{key: 7})
    assert refused(ours, theirs) == f"expert e and base b differ in {key} 5 and 7"
    assert match(Source("e", **{key: None}), theirs).keys  # where layers differ, no model says it as a whole
    if key.startswith("num"):
        assert match(Source("e"), theirs).keys


def test_depths_that_differ():
    assert refused(Source("e", depth=2)) == "expert e and base b differ in number of layers 2 and 3"
    assert refused(Source("e", depth=2, hidden_size=4)).endswith("number of layers 2 and 3, hidden_size 4 and 8")


# What has no counterpart


def test_what_no_preset_names_is_counted_with_its_share():
    found = match()
    assert found.without_counterpart == {"layers.*.mlp.experts.gate_up_proj": 3}
    layer = 64 + 8 + 128 + 512 + 8
    assert found.shares == {"layers.*.mlp.experts.gate_up_proj": pytest.approx(512 / layer)}
    told = describe(found.without_counterpart, found.shares)
    assert told == "layers.*.mlp.experts.gate_up_proj (3, 71% of the layers)"
    assert describe({"a": 2, "b": 1}, {"a": 0.005, "b": 0.004}) == "a (2, 0% of the layers), b (1)"
    assert describe({"a": 2}) == "a (2)"


def test_layers_that_the_text_model_lacks_are_counted():
    beside = [("layers.9.cross_attn.q_proj.weight", 10), ("layers.9.mlp.up_proj.weight", 20),
              ("layers.9.input_layernorm.weight", 30)]  # fmt: skip
    found = match(base=Source("b", beside=beside))
    assert found.without_counterpart == {
        "layers.*.cross_attn.q_proj.weight": 1,
        "layers.*.mlp.experts.gate_up_proj": 3,
        "layers.*.mlp.up_proj.weight": 1,
    }
    assert found.shares["layers.*.mlp.up_proj.weight"] == pytest.approx(20 / (3 * 720 + 60))
    assert "layers.*.input_layernorm.weight" in match(base=Source("b", beside=beside), modules=["norm"]).shares


@pytest.mark.parametrize("lacking", ["expert", "base"])
def test_what_one_class_lacks_is_left_alone(lacking):
    sources = {role: Source(role) for role in ("expert", "base")}
    sources[lacking].lose("layers.1.mlp.up_proj.weight", "layers.2.mlp.up_proj.weight")
    found = match(**sources)
    assert [name for name in found.keys if "mlp" in name] == ["layers.0.mlp.up_proj.weight"]
    assert found.without_counterpart["layers.*.mlp.up_proj.weight"] == 2
    assert (found.shares["layers.*.mlp.up_proj.weight"] > 0) == (lacking == "expert")


def test_a_bias_that_a_file_lacks_is_left_alone_and_a_weight_is_not():
    expert = Source("e")
    expert.claims.pop("layers.1.self_attn.q_proj.bias")
    found = match(expert, modules=["bias"])
    assert [*found.keys] == names(["self_attn.q_proj.bias"], [0, 2])
    assert found.without_counterpart["layers.*.self_attn.q_proj.bias"] == 1
    expert.claims.pop("layers.1.mlp.up_proj.weight")
    assert refused(expert) == "e and b do not match in 1 places: layers.1.mlp.up_proj.weight missing in the expert"


def test_nothing_in_common():
    base = Source("b").lose(*names(["mlp.up_proj.weight"]))
    message = refused(base=base, modules=["mlp"])
    assert message.startswith("e and b have no weight of mlp in common: no projection in the decoder of one (object")
    assert message.endswith(
        "; without counterpart: layers.*.mlp.experts.gate_up_proj (3), layers.*.mlp.up_proj.weight (3)"
    )
    bare = Source("b").lose(*names(["mlp.up_proj.weight", "mlp.experts.gate_up_proj"]))
    other = Source("e").lose(*names(["mlp.up_proj.weight", "mlp.experts.gate_up_proj"]))
    assert refused(other, bare, modules=["mlp"]).endswith("in that of the other")


# What does not fit


def test_all_that_does_not_fit_is_listed():
    expert = Source("e", depth=12)
    for i in range(12):
        expert.claims.pop(f"layers.{i}.mlp.up_proj.weight")
        expert.shapes[f"e.layers.{i}.self_attn.q_proj.weight"] = (8, 7)
    message = refused(expert, Source("b", depth=12))
    assert message.startswith("e and b do not match in 24 places: layers.0.mlp.up_proj.weight missing in the expert; ")
    assert "layers.0.self_attn.q_proj.weight is [8, 7] in the expert, [8, 8] in the base; layers.1" in message
    assert message.endswith("; and 4 more") and message.count(";") == 20
    assert "layers.9.mlp" in message and "layers.10.mlp" not in message  # in the order of the layers
    expert.claims["layers.0.mlp.up_proj.weight"] = ["one", "two"]
    assert "layers.0.mlp.up_proj.weight claimed by one and two in the expert" in refused(expert, Source("b", depth=12))


def test_outputs_that_differ_in_number():
    expert = Source("e")
    expert.shapes["e.layers.0.mlp.up_proj.weight"] = (12, 8)
    assert "layers.0.mlp.up_proj.weight is [12, 8] in the expert, [16, 8] in the base" in refused(expert)


def test_twenty_that_do_not_fit_are_all_told():
    expert = Source("e", depth=20)
    for i in range(20):
        expert.claims.pop(f"layers.{i}.mlp.up_proj.weight")
    message = refused(expert, Source("b", depth=20))
    assert message.count("missing in the expert") == 20 and message.endswith("missing in the expert")


@pytest.mark.parametrize(
    ("name", "shape"),
    [("layers.1.input_layernorm.weight", (8, 1)), ("layers.1.mlp.up_proj.weight", (16,)), ("norm.weight", (8, 8)),
     ("layers.1.self_attn.q_proj.bias", (1, 8))],
)  # fmt: skip
def test_numbers_of_dimensions(name, shape):
    sources = {role: Source(role) for role in ("expert", "base")}
    for role, source in sources.items():
        source.shapes[f"{role}.{name}"] = shape
    message = refused(**sources, modules=["mlp", "norm", "bias"])
    assert f"{name} is {list(shape)} in the expert, {list(shape)} in the base" in message


def test_a_quantized_weight_is_refused_where_it_is_used():
    base = Source("b")
    base.in_4_bits = "b.layers.2.mlp.up_proj.weight"
    assert refused(base=base) == "layers.2.mlp.up_proj.weight is in 4 bits in the base b: name the full-precision one"
    assert match(base=base, modules=["attn"]).keys


# Rows of tokens


def test_rows_belong_together_by_token():
    expert = Source("e", vocabulary={"c": 3, "a": 5, "x": 0, "b": 2})
    base = Source("b", vocabulary={"b": 4, "c": 0, "a": 1, "y": 2})
    expert.shapes["e.embed_tokens.weight"] = (4, 8)
    for modules in (["embed"], ["attn", "head"], ["head", "embed"]):
        found = match(expert, base, modules)
        assert found.rows.tolist() == [[3, 0], [5, 1], [2, 4]]  # in the order of the base's rows: c, a, b
    tensors = {"expert": torch.empty(4, 8), "base": torch.empty(10, 8)}
    rows = found.rows_of("embed_tokens.weight", tensors)  # the expert has no row of a
    assert {role: row.tolist() for role, row in rows.items()} == {"expert": [3, 2], "base": [0, 4]}
    assert rows["base"].is_contiguous()
    assert found.rows_of("layers.0.self_attn.q_proj.weight", tensors) is None
    assert Match({}, {}, {}, torch.tensor([[4, 8], [3, 9]])).rows_of("lm_head.weight", tensors)["base"].tolist() == [9]
    assert "the tokenizers of e and b have no token in common" in refused(
        Source("e", vocabulary={"q": 0}), base, modules=["embed"]
    )
    expert.shapes["e.embed_tokens.weight"] = (4, 7)
    assert "embed_tokens.weight is [4, 7] in the expert, [10, 8] in the base" in refused(expert, base, ["embed"])


@pytest.mark.parametrize("where", ["config", "text_config"])
def test_a_tied_head_is_the_embedding(where):
    expert, base = Source("e"), Source("b")
    expert.claims.pop("lm_head.weight")
    assert "lm_head.weight missing in the expert" in refused(expert, base, ["head"])
    getattr(expert, where).tie_word_embeddings = True
    assert match(expert, base, ["head"]).keys == {
        "lm_head.weight": {"expert": "e.embed_tokens.weight", "base": "b.lm_head.weight"}
    }
    base.config.tie_word_embeddings = True  # though the files hold both
    assert match(expert, base, ["head"]).keys["lm_head.weight"]["base"] == "b.lm_head.weight"
