"""recipes/compare.py: LoRA that is held near a merged base, and DRIFT from a part of Δ: compared where asked for."""

import json

import pytest
from parts.search import search, space
from parts.ways import ways_of
from recipe_runs import FAST
from safetensors.torch import load_file

pytestmark = pytest.mark.filterwarnings(
    "ignore:Switched off bitsandbytes", "ignore:.*gradient_checkpointing.*:FutureWarning"
)
SETTINGS = {"base": "b", "data": "d", "prior": "p.safetensors", "expert": "e", "keep": "own", "output_dir": "o"}


@pytest.mark.parametrize("kept", [None, "k"])
def test_held_lora_is_compared_where_it_is_asked_for(kept):
    """Merged whole, unless it is said otherwise; what the recipe says of steering does not go with holding."""
    steering = {"drift_norm": "weight", "drift_rank": 8, "drift_alpha": 0.1, "drift_warmup_steps": 9, "replay": 0.2}
    settings = {**SETTINGS, **steering}
    assert not [way for way in ways_of(settings, [], [], [0.5], kept) if way.kind.startswith("held")]
    kinds = ["held", "held-keep"] if kept else ["held"]
    ways = ways_of(settings, kinds, [], [0.5], kept)
    assert [(way.name, way.title) for way in ways] == [
        ("held-1", "merged 1, then held LoRA"), ("held-keep-1", "merged 1, then held LoRA, keeping"),
    ][: len(kinds)]  # fmt: skip
    own = {
        "method": "drift",
        "merge_first": 1.0,
        "drift_scale": "decoupled",
        "drift_target": "base",
        "drift_alpha": 1.0,
    }
    plain = {key: value for key, value in SETTINGS.items() if key != "keep"}
    for way, more in zip(ways, ({}, {"keep": "k", "replay": 0.2}), strict=False):
        assert way.recipe(settings) == plain | own | more
    assert [way.name for way in ways_of(settings, kinds[:1], [], [], kept, held=[0.2, 1.0])] == ["held-0.2", "held-1"]
    for lacking, told in (("expert", "names no expert"), ("prior", "names no prior")):
        with pytest.raises(ValueError, match=f"held cannot be compared: the recipe {told}"):
            ways_of({key: value for key, value in settings.items() if key != lacking}, ["held"], [], [], kept)


def test_a_search_of_held_lora_begins_with_its_own_settings(tmp_path):
    (way,) = ways_of(SETTINGS, ["held"], [], [], None)
    found = space(way, SETTINGS)
    assert found["merge_first"] == {"low": 0.1, "high": 1.0} and found["drift_alpha"]["high"] == 5
    (tried,) = search(1, [way], SETTINGS, lambda way: (0.0, 0.0), tmp_path / "s")
    assert tried.recipe(SETTINGS)["merge_first"] == tried.recipe(SETTINGS)["drift_alpha"] == 1.0
    (half,) = ways_of(SETTINGS, ["merged"], [], [0.5], None)
    assert space(half, SETTINGS)["merge_first"] == {"low": 0.1, "high": 0.9}


def test_held_lora_trains(train):
    """As compare.py asks for it: on a base that has all of Δ, pulled back to it."""
    _, free = train(**FAST, merge_first=1.0, method="sft", prior=None)
    (way,) = ways_of(SETTINGS, ["held"], [], [], None)
    _, held = train(**FAST, **{key: value for key, value in way.trains.items() if value is not None},
                    output_dir=free.with_name("held"))  # fmt: skip
    assert json.loads((held / "run.json").read_text())["settings"]["drift_target"] == "base"
    assert length(held) < length(free)


@pytest.mark.parametrize("kept", [None, "k"])
def test_drift_from_a_part_of_delta_is_compared_where_it_is_asked_for(kept):
    assert not [way for way in ways_of(SETTINGS, [], [], [0.5], kept) if way.kind.startswith("started")]
    kinds = ["started", "started-keep"] if kept else ["started"]
    ways = ways_of(SETTINGS, kinds, [], [0.2, 1.0], kept)
    assert [way.name for way in ways][:2] == ["started-0.2", "started-1"]
    assert ways[-1].title == ("started at 1, then DRIFT, keeping" if kept else "started at 1, then DRIFT")
    plain = {key: value for key, value in SETTINGS.items() if key != "keep"}
    kept_too = {"keep": kept} if kept else {}
    assert ways[-1].recipe(SETTINGS) == plain | {"method": "drift", "drift_start": 1.0} | kept_too
    for share in (1.5, -0.5):
        with pytest.raises(ValueError, match=rf"starts at a part of Δ, up to 1, and --merge-first names {share:g}$"):
            ways_of(SETTINGS, ["started"], [], [0.5, share], kept)
    with pytest.raises(ValueError, match="started cannot be compared: the recipe names no prior"):
        ways_of({key: value for key, value in SETTINGS.items() if key != "prior"}, ["started"], [], [0.5], kept)
    with pytest.raises(ValueError, match="started-keep cannot be compared: drift_norm: weight does not see"):
        ways_of({**SETTINGS, "drift_norm": "weight"}, ["started-keep"], [], [0.5], "k")


def test_a_search_tunes_the_part_that_the_adapter_starts_at(tmp_path):
    (way,) = ways_of(SETTINGS, ["started"], [], [1.0], None)
    assert space(way, SETTINGS)["drift_start"] == {"low": 0.1, "high": 1.0}
    (drift,) = ways_of(SETTINGS, ["drift"], [], [], None)
    assert "drift_start" not in space(drift, SETTINGS)
    assert "drift_start" in space(drift, SETTINGS | {"drift_start": 0.5})
    (sft,) = ways_of(SETTINGS, ["sft"], [], [], None)
    assert "drift_start" not in space(sft, SETTINGS | {"drift_start": 0.5})  # which has none
    (tried,) = search(1, [way], SETTINGS, lambda way: (0.0, 0.0), tmp_path / "s")
    assert tried.recipe(SETTINGS)["drift_start"] == 1.0


def length(folder):
    weights = load_file(folder / "adapter_model.safetensors")
    return sum(float(weight.norm()) for key, weight in weights.items() if ".lora_B" in key)
