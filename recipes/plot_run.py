"""How a run went, drawn from Trainer's log history: loss, and where the adapter stands against the prior.

python recipes/plot_run.py runs/x/run.json telemetry.png
"""

import json
import sys
from pathlib import Path

from parts.curves import plot_run

if __name__ == "__main__":
    run, picture = map(Path, sys.argv[1:])
    plot_run(json.loads(run.read_text(encoding="utf-8"))["history"], picture)
