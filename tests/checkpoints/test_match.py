"""match.py: what has a counterpart is found, what has none is said, and what only should have one is an error."""

import pytest
import torch
import transformers as tf
from tiny import (
    MIXED,
    TEXT,
    edit_config,
    edit_tensors,
    rename_keys,
    save_layout,
    save_tokenizer,
    tiny_expert,
    tiny_llm,
    tiny_vlm,
)

from drift_peft.checkpoints.checkpoint import Checkpoint
from drift_peft.checkpoints.match import match_weights

EXPERTS = {f"layers.*.mlp.{rest}": 1 for rest in ("gate.weight", "experts.gate_up_proj", "experts.down_proj")}
LINEAR = {f"layers.*.linear_attn.{rest}": 1 for rest in ("A_log", "dt_bias", "conv1d.weight")}
WITHOUT = {
    "qwen3_vl_moe": EXPERTS,
    "glm4v_moe": EXPERTS,
    "qwen3_5": LINEAR,
    "qwen3_5_moe": {**LINEAR, **dict.fromkeys(EXPERTS, 2), "layers.*.mlp.shared_expert_gate.weight": 2},
    "gemma4": {"per_layer_model_projection.weight": 1},
    "lfm2_vl": {"layers.*.conv.conv.weight": 1},
    "mistral_llava": {},
}


def save_pair(folder, family):
    vlm = tiny_vlm(family)
    expert, delta = tiny_expert(family, vlm)
    save_layout(vlm, folder / "vlm")
    save_layout(expert, folder / "expert")
    return delta


def match(folder, modules=("attn", "mlp"), **selection):
    return match_weights(
        {"expert": Checkpoint(folder / "expert"), "base": Checkpoint(folder / "vlm")}, modules, **selection
    )


@pytest.mark.parametrize("family", MIXED)
def test_experts_are_said_to_be_left_and_what_stands_beside_them_is_steered(family, tmp_path):
    delta = save_pair(tmp_path, family)
    found = match(tmp_path)
    assert found.keys.keys() == delta.keys()
    assert found.without_counterpart == dict(sorted(WITHOUT[family].items()))
    for name, keys in found.keys.items():
        assert keys["expert"] == f"model.{name}" and keys["base"].endswith(name)


def test_the_size_of_an_mlp_that_no_layer_has(tmp_path):
    """As of Qwen3-VL-30B-A3B and Qwen3-Coder-30B-A3B, all of whose layers are mixtures of experts."""
    config, cls, _ = MIXED["qwen3_vl_moe"]
    config = config()
    config.text_config.mlp_only_layers = []
    save_layout(cls(config), tmp_path / "vlm")
    save_layout(tiny_llm("qwen3_vl_moe", mlp_only_layers=[], intermediate_size=112), tmp_path / "expert")
    assert config.text_config.intermediate_size == 128
    attention = {f"layers.{i}.self_attn.{p}_proj.weight" for i in (0, 1) for p in "qkvo"}
    assert match(tmp_path).keys.keys() == attention


def test_experts_in_one_model_alone(tmp_path):
    """A plain VLM and a mixture of experts of its ancestor: attention is steered, its MLP has no counterpart."""
    save_pair(tmp_path, "mistral_llava")
    mixtral = tf.MixtralForCausalLM(tf.MixtralConfig(**TEXT, num_local_experts=2))
    save_layout(mixtral, tmp_path / "expert")
    found = match(tmp_path)
    assert found.keys.keys() == {f"layers.{i}.self_attn.{p}_proj.weight" for i in (0, 1) for p in "qkvo"}
    assert found.without_counterpart == {f"layers.*.mlp.{p}_proj.weight": 2 for p in ("down", "gate", "up")}
    with pytest.raises(
        ValueError,
        match=r"have no weight of mlp in common: .*; without counterpart: layers\.\*\.mlp\.down_proj\.weight \(2\)",
    ):
        match(tmp_path, ["mlp"])


def test_linear_attention_in_one_model_alone(tmp_path):
    save_pair(tmp_path, "qwen3_5")
    save_layout(tiny_llm("qwen3_5", layer_types=["full_attention"] * 2), tmp_path / "expert")
    found = match(tmp_path, ["attn", "mlp", "norm"])
    assert {n for n in found.keys if "self_attn" in n and "norm" not in n} == {
        f"layers.1.self_attn.{p}_proj.weight" for p in "qkvo"
    }
    assert {f"layers.*.self_attn.{p}_proj.weight": 1 for p in "qkvo"}.items() <= found.without_counterpart.items()
    assert found.without_counterpart["layers.*.linear_attn.norm.weight"] == 1
    assert found.without_counterpart["layers.*.self_attn.q_norm.weight"] == 1


def test_cross_attention_layers_have_no_counterpart(tmp_path):
    delta = save_pair(tmp_path, "mllama")
    found = match(tmp_path)
    assert found.keys.keys() == delta.keys()
    assert found.keys["layers.1.mlp.up_proj.weight"]["base"] == "language_model.model.layers.2.mlp.up_proj.weight"
    for pattern in ("layers.*.cross_attn.q_proj.weight", "layers.*.mlp.up_proj.weight"):
        assert found.without_counterpart[pattern] == 2
    assert "layers.*.input_layernorm.weight" not in found.without_counterpart
    assert match(tmp_path, ["norm"]).without_counterpart["layers.*.input_layernorm.weight"] == 2


@pytest.mark.parametrize(
    ("family", "lost"),
    [
        ("qwen3_vl_moe", "layers.0.mlp.up_proj.weight"),  # its MLP is plain there
        ("glm4v_moe", "layers.0.mlp.gate_proj.weight"),
        ("qwen3_5", "layers.1.self_attn.q_proj.weight"),  # full attention
        ("qwen3_5", "layers.0.mlp.down_proj.weight"),
    ],
)
@pytest.mark.parametrize("sides", [["expert"], ["vlm"], ["expert", "vlm"]])
def test_what_no_configuration_explains_is_missing(family, lost, sides, tmp_path):
    save_pair(tmp_path, family)
    for side in sides:
        rename_keys(tmp_path / side, lambda key: None if key.endswith(lost) else key)
    roles = "; ".join(
        f"{lost} missing in the {role}" for role, side in (("expert", "expert"), ("base", "vlm")) if side in sides
    )
    with pytest.raises(ValueError, match=f"do not match in {len(sides)} places: {roles}$"):
        match(tmp_path)


def test_what_the_class_has_and_the_file_lacks_is_an_error(tmp_path):
    save_pair(tmp_path, "qwen3_5_moe")
    rename_keys(tmp_path / "expert", lambda key: None if "shared_expert.up" in key or "in_proj_z" in key else key)
    missing = r"layers.0.linear_attn.in_proj_z.weight missing in the expert; layers.0.mlp.shared_expert.up_proj.weight"
    with pytest.raises(ValueError, match=rf"do not match in 3 places: {missing}"):
        match(tmp_path)


def test_vectors(tmp_path):
    save_pair(tmp_path, "qwen2_5_vl")
    norms = {"norm.weight", *(f"layers.{i}.{n}_layernorm.weight" for i in (0, 1) for n in ("input", "post_attention"))}
    assert match(tmp_path, ["norm"]).keys.keys() == norms
    biases = {f"layers.{i}.self_attn.{p}_proj.bias" for i in (0, 1) for p in "qkv"}
    assert match(tmp_path, ["bias"]).keys.keys() == biases
    rename_keys(tmp_path / "expert", lambda key: None if key.endswith("1.self_attn.q_proj.bias") else key)
    found = match(tmp_path, ["bias"])  # a bias only where both models have it
    assert found.keys.keys() == biases - {"layers.1.self_attn.q_proj.bias"}
    assert found.without_counterpart == {"layers.*.self_attn.q_proj.bias": 1}
    rename_keys(tmp_path / "expert", lambda key: None if key.endswith("norm.weight") else key)
    with pytest.raises(ValueError, match=r"in 5 places: layers.0.input_layernorm.weight missing in the expert; "):
        match(tmp_path, ["norm"])


def test_layers_are_selected_as_the_text_model_counts(tmp_path):
    vlm = tiny_vlm("mllama")  # its layers 0 and 2 are the text model's 0 and 1
    save_layout(vlm, tmp_path / "vlm")
    save_layout(tiny_expert("mllama", vlm)[0], tmp_path / "expert")

    def layers(**selection):
        found = match(tmp_path, ["attn", "norm"], **selection).keys
        assert "norm.weight" in found  # which is in no layer
        return {name.split(".")[1] for name in found if name.startswith("layers.")}

    assert layers(only_layers=[1]) == {"1"} == layers(skip_first=1) == layers(only_layers=[0, 1], skip_first=1)
    assert layers(only_layers=[0, 1]) == {"0", "1"} == layers()
    for selection, message in (
        ({"only_layers": [0, 2]}, r"only_layers names layer 2, but .*vlm has the layers 0 to 1$"),
        ({"skip_first": 2}, r"skip_first=2 leaves none of the 2 layers of .*vlm$"),
        ({"only_layers": [0], "skip_first": 1}, r"only_layers=\[0\] and skip_first=1 leave no layer"),
    ):
        with pytest.raises(ValueError, match=message):
            match(tmp_path, **selection)


def test_layers_left_out_are_not_missed(tmp_path):
    save_pair(tmp_path, "qwen3_5")
    assert match(tmp_path, only_layers=[1]).without_counterpart == {}
    rename_keys(tmp_path / "expert", lambda key: None if "layers.0." in key else key)
    assert len(match(tmp_path, skip_first=1).keys) == 7


@pytest.mark.parametrize(
    ("family", "modules", "message"),
    [
        ("llava", ["attn", "bias"], r"modules='bias': the language model of .*vlm has none$"),
        ("gemma3", ["head"], r"the head of .*vlm is its embedding: ask for embed instead of head$"),
    ],
)
def test_what_the_base_lacks_cannot_be_asked_for(family, modules, message, tmp_path):
    save_pair(tmp_path, family)
    with pytest.raises(ValueError, match=message):
        match(tmp_path, modules)


def test_a_head_that_nothing_explains_away_is_missing(tmp_path):
    save_pair(tmp_path, "llava")
    for side in ("vlm", "expert"):
        save_tokenizer(tmp_path / side, {"a": 0, "b": 1})
        edit_config(tmp_path / side, tie_word_embeddings=False)
    rename_keys(tmp_path / "expert", lambda key: None if "lm_head" in key else key)
    with pytest.raises(ValueError, match=r"in 1 places: lm_head.weight missing in the expert$"):
        match(tmp_path, ["head"])
    edit_config(tmp_path / "expert", tie_word_embeddings=True)  # then it is the embedding
    assert match(tmp_path, ["head"]).keys == {
        "lm_head.weight": {"expert": "model.embed_tokens.weight", "base": "language_model.lm_head.weight"}
    }


def test_rows_belong_together_by_token(tmp_path):
    save_pair(tmp_path, "llava")
    save_tokenizer(tmp_path / "vlm", {"[UNK]": 0, "a": 1, "b": 2, "<image>": 3, "c": 4})
    save_tokenizer(tmp_path / "expert", {"[UNK]": 0, "c": 1, "[PAD]": 3, "a": 5, "b": 99})
    found = match(tmp_path, ["head", "embed"])
    assert found.rows.tolist() == [[0, 0], [5, 1], [99, 2], [1, 4]]
    tensors = {role: torch.empty(64, 2) for role in ("expert", "base")}
    rows = found.rows_of("lm_head.weight", tensors)  # no model has a row 99
    assert {role: r.tolist() for role, r in rows.items()} == {"expert": [0, 5, 1], "base": [0, 1, 4]}
    assert found.rows_of("norm.weight", tensors) is None

    save_tokenizer(tmp_path / "expert", {"x": 0, "y": 1})
    with pytest.raises(ValueError, match=r"the tokenizers of .*expert and .*vlm have no token in common$"):
        match(tmp_path, ["embed"])
    assert match(tmp_path, ["attn"]).rows is None


def test_a_reference_counts_too(tmp_path):
    save_pair(tmp_path, "llava")
    save_layout(tiny_llm("llava"), tmp_path / "reference")
    for side, vocabulary in (("vlm", "abc"), ("expert", "cba"), ("reference", "xcb")):
        save_tokenizer(tmp_path / side, {token: row for row, token in enumerate(vocabulary)})
    folders = {"expert": "expert", "base": "vlm", "reference": "reference"}
    sources = {role: Checkpoint(tmp_path / folder) for role, folder in folders.items()}
    assert match_weights(sources, ["attn", "embed"]).rows.tolist() == [[1, 1, 2], [0, 2, 1]]
    edit_tensors(tmp_path / "reference", lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.weight"))
    sources["reference"] = Checkpoint(tmp_path / "reference")
    with pytest.raises(ValueError, match=r"in 1 places: layers.0.mlp.up_proj.weight missing in the reference$"):
        match_weights(sources, ["attn", "mlp"])


def test_no_tokenizer(tmp_path):
    save_pair(tmp_path, "llava")
    save_tokenizer(tmp_path / "vlm", {"a": 0})
    with pytest.raises(ValueError, match=r".*expert holds no tokenizer.* rows of head and embedding") as caught:
        match(tmp_path, ["embed"])
    assert "\n" not in str(caught.value)


def test_a_wrapper_that_is_not_known_is_shown(tmp_path):
    """As older versions of TRL save a model with a value head."""
    save_pair(tmp_path, "llava")
    rename_keys(tmp_path / "expert", lambda key: f"pretrained_model.{key}")
    seen = r"no key of \S+expert is one of its class, such as pretrained_model\.\S+ and pretrained_model\.\S+: save the"
    with pytest.raises(
        ValueError, match=rf"do not match in 14 places: .* missing in the expert.*; {seen} model unwrapped$"
    ):
        match(tmp_path)
    rename_keys(tmp_path / "expert", lambda key: None if "layers.0" in key else key.removeprefix("pretrained_model."))
    with pytest.raises(ValueError, match=r"do not match in 7 places: .* missing in the expert$"):
        match(tmp_path)
