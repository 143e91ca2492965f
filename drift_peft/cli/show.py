"""A result as tables or as JSON, on stdout."""

import json

from rich.console import Console
from rich.table import Table


def show(result: dict, as_json: bool, *parts: Table | str) -> None:
    """Print the result as JSON, or its tables and sentences."""
    console = Console()
    if as_json:  # what the terminal has no signs for stays the same in JSON, as \u escapes
        print(json.dumps(result, indent=2, ensure_ascii=console.options.ascii_only, default=str))
        return
    for part in parts:
        console.print(part, markup=False, emoji=False, highlight=False)
