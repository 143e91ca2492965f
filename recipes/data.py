"""Images and conversations, from the hub or from files, as TRL takes them; what cannot be used is dropped and counted.

    python recipes/data.py ChaoHuangCS/DRIFT-TL-Distill-4K -o train.parquet
    python recipes/data.py chains.jsonl --images pictures --boxed -o train.parquet

The published set of the paper (arXiv 2510.15050: about 4,000 verified chains of thought) has, by its card and by the
reference code, `messages` with role and content, and `images`, which are paths; code that reads it takes them to start
outside of the set (../DRIFT-TL-Distill-4K/…). Its rows could not be looked at here, so what a sample holds is read off
its own keys (parts/layouts.py), and the table says which layout was found.

Result: the columns `messages` and `images`, which TRL's SFTTrainer and DataCollatorForVisionLanguageModeling take as
they are: a list of {"role", "content": [{"type": "image" or "text", "text"}]}, and as many RGB images as there are
image parts, decoded when they are read. (In Arrow an image part has a `text` too, which is None; the collator puts the
image beside it.) Tags such as <think> stay plain text.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Literal

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.table import embed_table_storage, table_cast
from parts.answers import extract_boxed
from parts.images import read_image
from parts.layouts import BadSample, last_answer, read_sample
from parts.sources import find_files, read_file, samples
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

TEXT = datasets.Value("string")
FEATURES = datasets.Features(
    {
        "messages": [{"role": TEXT, "content": [{"type": TEXT, "text": TEXT}]}],
        "images": [datasets.Image(mode="RGB")],
    }
)


class Dropped(Counter):
    """Reason -> dropped samples. A sample counts once, however often it is read.

    Attributes:
        sentences: what is wrong with each -> its reason.
        layouts: the layouts of the others.
    """

    def __init__(self):
        super().__init__()
        self.sentences: dict[str, str] = {}
        self.layouts: set[str] = set()

    def add(self, error: BadSample) -> None:
        if str(error) not in self.sentences:
            self.sentences[str(error)] = error.reason
            self[error.reason] += 1

    def first(self) -> dict[str, str]:
        """Reason -> what is wrong with the first of its samples."""
        return {reason: sentence for sentence, reason in reversed(self.sentences.items())}


def load_messages(
    source: str | Path,
    *,
    split: str = "train",
    images: str | Path | None = None,
    streaming: bool = False,
    on_bad: Literal["drop", "fail"] = "drop",
    boxed: bool = False,
) -> tuple[datasets.Dataset | datasets.IterableDataset, Dropped]:
    r"""The usable samples of a source, and what was dropped.

    Args:
        source: hub id or id@revision of a data set, a .json, .jsonl or .parquet file, or a folder of these.
        split: of a hub id or a folder.
        images: folder that relative image paths start from; by default that of the source.
        streaming: read samples when they are asked for, and download nothing first. What is dropped is then counted
            meanwhile, in the process that iterates.
        on_bad: "fail" raises at the first sample that cannot be used.
        boxed: drop samples whose last answer has no \boxed{…}.

    Raises:
        BadSample: with on_bad="fail", or if none is left.
        ValueError: the source cannot be read, or lacks the split.
    """
    files, root = find_files(str(source), split, images, streaming)
    dropped = Dropped()

    def keep(table: pa.Table, indices: list[int], file: str) -> pa.Table:
        columns = {name: [] for name in FEATURES}
        for number, sample in samples(table, indices, file):
            try:
                messages, values, layout = read_sample(sample)
                if boxed and not extract_boxed(last_answer(messages)):
                    raise BadSample("answer without a box", r"has no \boxed{…} in its answer")
                columns["images"].append([read_image(value, root) for value in values])
            except BadSample as error:
                named = BadSample(error.reason, f"sample {number} of {file.removeprefix('hf://datasets/')} {error}")
                if on_bad == "fail":
                    raise named from error
                dropped.add(named)
            else:
                columns["messages"].append(messages)
                dropped.layouts.add(layout)
        return pa.Table.from_pydict(FEATURES.encode_batch(columns), schema=FEATURES.arrow_schema)

    parts = []
    for file in files:
        rows = read_file(file, streaming)
        options = dict(with_indices=True, batched=True, batch_size=32, fn_kwargs={"file": file})
        if streaming:  # features=FEATURES would leave the images undecoded for a filter or map of the stream
            parts.append(rows.map(keep, **options).with_format(None).cast(FEATURES))
        else:  # not from the cache of datasets, which cannot know that an image has changed
            kept = rows.map(keep, features=FEATURES, load_from_cache_file=False, **options)
            parts.append(kept.with_format(None))
    dataset = datasets.concatenate_datasets(parts)
    if not streaming and not len(dataset):
        raise nothing_left(source, dropped)
    return dataset, dropped


def within_length(dataset, processor, max_tokens: int, *, on_long: Literal["drop", "fail"] = "drop", dropped: Counter):
    """The conversations of at most max_tokens tokens, those of their images included. None is ever cut.

    Each is processed as TRL's collator does it, so this takes as long as an epoch of loading.

    Args:
        dropped: gets how many others there are, under "longer than <max_tokens> tokens", or "refused by the processor",
            which would stop the training too.

    Raises:
        BadSample: with on_long="fail", or if none is left.
    """
    bad: dict[int, BadSample] = {}  # a stream may be read again

    def fits(sample: dict, index: int) -> bool:
        try:
            length = count_tokens(sample["messages"], sample["images"], processor)
        except Exception as error:  # of any kind: each processor has its own
            said = " ".join(str(error).split())
            problem = BadSample("refused by the processor", f"sample {index + 1} is refused by the processor: {said}")
        else:
            if length <= max_tokens:
                return True
            problem = BadSample(
                f"longer than {max_tokens} tokens",
                f"sample {index + 1} has {length} tokens, its images' included, and {max_tokens} are allowed: allow "
                "more, make the images smaller, or drop such samples",
            )
        if on_long == "fail":
            raise problem
        if index not in bad:
            bad[index] = problem
            dropped[problem.reason] += 1
        return False

    if isinstance(dataset, datasets.IterableDataset):
        return dataset.filter(fits, with_indices=True)
    kept = [i for i, sample in enumerate(tqdm(dataset, desc="counting tokens", disable=None)) if fits(sample, i)]
    if not kept:
        raise bad[0]
    return dataset.select(kept)


def count_tokens(messages: list[dict], images: list, processor) -> int:
    """Tokens of a conversation as TRL's collator makes them."""
    from trl.data_utils import prepare_multimodal_messages  # which takes ten times as long to import as the rest here

    filled = prepare_multimodal_messages(messages, images=images)
    return len(processor.apply_chat_template([filled], tokenize=True, return_dict=True)["input_ids"][0])


def write_parquet(dataset, output: Path) -> int:
    """Write messages and images, whose bytes are put in, as one file, which is there when it is complete.

    Returns:
        its rows; a file of none is not written.
    """
    unfinished, rows = output.with_name(f"{output.name}.tmp"), 0
    try:
        with pq.ParquetWriter(unfinished, FEATURES.arrow_schema) as writer:
            for batch in dataset.with_format("arrow").iter(batch_size=64):
                writer.write_table(embed_table_storage(table_cast(batch, FEATURES.arrow_schema)))
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


def nothing_left(source: str | Path, dropped: Dropped) -> BadSample:
    reasons = [f"{dropped[reason]} {reason} ({sentence})" for reason, sentence in dropped.first().items()]
    return BadSample("none left", f"no sample of {source} is left: {'; '.join(reasons) or 'it has none'}")


def counts_table(title: str, kept: int, dropped: Dropped) -> Table:
    """What was kept and dropped, with the first sample of each reason."""
    table = Table("samples", "number", "the first", title=title)
    table.add_row("kept", str(kept), "; ".join(sorted(dropped.layouts)))
    for reason, sentence in dropped.first().items():
        table.add_row(reason, str(dropped[reason]), sentence)
    return table


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", help="hub id, id@revision, .json, .jsonl or .parquet file, or a folder of these")
    parser.add_argument("-o", "--output", type=Path, required=True, help="file to write, such as train.parquet")
    parser.add_argument("--split", default="train", help="of a hub id or a folder")
    parser.add_argument("--images", type=Path, help="folder that relative image paths start from")
    parser.add_argument("--boxed", action="store_true", help=r"drop answers without a \boxed{…}")
    parser.add_argument("--streaming", action="store_true", help="read a hub data set without downloading it first")
    parser.add_argument(
        "--on-bad", choices=["drop", "fail"], default="drop", help="stop at the first bad sample instead"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")
    options = vars(parser.parse_args(arguments))
    output, as_json, overwrite = (options.pop(name) for name in ("output", "json", "overwrite"))
    try:
        refuse_output(output, overwrite)
        dataset, dropped = load_messages(**options)
        kept = write_parquet(dataset, output)
        if not kept:
            raise nothing_left(options["source"], dropped)
    except (ValueError, OSError) as error:
        parser.exit(1, f"data.py: error: {error}\n")
    if as_json:
        counts = {"kept": kept, "dropped": dict(dropped), "layouts": sorted(dropped.layouts), "first": dropped.first()}
        print(json.dumps({"source": options["source"], "output": str(output), **counts}))
    else:
        Console().print(counts_table(f"{options['source']} -> {output}", kept, dropped))


if __name__ == "__main__":
    main(sys.argv[1:])
