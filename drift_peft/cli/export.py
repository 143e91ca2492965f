"""drift-peft export: an adapter in the form that a server takes."""

from __future__ import annotations

from dataclasses import asdict

from .parser import Parser

HELP = "an adapter under the names that a server finds its modules by"
DESCRIPTION = (
    "vLLM serves the base in silence where an adapter's names are not its own. This writes the adapter under vLLM's "
    "names, counts the modules, and refuses by name what vLLM does not serve; merge that."
)
EXAMPLE = "drift-peft export adapter --for vllm -o served"


def flags(parser: Parser) -> None:
    add = parser.add_argument
    add("adapter", metavar="ADAPTER", help="LoRA adapter: folder, hub id or id@revision")
    add("--for", dest="server", required=True, choices=("vllm",), help="who shall serve it")
    add("-o", "--output", required=True, help="folder to write")
    add("--base", help="where the base's config is now (default: the one that the adapter names)")
    add("--overwrite", action="store_true", help="replace an existing adapter folder")
    parser.add_json()


def run(adapter: str, server: str, output: str, base: str | None, overwrite: bool, as_json: bool) -> None:
    from ..checkpoints import export_for_vllm
    from .show import facts, show

    report = export_for_vllm(adapter, output, base, overwrite)
    rows = {
        "modules that it finds": report.modules,
        "under a name of its own": report.renamed,
        "serve with": f"--enable-lora --max-lora-rank {report.max_lora_rank} --lora-modules NAME={report.output}",
    }
    show(asdict(report), as_json, facts(f"adapter {report.output} for vLLM", rows))
