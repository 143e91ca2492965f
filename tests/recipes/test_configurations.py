"""Every configuration of recipes/configs runs on a tiny pair of its real classes."""

import json

import bitsandbytes as bnb
import pytest
import torch
import yaml
from PIL import Image
from recipe_runs import CONFIGS, FAMILY, SIZES, SMALL
from safetensors.torch import load_file
from tiny import tiny_llm
from tiny_vlm import PROCESSORS

from drift_peft import DriftConfig, ReasoningPrior
from drift_peft.checkpoints.naming import PROJECTIONS, canonical_name, module_kind

pytestmark = pytest.mark.filterwarnings(
    "ignore:Switched off bitsandbytes", "ignore:.*gradient_checkpointing.*:FutureWarning"
)

COUNT = {"qwen3_5": 15, "gemma4": 32, "lfm2_vl": 12}  # projections of the tiny models; of all others' two layers, 14


# Of which `train` has its own. All else decides how a family is trained: where it is the same, one run shows it.
PLACES = {"base", "expert", "reference", "prior", "data", "keep", "output_dir"}


def what_decides(name):
    settings = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    return json.dumps([FAMILY[name], {key: value for key, value in settings.items() if key not in PLACES}])


TRAINED = [name for i, name in enumerate(FAMILY) if what_decides(name) not in map(what_decides, [*FAMILY][:i])]


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


def no_tower_in_the_backward_pass(trainer):
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


def test_there_is_a_family_for_every_configuration():
    assert {file.stem for file in CONFIGS.glob("*.yaml")} == set(FAMILY)
    assert set(FAMILY.values()) == set(PROCESSORS)


@pytest.mark.parametrize("name", FAMILY)
def test_a_configuration_says_how_to_launch_it_what_it_needs_and_where_it_comes_from(name):
    head = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").partition("\nbase:")[0]
    assert f"python recipes/sft_vlm.py --config recipes/configs/{name}.yaml\n" in head
    assert "# expected memory: " in head and "# source: " in head
    settings = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    assert settings["prior"] == f"priors/{name}.safetensors" and settings["output_dir"] == f"runs/{name}"


def test_what_is_not_trained_is_another_in_all_but_its_places():
    assert {*FAMILY} - {*TRAINED} == {"qwen2_5_vl_7b_math", "qwen3_vl_8b_thinking", "qwen3_5_9b_opus"}


@pytest.mark.parametrize("name", TRAINED)
def test_a_configuration_trains_every_projection_of_its_language_model_in_4_bit(name, train, pair):
    draws = name == "qwen2_5_vl_7b_r1"
    trainer, output = train(FAMILY[name], CONFIGS / f"{name}.yaml", draws, **SMALL, **SIZES.get(name, {}))

    # matched == expected > 0, and nothing else is quantized or adapted
    weights_of_expert = tiny_llm(FAMILY[name]).get_decoder().named_parameters()
    expected = {name for name, p in weights_of_expert if module_kind(name) in PROJECTIONS and p.dim() == 2}
    count = COUNT.get(FAMILY[name], 14)
    assert len(expected) == count and set(ReasoningPrior.load(pair(FAMILY[name]) / "prior.safetensors")) == expected
    four_bit = {
        canonical_name(f"{n}.weight") for n, m in trainer.model.named_modules() if isinstance(m, bnb.nn.Linear4bit)
    }
    saved = load_file(output / "adapter_model.safetensors")
    adapted = {canonical_name(key.replace(".lora_B", "")) for key in saved if ".lora_B" in key}
    assert four_bit == adapted == expected
    towers = [p for n, p in trainer.model.named_parameters() if canonical_name(n) is None and "lora_" not in n]
    assert towers and {p.dtype for p in towers} == {torch.bfloat16}

    moved = [key for key, weight in saved.items() if ".lora_B" in key and weight.any()]
    assert len(moved) == count
    run = json.loads((output / "run.json").read_text(encoding="utf-8"))
    assert run["results"]["guided_steps"] == run["results"]["steps"] == 2
    assert (
        run["settings"]["drift_alpha"] == DriftConfig(prior="p").drift_alpha == 0.3
        and run["settings"]["learning_rate"] == 1e-4
    )
    assert run["data"]["samples"] == 8 and run["data"]["dropped"] == {}
    assert run["data"]["images"] == (0 if name.endswith("_text") else 8) and run["keep"]["samples"] == 4
    assert all("drift/keep_kl" in entry for entry in run["history"] if "loss" in entry)
    assert [entry["drift/guided_steps"] for entry in run["history"] if "loss" in entry] == [1, 2]
    assert Image.open(output / "telemetry.png").width > 500 or not draws
    card = (output / "README.md").read_text(encoding="utf-8")
    assert (
        "| expert | expert |" in card
        and "![" in card
        and str(pair(FAMILY[name])) not in card
        and "data.jsonl |" in card
        and "| 2 |" in card
    )
    if not name.endswith("_text"):
        no_tower_in_the_backward_pass(trainer)
