"""promised.py: an adapter whose file lacks what its config promises is refused by name, and no other is."""

import sys
import warnings

import pytest
from merging import edit_config, edit_weights, merge, save_adapter
from older import saves_biases, ties_weights
from peft import LoraConfig, get_peft_model
from tiny import rename_keys, save_layout, tiny_llm, tiny_vlm

from drift_peft import transplant
from drift_peft.checkpoints import export_for_vllm, language_model_targets

BIASED = {"attention_bias": True, "tie_word_embeddings": False}
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


def saved(folder, model, **settings):
    """The base and an adapter of it with all parts moved."""
    save_layout(model, folder / "base")
    model.name_or_path = str(folder / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(model, LoraConfig(**{**LORA, **settings}))
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter.data += 0.05
        wrapped.save_pretrained(folder / "adapter")


def lose(folder, *parts):
    """Delete the tensors whose names hold all of these from the adapter's file."""

    def change(tensors):
        lost = [key for key in tensors if all(part in key for part in parts)]
        assert lost and len(lost) < len(tensors)
        for key in lost:
            del tensors[key]

    edit_weights(folder / "adapter", change)


LOST = {
    "a head": ({"modules_to_save": ["lm_head"]}, ["lm_head"], r"lm_head\.weight, which modules_to_save in .*take what"),
    "a norm": ({"modules_to_save": ["norm"]}, ["model.norm"], r"model\.norm\.weight, which modules_to_save in"),
    "the norms of a layer": (
        {"modules_to_save": ["norm"]},
        ["layers.0", "layernorm"],
        r"layers\.0\.input_layernorm\.weight and 1 more, which modules_to_save in",
    ),
    "all biases": ({"bias": "all"}, ["bias"], r"q_proj\.bias and 7 more, which bias in"),
    "a bias": ({"bias": "all"}, ["layers.1.self_attn.o_proj.bias"], r"o_proj\.bias, which bias in .* again$"),
    "a layer": (
        {},
        ["layers.1"],
        r"model\.layers\.1\.self_attn\.q_proj\.weight and 1 more, which target_modules in .* in exclude_modules there$",
    ),
    "a layer of a pattern": (
        {"target_modules": r".*layers\.[01]\.mlp\.up_proj"},
        ["layers.0"],
        r"layers\.0\.mlp\.up_p",
    ),
    "a layer of all": ({"target_modules": "all-linear"}, ["layers.0"], r"layers\.0\.self_attn\.q_proj\.weight and 6"),
    "an embedding": (
        {"target_modules": ["embed_tokens", "q_proj"]},
        ["lora_embedding"],
        r"model\.embed_tokens\.weight",
    ),
    "tokens": ({"trainable_token_indices": [3, 9]}, ["trainable_tokens"], r"embed_tokens\.weight, which trainable_tok"),
}


@pytest.mark.parametrize("case", LOST)
def test_what_the_config_promises_is_missed(tmp_path, case):
    settings, parts, said = LOST[case]
    saved(tmp_path, tiny_llm("llava", **BIASED), **settings)
    merge(tmp_path)
    lose(tmp_path, *parts)
    with pytest.raises(ValueError, match=rf"^adapter \S+ lacks \S*{said}"):
        merge(tmp_path, overwrite=True)


PARTS = {
    "norms of dora": (
        {"use_dora": True},
        "magnitude",
        r"of model\.layers\.0\.self_attn\.q_proj, without lora_magnitude",
    ),
    "a bias of the adapter": (
        {"lora_bias": True},
        "lora_B.bias",
        r"of .*q_proj, without lora_B\.bias: save the adapter",
    ),
    "rows": ({"trainable_token_indices": [3, 9]}, None, r"holds 1 rows of \S+, and trainable_token_indices .* names 2"),
}


@pytest.mark.parametrize("case", PARTS)
def test_a_part_of_a_module_is_missed(tmp_path, case):
    settings, part, said = PARTS[case]
    saved(tmp_path, tiny_llm("llava", **BIASED), **settings)
    if part:
        lose(tmp_path, "layers.0.self_attn.q_proj", part)
    else:
        edit_weights(
            tmp_path / "adapter", lambda tensors: tensors.update({k: t[:1] for k, t in tensors.items() if "tok" in k})
        )
    with pytest.raises(ValueError, match=said):
        merge(tmp_path)


@saves_biases
def test_one_of_the_biases_beside_factors_is_missed(tmp_path):
    saved(tmp_path, tiny_llm("llava", **BIASED), bias="lora_only")
    lose(tmp_path, "layers.0.self_attn.v_proj", "bias")
    with pytest.raises(ValueError, match=r"lacks model\.layers\.0\.self_attn\.v_proj\.bias, which bias in"):
        merge(tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        {"megatron_config": {"hidden_size": 64}, "megatron_core": "this"},
        {"rank_pattern": None, "alpha_pattern": None},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_fields_that_name_no_tensor_change_no_promise(tmp_path, fields):
    saved(tmp_path, tiny_llm("llava", **BIASED))
    edit_config(tmp_path / "adapter", **fields)
    assert merge(tmp_path).modules
    lose(tmp_path, "layers.1")
    with pytest.raises(ValueError, match="which target_modules in"):
        merge(tmp_path, overwrite=True)
    assert "this" not in sys.modules  # a file imports nothing


def test_a_way_of_saying_that_it_was_on_purpose(tmp_path):
    saved(tmp_path, tiny_llm("llava", **BIASED), modules_to_save=["lm_head", "norm"])
    lose(tmp_path, "layers.1", "lora")
    lose(tmp_path, "lm_head")
    edit_config(tmp_path / "adapter", exclude_modules=r".*layers\.1.*", modules_to_save=["norm"])
    assert merge(tmp_path).modules == 2 + 5


WHOLE = {
    "layers to transform": {"layers_to_transform": [1]},
    "a pattern of layers": {"layers_to_transform": 1, "layers_pattern": "layers"},
    "excluded modules": {"exclude_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
    "patterns of ranks": {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "use_rslora": True},
    "all biases": {"bias": "all"},
    "an expression": {"target_modules": r".*language_model.*\.(q_proj|up_proj)"},
    "all that is linear": {"target_modules": "all-linear"},
    "tokens": {"trainable_token_indices": [3, 9]},
    "a projector": {"modules_to_save": ["multi_modal_projector"], "target_modules": ["fc1", "q_proj"]},
    "dora": {"use_dora": True},
}


@pytest.mark.parametrize("case", WHOLE)
def test_what_is_whole_is_taken(tmp_path, case):
    saved(tmp_path, tiny_vlm("llava"), **WHOLE[case])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert merge(tmp_path).modules


@pytest.mark.parametrize(
    "settings",
    [
        {"trainable_token_indices": [3]},
        pytest.param({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, marks=ties_weights),
        pytest.param({"target_modules": ["lm_head", "embed_tokens"], "ensure_weight_tying": True}, marks=ties_weights),
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_a_tied_head_is_not_missed(tmp_path, settings):
    saved(tmp_path, tiny_llm("llava", tie_word_embeddings=True), **settings)
    assert merge(tmp_path).modules


def other_names(key):
    """As transformers before 4.52 named them, and what it called the tower then."""
    return key.replace("model.model.language_model.", "model.language_model.model.").replace(
        "model.model.vision_tower.", "model.vision_tower."
    )


def test_an_adapter_under_other_names(tmp_path):
    saved(tmp_path, tiny_vlm("llava"), modules_to_save=["lm_head"])
    rename_keys(tmp_path / "adapter", other_names)
    assert merge(tmp_path).modules == 7
    expression = r"language_model\.model\.layers\.\d\.self_attn\.[qv]_proj|vision_tower.*(q_proj|v_proj)"
    edit_config(tmp_path / "adapter", target_modules=expression)
    assert merge(tmp_path, overwrite=True).modules == 7
    lose(tmp_path, "lm_head")
    with pytest.raises(ValueError, match=r"lacks lm_head\.weight, which modules_to_save"):
        merge(tmp_path, overwrite=True)
    edit_config(tmp_path / "adapter", target_modules=LORA["target_modules"], modules_to_save=None)
    lose(tmp_path, "layers.1", "language_model")
    with pytest.raises(
        ValueError, match=r"lacks model\.language_model\.layers\.1\.self_attn\.q_proj\.weight and 1 more"
    ):
        merge(tmp_path, overwrite=True)


def test_an_adapter_of_the_text_class_lacks_no_tower(tmp_path):
    """Its q_proj is a module of the VLM's tower, too."""
    save_adapter(tmp_path / "adapter", **LORA)
    save_layout(tiny_vlm("llava"), tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert merge(tmp_path, force=True).modules == 4
        transplant(tmp_path / "adapter", tmp_path / "base", tmp_path / "out", progress=False)
    lose(tmp_path, "layers.1.self_attn.q_proj")
    for call in (
        lambda: merge(tmp_path, force=True, overwrite=True),
        lambda: transplant(tmp_path / "adapter", tmp_path / "base", tmp_path / "other", progress=False),
    ):
        with pytest.raises(
            ValueError, match=r"lacks model\.language_model\.layers\.1\.self_attn\.q_proj\.weight, which"
        ):
            call()
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("exclude", [r"model\.layers\.0\..*", ["model.layers.0.self_attn.q_proj"]])
def test_what_is_excluded_by_other_names_is_not_missed(tmp_path, exclude):
    """Those of the text sibling, whose adapter a VLM is given."""
    saved(tmp_path, tiny_llm("llava"), exclude_modules=exclude)
    save_layout(tiny_vlm("llava"), tmp_path / "vlm")
    report = transplant(tmp_path / "adapter", tmp_path / "vlm", tmp_path / "out", progress=False)
    assert report.modules == (2 if isinstance(exclude, str) else 3)


@pytest.mark.parametrize("bias", ["none", pytest.param("lora_only", marks=saves_biases)])
def test_a_tower_that_was_never_adapted_is_a_warning(tmp_path, bias):
    """As other tools write it: a list of names that the tower has, too."""
    saved(tmp_path, tiny_vlm("llava"), bias=bias)
    lose(tmp_path, "vision_tower")
    with pytest.warns(
        UserWarning, match=r"language model alone, and .* hit [24] modules beside it, such as model\.vision"
    ):
        assert merge(tmp_path).modules == 4


def test_all_linear_as_others_write_it(tmp_path):
    """PEFT writes what it found instead."""
    saved(tmp_path, tiny_llm("llava"))
    edit_config(tmp_path / "adapter", target_modules="all-linear")
    assert merge(tmp_path).modules == 4
    lose(tmp_path, "layers.1")
    with pytest.raises(ValueError, match=r"lacks .* and 1 more, which target_modules"):
        merge(tmp_path, overwrite=True)


@pytest.mark.parametrize("settings, parts", [({}, ["layers.0"]), ({"modules_to_save": ["lm_head"]}, ["lm_head"])])
def test_vllm_is_given_no_part_of_an_adapter(tmp_path, settings, parts):
    model = tiny_vlm("llava")
    saved(tmp_path, model, **{"target_modules": language_model_targets(model), **settings})
    lose(tmp_path, *parts)
    with pytest.raises(ValueError, match=rf"lacks \S*{parts[0]}\S*( and 6 more)?, which"):
        export_for_vllm(tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("targets", [r"language_model\.model\..*(q_proj|v_proj)", ["q_proj", "v_proj"]], ids=type)
def test_trained_tokens_beside_names_of_another_version(tmp_path, targets):
    """What the config matches is then asked of the modules that have factors, and the embedding has none."""
    own = r"model\.language_model\..*(q_proj|v_proj)"
    saved(tmp_path, tiny_vlm("llava"), target_modules=own, trainable_token_indices=[3, 9])
    more = {} if isinstance(targets, str) else {"exclude_modules": r"vision_tower\..*"}
    edit_config(tmp_path / "adapter", target_modules=targets, **more)
    rename_keys(
        tmp_path / "adapter", lambda key: key.replace("model.model.language_model", "model.language_model.model")
    )
    assert merge(tmp_path).modules == 5
    lose(tmp_path, "layers.0.self_attn.q_proj")
    edit_config(tmp_path / "adapter", modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match=r"lacks lm_head\.weight, which modules_to_save in"):
        merge(tmp_path, overwrite=True)
