"""What holds for all tests, in every process of a run. What they share is in shared.py."""

import os
import signal

import pytest

# Before torch looks for one: all tests but those of test_cuda.py put their inputs on the CPU, and models in 4 bits go
# to a GPU by themselves. `make test-cuda` lets them see it.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ["OMP_NUM_THREADS"] = "1"  # tiny tensors gain nothing from more, and results repeat; so in other processes
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a shell's background, whose programs would ignore Ctrl-C too
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also what takes many seconds a test, marked slow")


def pytest_configure(config):
    """The process that hands tests out runs none: it starts the others at once, without the seconds of the imports."""
    if hasattr(config, "workerinput") or config.getoption("dist", "no") == "no":
        config.pluginmanager.import_plugin("shared")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="takes long: make test-slow"))
