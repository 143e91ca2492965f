"""An expert's own answers in text, in the VLM's tokens: against its own logits, across tokenizers, and interrupted."""

import shutil

import experts
import pytest
import torch
import transformers as tf
from keep_sets import PLACES
from omni import qwen2_5_omni, qwen3_omni
from tiny import tiny_vlm
from tiny_vlm import ASKED, CHAT, tokenizer
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

from drift_peft.keeping import Feed, Vlm, make_answer_set
from drift_peft.keeping import make as batches
from drift_peft.keeping.answer_set import AnswerSet
from drift_peft.keeping.answers import answer_logits, append_answers, prompts, to_model_device
from drift_peft.keeping.expert import Expert, read_texts
from drift_peft.keeping.spelling import Spelling


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = experts.save_folder(tmp_path_factory.mktemp("expert"))
    make(folder, folder / "answers.safetensors")
    return folder


def make(folder, output, texts=experts.PROMPTS, **changes):
    return make_answer_set(folder / "expert", Vlm(folder / "base"), texts, output, **experts.SETTINGS | changes)


def asked(prompt):
    return f"user:  {prompt} </s>assistant: "


def test_answers_are_the_experts_own(folder):
    """Greedy, one prompt at a time in fp64, with its own probabilities."""
    found = AnswerSet.load(folder / "answers.safetensors")
    model = tf.AutoModelForCausalLM.from_pretrained(folder / "expert").double().eval()
    words = tf.AutoTokenizer.from_pretrained(folder / "expert")
    lengths = set()
    assert len(found) == 5 and [sample.question for sample in found] == experts.PROMPTS
    for sample in found:
        ids = words(asked(sample.question), return_tensors="pt", add_special_tokens=False).input_ids
        tokens = model.generate(ids, max_new_tokens=6, do_sample=False)[:, ids.shape[1] :]
        logits = model(torch.cat([ids, tokens], 1)).logits[0, ids.shape[1] - 1 : -1]
        top = torch.softmax(logits, -1).topk(5)
        assert sample.tokens.tolist() == tokens[0].tolist() and sample.image is None
        assert sample.top_tokens.equal(top.indices)
        torch.testing.assert_close(sample.top_logprobs.double(), top.values.log(), atol=1e-4, rtol=0)
        lengths.add(tokens.shape[1])
    assert len(lengths) > 1


def test_a_feed_reads_them_as_the_vlm_is_asked(folder):
    found, processor = AnswerSet.load(folder / "answers.safetensors"), Vlm(folder / "base").processor
    found.check(processor)
    (part,) = Feed(found, processor, 2, 0).read(0, 10**6)
    for row, mask, i in zip(part.inputs["input_ids"], part.inputs["attention_mask"], [0, 1], strict=True):
        sample = found[Feed(found, processor, 2, 0).indices(0)[i]]
        ids = processor.tokenizer(asked(sample.question)).input_ids
        assert row[mask.bool()].tolist() == [*ids, *sample.tokens.tolist()]
    assert "pixel_values" not in part.inputs and len(part.top_tokens) == int(part.answer_mask.sum())


@pytest.mark.parametrize("family", PLACES)
def test_text_alone_is_what_every_family_takes(family):
    """In a batch with a longer one as alone, in train mode too."""
    processor, image = ASKED[family]
    processor, model = processor(tokenizer(64), chat_template=CHAT.replace("IMAGE", image)), tiny_vlm(family).train()
    logits = []
    for questions in (["7"], ["7", "1 + 2 = ? how many"]):
        inputs = prompts(processor, [None] * len(questions), questions)
        whole, said = append_answers(inputs, [torch.tensor([9, 10])] * len(questions), 0)
        logits.append(answer_logits(model, to_model_device(whole, model), said.shape[1])[0])
    torch.testing.assert_close(*logits, atol=1e-5, rtol=0)


def test_logits_are_those_of_the_answers_places_in_one_product():
    """A slice of the hidden states would have a frozen lm_head copied for each sample on a CPU."""
    model, blocks = tiny_vlm("qwen2_5_vl").eval(), []
    model.lm_head.register_forward_pre_hook(lambda _, given: blocks.append((given[0].shape, given[0].is_contiguous())))
    inputs = {"input_ids": torch.randint(10, 60, (3, 12), generator=torch.Generator().manual_seed(0))}
    part, whole = answer_logits(model, inputs, 4), model(**inputs).logits
    assert blocks[0] == ((3, 5, model.lm_head.in_features), True)
    torch.testing.assert_close(part, whole[:, -5:-1])


@pytest.mark.parametrize("make", [qwen2_5_omni, qwen3_omni])
def test_a_model_that_gives_all_logits_is_cut(make):
    thinker = make()[0].thinker.eval()
    inputs = {"input_ids": torch.randint(10, 60, (2, 9), generator=torch.Generator().manual_seed(0))}
    with torch.no_grad():
        assert thinker(**inputs, logits_to_keep=3).logits.shape[1] == 9
        torch.testing.assert_close(answer_logits(thinker, inputs, 3), thinker(**inputs).logits[:, -4:-1])


# Tokens of another tokenizer


def letters(*special):
    """A tokenizer of single letters, in whose vocabulary these come first."""
    words = {word: i for i, word in enumerate([*special, *"abcdefghijklmnopqrstuvwxyz<>/ "])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="a"))
    tokenizer.pre_tokenizer = Split(Regex("."), "isolated")
    return tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0], pad_token=special[0])


def test_what_has_no_counterpart_is_spelled():
    expert, base = letters("<end>", "</think>"), letters("<stop>", "<other>", "<third>")
    theirs, ours = expert.get_vocab(), base.get_vocab()
    spelling = Spelling(expert, base, [theirs["<end>"]], [ours["<stop>"]], rows=40)
    logits = torch.randn(3, 36, generator=torch.Generator().manual_seed(0))  # with rows beyond the vocabulary
    said = [theirs[token] for token in ("x", "</think>", "<end>")]
    answer = spelling.answer(said, logits, k=40, opened="<think> ")
    words = "<think> x</think>"
    assert answer["tokens"].tolist() == [ours[letter] for letter in words] + [ours["<stop>"]]
    p = torch.zeros(len(answer["tokens"]), 40).scatter(1, answer["top_tokens"], answer["top_logprobs"].exp())
    q = torch.softmax(logits, -1)
    for place, row in ((8, 0), (9, 1), (17, 2)):  # x, the first letter of </think>, the end
        expected = torch.zeros(40)
        for token, here in theirs.items():
            expected[ours[{"<end>": "<stop>", "</think>": "<"}.get(token, token)]] += q[row, here]
        torch.testing.assert_close(p[place], expected)
    certain = [i for i in range(18) if i not in (8, 9, 17)]
    assert p[certain, answer["tokens"][certain]].allclose(torch.ones(len(certain)))
    assert answer["top_logprobs"].isfinite().all() and (answer["top_logprobs"].diff(dim=1) <= 0).all()
    assert all(len(set(row)) == 40 for row in answer["top_tokens"].tolist())


def test_another_language_is_refused():
    other = letters("<end>", *(f"word{i}" for i in range(9)))
    with pytest.raises(ValueError, match=r"only \d\d% of the expert's tokens are tokens of the base too"):
        Spelling(other, letters("<end>"), [0], [0], rows=40)


# What a chat template makes of a prompt


def test_prompts_reach_the_expert(folder, monkeypatch):
    expert = Expert(folder / "expert")
    assert expert.asked("1 + 2") == asked("1 + 2")  # a template that wants a list of parts
    expert.tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"  # one that wants text
    assert expert.asked("1 + 2") == "<1 + 2>"
    expert.tokenizer.chat_template = "{% for m in messages %}nothing{% endfor %}"
    with pytest.raises(ValueError, match=r"the chat template of .* leaves out a prompt: '1 \+ 2'"):
        expert.asked("1 + 2")


def test_what_is_laid_into_its_mouth_is_part_of_the_answer(folder, tmp_path):
    vlm, expert = Vlm(folder / "base"), Expert(folder / "expert")
    expert.tokenizer.chat_template = CHAT.replace("assistant: ", "assistant: <think> ")
    spelling = Spelling(expert.tokenizer, vlm.processor.tokenizer, [2], [2], 64)
    (answer,) = expert.answer(["1 + 2"], 3, spelling, 5)
    opened = vlm.processor.tokenizer("<think>").input_ids
    assert answer["tokens"][: len(opened)].tolist() == opened
    assert answer["top_logprobs"][: len(opened), 0].tolist() == [0.0] * len(opened)


# Files and interruptions


def test_goes_on_with_what_is_missing_and_is_taken_again(folder, tmp_path, monkeypatch):
    output, keep, count = tmp_path / "a.safetensors", batches.finish, iter(range(10))
    with monkeypatch.context() as patch:

        def kept(*args):
            if next(count) == 2:
                raise KeyboardInterrupt
            keep(*args)

        patch.setattr(batches, "finish", kept)
        with pytest.raises(KeyboardInterrupt) as caught:
            make(folder, output)
    assert "keeps the 2 batches that are done" in caught.value.__notes__[0] and not output.exists()
    with pytest.raises(FileExistsError, match="an interrupted build that differs in k "):
        make(folder, output, top_k=4)
    shutil.copytree(tmp_path / "a.safetensors.partial", tmp_path / "b.safetensors.partial")
    assert make(folder, tmp_path / "b.safetensors", top_k=4, afresh=True).metadata["k"] == 4
    (tmp_path / "b.safetensors").unlink()
    asked, answer = [], Expert.answer
    monkeypatch.setattr(Expert, "answer", lambda *args: asked.append(len(args[1])) or answer(*args))
    assert make(folder, output).path.read_bytes() == (folder / "answers.safetensors").read_bytes()
    assert make(folder, output).path == output and asked == [1]  # 5 prompts in batches of 2, of which 2 were there
    way_out = r"name another file for the answers \(--answers\), or delete this one$"
    with pytest.raises(FileExistsError, match=f"was made with another prompts: {way_out}"):
        make(folder, output, texts=["7"])
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_an_expert_is_the_same_by_any_path(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    found = make_answer_set(
        "expert", Vlm(folder / "base"), experts.PROMPTS, folder / "answers.safetensors", **experts.SETTINGS
    )
    assert found.metadata["expert"]["id"] == f"{folder / 'expert'}"


def test_a_gpu_without_room(folder, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("drift_peft.keeping.expert.greedy", full)
    with pytest.raises(ValueError, match=r"no room for 2 prompts at a time: pass a smaller batch_size"):
        make(folder, tmp_path / "a.safetensors")


def test_a_file_of_prompts(tmp_path):
    (tmp_path / "a.txt").write_bytes("one\r\n\n  two\u2028= 2\n".encode())
    (tmp_path / "a.jsonl").write_text('"one\\ntwo"\n"th\u0085ree"\n', encoding="utf-8")
    assert read_texts(tmp_path / "a.txt") == ["one", "  two\u2028= 2"]
    assert read_texts(tmp_path / "a.jsonl") == ["one\ntwo", "th\u0085ree"]
    (tmp_path / "b.jsonl").write_text('"one"\n\n{"prompt": "one"}\n', encoding="utf-8")
    (tmp_path / "c.jsonl").write_text("one\n", encoding="utf-8")
    (tmp_path / "c.txt").write_text("\n", encoding="utf-8")
    (tmp_path / "latin.txt").write_text("zwölf?\n", encoding="latin-1")
    for texts, said in (
        (tmp_path / "no.txt", "there is no file of prompts"),
        (
            tmp_path / "b.jsonl",
            r"line 3 of \S+b.jsonl is no prompt, '{\"prompt\": \"one\"}': write a string that is not",
        ),
        (tmp_path / "c.jsonl", r"line 1 of \S+c.jsonl is no JSON, 'one': write a string a line"),
        (tmp_path / "c.txt", "there are no prompts"),
        (tmp_path / "latin.txt", r"the prompts in \S+latin.txt are no UTF-8 text: save the file as such"),
        ([""], "a prompt must be a text"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            read_texts(texts)


def test_damaged_files_are_refused(folder, tmp_path):
    whole = (folder / "answers.safetensors").read_bytes()
    (tmp_path / "torn.safetensors").write_bytes(whole[:-8])
    for path, said in (
        (tmp_path / "torn.safetensors", "is no answer set: it is truncated"),
        (folder / "keep.safetensors", "is a safetensors file but no answer set"),
        (tmp_path / "none.safetensors", "there is no answer set"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            AnswerSet.load(path)
