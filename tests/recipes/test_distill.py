"""recipes/distill.py: against a server that fails as servers do, and with a model in this process."""

import itertools
import json
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import distill
import httpx2
import pytest
import torch
from openai_server import RETRY_AFTER, OpenAI
from parts import teachers
from parts.journal import Journal, journal_path
from parts.loading import load_messages
from parts.teachers import PROMPT
from PIL import Image
from processes import Program
from tiny import tiny_vlm
from tiny_vlm import CHAT, PROCESSORS, tokenizer

RECIPES = Path(__file__).parents[2] / "recipes"

KEY = "a-secret-that-nobody-prints"
ANSWER = r"<think> one more </think> \boxed{1}"


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """Backoff in hundredths of its seconds; caches of this test's own."""
    uniform = random.uniform
    monkeypatch.setattr(random, "uniform", lambda low, high: uniform(low, high) / 100)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def save_questions(folder, count):
    """Sums with their answers; returns the file. Question i is `what is i + 1 ?`, its image i pixels wider than 8."""
    lines = []
    for i in range(count):
        Image.new("RGB", (8 + i, 8), (i, 0, 0)).save(folder / f"{i}.png")
        lines.append(json.dumps({"problem": f"<image>what is {i} + 1 ?", "answer": str(i + 1), "image": f"{i}.png"}))
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "questions.jsonl"


def number(question):
    return int(question.split("what is ")[1].split(" + ")[0])


def right(question):
    i = number(question)
    return rf"<think> {i} and one more </think> \boxed{{{i + 1}}}"


def run(source, output, server, *flags, capsys=None):
    """main(); the funnel where capsys is given."""
    flags = ["--server", server.url, "--model", "teacher", "--timeout", "1", "--retries", "3", "--json", *flags]
    distill.main([str(source), "-o", str(output), *flags])
    return json.loads(capsys.readouterr().out) if capsys else None


def result(output):
    """Question number -> answer, of a written file, each of whose samples has to be whole."""
    dataset, dropped = load_messages(output, boxed=True)
    assert not dropped
    found = {}
    for sample in dataset:
        question, answer = (
            [part["text"] for part in turn["content"] if part["type"] == "text"] for turn in sample["messages"]
        )
        i = number(question[0])
        assert question == [f"what is {i} + 1 ?"] and sample["messages"][0]["content"][0]["type"] == "image"
        assert [image.size for image in sample["images"]] == [(8 + i, 8)]
        assert i not in found
        (found[i],) = answer
    return found


def journal_lines(output):
    return [json.loads(line) for line in journal_path(output).read_text().splitlines()]


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


@pytest.mark.parametrize(
    "fault",
    [
        "timeout",
        "status 429",
        "status 500",
        "status 503",
        "broken JSON",
        "no choices",
        "cut",
        "reset",
        "gzip",
        "deep",
        "too much",
        "no end",
    ],
)
def test_what_a_server_fails_at_is_asked_again_and_answered_once(fault, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(teachers, "LARGEST", 2**20)
    monkeypatch.setattr(teachers, "LONGEST", 1)
    with OpenAI(right) as server:
        server.fail("what is 1 ", fault)
        server.fail("what is 3 ", fault, fault)
        printed = run(save_questions(tmp_path, 5), tmp_path / "out.parquet", server, capsys=capsys)
    assert printed["left"]["unique"] == 5 and not printed["lost"]
    assert result(tmp_path / "out.parquet") == {i: right(f"what is {i} + 1 ?") for i in range(5)}
    assert Counter(map(number, server.asked)) == {0: 1, 1: 2, 2: 1, 3: 3, 4: 1}
    assert Counter(map(number, server.answered)) == {i: 1 for i in range(5)}
    assert len(journal_lines(tmp_path / "out.parquet")) == 1 + 5
    if fault == "status 429":
        times = [when for question, when in zip(server.asked, server.times, strict=True) if number(question) == 3]
        assert all(later - earlier >= RETRY_AFTER for earlier, later in itertools.pairwise(times))


def test_what_gets_no_answer_is_counted_and_asked_by_the_next_run(tmp_path, capsys):
    source, output = save_questions(tmp_path, 5), tmp_path / "out.parquet"
    with OpenAI(right) as server:
        server.fail("what is 1 ", *["status 500"] * 4)
        server.fail("what is 2 ", "status 400")
        printed = run(source, output, server, capsys=capsys)
        assert printed["left"]["answered"] == 3
        assert printed["lost"]["answered"] == {
            "status 500 (of the test's server), 4 times": 1,
            "status 400 (of the test's server)": 1,
        }
        assert set(result(output)) == {0, 3, 4}
        server.asked.clear()
        printed = run(source, output, server, capsys=capsys)
    assert printed["left"]["unique"] == 5 and not printed["lost"]
    assert sorted(map(number, server.asked)) == [1, 2]
    assert set(result(output)) == set(range(5))


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [("status 401", "refuses the key: see --api-key-env (of the test's server)"),
     ("status 404", "does not know this model or path: see --model and --server (of the test's server)")],
)  # fmt: skip
def test_where_no_question_can_be_answered_the_run_stops(fault, sentence, tmp_path, capsys):
    with OpenAI(right) as server:
        server.fail("what is 3 ", fault)
        with pytest.raises(SystemExit) as stopped:
            run(save_questions(tmp_path, 30), tmp_path / "out.parquet", server, "--concurrency", "1")
    error = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 1 and sentence in error and "run the same again to go on" in error
    assert len(server.asked) < 30 and not (tmp_path / "out.parquet").exists()
    assert len(journal_lines(tmp_path / "out.parquet")) >= 1 + 3


def test_a_server_that_is_not_there(tmp_path, capsys):
    with OpenAI(right) as server:
        pass
    with pytest.raises(SystemExit):
        run(save_questions(tmp_path, 2), tmp_path / "out.parquet", server)
    assert f"the server {server.url}/chat/completions cannot be reached: ConnectError" in capsys.readouterr().err
    assert {file.suffix for file in tmp_path.iterdir() if file.is_file()} == {".png", ".jsonl"}
    assert not journal_path(tmp_path / "out.parquet").exists()


def test_a_server_that_fails_at_everything_is_not_asked_everything(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(distill, "HOPELESS", 4)
    with OpenAI(right) as server:
        server.fail("what is", *["status 400"] * 100)
        with pytest.raises(SystemExit):
            run(save_questions(tmp_path, 30), tmp_path / "out.parquet", server, "--concurrency", "2")
    assert "4 questions in a row got no answer, the last one: status 400" in capsys.readouterr().err
    assert len(server.asked) < 30


def test_so_many_questions_are_asked_at_a_time(tmp_path):
    with OpenAI(right, seconds=0.05) as server:
        run(save_questions(tmp_path, 12), tmp_path / "out.parquet", server, "--concurrency", "3")
    assert 1 < server.busiest <= 3


def test_a_run_that_is_killed_goes_on_where_it_was(tmp_path, capsys):
    source, output = save_questions(tmp_path, 40), tmp_path / "out.parquet"
    journal = journal_path(output)
    with OpenAI(right, seconds=0.1) as server:
        flags = ["--server", server.url, "--model", "teacher", "--concurrency", "4", "--json"]
        command = [str(source), "-o", str(output), *flags]
        program = Program(tmp_path, RECIPES / "distill.py", *command, HF_DATASETS_CACHE=str(tmp_path / "cache"))
        while not journal.exists() or journal.read_bytes().count(b"\n") < 10:
            assert program.process.is_alive(), program.ended()
            time.sleep(0.02)
        program.process.kill()
        assert program.ended()[0] == -signal.SIGKILL
        time.sleep(0.3)  # the server is still reading what was sent
        assert not output.exists()
        with open(journal, "ab") as file:
            file.write(b'{"question": "half a li')  # as when the kill falls into a write
        paid = {line["question"]: line["response"] for line in journal_lines_whole(journal)}
        assert 9 <= len(paid) < 40
        server.asked.clear()
        distill.main(command)
        left = json.loads(capsys.readouterr().out)["left"]
    assert left == dict.fromkeys(["samples", "asked", "answered", "well-formed", "correct", "unique"], 40)
    assert len(server.asked) == len(set(server.asked)) == 40 - len(paid)  # nothing twice
    assert result(output) == {i: right(f"what is {i} + 1 ?") for i in range(40)}  # nothing lost
    lines = journal_lines(output)
    assert len(lines) == 1 + 40 == 1 + len({line["question"] for line in lines[1:]})
    assert paid.items() <= {line["question"]: line["response"] for line in lines[1:]}.items()


def journal_lines_whole(journal):
    return [json.loads(line) for line in journal.read_bytes().split(b"\n")[1:-1]]


def test_a_finished_run_asks_nothing_again(tmp_path, capsys):
    source, output = save_questions(tmp_path, 3), tmp_path / "out.parquet"
    with OpenAI(right) as server:
        first = run(source, output, server, capsys=capsys)
        server.asked.clear()
        assert run(source, output, server, capsys=capsys) == first
    assert not server.asked


def test_more_questions_are_asked_on_top_and_a_limit_is_no_other_setting(tmp_path, capsys):
    output = tmp_path / "out.parquet"
    with OpenAI(right) as server:
        printed = run(save_questions(tmp_path, 4), output, server, "--limit", "3", capsys=capsys)
        assert printed["left"]["asked"] == 3 and printed["lost"]["asked"] == {"beyond --limit": 1}
        server.asked.clear()
        assert run(save_questions(tmp_path, 5), output, server, capsys=capsys)["left"]["unique"] == 5
    assert sorted(map(number, server.asked)) == [3, 4]


@pytest.mark.parametrize(
    ("flags", "difference"),
    [(["--temperature", "0.7"], "temperature (0.0, now 0.7)"), (["--max-tokens", "9"], "max_tokens (4096, now 9)"),
     (["--prompt", "Think."], f"prompt ({PROMPT}, now Think.)"), (["--model", "b"], "model (teacher, now b)")],
)  # fmt: skip
def test_answers_of_other_settings_are_not_mixed(flags, difference, tmp_path, capsys):
    source, output = save_questions(tmp_path, 2), tmp_path / "out.parquet"
    with OpenAI(right) as server:
        run(source, output, server)
        before = output.read_bytes(), journal_path(output).read_bytes()
        server.asked.clear()
        with pytest.raises(SystemExit):
            run(source, output, server, *flags)
    said = f"holds answers of other settings: {difference}: take these, or name another output"
    assert said in capsys.readouterr().err
    assert (output.read_bytes(), journal_path(output).read_bytes()) == before and not server.asked


def test_a_journal_is_written_by_one_run_at_a_time(tmp_path):
    with Journal(tmp_path / "j.jsonl", {"a": 1}) as journal:
        journal.add("q", {"response": "r"})
        with pytest.raises(ValueError, match=r"another run is writing .*j\.jsonl: wait for it, or name another output"):
            Journal(tmp_path / "j.jsonl", {"a": 1})
    with Journal(tmp_path / "j.jsonl", {"a": 1}) as journal:
        assert journal.answers == {"q": {"response": "r"}}
    (tmp_path / "j.jsonl").write_text('{"a": 1}\n{torn\n{"question": "q", "response": "r"}\n')
    with pytest.raises(ValueError, match=r"line 2 of .*j\.jsonl is damaged .*: delete that line"):
        Journal(tmp_path / "j.jsonl", {"a": 1})


@pytest.mark.parametrize("line", ["[]", "5", '"q"', '{"response": "r"}', '{"question": 5, "response": "r"}',
                                  '{"question": "q", "response": null}', "[" * 100_000, "null"])  # fmt: skip
def test_a_journal_with_a_line_of_another_kind_is_one_sentence(line, tmp_path):
    (tmp_path / "j.jsonl").write_text(f'{{"a": 1}}\n{line}\n')
    with pytest.raises(ValueError, match=r"line 2 of .*j\.jsonl is damaged .*: delete that line"):
        Journal(tmp_path / "j.jsonl", {"a": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["j.jsonl"]


def test_a_journal_on_a_full_disk_keeps_whole_lines_and_no_lock(tmp_path, monkeypatch):
    path, fsync = tmp_path / "j.jsonl", os.fsync
    full = [True, False, True]  # at the settings; then at the second answer

    def failing(file):
        if full and full.pop(0):
            raise OSError(28, "No space left on device")
        fsync(file)

    monkeypatch.setattr(os, "fsync", failing)
    with Journal(path, {"a": 1}) as journal:
        for i in range(4):
            try:
                journal.add(f"q{i}", {"response": "r"})
            except OSError as error:
                assert error.errno == 28
    monkeypatch.undo()
    assert [*tmp_path.iterdir()] == [path]
    with Journal(path, {"a": 1}) as journal:
        assert list(journal.answers) == ["q2", "q3"]


def test_an_answer_with_half_a_sign_is_lost_alone(tmp_path, capsys):
    with OpenAI(lambda question: right(question) + "\ud83d" * (number(question) == 1)) as server:
        for _ in range(2):
            printed = run(save_questions(tmp_path, 3), tmp_path / "out.parquet", server, capsys=capsys)
            assert printed["lost"] == {"well-formed": {"with half a sign": 1}}
            shown = "question 2, <image> what is 1 + 1 ?: <think> 1 and one more </think> \\boxed{2}\\ud83d"
            assert printed["first"] == {"well-formed": {"with half a sign": shown}}
    assert set(result(tmp_path / "out.parquet")) == {0, 2} and len(server.asked) == 3


def test_a_journal_that_was_torn_anywhere_keeps_its_whole_lines(tmp_path):
    path = tmp_path / "j.jsonl"
    with Journal(path, {"a": 1}) as journal:
        for i in range(3):
            journal.add(f"q{i}", {"response": f"ü{i}\n"})
    content = path.read_bytes()
    for size in range(len(content)):
        path.write_bytes(content[:size])
        whole = max(content[:size].count(b"\n") - 1, 0)  # without that of the settings
        with Journal(path, {"a": 1}) as journal:
            assert list(journal.answers) == [f"q{i}" for i in range(whole)]
            for i in range(whole, 3):
                journal.add(f"q{i}", {"response": f"ü{i}\n"})
        assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("5", 5),
        ("0.5", 0.5),
        ("-1", 0),
        ("99999", 600),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0),
        ("soon", None),
        ("nan", None),
        ("inf", 600),
        ("", None),
    ],
)
def test_when_a_server_wants_to_be_asked_again(header, seconds):
    assert teachers._retry_after(httpx2.Response(429, headers={"Retry-After": header})) == seconds


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


def save_teacher(folder):
    """A vision-language model that answers whatever it is asked: after a token of its vocabulary comes the next one."""
    words = tokenizer(40)
    words.add_tokens(ANSWER.split())
    end = words.eos_token_id
    chain = [words.convert_tokens_to_ids("assistant:"), *range(40, len(words)), end]
    model = tiny_vlm("llava_next")
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
    make, image = PROCESSORS["llava_next"]
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
     (["--server", "localhost:8000"], "--server takes an address such as http://localhost:8000/v1"),
     (["--server", "http://user:word@localhost"], "--server takes an address such as http://localhost:8000/v1")],
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
