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
    ("100, 200", "200,100", False), ("100,200", "300, 200", False),
    ("234, 1", "1,234", False), ("100, 200", "100200", False),
    ("1,234, 5,678", "1234, 5678", True), ("1,234, 5", "1234", False), ("(0, 1,000)", "(0,1000)", True),
    ("1,234,567", "1234567", True), (r"\sqrt{1,234}", r"\sqrt{1234}", True), ("x^{1,000}", "x^{1000}", True),
    ("(1,234+1)", "1235", True), (r"\$1,000.50", "1000.5", True), ("-1,234", "-1234", True),
    # as a factor, an argument or a power, and in TeX's own braces, it is one number
    ("{10,000}", "10000", True), ("{1,000} kg", "1000 kg", True), (r"{1,234}\text{ cm}", "1234", True),
    ("={10,000}", "10000", True), (r"\log(10,000)", "4", True), ("(1,000)^2", "1000000", True),
    (r"3\times(10,000)", "30000", True), (r"\sqrt{(10,000)}", "100", True), (r"\frac{(1,000)}{2}", "500", True),
    ("-(1,000)", "-1000", True), ("(2,000) + 3", "2003", True), ("x=(1,000)", "1000", True),
    (r"\$(1,234)", "1234", True), (r"\left(1,000\right)^2", "1000000", True), ("(1,000)^2", "1000", False),
    ("A=(5,250)", "5250", False), ("(x,y)=(5,250)", "5250", False), ("{200,100}", "{100,201}", False),
    (r"\begin{pmatrix}1\\(a+b)\end{pmatrix}", r"\begin{bmatrix}1\\ (a+b)\end{bmatrix}", True),
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
    ("5 (%)", "5%", True), (r"5 [\%]", "5%", True), ("45 (%)", "45", True), ("5 (%)", "6%", False),
    ("4 N2", "4", False),
    ("(a) 4, (b) 12", "(a) 4 (b) 12", True), ("a) 4.0; b) 12", "(a) 4 (b) 12", True),
    ("(a) 5 (b) 12", "(a) 4 (b) 12", False), ("(a) 4", "(a) 4", True),
]  # fmt: skip
SMALL, NUMBERED = "What is it?\na) red\nb) blue\nc) green", "What is it?\n1. red\n2. blue\n3. green"
NUMBERS, TWICE = "How many?\n1. 5\n2. 7\n3. 2", "Which? (A) 1 (B) 2 (C) 3\nAnswer with A. or B. or C."
FIND, SUM = "A ball.\n(a) Find the time.\n(b) Find the height.", "See\na. angle x\nb. angle y\nWhat is the sum?"
GATES = "Example: (A) one (B) two.\nWhich gate is this?\n(A) AND\n(B) OR\n(C) NAND\n(D) NOR"
BOOKS = "Which book?\nA. Emma\nB. Dracula\nC. Dune\nD. This Is How You Lose Her"
BEFORE = "Choices: (A) 5 (B) 6 (C) 7 (D) 8 Find the area in cm."
OPTIONS = [  # answer, gold, question, right
    ("blue", "b", SMALL, True), ("b", "blue", SMALL, True), ("(b) blue", "b", SMALL, True), ("B", "b", SMALL, True),
    ("a", "blue", SMALL, False), ("green", "b", SMALL, False), ("b", "blue", "Is it?\n(a) red\n(b) blue", True),
    ("2", "blue", NUMBERED, True), ("blue", "2", NUMBERED, True), ("2. blue", "2", NUMBERED, True),
    ("2. blue", "blue", NUMBERED, True), ("2. red", "blue", NUMBERED, False), ("3", "blue", NUMBERED, False),
    ("red", "2", NUMBERED, False), ("1", "2", NUMBERED, False), ("2.0", "2", NUMBERED, True),
    ("2", "7", NUMBERS, False), ("7", "2", NUMBERS, False), ("2.0", "2", NUMBERS, True),
    ("2", "B", TWICE, True), ("B", "2", TWICE, True), ("3", "B", TWICE, False),
    ("(b) 12", "12", FIND, True), ("12", "(b) 12", FIND, True), ("5 (a)", "5", FIND, True), ("a. 12", "12", SUM, True),
    ("(b) 12", "13", FIND, False), ("AND", "A", GATES, True), ("one", "A", GATES, False), ("OR", "B", GATES, True),
    ("This Is How You Lose Her", "D", BOOKS, True), ("This Is", "D", BOOKS, False),
    ("8", "D", BEFORE, True), ("D", "8", BEFORE, True), ("7", "D", BEFORE, False),
]  # fmt: skip

COLOURS = "What is it?\nA. red\nB. blue\nC. green\nD. wait for a bus"
CHOSEN = [  # all of these choose C
    "It's C.", "It’s C", "C is the answer.", "C is my final answer.", "I would choose C", "I choose (C).",
    "I'd go with C", "Hence C", "Therefore, (C).", "So: C", "→ C", r"\(C\)", "Answer - C",
    '{"answer": "C"}', '{"final_answer": "C. green"}', "本题选C", "图中是绿色，不是红色，故选C",
    '```json\n{"reason": "It is green.", "answer": "C"}\n```',
    "【答案】C", "**【答案】** C", "选C", "选择C", "因此选 C。", "故选:C", "故选：C", "所以选C", "应选 C",
    "It is green. I would choose C.", "Answer choice c",
]  # fmt: skip
NOT_CHOSEN = [  # and none of these
    "It's not C.", "It isn't C", "C is not the answer.", "I would not choose C", "Hence not C", "不选C",
    "不要选C", "不该选C", "不宜选C", "不建议选C", "不可能选C", "不是选C", "不得选C", "无法选C", "没有选C", "切勿选C",
    "误选C", "错选C", "若选C", "如果是绿色就选C", "如果是绿色，选C", "排除选C", "而非选C",
    "Maybe, it's C.", "Many would say, it's C.",
    "If it were green, I'd pick C.", "If it were larger, I would choose C.\nIt is smaller.",
    'Do not write {"answer": "C"}', 'Possible responses: {"answer": "C"}', '{"answer": "C", "corrected_answer": "B"}',
    "A student claims C is the answer.\nThe picture is blue.\n\nB",
    "If green were shown, C is the answer.\nBlue is shown.\n\nB",
    "Neither B nor C", '{"answer": "C"} is wrong, it is B', "I would choose C if it were larger",
    "不应该选C", "I choose between B and C", "C is the answer to another question. So the answer is B.",
]  # fmt: skip
GROUPS = "What does the sign say?\nA. Go\nB. Wait for Group A\nC. Stop"
ENDED = 'The answer is **12**.\n```python\nprint({"area": area, "answer": round(area)})\n```'
CHAINS = [  # response, answer; a letter on the way is no answer
    ("At first glance, it's A.\nBut looking closer the color is blue.\n\n(B) blue", "B"),
    ("At first, I'd go with A.\nBut it is blue.\n\nB", "B"), ("Start at A.\n→ B\n→ C\n→ D\n\n12", "12"),
    ("First, I choose A.\nThen there remain 3 ways.\nThe probability is 1/3.", "1/3"),
    ("Reading the table, for row 3, it is B.\nFor row 4, the value is 12.\n\n12", "12"),
    ("小明选A\n小红选B\n共有 2 种\n\n2", "2"), ("若选择A\n则费用为 30 元\n\n30", "30"),
    ("Therefore, A\n\n$$= 12$$", "12"),
    ("∠A is right, so BC is the hypotenuse.\nBC² = 25\n\nBC = 5", "5"), ("Angle A is right.\nSo the area is 30.", "30"),
    ("Only statement A is correct.\n\nThus the number of correct statements is 1.", "1"),
    ("A student claims A is correct.\nThe picture is blue.\n\nB", "B"),
    ("B. blue\n\nThe picture shows blue. Among the rest, A is right of it.", "B"),
    ("If green were shown, C is the answer.\nBlue is shown.\n\nB", "B"),
    ("Vitamin C is the answer to scurvy.\n\nSo the number is 3.", "3"),
    ("答案为 12。\n故选：A", "12"), ("A is red.\n\nSo it is blue. B is right.", "B"),
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
    ("No, there are actually no red cars in the picture.", "No", "", True),
    ("No. The graph actually shows no increase.", "No", "", True), ("Yes, it is actually true.", "Yes", "", True),
    ("Yes, the boy is waiting; there is no bus.", "Yes", "", True),
    ("Yes. Wait, I double-check. Yes.", "Yes", "", True),
    ("B. Let me double check. Yes, B", "B", COLOURS, True), ("B. Wait, I think that is right.", "B", COLOURS, True),
    ("(B) Actually, I checked: blue", "B", COLOURS, True), ("B. Wait for Group A", "B", GROUPS, True),
    ("B", "B. Wait for Group A", GROUPS, True), ("B. blue. Wait, it is A.", "B", COLOURS, False),
    (ENDED, "12", "", True), (ENDED, "area", "", False), ('{"answer": 1,234}', "1", "", False),
    ('{"answer": "12", "unit": "m"}', "12 cm", "", False), ('{"answer": {"answer": "12"}}', "12", "", False),
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


@pytest.mark.parametrize(("response", "answer"), CHAINS)
def test_the_answer_at_the_end_of_a_chain(response, answer):
    question = COLOURS if answer == "B" else ""
    assert mark(response, answer, question)[0] and not mark(response, "A", question)[0]
