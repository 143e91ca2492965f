"""What run.py makes of three runs of PEFT's suite; the runs themselves are `make test-peft`."""

import importlib
import sys
from pathlib import Path

import pytest

PASSED, FAILED = ("passed", ""), ("failed", "ValueError: no")
NAMES = "run", "differences"


@pytest.fixture
def run(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    for name in NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module("run")
    for name in NAMES:
        sys.modules.pop(name, None)


def test_equal_runs_have_no_difference(run):
    runs = {"a": PASSED, "b": FAILED}
    assert run.compare(runs, runs, runs) == []


@pytest.mark.parametrize("way", ["imported", "drift"])
def test_a_difference_that_nothing_names_is_reported(run, way):
    runs = {"plain": {"a": PASSED}, "imported": {"a": PASSED}, "drift": {"a": PASSED}, way: {"a": FAILED}}
    (difference,) = run.compare(*runs.values())
    assert difference.startswith(f"{way}: a")


def test_a_test_that_is_missing_is_reported(run):
    assert len(run.compare({"a": PASSED}, {}, {})) == 2


def test_a_named_reason_justifies(run, monkeypatch, capsys):
    monkeypatch.setitem(run.REFUSED, "ValueError: no", "it is refused")
    assert run.compare({"a": PASSED}, {"a": PASSED}, {"a": FAILED}) == []
    assert "it is refused" in capsys.readouterr().out
    # With drift_peft imported, and nothing of it used, nothing may be refused.
    assert len(run.compare({"a": PASSED}, {"a": FAILED}, {"a": PASSED})) == 1
