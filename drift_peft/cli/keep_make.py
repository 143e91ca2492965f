"""drift-peft keep make: a VLM and unlabelled images -> keep set."""

from __future__ import annotations

from .keys import key_of
from .parser import Parser, file_such_as

HELP = "a VLM and unlabelled images -> keep set"
DESCRIPTION = "Have a VLM answer questions about images that nobody has labelled, and keep what it says."
EXAMPLE = r"""drift-peft keep make --base Qwen/Qwen2.5-VL-7B-Instruct --images pictures/ \
  -o keep.safetensors --load-in-4bit"""


def flags(parser: Parser) -> None:
    add = parser.add_argument
    add("--base", required=True, help="vision-language model: folder, hub id or id@revision")
    add("--images", required=True, help="folder of pictures, hub data set, or training data (.jsonl, .json, .parquet)")
    add(
        "-o",
        "--output",
        required=True,
        type=file_such_as("keep.safetensors"),
        help="file to write, such as keep.safetensors",
    )
    add(
        "--questions",
        metavar="FILE",
        help="your own questions, a kind, a tab and a question a line (default: built in)",
    )
    add("--samples", type=int, default=300, metavar="N", help="how many answers")
    add("--max-new-tokens", type=int, default=64, metavar="N", help="an answer is cut there")
    add("--top-k", type=int, default=32, metavar="K", help="log probabilities of each token")
    add("--load-in-4bit", action="store_true", help="load the model in NF4")
    parser.add_processor_kwargs()
    add("--batch-size", type=int, default=8, metavar="N", help="questions at a time")
    add("--seed", type=int, default=0, help="seed of the choice of images")
    add("--server", metavar="URL", help="ask there, such as http://localhost:8000/v1 of vLLM; it must know --base")
    add("--api-key-env", metavar="NAME", help="environment variable that holds the server's key")
    add("--overwrite", action="store_true", help="replace an existing output, or an interrupted run of other settings")
    parser.add_json()


def run(base: str, api_key_env: str | None, as_json: bool, **settings) -> None:
    api_key = key_of(api_key_env)
    from ..keeping import keep_summary, keep_table, make_keep_set
    from .show import show

    summary = keep_summary(make_keep_set(base, api_key=api_key, **settings))
    show(summary, as_json, keep_table(summary))
