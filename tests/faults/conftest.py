"""`make test-faults`: how long each fault is tried, and how many of them held, in a table at the end.

Without --faults only a few of each are tried, so that `make test` has them.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent


def pytest_addoption(parser):
    parser.addoption("--faults", type=float, metavar="SECONDS", help="try all faults, so long in all")


class Ledger:
    """How often each fault was tried, came before the process was done, and left all that must hold."""

    def __init__(self, seconds: float | None):
        self.seconds = seconds
        self.tried: Counter[str] = Counter()
        self.struck: Counter[str] = Counter()
        self.held: Counter[str] = Counter()

    def cases(self, fault: str, share: float, few: int):
        """Numbers of cases: as many as fit this share of the time, or a few."""
        if self.seconds is None:
            yield from range(few)
            return
        end, number = time.monotonic() + share * self.seconds, 0
        while time.monotonic() < end:
            yield number
            number += 1

    def add(self, fault: str, struck: bool, held: bool) -> None:
        self.tried[fault] += 1
        self.struck[fault] += struck
        self.held[fault] += held


LEDGER = pytest.StashKey[Ledger]()


def pytest_configure(config):
    config.stash[LEDGER] = Ledger(config.getoption("--faults", None))


def pytest_terminal_summary(terminalreporter, config):
    ledger = config.stash[LEDGER]
    if ledger.seconds is None:
        return
    terminalreporter.write_line(f"faults of {time.strftime('%Y-%m-%d')}, {machine()}")
    columns = {"tried": ledger.tried, "struck": ledger.struck, "held": ledger.held}
    terminalreporter.write_line(f"{'fault':44}" + "".join(f"{name:>8}" for name in columns))
    for fault in ledger.tried:
        terminalreporter.write_line(f"{fault:44}" + "".join(f"{column[fault]:8}" for column in columns.values()))
    total = {name: sum(column.values()) for name, column in columns.items()}
    terminalreporter.write_line(f"{'all':44}" + "".join(f"{number:8}" for number in total.values()))
    terminalreporter.write_line(json.dumps(total))


def machine() -> str:
    name = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            name = line.partition(": ")[2]
            break
    return f"{name}, {os.cpu_count()} cores, Python {platform.python_version()}, {platform.system()}"


@pytest.fixture(scope="session")
def ledger(request):
    return request.config.stash[LEDGER]


@pytest.fixture(scope="session")
def engine(tmp_path_factory):
    """Asked by a case, it answers whether it held: see engine.py."""
    if sys.platform != "linux" or shutil.which("cc") is None:
        pytest.skip("needs Linux and a C compiler")
    folder = tmp_path_factory.mktemp("faults")
    shim = folder / "shim.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", shim, Path(__file__).with_name("shim.c"), "-ldl"], check=True)
    environment = {**os.environ, "LD_PRELOAD": str(shim), "PYTHONWARNINGS": "ignore"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("engine.py"), folder, shim],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=open(folder / "engine", "w"),
        env=environment,
        text=True,
    )
    while (line := process.stdout.readline()) != "ready\n":  # libraries print as they are imported
        assert line, (folder / "engine").read_text()

    def ask(**case) -> dict:
        process.stdin.write(json.dumps(case) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        assert line, (folder / "engine").read_text()
        return json.loads(line)

    yield ask
    process.stdin.close()
    process.wait()
