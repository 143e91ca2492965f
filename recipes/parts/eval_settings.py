"""The base that reproduce_drift.sh asks beside what it trains, and VLMEvalKit's settings for models of its kind."""

from __future__ import annotations

from pathlib import Path

from drift_peft.preflight import base_config

EVAL = Path(__file__).parents[1] / "eval"
SETTINGS = {"qwen2_vl": "vlmevalkit_qwen2_5_vl.json", "qwen2_5_vl": "vlmevalkit_qwen2_5_vl.json"}
SETTINGS |= {"qwen3_vl": "vlmevalkit_qwen3_vl.json"}


def asked(base: str) -> tuple[Path, str, str]:
    """The settings' file, the kind as lmms-eval calls it, and the base; whole, as VLMEvalKit runs in another folder."""
    if Path(base).exists():
        base = str(Path(base).resolve())
    elif "@" in base:
        raise ValueError(f"VLMEvalKit takes no revision, as of base {base}: download it, and name its folder")
    kind = base_config(base).model_type
    if kind not in SETTINGS:
        raise ValueError(
            f"recipes/eval has settings of VLMEvalKit for {', '.join(SETTINGS)}, and base {base} is {kind}: leave "
            "out VLMEVALKIT, and ask the models as recipes/EVALUATION.md says"
        )
    return EVAL / SETTINGS[kind], kind, base
