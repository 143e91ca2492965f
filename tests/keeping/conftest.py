"""Tiny VLMs with processors, pictures to ask about, and keep sets of them."""

import pytest
from keep_sets import make, save_folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """`base`, `pictures` and `keep.safetensors` of one family."""
    folder = save_folder(tmp_path_factory.mktemp("keep"), "qwen2_5_vl")
    make(folder)
    return folder
