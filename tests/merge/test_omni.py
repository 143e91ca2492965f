"""Models that also talk, whole as they are published: the thinker is steered, and merging leaves the talker alone."""

import pytest
import torch
import transformers as tf
from omni import qwen2_5_omni, qwen3_omni
from peft import get_peft_model
from safetensors.torch import load_file

from drift_peft import DriftConfig, build_prior, merge_adapter
from drift_peft.checkpoints import Checkpoint
from drift_peft.keeping import Vlm
from drift_peft.tuner import targets_summary
from drift_peft.tuner.compatibility import adapted_modules


def language_model(thinker):
    """Older versions of transformers have no class around it."""
    return getattr(thinker.model, "language_model", thinker.model)


MODELS = {  # -> how it is made, class of its thinker, weights that are steered, and adapted
    "qwen2_5_omni": (qwen2_5_omni, tf.Qwen2_5OmniThinkerForConditionalGeneration, 14),
    "qwen3_omni": (qwen3_omni, tf.Qwen3OmniMoeThinkerForConditionalGeneration, 8),
}


@pytest.fixture(scope="module", params=MODELS)
def omni(request, tmp_path_factory):
    make, thinker, number = MODELS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model, expert = make()
    model.save_pretrained(folder / "base")
    torch.save({}, folder / "base" / "spk_dict.pt")  # the published folder of Qwen2.5-Omni has its speakers in there
    state = {name: value.clone() for name, value in language_model(model.thinker).state_dict().items()}
    for name, value in state.items():
        if name.endswith("_proj.weight"):
            value += 0.1 * value.std() * torch.randn(value.shape)
    expert.model.load_state_dict(state)
    expert.save_pretrained(folder / "expert")
    prior = build_prior(folder / "expert", folder / "base", folder / "prior.safetensors", rank=8, progress=False)
    assert len(prior) == number
    return folder, thinker, number


def test_it_is_asked_by_its_thinker(omni, tmp_path):
    """Whole, it only generates: it gives no logits, by which answers are kept."""
    folder, thinker, _ = omni
    with pytest.raises(ValueError, match=r"base is a whole Omni model, which gives no logits: take its thinker"):
        Vlm(folder / "base")
    thinker.from_pretrained(folder / "base").save_pretrained(tmp_path)
    assert Checkpoint(tmp_path).auto_class is tf.AutoModelForImageTextToText


def test_targets_are_the_thinkers(omni):
    folder, _, number = omni
    rows = targets_summary(Checkpoint(folder / "base"))["rows"]
    assert sum(row["adapted"] for row in rows) == number
    assert all(row["left"] for row in rows)  # the talker's, and the towers'


@pytest.mark.parametrize("whole", [pytest.param(True, marks=pytest.mark.slow), False])
def test_the_published_folder_is_trained_and_merged(omni, whole, tmp_path):
    folder, thinker, number = omni
    checkpoint = Checkpoint(folder / "base")
    cls = checkpoint.auto_class if whole else thinker
    model = cls.from_pretrained(folder / "base", dtype=torch.float32)
    model = get_peft_model(model, DriftConfig(prior=folder / "prior.safetensors", r=4))
    adapted = adapted_modules(model.get_base_model(), ["default"])
    assert len(adapted) == number
    base = model.get_base_model()
    path = next(n for n, m in base.named_modules() if m is language_model(base.thinker if whole else base))
    assert path.startswith("thinker.model" if whole else "model") and all(n.startswith(f"{path}.") for n in adapted)
    ids = torch.arange(7, 27).reshape(2, 10)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    speaks = model.thinker if whole else model
    speaks(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert model.peft_config["default"].drift_steps == 1
    model.save_pretrained(tmp_path / "adapter")
    report = merge_adapter(folder / "base", tmp_path / "adapter", tmp_path / "merged", verify=True, progress=False)
    assert report.modules == number and report.logits_error < 1e-5
    before, after = (load_file(place / "model.safetensors") for place in (folder / "base", tmp_path / "merged"))
    changed = {name for name in before if not torch.equal(*(of[name].view(torch.uint8) for of in (before, after)))}
    assert len(changed) == number and all(name.startswith("thinker.model.layers.") for name in changed)
    merged = thinker.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    torch.testing.assert_close(merged(ids).logits, speaks.eval()(ids).logits, rtol=1e-4, atol=1e-5)
