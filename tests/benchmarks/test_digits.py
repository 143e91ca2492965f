"""benchmarks/digits.py: the study measures what it says, can be stopped at any run, and shows what it found."""

import json
import re
from dataclasses import replace
from pathlib import Path

import digits
import numpy as np
import pytest
import torch
from digits_study import ledger as ledgers
from digits_study.collect import at_the_edge, collect
from digits_study.figures import frontier
from digits_study.intervals import interval
from digits_study.ledger import Ledger
from digits_study.methods import CANDIDATES, METHODS
from digits_study.plan import FULL, SMALLEST, SWEEPS
from digits_study.priors import make_priors
from digits_study.report import write
from digits_study.run import DEFAULTS, movement, perform, scores, training_samples, unmarked
from digits_study.words import compared
from digits_study.worlds import CELL, SIDE, WORLDS, FoldedDigits, llava_processor, mirrored
from digits_study.worlds import FOLDER as STUDY
from hypothesis import given
from hypothesis import strategies as st

from drift_peft import ReasoningPrior
from drift_peft.demo.evaluate import encode
from drift_peft.demo.train import load
from drift_peft.demo.world import PERCEPTION, Digits, make_samples

FOLDER = Path(__file__).parents[2] / "benchmarks"

pytestmark = pytest.mark.skipif(not STUDY.is_dir(), reason="the source distribution lacks the study's checkpoints")

SMALL = {"steps": 2, "samples": 8, "size": 4}


@pytest.fixture(scope="module")
def priors(tmp_path_factory):
    folder = tmp_path_factory.mktemp("priors")
    make_priors(folder, "qwen")
    return folder


def run_of(method, world="qwen", seed=0, **settings):
    best = METHODS[METHODS[method].like or method].grid
    settings = (best[0] if best else {}) | SMALL | settings
    return {"world": world, "method": method, "seed": seed, "split": "validation", "settings": settings}


def filled(ledger, plan, right):
    """Every run of the plan, with the share right(run) of right answers in each exam."""
    rng = np.random.default_rng(0)
    for _, stage in plan.stages():
        for run in stage(ledger):
            size = run["settings"].get("size", DEFAULTS["size"])
            names = ("2-3 operations", "4-5 operations", "read", "at", "count", "text reasoning")
            answers = {n: np.packbits(rng.random(size) < right(run)).tobytes().hex() for n in names}
            ledger.add(run, {"answers": answers, "seconds": 1.0, "cosine": 0.5, "absorbed": 0.5})
    return ledger


def test_an_interval_is_students_over_the_seeds():
    shares = np.array([0.3, 0.4, 0.5, 0.6, 0.7])
    answers = np.repeat((np.arange(10) < 10 * shares[:, None] - 1e-9)[None], 2, axis=0).astype(float)  # two exams alike
    middle, low, high = interval(answers)
    assert middle == pytest.approx(0.5) and middle - low == pytest.approx(high - middle)
    assert high - middle == pytest.approx(2.776 * shares.std(ddof=1) / np.sqrt(5), rel=1e-3)


def test_an_interval_covers_what_it_says():
    rng = np.random.default_rng(0)
    means = 0.5 + 0.1 * rng.standard_normal((400, 5))
    trials = [interval((rng.random((1, 5, 100)) < m[:, None]).astype(float)) for m in means]
    assert 0.92 <= np.mean([low <= 0.5 <= high for _, low, high in trials]) <= 0.98


def test_pairing_takes_away_what_two_methods_share():
    rng = np.random.default_rng(0)
    hard = rng.random((1, 5, 300)) < rng.random((1, 5, 300))
    better = hard | (rng.random((1, 5, 300)) < 0.05)
    _, low, high = interval(better.astype(float) - hard)
    assert low > 0 and high - low < 0.7 * np.diff(interval(better.astype(float))[1:])


@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_marks_survive_their_packing(right):
    text = np.packbits(right).tobytes().hex()
    assert unmarked(text, len(right)).tolist() == list(map(float, right))


def test_perception_is_the_mean_of_its_tasks():
    answers = {"2-3 operations": "80", "4-5 operations": "00", "read": "80", "at": "80", "count": "00"}
    found = scores({"answers": {**answers, "text reasoning": "00"}}, 1)
    assert found["perception"].tolist() == [pytest.approx(2 / 3)] and found["2-3 operations"].tolist() == [1]


def test_every_method_has_as_many_candidates():
    assert {len(m.grid) for m in METHODS.values() if m.grid} == {CANDIDATES}
    assert all(m.like in METHODS for m in METHODS.values() if m.like)
    for method in METHODS.values():
        assert len({json.dumps(candidate) for candidate in method.grid}) == len(method.grid)


def test_the_best_candidate_is_chosen_and_named_at_the_edge(tmp_path):
    ledger = Ledger(tmp_path / "digits.jsonl")
    best = METHODS["drift"].grid[5]
    assert FULL.choose(ledger, "qwen", "drift") is None and FULL.test_runs(ledger, "qwen", "drift") == []
    plan = replace(FULL, worlds=("qwen",), methods=("drift", "lora"), sweeps=())
    filled(ledger, plan, lambda run: 0.9 if best.items() <= run["settings"].items() else 0.5)
    assert plan.choose(ledger, "qwen", "drift") == best == plan.choose(ledger, "qwen", "drift-nf4")
    assert at_the_edge(METHODS["drift"].grid, best) == ["drift_alpha"]
    assert {run["settings"]["rate"] for run in plan.test_runs(ledger, "qwen", "drift")} == {best["rate"]}


def test_sweeps_share_the_runs_of_the_tables(tmp_path):
    ledger = Ledger(tmp_path / "digits.jsonl")
    plan = replace(FULL, worlds=("qwen",), methods=("lora", "drift", "hold"), sweeps=("steps", "strength"))
    filled(ledger, plan, lambda run: 0.5)
    table = plan.test_runs(ledger, "qwen", "hold")
    assert table == plan.test_runs(ledger, "qwen", "hold", SWEEPS["strength"].values["×1"])
    assert table == plan.test_runs(ledger, "qwen", "hold", SWEEPS["steps"].values["150"])
    weaker = plan.test_runs(ledger, "qwen", "hold", SWEEPS["strength"].values["×0.1"])
    assert [run["settings"]["drift_alpha"] for run in weaker] == [3.0] * 5


def test_the_ledger_goes_on_after_a_kill_and_refuses_other_checkpoints(tmp_path, monkeypatch):
    file = tmp_path / "digits.jsonl"
    runs = [run_of("vlm", seed=seed) for seed in (0, 1)]
    ledger = Ledger(file)
    for run in runs:
        ledger.add(run, {"seconds": 1.0})
    file.write_text(file.read_text()[:-10])
    torn = file.read_bytes()
    again = Ledger(file)
    assert runs[0] in again and runs[1] not in again and file.read_bytes() == torn
    again.add(runs[1], {"seconds": 2.0})
    assert Ledger(file)[runs[1]] == {"seconds": 2.0}
    monkeypatch.setattr(ledgers, "fingerprint", lambda world: "another")
    with pytest.raises(ValueError, match=r"line 1 of .*other checkpoints of the world 'qwen'"):
        Ledger(file)
    monkeypatch.undo()
    monkeypatch.setitem(METHODS, "vlm", replace(METHODS["vlm"], settings={"merged": 0.5}))
    ledgers.definition.cache_clear()
    with pytest.raises(ValueError, match=r"line 1 of .*when the method 'vlm' was something else"):
        Ledger(file)
    ledgers.definition.cache_clear()


def report(ledger, plan, folder):
    """The page and its appendices, by name, as they are written."""
    write(collect(ledger, plan), folder, folder / "RESULTS.md")
    return {file.name: file.read_text(encoding="utf-8") for file in folder.glob("*.md")}


def test_the_report_says_what_wins(tmp_path):
    ledger = Ledger(tmp_path / "digits.jsonl")
    shares = {"vlm": 0.2, "lora": 0.4, "merge-lora": 0.7, "drift": 0.6}
    plan = replace(FULL, worlds=("qwen", "llava"), methods=tuple(shares), sweeps=("steps", "rate"))
    filled(ledger, plan, lambda run: shares[run["method"]])
    results = collect(ledger, plan)
    pages = report(ledger, plan, tmp_path)
    page, every = pages["RESULTS.md"], "\n".join(pages.values())
    assert re.search(r"`qwen`: merged, then LoRA by \+\d+\.\d \[\+.*\] beats DRIFT \(\d\d ± \d\)", every)
    assert re.search(r"DRIFT compared with its strongest rival, .* is worse in every world, by \d+\.\d points \[", page)
    assert re.search(r"DRIFT is better than LoRA in every world, by \d\d\.\d points \[.*\] where it gains least", page)
    assert "| Is DRIFT better than LoRA? DRIFT − LoRA | +" in pages["appendix_comparisons.md"]
    assert results["known_missing"] == 0 and "No run of the plan is missing." in page
    assert re.search(r"Learning rate, times the chosen one: `qwen` ×0.5 \d+ ± \d+, \*\*×1 \d+ ± \d+\*\*", every)
    pictures = {file.name for file in tmp_path.glob("*.png")}
    assert pictures == {f"digits_{name}.png" for name in ("frontier", "rate", "steps")}
    assert all(f"]({file.name})" in every.replace("./", "") for file in tmp_path.glob("*.png"))
    assert all(re.search(rf"\]\((\./)?{name}\)", page) for name in pages if name != "RESULTS.md")


def test_a_row_is_shown_when_every_run_of_it_is_there(tmp_path):
    ledger = Ledger(tmp_path / "digits.jsonl")
    plan = replace(FULL, worlds=("qwen",), methods=("vlm", "drift", "lora-keep", "drift-keep"), sweeps=())
    filled(ledger, replace(plan, methods=("vlm", "drift")), lambda run: 0.5)
    for run in plan.tuning_runs("qwen", "drift-keep")[:-1]:
        ledger.add(run, ledger[plan.tuning_runs("qwen", "drift")[0]])
    page = report(ledger, plan, tmp_path)["RESULTS.md"]
    assert "| DRIFT, keeping | not run yet |" in page and re.search(r"Not run yet in `qwen`: .*; DRIFT, keeping;", page)
    assert "Keeping, which is to cure that, has not been run yet" in page
    filled(ledger, plan, lambda run: {"drift-keep": 0.85}.get(run["method"], 0.4))
    page = report(ledger, plan, tmp_path)["RESULTS.md"]
    assert re.search(r"\| DRIFT, keeping \| \*\*8\d ± \d", page)
    assert re.search(r"Keeping makes DRIFT better in `qwen`, by \d\d\.\d points \[", page)
    assert re.search(r"Of perception it then loses so many points: -?\d+ in `qwen`\.", page)
    assert re.search(r"With keeping in both, DRIFT compared with LoRA is better in `qwen`, by \d\d\.\d points \[", page)


def test_what_more_images_keep_is_compared_with_what_they_keep(tmp_path):
    """Neither rows that keep by 240 images nor those of other worlds stand for it."""
    ledger = Ledger(tmp_path / "digits.jsonl")
    shares = {"vlm": 0.95, "drift": 0.4, "drift-keep": 0.6, "lora-keep": 0.9}
    shares |= {"drift-keep-more": 0.9, "merge-lora-keep-more": 0.5}
    plan = replace(FULL, worlds=("qwen", "llava"), methods=tuple(shares), sweeps=())
    filled(ledger, plan, lambda run: shares[run["method"]])
    pages = report(ledger, plan, tmp_path)
    page = pages["RESULTS.md"]
    found = re.search(r"With 960 images .* it loses so many: (-?\d+) in `qwen` and (-?\d+) in `llava`, with", page)
    assert all(0 <= int(lost) <= 10 for lost in found.groups())
    assert re.search(r"By 960 images in both, DRIFT compared with merging first is better in every world, by", page)
    beaten = {line for line in pages["appendix_comparisons.md"].splitlines() if line.startswith("- `qwen`, keeping")}
    assert any("keeping: LoRA, keeping by +" in line for line in beaten)
    assert any("keeping, 960 images: nothing clearly beats" in line for line in beaten)


def test_a_start_at_a_part_of_delta_is_compared_with_merging_it_at_the_same_rank(tmp_path):
    ledger = Ledger(tmp_path / "digits.jsonl")
    shares = {"vlm": 0.95, "merge-lora-ancestor-keep": 0.5, "drift-ancestor-keep": 0.6}
    shares |= {"drift-start-ancestor-keep": 0.9}
    shares |= {"merge-lora-ancestor-keep-32": 0.95, "drift-start-ancestor-keep-32": 0.7}
    plan = replace(FULL, worlds=("qwen", "llava"), methods=tuple(shares), sweeps=())
    filled(ledger, plan, lambda run: shares[run["method"]])
    pages = report(ledger, plan, tmp_path)
    first = r"DRIFT that starts at a part of Δ from the ancestor \(`drift_start`\), compared with merging such a part"
    for how, found in (("240 images", "better"), ("240 images and rank 32", "worse")):
        assert re.search(rf"By {how}, {first} first, is {found} in every world, by", pages["RESULTS.md"])
    assert "By 960 images, DRIFT that starts" not in pages["RESULTS.md"]  # not run
    lines = pages["appendix_comparisons.md"].splitlines()
    rivals = next(line for line in lines if line.startswith("- `qwen`, keeping:"))
    assert "nothing clearly beats DRIFT, Δ from the ancestor" in rivals and "rank 32" not in rivals


def test_the_page_says_what_keepings_settings_rest_on(tmp_path):
    ledger, method = Ledger(tmp_path / "digits.jsonl"), "drift-ancestor-keep"
    plan = replace(FULL, worlds=("qwen",), methods=("vlm", "drift", method), sweeps=("keep_images",))
    best = METHODS[method].grid[2]  # the highest of the strengths, at the lowest rate

    def share(run):
        kept = run["method"] == method and run["settings"].items() >= best.items()
        return 0.9 if kept and run["settings"].get("keep_images") != 15 else 0.3

    filled(ledger, plan, share)
    page = report(ledger, plan, tmp_path)["RESULTS.md"]
    assert f"With keeping, and Δ from the ancestor, it chose {best['drift_alpha']:g} in `qwen`." in page
    rests = re.search(r"- \*\*Images of the keep set: 240\*\* \(`qwen`\)\. (.*)", page)[1]
    assert "*15* costs most, " in rests and "level" in rests


def test_the_page_says_what_no_control_explains(tmp_path):
    """The gentlest of all ways that keep nothing is named, and so is what any pull brings, tuned as DRIFT is."""
    ledger = Ledger(tmp_path / "digits.jsonl")
    shares = {"vlm": 0.95, "lora": 0.3, "drift": 0.5, "drift-random": 0.7, "drift-random-tuned": 0.4}
    shares |= {"drift-keep": 0.9, "drift-random-keep": 0.6, "pull-to-zero-keep": 0.94}
    filled(ledger, plan := replace(FULL, worlds=("qwen", "llava"), methods=tuple(shares), sweeps=()),
           lambda run: shares[run["method"]])  # fmt: skip
    page = report(ledger, plan, tmp_path)["RESULTS.md"]
    assert re.search(r"costs perception, 4\d points of it or more in every world\.", page)
    assert re.search(r"controls, \*DRIFT: Δ's singular values, random vectors\* costs least, 2\d in `", page)
    assert re.search(r"instead of Δ's, tuned as well, DRIFT is better in every world, by (9|1\d)\.", page)
    assert re.search(r"This pull, compared with LoRA, is better in every world, by (9|1\d)\.", page)
    assert re.search(r"With keeping in both, DRIFT compared with this pull is better in every world, by [23]\d\.", page)
    assert re.search(r"pulled to zero, both keeping, it is worse in every world, by \d\.", page)
    pairs = sum(len(world["chosen by"]["images"]["duels"]) for world in collect(ledger, plan)["worlds"].values())
    assert f"{pairs} pairs are compared by the image mean. If no pair differed, about {pairs / 20:.0f} of" in page


def test_a_comparison_names_what_speaks_most_against_it():
    better, level, worse = (0.05, 0.01, 0.09), (-0.01, -0.03, 0.01), (-0.04, -0.06, -0.02)
    of = ("`a`", "`b`", "`c`")
    assert compared({"`a`": better, "`b`": (0.03, 0.02, 0.04)}, of[:2]) == (
        "better in every world, by 3.0 points [2.0, 4.0] where it gains least"
    )
    assert compared({"`a`": better, "`b`": better}, of).startswith("better in `a` and `b`, by")  # `c` is not run yet
    assert compared({"`a`": better, "`b`": level}, of) == (
        "better in `a` and level in `b`, where the difference is −1.0 [−3.0, +1.0]"
    )
    assert compared({"`a`": (0.02, 0.01, 0.03), "`b`": (0.03, -0.01, 0.07)}, of) == (
        "better in `a` and level in `b`, where the difference is +3.0 [−1.0, +7.0]"
    )
    assert compared({"`a`": better, "`b`": level, "`c`": worse}, of) == (
        "better in `a`, level in `b` and worse in `c`, by 4.0 points [2.0, 6.0]"
    )


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1))
def test_nothing_beats_the_frontier(points):
    best = frontier(points)
    assert best == sorted(best) and [y for _, y in best] == sorted((y for _, y in best), reverse=True)
    for x, y in points:
        assert any(a >= x and b >= y for a, b in best)


SLOWER = [
    pytest.param(method, marks=pytest.mark.slow)
    for method in ("export", "full-drift", "pissa", "eva", "lora-ga", "hold-nf4")
]


@pytest.mark.parametrize("method", ["ties", "lora", *SLOWER])
def test_methods_change_the_language_model(method, priors):
    result = perform(run_of(method), priors)
    assert result["absorbed"] != 0 and all(len(text) == 2 for text in result["answers"].values())
    if METHODS[method].trains:
        assert len(result["loss"]) == 2 and result["step_seconds"] > 0


def test_a_run_depends_on_nothing_but_its_settings(priors):
    one, two = (perform(run_of("drift"), priors) for _ in range(2))
    assert [one[key] for key in ("answers", "loss", "cosine", "absorbed")] == [
        two[key] for key in ("answers", "loss", "cosine", "absorbed")
    ]


@pytest.mark.slow
def test_controls_pull_elsewhere(priors):
    cosines = {m: perform(run_of(m, steps=8), priors)["cosine"] for m in ("drift", "drift-negated", "drift-random")}
    assert cosines["drift"] > 0.2 and cosines["drift-negated"] < -0.1 and abs(cosines["drift-random"]) < 0.1


def test_movement_of_the_swapped_model_is_delta(priors):
    result = perform(run_of("swap"), priors)
    assert result["cosine"] == pytest.approx(1, abs=1e-3) and result["absorbed"] == pytest.approx(1, abs=1e-2)
    assert movement(load(WORLDS["qwen"].vlm)[0], WORLDS["qwen"]) == {"cosine": 0.0, "absorbed": 0.0}


def test_the_random_prior_has_the_singular_values_of_delta(priors):
    plain, random = (ReasoningPrior.load(priors / f"qwen-{name}.safetensors") for name in ("plain", "random"))
    name = "layers.1.mlp.up_proj.weight"
    assert torch.equal(plain[name].S, random[name].S)
    assert abs((plain[name].U.float() * random[name].U.float()).sum(0)).mean() < 0.3


def test_noise_makes_a_share_of_the_chains_wrong():
    clean, noisy = (training_samples(WORLDS["qwen"], DEFAULTS | {"noise": noise}, 0) for noise in (0.0, 0.25))
    changed = [a for a, b in zip(clean, noisy, strict=True) if a.answer != b.answer]
    assert 40 <= len(changed) <= 50 and [a.symbols for a in clean] == [b.symbols for b in noisy]
    fewer = training_samples(WORLDS["qwen"], DEFAULTS | {"samples": 50}, 0)
    assert [s.symbols for s in fewer] == [s.symbols for s in clean[:50]]


def test_text_chains_are_as_long_as_the_experts():
    settings = DEFAULTS | METHODS["drift-ancestor-text"].settings
    samples = training_samples(WORLDS["qwen"], settings, 0)
    assert {len(s.symbols) // 2 for s in samples} == {1, 2, 3, 4, 5} and all(s.image is None for s in samples)


def test_what_learns_from_text_is_chosen_by_text_and_by_what_it_keeps(tmp_path):
    ledger, grid = Ledger(tmp_path / "digits.jsonl"), METHODS["drift-ancestor-text"].grid
    for i, run in enumerate(FULL.tuning_runs("qwen", "drift-ancestor-text")):
        right = dict.fromkeys(("2-3 operations", "4-5 operations"), i < 4)
        right |= dict.fromkeys(("text reasoning", *PERCEPTION), i == 7)
        answers = {exam: np.packbits(np.full(150, all_of_them)).tobytes().hex() for exam, all_of_them in right.items()}
        ledger.add(run, {"answers": answers})
    assert FULL.choose(ledger, "qwen", "drift-ancestor-text") == grid[7]


def test_a_folded_image_holds_the_row():
    rows, squares = Digits("train"), FoldedDigits("train")
    row = np.asarray(rows.draw("1+2-3+4", np.random.default_rng(0)))
    square = np.asarray(squares.draw("1+2-3+4", np.random.default_rng(0)))
    assert square.shape == (SIDE * CELL, SIDE * CELL)
    for i in range(7):
        y, x = CELL * (i // SIDE), CELL * (i % SIDE)
        assert np.array_equal(square[y : y + CELL, x : x + CELL], row[:, CELL * i : CELL * (i + 1)])
    assert not square[CELL * 2 :].any()


def test_llavas_processor_gives_a_token_to_each_cell():
    processor = llava_processor()
    batch = encode(processor, make_samples(2, ["read"], np.random.default_rng(0), FoldedDigits("train")))
    assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == [SIDE * SIDE] * 2


def test_mirrored_chains_reason_about_something_else():
    for sample in mirrored(20, ["solve"], np.random.default_rng(0)):
        steps = sample.answer.removeprefix("<think>").split("</think>")[0].split(";")
        for step in steps:
            left, right = step.split("=")
            assert (int(left[0]) - int(left[1:])) % 10 == int(right)


@pytest.mark.slow
def test_the_worlds_are_what_they_are_called():
    answers = {}
    for key in ("llava", "far"):
        for method, settings in (("vlm", {}), ("task-arithmetic", {"scale": 0.5}), ("swap", {})):
            result = perform(run_of(method, key, size=24) | {"settings": settings | {"size": 24}}, Path("unused"))
            answers[key, method] = {name: float(x.mean()) for name, x in scores(result, 24).items()}
    for key in ("llava", "far"):
        assert answers[key, "vlm"]["perception"] > 0.8 > 0.3 > answers[key, "vlm"]["2-3 operations"]
        assert answers[key, "swap"]["text reasoning"] > 0.7
    images = ("2-3 operations", "4-5 operations", "perception")
    means = {m: sum(answers["far", m][name] for name in images) for m in ("vlm", "task-arithmetic", "swap")}
    assert max(means["task-arithmetic"], means["swap"]) < 0.7 * means["vlm"]  # merging is broken


def test_a_part_of_the_plan_can_be_run_alone(tmp_path):
    assert digits.chosen("method", ["drift", "lora"], SMALLEST.methods) == ("lora", "drift")
    assert digits.chosen("world", None, SMALLEST.worlds) == SMALLEST.worlds
    with pytest.raises(ValueError, match="'drft' is no method of this plan, which has vlm, lora, drift"):
        digits.main(["--smallest", "--out", str(tmp_path), "--methods", "drft"])


@pytest.mark.slow
def test_the_smallest_study_from_runs_to_report(tmp_path, capsys, monkeypatch):
    few = 3
    for key in ("lora", "drift"):  # of the candidates, each of which is a process
        monkeypatch.setitem(METHODS, key, replace(METHODS[key], grid=METHODS[key].grid[:few]))
    arguments = ["--smallest", "--out", str(tmp_path / "out"), "--priors", str(tmp_path / "priors"), "--processes", "2"]
    digits.main([*arguments, "--minutes", "0"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["runs"] == 0
    digits.main(arguments)
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    # tuning, a row for each method (two where the criteria choose differently), three more strengths
    assert last["missing"] == 0 and 0 <= last["runs"] - 2 * few - 2 * (3 + 3) <= 2 * 2
    pages = "\n".join(file.read_text() for file in (tmp_path / "out").glob("*.md"))
    assert "## Qwen2.5-VL + Qwen2" in pages and "Strength, times the chosen one" in pages
    before = (tmp_path / "out" / "digits.jsonl").read_bytes()
    digits.main(arguments)
    assert (tmp_path / "out" / "digits.jsonl").read_bytes() == before
    assert SMALLEST.seeds == 2
