"""recipes/sft_vlm.py: what its training step computes, and the card that it pushes."""

import json

import pytest
import torch
from recipe_runs import FAST
from tiny_vlm import PROCESSORS

from drift_peft import KeepSet

pytestmark = pytest.mark.filterwarnings(
    "ignore:Switched off bitsandbytes", "ignore:.*gradient_checkpointing.*:FutureWarning"
)


def backward(trainer, batch):
    """Gradients of the adapter, and where else the backward pass ends: the tensors that are no parameters."""
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model.train(), dict(batch))
    nodes, ends = [loss.grad_fn], {}
    seen = set(nodes)
    for node in nodes:
        if hasattr(node, "variable") and not isinstance(node.variable, torch.nn.Parameter):
            ends[id(node.variable)] = node.variable
        following = {n for n, _ in node.next_functions if n is not None} - seen
        seen |= following
        nodes += following
    loss.backward()
    return {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}, list(ends.values())


@pytest.mark.parametrize("family", PROCESSORS)
def test_the_frozen_tower_takes_no_part_in_the_backward_pass(family, train):
    trainer, _ = train(family, **{**FAST, "max_steps": 1, "gradient_accumulation_steps": 1})
    batch = next(iter(trainer.get_train_dataloader()))
    tower = trainer.model.get_base_model().get_encoder("image")
    gradients, ends = backward(trainer, batch)
    assert gradients and all("lora_" in name for name in gradients)
    (embedded,) = ends  # of the tokens, where transformers lets the language model's checkpoints begin
    assert embedded.shape[:2] == batch["input_ids"].shape

    del tower.forward  # as transformers has it: the patches' embeddings are another end, where there is a hook on them
    other, ends = backward(trainer, batch)
    assert len(ends) == 1 + any(module._forward_hooks for module in tower.modules())
    assert gradients.keys() == other.keys() and all(torch.equal(gradients[name], other[name]) for name in other)


def test_the_card_that_is_pushed_has_ours_in_it(train):
    """push_to_hub saves into output_dir, and then writes TRL's card there."""
    trainer, output = train(**FAST)
    trainer.save_model(_internal_call=True)
    trainer.create_model_card(model_name="mine")
    card = (output / "README.md").read_text(encoding="utf-8")
    assert card.count("<!-- drift_peft: ") == 1 and "| guided optimizer steps | 2 |" in card and "TRL" in card


def test_the_base_is_kept_near_its_own_answers(train, pair, tmp_path):
    """The keep set is made by the first run, of the data's images, and serves the next one."""
    place = tmp_path / "kept" / "keep.safetensors"
    trainer, output = train(**FAST, keep=place)
    made = place.read_bytes()
    keep_set = KeepSet.load(place)
    record = json.loads((output / "run.json").read_text())
    assert record["keep"] == {"sha256": keep_set.sha256, "samples": 4}
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 2 and all("drift/keep_kl" in log and "drift/alignment" in log for log in logs)
    assert record["results"]["keep_ratio"] >= 0
    train(**FAST, keep=place, output_dir=tmp_path / "again")
    assert place.read_bytes() == made


def test_a_keep_set_of_text_alone_asks_for_pictures_before_anything_is_loaded(train, texts, tmp_path):
    with pytest.raises(
        SystemExit, match=r"no keep set .*k.safetensors, and .*data.jsonl has no images to make it of: "
    ):
        train(**FAST, data=texts, keep=tmp_path / "k.safetensors")
    assert not (tmp_path / "run").exists() and not (tmp_path / "k.safetensors").exists()
