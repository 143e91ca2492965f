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

UNITS = [  # and signs, as scanned and other texts have them
    ("5 cm3", "5 cm^3", True), ("5 cm3", "5 cm^2", False), ("5 m2", "5 m²", True), ("5 m2", "5 m", False),
    ("5 m/s2", "5 m/s²", True), ("3 cm23", "3", False), ("5x2", "5x^2", False), ("5㎝", "5 cm", True),
    ("5㎝", "5 m", False), ("5㎡", "5 m^2", True), ("20℃", "20°C", True), ("20℃", "68 °F", True),
    ("20℃", "20 °F", False), ("don't", "don’t", True), ("‘blue’", "blue", True), ("3 (three)", "3", True),
    ("three (3)", "3", True), ("3 (four)", "3", False), ("x(x)", "x", False), ("12,34,567", "1234567", True),
    ("12,34,567", "567,34,12", True), ("12,34,567", "1234568", False), ("(12,34,567)", "1234567", False),
    (r"\frac{\pi}{4}", "45°", True), ("180°", r"\pi", True), (r"\frac{\pi}{3}", "45°", False), (r"\pi", "180", False),
    ("0.785398", "45°", False), (r"45\pi", "45°", False),
]  # fmt: skip
SMALL, NUMBERED = "What is it?\na) red\nb) blue\nc) green", "What is it?\n1. red\n2. blue\n3. green"
NUMBERS, TWICE = "How many?\n1. 5\n2. 7\n3. 2", "Which? (A) 1 (B) 2 (C) 3\nAnswer with A. or B. or C."
BEFORE = "Choices: (A) 5 (B) 6 (C) 7 (D) 8 Find the area in cm."
OPTIONS = [  # answer, gold, question, right
    ("blue", "b", SMALL, True), ("b", "blue", SMALL, True), ("(b) blue", "b", SMALL, True), ("B", "b", SMALL, True),
    ("a", "blue", SMALL, False), ("green", "b", SMALL, False), ("b", "blue", "Is it?\n(a) red\n(b) blue", True),
    ("2", "blue", NUMBERED, True), ("blue", "2", NUMBERED, True), ("2. blue", "2", NUMBERED, True),
    ("2. blue", "blue", NUMBERED, True), ("2. red", "blue", NUMBERED, False), ("3", "blue", NUMBERED, False),
    ("red", "2", NUMBERED, False), ("1", "2", NUMBERED, False), ("2.0", "2", NUMBERED, True),
    ("2", "7", NUMBERS, False), ("7", "2", NUMBERS, False), ("2.0", "2", NUMBERS, True),
    ("2", "B", TWICE, True), ("B", "2", TWICE, True), ("3", "B", TWICE, False),
    ("8", "D", BEFORE, True), ("D", "8", BEFORE, True), ("7", "D", BEFORE, False),
]  # fmt: skip

COLOURS = "What is it?\nA. red\nB. blue\nC. green\nD. wait for a bus"
CHOSEN = [  # all of these choose C
    "It's C.", "It’s C", "C is the answer.", "C is my final answer.", "I would choose C", "I choose (C).",
    "I'd go with C", "Hence C", "Therefore, (C).", "So: C", "→ C", r"\(C\)", "Answer - C",
    '{"answer": "C"}', "{'answer': 'C'}", '{"final_answer": "C. green"}',
    '```json\n{"reason": "It is green.", "answer": "C"}\n```',
    "【答案】C", "**【答案】** C", "选C", "选择C", "因此选 C。", "故选:C", "故选：C", "所以选C", "应选 C",
    "It is green. I would choose C.", "Answer choice c",
]  # fmt: skip
NOT_CHOSEN = [  # and none of these
    "It's not C.", "It isn't C", "C is not the answer.", "I would not choose C", "Hence not C", "不选C",
    "Neither B nor C", '{"answer": "C"} is wrong, it is B', "I would choose C if it were larger",
    "不应该选C", "I choose between B and C", "C is the answer to another question. So the answer is B.",
]  # fmt: skip
SAID = [  # response, gold, question, right
    ("A is correct.", "A", COLOURS, True), ("A is the answer.", "A", COLOURS, True),
    ("A is not correct.", "A", COLOURS, False), ("Đáp án: B", "B", COLOURS, True), ("الجواب هو ٥", "5", "", True),
    ("คำตอบคือ 5", "5", "", True), ("Odpowiedź: 5", "5", "", True), ("उत्तर: ५", "5", "", True),
    ("उत्तर: ६", "5", "", False), ('{"answer": 12}', "12", "", True), ('{"answer": 13}', "12", "", False),
    (r'{"answer": "\\frac{1}{2}"}', "0.5", "", True), (r"The answer is \(x+1\).", "1+x", "", True),
    ("The answer is B. Actually it is A.", "B", COLOURS, False), ("B. Actually, A.", "B", COLOURS, False),
    ("The answer is B. Wait, it is A.", "B", COLOURS, False), ("B. actually blue", "B", COLOURS, True),
    ("D. wait for a bus", "D", COLOURS, True), ("The answer is blue. Actually red.", "blue", COLOURS, False),
    ("Yes, but actually no.", "Yes", "", False), ("No. Wait, yes.", "No", "", False),
    ("Yes, it is actually larger.", "Yes", "", True), ("No, actually the left one is larger.", "No", "", True),
    ("Yes, as far as I can see from the picture that you have sent to me. Actually, no.", "Yes", "", False),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "gold", "right"), [*FACTORS, *INTERVALS, *COMMAS, *UNITS])
def test_an_answer_in_a_box(answer, gold, right):
    assert mark(rf"\boxed{{{answer}}}", gold, "") == (right, "boxed")


@pytest.mark.parametrize(("answer", "gold", "question", "right"), OPTIONS)
def test_options_in_small_letters_numbered_and_before_more_text(answer, gold, question, right):
    assert mark(rf"\boxed{{{answer}}}", gold, question) == (right, "boxed")


@pytest.mark.parametrize("response", CHOSEN)
def test_a_choice_without_a_box(response):
    assert mark(response, "C", COLOURS)[0] and not mark(response, "B", COLOURS)[0]


@pytest.mark.parametrize("response", NOT_CHOSEN)
def test_a_letter_that_is_not_chosen(response):
    assert not mark(response, "C", COLOURS)[0]


@pytest.mark.parametrize(("response", "gold", "question", "right"), SAID)
def test_an_answer_said_in_other_words_or_taken_back(response, gold, question, right):
    assert mark(response, gold, question)[0] is right
