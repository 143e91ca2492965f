"""The command line. Results go to stdout, progress and errors to stderr; an error is one sentence, its status not 0.

Help and command lines that cannot be read cost no import of torch: what a verb needs of the library is imported where
it runs.

    commands        all verbs, in the order of the help
    parser          argparse, whose errors are one sentence with the nearest known name; the recipes have it too
    layers          what --only-layers takes
    keys            what --api-key-env names
    show            a result as tables or as JSON
    interrupt       Ctrl-C, wherever it falls
    uploading       what `prior push` and `keep push` have in common
    workers         processes that carry out a part of a command each
    terminal        terminals that are not UTF-8: Δ, × and their like in signs that they have
    prior           the verbs of priors
    prior_build     two checkpoints -> prior file
    prior_inspect   what a prior holds
    prior_combine   weighted sum of priors
    prior_truncate  the same prior at a lower rank
    prior_gate      the prior with each singular direction weighed
    prior_export    the prior itself as a LoRA adapter
    prior_push      upload to the hub, with a model card
    keep            the verbs of keep sets
    keep_make       a VLM and unlabelled images -> keep set
    keep_inspect    what a keep set holds
    keep_push       upload to the hub, with a card
    keep_samples    a keep set as ordinary training samples
    targets         what would be adapted and steered
    merge           adapter + full-precision base -> standalone model
    merge_baseline  expert + VLM -> VLM without training
    transplant      text fine-tune or LoRA adapter -> adapter of the VLM, or VLM, without training
    export          an adapter under the names that a server finds its modules by
    demo            the whole way on a small embedded world
    preflight       will training fit the GPU?
"""

from __future__ import annotations

import faulthandler
import sys
from collections.abc import Sequence

from ..builds import explained

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, that of the process if none is given; returns the exit status."""
    try:
        from .interrupt import ctrl_c_came, end_at_ctrl_c, raise_at_ctrl_c  # here, as all imports: Ctrl-C may come now

        if argv is None:
            end_at_ctrl_c("drift-peft: error: interrupted")
        from .commands import parser
        from .terminal import hush, read_utf8, spell_out

        spell_out(sys.stdout, sys.stderr)
        read_utf8()
        hush()
        if not faulthandler.is_enabled() and sys.__stderr__ is not None:
            faulthandler.enable(sys.__stderr__)  # so that a mapped file that is cut while it is read ends in words
        options = vars(parser().parse_args(argv))
        raise_at_ctrl_c()
        options.pop("run")(**options)
    except (Exception, KeyboardInterrupt) as error:
        interrupted = isinstance(error, KeyboardInterrupt) or ctrl_c_came()
        error = explained(error)
        if not interrupted and not isinstance(error, (ValueError, OSError, KeyError, ImportError)):
            raise
        message = error.args[0] if isinstance(error, KeyError) and error.args else str(error)
        if isinstance(error, KeyError) and " " not in str(message) and not interrupted:
            raise  # another library's, which is no sentence
        if interrupted and not (isinstance(error, KeyboardInterrupt) and message):
            message = "interrupted"
        from ..warn import visible

        sentence = "; ".join([str(message), *getattr(error, "__notes__", ())])
        print(f"drift-peft: error: {visible(sentence)}", file=sys.stderr)
        if not interrupted:
            return 1
        exec("")  # or Python ends by the signal, where it came while a string was executed, as dataclasses do on import
        return 130
    return 0
