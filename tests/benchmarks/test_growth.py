"""benchmarks/growth.py: the smallest run, and what it makes of measured costs."""

import json
import multiprocessing.util
import sys
import tempfile

import growth
import pytest
from rich.console import Console

COST = 3e-9  # of whatever is counted


def costs(**missing) -> dict[growth.Sizes, dict]:
    """What would be measured at the default run's points if cost were what the arithmetic counts."""
    points = [
        growth.DEFAULT._replace(**{name: value})
        for name in growth.Sizes._fields
        for value in getattr(growth.VALUES, name)
    ]
    return {n: {str(q): missing.get(q.unit, COST * q.count(n)) for q in growth.QUANTITIES} for n in points}


def test_exponents_are_slopes_in_log_log():
    assert growth.slope((1, 2, 4), (3, 12, 48)) == pytest.approx(2)
    assert growth.slope((1, 2, 4), (5, 5, 5)) == 0
    assert growth.slope((1, 2, 4), (5, None, 5)) is None
    assert growth.slope((1, 2, 4), (5, -1e-3, 5)) is None  # a difference within the noise


def test_the_arithmetic_has_the_exponents_of_the_method():
    rows = growth.tabulate(costs(), growth.DEFAULT, growth.VALUES)
    assert all(row["exponent"] == row["arithmetic"] for row in rows)
    found = {(row["quantity"], row["varied"]): row["arithmetic"] for row in rows}
    assert len(found) == len(rows) == 20
    for quantity in ("build, s", "merge, s"):
        assert found[quantity, "width"] == pytest.approx(2, abs=1e-3)
    assert 1.7 < found["build, GB", "width"] < 2 and 0 < found["build, GB", "rank"] < 0.2  # Δ, and Krylov blocks
    for quantity in ("guidance, s", "stacks, GB"):
        assert found[quantity, "width"] == pytest.approx(1, abs=1e-3)
        assert found[quantity, "tokens"] == 0
    assert all(found[quantity, "layers"] == 1 for quantity in ("build, s", "guidance, s", "stacks, GB", "merge, s"))
    assert found["build, GB", "layers"] == found["merge, GB", "width"] == found["merge, GB", "layers"] == 0
    assert found["stacks, GB", "drift_rank"] == 1 and found["stacks, GB", "r"] == 0


def test_extrapolation_to_70b():
    found, largest = costs(), growth.DEFAULT._replace(width=3584)
    result = growth.extrapolate(growth.tabulate(found, growth.DEFAULT, growth.VALUES), found, largest)["costs"]
    weights = 2 * 8192 * 8192 + 2 * 1024 * 8192 + 3 * 8192 * 28672
    assert result["merge, s"]["by_arithmetic"] == pytest.approx(COST * 80 * weights)
    assert result["merge, s"]["by_exponents"] == pytest.approx(COST * 80 * weights, rel=1e-3)
    rows_and_columns = 2 * 16384 + 2 * 9216 + 3 * 36864
    assert result["stacks, GB"]["by_arithmetic"] == pytest.approx(COST * 80 * 16 * (2 * rows_and_columns + 4 * 7))
    assert result["build, GB"]["by_arithmetic"] == pytest.approx(COST * 4 * 28672 * (8192 + 4 * 80))


def test_memory_that_was_not_measured_is_said_to_be_missing(tmp_path):
    found = costs(GB=None)
    rows = growth.tabulate(found, growth.DEFAULT, growth.VALUES)
    extrapolated = growth.extrapolate(rows, found, growth.DEFAULT._replace(width=3584))
    assert extrapolated["costs"]["merge, GB"] == {"measured": None, "by_arithmetic": None, "by_exponents": None}
    console = Console(width=200, record=True)
    for table in growth.tables(rows, extrapolated, growth.DEFAULT):
        console.print(table)
    assert "not measured" in console.export_text()
    growth.draw(rows, growth.DEFAULT, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 10_000


def test_guidance_is_what_a_guided_step_takes_beyond_a_plain_one(monkeypatch):
    monkeypatch.setattr(growth, "PAIRS", 1)
    point = growth.SMALLEST._replace(width=112, tokens=8)
    (found,) = growth.in_training([point]).values()
    (stacks,) = (q.count(point) for q in growth.QUANTITIES if q.name == "stacks")
    assert found["stacks, GB"] == pytest.approx(stacks / 1e9, rel=1e-4) and isinstance(found["guidance, s"], float)


@pytest.mark.slow
def test_growth_in_its_smallest_size(tmp_path, monkeypatch, capsys):
    multiprocessing.util.get_temp_dir()  # of multiprocessing itself, for the rest of the session
    (temporary := tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(growth, "REPEATS", 1)
    monkeypatch.setattr(growth, "PAIRS", 2)
    growth.main(["--smallest", "--figure", str(tmp_path / "growth.png")])
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    assert result["smallest"] and "extrapolated, not measured" in printed
    assert [(row["quantity"], row["varied"]) for row in result["rows"]] == [
        (str(quantity), varied) for quantity in growth.QUANTITIES for varied in quantity.varied
    ]
    for row in result["rows"]:
        assert len(row["measured"]) == len(row["values"]) >= 3
        if row["quantity"] == "stacks, GB":  # counted and measured in bytes
            assert row["measured"] == pytest.approx([count / 1e9 for count in row["counted"]], rel=1e-4)
        elif row["quantity"] in ("build, s", "merge, s"):
            assert min(row["measured"]) > 0
        elif row["quantity"] in ("build, GB", "merge, GB"):
            assert all((gb is not None) == (sys.platform == "linux") for gb in row["measured"])
    assert result["extrapolated_70b"]["costs"]["stacks, GB"]["by_arithmetic"] > 0
    assert (tmp_path / "growth.png").is_file()
    assert not list(temporary.iterdir())
