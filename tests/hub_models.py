"""A text model in shards, a hub on this machine to put it on, and what a real client keeps of it in its cache."""

import pytest
from hub import Hub
from tiny import save_layout, tiny_llm

Q = "model.layers.0.self_attn.q_proj.weight"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with Hub() as hub:
        hub.use(monkeypatch, tmp_path / "cache")
        yield hub


@pytest.fixture
def llm(tmp_path):
    """A folder with a text model in several shards."""
    return save_layout(tiny_llm("llava"), tmp_path / "llm", max_shard_size="20KB")


def weights(names):
    return [name for name in names if name.endswith((".safetensors", ".bin"))]


def blobs(tmp_path):
    """Sizes of what the cache holds, by name."""
    return {path.name: path.stat().st_size for path in (tmp_path / "cache/hub").glob("models--*/blobs/*")}
