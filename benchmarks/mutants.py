"""Do the tests see a fault in the code? Small faults are put into it, one at a time, and each should make a test fail.

make mutants [FILES="tuner/guidance prior/svd"] [SAMPLE=30] [SEED=1]

The faults (mutants) are mutmut's: another operator, number or constant, a value or an argument lost, either branch of
a condition. How they run is our own, since these tests need many seconds of imports: one process collects them and runs
each of them once, to see which functions it calls. Then it forks for each mutant, changes the code of that one function
in memory, and runs the tests that call it, until one fails: the one that saw the mutant before first, then the
quickest. What outlasts ten times the tests' own time counts as seen too.

What came out of each is appended to runs/mutants.jsonl, so that a run goes on where another was stopped, and what was
seen stays seen until its function changes. What was not seen is tried again, unless it needs no test; see below. To
begin anew, remove that file.

Not changed: what stands outside of functions, the wording of errors, annotations, `strict=` of zip, which asserts
something, and `device=`, since these tests run on one. Hypothesis searches as it always does, but does not shrink.

A survivor is a mutant that no test of the table saw. `benchmarks/survivors.yaml` says of those that need no test, why;
they stay in the count. What it says of a line that has changed since is an error.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import gc
import hashlib
import importlib
import inspect
import json
import math
import multiprocessing
import os
import platform
import random
import re
import resource
import sys
import textwrap
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType, SimpleNamespace

try:
    import libcst as cst
    from mutmut.mutation.file_mutation import MutationVisitor, deep_replace
    from mutmut.mutation.mutators import mutation_operators
    from mutmut.mutation.pragma_handling import IgnoredCode
except ModuleNotFoundError as error:
    sys.exit(f"mutants.py needs {error.name}, which is not installed: run make mutants, which puts it beside the rest.")

import hypothesis
import pytest
import torch
import yaml
from _pytest.runner import runtestprotocol
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
# The quickest tests that call all of a file; SLOW ones among them, whose calls others make too, are left out.
LORA = [
    "test_it_says_where_it_comes_from",
    "test_adapter_and_base_on_the_hub",
    "test_an_adapter_is_taken_at_its_revision",
    "test_what_is_brought_of_the_base_is_on_the_record",
    "test_a_four_bit_base",
    "test_the_sum_is_taken_in_fp32",
    "test_it_is_named_as_it_was_given_where_it_is_refused",
]
LAYERS = ["tuner/test_batches.py", "tuner/test_step_when.py", "tuner/test_steered.py"]
TESTS = {
    "tuner/guidance": ["tuner/test_guidance.py", "tuner/test_settings.py::test_schedule_by_hand"],
    "tuner/batches": LAYERS,
    "tuner/step": LAYERS,
    "tuner/steered": LAYERS,
    "tuner/capture": ["tuner/test_capture.py"],
    "checkpoints/naming": [
        "checkpoints/test_naming.py",
        "checkpoints/test_schema.py::test_a_catastrophic_regular_expression_ends",
    ],
    "checkpoints/match": ["checkpoints/test_match_rules.py"],
    "checkpoints/lora": ["checkpoints/test_adapter_files.py", *(f"checkpoints/test_lora.py::{test}" for test in LORA)],
    "checkpoints/update": ["checkpoints/test_update.py"],
    "prior/delta": ["prior/test_delta.py"],
    "prior/svd": ["prior/test_svd.py"],
}
SLOW = [
    "tuner/test_guidance.py::test_without_a_loss",
    "tuner/test_guidance.py::test_adaptive_pushes",
    "tuner/test_guidance.py::test_homogeneity",
    "checkpoints/test_naming.py::test_targets",
]
LEDGER = ROOT / "runs" / "mutants.jsonl"  # a line for each mutant that was tried
SURVIVORS = Path(__file__).with_name("survivors.yaml")  # file -> mutant -> why it needs no test
PATIENCE = 10  # times what a mutant's tests took on the code as it is, and as many seconds
UNCHANGED = re.compile(r",?\s*\b(?:strict|device)=(?:None|True|False|self\.device|[\w.]+\.device)|,\s*(?=\))")


@dataclass(frozen=True)
class Mutant:
    function: str  # qualified name in its module
    source: str  # of the function with the fault in it
    change: str  # the lines that differ, before and after

    @property
    def digest(self) -> str:
        return hashlib.sha256(f"{self.function}\n{self.source}".encode()).hexdigest()[:16]


class Visitor(MutationVisitor):
    """mutmut's, in decorated functions too: a fault goes into a function's code, whatever is around it."""

    def _skip_node_and_children(self, node: cst.CSTNode) -> bool:
        if isinstance(node, cst.FunctionDef):
            return False
        return isinstance(node, (cst.Raise, cst.Decorator)) or super()._skip_node_and_children(node)


def mutants_of(file: Path, sample: int | None, seed: int) -> list[Mutant]:
    wrapper = cst.MetadataWrapper(cst.parse_module(file.read_text()))
    visitor = Visitor(mutation_operators, IgnoredCode(set(), set(), set()))
    module = wrapper.visit(visitor)
    names = {}
    for statement in module.body:
        owner = statement.name.value if isinstance(statement, cst.ClassDef) else ""
        for function in statement.body.body if owner else [statement]:
            if isinstance(function, cst.FunctionDef):
                names[function] = f"{owner}.{function.name.value}".removeprefix(".")
    mutations = [m for m in visitor.mutations if m.contained_by_top_level_function in names]
    if sample is not None:
        random.Random(seed).shuffle(mutations)
    found = []
    for mutation in mutations:
        function = mutation.contained_by_top_level_function
        changed = deep_replace(function, mutation.original_node, mutation.mutated_node)
        before, after = (module.code_for_node(each).strip("\n") for each in (function, changed))
        if UNCHANGED.sub("", before) != UNCHANGED.sub("", after):
            found.append(Mutant(names[function], after, difference(before, after)))
        if len(found) == sample:
            break
    return found


def difference(before: str, after: str) -> str:
    lines = list(difflib.ndiff(before.splitlines(), after.splitlines()))
    return " => ".join(" ".join(line[2:].strip() for line in lines if line[0] == sign) for sign in "-+")


def module_of(name: str) -> ModuleType:
    return importlib.import_module("drift_peft." + name.replace("/", "."))


def function_of(module: ModuleType | SimpleNamespace, name: str) -> FunctionType:
    """The function itself, in a property, a class method or a decorator's wrapper."""
    *owner, attribute = name.split(".")
    found = vars(getattr(module, owner[0]) if owner else module)[attribute]
    found = found.fget if isinstance(found, property) else found
    return inspect.unwrap(getattr(found, "__func__", found))


def marked(module: ModuleType, name: str, of: str, function: FunctionType) -> FunctionType:
    """The function as it is, but for noting that it was called."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    tree.body[0].body.insert(0, ast.parse(f"_called.add({(name, of)!r})").body[0])
    return compiled(module, Mutant(of, ast.unparse(tree), ""))


def compiled(module: ModuleType, mutant: Mutant) -> FunctionType:
    """The function as the mutant has it, in the module's names."""
    *owner, name = mutant.function.split(".")
    source = textwrap.dedent(mutant.source)
    if owner:
        source = f"class {owner[0]}:\n{textwrap.indent(source, '    ')}"
    names = dict(vars(module))
    exec(compile("from __future__ import annotations\n" + source, module.__file__, "exec"), names)
    holder = SimpleNamespace(**{owner[0]: names[owner[0]]} if owner else {name: names[name]})
    return function_of(holder, mutant.function)


class Mutants:
    """A pytest plugin: in place of running the tests, runs each once, and then again those that see a mutant.

    Attributes:
        tried: file -> mutants tried.
        survivors: file -> those that no test saw.
        seconds: test -> CPU seconds on the code as it is.
    """

    def __init__(self, files: list[str], sample: int | None, seed: int):
        self.files, self.sample, self.seed = files, sample, seed
        self.tried: Counter[str] = Counter()
        self.survivors: dict[str, list[Mutant]] = {name: [] for name in files}
        self.seconds: dict[pytest.Item, float] = {}
        self.failed = multiprocessing.RawValue("i")  # place of the test that failed in a fork

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        targets = {name: mutants_of(Path(module_of(name).__file__), self.sample, self.seed) for name in self.files}
        if self.sample is None and (gone := outdated(targets)):
            raise pytest.UsageError(f"mend or remove in {SURVIVORS.name} what is no mutant any more: {'; '.join(gone)}")
        called = self.run_once(session.items, targets)
        gc.freeze()  # what a fork does not touch, it does not copy
        before, known = ledger(), explained()
        for name, mutants in targets.items():
            module = module_of(name)
            own = tuple(f"tests/{test}" for test in TESTS[name])
            tests = sorted((item for item in session.items if item.nodeid.startswith(own)), key=self.seconds.get)
            callers = {m.function: [t for t in tests if (name, m.function) in called[t]] for m in mutants}
            self.tried[name] = len(mutants)
            tried = {m: before[name, m.digest] for m in mutants if (name, m.digest) in before}
            self.survivors[name] = [m for m, seen in tried.items() if not seen and m.change in known.get(name, {})]
            settled = {m for m, seen in tried.items() if seen}.union(self.survivors[name])
            for mutant in tqdm([m for m in mutants if m not in settled], name, file=sys.__stderr__):
                function, of_mutant = function_of(module, mutant.function), callers[mutant.function]
                seen = self.seen(function, compiled(module, mutant), of_mutant)
                if seen:
                    of_mutant.insert(0, of_mutant.pop(self.failed.value))  # it may see the next one too
                else:
                    self.survivors[name].append(mutant)
                    tqdm.write(f"not seen: {mutant.function}: {mutant.change}", file=sys.__stderr__)
                note(name, mutant, of_mutant[0].nodeid if seen else None)
            function = function_of(module, mutants[0].function)
            if self.seen(function, function, tests):
                raise pytest.UsageError(f"the tests of {name} fail in a fork of the process, on the code as it is")
        return True

    def run_once(self, items: list[pytest.Item], targets: dict[str, list[Mutant]]) -> dict[pytest.Item, set[str]]:
        """Test -> names of the functions that it calls. What lives for the session is made here, and found in forks."""
        called: set[tuple[str, str]] = set()
        plain = {}
        for name, mutants in targets.items():
            module = module_of(name)
            module.__dict__["_called"] = called
            for of in {mutant.function for mutant in mutants}:
                function = function_of(module, of)
                plain[function] = function.__code__
                function.__code__ = marked(module, name, of, function).__code__
        callers = {}
        for item, following in zip(items, [*items[1:], items[0].session], strict=True):
            called.clear()
            start = time.process_time()
            if any(report.failed for report in runtestprotocol(item, log=False, nextitem=following)):
                raise pytest.UsageError(f"{item.nodeid} fails on the code as it is")
            self.seconds[item] = time.process_time() - start
            callers[item] = set(called)
        for function, code in plain.items():
            function.__code__ = code
        return callers

    def seen(self, function: FunctionType, changed: FunctionType, tests: list[pytest.Item]) -> bool:
        """Does any of these tests fail with the function changed?"""
        if not tests:
            return False
        self.failed.value = 0
        if not (child := os.fork()):
            with contextlib.suppress(BaseException):
                limit = PATIENCE * math.ceil(1 + sum(self.seconds[test] for test in tests))
                resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
                function.__code__, function.__defaults__ = changed.__code__, changed.__defaults__
                function.__kwdefaults__ = changed.__kwdefaults__
                for i, (test, following) in enumerate(zip(tests, [*tests[1:], tests[0].session], strict=True)):
                    self.failed.value = i
                    if any(report.failed for report in runtestprotocol(test, log=False, nextitem=following)):
                        os._exit(1)
                os._exit(0)
            os._exit(1)
        return os.waitpid(child, 0)[1] != 0


def ledger() -> dict[tuple[str, str], bool]:
    """File and digest of the mutants that were tried in runs before -> were they seen?"""
    lines = LEDGER.read_text().splitlines() if LEDGER.exists() else []
    return {(line["file"], line["mutant"]): line["seen_by"] is not None for line in map(json.loads, lines)}


def explained() -> dict[str, dict[str, str]]:
    """File -> change -> why it needs no test."""
    return yaml.safe_load(SURVIVORS.read_text()) or {}


def outdated(targets: dict[str, list[Mutant]]) -> list[str]:
    """What is explained, but is no mutant of its file."""
    known = explained()
    changes = {name: {mutant.change for mutant in mutants} for name, mutants in targets.items()}
    return [f"{name}: {change}" for name in targets for change in known.get(name, {}) if change not in changes[name]]


def note(name: str, mutant: Mutant, seen_by: str | None) -> None:
    LEDGER.parent.mkdir(exist_ok=True)
    line = {"file": name, "mutant": mutant.digest, "function": mutant.function, "change": mutant.change}
    with LEDGER.open("a") as file:
        file.write(json.dumps(line | {"seen_by": seen_by}, ensure_ascii=False) + "\n")


def report(plugin: Mutants, console: Console) -> None:
    table = Table("file", "tried", "seen", "score", "need no test", "open")
    why = explained()
    rows = [(name, plugin.tried[name], plugin.survivors[name], why.get(name, {})) for name in plugin.files]
    for name, tried, survivors, known in rows:
        seen, needless = tried - len(survivors), sum(m.change in known for m in survivors)
        cells = tried, seen, f"{seen / tried:.1%}", needless, len(survivors) - needless
        table.add_row(name, *map(str, cells))
    tried, seen = plugin.tried.total(), plugin.tried.total() - sum(map(len, plugin.survivors.values()))
    table.add_row("together", str(tried), str(seen), f"{seen / tried:.1%}", "", "", style="bold")
    console.print(table)
    for name, _, survivors, known in rows:
        for mutant in survivors:
            line = f"{name} {mutant.function}: {mutant.change}\n    {known.get(mutant.change, 'a test is missing')}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    sample = "all" if plugin.sample is None else f"{plugin.sample} of each file, seed {plugin.seed}"
    result = {"mutants": sample, "tried": tried, "seen": seen, "score": round(seen / tried, 4)}
    result |= {"python": platform.python_version(), "torch": torch.__version__}
    print(json.dumps(result | {"tests_s": round(sum(plugin.seconds.values()), 1)}))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE", help=f"of {', '.join(TESTS)} (default: all)")
    parser.add_argument("--sample", type=int, metavar="N", help="so many mutants of each file (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default: 0)")
    args = parser.parse_args(argv)
    files = args.files or [*TESTS]
    if unknown := [name for name in files if name not in TESTS]:
        parser.error(f"{unknown[0]} has no tests in the table of {Path(__file__).name}: choose of {', '.join(TESTS)}")
    hypothesis.settings.register_profile("mutants", phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate])
    hypothesis.settings.load_profile("mutants")
    plugin = Mutants(files, args.sample, args.seed)
    tests = dict.fromkeys(f"{ROOT}/tests/{test}" for name in files for test in TESTS[name])
    options = ["-qq", "--capture=sys", "--no-header", "--no-summary", "--tb=line", "-p", "no:cacheprovider"]
    options += [f"--deselect=tests/{test}" for test in SLOW]
    if status := pytest.main([*options, f"--rootdir={ROOT}", *tests], plugins=[plugin]):
        sys.exit(int(status))
    report(plugin, Console())


if __name__ == "__main__":
    main()
