"""What tests of compare.py and its parts begin with: a recipe, and what a way has answered."""

import numpy as np
from parts.frontier import Measured

SETTINGS = {"base": "b", "data": "d", "prior": "p.safetensors", "expert": "e", "keep": "own", "output_dir": "o"}


def found(right, kl):
    return Measured(np.array(right, float), np.full(5, float(kl)), np.full(5, 1 - kl / 10), ["all"] * len(right))
