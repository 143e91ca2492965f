"""A tiny VLM whose training drift-peft preflight counts: the settings, and the memory."""

import pytest
from tiny import FAMILIES

from drift_peft.preflight.memory import Memory, Settings

TINY = FAMILIES["qwen2_5_vl"][0]
PART = "language model's projections, 4 bits"
slow = pytest.mark.slow


def settings(**changes):
    return Settings(**{"base": "tiny", "r": 16, "max_tokens": 512, "per_device_train_batch_size": 1, **changes})


@pytest.fixture(scope="module")
def memory():
    return Memory(TINY(), "tiny")
