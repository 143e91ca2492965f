"""A model on the hub is one at its commit: what is written names it, and what is compared knows it by any spelling."""

import shutil

import pytest
from huggingface_hub import snapshot_download
from peft import LoraConfig
from tiny import save_layout, tiny_expert, tiny_vlm

from drift_peft import merge_baseline, transplant
from drift_peft.checkpoints import export_for_vllm


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    vlm = tiny_vlm("llava")
    save_layout(vlm, folder / "vlm")
    save_layout(tiny_expert("llava", vlm)[0], folder / "expert")
    return folder


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


def by_its_snapshot(hub, folders, tmp_path, monkeypatch):
    hub.add("org/expert", folders / "expert")
    return "org/expert", snapshot_download("org/expert")


def the_snapshot_first(hub, folders, tmp_path, monkeypatch):
    return by_its_snapshot(hub, folders, tmp_path, monkeypatch)[::-1]


def by_its_commit(hub, folders, tmp_path, monkeypatch):
    commit = hub.add("org/expert", folders / "expert", "v1")
    hub.add("org/expert", {"config.json": b"{}"})
    return "org/expert@v1", f"org/expert@{commit}"


def from_another_folder(hub, folders, tmp_path, monkeypatch):
    monkeypatch.chdir(folders)
    return "expert", "../expert"


def by_a_link(hub, folders, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(folders / "expert")
    return folders / "expert", tmp_path / "link"


SPELLINGS = (by_its_snapshot, the_snapshot_first, by_its_commit, from_another_folder, by_a_link)


@pytest.mark.parametrize("spell", SPELLINGS, ids=lambda spell: spell.__name__)
def test_an_expert_is_merged_once_by_whatever_name(folders, hub, tmp_path, monkeypatch, spell):
    first, again = spell(hub, folders, tmp_path, monkeypatch)
    once, scaled = tmp_path / "once", {"scale": 0.5, "progress": False}
    merge_baseline("task_arithmetic", first, folders / "vlm", once, **scaled)
    (folders / "elsewhere").mkdir(exist_ok=True)
    monkeypatch.chdir(folders / "elsewhere")
    with pytest.raises(ValueError, match=r"once is .*expert.* already: merge into .*vlm at another scale"):
        merge_baseline("task_arithmetic", again, once, tmp_path / "twice", **scaled)
    other = shutil.copytree(folders / "expert", tmp_path / "expert")  # called so too, which is not looked into
    assert merge_baseline("task_arithmetic", other, once, tmp_path / "twice", **scaled).merged
