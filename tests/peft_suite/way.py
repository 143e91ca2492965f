"""A pytest plugin that runs PEFT's tests one of three ways, and writes down what came of each test.

DRIFT_WAY is plain, imported, or drift: DriftConfig in the place of LoraConfig, as plain LoRA unless a test says more.
"""

from __future__ import annotations

import inspect
import json
import os
import re
from collections import defaultdict
from functools import cache
from pathlib import Path

import peft

WAY, RESULTS = os.environ["DRIFT_WAY"], Path(os.environ["DRIFT_RESULTS"])
outcomes: dict[str, list[str]] = {}  # test -> outcome, the last line of its error

if WAY != "plain":
    import drift_peft
if WAY == "drift":
    checked = drift_peft.DriftConfig.__init__

    def without_a_prior(self, *args, **settings) -> None:
        checked(self, *args, **{"drift_alpha": 0, **settings})

    drift_peft.DriftConfig.__init__ = without_a_prior
    peft.LoraConfig = drift_peft.DriftConfig


class Seen(defaultdict):
    """Every model has been asked for before: PEFT's tests then go offline."""

    def __contains__(self, _) -> bool:
        return True


def pytest_collection_modifyitems(config, items) -> None:
    """Keep the tests of LoRA: one of their parameters is its config, or their own text makes one."""
    kept = [item for item in items if _of_lora(item)]
    config.hook.pytest_deselected(items=[item for item in items if not _of_lora(item)])
    items[:] = kept
    for item in items:
        if helper := getattr(item.module, "hub_online_once", None):
            helper.__wrapped__.__globals__["_HUB_MODEL_ACCESSES"] = Seen(int)


@cache
def _source(function) -> str:
    return inspect.getsource(function)


def _of_lora(item) -> bool:
    parameters = [*item.callspec.params.values()] if hasattr(item, "callspec") else []
    configs = [value for value in parameters if inspect.isclass(value) and issubclass(value, peft.PeftConfig)]
    return peft.LoraConfig in configs if configs else "LoraConfig(" in _source(item.function)


def pytest_runtest_logreport(report) -> None:
    known = outcomes.get(report.nodeid, ["passed", ""])
    if report.outcome != "passed" and known[0] != "failed":
        said = report.longrepr[2] if isinstance(report.longrepr, tuple) else getattr(report, "longreprtext", "")
        known = [report.outcome, _last_sentence(said)]
    outcomes[report.nodeid] = known
    if report.when == "teardown" and "PYTEST_XDIST_WORKER" not in os.environ:
        with RESULTS.open("a") as file:
            file.write(json.dumps([report.nodeid, *known]) + "\n")


def _last_sentence(said: str) -> str:
    """What the error says: the lines that pytest marks with E, without addresses."""
    errors = [line[1:].strip() for line in said.splitlines() if line.startswith("E ")]
    return re.sub(r"0x[0-9a-f]+", "0x…", " ".join(errors) or said.strip())[:400]
