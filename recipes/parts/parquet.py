"""Messages and images, written as one file that stands alone."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow.parquet as pq
from datasets import Features
from datasets.table import embed_table_storage, table_cast

from .loading import FEATURES


def write_parquet(dataset, output: Path, features: Features = FEATURES) -> int:
    """Write messages and images, whose bytes are put in, as one file, which is there when it is complete.

    Returns:
        its rows; a file of none is not written.

    Raises:
        FileExistsError: another process writes it.
    """
    from drift_peft.checkpoints import only_writer  # which takes ten times as long to import as the rest here

    unfinished, rows = output.with_name(f"{output.name}.tmp"), 0
    with only_writer(output):
        try:
            with pq.ParquetWriter(unfinished, features.arrow_schema) as writer:
                for batch in dataset.with_format("arrow").iter(batch_size=64):
                    writer.write_table(embed_table_storage(table_cast(batch, features.arrow_schema)))
                    rows += len(batch)
            if rows:
                os.replace(unfinished, output)
        finally:
            unfinished.unlink(missing_ok=True)
    return rows


def refuse_output(output: Path, overwrite: bool) -> None:
    """Raise ValueError if a result could not be written there in the end."""
    if output.suffix != ".parquet" or output.is_dir():
        raise ValueError(f"output {output} is no parquet file: name one, such as {output.with_suffix('.parquet')}")
    if not output.parent.is_dir():
        raise ValueError(f"output {output} cannot be written: there is no folder {output.parent}")
    if output.exists() and not overwrite:
        raise ValueError(f"output {output} exists: name another file, or pass --overwrite")
