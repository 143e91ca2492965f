"""A result as tables or as JSON, on stdout."""

import json
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment
from rich.table import Table

from ..warn import visible


def show(result: dict, as_json: bool, *parts: Table | str) -> None:
    """Print the result as JSON, or its tables and sentences."""
    console = Console()
    if as_json:  # what the terminal has no signs for stays the same in JSON, as \u escapes
        print(visible(json.dumps(result, indent=2, ensure_ascii=console.options.ascii_only, default=str)))
        return
    for part in parts:
        part = visible(part) if isinstance(part, str) else _Visible(part)
        console.print(part, markup=False, emoji=False, highlight=False)


@dataclass
class _Visible:
    """A table whose cells command no terminal."""

    table: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for text, style, control in console.render(self.table, options):
            yield Segment(visible(text), style, control)
