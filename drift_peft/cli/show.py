"""A result as tables or as JSON, on stdout."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment
from rich.table import Table

from ..warn import visible


def facts(title: str, rows: Mapping[str, object]) -> Table:
    """A table of names and what they are."""
    table = Table(show_header=False, title=title)
    for name, value in rows.items():
        table.add_row(name, str(value))
    return table


def show(result: dict, as_json: bool, *parts: Table | str) -> None:
    """Print the result as JSON, or its tables and sentences."""
    console = Console(markup=False, emoji=False, highlight=False)  # brackets and colons in a folder's name are none
    if as_json:  # what the terminal has no signs for stays the same in JSON, as \u escapes
        print(visible(json.dumps(result, indent=2, ensure_ascii=console.options.ascii_only, default=str)))
        return
    for part in parts:
        part = visible(part) if isinstance(part, str) else _Visible(part)
        console.print(part)


@dataclass
class _Visible:
    """A table whose cells command no terminal."""

    table: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for text, style, control in console.render(self.table, options):
            yield Segment(visible(text), style, control)
