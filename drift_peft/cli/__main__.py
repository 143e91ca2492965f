"""``python -m drift_peft.cli``: the command line."""

import sys

from . import main

sys.exit(main())
