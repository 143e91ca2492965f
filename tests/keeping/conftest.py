"""Tiny VLMs with processors, pictures to ask about, and keep sets of them."""

import pytest
from keep_sets import make, save_folder
from kept_models import adapted, processor_of


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """`base`, `pictures` and `keep.safetensors` of one family."""
    folder = save_folder(tmp_path_factory.mktemp("keep"), "qwen2_5_vl")
    make(folder)
    return folder


@pytest.fixture(scope="module")
def processor(folder):
    return processor_of(folder)


@pytest.fixture(scope="module")
def model(folder):
    return adapted(folder)
