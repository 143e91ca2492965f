"""recipes/distill.py against a server that fails as servers do."""

import itertools
from collections import Counter

import distill
import distillations
import pytest
from distillations import journal_lines, number, result, right, run, save_questions
from openai_server import RETRY_AFTER, OpenAI
from parts.journal import journal_path

from drift_peft import chat

quick = distillations.quick  # fixture


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
    monkeypatch.setattr(chat, "LARGEST", 2**20)
    monkeypatch.setattr(chat, "LONGEST", 1)
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
    [("status 401", "refuses the question: status 401 (of the test's server); give the server's key (--api-key-env)"),
     ("status 404", "status 404 (of the test's server); give the address that ends in /v1 (--server), and the id by"),
     ("status 308", "status 308 (it leads to https://127.0.0.1/v1); give that address, up to its /v1 (--server)")],
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
    assert chat.retry_after(header) == seconds
