"""All verbs, in the order of the help."""

from .. import __version__
from . import demo, export, keep, merge, merge_baseline, preflight, prior, targets, transplant
from .parser import Parser, help_texts

VERBS = {
    "prior": prior,
    "keep": keep,
    "targets": targets,
    "merge": merge,
    "merge-baseline": merge_baseline,
    "transplant": transplant,
    "export": export,
    "demo": demo,
    "preflight": preflight,
}


def parser() -> Parser:
    """All verbs and their flags."""
    main = Parser(
        prog="drift-peft",
        **help_texts(
            "Priors of text-only reasoning models for vision-language models; adapters merged into their base.",
            "drift-peft demo",
        ),
    )
    main.add_argument(
        "--version", action="version", version=f"%(prog)s {__version__}", help="show the version and exit"
    )
    main.add_verbs(VERBS)
    return main
