"""Terminals that are not UTF-8: help, errors and tables in signs that they have, and JSON that stays what it is."""

import ast
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command import entry, run
from sample_prior import sample_prior
from terminals import terminal

import drift_peft
from drift_peft.cli.terminal import SPELLED

POSIX = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
NO_LOCALE = pytest.mark.skipif(os.name == "nt", reason="Windows has no such locale")
ENCODINGS = [("cp1252", {"PYTHONIOENCODING": "cp1252"}), ("ascii", {"PYTHONIOENCODING": "ascii"})]


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    path = tmp_path_factory.mktemp("terminal") / "prior.safetensors"
    sample_prior(path, layers=1, rank=4, base={"id": "Zoë × 日", "revision": None})
    return path


def ran(encoding, variables, *argv):
    """(status, stdout, stderr) of a process."""
    command = [sys.executable, "-m", "drift_peft", *map(str, argv)]
    result = subprocess.run(command, capture_output=True, env=os.environ | variables)
    assert b"Traceback" not in result.stderr
    return result.returncode, result.stdout.decode(encoding), result.stderr.decode(encoding)


@pytest.mark.parametrize("encoding, variables", [*ENCODINGS, pytest.param("ascii", POSIX, marks=NO_LOCALE)])
def test_help_and_errors(encoding, variables):
    status, out, _ = ran(encoding, variables, "prior", "build", "--help")
    square = "²" if encoding == "cp1252" else "^2"
    assert status == 0 and "Take Delta = expert - base" in out and f"||Delta||{square}" in out
    # As typed in such a terminal: in a locale without signs, these are bytes, which go out as they came in.
    read_as = "utf-8" if variables is POSIX else encoding
    shown = {"utf-8": "Δ≥×日", "cp1252": "Delta>=×?", "ascii": "Delta>=x?"}[read_as]
    status, _, err = ran(read_as, variables, "preflight", "recipe.yaml", "--set", "Δ≥×日")
    assert status == 1 and err.startswith(f"drift-peft: error: --set {shown} names no value")


@pytest.mark.parametrize(
    "encoding, variables", [*ENCODINGS, pytest.param("ascii", POSIX, marks=[NO_LOCALE, pytest.mark.slow])]
)
def test_tables(encoding, variables, prior, monkeypatch):
    if variables is POSIX:
        status, out, _ = ran(encoding, variables, "prior", "inspect", prior)
    else:
        with terminal(monkeypatch, encoding) as printed:
            status = entry.load()(["prior", "inspect", str(prior)])
            out, _ = printed()
    base = "Zoë × ?" if encoding == "cp1252" else "Zo? x ?"
    assert status == 0 and f"- {base}" in " ".join(out.split())
    assert "+---" in out and "||Delta||/||W||" in out and "-8.2 to +0.6" in out


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "ascii"])
def test_json_stays_what_it_is(encoding, prior, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding, write_through=True))
    assert entry.load()(["prior", "inspect", str(prior), "--json"]) == 0
    printed = written.getvalue().decode(encoding)
    assert json.loads(printed)["base"]["id"] == "Zoë × 日" and ("日" in printed) == (encoding == "utf-8")


def test_every_sign_that_the_package_writes_has_a_spelling():
    signs = set()
    for file in Path(drift_peft.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                signs |= {sign for sign in node.value if not sign.isascii()}
    signs -= set("🤗\udc80\udcff")  # on model cards alone, which are files; bytes of arguments
    assert len(signs) > 10 and signs <= SPELLED.keys()
    assert "".join(SPELLED.values()).isascii()


HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e"


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_a_header_commands_no_terminal(as_json, tmp_path, capsys):
    origin = {"id": f"expert{HOSTILE}", "revision": None}
    sample_prior(tmp_path / "p.safetensors", layers=1, expert=origin)
    status, out, _ = run(capsys, "prior", "inspect", tmp_path / "p.safetensors", *as_json)
    assert status == 0 and not {*HOSTILE} & {*out} - {*"]0;owned[2J31m"} and "\\u001b" in out
    assert not as_json or json.loads(out)["expert"] == origin


def test_an_error_commands_no_terminal(tmp_path, capsys):
    status, _, err = run(capsys, "prior", "inspect", tmp_path / f"{HOSTILE}.safetensors")
    assert status == 1 and "\\u001b]0;owned\\u0007" in err and "\x1b" not in err
