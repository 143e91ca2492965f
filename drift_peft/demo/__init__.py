"""The embedded world: DRIFT on visual arithmetic over real handwritten digits, in minutes on a CPU.

world       the samples: rows of digits, questions, answers
evaluate    questions put to a model, and its answers marked
train       what a user does with a 7B pair, on the small one
figures     the pictures of a run
compare     every method once, in one table
tune        learning rates, chosen on validation digits
make_world  how the three checkpoints in checkpoints/ were made
"""

from .compare import METHODS, run, study

__all__ = ["METHODS", "run", "study"]
