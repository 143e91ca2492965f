"""parts/ways.py: which ways compare.py has of a recipe, and what each changes of it."""

import pytest
from comparisons import SETTINGS
from parts.ways import ways_of


def test_each_way_is_the_recipe_with_what_it_changes():
    ways = {way.name: way for way in ways_of({**SETTINGS, "merge_first": 0.9}, [], [0.5], [0.2], "k", "0123456789")}
    assert [*ways] == [
        "base", "transplant-0.5", "gated-01234567", "sft", "sft-keep", "merged-0.2", "merged-keep-0.2", "drift",
        "drift-keep", "merged-drift-keep-0.2",
    ]  # fmt: skip
    assert ways["base"].trains is None and ways["transplant-0.5"].scale == 0.5
    assert ways["gated-01234567"].trains is None
    kept = {key: value for key, value in SETTINGS.items() if key != "keep"}
    for name, own in (
        ("sft", {"method": "sft"}),
        ("sft-keep", {"method": "sft", "keep": "k"}),
        ("merged-0.2", {"method": "sft", "merge_first": 0.2}),
        ("merged-keep-0.2", {"method": "sft", "merge_first": 0.2, "keep": "k"}),
        ("drift", {"method": "drift"}),
        ("drift-keep", {"method": "drift", "keep": "k"}),
        ("merged-drift-keep-0.2", {"method": "drift", "merge_first": 0.2, "keep": "k"}),
    ):
        assert ways[name].recipe({**SETTINGS, "merge_first": 0.9}) == kept | own
    plain = {"base": "b", "data": "d"}
    assert [way.kind for way in ways_of(plain, [], [0.5], [0.2], None)] == ["base", "sft"]
    for kind, told in (
        ("drift", "drift cannot be compared: the recipe names no prior"),
        ("merged", "merged cannot be compared: the recipe names no expert"),
        ("sft-keep", "names neither a keep set nor images to make it of"),
    ):
        with pytest.raises(ValueError, match=told):
            ways_of(plain, [kind], [0.5], [0.2], None)
    with pytest.raises(ValueError, match="the expert is asked nothing: name a file of prompts with --texts"):
        ways_of(SETTINGS, ["gated"], [], [], "k")


def test_a_way_that_does_not_keep_does_not_replay_either():
    ways = {way.kind: way.recipe({**SETTINGS, "replay": 0.2}) for way in ways_of(SETTINGS, [], [], [0.5], "k")[1:]}
    replaying = {kind for kind, recipe in ways.items() if "replay" in recipe}
    assert replaying == {"sft-keep", "merged-keep", "drift-keep", "merged-drift-keep"}


def test_a_delta_that_is_merged_whole_leaves_nothing_to_steer_toward():
    ways = ways_of(SETTINGS, ["merged-keep", "merged-drift-keep"], [], [0.5, 1.0], "k")
    assert [way.name for way in ways] == ["merged-keep-0.5", "merged-keep-1", "merged-drift-keep-0.5"]
    for kinds in (["merged-drift-keep"], ["merged-keep", "merged-drift-keep"]):
        with pytest.raises(
            ValueError, match="merged-drift-keep cannot be compared: of Δ that was merged whole nothing is"
        ):
            ways_of(SETTINGS, kinds, [], [1.0], "k")
    assert [way.name for way in ways_of(SETTINGS, [], [], [1.0], "k")] == [
        "base", "sft", "sft-keep", "merged-1", "merged-keep-1", "drift", "drift-keep"
    ]  # fmt: skip


def test_what_keeping_does_not_go_with_is_left_out_at_first():
    settings = {**SETTINGS, "drift_norm": "weight"}
    kinds = ["drift", "drift-keep"]
    assert [way.kind for way in ways_of({**settings, "replay": 0.2}, kinds, [], [], "k")] == kinds
    assert [way.kind for way in ways_of(settings, [], [], [], "k")] == ["base", "sft", "sft-keep", "drift"]
    with pytest.raises(ValueError, match="drift-keep cannot be compared: drift_norm: weight does not see the gradient"):
        ways_of(settings, kinds, [], [], "k")
