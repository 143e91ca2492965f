"""What mkdocs puts into the pages beside their own text; `hooks` of mkdocs.yml.

A line of a page that is a link whose title begins with "insert" becomes what the link leads to. Where the page is read
as a plain file, it stays a link: [The recipes](../../recipes/README.md "insert file").

    insert file             a Markdown file that stands elsewhere
    insert section HEADING  that section of it
    insert all but HEADING  the rest of it
    insert docstring        the docstring at the top of a Python file
    insert first block      the first block of Python in a Markdown file
    insert fields           DriftConfig's own fields, as help(DriftConfig) has them
    insert LoRA fields      those that it has of LoraConfig
    insert commands         every command of drift-peft, as its --help has it
    insert families         the table of benchmarks/results/families.txt

Links lead to pages of the site where there is one, pictures come along, and links to other files of the repository lead
to the project's address, which whoever publishes tells in DRIFT_PEFT_URL; without one they are plain text.
"""

from __future__ import annotations

import ast
import json
import os
import posixpath
import re
from argparse import ArgumentParser, _SubParsersAction
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = {  # files that are pages of the site, too
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "measurements.md",
    "benchmarks/RESULTS.md": "results.md",
    "benchmarks/results/families.txt": "families.md",
    "recipes/README.md": "guides/recipes.md",
    "recipes/EVALUATION.md": "guides/evaluation.md",
}
PICTURES = "benchmarks/results/**/*.png", "benchmarks/results/**/*.svg"
INSERT = re.compile(r'^\[[^\]]*\]\((?P<target>[^)\s#]+)\S* "insert (?P<what>[^"]+)"\)$', re.M)
LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>(?!https?://|#)[^)\s]+)\)")
FENCE = re.compile(r"(^```.*?^```$|^    .*?$)", re.M | re.S)
WIDTH = 88  # of --help


def on_files(files, config):
    """The pictures of the benchmarks are files of the site."""
    from mkdocs.structure.files import File

    for path in sorted(path for pattern in PICTURES for path in ROOT.glob(pattern)):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page, config, files) -> str:
    return whole_page(markdown, page.file.src_uri)


def whole_page(markdown: str, page: str) -> str:
    """The text of a page, `guides/x.md`, with everything that its lines insert."""
    folder = posixpath.dirname(f"docs/{page}")

    def insert(link: re.Match) -> str:
        return inserted(link["what"], posixpath.normpath(posixpath.join(folder, link["target"])), page)

    return INSERT.sub(insert, relinked(markdown, folder, page))


def inserted(what: str, path: str, page: str) -> str:
    """What a line of a page becomes; `path` is the file that it links to, in the repository."""
    made = {"fields": own_fields, "LoRA fields": lora_fields, "commands": commands, "families": families}
    if what in made:
        return made[what]()
    text = ROOT.joinpath(path).read_text(encoding="utf-8")
    if what == "docstring":
        lines = ast.get_docstring(ast.parse(text)).splitlines()
        return "\n".join(line if line.startswith("    ") else escaped(line) for line in lines)
    if what == "first block":
        return re.search(r"^```python\n.*?^```$", text, re.M | re.S)[0]
    if what != "file":
        text = section(text, *re.fullmatch(r"(section|all but) (.+)", what).groups())
    return relinked(text, posixpath.dirname(path), page)


def section(markdown: str, part: str, heading: str) -> str:
    """The part below `## heading`, or all but that."""
    before, found, rest = markdown.partition(f"## {heading}\n")
    if not found:
        raise ValueError(f"there is no heading '## {heading}'")
    inside, following, after = rest.partition("\n## ")
    return inside if part == "section" else before + (following + after).lstrip("\n")


def relinked(markdown: str, folder: str, page: str) -> str:
    """Links that are relative to a folder of the repository, relative to a page of the site; code as it is."""

    def link(match: re.Match) -> str:
        target, _, anchor = match["target"].partition("#")
        path = posixpath.normpath(posixpath.join(folder, target))
        if not ROOT.joinpath(path).exists():
            raise ValueError(f"{page} links to {match['target']}, which is no file")
        inside = PAGES.get(path) or (path if match["image"] else None)
        if path.startswith("docs/"):
            inside = path.removeprefix("docs/")
        if inside is not None:
            way = posixpath.relpath(inside, posixpath.dirname(page) or ".")
            return f"{match['image']}[{match['text']}]({way}{'#' * bool(anchor)}{anchor})"
        address = os.environ.get("DRIFT_PEFT_URL", "").rstrip("/")
        return f"[{match['text']}]({address}/blob/main/{path})" if address else match["text"]

    parts = FENCE.split(markdown)
    return "".join(part if i % 2 else LINK.sub(link, part) for i, part in enumerate(parts))


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *[[cell.replace("|", "\\|") for cell in row] for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def own_fields() -> str:
    from peft import LoraConfig

    from drift_peft import DriftConfig
    from drift_peft.tuner import describe
    from drift_peft.tuner import own_fields as names

    return "\n\n".join(
        f"### `{field.name}`\n\n{in_markdown(field.meaning)}\n\n"
        f"- Type: `{field.type}`\n- Default: `{field.default}`"
        + (f"\n- Allowed: {in_markdown(field.range)}" if field.range else "")
        for field in describe(DriftConfig, names(DriftConfig, LoraConfig))
    )


def lora_fields() -> str:
    from peft import LoraConfig

    from drift_peft import DriftConfig
    from drift_peft.tuner import describe
    from drift_peft.tuner import own_fields as names

    shared = {field.name for field in describe(LoraConfig)} - {*names(DriftConfig, LoraConfig)}
    rows = [
        [f"`{f.name}`", f"`{f.type}`", f"`{f.default}`", in_markdown(f.meaning)] for f in describe(LoraConfig, shared)
    ]
    return table(["field", "type", "default", "meaning, in PEFT's words"], rows)


def in_markdown(text: str) -> str:
    """A help text in one line."""
    return escaped(re.sub(r"\s+", " ", text).strip())


def escaped(text: str) -> str:
    """Plain text holds asterisks and angle brackets that are no markup, where they are not `code`."""
    parts = text.split("`")
    return "`".join(
        part if i % 2 else re.sub(r"([*_\\])", r"\\\1", part).replace("<", "&lt;") for i, part in enumerate(parts)
    )


def commands() -> str:
    from drift_peft.cli.commands import parser

    return "\n\n".join(f"## `{one.prog}`\n\n```text\n{help_of(one)}\n```" for one in all_parsers(parser()))


def all_parsers(parser: ArgumentParser) -> Iterator[ArgumentParser]:
    """A command and its verbs, in the order of the help."""
    yield parser
    for action in parser._actions:
        if isinstance(action, _SubParsersAction):
            for verb in action.choices.values():
                yield from all_parsers(verb)


def help_of(parser: ArgumentParser) -> str:
    """argparse asks the terminal, that is COLUMNS, for its width."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(WIDTH)
    try:
        return parser.format_help().rstrip()
    finally:
        os.environ.pop("COLUMNS") if before is None else os.environ.update(COLUMNS=before)


def families() -> str:
    """The printed table, whose cells go over several lines."""
    text = ROOT.joinpath("benchmarks/results/families.txt").read_text(encoding="utf-8")
    rows: list[list[str]] = []
    for line in text.splitlines():
        if line[:1] not in ("┃", "│"):
            continue
        cells = [cell.strip() for cell in line[1:-1].split(line[0])]
        if cells[0]:
            rows.append(cells)
        else:
            rows[-1] = [f"{whole} {more}".strip() for whole, more in zip(rows[-1], cells, strict=True)]
    head, *body = rows
    counts = json.loads(text.splitlines()[-1])
    told = (
        f"Of the {counts['types']} types of transformers {counts['transformers']}, {counts['works']} go the whole way."
    )
    short = table(head[:-1], [[f"`{name}`", *map(in_markdown, cells[:-1])] for name, *cells in body])
    notes = "\n".join(f"- `{row[0]}`: {in_markdown(row[-1])}" for row in body if row[-1])
    return f"{told}\n\n{short}\n\n## What is left out, or why not\n\n{notes}"
