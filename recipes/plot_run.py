"""Draw how a run went: loss, and where the adapter stands against the prior.

    python recipes/plot_run.py runs/qwen2_5_vl_7b_r1/run.json telemetry.png

sft_vlm.py draws the same into its output_dir. What was not logged is left out.
"""

from __future__ import annotations

from drift_peft.cli.interrupt import begin

if __name__ == "__main__":  # before what takes its time to import
    begin("plot_run.py")

import json
from pathlib import Path

from parts.command_line import Parser, in_one_sentence, run_script
from parts.curves import plot_run


def main(arguments: list[str] | None = None) -> None:
    parser = Parser("plot_run.py", __doc__)
    parser.add_argument("run", type=Path, help="run.json that sft_vlm.py left in its output_dir")
    parser.add_argument("picture", type=Path, help="file to write, such as telemetry.png or telemetry.svg")
    args = parser.parse_args(arguments)
    with in_one_sentence("plot_run.py", ValueError, OSError):
        plot_run(read_history(args.run), args.picture)


def read_history(run: Path) -> list[dict]:
    try:
        content = json.loads(run.read_text(encoding="utf-8"))
    except OSError as error:
        way_out = "name the run.json that sft_vlm.py left in its output_dir"
        raise type(error)(f"{run} cannot be read ({error.strerror}): {way_out}") from error
    except ValueError as error:
        raise ValueError(f"{run} is no JSON ({error}): name the run.json of a run") from error
    if not isinstance(content, dict) or "history" not in content:
        raise ValueError(f"{run} has no history: name the run.json of a run that sft_vlm.py has finished")
    return content["history"]


if __name__ == "__main__":
    run_script("plot_run.py", main)
