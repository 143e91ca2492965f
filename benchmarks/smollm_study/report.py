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


def report(ledger: Ledger, plan: Plan, console: Console) -> None:
    """One row for each way whose runs are done: right answers in percent with 95 % intervals, and the abilities."""
    rows = {}
    for way in plan.ways:
        runs = plan.test_runs(ledger, way)
        if runs and all(run in ledger for run in runs):
            rows[way] = [(scores(ledger[run], plan.size(run)), ledger[run]) for run in runs]
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
        chosen = ", ".join(f"{key} {value:g}" for key, value in (plan.choose(ledger, way) or {}).items())
        table.add_row(WAYS[way].title, *cells, chosen)
        kinds.add_row(WAYS[way].title, *(percent([[found[kind]] for found in marks]) for kind in PERCEPTION))
    console.print(table)
    console.print(kinds)


def percent(answers: list) -> str:
    """Of right answers [seeds][exams, samples]."""
    middle, low, high = interval(np.stack([np.stack(exam) for exam in answers], axis=1))
    return f"{100 * middle:.0f} ± {50 * (high - low):.0f}"


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
