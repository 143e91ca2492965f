"""Settings of the leading ways, tuned on two objectives: more right answers, and less distance from the VLM.

optuna's TPE (Bergstra et al. 2011; for several objectives Ozaki et al. 2020). Every trial is in a file before it runs
and when it has ended, so a search that was stopped goes on where it was, with the trial that it was at.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import optuna
from optuna.trial import TrialState

from drift_peft import DriftConfig

from .ways import Way

AROUND = 5.0  # a rate or a strength is tried from a fifth to five times that of the recipe
SHARES = (0.1, 0.9)


def space(way: Way, settings: dict) -> dict[str, dict]:
    """Bounds of what is tuned of a way: the rate, the strength of DRIFT, the λ of a part that is merged first, or that
    the adapter starts at.

    Raises:
        ValueError: there is nothing around a rate or a strength that is 0.
    """
    recipe = way.recipe(settings)
    centres = {"learning_rate": recipe.get("learning_rate", 2e-5)}  # TRL's default
    if recipe["method"] == "drift":
        centres["drift_alpha"] = recipe.get("drift_alpha", DriftConfig.drift_alpha)
    if nothing := [key for key, value in centres.items() if value <= 0]:
        told = f"--search tries {nothing[0]} around the recipe's, which is {centres[nothing[0]]:g}"
        raise ValueError(f"{told}: give it a value above 0, or leave --search out")
    bounds = {key: {"low": value / AROUND, "high": value * AROUND, "log": True} for key, value in centres.items()}
    for key in ("merge_first", "drift_start") if recipe["method"] == "drift" else ("merge_first",):
        if own := recipe.get(key):
            bounds[key] = {"low": min(SHARES[0], own), "high": max(SHARES[1], own)}
    return bounds


def search(
    trials: int,
    ways: list[Way],
    settings: dict,
    measure: Callable[[Way], tuple[float, float]],
    file: Path,
    seed: int = 0,
) -> list[Way]:
    """Try so many settings, those of earlier runs counted, beginning with each way's own; all that have been tried.

    Args:
        measure: tuned way -> share of right answers, and KL from the VLM.
        file: where optuna keeps its trials.

    Raises:
        ValueError: the file is of other ways.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    known = {way.name: way for way in ways}
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(file)))
    options = {"directions": ["maximize", "minimize"], "load_if_exists": True}
    study = optuna.create_study(study_name="ways", storage=storage, **options)
    study.sampler = optuna.samplers.TPESampler(seed=seed + len(study.trials))  # else it would draw the same again
    before = study.user_attrs.get("ways", [*known])
    if before != [*known]:
        message = f"{', '.join(before)}, and leading are now {', '.join(known)}"
        raise ValueError(f"{file} holds trials of {message}: move it away")
    if not study.trials:
        study.set_user_attr("ways", [*known])
        for way in ways:
            recipe = way.recipe(settings)
            own = {_key(way, key): recipe[key] for key in space(way, settings) if key in recipe}
            study.enqueue_trial({"way": way.name, **own})
    done = {trial.number: trial for trial in study.trials if trial.state == TrialState.COMPLETE}
    stopped = [trial for trial in study.trials if trial.state == TrialState.RUNNING]
    tried = {number: _tuned(trial.params, number, known, settings) for number, trial in done.items()}
    while len(tried) < trials:
        if stopped:
            trial = stopped.pop(0)
            number, params = trial.number, trial.params
        else:
            trial = study.ask()
            number = trial.number
            chosen = known[trial.suggest_categorical("way", [*known])]
            for key, bounds in space(chosen, settings).items():
                trial.suggest_float(_key(chosen, key), **bounds)
            params = trial.params
        way = _tuned(params, number, known, settings)
        if way is None:  # it was stopped before all was drawn
            study.tell(number, state=TrialState.FAIL)
            continue
        study.tell(number, measure(way))
        tried[number] = way
    return [*tried.values()]


def _key(way: Way, setting: str) -> str:
    """Each way has a range of its own for a setting."""
    return f"{way.name}: {setting}"


def _tuned(params: dict, number: int, known: dict[str, Way], settings: dict) -> Way | None:
    way = known.get(params.get("way"))
    keys = [] if way is None else space(way, settings)
    if way is None or any(_key(way, key) not in params for key in keys):
        return None
    return way.tuned(number, {key: params[_key(way, key)] for key in keys})
