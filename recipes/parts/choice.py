"""What a comparison says: its numbers, its table, and the recipe of the way to take."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import yaml
from rich import box
from rich.table import Table

from drift_peft.atomic import write_text

from .frontier import Measured, frontier
from .intervals import interval
from .ways import Way, gating, transplanting

RULE = """\
Of the ways that these samples cannot tell from the best one, it is the one that keeps most. It was chosen on these very
samples, so its own number is rather too high than too low."""


def summarize(measured: dict[str, Measured], titles: dict[str, str], choice: str | None) -> dict:
    """What compared.json says of the ways. Differences are paired, with 95 % intervals, in percent."""
    first, chosen = next(iter(measured.values())), None if choice is None else measured[choice]
    best = frontier(measured)
    ways = {}
    for name, way in measured.items():
        numbers = {"title": titles[name], "right": 100 * float(way.right.mean()), "frontier": name in best}
        numbers["categories"] = _by_category(way)
        numbers["above_first"] = _percent(way.right - first.right)
        numbers["below_choice"] = None if chosen is None else _percent(chosen.right - way.right)
        if way.kl is not None:
            numbers["kl"] = [max(0.0, value) for value in (way.cost, *interval(way.kl))]  # of rounding
            numbers["agreement"] = 100 * float(way.agreement.mean())
        ways[name] = numbers | way.facts
    return {"samples": len(first.right), "first": next(iter(measured)), "choice": choice, "ways": ways}


def _percent(less: np.ndarray) -> list[float]:
    return [100 * float(less.mean()), *(100 * bound for bound in interval(less))]


def _by_category(way: Measured) -> dict[str, float]:
    names = np.array(way.categories)
    return {name: 100 * float(way.right[names == name].mean()) for name in sorted(set(way.categories))}


def columns(result: dict) -> tuple[list[str], list[list[str]]]:
    """The heads of the table, some of two lines, and the cells of each way."""
    ways = result["ways"]
    categories = list(ways[result["first"]]["categories"])
    categories = categories if len(categories) > 1 else []
    kept = "kl" in ways[result["first"]]
    heads = [
        "way",
        *(name.replace(" ", "\n", 1) for name in categories),
        "right",
        f"- {ways[result['first']]['title']}\n[95 %]",
        "choice - it\n[95 %]",
    ]
    heads += ["KL in nats\n[95 %]", "same\ntokens"] if kept else []
    rows = []
    for name, numbers in ways.items():
        mark = " *" if name == result["choice"] else " ·" if numbers["frontier"] else ""
        row = [numbers["title"] + mark, *(f"{numbers['categories'][c]:.0f}" for c in categories)]
        row += [f"{numbers['right']:.1f}", *map(_difference, (numbers["above_first"], numbers["below_choice"]))]
        if kept:
            kl, low, high = numbers["kl"]
            row += [f"{kl:z.3f} [{low:z.3f}, {high:z.3f}]", f"{numbers['agreement']:.1f}"]
        rows.append([*row, *(_number(numbers.get(key)) for key in ("steps", "minutes"))])
    return [*heads, "steps", "minutes"], rows


def _difference(numbers: list[float] | None) -> str:
    return "" if numbers is None else "{:+.0f} [{:+.0f}, {:+.0f}]".format(*numbers)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 1 else f"{value:.0f}"


def table_title(result: dict) -> str:
    seeds = ", ".join(map(str, result["seeds"]))
    return f"right answers in percent on {result['samples']} samples, seed {seeds}; * is the choice, · the frontier"


def compared_table(result: dict) -> Table:
    heads, rows = columns(result)
    table = Table(title=table_title(result), box=box.SIMPLE_HEAD, pad_edge=False)
    for head in heads:
        table.add_column(head, justify="left" if head == "way" else "right", no_wrap=head == "way")
    for row in rows:
        table.add_row(*row)
    return table


def write_choice(
    result: dict, way: Way, settings: dict, steps: float | None, output: Path, texts: Path | None = None
) -> None:
    """The chosen way as a recipe, with the command that makes it and the numbers of all ways in comments.

    Args:
        settings: the recipe's, with the keep set that was made if it names none.
        steps: that it was given, if the recipe does not say how many.
        texts: prompts whose answers gate the prior.
    """
    if way.trains is not None:
        content = way.recipe(settings, max_steps=settings.get("max_steps") if steps is None else int(steps))
        commands = [f"python recipes/sft_vlm.py --config {output}"]
    elif way.kind == "gated":
        content = {key: settings[key] for key in ("base", "expert", "prior", "keep")}
        made = gating(settings, settings["keep"], texts, "gated.safetensors", "gated")
        commands = [f"drift-peft {shlex.join(command)}" for command in made]
    elif way.kind == "transplant":
        content = transplanting(settings, way.scale)
        flags = [part for key, value in content.items() for part in (f"--{key}", str(value))]
        commands = [f"drift-peft transplant {shlex.join(flags)} -o transplanted"]
    else:
        content = {"base": settings["base"]}
        commands = ["nothing is trained: no way is better than the VLM as it is, as far as these samples tell"]
    heads, rows = columns(result)
    heads = [head.replace("\n", " ") for head in heads]
    widths = [max(map(len, cells)) for cells in zip(heads, *rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (heads, *rows)]
    comments = [f"{way.title}: the choice of recipes/compare.py {result['recipe']}", ""]
    comments += [*(f"  {command}" for command in commands), ""]
    comments += [table_title(result), *lines, "", *RULE.splitlines(), ""]
    head = "".join(f"# {line}".rstrip() + "\n" for line in comments)
    text = head + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    write_text(output, text)
