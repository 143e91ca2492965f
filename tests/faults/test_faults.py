"""Writers that are killed, that fail as they write, that meet, and whose inputs change: nothing torn, nothing mixed."""

import pytest

WRITERS = ("build", "merge", "merge --overwrite", "merge-baseline", "combine", "truncate", "export")
READERS = ("build", "merge", "merge-baseline")
FAULTS = {  # fault -> the case, the writers, its share of the time, and how many are few
    "killed at a random moment": ({"fault": "kill"}, WRITERS, 0.2, 2),
    "killed at a change of the disk": ({"fault": "write", "error": "SIGKILL"}, WRITERS, 0.2, 4),
    "a change of the disk fails: EIO": ({"fault": "write", "error": "EIO"}, WRITERS, 0.12, 2),
    "a change of the disk fails: ENOSPC": ({"fault": "write", "error": "ENOSPC"}, WRITERS, 0.12, 2),
    "two at once": ({"fault": "two"}, WRITERS, 0.1, 3),
    "inputs that change by rename": ({"fault": "change", "how": "rename"}, READERS, 0.06, 1),
    "inputs that change in place": ({"fault": "change", "how": "in place"}, READERS, 0.06, 1),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_is_lost_or_mixed(fault, engine, ledger):
    case, writers, share, few = FAULTS[fault]
    problems = []
    for number in ledger.cases(fault, share, few):
        writer = writers[number % len(writers)]
        answer = engine(writer=writer, **case)
        ledger.add(fault, answer["struck"], held=answer["why"] is None)
        if answer["why"] is not None:
            problems.append(f"{writer}: {answer['why']}")
    assert not problems, "\n".join(problems)
