"""The processes of a command: as silent as the command, gone with it, and never waited for in vain."""

import os
import signal
import subprocess
import sys
import time

import pytest

from drift_peft.cli import main

POSIX = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
PROGRAM = """
import os, sys, time
from drift_peft.cli.workers import workers

if __name__ == "__main__":
    try:
        with workers(2) as executor:
            {body}
    except KeyboardInterrupt:
        print("interrupted")
    except OSError as error:
        print(error)
"""


def begun(folder, body, **environment):
    """A program of the user's with two workers, in a group of its own, as of a terminal."""
    script = folder / "program.py"
    script.write_text(PROGRAM.format(body=body))
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, script], **streams, start_new_session=True, env=os.environ | environment)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no such locale")
def test_workers_import_torch_in_silence_where_the_locale_is_ascii(tmp_path):
    body = """rates = "__import__('drift_peft.demo.compare').demo.compare.learning_rates()"
            print(executor.submit(eval, rates).result()["drift"] > 0)"""
    program = begun(tmp_path, body, **POSIX)
    out, err = program.communicate(timeout=300)
    assert (program.returncode, out, err) == (0, "True\n", "")


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c_ends_them_at_once(tmp_path):
    body = """slept = 2
            while slept > 1.9:  # until both are there, and sleep at the same time
                start = time.monotonic()
                list(executor.map(time.sleep, [1, 1]))
                slept = time.monotonic() - start
            futures = [executor.submit(time.sleep, 600) for _ in range(9)]
            print("begun", flush=True)
            futures[0].result()"""
    program = begun(tmp_path, body)
    assert program.stdout.readline() == "begun\n"
    time.sleep(1)  # they are at work
    start = time.monotonic()
    os.killpg(program.pid, signal.SIGINT)
    out, err = program.communicate(timeout=60)
    assert (program.returncode, out, err) == (0, "interrupted\n", "") and time.monotonic() - start < 30
    with pytest.raises(ProcessLookupError):  # nobody is left of the group
        for _ in range(100):
            os.killpg(program.pid, 0)
            time.sleep(0.1)


def test_an_error_in_one_ends_the_others(tmp_path):
    body = """futures = [executor.submit(os.stat, "nowhere"), *(executor.submit(time.sleep, 600) for _ in range(9))]
            futures[0].result()"""
    program = begun(tmp_path, body)
    out, err = program.communicate(timeout=60)
    assert program.returncode == 0 and "No such file" in out and not err


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_one_that_is_killed_is_one_sentence(tmp_path):
    program = begun(tmp_path, "executor.submit(os.kill, executor.submit(os.getpid).result(), 9).result()")
    out, err = program.communicate(timeout=60)
    told = "one of the processes was killed, perhaps for want of memory: --processes 1 takes less\n"
    assert (program.returncode, out, err) == (0, told, "")


def test_no_process_is_refused(tmp_path, capsys):
    assert main(["demo", "--processes", "0", "--out", str(tmp_path / "demo")]) == 1
    assert capsys.readouterr().err == "drift-peft: error: --processes 0: give 1 or more\n"
    assert not (tmp_path / "demo").exists()
