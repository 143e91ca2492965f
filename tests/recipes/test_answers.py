"""recipes/parts/answers.py: what counts as the right answer, and what does not."""

import os
import signal
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parts import answers
from parts.answers import is_correct, well_formed
from parts.options import read_options
from parts.reading import extract_boxed

OPTIONS = "Which one? (A) 10 cm (B) 12 cm (C) blue"
SAME = [  # answer, gold
    # choices
    ("B", "B"), ("(B)", "B"), ("B", "(B)"), ("b", "B"), ("B. 12 cm", "B"), ("B", "B. 12 cm"), ("12 cm", "B. 12 cm"),
    (r"\text{B}", "B"), (r"\textbf{(B)}", "B"), ("option B", "B"), ("A, C", "C, A"), ("A and C", "A,C"),
    # numbers
    ("5", "5.0"), ("7", "007"), ("1/2", "0.5"), (r"\frac12", "0.5"), ("1/3", "0.333333"), ("1,000", "1000"),
    ("1 000", "1000"), ("2 1/2", "2.5"), (r"2\frac{1}{2}", "5/2"), ("-3", "−3"), ("2e3", "2000"),
    (r"2\times 10^3", "2000"), ("x=5", "5"), ("5", "x = 5"), ("AB = 5", "5"), ("5:3", "5/3"), (r"\boxed{5}", "5"),
    # formulas
    ("2√3", r"\sqrt{12}"), ("12π", r"12\pi"), ("(x+1)^2", "x^2+2x+1"), ("x^{2}", "x^2"), ("3<x", "x>3"),
    (r"\dfrac{\sqrt{3}}{2}", r"\frac{\sqrt3}{2}"),
    # units
    ("5 cm", "5"), ("5", "5 cm"), ("5 cm", r"5\text{ cm}"), (r"5 \mathrm{~cm}", "5cm"), ("500 cm", "5 m"),
    ("5m", "5 m"), ("5 centimeters", "5 cm"), ("50 km/h", "50 kilometers per hour"), ("25 cm^2", r"25\text{ cm}^2"),
    ("25 square centimeters", "25 cm²"), ("1 L", "1000 mL"), ("90 minutes", "1.5 hours"), (r"30^\circ", "30"),
    ("30°", "30 degrees"),
    (r"12\pi cm^2", r"12\pi"), (r"5\sqrt{2} cm", r"5\sqrt2"), ("180°", r"\pi rad"), (r"5 \text{ m/s}", "5 m/s"),
    ("5 apples", "5"), ("5 apples", "5 apple"), (r"\$5", "5"), ("$5", "5 dollars"), ("10 cm", r"10 \text{ cm}."),
    # percent
    (r"50\%", "50%"), ("50", r"50\%"), ("0.5", r"50\%"), (r"50\%", "0.5"),
    # sets, points, intervals
    ("2,1", "1,2"), (r"\{2,1\}", r"\{1,2\}"), (r"\{1,2\}", "1,2"), ("2 or 3", "3, 2"), ("x=2 or x=3", "2,3"),
    (r"\pm 2", "-2,2"), ("(1,2)", "(1, 2)"), (r"\left(1,2\right)", "(1,2)"), ("[1,2)", "[1, 2)"),
    # words
    ("Yes", "yes"), ("no.", "No"), (r"\text{blue}", "Blue"), ("3:45", "3:45"),
    ("isosceles  triangle", "Isosceles Triangle"),
]  # fmt: skip
OTHER = [
    ("A", "B"), ("(A)", "B"), ("A. 12 cm", "B"), ("12 cm", "B"), ("7", "B"), ("A, B", "A, C"),
    ("5", "6"), ("-3", "3"), ("0.33", "1/3"), ("3.14", r"\pi"), ("3", "2 1/2"), ("3/2", "2 1/2"), ("1", "2 1/2"),
    ("2", "2^2"), ("10^{-3}", "10^3"), ("12 34", "1234"), ("x=5", "y=5"), ("x<3", "x>3"), ("5x", "5"), ("5", "5x"),
    ("5 cm", "5 m"), ("5 apples", "5 oranges"), ("5 cm", "5 cm^2"), ("5 m/s", "5 km/h"), ("5 m", "5 s"),
    ("5 m/s", "5 m"), (r"0.5\%", "0.5"), ("5", r"50\%"),
    ("(2,1)", "(1,2)"), ("2,1", "(1,2)"), ("1,2,3", "1,2"), ("1", "1,2"), ("1,2", "1"), ("[1,2]", "(1,2)"),
    ("3", "3 or 5"), ("cat and dog", "act and god"),
    ("5 and 3", "3"), ("5 apples and 3 oranges", "3"),  # a lenient matcher takes the last number that it finds
    ("on", "no"), ("lube", "blue"), ("1:15", "3:45"), ("45", "3:45"), ("No solution", "0"), ("yes", "no"), ("", "5"),
]  # fmt: skip


def boxed(answer):
    return rf"<think> so it is </think> the answer is \boxed{{{answer}}}."


@pytest.mark.parametrize(("answer", "gold"), SAME)
def test_the_same_answer(answer, gold):
    assert is_correct(boxed(answer), gold)


@pytest.mark.parametrize(("answer", "gold"), OTHER)
def test_another_answer(answer, gold):
    assert not is_correct(boxed(answer), gold)


@pytest.mark.parametrize(
    ("answer", "gold", "same"),
    [("12 cm", "B", True), ("12", "B", True), ("B", "12 cm", True), ("blue", "C", True), ("C", "Blue", True),
     ("C: blue", "C", True), ("(B) 12 cm", "12", True), ("10 cm", "B", False), ("10", "B", False),
     ("A", "12 cm", False), ("A", "Blue", False), ("A", "B", False), ("D", "12", False),
     ("b", "B", True), ("b", "12 cm", True), ("b", "C", False), ("B - 12 cm", "B", True), ("C - blue", "C", True),
     ("B – 12 cm", "B", True), ("C - blue", "B", False)],
)  # fmt: skip
def test_an_option_is_named_by_its_letter_or_by_its_text(answer, gold, same):
    assert is_correct(boxed(answer), gold, question=OPTIONS) is same


@pytest.mark.parametrize(
    ("question", "options"),
    [(OPTIONS, {"A": "10 cm", "B": "12 cm", "C": "blue"}),
     ("Point A is at 3.\nChoices:\nA. 1\nB. 2\nC. 3", {"A": "1", "B": "2", "C": "3"}),
     ("A: red\nB: green", {"A": "red", "B": "green"}),
     ("What is A. Smith's age?", {}), ("What is 2 + 3?", {}), ("", {})],
)  # fmt: skip
def test_options_are_read_from_the_question(question, options):
    assert read_options(question) == options


@pytest.mark.parametrize(
    ("text", "box"),
    [(r"\boxed{5}", "5"), (r"\boxed{1} or \boxed{2}", "2"), (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
     (r"\boxed{\{1, {2}\}} so", r"\{1, {2}\}"), (r"$\boxed{ \text{B} }$", r"\text{B}"), (r"\boxed{}", ""),
     (r"\boxed{1} then \boxed{2", None), ("5", None), ("", None)],
)  # fmt: skip
def test_the_last_box_is_the_answer_unless_it_is_torn(text, box):
    assert extract_boxed(text) == box


@pytest.mark.parametrize(
    ("response", "good"),
    [(r"<think> a </think> \boxed{5}", True), ("\n<think>\na\n</think>\n\nIt is $\\boxed{5}$.", True),
     (r"<think> \boxed{5} </think>", False), (r"<think> a </think> 5", False), (r"<think></think> \boxed{5}", False),
     (r"a </think> \boxed{5}", False), (r"<think> a \boxed{5}", False), (r"so <think> a </think> \boxed{5}", False),
     (r"<think> a </think> <think> b </think> \boxed{5}", False), (r"<think> a </think> \boxed{}", False),
     (r"<think> a </think> \boxed{5", False), (r"\boxed{5}", False)],
)  # fmt: skip
def test_what_is_well_formed(response, good):
    assert well_formed(response) is good


TEXT = st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), min_size=1)


@given(
    st.recursive(
        TEXT.map(lambda t: t.translate(str.maketrans("", "", "\\{}"))), lambda s: s.map(lambda t: f"a{{{t}}}b")
    )
)
def test_whatever_has_balanced_braces_comes_out_of_its_box(text):
    assert extract_boxed(rf"so \boxed{{{text}}} it is") == text.strip()


@settings(max_examples=40, deadline=None)
@given(st.integers(-9999, 9999), st.integers(-9999, 9999), st.sampled_from(["", " cm", r"\%", "^\\circ"]))
def test_whole_numbers_are_the_same_only_if_they_are_equal(one, other, unit):
    assert is_correct(boxed(f"{one}{unit}"), f"{other}{unit}") is (one == other)
    assert is_correct(boxed(f"{one:,}"), f"{one}")


def test_a_comparison_that_does_not_end_is_given_up_and_the_next_is_made(monkeypatch):
    assert is_correct(boxed("0.5"), "1/2")
    process = answers._judge.process
    monkeypatch.setattr(answers, "SECONDS", 0.5)
    assert not is_correct(boxed("1"), "10^{10^{10}}")
    assert process.wait(timeout=10) != 0
    monkeypatch.undo()
    assert is_correct(boxed("0.25"), "1/4")
    assert answers._judge.process is not process


def test_a_comparison_that_is_given_up_spoils_none_of_the_next(monkeypatch):
    monkeypatch.setattr(answers, "SECONDS", 0.1)
    undecided = answers._judge("1", "10^{10^{10}}", {})
    monkeypatch.undo()
    assert undecided is None and [answers._judge("0.25", gold, {}) for gold in ("1/4", "1/3")] == [True, False]


def test_a_process_that_was_killed_is_replaced_and_asked_again():
    assert answers._judge("0.5", "1/2", {})
    answers._judge.process.kill()
    assert answers._judge("0.25", "1/4", {})
    answers._judge.process.kill()
    assert answers._judge("0.25", "1/3", {}) is False


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system does not count a process's time")
def test_time_in_which_a_process_may_not_compute_does_not_count(monkeypatch):
    assert answers._judge("0.5", "1/2", {})
    process = answers._judge.process
    monkeypatch.setattr(answers, "SECONDS", 0.5)
    os.kill(process.pid, signal.SIGSTOP)  # stands for a busy machine
    threading.Timer(1.0, os.kill, (process.pid, signal.SIGCONT)).start()
    assert answers._judge("0.25", "1/4", {}) and answers._judge.process is process


def test_no_comparison_waits_for_ever(monkeypatch):
    assert answers._judge("0.5", "1/2", {})
    monkeypatch.setattr(answers, "PATIENCE", 0.1)
    monkeypatch.setattr(answers, "SECONDS", 1000.0)
    assert answers._judge("1", "10^{10^{10}}", {}) is None


def test_a_process_starts_where_the_signal_of_its_time_is_ignored(monkeypatch):
    monkeypatch.setattr(answers, "SECONDS", 0.1)
    monkeypatch.setattr(answers, "PATIENCE", 30.0)
    judge = answers.Judge()
    handler = signal.signal(signal.SIGPROF, signal.SIG_IGN)
    try:
        process = judge.process = judge._started()
        assert judge("1", "10^{10^{10}}", {}) is None
    finally:
        signal.signal(signal.SIGPROF, handler)
    assert process.returncode == answers.OUT_OF_TIME


def test_a_process_that_does_not_start_is_named(monkeypatch):
    monkeypatch.setattr(answers.sys, "executable", "false")
    with pytest.raises(ChildProcessError, match=r"compares answers ended with 1 before it was ready"):
        answers.Judge()("0.5", "1/2", {})


def test_ctrl_c_ends_the_process(monkeypatch):
    class Interrupted(threading.Event):
        def cancel(self):
            pass

        def start(self):
            raise KeyboardInterrupt

    judge = answers.Judge()
    process = judge.process = judge._started()
    monkeypatch.setattr(answers.threading, "Timer", lambda *given: Interrupted())
    with pytest.raises(KeyboardInterrupt):
        judge("0.5", "1/2", {})
    assert process.wait(30) == -signal.SIGKILL and judge.process is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_fork_asks_a_process_of_its_own():
    assert answers._judge("0.5", "1/2", {})
    if (child := os.fork()) == 0:
        os._exit(0 if answers._judge.process is None and not answers._judge.lock.locked() else 1)
    assert os.waitpid(child, 0)[1] == 0 and answers._judge.process is not None


def test_threads_may_ask():
    verdicts = {}

    def ask(i):
        verdicts[i] = is_correct(boxed(f"{i}/2"), str(i / 2)), is_correct(boxed(f"{i}/2"), str(i))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == {i: (True, False) for i in range(1, 9)}
