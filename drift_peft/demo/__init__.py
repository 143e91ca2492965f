"""The embedded world: DRIFT on visual arithmetic over real handwritten digits, in minutes on a CPU."""

from .compare import METHODS, run, study

__all__ = ["METHODS", "run", "study"]
