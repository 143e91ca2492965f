"""Terminals that are not UTF-8: Δ, × and their like in signs that they have."""

import codecs
import contextlib
import io
import locale
import logging
from typing import TextIO

SPELLED = {
    "Δ": "Delta", "δ": "delta", "Σ": "Sum", "Ω": "Omega", "α": "alpha", "γ": "gamma", "ε": "epsilon", "κ": "kappa",
    "λ": "lambda", "µ": "u", "θ": "theta", "π": "pi", "ρ": "rho", "σ": "sigma", "τ": "tau", "ᵢ": "_i", "ᵀ": "^T",
    "²": "^2", "³": "^3", "⁷": "^7", "\u0303": "~", "‖": "||", "·": "*", "×": "x", "÷": "/", "±": "+-", "−": "-",
    "–": "-", "—": "-", "≈": "~", "≠": "!=", "≥": ">=", "≤": "<=", "→": "->", "←": "<-", "⟨": "<", "⟩": ">", "∞": "inf",
    "√": "sqrt", "°": " degrees", "…": "...", "“": '"', "”": '"', "‘": "'", "’": "'", "│": "|", "━": "-", "─": "-",
    "∇": "grad ", "Ġ": "G", "▁": "_", "✓": "v", "✗": "x", "\ufffd": "?",
}  # fmt: skip


def spell_out(*streams: TextIO) -> None:
    """Make streams write what their encoding has no sign for in signs that it has, such as Delta for Δ."""
    codecs.register_error("spell_out", _spelled)
    for stream in streams:
        # What stands in for it in a notebook takes every sign, and so does UTF-8.
        if isinstance(stream, io.TextIOWrapper) and not stream.encoding.lower().startswith("utf"):
            stream.reconfigure(errors="spell_out")


def _spelled(error: UnicodeEncodeError) -> tuple[str | bytes, int]:
    sign = error.object[error.start]
    if "\udc80" <= sign <= "\udcff":  # a byte of an argument that Python could not read goes out as it came in
        return bytes([ord(sign) - 0xDC00]), error.start + 1
    return SPELLED.get(sign, "?"), error.start + 1


def hush() -> None:
    """Let these libraries log errors alone, as long as the command runs: while they are imported, they tell of kernels
    that this machine does not have."""
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def read_utf8() -> None:
    """Let libraries read their own files where the locale is ASCII, in whose encoding they would open them.

    torch does, in what hqq imports of it, and so cannot be imported there.
    """
    if codecs.lookup(locale.getpreferredencoding(False)).name == "ascii":
        with contextlib.suppress(locale.Error):  # there is no such locale
            locale.setlocale(locale.LC_CTYPE, "C.UTF-8")
