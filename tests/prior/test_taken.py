"""A prior that is there is taken for the same build alone, however near the other one is."""

import pytest
import torch
from interrupted_builds import build as build_of_shards
from interrupted_builds import save_pair
from known_delta import Q, build
from tiny import edit_tensors, save_layout, tiny_expert, tiny_vlm

from drift_peft.checkpoints import checkpoint
from drift_peft.prior import same

REFUSED = "p.safetensors exists and was built of other models than .*expert and .*vlm"
EVERY = ("attn", "mlp", "norm")


def move(folder, change):
    """The expert's W becomes change(W_base, W) in every weight of the text model."""
    base = tiny_vlm("llava").get_decoder().state_dict()

    def moved(held):
        for key in sorted(held):
            if (name := key.removeprefix("model.")) in base:
                held[key] = change(base[name], held[key])

    edit_tensors(folder / "expert", moved)


def by_steps(size, seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda base, W: base + size * torch.randn(W.shape, generator=generator)


@pytest.mark.parametrize("size", [1e-2, 1e-5])
def test_of_an_expert_as_near_in_other_directions(pair, tmp_path, size):
    move(tmp_path, by_steps(size, seed=1))
    built = build(tmp_path, modules=EVERY)
    assert build(tmp_path, modules=EVERY, exist_ok=True).sha256 == built.sha256
    move(tmp_path, by_steps(size, seed=2))
    with pytest.raises(FileExistsError, match=REFUSED):
        build(tmp_path, modules=EVERY, exist_ok=True)


@pytest.mark.parametrize("modules", ["attn", "norm"])
def test_of_the_opposite(pair, tmp_path, modules):
    """Each norm is the same."""
    move(tmp_path, by_steps(1e-3, seed=1))
    build(tmp_path, modules=modules)
    move(tmp_path, lambda base, W: 2 * base - W)
    with pytest.raises(FileExistsError, match=REFUSED):
        build(tmp_path, modules=modules, exist_ok=True)


def test_of_an_expert_that_differs_in_one_weight(pair, tmp_path):
    """Whichever it is, and whether or not it was steered."""
    base = tiny_vlm("llava").get_decoder().state_dict()
    alone = "layers.1.mlp.up_proj.weight"
    edit_tensors(tmp_path / "expert", lambda held: held[f"model.{alone}"].copy_(base[alone]))
    built = build(tmp_path)
    assert built.metadata["not_steered"] == [alone]
    weights = tmp_path / "expert" / "model.safetensors"
    before = weights.read_bytes()
    for name in [alone, *built][::3]:
        edit_tensors(tmp_path / "expert", lambda held, key=f"model.{name}": held[key][:2].add_(0.05))
        with pytest.raises(FileExistsError, match=REFUSED):
            build(tmp_path, exist_ok=True)
        weights.write_bytes(before)
        assert build(tmp_path, exist_ok=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("alone", ["layers.1.mlp.up_proj.weight", "norm.weight"])
def test_a_weight_that_rounding_alone_tells_apart(tmp_path, dtype, alone):
    """It is not in the prior, which is told from one where it was trained."""
    vlm = tiny_vlm("llava")
    text = dict(vlm.get_decoder().named_parameters())
    if alone == "norm.weight":
        text[alone].data.add_(0.1 * torch.randn(64, generator=torch.Generator().manual_seed(0)))
    expert, _ = tiny_expert("llava", vlm)
    dict(expert.get_decoder().named_parameters())[alone].data.copy_(text[alone].data)
    save_layout(vlm, tmp_path / "vlm")
    save_layout(expert.to(dtype), tmp_path / "expert")
    assert alone not in build(tmp_path, modules=EVERY)
    assert build(tmp_path, modules=EVERY, exist_ok=True)
    edit_tensors(tmp_path / "expert", lambda held: held[f"model.{alone}"].mul_(1.05))
    build(tmp_path, modules=EVERY, overwrite=True)
    untrained = text[alone].data.to(dtype)
    edit_tensors(tmp_path / "expert", lambda held: held[f"model.{alone}"].copy_(untrained))
    with pytest.raises(FileExistsError, match=REFUSED):
        build(tmp_path, modules=EVERY, exist_ok=True)


def test_each_shard_is_opened_as_seldom_as_in_a_build(tmp_path, monkeypatch):
    save_pair(tmp_path)
    opened, real = [], checkpoint.open_shard
    monkeypatch.setattr(checkpoint, "open_shard", lambda file: opened.append(file) or real(file))
    build_of_shards(tmp_path)
    in_build = len(opened)
    opened.clear()
    build_of_shards(tmp_path, exist_ok=True)
    assert len({*opened}) > 10 and len(opened) == in_build


def test_force_is_told_where_it_was_needed(pair, tmp_path):
    assert "force" not in build(tmp_path, force=True).metadata
    generator = torch.Generator().manual_seed(3)
    edit_tensors(tmp_path / "expert", lambda held: held[f"model.{Q}"].normal_(generator=generator))
    assert build(tmp_path, force=True, overwrite=True).metadata["force"] is True
    with pytest.raises(FileExistsError, match="was built with force=True, of models that have nothing in common"):
        build(tmp_path, exist_ok=True)
    assert build(tmp_path, force=True, exist_ok=True)


def test_of_the_same_commits_at_once(pair, hub, tmp_path, monkeypatch):
    for role in ("expert", "vlm"):
        hub.add(f"org/{role}", tmp_path / role)
    where = {"expert": "org/expert", "base": "org/vlm", "exist_ok": True}
    build(tmp_path, **where)
    monkeypatch.setattr(same, "measure_delta", None)
    build(tmp_path, **where)
