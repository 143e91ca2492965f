"""The demo's pictures: labels stand beside the ends of their lines, in order and apart."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

from drift_peft.demo.compare import METHODS
from drift_peft.demo.evaluate import MEASURES
from drift_peft.demo.figures import draw_results, draw_samples, label_ends, spread


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_labels_keep_their_order_and_their_distance(places):
    moved = spread(places, 0.1)
    order = sorted(range(len(places)), key=lambda i: (places[i], i))
    gaps = [moved[b] - moved[a] for a, b in pairwise(order)]
    assert all(gap >= 0.1 - 1e-9 for gap in gaps)
    assert min(moved) >= -1e-9 and max(moved) <= 1 + 1e-9


def test_labels_that_are_apart_stay_and_close_ones_go_to_both_sides():
    assert spread([0.2, 0.8, 0.5], 0.1) == pytest.approx([0.2, 0.8, 0.5])
    assert spread([0.5, 0.5], 0.1) == pytest.approx([0.45, 0.55])
    assert spread([0.98, 0.99], 0.1) == pytest.approx([0.9, 1.0])


def test_a_label_stands_at_the_height_of_its_lines_end():
    axes = Figure().subplots()
    axes.set_yscale("log")
    axes.plot([0, 1], [1, 100], label="high")
    axes.plot([0, 1], [1, 10], label="low")
    label_ends(axes, gap=0.05)
    at = {text.get_text(): text.get_position()[1] for text in axes.texts}
    assert at.keys() == {"high", "low"} and 0 < at["low"] < at["high"] < 1
    assert at["high"] - at["low"] == pytest.approx(1 / (2 + 0.2), abs=0.01)  # a decade of two, with the margins


@pytest.mark.parametrize("methods", [list(METHODS), ["merge-0.5"], ["vlm", "drift"]])
def test_any_methods_can_be_drawn(methods, tmp_path):
    trained = [key for key in methods if METHODS[key].trained]
    example = {"answer": "1", "answers": dict.fromkeys(methods, "7" * 90), "right": dict.fromkeys(methods, False)}
    result = {
        "seed": 0,
        "split": "test",
        "titles": {key: METHODS[key].title for key in methods},
        "scores": {key: dict.fromkeys(MEASURES, 0.5) for key in methods},
        "history": {key: [{"step": step, "alignment": 0.1 * step} for step in (1, 5)] for key in trained},
        "examples": [example] * 2,
    }
    draw_results(result, tmp_path / "results.png")
    draw_samples([np.zeros((14, 56))] * 2, result, tmp_path / "samples.png")
    assert all(Image.open(tmp_path / f"{name}.png").width == 1328 for name in ("results", "samples"))
