"""Tests' own processes: what is said where one of two dies, and when they start again."""

import os
import sys

import pytest
from processes import on_two
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException


def dies(rank, folder, times):
    """Rank 1 is killed by a signal the first times."""
    print(f"here is rank {rank}", file=sys.stderr)
    deaths = len([*folder.iterdir()])
    if rank == 1 and deaths < times:
        (folder / str(deaths)).touch()
        os.abort()
    return deaths if rank else None


def test_a_rank_that_is_killed_starts_once_more(tmp_path):
    with pytest.warns(UserWarning, match=r"process 1 terminated with signal SIGABRT; both start once more") as told:
        assert on_two(dies, tmp_path, 1) == [None, 1]
    assert "stderr of rank 1:\nhere is rank 1\nFatal Python error: Aborted" in str(told[0].message)


def test_a_rank_that_is_killed_twice(tmp_path):
    with pytest.raises(ProcessExitedException) as death, pytest.warns(UserWarning, match="once more"):
        on_two(dies, tmp_path, 2)
    assert "in dies" in "".join(death.value.__notes__)


def raises(rank):
    if rank == 1:
        raise ValueError("mine")


def test_an_exception_is_not_tried_again():
    with pytest.raises(ProcessRaisedException, match="mine"):
        on_two(raises)
