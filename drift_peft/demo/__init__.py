"""The embedded world: DRIFT on visual arithmetic over real handwritten digits, in minutes on a CPU.

world     the samples: rows of digits, questions, answers
evaluate  questions put to a model, and its answers marked
train     what a user does with a 7B pair, on the small one
figures   the pictures of a run
compare   every method once, in one table

benchmarks/make_world.py has made the three checkpoints, and tune_demo.py beside it has chosen the learning rates.
"""

from .compare import METHODS, run, study

__all__ = ["METHODS", "run", "study"]
