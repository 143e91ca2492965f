"""parts/search.py: the trials of compare.py --search, and what comes of them."""

import json
from pathlib import Path

import compare
import datasets
import pytest
import yaml
from comparisons import SETTINGS, found
from parts.search import search
from parts.ways import ways_of


def test_a_search_goes_on_with_the_trial_that_it_was_stopped_at(tmp_path):
    """It begins with the ways' own settings, stays in the ranges, and tries nothing twice."""
    settings = {**SETTINGS, "learning_rate": 1e-3}
    ways = ways_of(settings, ["merged", "drift"], [], [0.5], None)
    asked = []

    def measure(way, fails=None):
        asked.append(way)
        if len(asked) == fails:
            raise KeyboardInterrupt
        recipe = way.recipe(settings)
        return recipe["learning_rate"], recipe.get("merge_first", 0)

    with pytest.raises(KeyboardInterrupt):
        search(8, ways, settings, lambda way: measure(way, fails=5), tmp_path / "s")
    tried = search(8, ways, settings, measure, tmp_path / "s")
    assert asked[4] == asked[5] and asked[4].trains == asked[5].trains and len(asked) == 9
    assert [way.name for way in tried] == [way.name for way in asked[:4] + asked[5:]]
    assert search(8, ways, settings, None, tmp_path / "s") == tried
    own = [way.recipe(settings) for way in tried[:2]]
    assert own[0]["merge_first"] == 0.5 and [each["learning_rate"] for each in own] == [1e-3] * 2
    assert len({str(way.trains) for way in tried}) == 8
    for way in tried:
        recipe = way.recipe(settings)
        assert 2e-4 <= recipe["learning_rate"] <= 5e-3
        assert ("drift_alpha" in way.trains) == (recipe["method"] == "drift") != ("merge_first" in recipe)
        assert 0.06 <= recipe.get("drift_alpha", 0.3) <= 1.5 and 0.1 <= recipe.get("merge_first", 0.5) <= 0.9
    with pytest.raises(
        ValueError, match=r"s holds trials of merged-0.5, drift, and leading are now drift: move it away"
    ):
        search(9, ways[1:], settings, measure, tmp_path / "s")


def test_the_best_that_a_search_has_tried_is_a_way_of_its_own(monkeypatch, texts, tmp_path):
    """Tried on validation samples after training on the others, then trained on all, and written as the choice. There
    are no images here, and so nothing to keep."""
    settings = {"base": "b", "data": str(texts), "method": "sft", "use_cpu": True, "learning_rate": 1e-3}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings | {"output_dir": "o", "images_per_sample": 1}))
    output, trained, asked = tmp_path / "out", [], []

    def launch(script, *flags):
        flags = dict(zip(map(str, flags[::2]), flags[1::2], strict=True))
        if Path(script).name == "sft_vlm.py":
            recipe = yaml.safe_load(Path(flags["--config"]).read_text())
            trained.append((Path(recipe["data"]).stem, recipe["learning_rate"]))
            folder = Path(recipe["output_dir"])
            folder.mkdir()
            (folder / "run.json").write_text(json.dumps({"results": {"steps": 9, "train_runtime": 60}}))
            return
        asked.append(Path(flags["--data"]).stem)
        rate = trained[-1][1] if "--adapter" in flags else 0
        rows = [{"category": "all", "correct": rate > 1e-3} for _ in range(2)]
        flags["-o"].write_text(json.dumps({"samples": rows}))

    monkeypatch.setattr(compare, "launch", launch)
    flags = [str(tmp_path / "recipe.yaml"), "-o", str(output), "--held-out", "2", "--search", "4", "--steps", "9"]
    compare.main(flags)
    numbers = len(trained), len(asked)
    compare.main(flags)
    assert numbers == (len(trained), len(asked)) == (6, 7)
    assert [name for name, _ in trained] == ["train", *["fitting"] * 4, "train"] and trained[1] == ("fitting", 1e-3)
    assert asked == ["test"] * 2 + ["validation"] * 4 + ["test"]
    best = next(rate for _, rate in trained[1:] if rate > 1e-3)
    assert trained[-1] == ("train", best)
    choice = yaml.safe_load((output / "choice.yaml").read_text(encoding="utf-8"))
    assert choice == settings | {"output_dir": "o", "images_per_sample": 1, "learning_rate": best, "max_steps": 9}
    result = json.loads((output / "compared.json").read_text(encoding="utf-8"))
    assert [way["right"] for way in result["ways"].values()] == [0, 0, 100] and "kl" not in result["ways"]["base"]
    sizes = {name: len(datasets.Dataset.from_parquet(str(output / f"{name}.parquet"))) for name in ("train", "fitting")}
    assert sizes == {"train": 6, "fitting": 4} and not (output / "compared.png").exists()


def test_what_is_beyond_the_budget_loses_nothing_that_was_measured(monkeypatch, data, tmp_path, capsys):
    """Where all trials of a search are, a way that was compared is chosen; where all ways are, none."""

    def measure(comparison, way, exam="test"):
        return found([0, 0], 0) if way.kind == "base" else found([1, 1], 0.5)

    monkeypatch.setattr(compare, "read_recipe", lambda file: {"base": "b", "data": str(data), "method": "sft"})
    monkeypatch.setattr(compare.Comparison, "measure", measure)
    monkeypatch.setattr(compare, "launch", lambda *command: None)
    output, flags = tmp_path / "out", ["r.yaml", "--held-out", "2", "-o", str(tmp_path / "out"), "--ways"]
    compare.main([*flags, "base", "sft", "--search", "2", "--budget", "0.1"])
    told = "note: no trial costs at most 0.1 nats a token: the least is 0.5; so none is trained on all samples"
    assert told in capsys.readouterr().err
    result = json.loads((output / "compared.json").read_text())
    assert [*result["ways"]] == ["base", "sft"] and result["choice"] == "base" and (output / "choice.yaml").exists()

    told = r"no way costs at most 0\.1 nats a token: the least is 0\.5: raise --budget or leave it out, and the same"
    for more in ([], ["--json"]):
        with pytest.raises(SystemExit, match=told):
            compare.main([*flags, "sft", "--budget", "0.1", *more])
        shown = capsys.readouterr().out
        result = json.loads((output / "compared.json").read_text())
        assert json.loads(shown) == result if more else "100.0" in shown
        assert result["choice"] is None and result["ways"]["sft"]["below_choice"] is None
        assert (output / "compared.png").exists() and not (output / "choice.yaml").exists()
