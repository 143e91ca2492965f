"""An HTML page in one file: how it is called, and how its template is filled."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path


def check_page(html: str | Path) -> None:
    """ValueError unless the page's name ends as those of pages do."""
    if Path(html).suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"the page {html} needs a name that ends in .html")


def render(template: Path, fields: Mapping[str, str]) -> str:
    """The template with each {{field}} replaced, in one pass, so that what looks like a field in a text stays there."""
    return re.sub(r"\{\{(\w+)\}\}", lambda field: fields[field[1]], template.read_text(encoding="utf-8"))
