"""A merged folder where this library is not: in plain transformers, and by the tensor names that others look for.

That stock PEFT loads the adapter's folder is in test_adapter_folder.py.
"""

import textwrap

import pytest
import torch
from merging import load, logits, merge, save_adapter
from older import loads_processors
from processes import run_program
from safetensors.torch import load_file
from tiny_vlm import save_pair

FAMILIES = ("qwen2_5_vl", "llava_next")
LAYERS, BLOCKS = 2, 1
PARTS = ("weight", "bias")


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """Family -> a merged folder with processor, and the logits that it has here."""
    folders = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    for family, folder in folders.items():
        save_pair(folder, family)
        save_adapter(folder / "adapter", family)
        merge(folder)
        torch.save(logits(load(folder / "merged", family)), folder / "logits.pt")
    return folders


@loads_processors
def test_plain_transformers_loads_it(merged, tmp_path):
    """In one process for all families: most of its time goes into importing torch and transformers."""
    script = """
        import sys
        import torch
        from PIL import Image
        from transformers import AutoModelForImageTextToText, AutoProcessor

        for folder in sys.argv[1:]:
            model, info = AutoModelForImageTextToText.from_pretrained(
                folder + "/merged", dtype=torch.float32, output_loading_info=True
            )
            assert not any(info.values()), info
            with torch.no_grad():
                logits = model(input_ids=torch.arange(7, 27).reshape(2, 10)).logits
            assert torch.equal(logits, torch.load(folder + "/logits.pt")), "other logits"
            processor = AutoProcessor.from_pretrained(folder + "/merged")
            turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "how many ?"}]}
            prompt = processor.apply_chat_template([turn], add_generation_prompt=True)
            inputs = processor(text=[prompt], images=[[Image.new("RGB", (16, 16))]], return_tensors="pt")
            answer = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3)
            assert answer.shape[1] == inputs["input_ids"].shape[1] + 3
        assert "drift_peft" not in sys.modules
    """
    run_program(tmp_path, "-c", textwrap.dedent(script), *merged.values(), cwd=tmp_path)


def names_of_qwen2_5_vl():
    """The tensors of Qwen2.5-VL as its repositories on the hub name them, and as vLLM's and llama.cpp's loaders do."""
    norms = [f"model.layers.{i}.{n}_layernorm.weight" for i in range(LAYERS) for n in ("input", "post_attention")]
    text = [f"model.layers.{i}.self_attn.{p}_proj.{part}" for i in range(LAYERS) for p in "qkv" for part in PARTS]
    text += [f"model.layers.{i}.self_attn.o_proj.weight" for i in range(LAYERS)]
    text += [f"model.layers.{i}.mlp.{p}_proj.weight" for i in range(LAYERS) for p in ("gate", "up", "down")]
    text += ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    vision = [f"visual.blocks.{i}.norm{n}.weight" for i in range(BLOCKS) for n in (1, 2)]
    layers = ("attn.qkv", "attn.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    vision += [f"visual.blocks.{i}.{layer}.{part}" for i in range(BLOCKS) for layer in layers for part in PARTS]
    vision += ["visual.patch_embed.proj.weight", "visual.merger.ln_q.weight"]
    vision += [f"visual.merger.mlp.{i}.{part}" for i in (0, 2) for part in PARTS]
    return {*norms, *text}, set(vision)


@pytest.fixture(scope="module")
def merged_names(merged):
    return set(load_file(merged["qwen2_5_vl"] / "merged" / "model.safetensors"))


def test_the_names_are_those_of_the_hub(merged_names):
    text, vision = names_of_qwen2_5_vl()
    assert merged_names == text | vision


def test_llama_cpp_knows_every_tensor(merged_names):
    """By the table of names in the package gguf, from which llama.cpp's convert_hf_to_gguf.py takes them."""
    gguf = pytest.importorskip("gguf")
    tables = {
        "visual.": gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, 3),  # the merger's mlp counts up to 2
        "": gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2VL, LAYERS),
    }
    for name in merged_names:
        table = next(table for start, table in tables.items() if name.startswith(start))
        assert table.get_name(name, try_suffixes=(".weight", ".bias")), name
