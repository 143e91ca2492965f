"""The order of the rooms, read from the code's imports: downwards only, through a room's door, and in no circle."""

import re
from importlib import import_module
from pathlib import Path

import grimp
import pytest

import drift_peft

ROOMS = ("cli", "demo", "integrations", "preflight", "merge", "tuner", "keeping", "prior", "checkpoints")  # downwards
ROOT = Path(drift_peft.__file__).parent
PACKAGES = sorted(path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in ROOT.glob("*/**/__init__.py"))
FILES = "arguments", "atomic", "builds", "chat", "choices", "page", "recipe", "warn"  # what every room may stand on
GROUND = {"drift_peft", *(f"drift_peft.{name}" for name in FILES)}
LINES = 400  # of a file at most


@pytest.fixture(scope="module")
def graph():
    return grimp.build_graph("drift_peft", cache_dir=None)


def room(module):
    return module.split(".")[1]


def imports(graph):
    """(importer, imported) of all modules inside the rooms."""
    inside = sorted(module for module in graph.modules if module not in {*GROUND, "drift_peft.__main__"})
    return [(module, other) for module in inside for other in sorted(graph.find_modules_directly_imported_by(module))]


def test_every_room_has_its_place():
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} == set(ROOMS)
    drawn = re.findall(r"^  (\w+)/ ", (ROOT.parent / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.M)
    assert tuple(drawn) == ROOMS


def test_arrows_run_downwards(graph):
    illegal = graph.find_illegal_dependencies_for_layers(layers=ROOMS, containers={"drift_peft"})
    routes = [[*r.heads, *r.middle, *r.tails] for dependency in illegal for r in dependency.routes]
    assert not routes
    assert graph.direct_import_exists(importer="drift_peft.merge.adapter", imported="drift_peft.checkpoints")  # is read


def test_no_two_files_import_each_other(graph):
    assert not [(a, b) for a, b in imports(graph) if graph.chain_exists(importer=b, imported=a)]


def test_rooms_are_entered_by_their_doors(graph):
    """What another room may use is what `__init__.py` names; of prior, also what prior.report names."""
    doors = {f"drift_peft.{package}" for package in PACKAGES}
    named = {f"{door}.{name}" for door in doors for name in getattr(import_module(door), "__all__", ())}
    between = [(a, b) for a, b in imports(graph) if b not in GROUND and room(a) != room(b)]
    assert between and not [(a, b) for a, b in between if b not in doors | named]  # telemetry is a file and a name


@pytest.mark.parametrize("package", PACKAGES)
def test_a_room_says_what_stands_in_it(package):
    """A line a file, and no line of a file that is gone."""
    folder = ROOT.joinpath(*package.split("."))
    files = {path.stem for path in folder.glob("*.py")} - {"__init__", "__main__"}
    folders = {f"{path.parent.name}/" for path in folder.glob("*/__init__.py")}
    lines = re.findall(r"^ *(\w+/?) {2,}\S", import_module(f"drift_peft.{package}").__doc__, re.M)
    assert sorted(lines) == sorted(files | folders)


def test_a_file_fits_on_a_few_screens():
    long = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in ROOT.rglob("*.py")}
    assert long and not {name: lines for name, lines in long.items() if lines > LINES}
