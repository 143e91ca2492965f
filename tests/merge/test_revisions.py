"""A model on the hub is one at its commit: what is written names it, and what is compared knows it by any spelling."""

import pytest
from hub import Hub
from huggingface_hub import snapshot_download
from peft import LoraConfig
from tiny import save_layout, tiny_expert, tiny_vlm

from drift_peft import transplant
from drift_peft.checkpoints import export_for_vllm


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    vlm = tiny_vlm("llava")
    save_layout(vlm, folder / "vlm")
    save_layout(tiny_expert("llava", vlm)[0], folder / "expert")
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with Hub() as hub:
        hub.use(monkeypatch, tmp_path / "cache")
        yield hub


@pytest.mark.parametrize("spelling", ["revision", "snapshot"])
def test_the_card_of_an_adapter_names_the_commit(folders, hub, tmp_path, spelling):
    commit = hub.add("org/vlm", folders / "vlm", "v1")
    hub.add("org/vlm", {"config.json": b"{}"})
    base = "org/vlm@v1" if spelling == "revision" else snapshot_download("org/vlm", revision="v1")
    transplant(folders / "expert", base, tmp_path / "out", rank=2, progress=False)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    python = f'from_pretrained("org/vlm", revision="{commit}"'
    assert card.count(python) == 2 and card.count('from_pretrained("org/vlm"') == 2
    assert f"vllm serve org/vlm --revision {commit} --enable-lora" in card
    assert f"drift-peft merge --base org/vlm@{commit} --adapter" in card
    assert "base_model: org/vlm\n" in card and str(tmp_path) not in card


def test_the_export_reads_the_config_at_the_commit(folders, hub, tmp_path):
    commit = hub.add("org/vlm", folders / "vlm", "v1")
    hub.add("org/vlm", {"config.json": b"{}"})
    transplant(folders / "expert", "org/vlm@v1", tmp_path / "out", rank=2, progress=False)
    assert LoraConfig.from_pretrained(tmp_path / "out").revision == commit
    assert export_for_vllm(tmp_path / "out", tmp_path / "served").modules == 14
