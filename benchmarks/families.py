"""Every image-text-to-text type of the installed transformers, the whole way with tiny models and a known Δ.

python benchmarks/families.py [TYPE ...]

Of each type: a prior of full rank from text expert and VLM is Δ; exactly the language model's projections are adapted;
two steps move each of them; stock PEFT loads the adapter; it is merged into the base, verified, and computes the same;
`targets` names the same modules. A type is refused if one sentence says why before anything is written.
"""

import argparse
import inspect
import json
import logging
import re
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path

import torch
import transformers
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForImageTextToText
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from every_type import TYPES, tiny_base, tiny_text_expert

from drift_peft import DriftConfig, build_prior, merge_adapter
from drift_peft.checkpoints import Checkpoint
from drift_peft.tuner import targets_summary

WORKS, REFUSED, FAILS, NOT_BUILT = "works", "refused", "FAILS", "not built here"
IDS = torch.arange(8, 28).reshape(2, 10)
PICTURES = {"pixel_values": torch.zeros(2, 1, 3, 16, 16), "image_attention_mask": torch.ones(2, 10, 1)}
BESIDE = {"idefics": PICTURES, "t5gemma2": {"decoder_input_ids": IDS}}
DRAW = ("diffusion_gemma",)  # their logits are of tokens that they draw
UNSPEAKABLE = TypeError, ValueError, AttributeError  # what a model raises that does not answer text alone


class Failure(Exception):
    """Something on the way is not as it should be."""


def take(model_type: str, folder: Path) -> dict:
    """One type's way. Returns its `result`, `steered` modules, and `said`: what is left out, or why it is refused."""
    try:
        base = tiny_base(model_type)
        expert, delta = tiny_text_expert(base)
        base.save_pretrained(folder / "base")
        if not torch.allclose(_quietly(_load(folder / "base")), _quietly(base), atol=1e-5):
            raise Failure("transformers does not load what it has saved of this type")
        expert.save_pretrained(folder / "expert")
    except Exception as error:
        return {"result": NOT_BUILT, "steered": 0, "said": _sentence(error)}
    del base
    expert_class = type(expert).__name__
    del expert
    told = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            steered, unverified = _whole_way(folder, delta)
        words = [unverified, *(str(w.message) for w in caught)]
        told = [each for each in words if re.match("not steered|.* cannot be adapted|.* merge without verify", each)]
    except ValueError as error:
        ours = "drift_peft" in traceback.extract_tb(error.__traceback__)[-1].filename
        if not ours or len(str(error).splitlines()) > 1 or any(folder.glob("*.partial")):
            return {"result": FAILS, "steered": 0, "said": _sentence(error), "expert": expert_class}
        return {"result": REFUSED, "steered": 0, "said": str(error).replace(f"{folder}/", ""), "expert": expert_class}
    except Exception as error:
        return {
            "result": FAILS,
            "steered": 0,
            "said": f"{type(error).__name__}: {_sentence(error)}",
            "expert": expert_class,
        }
    return {"result": WORKS, "steered": steered, "said": "; ".join(dict.fromkeys(told)), "expert": expert_class}


def _whole_way(folder: Path, delta: dict[str, torch.Tensor]) -> tuple[int, str]:
    """Number of steered modules, and why the merge could not be verified."""
    prior = build_prior(folder / "expert", folder / "base", folder / "prior.safetensors", rank=256, progress=False)
    if prior.keys() != delta.keys():
        raise Failure(f"the prior has {sorted(prior.keys() ^ delta.keys())[:4]} too much or too little")
    for name, weight in prior.items():
        found = weight.U.float() * weight.S @ weight.Vh.float()
        if (found - delta[name]).norm() > 0.01 * delta[name].norm():
            raise Failure(f"Δ of {name} is off by {(found - delta[name]).norm() / delta[name].norm():.0%}")

    config = DriftConfig(prior=folder / "prior.safetensors", r=4, lora_alpha=8)
    model = get_peft_model(_load(folder / "base"), config)
    layers = {name: m for name, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    steered = {s.name for layer in layers.values() for s in vars(layer).get("drift_peft", {}).values()}
    if len(steered) != len(layers) or not steered <= delta.keys():
        raise Failure(f"{len(layers)} modules are adapted, {len(steered)} of them steered")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(2):
        _loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    if still := [name for name, layer in layers.items() if not layer.lora_B["default"].weight.any()]:
        raise Failure(f"{len(still)} adapters did not move, such as {still[0]}")
    model.eval().save_pretrained(folder / "adapter")
    logits = _quietly(model)

    again = PeftModel.from_pretrained(_load(folder / "base"), folder / "adapter").eval()
    if not torch.allclose(_quietly(again), logits, rtol=1e-3, atol=1e-4):
        raise Failure("stock PEFT's logits are others")
    if {n for n, m in again.get_base_model().named_modules() if isinstance(m, LoraLayer)} != layers.keys():
        raise Failure("stock PEFT adapts other modules")
    unverified = ""
    try:
        merge_adapter(folder / "base", folder / "adapter", folder / "merged", verify=True, progress=False)
    except ValueError as error:
        if not str(error).endswith("merge without verify"):
            raise
        unverified = str(error)
        merge_adapter(folder / "base", folder / "adapter", folder / "merged", progress=False)
    if not torch.allclose(_quietly(_load(folder / "merged")), logits, rtol=1e-3, atol=1e-4):
        raise Failure("the merged folder's logits are others")
    rows = targets_summary(Checkpoint(folder / "base"), prior)["rows"]
    if sum(row["steered"] for row in rows) != len(layers):
        raise Failure("targets names other modules")
    return len(layers), unverified


def _load(folder: Path) -> torch.nn.Module:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def _loss(model: torch.nn.Module) -> torch.Tensor:
    """Of the text; where the model wants more beside it or is trained otherwise, one on its decoder's output."""
    try:
        loss = model(**_inputs(model), labels=IDS).loss
    except UNSPEAKABLE:
        loss = None
    return _logits(model).square().mean() if loss is None else loss


def _logits(model: torch.nn.Module) -> torch.Tensor:
    """Of the text, or else the decoder's output."""
    try:
        if model.config.model_type in DRAW:
            raise TypeError
        return model(**_inputs(model)).logits
    except UNSPEAKABLE:
        return _decoder(_plain(model))(input_ids=IDS)[0]


def _inputs(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The text, and beside it what the type cannot do without."""
    taken = inspect.signature(_plain(model).forward).parameters
    kinds = {name: torch.zeros_like(IDS) for name in ("token_type_ids", "mm_token_type_ids") if name in taken}
    return {"input_ids": IDS, **kinds, **BESIDE.get(model.config.model_type, {})}


@torch.no_grad()
def _quietly(model: torch.nn.Module) -> torch.Tensor:
    return _logits(model)


def _plain(model: torch.nn.Module) -> torch.nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _decoder(model: torch.nn.Module) -> torch.nn.Module:
    inner = model.get_decoder()
    return inner if inner is model or not hasattr(inner, "get_decoder") else _decoder(inner)


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("types", nargs="*", metavar="TYPE", help="default: all")
    args = parser.parse_args(argv)
    logging.disable(logging.WARNING)
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    table = Table(title=f"image-text-to-text types of transformers {transformers.__version__}", show_lines=False)
    for column in ("type", "text expert", "result", "steered", "left out, or why not"):
        table.add_column(column, justify="right" if column == "steered" else "left", overflow="fold")
    results = {}
    for model_type in args.types or TYPES:
        with tempfile.TemporaryDirectory() as folder:
            row = results[model_type] = take(model_type, Path(folder))
        table.add_row(model_type, row.get("expert", ""), row["result"], str(row["steered"] or ""), row["said"])
        print(f"{model_type}: {row['result']}", file=sys.stderr)
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    counts = Counter(row["result"] for row in results.values())
    print(json.dumps({"transformers": transformers.__version__, "types": len(results), **counts}))


if __name__ == "__main__":
    main()
