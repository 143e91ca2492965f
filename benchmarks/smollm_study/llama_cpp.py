"""A merged model through llama.cpp's converter, and back."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from drift_peft import ReasoningPrior, merge_adapter

from .abilities import PROMPTS
from .run import DEFAULTS, prior_of

HALF = 0.5  # of Δ's largest directions
PARTS = {"language model": (), "eyes": ("--mmproj",)}


@torch.no_grad()
def round_trip(folder: Path, llama_cpp: Path, console: Console) -> None:
    """The VLM with half of the prior as an adapter, merged; its language model as GGUF, read by transformers again.

    Args:
        folder: of `make_all`.
        llama_cpp: llama.cpp's repository; its converter wants `gguf` and `sentencepiece`.
        console: where the table is printed: tensors that differ, and the largest difference of log probabilities.

    Raises:
        RuntimeError: the converter failed, for the reason that it gives.
    """
    with tempfile.TemporaryDirectory() as home:
        prior, merged = ReasoningPrior.load(prior_of(folder, ancestor=True)), Path(home, "merged")
        adapter = prior.truncate(DEFAULTS["r"], Path(home, "prior.safetensors")).as_lora(HALF, Path(home, "adapter"))
        merge_adapter(folder / "vlm", adapter, merged, progress=False)
        parts = {name: Path(home, f"{name}.gguf") for name in PARTS}
        for name, file in parts.items():
            convert(merged, file, llama_cpp, PARTS[name])
        sizes = [f"{name}: {file.stat().st_size / 1e6:.1f} MB" for name, file in parts.items()]
        there = AutoModelForCausalLM.from_pretrained(home, gguf_file="language model.gguf", dtype=torch.float32)
        here = AutoModelForImageTextToText.from_pretrained(merged, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(merged)
    ours, theirs = (dict(model.named_parameters()) for model in (here.model.text_model, there.model))
    unequal = sum(not torch.equal(theirs[name], tensor) for name, tensor in ours.items())
    differences = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        one, other = (model(input_ids=ids).logits.log_softmax(-1) for model in (here, there))
        differences.append((one - other).abs().max().item())
    table = Table(title="A merged VLM through llama.cpp's converter, and its language model back in transformers")
    for head in ("written", "tensors", "unequal", "log probabilities differ by at most"):
        table.add_column(head)
    table.add_row("; ".join(sizes), f"{len(ours)} and {len(theirs)}", str(unequal), f"{max(differences):.1e}")
    console.print(table)


def convert(merged: Path, output: Path, llama_cpp: Path, options: tuple[str, ...]) -> None:
    """With the weights as they are, in bfloat16."""
    script = [sys.executable, str(llama_cpp / "convert_hf_to_gguf.py"), str(merged)]
    path = os.pathsep.join([str(llama_cpp / "gguf-py"), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [*script, "--outfile", str(output), "--outtype", "bf16", *options],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"llama.cpp's converter wrote no {output.name}: {done.stderr.strip().splitlines()[-1]}")
