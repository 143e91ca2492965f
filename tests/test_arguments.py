"""Arguments of a wrong type: a sentence that names the argument and what it got, whichever function."""

import inspect
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import numpy as np
import pytest
import torch
from torch import nn

import drift_peft
from drift_peft import KeepSet, ReasoningPrior
from drift_peft.arguments import check_whole, is_number, is_of, nearest, typed

WRONG = (3, -1.5, True, "x", b"x", [], ["x"], [1.5], {"x": "y"}, object(), None, (1, 2), 1j)
PLAIN = {"guide", "keep", "language_model_targets"}  # which say more than the type
METHODS = [ReasoningPrior.load, ReasoningPrior.truncate, ReasoningPrior.as_lora]
METHODS += [ReasoningPrior.save, ReasoningPrior.push_to_hub, KeepSet.load, KeepSet.push_to_hub]
FUNCTIONS = [f for f in (getattr(drift_peft, name) for name in drift_peft.__all__) if inspect.isfunction(f)]
TYPED = [f for f in FUNCTIONS if f.__name__ not in PLAIN] + METHODS
FITTING = ["x", 0.5, 3, True, [], nn.Identity(), None]


def checked_parameters():
    for function in TYPED:
        for name in inspect.signature(function).parameters:
            if get_type_hints(function).get(name, Any) is not Any:
                yield pytest.param(function, name, id=f"{function.__qualname__}-{name}")


@pytest.mark.parametrize("function, name", checked_parameters())
def test_a_wrong_type_is_a_sentence_that_names_it(function, name):
    hints, parameters = get_type_hints(function), inspect.signature(function).parameters
    required = {key: next(v for v in FITTING if is_of(v, hints.get(key, Any))) for key in required_of(parameters)}
    wrong = [value for value in WRONG if not is_of(value, hints[name])]
    assert len(wrong) > 3
    for value in wrong:
        with pytest.raises(ValueError) as error:
            function(**required | {name: value})
        assert str(error.value).startswith(f"{name} must be ") and str(error.value).endswith(f", got {value!r}")


def required_of(parameters):
    return [name for name, p in parameters.items() if p.default is inspect.Parameter.empty]


@pytest.mark.parametrize(
    "hint, right, wrong",
    [
        (int, [0, -3, 10**30], [1.0, True, "1", None]),
        (float, [1, 0.5, np.float64(1)], [True, "1", None, torch.ones(())]),
        (bool, [True, False], [0, 1, "yes", None]),
        (str | Path, ["a", Path("a"), "\udcff", next(os.scandir("."))], [b"a", 1, None, ["a"]]),
        (str | None, ["", None], [0]),
        (float | Literal["auto"], [1, "auto"], ["Auto", None]),
        (Sequence[int] | None, [[1], (1, 2), range(3), None], [1, "1", ["1"], [1.5], [True], {1}, b"12"]),
        (str | Sequence[str], ["a", ["a"], []], [["a", 1], 1]),
        (list[str], [["a"]], [("a",), [1], "a"]),
        (Sequence[tuple[str, str]], [[("a", "b")], [["a", "b"]]], [["ab"], [("a",)], [("a", 1)]]),
        (Mapping[str, float] | Iterable[tuple[str, float]], [{"a": 1}, [("a", 1)], iter([])], [{"a": "1"}, {1: 1}, 1]),
        (Any, [None, object()], []),
    ],
)
def test_types(hint, right, wrong):
    assert [is_of(value, hint) for value in right] == [True] * len(right)
    assert [is_of(value, hint) for value in wrong] == [False] * len(wrong)


def test_what_is_read_once_stays_unread():
    pairs = iter([("a", 1.0)])
    assert is_of(pairs, Iterable[tuple[str, float]]) and list(pairs) == [("a", 1.0)]


def test_the_sentence():
    @typed
    def numpy(a: int, b: Sequence[int] = (), c: Sequence[float] = (), d: bool = False):
        assert not any(type(value).__module__ == "numpy" for value in (a, *b, *c, d))
        return a, b, c, d

    @typed
    def function(
        a: int | None = None,
        b: Sequence[tuple[str, str]] = (),
        c: nn.Module | str | Path = "",
        d: float | Literal["auto"] = 1,
        e: Mapping[str, float] | None = None,
    ) -> str:
        """Its words."""
        return "done"

    assert function.__doc__ == "Its words." and function(1, [("a", "b")], Path("x"), "auto", {"a": 1}) == "done"
    assert numpy(np.int64(3), np.array([1, 2]), [np.float32(0.5)], np.bool_(True)) == (3, [1, 2], [0.5], True)
    assert numpy(1, {2, 1}, frozenset([0.5])) == (1, [1, 2], [0.5], False)
    with pytest.raises(ValueError, match="b must be a list, each entry of it a whole number, got"):
        numpy(1, {1, "a"})
    with pytest.raises(ValueError, match=r"a must be a whole number, got 1\.5"):
        numpy(np.float64(1.5))
    for wrong, said in {
        "a": "a must be a whole number or None, got 'x'",
        "b": "b must be a list, each entry of it (a string, a string), got 'x'",
        "c": "c must be a Module, a string or a path, got 1",
        "d": "d must be a number or 'auto', got 'x'",
        "e": "e must be None or a dict of a string to a number, got 'x'",
    }.items():
        with pytest.raises(ValueError) as error:
            function(**{wrong: 1 if wrong == "c" else "x"})
        assert str(error.value) == said
    with pytest.raises(TypeError, match=r"function\(\) takes from 0 to 5 positional arguments but 6 were given"):
        function(1, [], "", 1, None, 6)
    with pytest.raises(ValueError) as error:
        function(a="x" * 1000)
    assert len(str(error.value)) < 300
    with pytest.raises(ValueError, match=r"^a must be a whole number or None, got a Sequential$"):  # no page of modules
        function(a=nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize("function", [f for f in TYPED if "prior" not in f.__name__], ids=lambda f: f.__qualname__)
def test_an_empty_text_is_no_path(function):
    """It would be the current folder: what an unset variable of a shell makes of an output."""
    hints, parameters = get_type_hints(function), inspect.signature(function).parameters
    required = {key: next(v for v in FITTING if is_of(v, hints.get(key, Any))) for key in required_of(parameters)}
    for name in (name for name in parameters if Path in get_args(hints.get(name))):
        with pytest.raises(ValueError, match=f"^{name} is empty: name a file, a folder or a hub id$"):
            function(**required | {name: ""})


def test_whole_numbers_numbers_and_names():
    check_whole(a=1, b=3)
    check_whole(0, seed=0)
    for value in (0, -1, True, 1.0, "1", None):
        with pytest.raises(ValueError, match=r"^b must be a whole number ≥ 1, got "):
            check_whole(a=1, b=value)
    assert is_number(0) and is_number(-2.5)
    assert not any(map(is_number, (float("nan"), float("inf"), 1e39, -(10**400), True, "1", None)))
    assert nearest("adaptiv", ["absolute", "adaptive"]) == "did you mean adaptive?" and nearest("x", ["absolute"]) == ""
    assert nearest("stf", ["drift", "sft"]) == "did you mean sft?" and nearest("limit", ["split"]) == ""


@pytest.mark.parametrize("name, meant", [
    ("keep_smaples", "keep_samples"), ("lora_r", "r"), ("data_path", "data"), ("scale", "drift_scale"),
    ("keep_set", "keep"), ("train_batch_size", "per_device_train_batch_size"), ("base-model", "base"),
    ("lr", "learning_rate"), ("rank", "r"), ("model_name_or_path", "base"), ("keep_sampels", "keep_samples"),
    ("max_seq_length", "max_tokens"),
])  # fmt: skip
def test_other_trainers_names_come_first_then_a_slip_and_then_a_name_that_shares_all_words(name, meant):
    known = ["keep", "keep_samples", "keep_weight", "r", "lora_dropout", "data", "data_seed", "drift_scale", "base"]
    known += ["learning_rate", "lr_scheduler_type", "prior_rank", "model_init_kwargs", "max_length", "max_tokens"]
    assert nearest(name, [*known, "per_device_train_batch_size", "auto_find_batch_size"]) == f"did you mean {meant}?"
