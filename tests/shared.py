"""What several test files share: tiny pairs of base and expert with their priors, one of them with a known Δ."""

import gc
import sys
from functools import cache

import jinja2
import pytest
import torch
from older import skip_what_loads_processors
from pairs import Pair, make_pair
from tiny import save_layout, tiny_llm

from drift_peft import build_prior
from drift_peft.checkpoints.naming import PROJECTIONS, module_kind


def pytest_collection_finish():
    if processes := sys.modules.get("processes"):
        processes.start_server()
    gc.freeze()  # what the imports have made: a Trainer collects garbage several times, and would look at all of it


jinja2.Template = cache(jinja2.Template)  # of the cards, which huggingface_hub would compile anew for every adapter
skip_what_loads_processors()


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """family -> folder with `base`, `expert` and `prior.safetensors`; made once."""
    return cache(lambda family: make_pair(tmp_path_factory.mktemp(family), family))


@pytest.fixture(scope="session")
def pair(tmp_path_factory) -> Pair:
    folder = tmp_path_factory.mktemp("pair")
    base, expert = tiny_llm("llava"), tiny_llm("llava")
    generator = torch.Generator().manual_seed(1)
    delta = {}
    for name, weight in expert.get_decoder().named_parameters():
        if module_kind(name) in PROJECTIONS:  # rank 6 and some noise, about a third of the weight's norm
            left, right = (torch.randn(n, 6, generator=generator) for n in weight.shape)
            noise = torch.randn(weight.shape, generator=generator)
            delta[name] = (0.12 * left @ right.T + 0.1 * noise) * weight.detach().std()
            weight.data += delta[name]
    save_layout(base, folder / "base")
    save_layout(expert, folder / "expert")
    for modules, file in ((("attn", "mlp"), "prior"), (("attn",), "attn")):
        output = folder / f"{file}.safetensors"
        build_prior(folder / "expert", folder / "base", output, rank=8, modules=modules, progress=False)
    return Pair(folder, base, delta)
