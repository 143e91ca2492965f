"""benchmarks/digits_study/keep_sets.py: what the study keeps is the VLM's own, and what it says it is."""

from dataclasses import replace

import numpy as np
import pytest
from digits_study.keep_sets import VARIETIES, keep_set_of, replayed
from digits_study.methods import KEEP, KEPT, METHODS, MORE, RANK_32, REPLAY
from digits_study.priors import make_priors
from digits_study.run import perform, training_samples
from digits_study.worlds import FOLDER, WORLDS

WORLD = WORLDS["qwen"]
SAMPLES = training_samples(WORLD, {"samples": 12, "noise": 0.0}, seed=0)


@pytest.fixture(scope="module")
def keep_sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keep")
    return {
        variety: keep_set_of(
            WORLD,
            KEEP | {"keep_images": 12, "keep_variety": variety},
            0,
            SAMPLES,
            folder,
        )
        for variety in VARIETIES
    }


def test_answers_are_made_once_and_by_seed(tmp_path, monkeypatch):
    settings = KEEP | {"keep_images": 2}
    made = {seed: keep_set_of(WORLD, settings, seed, SAMPLES, tmp_path) for seed in (0, 1)}
    assert pictures(made[0])[0].tobytes() != pictures(made[1])[0].tobytes()
    monkeypatch.setattr("digits_study.keep_sets.make_keep_set", None)
    again = keep_set_of(WORLD, settings, 0, SAMPLES, tmp_path)
    assert [again[i].tokens.tolist() for i in (0, 1)] == [made[0][i].tokens.tolist() for i in (0, 1)]
    assert len([*tmp_path.iterdir()]) == 2  # and nothing beside them is left


def pictures(keep_set):
    return [np.asarray(keep_set[i].image.convert("L")) for i in range(len(keep_set))]


def test_varieties_are_what_they_are_called(keep_sets):
    assert {len(keep_set) for keep_set in keep_sets.values()} == {12}
    assert {s.kind for s in map(keep_sets["only read"].__getitem__, range(12))} == {"read"}
    assert {s.kind for s in map(keep_sets["as examined"].__getitem__, range(12))} > {"read", "count"}
    longest = {name: max(picture.shape[1] for picture in pictures(keep_set)) for name, keep_set in keep_sets.items()}
    assert longest["shorter"] < longest["as examined"]
    ours = {picture.tobytes() for picture in pictures(keep_sets["training images"])}
    assert ours == {np.asarray(sample.image).tobytes() for sample in SAMPLES}
    dark, light = (np.mean([p.mean() for p in pictures(keep_sets[k])]) for k in ("as examined", "inverted"))
    assert dark < 100 < 155 < light


def test_an_unknown_variety_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"keep_variety is one of .*, not 'blue'"):
        keep_set_of(WORLD, KEEP | {"keep_variety": "blue"}, 0, SAMPLES, tmp_path)


def test_replay_trains_the_answers_of_the_keep_set(keep_sets):
    keep_set = keep_sets["as examined"]
    for sample, kept in zip(replayed(keep_set), map(keep_set.__getitem__, range(12)), strict=True):
        asked, answered = sample.messages(answered=True)
        assert [part["type"] for part in asked["content"]] == ["image", "text"]
        assert (asked["content"][1]["text"], answered["content"][0]["text"]) == (kept.question, kept.answer)


def test_kept_methods_differ_from_the_plain_ones_by_the_keeping_alone():
    merged = KEPT["merge-drift-ancestor-keep"]  # which has no plain one: DRIFT of one strength on a merged base
    assert merged.drift == METHODS["drift-ancestor"].drift | {"drift_alpha": 0.3} and "merged" in merged.grid[0]
    assert (merged.prior, merged.settings) == ("hierarchical", KEEP)
    held = KEPT["hold-ancestor-keep"]  # nor has this one; its rate is fixed, and its strength is chosen
    assert (held.drift, held.prior) == (METHODS["hold"].drift, "hierarchical")
    assert held.settings == KEEP | {"rate": 5e-3} and held.grid[0].keys() == {"merged", "drift_alpha"}
    plain = METHODS["drift-start-ancestor"]  # DRIFT of one strength, and shares of Δ in its adapter
    assert (plain.drift, plain.prior, plain.settings) == (merged.drift, merged.prior, {})
    assert plain.grid[0].keys() == {"rate", "drift_start"} and "drift_start" not in plain.drift
    started, with_vlm = KEPT["drift-start-ancestor-keep"], KEPT["drift-start-keep"]
    assert replace(with_vlm, title=started.title, prior="hierarchical") == started and with_vlm.prior == "plain"
    guided = KEPT["drift-guide-ancestor-keep"]  # the same but for the adapter's start, and at higher rates
    cold = KEPT["drift-ancestor-keep"]
    assert guided.drift == cold.drift | {"init_lora_weights": True}
    assert replace(guided, title=cold.title, drift=cold.drift, grid=cold.grid) == cold
    for key, method in KEPT.items():
        if method in (merged, held, with_vlm, guided):
            continue
        plain = METHODS[key.removesuffix("-240").removesuffix("-keep").removesuffix("-replay")]
        assert (method.trains, method.drift, method.prior) == (plain.trains, plain.drift, plain.prior)
        more = {"keep_images": 240} if key.endswith("-240") else {}
        assert method.settings == (KEEP if method.kept == "kl" else REPLAY | more)
    for key, method in RANK_32.items():
        small = KEPT[key.removesuffix("-32")]
        assert method.settings == KEEP | {"r": 32} and method.grid[0].keys() == small.grid[0].keys()
    for key, method in MORE.items():
        few = KEPT[key.removesuffix("-more")]
        assert replace(method, title=few.title, settings=few.settings) == few
        assert few.settings["keep_images"] == 240 and method.settings == few.settings | {"keep_images": 960}


@pytest.fixture(scope="module")
def priors(tmp_path_factory):
    folder = tmp_path_factory.mktemp("priors")
    make_priors(folder, "qwen")
    return folder


@pytest.mark.skipif(not FOLDER.is_dir(), reason="the source distribution lacks the study's checkpoints")
@pytest.mark.parametrize(
    "key",
    [
        "merge-drift-ancestor-keep",
        *(pytest.param(key, marks=pytest.mark.slow) for key in ("lora-keep", "drift-ancestor-replay")),
        "drift-ancestor-text",
    ],
)
def test_kept_runs_go_through(key, priors, monkeypatch):
    from digits_study import run as runs

    kept = []
    monkeypatch.setattr(runs, "keep", lambda *given, **how: kept.append(how))
    settings = METHODS[key].grid[0] | {"steps": 1, "samples": 4, "size": 2, "keep_images": 4}
    result = perform({"world": "qwen", "method": key, "seed": 0, "split": "validation", "settings": settings}, priors)
    assert result["answers"].keys() >= {"read", "at", "count"}
    how = {name: METHODS[key].settings.get(f"keep_{name}") for name in ("weight", "batch_size", "every")}
    assert kept == ([] if METHODS[key].kept == "replay" else [{"seed": 0, **how}])
