"""drift-peft prior gate: the prior with each singular direction weighed."""

from __future__ import annotations

from typing import get_args

from ..choices import SAID_TOKENS, SAID_TOP_K, Objective
from .parser import Parser, file_such_as

HELP = "weigh each singular direction of a prior, without labels"
DESCRIPTION = (
    "Train one gate for each singular direction of a prior, so that VLM + gated Δ answers text as the expert does and "
    "images as the VLM does, and write the gated prior."
)
EXAMPLE = r"""drift-peft prior gate prior.safetensors --base Qwen/Qwen2.5-VL-7B-Instruct \
  --expert deepseek-ai/DeepSeek-R1-Distill-Qwen-7B --keep keep.safetensors \
  --texts prompts.txt -o gated.safetensors --load-in-4bit"""


def flags(parser: Parser) -> None:
    add = parser.add_argument
    add("prior", metavar="PRIOR", help="prior file, hub id or id@revision")
    add("--base", required=True, help="the VLM that it was built for: folder, hub id or id@revision")
    add("--expert", help="text-only model that answers --texts; none with --objective frism")
    add("--keep", required=True, metavar="KEEP_SET", help="keep set of the VLM: file or hub id")
    add("--texts", metavar="FILE", help="prompts in text, one a line; in a .jsonl file a string of JSON a line")
    add(
        "-o",
        "--output",
        required=True,
        type=file_such_as("gated.safetensors"),
        help="file to write, such as gated.safetensors",
    )
    add(
        "--objective",
        choices=get_args(Objective),
        default="expert",
        metavar="NAME",
        help="expert: near its answers in text; frism: as much of Δ as the keep set allows",
    )
    add("--keep-weight", type=float, help="of expert: the larger, the nearer to the VLM (default: 0.3)")
    add("--alpha", type=float, help="of frism: the larger, the more of Δ is taken (default: 1)")
    add("--steps", type=int, default=200, metavar="N", help="steps of Adam")
    add("--rate", type=float, default=0.1, help="its learning rate")
    add("--batch-size", type=int, default=8, metavar="N", help="answers a step, of each kind")
    add("--max-tokens", type=int, default=512, metavar="N", help="so many at a time")
    add(
        "--answers",
        type=file_such_as("answers.safetensors"),
        metavar="FILE",
        help="the expert's answers (default: beside the output); used if they are there",
    )
    add("--max-new-tokens", type=int, metavar="N", help=f"of expert: an answer is cut there (default: {SAID_TOKENS})")
    add("--top-k", type=int, metavar="K", help=f"of expert: log probabilities of each token (default: {SAID_TOP_K})")
    add("--load-in-4bit", action="store_true", help="load both models in NF4")
    add(
        "--no-gradient-checkpointing",
        dest="gradient_checkpointing",
        action="store_false",
        help="more memory, a quarter less time",
    )
    parser.add_processor_kwargs()
    add("--seed", type=int, default=0, help="seed of the order of the answers")
    add("--overwrite", action="store_true", help="replace an existing output")
    parser.add_json()


def run(prior: str, keep: str, as_json: bool, **settings) -> None:
    from ..merge import gate_prior
    from ..prior.report import prior_summary, prior_table
    from .show import show

    summary = prior_summary(gate_prior(prior, keep_set=keep, **settings))
    show(summary, as_json, prior_table(summary))
