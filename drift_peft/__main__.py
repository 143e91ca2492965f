"""`python -m drift_peft`: the command line."""

import sys

from .cli import main

sys.exit(main())
