"""The process in which writers fail: it has imported everything once, with the shim preloaded, and forks for each case.

`python engine.py FOLDER SHIM` reads a case a line from stdin, as JSON: a writer, a fault and how it comes. It answers
with {"struck": …, "why": …}: whether the fault came in time, and what did not hold afterwards. The methods of the
faults' names say what must hold.
"""

import ctypes
import errno
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tiny import save_layout, tiny_llm

from drift_peft import ReasoningPrior, build_prior, merge_adapter, merge_baseline

ERRORS = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC, "SIGKILL": 0}
SENTENCE, TRACEBACK = 1, 2  # exit statuses of a child
PATIENCE = 120  # seconds, after which a child hangs


class Engine:
    def __init__(self, folder: Path, shim: str):
        self.folder, self.inputs = folder, folder / "inputs"
        self.shim = ctypes.CDLL(shim)
        self.shim.fault_count.restype = ctypes.c_long
        self.random = random.Random(0)
        make_inputs(self.inputs)
        self.whole: dict[str, str] = {}  # writer -> digest of its output
        self.there: dict[str, str] = {}  # the same, of inputs in the folder in which they change
        self.seconds: dict[str, float] = {}  # writer -> how long it takes
        self.writes: dict[str, int] = {}  # writer -> how often it changes the disk

    def run(self, case: dict) -> dict:
        writer = case["writer"]
        if writer not in self.whole:
            self._measure(writer)
        self._fresh()
        self.struck = False
        problem = getattr(self, f"_{case['fault']}")(writer, case)
        return {"struck": self.struck, "why": problem}

    def _measure(self, writer: str) -> None:
        self._fresh()
        started = time.monotonic()
        assert self._wait(self._start(writer, n=10**9, error=0, count=True)) == 0, self._said()
        self.seconds[writer] = time.monotonic() - started
        self.writes[writer] = int((self.folder / "count").read_text())
        self.whole[writer] = digest(self.folder / "out")

    def _fresh(self) -> None:
        shutil.rmtree(self.folder / "out", ignore_errors=True)
        (self.folder / "out").mkdir()

    def _start(self, writer: str, inputs: Path | None = None, overwrite=False, n=None, error=0, count=False) -> int:
        pid = os.fork()
        if pid:
            return pid
        status = TRACEBACK
        try:
            os.dup2(os.open(self.folder / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            if n is not None:
                self.shim.fault_arm(str(self.folder / "out").encode(), ctypes.c_long(n), error)
            WRITERS[writer](inputs or self.inputs, self.folder / "out" / "result", overwrite)
            status = 0
        except (ValueError, OSError) as mistake:
            status = SENTENCE if "\n" not in str(mistake) else TRACEBACK
            os.write(2, str(mistake).encode())
        except BaseException as mistake:
            os.write(2, f"{type(mistake).__name__}: {mistake}".encode())
        finally:
            if count:
                (self.folder / "count").write_text(str(self.shim.fault_count()))
            os._exit(status)

    def _wait(self, pid: int, seconds: float = PATIENCE) -> int | None:
        """Exit status, or the signal's number as a negative one; None if the time is over."""
        until = time.monotonic() + seconds
        while True:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > until:
                return None
            time.sleep(0.002)

    def _said(self) -> str:
        return (self.folder / "said").read_text(errors="replace")

    # Faults

    def _kill(self, writer: str, case: dict) -> str | None:
        """SIGKILL at a random moment."""
        pid = self._start(writer)
        status = self._wait(pid, self.random.uniform(0, 1.1 * self.seconds[writer]))
        if status is None:
            os.kill(pid, signal.SIGKILL)
            status = self._wait(pid)
        return self._afterwards(writer, status)

    def _write(self, writer: str, case: dict) -> str | None:
        """The n-th change of the disk fails, or is the last."""
        n = self.random.randrange(self.writes[writer])
        status = self._wait(self._start(writer, n=n, error=ERRORS[case["error"]]))
        problem = self._afterwards(writer, status)
        return problem and f"at change {n} of {self.writes[writer]}: {problem}"

    def _two(self, writer: str, case: dict) -> str | None:
        """Two at once: one result, whole; who does not write says so."""
        pids = [self._start(writer), self._start(writer)]
        statuses = sorted(self._wait(pid) for pid in pids)
        self.struck = statuses != [0, 0]
        if statuses not in ([0, 0], [0, SENTENCE]) or (statuses == [0, 0] and writer not in OVERWRITING):
            return f"two at once ended with {statuses}: {self._said()}"
        return self._is_whole(writer)

    def _change(self, writer: str, case: dict) -> str | None:
        """An input becomes another one, by rename or in place: a result is that of the old or of the new ones."""
        changed, other = self.folder / "changed", self.folder / "other"
        for folder in (changed, other):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.inputs, changed)
        if writer not in self.there:  # a prior names the folders that it is of
            assert self._wait(self._start(writer, inputs=changed)) == 0, self._said()
            self.there[writer] = digest(self.folder / "out")
            self._fresh()
        role = self.random.choice(READS[writer])
        pid = self._start(writer, inputs=changed)
        time.sleep(self.random.uniform(0, self.seconds[writer]))
        for file in sorted((changed / role).glob("*.safetensors")):
            content = bytearray(file.read_bytes())
            content[-64:] = bytes(64)
            if case["how"] == "rename":
                (changed / "new").write_bytes(content)
                os.replace(changed / "new", file)
            else:
                with open(file, "r+b") as opened:
                    opened.write(content)
        status = self._wait(pid)
        self.struck = status != 0
        if status == SENTENCE:
            return self._is_clean()
        if status != 0:
            return f"ended with {status}: {self._said()}"
        found = digest(self.folder / "out")
        self._fresh()
        again = self._wait(self._start(writer, inputs=changed))
        named = {self.there[writer], digest(self.folder / "out") if again == 0 else ""}
        return None if found in named else f"{role}: a mixture of the old and the new, with status 0"

    def _afterwards(self, writer: str, status: int | None) -> str | None:
        """No traceback, nothing torn under the output's name; the same command ends in the same bytes."""
        self.struck = status != 0
        if status not in (0, SENTENCE, -signal.SIGKILL):
            return f"ended with {status}: {self._said()}"
        if status == SENTENCE and (problem := self._is_clean()):
            return f"{self._said()}: {problem}"
        result = self.folder / "out" / "result"
        if self._wait(self._start(writer, overwrite=result.exists())):
            return f"the same again fails: {self._said()}"
        return self._is_whole(writer)

    def _is_clean(self) -> str | None:
        """What may be there after a sentence: an earlier result, and what a build has done, of which it says so."""
        left = {file.name for file in (self.folder / "out").iterdir()} - {"result"}
        kept = (
            {"result.partial"}
            if "keeps the" in self._said() or (self.folder / "out" / "result.partial").exists()
            else set()
        )
        return f"left {left - kept}" if left - kept else None

    def _is_whole(self, writer: str) -> str | None:
        left = sorted(file.name for file in (self.folder / "out").iterdir())
        if left != ["result"]:
            return f"left {left}"
        return None if digest(self.folder / "out") == self.whole[writer] else "other bytes"


def make_inputs(folder: Path) -> None:
    """base/ and expert/ in shards, adapter/ of the base, a.safetensors and b.safetensors: priors."""
    model = tiny_llm("llava")
    save_layout(model, folder / "base", max_shard_size="60KB")
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.1 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    save_layout(model, folder / "expert", max_shard_size="60KB")
    get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    ).save_pretrained(folder / "adapter")
    for name, rank in (("a", 4), ("b", 2)):
        build_prior(folder / "expert", folder / "base", folder / f"{name}.safetensors", rank=rank, progress=False)


def _overwriting(inputs: Path, out: Path, overwrite: bool) -> None:
    merge_adapter(inputs / "base", inputs / "adapter", out, overwrite=True, progress=False)


WRITERS = {
    "build": lambda i, out, o: build_prior(i / "expert", i / "base", out, rank=4, overwrite=o, progress=False),
    "merge": lambda i, out, o: merge_adapter(i / "base", i / "adapter", out, overwrite=o, progress=False),
    "merge --overwrite": _overwriting,
    "merge-baseline": lambda i, out, o: merge_baseline(
        "task_arithmetic", i / "expert", i / "base", out, scale=0.5, overwrite=o, progress=False
    ),
    "combine": lambda i, out, o: ReasoningPrior.combine(
        [(i / "a.safetensors", 1.0), (i / "b.safetensors", 0.5)], out, overwrite=o
    ),
    "truncate": lambda i, out, o: ReasoningPrior.load(i / "a.safetensors").truncate(2, out, overwrite=o),
    "export": lambda i, out, o: ReasoningPrior.load(i / "a.safetensors").as_lora(1.0, out, i / "base", overwrite=o),
}
OVERWRITING = {"merge --overwrite"}
READS = {"build": ["expert", "base"], "merge": ["base", "adapter"], "merge-baseline": ["expert", "base"]}


def digest(folder: Path) -> str:
    """Of all files, by their names."""
    found = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            found.update(file.relative_to(folder).as_posix().encode() + hashlib.sha256(file.read_bytes()).digest())
    return found.hexdigest()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    engine = Engine(Path(sys.argv[1]), sys.argv[2])
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(engine.run(json.loads(line))), flush=True)
