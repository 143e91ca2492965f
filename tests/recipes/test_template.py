"""What a chat template makes of answers is compared with them before training."""

import json

import datasets
import pytest
from parts.loading import FEATURES, load_messages
from parts.template import check_template
from tiny_vlm import CHAT, PROCESSORS, tokenizer

END, TEXT = "</s>{% endfor %}", "{{ part.text }}"
STRIPPED = CHAT.replace(TEXT, "{{ part.text.split('</think>')[-1] if message.role == 'assistant' else part.text }}")
ANSWER = "<think>\n2 + 3 = 5\n</think>\n\n5"


def processor(template):
    make, image = PROCESSORS["llava_next"]
    return make(tokenizer(), chat_template=template.replace("IMAGE", image))


@pytest.fixture(params=[False, True], ids=["", "streaming"])
def answered(request, tmp_path, monkeypatch):
    """The data set of these answers."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def load(*answers):
        rows = [json.dumps({"question": "how many ?", "answer": answer}) for answer in answers]
        (tmp_path / "a.jsonl").write_text("\n".join(rows))
        return load_messages(tmp_path / "a.jsonl", streaming=request.param)[0]

    return load


@pytest.mark.parametrize("template", [
    CHAT,
    CHAT.replace(TEXT, "{{ part.text | trim }}"),
    CHAT.replace("assistant: {% endif %}", "assistant: <think>\n{% endif %}"),  # opened for the model
    CHAT.replace(END, "</s>\n{% endfor %}"),
    CHAT.replace(END, "<end_of_utterance>{% endfor %}"),  # any special token
])  # fmt: skip
def test_a_template_that_keeps_the_answer_passes(template, answered):
    check_template(answered("5", ANSWER), processor(template))


@pytest.mark.parametrize(("template", "sentence"), [
    (STRIPPED, "“<think> 2 + 3 = 5 </think> 5”, and the chat template makes of it “assistant: 5 </s>”: set chat_templ"),
    (CHAT.replace(TEXT, "{{ part.text.replace('<think>', '') }}"), "template makes of it “assistant: 2 + 3 = 5 </thi"),
    (CHAT.replace(END, "{% endfor %}"), "template writes “assistant: <think> 2 + 3 = 5 </think> 5”, with no token"),
])  # fmt: skip
def test_a_template_that_does_not_is_an_error_that_shows_both(template, sentence, answered):
    with pytest.raises(ValueError) as error:
        check_template(answered(ANSWER), processor(template))
    said = str(error.value)
    assert (
        said.startswith("sample 1 would not be trained as it is written: its answer is “<think> 2 + 3")
        and sentence in said
    )
    check_template(answered(ANSWER), processor(CHAT))


def test_all_samples_are_looked_at():
    def said(role, text):
        return {"role": role, "content": [{"type": "text", "text": text}]}

    turns = [[said("user", "a"), said("assistant", answer)] for answer in ("5", "6", ANSWER)]
    dataset = datasets.Dataset.from_dict({"messages": turns, "images": [[]] * 3}, features=FEATURES)
    with pytest.raises(ValueError, match=r"^sample 3 would not be trained"):
        check_template(dataset, processor(STRIPPED))
