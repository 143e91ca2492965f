"""recipes/distill.py: every paid answer is in the journal at once, and the next run goes on from there."""

import json
import os
import signal
import time
from pathlib import Path

import distill
import distillations
import pytest
from distillations import journal_lines, number, result, right, run, save_questions
from openai_server import OpenAI
from parts.journal import Journal, journal_path
from parts.teachers import PROMPT
from processes import Program

quick = distillations.quick  # fixture

RECIPES = Path(__file__).parents[2] / "recipes"


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
    said = f"holds answers of other settings: {difference}: take the earlier ones, or name another output"
    assert said in capsys.readouterr().err
    assert (output.read_bytes(), journal_path(output).read_bytes()) == before and not server.asked


def test_a_journal_is_written_by_one_run_at_a_time(tmp_path):
    with Journal(tmp_path / "j.jsonl", {"a": 1}) as journal:
        journal.add("q", {"response": "r"})
        with pytest.raises(FileExistsError, match=r"j\.jsonl is being written by process \d+"):
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
