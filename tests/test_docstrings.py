"""Every public name is documented, and the examples run on the demo's checkpoints, each after what it reads."""

import doctest
import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from examples import train
from older import LOADS_PROCESSORS, NO_PROCESSORS
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor

import drift_peft
import drift_peft.demo
from drift_peft.demo.world import Digits, expression

CHECKPOINTS = Path(drift_peft.demo.__file__).parent / "checkpoints"
FIRST = ("build_prior", "make_keep_set")  # what other examples read
CLASSES = [name for name in drift_peft.__all__ if inspect.isclass(getattr(drift_peft, name))]
NAMES = [*FIRST, *sorted({*drift_peft.__all__} - {*FIRST})]


def load():
    return AutoModelForImageTextToText.from_pretrained(CHECKPOINTS / "vlm", dtype=torch.float32)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where they all run, beside an adapter, a second prior and pictures."""
    folder, rng = tmp_path_factory.mktemp("examples"), np.random.default_rng(0)
    (folder / "images").mkdir()
    for i in range(2):
        Digits("train").draw(expression(1, rng), rng).save(folder / "images" / f"{i}.png")
    where = {"base": CHECKPOINTS / "vlm", "reference": CHECKPOINTS / "base", "rank": 8, "progress": False}
    drift_peft.build_prior(CHECKPOINTS / "reasoner", output=folder / "far.safetensors", **where)
    model = get_peft_model(load(), drift_peft.DriftConfig(prior=folder / "far.safetensors", r=8, task_type="CAUSAL_LM"))
    train(model)
    model.save_pretrained(folder / "adapter")
    return folder


def documented(name):
    """The name with its own methods: (title, object, docstring)."""
    thing = getattr(drift_peft, name)
    yield name, thing, inspect.getdoc(thing)
    if inspect.isclass(thing):
        own = [base for base in thing.__mro__ if base.__module__.startswith("drift_peft")]
        for method in sorted({m for base in own for m in vars(base) if not m.startswith("_")}):
            if callable(getattr(thing, method)) or isinstance(inspect.getattr_static(thing, method), property):
                member = inspect.getattr_static(thing, method)
                yield f"{name}.{method}", member, inspect.getdoc(getattr(member, "__func__", member))


@pytest.mark.parametrize("name", NAMES)
def test_examples_run(name, place, monkeypatch):
    monkeypatch.chdir(place)
    public = {name: getattr(drift_peft, name) for name in drift_peft.__all__}
    outside = {"LoraConfig": LoraConfig, "PeftModel": PeftModel, "get_peft_model": get_peft_model, "train": train}
    models = {"EXPERT": CHECKPOINTS / "reasoner", "VLM": CHECKPOINTS / "vlm"}
    shared = {**public, **outside, **models, "IMAGES": "images"}
    ran = 0
    for title, _, text in documented(name):
        names = dict(shared)
        if "vlm" in text:
            names["vlm"] = load()
        if "processor" in text:
            names["processor"] = AutoProcessor.from_pretrained(CHECKPOINTS / "vlm")
        test = doctest.DocTestParser().get_doctest(text, names, title, None, None)
        said = []
        result = doctest.DocTestRunner(verbose=False).run(test, out=said.append)
        if NO_PROCESSORS in "".join(said) or (name == "KeepSet" and not LOADS_PROCESSORS):
            pytest.skip(NO_PROCESSORS)
        assert result.failed == 0, "".join(said)
        ran += result.attempted
    assert ran, f"{name} has no example"


@pytest.mark.parametrize("name", NAMES)
def test_everything_is_documented(name):
    for title, thing, text in documented(name):
        assert text, f"{title} has no docstring"
        if inspect.isfunction(thing) and name == title and name not in CLASSES:
            for parameter in inspect.signature(thing).parameters:
                assert parameter in text, f"{title} does not speak of {parameter}"
            assert "Raises:" in text, f"{title} does not say what it raises"
