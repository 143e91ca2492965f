"""Help and refusals: what they say is what the library does, and they cost no import of it."""

import inspect
import json
import re
import shlex
import subprocess
import sys

import pytest
from command import run

import drift_peft.demo
from drift_peft import build_prior, make_keep_set, merge_adapter, merge_baseline, transplant
from drift_peft.choices import METHODS
from drift_peft.cli import commands
from drift_peft.cli.keep import VERBS as KEEP
from drift_peft.cli.prior import VERBS

PATHS = [(), ("prior",), *(("prior", verb) for verb in VERBS), *((verb,) for verb in commands.VERBS if verb != "prior")]
PATHS += [("keep", verb) for verb in KEEP]
MODULES = {**{("prior", name): verb for name, verb in VERBS.items()}, **{(n,): v for n, v in commands.VERBS.items()}}
MODULES |= {("keep", name): verb for name, verb in KEEP.items()}
BUILD = ["prior", "build", "--expert", "x", "--base", "y", "-o", "z"]
KEEP_MAKE = ["keep", "make", "--base", "x", "--images", "y", "-o", "z"]
MERGE = ["merge", "--base", "x", "--adapter", "y", "-o", "z"]
BASELINE = ["merge-baseline", "--method", "ties", "--expert", "x", "--base", "y", "-o", "z"]
TRANSPLANT = ["transplant", "--expert", "x", "--base", "y", "-o", "z"]
REFUSED = [
    [],
    ["prior"],
    ["mrege"],
    ["--foo"],
    [*BUILD, "--rnak", "3"],
    [*BUILD, "--rank", "many"],
    [*BUILD, "--modules", "attention"],
    [*BUILD, "--only-layers", "few"],
    ["keep"],
    [*KEEP_MAKE, "--top-k", "many"],
    [*MERGE, "--onto", "dequantised"],
    [*BASELINE, "--density", "few"],
    ["merge-baseline", "--method", "TIES"],
    [*TRANSPLANT, "--scale", "much"],
    ["merge", "--base", "x"],
    ["prior", "combine", "a.safetensors", "-o", "z"],
    ["preflight", "recipe.yaml", "--set", "max_tokens"],
    ["preflight", "nowhere.yaml"],
]
PROBE = """
import contextlib, io, json, sys
from drift_peft.cli import main
for argv in map(json.loads, sys.argv[1:]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            status = main(argv)
        except SystemExit as stop:
            status = stop.code
    print(status, *{name.partition(".")[0] for name in sys.modules})
"""


def help_of(capsys, *path):
    """In one line, whatever the terminal's width."""
    status, out, err = run(capsys, *path, "--help")
    assert status == 0 and err == ""
    return " ".join(out.split())


def test_nothing_heavy_is_imported():
    called = [["--version"], *([*path, "--help"] for path in PATHS), *REFUSED]
    command = [sys.executable, "-c", PROBE, *map(json.dumps, called)]
    result = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", check=True)
    for argv, line in zip(called, result.stdout.splitlines(), strict=True):
        status, *imported = line.split()
        assert (status == "0") == (argv not in REFUSED) and "drift_peft" in imported, argv
        heavy = {"torch", "transformers", "peft", "bitsandbytes", "huggingface_hub", "numpy", "rich"} & {*imported}
        assert not heavy, argv


@pytest.mark.parametrize("path", PATHS, ids=" ".join)
def test_help_has_one_style_and_an_example(path, capsys):
    told = help_of(capsys, *path)
    assert not re.search(r"--\w+_\w+|default: (null|None|False|\[)|type: ", told)
    example = MODULES[path].EXAMPLE if path else "drift-peft demo"
    assert told.endswith(f"example: {' '.join(example.split())}")
    program, *argv = shlex.split(example.replace("\\\n", " "))
    assert program == "drift-peft" and commands.parser().parse_args(argv).run


def test_underscores_are_read_as_dashes():
    given = commands.parser().parse_args([*BUILD, "--max_rank", "12", "--skip_first=3", "--only-layers", "0"])
    assert (given.max_rank, given.skip_first, given.only_layers) == (12, 3, ["0"])


def test_a_flag_of_several_values_takes_those_of_each_time_that_it_is_given():
    twice = ["--modules", "attn", "--modules", "mlp", "norm", "--only-layers", "0", "--only-layers=4"]
    for command in (BUILD, BASELINE):
        given = commands.parser().parse_args([*command, *twice])
        assert (given.modules, given.only_layers) == (["attn", "mlp", "norm"], ["0", "4"])
    given = commands.parser().parse_args(["demo", "--seed", "1", "--methods", "a", "--seed", "2", "--methods", "b"])
    assert (given.seeds, given.methods) == ([1, 2], ["a", "b"])
    given = commands.parser().parse_args([*BUILD, "--rank", "4", "--rank", "8"])
    assert (given.rank, given.modules) == (8, ["attn", "mlp"])


def test_what_is_no_flag_keeps_its_underscores():
    given = commands.parser().parse_args(["targets", "--prior=a_b", "--", "--my_dir"])
    assert (given.model, given.prior) == ("--my_dir", "a_b")
    given = commands.parser().parse_args(["prior", "push", "p_q", "u/r_s", "--message", "a_b --c_d"])
    assert (given.prior, given.repository, given.message) == ("p_q", "u/r_s", "a_b --c_d")


@pytest.mark.parametrize(
    "function, argv",
    [
        (build_prior, BUILD),
        (make_keep_set, KEEP_MAKE),
        (merge_adapter, MERGE),
        (merge_baseline, BASELINE),
        (transplant, TRANSPLANT),
        (drift_peft.demo.run, ["demo"]),
    ],
)
def test_defaults_are_those_of_the_library(function, argv):
    given = vars(commands.parser().parse_args(argv))
    defaults = {p.name: p.default for p in inspect.signature(function).parameters.values() if p.default is not p.empty}
    compared = given.keys() & defaults.keys()
    assert len(compared) >= 2
    for name in compared:
        default = defaults[name]
        assert given[name] == (list(default) if isinstance(default, tuple) else default), name


def test_the_help_tells_the_defaults_of_every_method():
    """It speaks of those of ties and dare in one, and of no other."""
    plain, ties = METHODS["task_arithmetic"], METHODS["ties"]
    for name, method in METHODS.items():
        like = ties if name.startswith(("ties", "dare")) else plain
        assert (method.weights, method.density) == (like.weights, like.density)
        assert (method.skip_first == 0) == (name != "layer_swap")
