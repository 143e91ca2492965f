"""A LLaVA and an expert whose Δ from it is known, and the prior that is built of them."""

import pytest
from tiny import save_layout, tiny_expert, tiny_vlm

from drift_peft.prior.build import build_prior

Q = "layers.0.self_attn.q_proj.weight"


@pytest.fixture
def pair(tmp_path):
    """Folders `vlm` and `expert` of a LLaVA, and Δ between them."""
    vlm = tiny_vlm("llava")
    expert, delta = tiny_expert("llava", vlm)
    save_layout(vlm, tmp_path / "vlm")
    save_layout(expert, tmp_path / "expert")
    return delta


def build(folder, **arguments):
    arguments = {"expert": folder / "expert", "base": folder / "vlm", "output": folder / "p.safetensors"} | arguments
    return build_prior(**arguments, progress=False)


def matrix(weight):
    return weight.U.float() * weight.S @ weight.Vh.float()
