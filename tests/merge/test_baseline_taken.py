"""A folder that merge_baseline wrote is taken for the same merge alone, however near the other one is."""

import shutil
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file
from trios import merge, save_trio, tensors

from drift_peft import merge_baseline
from drift_peft.checkpoints import Checkpoint, checkpoint


@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, 1e-3), (torch.float16, 1e-3), (torch.float32, 1e-4)])
def test_the_merge_of_a_near_expert_is_another(tmp_path, dtype, share):
    """As near to the base as reinforcement learning leaves an expert: by less than 16 bits round a weight's norm."""
    save_trio(tmp_path, "llama", dtype, shard="5GB")
    base, experts = tensors(tmp_path / "base"), []
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        near = {key: W * (1 + share * torch.randn(W.shape, generator=generator)) for key, W in base.items()}
        experts.append(shutil.copytree(tmp_path / "base", tmp_path / f"expert {seed}"))
        save_file({k: W.to(dtype) for k, W in near.items()}, experts[-1] / "model.safetensors", {"format": "pt"})
    here = {"base": tmp_path / "base", "output": tmp_path / "m", "scale": 0.5, "exist_ok": True, "progress": False}
    for _ in range(2):
        assert merge_baseline("task_arithmetic", experts[0], **here)
    with pytest.raises(FileExistsError, match=r"exists and holds another \S+ than this merge"):
        merge_baseline("task_arithmetic", experts[1], **here)


def test_one_weight_makes_another_merge(trio, tmp_path):
    """Whichever it is."""
    places = {
        "base": trio / "base",
        "output": merge(trio, scale=0.5).output,
        "scale": 0.5,
        "exist_ok": True,
        "progress": False,
    }
    changed = 0
    for file in (trio / "expert").glob("*.safetensors"):
        held = {name: tensor.clone() for name, tensor in load_file(file).items()}  # older safetensors map the file
        for key in [key for key in held if "layers" in key][:1]:
            W = held[key].clone()
            W.view(-1)[0] += 0.1
            save_file({**held, key: W}, file, {"format": "pt"})
            with pytest.raises(FileExistsError, match=f"exists and holds another {key} than this merge"):
                merge_baseline("task_arithmetic", trio / "expert", **places)
            changed += 1
        save_file(held, file, {"format": "pt"})
    assert changed > 3 and merge_baseline("task_arithmetic", trio / "expert", **places)


def test_each_shard_is_opened_once_beside_its_table_of_contents(trio, tmp_path, monkeypatch):
    """As in the merge itself, which does not read what it only copies."""
    opened, real = [], checkpoint.open_shard
    monkeypatch.setattr(checkpoint, "open_shard", lambda file: opened.append(file.parent.name) or real(file))
    places = {"output": tmp_path / "m", "scale": 0.5, "exist_ok": True, "progress": False}
    merge_baseline("task_arithmetic", trio / "expert", trio / "base", **places)
    in_merge = Counter(opened)
    opened.clear()
    merge_baseline("task_arithmetic", trio / "expert", trio / "base", **places)
    shards = len([*(trio / "base").glob("*.safetensors")])
    assert shards > 10 and Counter(opened) == {"base": 2 * shards, "m": 2 * shards, "expert": in_merge["expert"]}


def test_the_same_commits_are_not_merged_again(trio, hub, tmp_path, monkeypatch):
    for role in ("expert", "base"):
        hub.add(f"org/{role}", trio / role)
    places = {"output": tmp_path / "m", "scale": 0.5, "exist_ok": True, "progress": False}
    merge_baseline("task_arithmetic", "org/expert", "org/base", **places)
    read = []
    real = Checkpoint.tensor
    monkeypatch.setattr(Checkpoint, "tensor", lambda self, key: read.append(self.source) or real(self, key))
    merge_baseline("task_arithmetic", "org/expert", "org/base", **places)
    assert read.count("org/expert") == 3
    read.clear()
    others = {file.name: file.read_bytes() for file in (trio / "expert").iterdir()}
    hub.add("org/expert", {**others, "README.md": b"another commit"})
    merge_baseline("task_arithmetic", "org/expert", "org/base", **places)
    assert read.count("org/expert") == 19
