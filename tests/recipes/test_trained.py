"""What an answer is trained as: chains that were cut, end tokens, several answers, turns without one, repeats."""

import chain_files
import pytest
from chain_files import load, processor, save
from parts.layouts import last_answer, read_sample
from parts.loading import REPEATED, load_messages
from parts.template import check_template
from parts.trained import ENDED, SEVERAL, BadSample, as_trained

folder = chain_files.folder  # fixture

CUT, EMPTY = "chain of thought without an end", "chain of thought without an answer"


def messages(*contents):
    turns = [{"role": "assistant" if i % 2 else "user", "content": said} for i, said in enumerate(contents)]
    return read_sample({"messages": turns}).messages


@pytest.mark.parametrize(
    ("answer", "reason"),
    [("<think> 1 + 2 = 3", CUT), ("<think>a</think> so <think> b", CUT), ("<Thinking> 3", CUT), ("◁think▷ 3", CUT),
     ("<think> 1 + 2 = 3 </think>", EMPTY), ("1 + 2 = 3 </think>\n", EMPTY), ("<think>3</think><|im_end|>", EMPTY),
     ("<|im_end|>", "empty answer")],
)  # fmt: skip
def test_a_chain_that_was_cut_is_dropped(answer, reason):
    with pytest.raises(BadSample) as error:
        as_trained(messages("q", answer))
    assert error.value.reason == reason


@pytest.mark.parametrize(
    ("answer", "trained"),
    [("3<|im_end|>", "3"), ("<think>a</think> 3 <|im_end|>\n<|endoftext|>\n", "<think>a</think> 3"), ("3</s>", "3"),
     ("a\n</think>\n\n3<｜end▁of▁sentence｜>", "a\n</think>\n\n3"), ("<|im_end|> ends it", None),
     ("<think>a</think>3\n", None)],
)  # fmt: skip
def test_an_end_token_at_the_end_is_taken_out_and_noted(answer, trained):
    told, noted = as_trained(messages("q", answer))
    assert last_answer(told) == (trained or answer) and noted == [ENDED] * (trained is not None)
    earlier, noted = as_trained(messages("q<|im_end|>", answer, "sure?", "yes"))
    assert last_answer(earlier[:2]) == (trained or answer) and last_answer(earlier[:1]) == "q<|im_end|>"
    assert noted == [SEVERAL] + [ENDED] * (trained is not None)


def test_a_cut_chain_may_still_be_marked():
    assert load_messages(save([{"question": "q", "answer": r"<think>\boxed{3}</think>"}], "a.jsonl"), chains=False)[0]


def test_what_is_done_to_samples_is_counted():
    ask, say = ({"role": role, "content": "a"} for role in ("user", "assistant"))
    rows = [{"messages": turns} for turns in ([ask, say], [ask, say, ask], [ask, say, ask, say], [ask])]
    rows += [{"question": "a", "answer": "a"}, {"question": "a", "answer": "b</s>"}]
    samples, dropped = load(save(rows, "a.jsonl"))  # read as a stream, too, and twice
    assert [len(sample["messages"]) for sample in samples] == [2, 2, 4, 2, 2]
    assert dropped == {"roles out of order": 1}
    left_out = "its last turn has no answer: left out"
    assert dropped.report()["noted"] == {left_out: 1, REPEATED: 2, SEVERAL: 1, ENDED: 1}
    assert (f"kept, {REPEATED}", 2, "sample 2 of a.jsonl") in dropped.rows()


def test_an_end_token_that_the_template_sets_again_is_refused():
    processing = processor()
    processing.tokenizer.add_special_tokens({"additional_special_tokens": ["[END]"]})
    processing.chat_template = "{% for turn in messages %}{{ turn.content[0].text }}[END]{% endfor %}"
    for answer, refused in (("5[END]", True), ("5 [END] 6", False)):
        dataset, _ = load_messages(save([{"question": "a", "answer": answer}], "a.jsonl"))
        if not refused:
            check_template(dataset, processing)
            continue
        with pytest.raises(ValueError, match=r"“5\[END\]”, and the chat template ends it too: take \[END\] out of the"):
            check_template(dataset, processing)
