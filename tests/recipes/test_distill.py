"""recipes/distill.py: which answers are the result, of a server and of a model in this process, and what is said."""

import itertools
import json
import threading
from unittest.mock import Mock

import distill
import distillations
import pytest
import torch
from distillations import journal_lines, number, result, right, run, save_questions
from openai_server import OpenAI
from parts.teachers import PROMPT, Local
from PIL import Image
from tiny import tiny_vlm
from tiny_vlm import CHAT, PROCESSORS, tokenizer
from transformers import AutoModelForImageTextToText

quick = distillations.quick  # fixture

KEY = "a-secret-that-nobody-prints"
ANSWER = r"<think> one more </think> \boxed{1}"


def test_the_answers_that_pass_are_the_result(tmp_path, capsys):
    replies = {1: "no thought", 2: r"<think> a </think> \boxed{99}", 3: r"<think> no box </think> 4"}
    with OpenAI(lambda question: replies.get(number(question)) or right(question)) as server:
        printed = run(save_questions(tmp_path, 6), tmp_path / "out.parquet", server, capsys=capsys)
    assert printed["left"] == {"samples": 6, "asked": 6, "answered": 6, "well-formed": 4, "correct": 3, "unique": 3}
    assert printed["lost"] == {"well-formed": {"of another form": 2}, "correct": {"of another answer": 1}}
    assert result(tmp_path / "out.parquet") == {i: right(f"what is {i} + 1 ?") for i in (0, 4, 5)}
    assert sorted(map(number, server.asked)) == list(range(6))
    for question, images, body in zip(server.asked, server.images, server.bodies, strict=True):
        assert question == f"what is {number(question)} + 1 ? {PROMPT}"
        assert images == [(8 + number(question), 8)]
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("teacher", 0.0, 4096)


def test_an_empty_prompt_adds_nothing_to_a_question(tmp_path):
    with OpenAI(right) as server:
        run(save_questions(tmp_path, 1), tmp_path / "out.parquet", server, "--prompt", "")
    assert server.asked == ["what is 0 + 1 ?"]


def test_an_answer_with_half_a_sign_is_lost_alone(tmp_path, capsys):
    with OpenAI(lambda question: right(question) + "\ud83d" * (number(question) == 1)) as server:
        for _ in range(2):
            printed = run(save_questions(tmp_path, 3), tmp_path / "out.parquet", server, capsys=capsys)
            assert printed["lost"] == {"well-formed": {"with half a sign": 1}}
            shown = "question 2, <image> what is 1 + 1 ?: <think> 1 and one more </think> \\boxed{2}\\ud83d"
            assert printed["first"] == {"well-formed": {"with half a sign": shown}}
    assert set(result(tmp_path / "out.parquet")) == {0, 2} and len(server.asked) == 3


def test_the_same_question_is_asked_once_and_the_same_words_are_kept_once(tmp_path, capsys):
    lines = save_questions(tmp_path, 3).read_text().splitlines()
    again = {**json.loads(lines[0]), "problem": "<image> What  is 0 + 1 ?"}  # of the same image
    other = {**json.loads(lines[0]), "image": "1.png"}  # of another: one more question
    (tmp_path / "questions.jsonl").write_text("\n".join([*lines, json.dumps(again), json.dumps(other)]))
    with OpenAI(lambda question: right(question) if number(question) else "<think> so </think> \\boxed{1}") as server:
        printed = run(tmp_path / "questions.jsonl", tmp_path / "out.parquet", server, capsys=capsys)
    assert printed["left"] == {"samples": 5, "asked": 4, "answered": 4, "well-formed": 4, "correct": 4, "unique": 3}
    assert printed["lost"] == {"asked": {"like another": 1}, "unique": {"of the same words as another": 1}}
    assert len(server.asked) == 4


@pytest.mark.parametrize(
    "reply",
    [{"reasoning_content": "so it is", "content": r"\boxed{1}"}, {"reasoning": "so it is", "content": r"\boxed{1}"},
     "so it is\n</think>\n\n\\boxed{1}"],
)  # fmt: skip
def test_thinking_that_the_server_splits_off_or_its_template_opens_is_put_back(reply, tmp_path):
    with OpenAI(lambda question: reply) as server:
        run(save_questions(tmp_path, 1), tmp_path / "out.parquet", server)
    assert result(tmp_path / "out.parquet") == {0: "<think>\nso it is\n</think>\n\n\\boxed{1}"}


def test_the_key_comes_from_the_environment_and_is_neither_shown_nor_stored(tmp_path, capsys, monkeypatch):
    source, output = save_questions(tmp_path, 2), tmp_path / "out.parquet"
    with OpenAI(right) as server:
        monkeypatch.setenv("TEACHER_KEY", KEY)
        server.fail("what is 1 ", "status 401")
        with pytest.raises(SystemExit):
            run(source, output, server, "--api-key-env", "TEACHER_KEY", "--concurrency", "1")
        run(source, output, server, "--api-key-env", "TEACHER_KEY")
        assert set(server.keys) == {f"Bearer {KEY}"}
        monkeypatch.delenv("TEACHER_KEY")
        with pytest.raises(SystemExit):
            run(source, tmp_path / "other.parquet", server, "--api-key-env", "TEACHER_KEY")
    printed = "".join(capsys.readouterr())
    assert "--api-key-env TEACHER_KEY: there is no such environment variable" in printed
    files = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    assert KEY not in printed and not any(KEY.encode() in content for content in files)


def test_nothing_left_is_an_error_and_writes_nothing(tmp_path, capsys):
    with OpenAI(lambda question: "I cannot say") as server, pytest.raises(SystemExit) as stopped:
        run(save_questions(tmp_path, 2), tmp_path / "out.parquet", server)
    captured = capsys.readouterr()
    assert stopped.value.code == 1 and "no answer is left, so" in captured.err
    assert json.loads(captured.out)["left"]["well-formed"] == 0
    assert not (tmp_path / "out.parquet").exists()


def save_teacher(folder, kind="llava_next"):
    """A vision-language model that answers whatever it is asked: after a token of its vocabulary comes the next one."""
    words = tokenizer(40)
    words.add_tokens(ANSWER.split())
    end = words.eos_token_id
    chain = [words.convert_tokens_to_ids("assistant:"), *range(40, len(words)), end]
    model = tiny_vlm(kind)
    with torch.no_grad():
        for name, weight in model.get_decoder().named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()  # the last hidden state is the embedding of the last token
        width = len(model.get_input_embeddings().weight)
        model.get_input_embeddings().weight.copy_(torch.eye(width))
        model.get_output_embeddings().weight.zero_()
        for before, after in itertools.pairwise(chain):
            model.get_output_embeddings().weight[after, before] = 1
    model.save_pretrained(folder)
    make, image = PROCESSORS[kind]
    make(words, chat_template=CHAT.replace("IMAGE", image)).save_pretrained(folder)
    return folder


def test_a_model_in_this_process_is_asked_in_batches(tmp_path, capsys):
    source, output = save_questions(tmp_path, 3), tmp_path / "out.parquet"
    flags = ["--model", str(save_teacher(tmp_path / "teacher")), "--batch-size", "2", "--json"]
    distill.main([str(source), "-o", str(output), *flags])
    printed = json.loads(capsys.readouterr().out)
    assert printed["left"] == {"samples": 3, "asked": 3, "answered": 3, "well-formed": 3, "correct": 1, "unique": 1}
    assert result(output) == {0: ANSWER}
    assert [line["finish_reason"] for line in journal_lines(output)[1:]] == ["stop"] * 3

    with pytest.raises(SystemExit):
        distill.main([str(source), "-o", str(tmp_path / "cut.parquet"), *flags, "--max-tokens", "4"])
    assert json.loads(capsys.readouterr().out)["lost"]["well-formed"] == {"cut at --max-tokens": 3}


def test_what_the_processor_refuses_is_left_out_and_counted(tmp_path, capsys):
    source, output = save_questions(tmp_path, 3), tmp_path / "out.parquet"
    Image.new("RGB", (900, 2)).save(tmp_path / "1.png")
    asked = [str(source), "-o", str(output), "--model", str(save_teacher(tmp_path / "teacher", "qwen2_5_vl")), "--json"]
    for _ in range(2):  # the second time, all of the others have an answer
        distill.main(asked)
        printed = json.loads(capsys.readouterr().out)
        assert printed["left"]["asked"] == printed["left"]["answered"] == 2
        refused = "refused by the model's processor"
        told = "question 2, <image> what is 1 + 1 ? (900 x 2 pixels): absolute aspect ratio"
        assert printed["first"]["asked"][refused].startswith(told)
        assert result(output) == {0: ANSWER}


def test_answers_of_another_model_at_the_same_path_are_not_mixed(tmp_path, capsys, monkeypatch):
    answer = {"response": ANSWER, "finish_reason": "stop"}
    monkeypatch.setattr(Local, "__init__", lambda self, model, **how: setattr(self, "batch_size", 8))
    monkeypatch.setattr(Local, "inputs", lambda self, conversations: None)
    monkeypatch.setattr(Local, "load", lambda self: None)
    monkeypatch.setattr(Local, "__call__", lambda self, conversations: [answer] * len(conversations))
    (tmp_path / "teacher").mkdir()
    weights = tmp_path / "teacher" / "model.safetensors"
    weights.write_bytes(b"one")
    asked = [str(save_questions(tmp_path, 3)), "-o", str(tmp_path / "o.parquet"), "--model", str(weights.parent)]
    for _ in range(2):
        distill.main(asked)
    weights.write_bytes(b"another")
    with pytest.raises(SystemExit):
        distill.main(asked)
    told = f"o.parquet.journal.jsonl holds answers of other settings: model_files ({weights.parent} has others now)"
    assert told in capsys.readouterr().err


def test_a_batch_that_does_not_fit_is_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Local, "_answer", Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(SystemExit):
        flags = ["--model", str(save_teacher(tmp_path / "teacher")), "--batch-size", "2"]
        distill.main([str(save_questions(tmp_path, 3)), "-o", str(tmp_path / "o.parquet"), *flags])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("distill.py: error: a batch of 2 does not fit into memory: take a smaller --batch-size")
    assert not (tmp_path / "o.parquet").exists()


def test_a_model_that_does_not_load_is_loaded_once_where_ctrl_c_ends_it(tmp_path, capsys, monkeypatch):
    """In the main thread: another one is waited for, however long it loads."""
    loading = []

    def fail(*_, **__):
        loading.append(threading.current_thread())
        raise OSError("no weights there")

    teacher = save_teacher(tmp_path / "teacher")
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", fail)
    with pytest.raises(SystemExit):
        asked = ["-o", str(tmp_path / "o.parquet"), "--model", str(teacher), "--batch-size", "1"]
        distill.main([str(save_questions(tmp_path, 3)), *asked])
    assert loading == [threading.main_thread()]
    assert f"the model {teacher} cannot be loaded: no weights there" in capsys.readouterr().err


def test_a_model_that_is_not_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit):
        distill.main(
            [str(save_questions(tmp_path, 1)), "-o", str(tmp_path / "o.parquet"), "--model", str(tmp_path / "no")]
        )
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"distill.py: error: the model {tmp_path / 'no'} cannot be loaded: ")


def test_code_that_comes_with_a_model_is_not_run(tmp_path, capsys, monkeypatch):
    """Nor is the user asked on stdin whether it may be, as transformers does by itself."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    (tmp_path / "model").mkdir()
    auto = {"AutoConfig": "code.Config", "AutoProcessor": "code.Processor"}
    for name in ("config", "processor_config"):
        (tmp_path / "model" / f"{name}.json").write_text(json.dumps({"model_type": "own", "auto_map": auto}))
    (tmp_path / "model" / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(SystemExit):
        distill.main(
            [str(save_questions(tmp_path, 1)), "-o", str(tmp_path / "o.parquet"), "--model", str(tmp_path / "model")]
        )
    assert "cannot be loaded: " in capsys.readouterr().err and not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [(["-o", "out.txt"], "output out.txt is no parquet file: name one, such as out.parquet"),
     (["-o", "missing/out.parquet"], "there is no folder missing"),
     (["--server", "localhost:8000"], "server localhost:8000 is no address such as http://localhost:8000/v1"),
     (["--server", "http://user:word@localhost"], "server …@localhost is no address such as http://localhost:8000/v1")],
)  # fmt: skip
def test_a_wrong_flag_is_one_sentence(flags, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        distill.main([str(save_questions(tmp_path, 1)), "-o", "out.parquet", "--server", "http://127.0.0.1:9", *flags])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("distill.py: error: ") and sentence in error and "user:word" not in error


def test_the_table(tmp_path, capsys):
    with OpenAI(right) as server:
        flags = ["--server", server.url.removesuffix("/v1"), "--model", "teacher", "--limit", "2"]
        distill.main([str(save_questions(tmp_path, 3)), "-o", str(tmp_path / "out.parquet"), *flags])
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert ["asked", "2", "1 beyond --limit"] in rows and ["unique", "2", ""] in rows
