"""recipes/parts/scoring.py: pairs of an answer and a known one, right and wrong, that lie close to each other."""

import pytest
from parts.scoring import mark

FACTORS = [  # answer, gold, right; brackets after a blank hold a factor or a set, unless a unit is in them
    ("2 (x+3)", "2x+6", True), ("2 (x+3)", "2x+3", False), (r"-3 \left(x-1\right)", "-3x+3", True),
    (r"-3 \left(x-1\right)", "-3x-1", False), (r"12 \left(\sqrt{3}+1\right)", r"12\sqrt{3}+12", True),
    (r"12 \left(\sqrt{3}+1\right)", r"12\sqrt{3}+1", False), (r"\frac{1}{2} (x+4)", r"\frac{x+4}{2}", True),
    (r"\frac{1}{2} (x+4)", r"\frac{1}{2}x+4", False), (r"2 \times (3, 4)", r"2 \times [3,4]", False),
    ("x (x+1)", "x^2+x", True), ("(x+1) (x-2)", "(x-2)(x+1)", True), ("(x+1) (x-2)", "x^2-2", False),
    ("5 (10)", "50", True), ("5(10)", "50", True), ("5(10)", "15", False), ("3+2(4)", "11", True),
    ("4 (10)", "4", False), ("2(1/2)", "1", True), ("2 1/2", "2.5", True), (r"\log_2(8)", "3", True),
    ("24 (cm^2)", "24", True), ("24 (cm^2)", "24 m^2", False), ("24 (square units)", "24", True),
    ("24 (apples)", "24 pears", False), ("5 (or more)", "5", False),
]  # fmt: skip
INTERVALS = [
    (r"(0,1)\cup(2,3)", r"(2,3)\cup(0,1)", True), (r"(0,1)\cup(2,3)", r"(0,1)\cup[2,3]", False),
    (r"(0,\frac12)\cup(2,3)", r"(0,0.5)\cup(2,3)", True), (r"(3,\infty)", r"(3,+\infty)", True),
    ("(3,+∞)", "(3,∞)", True), ("(3,+∞)", "[3,∞)", False), (r"+\infty", r"-\infty", False), ("12+", "12", False),
    (r"(-\infty,2)\cup(3,+\infty)", r"(3,\infty)\cup(-\infty,2)", True),
    ("x<2 or x>3", r"(-\infty,2)\cup(3,\infty)", True), ("x<2 or x>3", r"x\in(-\infty,2)\cup(3,+\infty)", True),
    (r"(-\infty,2)\cup(3,\infty)", r"x>3 \text{ or } x<2", True), ("x<2 or x>3", r"(-\infty,2)\cup[3,\infty)", False),
    ("x<2 or x>3", r"(-\infty,2)", False), ("x<2 and x>3", r"(-\infty,2)\cup(3,\infty)", False),
    ("x<2 or y>3", r"(-\infty,2)\cup(3,\infty)", False), ("R or S", "r or S", False),
]  # fmt: skip
COMMAS = [  # in brackets that hold nothing else, a comma parts two numbers
    ("(5, 250)", "(5,250)", True), ("(5,250)", "5250", False), ("[0,100]", "[0, 100]", True),
    ("[100,200]", "100200", False), ("[0,360)", "[0, 360)", True), (r"\{100,200\}", r"\{200,100\}", True),
    (r"\{2,100\}", "2100", False), ("{200,100}", "{100,200}", True), ("(0.5,250)", "(1/2, 250)", True),
    ("(-5,250)", "(-5, 250)", True), ("(100,200)", "(200,100)", False), ("f(2,100)", "f(2100)", False),
    ("f(2,100)", "f(2, 100)", True), ("(0, 100), (5, 250)", "(0,100), (5,250)", True),
    ("0,180,360", "0, 180, 360", True), ("0,500", "500", False), ("100,200", "100, 200", True),
    ("100, 200", "200,100", True), ("100,200", "300, 200", False), ("100, 200", "100200", False),
    ("1,234, 5,678", "1234, 5678", True), ("1,234, 5", "1234", False), ("(0, 1,000)", "(0,1000)", True),
    ("1,234,567", "1234567", True), (r"\sqrt{1,234}", r"\sqrt{1234}", True), ("x^{1,000}", "x^{1000}", True),
    ("(1,234+1)", "1235", True), (r"\$1,000.50", "1000.5", True), ("-1,234", "-1234", True),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "gold", "right"), [*FACTORS, *INTERVALS, *COMMAS])
def test_an_answer_in_a_box(answer, gold, right):
    assert mark(rf"\boxed{{{answer}}}", gold, "") == (right, "boxed")
