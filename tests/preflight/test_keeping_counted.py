"""drift-peft preflight counts keeping: memory as a real pass takes it, tokens as the processors make them, and time."""

import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as tf
import yaml
from command import run
from older import loads_processors
from peft import LoraConfig, get_peft_model
from PIL import Image
from tiny import FAMILIES, MIXED
from tiny_vlm import PROCESSORS, SIDE, tokenizer

from drift_peft import language_model_targets
from drift_peft.checkpoints import Checkpoint, assumed_quantization
from drift_peft.keeping.feed import Part
from drift_peft.keeping.kept import Keeping
from drift_peft.preflight import dry_run as dry
from drift_peft.preflight.cards import estimate_summary, keeping_sentence, preflight_table, read_settings
from drift_peft.preflight.memory import QUESTION, Memory, Settings, keep_tokens, kept, patches

ANSWER, PIXELS = 32, 64**2


def config(vocabulary):
    config = FAMILIES["qwen2_5_vl"][0]()
    config.text_config.vocab_size = vocabulary
    return config


def settings(**changes):
    given = {"base": "tiny", "r": 16, "max_tokens": 300, "per_device_train_batch_size": 1, "keep": "keep.safetensors"}
    return Settings(**{**given, "keep_max_new_tokens": ANSWER, "processor_kwargs": {"max_pixels": PIXELS}, **changes})


def adapted(made, folder):
    """As the recipes train it: 4 bits, LoRA in fp32, gradient checkpointing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = tf.AutoModelForImageTextToText.from_config(made, dtype=torch.bfloat16)
        base.save_pretrained(folder)
        quantized = assumed_quantization(Checkpoint(folder))
        base = type(base).from_pretrained(folder, quantization_config=quantized, dtype=torch.bfloat16, device_map="cpu")
        model = get_peft_model(base, LoraConfig(r=16, target_modules=language_model_targets(base))).train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    for parameter in model.parameters():
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    return model


def part(samples, tokens, vocabulary):
    ids = torch.randint(7, 64, (samples, tokens))
    known = samples * ANSWER, dry.TOP_K
    top = torch.randint(vocabulary, known), torch.full(known, -8.0)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["attention_mask"][0, :9] = 0  # padding, as the shorter questions have it
    return Part(inputs, torch.ones(samples, ANSWER, dtype=torch.bool), *top)


@pytest.mark.parametrize(("vocabulary", "moment"), [(4096, "loss"), (64, "backward pass")])
def test_memory_is_that_of_a_real_pass(vocabulary, moment, tmp_path):
    """In one part, and in two, where the first one's gradients are there during the second."""
    made = config(vocabulary)
    model, memory = adapted(made, tmp_path), Memory(made, "tiny")
    parameters = [p for p in model.parameters() if p.requires_grad]
    before, counted = torch.is_autocast_enabled("cuda"), []
    for parts in (1, 2):
        wanted = settings(keep_batch_size=2 * parts)
        step = memory.keep_step(wanted)
        assert (step.batch, step.tokens, step.answer) == (2, PIXELS // 4**2 // 4 + QUESTION + ANSWER, ANSWER)
        keeping = Keeping(model, [], SimpleNamespace(), 1.0, 1.0, 2 * parts, 1, 0)
        keeping.autocast, keeping.scale = torch.bfloat16, torch.tensor(1.0)
        batch = [part(step.batch, step.tokens, vocabulary) for _ in range(parts)]
        torch.set_autocast_enabled("cuda", True)  # where PEFT looks
        try:
            with dry.Live() as live:
                keeping._gradients(batch, parameters)
        finally:
            torch.set_autocast_enabled("cuda", before)
            keeping.release()
        moments = memory._keeping(wanted, sum(p.numel() for p in parameters))
        for parts in moments.values():
            del parts["keeping's images, 32 bits"]  # which this pass is without
        sizes = {name: sum(parts.values()) for name, parts in moments.items() if "vision" not in name}
        counted.append(max(sizes.values()))
        assert max(sizes, key=sizes.get) == f"{moment} of the language model, keeping"
        assert counted[-1] == pytest.approx(max(live.peaks.values()), rel=0.1)
    assert counted[1] - counted[0] == 4 * sum(p.numel() for p in parameters)


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=loads_processors if name == "internvl" else ()) for name in PROCESSORS]
)
def test_tokens_are_those_that_the_processor_makes(family):
    """Of one image, beside a question and the longest answer."""
    made = (FAMILIES | MIXED)[family][0]()
    make, image = PROCESSORS[family]
    processor = make(tokenizer(), chat_template="IMAGE")
    picture = Image.fromarray(np.zeros((SIDE, SIDE, 3), dtype=np.uint8))
    ids = processor(text=[image], images=[[picture]], return_tensors="pt")["input_ids"]
    tokens = int((ids == 3).sum())
    kwargs = {"max_pixels": SIDE**2, "do_image_splitting": False, "size": {"longest_edge": SIDE}, "max_patches": 1}
    kwargs |= {"max_soft_tokens": 64, "max_image_tokens": 4, "crop_to_patches": False}
    wanted = settings(processor_kwargs=kwargs, max_tokens=4096)
    counted = keep_tokens(made, wanted) - QUESTION - ANSWER
    # LLaVA-NeXT ends each row of patches with a token; SmolVLM cuts no image as small as this into tiles.
    assert 0.85 * tokens < counted <= tokens * (2 if family == "smolvlm" else 1)
    assert keep_tokens(made, settings(processor_kwargs=kwargs, max_tokens=20)) == 20  # longer samples are dropped
    other = settings(processor_kwargs=kwargs, max_tokens=20, keep_images="pictures")  # of which nothing is dropped
    assert keep_tokens(made, other) == keep_tokens(made, wanted)


def test_pictures_that_are_not_the_datas_are_as_large_as_the_processor_lets_them():
    """Of which a keep set is made, whatever max_tokens is; here no max_pixels says how large."""
    memory, wanted = Memory(config(64), "tiny"), settings(processor_kwargs=None, keep_images="pictures")
    step, own = memory.keep_step(wanted), memory.keep_step(replace(wanted, keep_images=None))
    assert (step.batch, step.tokens) == (1, 16384 + QUESTION + ANSWER) and own.tokens == wanted.max_tokens
    assert patches(memory.config, kept(wanted)) == 16384 * 4
    pixels = {tokens: 4 * 4 * tokens * 4 * 3 * 2 * 4 for tokens in (16384, wanted.max_tokens)}
    for chosen, tokens in ((wanted, 16384), (replace(wanted, keep_images=None), wanted.max_tokens)):
        for parts in memory._keeping(chosen, 0).values():
            assert parts["keeping's images, 32 bits"] == pixels[tokens]


def test_what_keeping_adds_is_told(capsys, tmp_path):
    made = config(4096)
    made.save_pretrained(tmp_path / "base")
    content = {"base": str(tmp_path / "base"), "data": "d.jsonl", "prior": "p.safetensors", "max_tokens": 256}
    content["keep"] = "keep.safetensors"
    content |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "keep_max_new_tokens": 32}
    content |= {"processor_kwargs": {"max_pixels": PIXELS}, "keep_batch_size": 16, "keep_every": 2}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    status, out, _ = run(capsys, "preflight", tmp_path / "recipe.yaml")
    told = "keeping takes 16 x 128 tokens at most every 2 steps, beside 8 x 256 of the task: 50% more time, or more"
    assert status == 0 and told in " ".join(out.split())

    memory, known = Memory(made, "tiny"), read_settings(tmp_path / "recipe.yaml")
    summary = estimate_summary(memory, known)["keeping"]
    told = estimate_summary(memory, replace(known, images_per_sample=3, keep_batch_size=3))
    for moment, caption in (
        ("loss of the language model, keeping", "3 x 128 tokens, each with 1 image of at most 256 patches"),
        ("loss of the language model", "2 x 256 tokens, each with 3 images of at most 768 patches"),
    ):
        table = preflight_table({**told, "moment": moment})
        assert str(table.caption) == f"at its peak, the {moment}: {caption}"
    without = memory.estimate(replace(known, keep=None)).bytes
    assert summary["gb"] == (memory.estimate(known).bytes - without) / 1e9 >= 0
    assert (summary["tokens"], summary["time"]) == (128, 16 * 128 / (8 * 256) / 2)
    replayed = estimate_summary(memory, replace(known, replay=0.2))
    assert keeping_sentence(replayed) == "replay: 0.2 takes 25% more steps an epoch, and no more memory"
    assert replayed["total_gb"] == without / 1e9
    for off in ({"keep": None}, {"keep_weight": 0}):
        summary = estimate_summary(memory, replace(known, **off))
        assert summary["keeping"] is None and keeping_sentence(summary) == ""
