"""parquet.py: one writer at a time."""

import os

import pytest
from datasets import Dataset
from parts.loading import FEATURES
from parts.parquet import write_parquet

from drift_peft.checkpoints import only_writer


def test_the_second_writer_is_told_of_the_first(tmp_path):
    turn = {"role": "user", "content": [{"type": "text", "text": "?"}]}
    rows = Dataset.from_list([{"messages": [turn], "images": []}], features=FEATURES)
    (tmp_path / "x.parquet.tmp").write_bytes(b"of the first")
    with only_writer(tmp_path / "x.parquet"), pytest.raises(FileExistsError, match="is being written by process"):
        write_parquet(rows, tmp_path / "x.parquet")
    assert (tmp_path / "x.parquet.tmp").read_bytes() == b"of the first"
    assert write_parquet(rows, tmp_path / "x.parquet") == 1 and os.listdir(tmp_path) == ["x.parquet"]
