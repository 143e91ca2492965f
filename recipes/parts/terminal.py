"""Output that a terminal without Unicode can show: Δ becomes Delta, … three dots, instead of a UnicodeEncodeError."""

import codecs
import io
import sys

SIGNS = {
    "Δ": "Delta", "δ": "delta", "α": "alpha", "λ": "lambda", "µ": "u", "π": "pi", "σ": "sigma",
    "−": "-", "–": "-", "—": "-", "×": "x", "·": "*", "÷": "/", "±": "+-", "≈": "~", "≠": "!=", "≤": "<=", "≥": ">=",
    "→": "->", "‖": "||", "⟨": "<", "⟩": ">", "∞": "inf", "√": "sqrt", "²": "^2", "³": "^3", "°": " degrees",
    "…": "...", "“": '"', "”": '"', "‘": "'", "’": "'", "│": "|", "━": "-", "─": "-",
}  # fmt: skip


def readable_output() -> None:
    """Let stdout and stderr replace what their encoding does not have."""
    codecs.register_error("readable", _replace)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and not stream.encoding.lower().startswith("utf"):
            stream.reconfigure(errors="readable")


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(SIGNS.get(sign, "?") for sign in error.object[error.start : error.end]), error.end
