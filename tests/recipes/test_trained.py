"""What an answer is trained as: chains that were cut, end tokens, several answers, turns without one, repeats."""

import time

import chain_files
import pytest
from chain_files import load, processor, save
from parts.arguments import RunArguments
from parts.layouts import last_answer, read_sample
from parts.loading import REPEATED, load_messages
from parts.template import check_template
from parts.trained import ENDED, SEVERAL, BadSample, as_trained
from parts.training_data import load_data

folder = chain_files.folder  # fixture

CUT, EMPTY = "chain of thought without an end", "chain of thought without an answer"


def messages(*contents):
    turns = [{"role": "assistant" if i % 2 else "user", "content": said} for i, said in enumerate(contents)]
    return read_sample({"messages": turns}).messages


@pytest.mark.parametrize(
    ("answer", "reason"),
    [("<think> 1 + 2 = 3", CUT), ("<think>a</think>\n<think> b", CUT), ("<Thinking> 3", CUT), ("◁think▷ 3", CUT),
     (" <think> 3", CUT), ("a\n</think>\n<think> b", CUT), ("<think> 1 + 2 = 3 </think>", EMPTY),
     ("1 + 2 = 3\n</think>\n", EMPTY), ("</think>", EMPTY), ("<think>3</think><|im_end|>", EMPTY),
     ("<think>a</think> <think>b</think>", EMPTY), ("<|im_end|>", "empty answer")],
)  # fmt: skip
def test_a_chain_that_was_cut_is_dropped(answer, reason):
    with pytest.raises(BadSample) as error:
        as_trained(messages("q", answer))
    assert error.value.reason == reason


@pytest.mark.parametrize(
    "answer",
    ["<answer>B</answer>\n<reasoning>It is so.</reasoning>", "B\n<think>It is so.</think>", "B <think> it is",
     r"<think>so \boxed{5}</think>", "a\n</think>\n\n\\boxed{5}", "<think>b</think> 5 <think>check</think>",
     "In HTML, `<reasoning>` is no tag", "`<think>` opens a chain", "<think>a</think> The tag is called <think>.",
     "The closing tag is </think>", "<think>a</think> The closing tag is </think>",
     "Write <thought> so: <thought>x</thought>", "<think>a</think> so <think> b"],
)  # fmt: skip
def test_an_answer_may_stand_before_its_chain_or_in_it_or_be_about_tags(answer):
    assert as_trained(messages("q", answer)) == (messages("q", answer), [])


def test_many_tags_and_much_white_space_take_no_time():
    start = time.perf_counter()
    as_trained(messages("q", "5" + " " * 200_000 + "6"))
    as_trained(messages("q", "5" + "<|im_end|>" * 50_000))
    for tags in ("<think>" * 50_000, "</think>" + "<think>" * 50_000, "<think>" + "</think>" * 50_000):
        with pytest.raises(BadSample, match="chain of thought"):
            as_trained(messages("q", tags))
    assert time.perf_counter() - start < 10


R1 = "<｜end▁of▁sentence｜>"


@pytest.mark.parametrize(
    ("answer", "special", "trained"),
    [("3<|im_end|>", (), "3"), ("<think>a</think> 3<|im_end|>\n<|endoftext|>\n", (), "<think>a</think> 3"),
     (f"a\n</think>\n\n3{R1}", (), "a\n</think>\n\n3"), ("3<|im_end|>", ("</s>",), "3"), ("3 </s>\n", ("</s>",), "3"),
     ("3 <|im_end|>\n<|endoftext|>", ("<|im_end|>", "<|endoftext|>"), "3"), ("3<|end|>", ("<|end|>",), "3"),
     ("<|im_end|> ends it", ("<|im_end|>",), None), ("<think>a</think>3\n", (), None),
     ("<a>5</a><s>4</s>", (), None), ("<a>5</a><s>4</s>", ("<|im_end|>",), None), ("it is called<pad>", (), None),
     ("3 <|im_end|></s>", ("</s>",), None), ("the end token is <|im_end|>", (), None), ("3[END]", ("[END]",), None)],
)  # fmt: skip
def test_an_end_token_at_the_end_is_taken_out_and_noted(answer, special, trained):
    cleaned, noted = as_trained(messages("q", answer), special)
    assert last_answer(cleaned) == (trained or answer) and noted == [ENDED] * (trained is not None)
    earlier, noted = as_trained(messages("q<|im_end|>", answer, "sure?", "yes"), special)
    assert last_answer(earlier[:2]) == (trained or answer) and last_answer(earlier[:1]) == "q<|im_end|>"
    assert noted == [SEVERAL] + [ENDED] * (trained is not None)


def test_a_run_takes_out_the_end_tokens_of_its_base():
    processing = processor()
    run = RunArguments("b", method="sft", data=save([{"question": "q", "answer": "4 <|return|>"}], "a.jsonl"))
    assert last_answer(load_data(run, processing)[0][0]["messages"]) == "4 <|return|>"
    processing.tokenizer.add_special_tokens({"additional_special_tokens": ["<|return|>"]})
    dataset, data = load_data(run, processing)
    assert last_answer(dataset[0]["messages"]) == "4" and data["noted"] == {ENDED: 1}


def test_a_cut_chain_may_still_be_marked():
    assert load_messages(save([{"question": "q", "answer": r"<think>\boxed{3}</think>"}], "a.jsonl"), chains=False)[0]


def test_what_is_done_to_samples_is_counted():
    ask, say = ({"role": role, "content": "a"} for role in ("user", "assistant"))
    rows = [{"messages": turns} for turns in ([ask, say], [ask, say, ask], [ask, say, ask, say], [ask])]
    rows += [{"question": "a", "answer": "a"}, {"question": "a", "answer": "b<|im_end|>"}]
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
