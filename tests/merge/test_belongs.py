"""belongs.py: an adapter is merged into the model that it was trained on, wherever that is now, and into no other."""

import json
import re
import shutil
import warnings

import pytest
import torch
from command import run
from hub import Hub
from huggingface_hub import snapshot_download
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import edit_tensors, save_layout, tiny_expert, tiny_llm, tiny_vlm
from transformers import AutoModelForImageTextToText

from drift_peft import DriftConfig, build_prior, merge_adapter
from drift_peft.merge import merge_baseline


def train(model):
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02, generator=torch.Generator().manual_seed(1))
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """base, expert and prior; `ours`, an adapter that the prior steers, and `stock`, plain LoRA, both of the base."""
    folder = tmp_path_factory.mktemp("belongs")
    vlm = tiny_vlm("llava")
    save_layout(vlm, folder / "base")
    save_layout(tiny_expert("llava", vlm)[0], folder / "expert")
    build_prior(folder / "expert", folder / "base", folder / "prior.safetensors", rank=8, progress=False)
    for name in ("ours", "stock"):
        model = tiny_vlm("llava")
        model.name_or_path = str(folder / "base")
        stock = LoraConfig(r=4, target_modules=["model.language_model.layers.0.self_attn.q_proj", "down_proj"])
        config = DriftConfig(prior=folder / "prior.safetensors", r=4) if name == "ours" else stock
        train(get_peft_model(model, config)).save_pretrained(folder / name, save_embedding_layers=False)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "here")


def merge(folder, base, adapter, **options):
    return merge_adapter(base, folder / adapter, folder / "merged", overwrite=True, progress=False, **options)


def recorded(folder, adapter, base, prior="as it is", **more):
    """What the adapter says that it was trained on."""
    file = folder / adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": base} | more))
    own = folder / adapter / "drift_config.json"
    if prior is None and own.exists():
        own.write_text(json.dumps({**json.loads(own.read_text()), "prior": str(folder / "gone.safetensors")}))


def copied(folder):
    return shutil.copytree(folder / "base", folder / "under another name")


def in_16_bits(folder):
    save_layout(tiny_vlm("llava").bfloat16(), folder / "bf16")
    return folder / "bf16"


def in_another_layout(folder):
    save_layout(tiny_vlm("llava"), folder / "newer", "memory", "20KB")
    return folder / "newer"


@pytest.mark.parametrize("adapter", ["ours", "stock"])
@pytest.mark.parametrize("base", [copied, in_16_bits, in_another_layout])
def test_the_same_weights_are_the_base(folder, adapter, base):
    assert merge(folder, base(folder), adapter).relative_change > 0


@pytest.mark.parametrize("adapter", ["ours", "stock"])
@pytest.mark.parametrize(
    ("name", "fits"),
    [
        (None, True),
        ("org/base", True),
        ("org/Base-bnb-4bit", True),
        ("/cache/models--org--base/snapshots/0123/", True),
        ("/cache/models--org--base-2/snapshots/0123", False),
        ("org/other", False),
        ("/somewhere/else", False),
        ("C:\\models\\base", True),
        ("C:\\models\\base\\", True),
        ("C:\\models\\other", False),
    ],
)
def test_a_recorded_base_that_is_not_here_is_known_by_its_name(folder, adapter, name, fits):
    recorded(folder, adapter, name, prior=None)
    if fits:
        assert merge(folder, folder / "base", adapter).modules > 0
    else:
        with pytest.raises(
            ValueError, match=rf"was trained on {re.escape(name)}, and base .*base is called otherwise: name the"
        ):
            merge(folder, folder / "base", adapter)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("org/vlm", True),
        ("unsloth/vlm-bnb-4bit", True),
        ("/gone/vlm", True),
        ("./model", False),
        ("/opt/ml/model", False),
        ("org/model", False),
        ("merged", False),
        ("/gone/run-a/merged/", False),
        ("/gone/final", False),
        ("/gone/last", False),
        ("/gone/best_model", False),
        ("C:\\run-a\\checkpoint-20", False),
        ("/gone/20", False),
    ],
)
def test_a_base_that_moved_is_taken_by_a_name_that_tells_models_apart(folder, name, known):
    """Else a warning says that nothing was compared."""
    moved = folder / "run-b" / re.split(r"[/\\]", name.removesuffix("-bnb-4bit").rstrip("/"))[-1]
    shutil.copytree(folder / "base", moved)
    recorded(folder, "stock", name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        assert merge(folder, moved, "stock").modules > 0
    messages = [str(warning.message) for warning in caught if "was trained on" in str(warning.message)]
    assert len(messages) == (not known)
    for message in messages:
        assert f"trained on {name}. Whether base {moved} has the same weights was not compared" in message
        assert message.endswith(f"since {name} is not on this machine in full precision.")


@pytest.mark.parametrize("name", ["/gone/final", "/gone/checkpoint-10", "org/model"])
def test_a_name_that_says_little_and_is_another_is_refused(folder, name):
    moved = shutil.copytree(folder / "base", folder / "run-b" / "checkpoint-20")
    recorded(folder, "stock", name)
    with pytest.raises(ValueError, match=rf"trained on {name}, and base .*-20 is called otherwise"):
        merge(folder, moved, "stock")


@pytest.mark.parametrize(
    ("name", "revision", "way_out"),
    [
        ("org/model", "0a1b", ": name org/model@0a1b as the base"),
        ("/cache/models--org--model/snapshots/0123", None, ": name org/model@0123 as the base"),
        ("org/model-bnb-4bit", "0a1b", ""),
        ("org/Model-unsloth-bnb-4bit", "0a1b", ""),
    ],
)
def test_only_a_hub_id_in_full_precision_can_be_named_instead(folder, name, revision, way_out):
    moved = shutil.copytree(folder / "base", folder / "run-b" / "model")
    recorded(folder, "stock", name, revision=revision)
    with pytest.warns(UserWarning, match=rf"not compared, .* is not on this machine in full precision{way_out}\.$"):
        merge(folder, moved, "stock")


@pytest.fixture
def commits(folder, monkeypatch):
    """org/vlm at two commits, of which the newer one is another model; `stock` was trained on the first."""
    with Hub() as hub:
        hub.use(monkeypatch, folder / "cache")
        first, second = hub.add("org/vlm", folder / "base"), hub.add("org/vlm", another_vlm(folder))
        recorded(folder, "stock", "org/vlm", revision=first)
        yield first, second


def test_another_commit_is_compared_where_both_are_here(folder, commits):
    first, second = commits
    snapshot_download("org/vlm", revision=first)
    with pytest.raises(ValueError, match=rf"trained on org/vlm@{first}, and base org/vlm@{second} has another"):
        merge(folder, "org/vlm", "stock")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert merge(folder, f"org/vlm@{first}", "stock").modules > 0
        assert merge(folder, folder / "base", "stock").modules > 0  # whatever the folder is called
    with pytest.raises(ValueError, match=rf"trained on org/vlm@{first}, and base .*another has another"):
        merge(folder, folder / "another", "stock")


def test_another_commit_that_is_not_here_is_a_warning(folder, commits):
    first, second = commits
    words = rf"trained on org/vlm@{first}\. Whether base org/vlm@{second} has the same .*: name org/vlm@{first} as the"
    with pytest.warns(UserWarning, match=words):
        merge(folder, "org/vlm", "stock")
    recorded(folder, "stock", "org/vlm", revision=None)  # as stock PEFT writes it
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        merge(folder, "org/vlm", "stock")


def test_the_fingerprint_knows_it_by_any_name(folder):
    recorded(folder, "ours", "org/other")
    assert merge(folder, folder / "base", "ours").modules == 14


def another_vlm(folder):
    """Trained a little more, in all of its weights."""
    shutil.copytree(folder / "base", folder / "another")
    generator = torch.Generator().manual_seed(5)

    def change(tensors):
        for W in tensors.values():
            W += 0.05 * W.std() * torch.randn(W.shape, generator=generator) if W.dim() == 2 else 0

    edit_tensors(folder / "another", change)
    return folder / "another"


def unrelated(folder):
    return save_layout(tiny_vlm("llava", seed=5), folder / "unrelated")


def expert(folder):
    return folder / "expert"


def twice(folder):
    """A merge of this very adapter, by whatever is called so."""
    return shutil.move(folder / "merged", folder / "once")


def merged_expert(folder):
    save_layout(tiny_expert("llava", tiny_vlm("llava"))[0], folder / "e")
    text = {key: t for key, t in load_file(folder / "e" / "model.safetensors").items() if "layers" in key}
    base = shutil.copytree(folder / "base", folder / "merged-expert")
    tensors = load_file(base / "model.safetensors")
    save_file(
        tensors | {f"language_model.{k}": t for k, t in text.items()}, base / "model.safetensors", {"format": "pt"}
    )
    return base


WORDS = {
    (another_vlm, "ours"): "has another",
    (another_vlm, "stock"): "has another",
    (unrelated, "ours"): r"is another model \(the prior's fingerprint is off by 1\d\d%\)",
    (unrelated, "stock"): "has another",
    (expert, "ours"): "fingerprint is off|has another",
    (expert, "stock"): "has another",
    (merged_expert, "ours"): "fingerprint is off|has another",
    (twice, "ours"): "holds the adapter already",
    (twice, "stock"): "has another",
}


@pytest.mark.parametrize(("other", "adapter"), WORDS, ids=lambda value: getattr(value, "__name__", value))
def test_another_model_is_refused_and_can_be_forced(folder, other, adapter, capsys):
    merge(folder, folder / "base", adapter)
    base = other(folder)
    shutil.rmtree(folder / "merged", ignore_errors=True)
    message = rf"^adapter .*{adapter} was trained on .*base, and base .*{base.name if hasattr(base, 'name') else ''}"
    with pytest.raises(ValueError, match=rf"{message}.* ({WORDS[other, adapter]}).*: name the .*\(--force\)$"):
        merge(folder, base, adapter)
    assert not (folder / "merged").exists()
    command = "merge", "--base", base, "--adapter", folder / adapter, "-o", folder / "merged"
    assert run(capsys, *command)[0] == 1 and run(capsys, *command, "--force")[0] == 0


def test_twice_is_noticed_without_the_recorded_base(folder):
    """And where the merged folder is called as the base was."""
    merge(folder, folder / "base", "ours")
    recorded(folder, "ours", "org/merged")
    with pytest.raises(ValueError, match=r"was trained on org/merged, and base .*merged holds the adapter already"):
        merge_adapter(folder / "merged", folder / "ours", folder / "again", progress=False)


def test_an_adapter_without_a_record_is_taken_at_its_word(folder):
    model = tiny_llm("llava")
    model.name_or_path = ""
    save_layout(tiny_llm("llava", seed=3), folder / "text")
    train(get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))).save_pretrained(folder / "plain")
    assert merge(folder, folder / "text", "plain").modules == 2


@pytest.mark.parametrize("prior", ["as it is", None])
def test_a_base_that_has_taken_a_part_of_delta_in_is_another_base(folder, made, prior):
    half = folder / "half"
    given = {"expert": folder / "expert", "base": made / "base", "output": half}  # where the prior's base was
    merge_baseline("task_arithmetic", **given, scale=0.5, progress=False)
    model = AutoModelForImageTextToText.from_pretrained(half)
    trained = train(get_peft_model(model, DriftConfig(prior=folder / "prior.safetensors", r=4)))
    trained.save_pretrained(folder / "of half", save_embedding_layers=False)
    recorded(folder, "of half", str(half), prior)
    assert merge(folder, half, "of half").output
    if prior is not None:
        lying = shutil.copytree(folder / "base", folder / "other" / "half")
        shutil.copy(half / "config.json", lying)
        with pytest.raises(ValueError, match=r"half is another model \(the prior's fingerprint is off by"):
            merge(folder, lying, "of half")
    with pytest.raises(ValueError, match=r"was trained on .*half, and base .*base "):
        merge(folder, folder / "base", "of half")
    with pytest.raises(ValueError, match=r"was trained on .*base, and base .*half "):
        merge(folder, half, "ours")


@pytest.mark.parametrize("scale", [0.5, 0.9])
@pytest.mark.parametrize("reference", ["base", None])
def test_a_prior_that_was_built_for_a_merged_base_knows_it(folder, scale, reference):
    """By its weights alone: what the base records of its merge was added before there was this prior."""
    half, prior = folder / "half", folder / "of half.safetensors"
    given = {"expert": folder / "expert", "progress": False}
    merge_baseline("task_arithmetic", base=folder / "base", output=half, scale=scale, **given)
    reference = reference and folder / reference
    build_prior(base=half, output=prior, rank=8, reference=reference, **given)
    model = train(get_peft_model(AutoModelForImageTextToText.from_pretrained(half), DriftConfig(prior=prior, r=4)))
    model.save_pretrained(folder / "of half", save_embedding_layers=False)
    recorded(folder, "of half", "org/gone")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        moved = shutil.copytree(half, folder / "gone")
        assert merge(folder, moved, "of half").output
    with pytest.raises(ValueError, match=r"was trained on .*, and base .*base is another model"):
        merge(folder, folder / "base", "of half")
    other = folder / "other" / "gone"
    other.parent.mkdir()
    merge_baseline("task_arithmetic", base=folder / "base", output=other, scale=1.4 - scale, **given)
    with pytest.raises(ValueError, match=r"was trained on .*, and base .*gone is another model"):
        merge(folder, other, "of half")
    recorded(folder, "of half", "org/merged")
    with pytest.raises(ValueError, match=r"merged holds the adapter already"):
        merge_adapter(folder / "merged", folder / "of half", folder / "again", progress=False)
