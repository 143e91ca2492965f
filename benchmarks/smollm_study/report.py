"""The study's tables, from its ledger and its checkpoints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from digits_study.intervals import interval
from ledger import Ledger
from rich.console import Console
from rich.table import Table

from drift_peft import ReasoningPrior

from .plan import IMAGES, Plan, scores
from .run import prior_of
from .ways import WAYS
from .world import PERCEPTION

EXAMS = ("2-3 operations", "4-5 operations", "perception", "text reasoning")
RIVALS = ("drift-ancestor-keep", "lora-keep")  # whom the other ways are compared with


def report(ledger: Ledger, plan: Plan, console: Console) -> None:
    """A row for each way whose runs are done, their differences, and what was tried on validation samples."""
    rows = {}
    for way in plan.ways:
        runs = plan.test_runs(ledger, way)
        if runs and all(run in ledger for run in runs):
            rows[way] = [(scores(ledger[run], plan.size(run)), ledger[run]) for run in runs]
    exams(rows, plan, ledger, console)
    differences(rows, console)
    tried(ledger, plan, console)


def exams(rows: dict, plan: Plan, ledger: Ledger, console: Console) -> None:
    """Right answers in percent with 95 % intervals, and the language model's abilities."""
    table = Table(title=f"Right answers in percent, {plan.seeds} seeds, 95 % intervals")
    for head in ("way", *EXAMS, "images", "perplexity", "KL to the ancestor", "settings"):
        table.add_column(head)
    kinds = Table(title="Perception by kind, in percent")
    for head in ("way", *PERCEPTION):
        kinds.add_column(head)
    for way, results in rows.items():
        marks = [found for found, _ in results]
        cells = [percent([[found[name]] for found in marks]) for name in EXAMS]
        cells.append(percent([[found[name] for name in IMAGES] for found in marks]))
        cells += [f"{np.mean([result[name] for _, result in results]):.3g}" for name in ("perplexity", "kl")]
        table.add_row(WAYS[way].title, *cells, said(plan.choose(ledger, way) or {}))
        kinds.add_row(WAYS[way].title, *(percent([[found[kind]] for found in marks]) for kind in PERCEPTION))
    console.print(table)
    console.print(kinds)


def differences(rows: dict, console: Console) -> None:
    """Of the trained ways from each rival, paired by seeds and samples, in the mean of the image exams and in text."""
    table = Table(title="Differences in points, in pairs, with 95 % intervals")
    if not (rivals := [rival for rival in RIVALS if rival in rows]):
        return
    compared = {"images": IMAGES, "text reasoning": ("text reasoning",)}
    for head in ("way", *(f"{exam}: less {WAYS[rival].title}" for rival in rivals for exam in compared)):
        table.add_column(head)
    for way in (way for way in rows if WAYS[way].trains):
        cells = []
        for rival in rivals:
            for names in compared.values():
                ours, theirs = (
                    stacked([[marks[name] for name in names] for marks, _ in rows[w]]) for w in (way, rival)
                )
                middle, low, high = (100 * value for value in interval(ours - theirs))
                cells.append("" if way == rival else f"{middle:.1f} [{low:.1f}, {high:.1f}]")
        table.add_row(WAYS[way].title, *cells)
    console.print(table)


def tried(ledger: Ledger, plan: Plan, console: Console) -> None:
    """All candidates, and what was changed afterwards."""
    table = Table(
        title=f"Right answers in percent, {plan.tuning_size} validation samples an exam, one seed; * took the exams"
    )
    for head in ("way", "settings", *EXAMS, "images"):
        table.add_column(head)
    for way in plan.ways:
        best = plan.choose(ledger, way)
        for run in plan.tuning_runs(way) + plan.swept_runs(ledger, way):
            if run not in ledger:
                continue
            found = scores(ledger[run], plan.size(run))
            hidden = (plan.changes | {"size": plan.tuning_size}).items()
            settings = dict(item for item in run["settings"].items() if item not in hidden)
            cells = [f"{100 * found[name].mean():.0f}" for name in EXAMS]
            cells.append(f"{100 * plan.mean(ledger, run):.0f}")
            table.add_row(WAYS[way].title, said(settings) + " *" * (settings == best), *cells)
    console.print(table)


def said(settings: dict) -> str:
    return ", ".join(
        f"{name.replace('_', ' ')} {value if isinstance(value, str) else format(value, 'g')}"
        for name, value in settings.items()
    )


def percent(answers: list) -> str:
    """Of right answers [seeds][exams, samples]."""
    middle, low, high = interval(stacked(answers))
    return f"{100 * middle:.0f} ± {50 * (high - low):.0f}"


def stacked(answers: list) -> np.ndarray:
    """[seeds][exams, samples] as an array [exams, seeds, samples]."""
    return np.stack([np.stack(exam) for exam in answers], axis=1)


def spectra(folder: Path, console: Console) -> None:
    """How much of a real Δ its largest directions hold: the expert less the VLM, and less the ancestor."""
    table = Table(title="Share of ‖Δ‖² in the largest singular directions")
    for head in ("prior", "8", "16", "32", "64", "‖Δ‖/‖W‖"):
        table.add_column(head)
    for file in (prior_of(folder, ancestor) for ancestor in (False, True)):
        prior = ReasoningPrior.load(file)
        held, whole, base = np.zeros(4), 0.0, 0.0
        for name in prior:
            weight, tensors = prior.metadata["weights"][name], prior.tensors(name)
            if "S" not in tensors:
                continue
            energy = tensors["S"].double().numpy() ** 2
            held += [energy[:k].sum() for k in (8, 16, 32, 64)]
            whole += weight["delta_norm"] ** 2
            base += weight["base_norm"] ** 2
        ratio = (whole / base) ** 0.5
        table.add_row(file.stem, *(f"{share:.2f}" for share in held / whole), f"{ratio:.3f}")
    console.print(table)
