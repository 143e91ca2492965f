"""Which tokenizer and chat template a merged folder has: the base's, or the adapter's as a whole."""

import json
import re

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


def put(folder, **files):
    """Files by what they are called before the dot: a text, or what is written as JSON."""
    for name, content in files.items():
        end = "jinja" if name == "chat_template" and isinstance(content, str) else "json"
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"{name}.{end}").write_bytes(text.encode())


TEMPLATE = "line one\r\nline two"


@pytest.mark.parametrize(
    ("of_the_base", "of_the_adapter"),
    [
        ({"chat_template": {"chat_template": TEMPLATE}}, {"chat_template": TEMPLATE}),
        ({"chat_template": TEMPLATE}, {"tokenizer_config": {"chat_template": TEMPLATE}}),
        ({"chat_template": TEMPLATE}, {"tokenizer_config": {"chat_template": TEMPLATE.replace("\r", "")}}),
        ({"tokenizer_config": {"chat_template": TEMPLATE}}, {"chat_template": TEMPLATE.replace("\n", "")}),
        ({"processor_config": {"chat_template": TEMPLATE}}, {"chat_template": TEMPLATE}),
        ({"chat_template": TEMPLATE}, {"processor_config": {"chat_template": TEMPLATE}}),
        ({"chat_template": TEMPLATE}, {"tokenizer_config": {"chat_template": {"default": TEMPLATE}}}),
    ],
)
def test_the_same_chat_template_is_known_in_each_place(tmp_path, recwarn, of_the_base, of_the_adapter):
    save_pair(tmp_path)
    put(tmp_path / "base", **{"tokenizer_config": {}, **of_the_base})
    put(tmp_path / "adapter", **of_the_adapter)
    merge(tmp_path)
    assert not [w for w in recwarn if "chat template" in str(w.message)]
    put(tmp_path / "base", **{name: json.loads(json.dumps(c).replace("one", "1")) for name, c in of_the_base.items()})
    with pytest.warns(UserWarning, match="another chat template than base"):
        merge(tmp_path, overwrite=True)


@pytest.mark.parametrize("whose", ["base", "adapter"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"chat_template": 3}', "has a chat template of another form (chat_template should be a text, got 3)"),
        (
            '{"chat_template": [{"name": "a"}]}',
            "has a chat template of another form (chat_template should be a text, got",
        ),
        ("[]", "has a chat template of another form (it should be a valid dictionary, got []"),
        ('{"chat_template', "is no valid JSON, so it may be truncated"),
    ],
)
def test_a_chat_template_that_cannot_be_read_stops_only_who_takes_it(tmp_path, whose, content, message):
    save_pair(tmp_path)
    put(tmp_path / "adapter", chat_template="of the adapter")
    put(tmp_path / whose, tokenizer_config=content)
    match = re.escape(f"of base {tmp_path / 'base'} was not compared: ") + f".*{CONFIG} " + re.escape(message)
    with pytest.warns(UserWarning, match=match):
        merge(tmp_path)
    assert (tmp_path / "merged" / CONFIG).read_text() == (tmp_path / "base" / CONFIG).read_text()
    trained(tmp_path / "adapter", tiny_llm("llava"), target_modules=["q_proj"], modules_to_save=["lm_head"])
    put(tmp_path / "adapter", tokenizer={})
    with pytest.raises(ValueError, match=f"{CONFIG} {re.escape(message)}"):
        merge(tmp_path, overwrite=True)


def test_templates_that_the_base_has_too_stay_where_they_are(tmp_path):
    """A processor's own among them, when the vocabulary beside them is the adapter's."""
    save_pair(tmp_path, modules_to_save=["lm_head"])
    base, adapter, merged = (tmp_path / name for name in ("base", "adapter", "merged"))
    put(base, chat_template={"chat_template": "of the processor"}, processor_config={"chat_template": "of both"})
    save_tokenizer(adapter, {"a": 0, "<end>": 1})
    put(adapter, chat_template="of the base\n")
    merge(tmp_path)
    for name in ("chat_template.json", "processor_config.json"):
        assert (merged / name).read_bytes() == (base / name).read_bytes()
    assert json.loads((merged / CONFIG).read_text())["chat_template"] == "of the base"
    assert not (merged / "chat_template.jinja").exists()
    assert Checkpoint(merged).vocabulary() == {"a": 0, "<end>": 1}
    put(base, tokenizer_config={}, chat_template="of the base")
    edit_config(adapter, CONFIG, chat_template="of the base")
    merge(tmp_path, overwrite=True)
    assert "chat_template" not in json.loads((merged / CONFIG).read_text())

    put(adapter, chat_template="of the adapter")
    merge(tmp_path, overwrite=True)
    assert (merged / "chat_template.jinja").read_text() == "of the adapter"
    assert json.loads((merged / "processor_config.json").read_text()) == {}  # a processor would prefer the base's there
    assert not (merged / "chat_template.json").exists()
    (adapter / "chat_template.jinja").unlink()
    put(adapter, processor_config={"chat_template": "of its processor"})
    merge(tmp_path, overwrite=True)
    assert json.loads((merged / "processor_config.json").read_text()) == {"chat_template": "of its processor"}


@pytest.mark.parametrize("name", ["tekken.json", "source.spm", "merges.bpe"])
def test_no_vocabulary_of_the_base_stays_beside_the_adapter_s(tmp_path, name):
    save_pair(tmp_path, modules_to_save=["lm_head"])
    (tmp_path / "base" / name).write_text("of the base")
    save_tokenizer(tmp_path / "adapter", {"a": 0})
    merge(tmp_path)
    assert not (tmp_path / "merged" / name).exists()
    (tmp_path / "adapter" / name).write_text("of the adapter")
    merge(tmp_path, overwrite=True)
    assert (tmp_path / "merged" / name).read_text() == "of the adapter"


def test_tekken_alone_is_a_tokenizer(tmp_path):
    save_pair(tmp_path, modules_to_save=["lm_head"])
    (tmp_path / "adapter" / "tekken.json").write_text("of the adapter")
    merge(tmp_path)
    assert (tmp_path / "merged" / "tekken.json").read_text() == "of the adapter"
    assert not (tmp_path / "merged" / "tokenizer.json").exists()
