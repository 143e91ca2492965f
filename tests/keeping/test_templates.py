"""What chat templates write around questions and answers: the token that begins a text, an opened thinking, the end."""

import pytest
import torch
from experts import save_folder
from PIL import Image
from tiny_vlm import CHAT, PROCESSORS, tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import GenerationConfig

from drift_peft.keeping import Feed, Vlm, make_answer_set
from drift_peft.keeping.answers import prompts
from drift_peft.keeping.spelling import Spelling

OPENS = "{% if add_generation_prompt %}<think> {% endif %}"  # as templates of models that always think


@pytest.mark.parametrize("written", [True, False])
def test_a_text_begins_once(written):
    """By the template or by the tokenizer, as transformers' own apply_chat_template has it."""
    words = tokenizer(64)
    words._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", words.bos_token_id)])
    make, image = PROCESSORS["gemma3"]
    template = CHAT.replace("IMAGE", image)
    processor = make(words, chat_template=("{{ bos_token }} " if written else "") + template)
    picture = Image.new("RGB", (16, 16))
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "how many ?"}]
    turn = [{"role": "user", "content": content}]
    how = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    expected = processor.apply_chat_template(turn, add_generation_prompt=True, **how)["input_ids"]
    found = prompts(processor, [picture], ["how many ?"])["input_ids"]
    assert found.equal(expected) and (found == words.bos_token_id).sum() == 1


@pytest.fixture
def folder(tmp_path):
    """A VLM whose template and whose expert's both open the thinking, with a token of its own."""
    save_folder(tmp_path)

    def words():
        made = tokenizer(63)
        made.add_tokens(["<think>"])
        return made

    make, image = PROCESSORS["qwen2_5_vl"]
    make(words(), chat_template=CHAT.replace("IMAGE", image) + OPENS).save_pretrained(tmp_path / "base")
    expert = words()
    expert.chat_template = CHAT + OPENS
    expert.save_pretrained(tmp_path / "expert")
    return tmp_path


def test_thinking_is_opened_once(folder):
    vlm = Vlm(folder / "base")
    settings = {"max_new_tokens": 3, "top_k": 4, "progress": False}
    said = make_answer_set(folder / "expert", vlm, ["1 + 2 = ?"], folder / "answers.safetensors", **settings)
    (part,) = Feed(said, vlm.processor, 1, 0).batch(0, 1000)
    opened = vlm.processor.tokenizer.convert_tokens_to_ids("<think>")
    asked = part.inputs["input_ids"][0, : -part.answer_mask.shape[1]].tolist()
    assert asked[-1] == opened and asked.count(opened) == 1
    assert said[0].top_logprobs[0, 0] < -1e-3  # what the expert said: what was laid into its mouth would be certain


@pytest.mark.parametrize(("written", "first"), [(True, 30), (True, 31), (False, 2)])
def test_the_first_end_is_that_of_the_chat(folder, written, first):
    """As Gemma's, whose generation config ends answers at <eos> and at <end_of_turn>, which alone its chats have."""
    vlm = Vlm(folder / "base")
    GenerationConfig(eos_token_id=[2, 30, 31]).save_pretrained(folder / "base")
    end = f" {vlm.processor.tokenizer.convert_ids_to_tokens(first)}" if written else ""
    answer = "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}" + end + " {% endfor %}"
    vlm.processor.chat_template = answer
    assert vlm.ends[0] == first and sorted(vlm.ends) == [2, 30, 31]


def test_a_template_that_takes_no_answers(folder):
    vlm = Vlm(folder / "base")
    GenerationConfig(eos_token_id=[30, 2]).save_pretrained(folder / "base")
    vlm.processor.chat_template = "{% for m in messages if m.role != 'user' %}{{ raise_exception('no') }}{% endfor %}"
    assert vlm.ends == [2, 30]  # the tokenizer's first


def test_an_end_that_is_the_vlms_too_stays_what_it_is():
    expert, base = tokenizer(64), tokenizer(64)
    spelling = Spelling(expert, base, ends=[2, 30, 40], base_ends=[30, 2], rows=64)
    assert [spelling.tokens[end] for end in (2, 30, 40)] == [[2], [30], [30]]
    logits = torch.full((1, 64), -9.0).index_fill(1, torch.tensor([30]), 9.0)
    answer = spelling.answer([30], logits, k=3)
    assert answer["tokens"].tolist() == [30] and answer["top_tokens"][0, 0] == 30
