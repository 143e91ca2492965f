"""recipes/parts/pace.py: what compare.py says of its exams."""

import re

import pytest
from parts.pace import Pace


def test_how_long_the_exams_take_is_told_with_what_bounds_them(capsys):
    pace = Pace(["a", "b", "c"], 40, 16384)
    with pace.exam("a"):
        pass
    with pace.exam("a trial of a search"):
        pass
    with pytest.raises(KeyboardInterrupt), pace.exam("b"):
        raise KeyboardInterrupt
    for name in "bc":
        with pace.exam(name):
            pass
    first, *later = capsys.readouterr().err.splitlines()
    assert first == "exams to come: 3, each of 40 answers of at most 16384 tokens (--max-new-tokens)"
    assert [re.sub(r"\d+\.\d", "0.0", line) for line in later] == [
        f"this exam took 0.0 minutes; exams to come: {n}, 0.0 minutes if they are like it" for n in (2, 1)
    ]
    Pace([], 40, 16384)
    assert not capsys.readouterr().err
