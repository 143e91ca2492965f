"""Which tokenizer and chat template a merged folder has: the base's, or the adapter's as a whole."""

import json

import pytest
from merging import edit_config, merge
from test_merge_adapters import trained
from tiny import save_layout, save_tokenizer, tiny_llm
from transformers import AutoTokenizer

from drift_peft.checkpoints.checkpoint import Checkpoint

CONFIG = "tokenizer_config.json"


@pytest.mark.parametrize(
    "how",
    [
        {"trainable_token_indices": [60]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["embed_tokens"]},
    ],
    ids=lambda how: next(iter(how)),
)
def test_trained_tokens_bring_their_tokenizer(tmp_path, how):
    save_layout(tiny_llm("llava"), tmp_path / "base")
    save_tokenizer(tmp_path / "base", {"a": 0, "b": 1})
    trained(tmp_path / "adapter", tiny_llm("llava"), **{"target_modules": ["q_proj"], **how})
    merge(tmp_path)
    assert Checkpoint(tmp_path / "merged").vocabulary() == {"a": 0, "b": 1}
    save_tokenizer(tmp_path / "adapter", {"a": 0, "b": 1, "<think>": 60})
    (tmp_path / "adapter" / "added_tokens.json").write_text('{"<think>": 60}')  # as older ones keep it
    merge(tmp_path, overwrite=True)
    assert Checkpoint(tmp_path / "merged").vocabulary()["<think>"] == 60
    assert (tmp_path / "merged" / "added_tokens.json").read_text() == '{"<think>": 60}'


def save_pair(tmp_path, **settings):
    save_layout(tiny_llm("llava"), tmp_path / "base")
    save_tokenizer(tmp_path / "base", {"a": 0, "b": 1, "c": 2})
    edit_config(tmp_path / "base", CONFIG, eos_token="b", chat_template="of the base")  # in there, as on the hub
    trained(tmp_path / "adapter", tiny_llm("llava"), target_modules=["q_proj"], **settings)


def test_the_adapter_s_tokenizer_replaces_all_of_the_base_s(tmp_path):
    save_pair(tmp_path, modules_to_save=["lm_head"])
    base, adapter, merged = (tmp_path / name for name in ("base", "adapter", "merged"))
    (base / "special_tokens_map.json").write_text('{"eos_token": "b"}')  # as older versions of transformers left it
    (base / "added_tokens.json").write_text('{"<old>": 2}')
    (base / "tokenizer.model").touch()
    save_tokenizer(adapter, {"a": 0, "b": 1, "<end>": 2})
    edit_config(adapter, CONFIG, eos_token="<end>")
    merge(tmp_path)
    found = AutoTokenizer.from_pretrained(merged)
    assert (found.eos_token, found.get_vocab()["<end>"], "<old>" in found.get_vocab()) == ("<end>", 2, False)
    assert not {"special_tokens_map.json", "added_tokens.json", "tokenizer.model"} & {f.name for f in merged.iterdir()}
    assert found.chat_template == "of the base"  # the adapter has none

    (adapter / "chat_template.jinja").write_text("of the adapter")
    (adapter / "additional_chat_templates").mkdir()
    (adapter / "additional_chat_templates" / "tools.jinja").write_text("of tools")
    (base / "chat_template.json").write_text('{"chat_template": "of the processor"}')
    merge(tmp_path, overwrite=True)
    templates = {"default": "of the adapter", "tools": "of tools"}
    assert AutoTokenizer.from_pretrained(merged).chat_template == templates
    assert not (merged / "chat_template.json").exists()  # which a processor would prefer


def test_another_chat_template_than_the_merged_folder_s_is_named(tmp_path, recwarn):
    save_pair(tmp_path)
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    save_tokenizer(adapter, {"a": 0})
    (adapter / "chat_template.jinja").write_text("of the base\n")
    merge(tmp_path)
    edit_config(base, CONFIG, chat_template=[{"name": "default", "template": "of the base"}])
    merge(tmp_path, overwrite=True)
    assert not [w for w in recwarn if "chat template" in str(w.message)]
    (adapter / "chat_template.jinja").write_text("of the adapter")
    with pytest.warns(UserWarning, match=r"another chat template than base .*, and the merged folder has the base's"):
        merge(tmp_path, overwrite=True)
    assert json.loads((tmp_path / "merged" / CONFIG).read_text())["chat_template"][0]["template"] == "of the base"
    (adapter / CONFIG).write_text('{"chat_template": 3}')
    with pytest.raises(ValueError, match=r"tokenizer_config.json has a chat template of another form .*, got 3"):
        merge(tmp_path, overwrite=True)
