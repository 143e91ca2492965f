"""registry.py: what acts on a model is found by the optimizer that trains it, and goes with it."""

import gc
import threading

import torch

from drift_peft.keeping import Known, Registry


class Entry:
    def __init__(self, *parameters):
        self.parameters, self.asked = parameters, 0

    def among(self, parameters):
        self.asked += 1
        return any(id(p) in parameters for p in self.parameters)


def test_entries_go_with_what_holds_them():
    registry, entries = Registry(), [Entry() for _ in range(4)]
    for entry in entries:
        registry.add(entry)
        registry.add(entry)
    assert registry.since() == entries and len(registry) == 4 and entries[1] in registry
    version = registry.version
    registry.discard(entries[1])
    registry.discard(entries[1])
    assert registry.version > version and registry.since() == [entries[0], *entries[2:]] and entries[1] not in registry
    del entry, entries[0]
    gc.collect()
    assert registry.since() == entries[1:] and len(registry) == 2
    version = registry.version
    registry.add(entries[0])
    assert registry.since(version) == [entries[0]] and registry.since() == [*entries[1:], entries[0]]


def test_an_optimizer_knows_its_own():
    registry, p, q = Registry(), torch.zeros(1), torch.zeros(1)
    mine, strangers = [Entry(p), Entry(q, p)], [Entry(q) for _ in range(5)]
    for entry in (*strangers, *mine):
        registry.add(entry)
    known = Known(registry, [p])
    assert known.are_of([p]) and not known.are_of([q]) and not known.are_of([p, q])
    assert known.entries() == mine and known.entries() == mine and {entry.asked for entry in strangers} == {1}
    changes = known.changes()
    registry.add(late := Entry(q))
    assert known.changes() == changes and late.asked == 1
    registry.discard(strangers[0])
    assert known.changes() == changes
    registry.add(another := Entry(p))
    assert known.changes() == changes + 1 and known.entries() == [*mine, another]
    registry.discard(mine[0])
    assert known.changes() == changes + 2 and known.entries() == [mine[1], another]
    assert {entry.asked for entry in strangers} == {1}


def test_threads_add_and_free_while_another_one_looks():
    registry, p, problems, done = Registry(), torch.zeros(1), [], threading.Event()
    registry.add(mine := Entry(p))
    known = Known(registry, [p])

    def churn():
        try:
            while not done.is_set():
                entries = [Entry() for _ in range(20)]
                for entry in entries:
                    registry.add(entry)
                registry.discard(entries[3])
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=churn) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        while registry.version < 3000:
            assert known.entries() == [mine] and mine in registry.since()
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not problems
