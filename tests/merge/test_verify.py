"""What a merge is compared with: the numbers of a 4-bit base, what was trained on it, and the other ways to serve."""

import json
import re
import warnings
from importlib.metadata import entry_points
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, get_4bit_type, quantize_4bit
from hub import Hub
from merging import edit_config, load, lora, merge, off, rename_module, save_adapter, save_base
from pairs import SKIP, drift, train, wrap
from pairs import load as load_quantized
from peft import PeftModel
from safetensors.torch import load_file
from tiny_vlm import save_pair
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig

from drift_peft import DriftConfig, merge_adapter
from drift_peft.checkpoints.checkpoint import Checkpoint
from drift_peft.checkpoints.dequantized import DequantizedCheckpoint, through_four_bits
from drift_peft.demo.compare import VLM
from drift_peft.keeping import keep_4bit_differentiable
from drift_peft.merge.verify import Row, _prompts, _verdict_four_bit, _verdict_full

pytestmark = pytest.mark.filterwarnings("ignore:Switched off bitsandbytes")
(entry,) = entry_points(group="console_scripts", name="drift-peft")


def four_bit(**settings):
    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, **settings}
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, **settings)


@pytest.fixture(scope="module", params=["qwen2_5_vl", "llama"])
def trained(request, pairs, tmp_path_factory):
    """A base, and an adapter that was trained on it in 4 bits, on two of its projections."""
    folder, family = tmp_path_factory.mktemp(request.param), request.param
    (folder / "base").symlink_to(pairs(family) / "base")
    config = drift(pairs(family), target_modules=r".*layers\.\d\.(self_attn\.q_proj|mlp\.down_proj)")
    model = train(wrap(load_quantized(folder, family, "nf4"), config), lr=2e-2).eval()
    model.save_pretrained(folder / "adapter")
    return folder, family, model


@pytest.fixture
def copy(trained, tmp_path):
    """The same, for another output."""
    for name in ("base", "adapter"):
        (tmp_path / name).symlink_to(trained[0] / name)
    return tmp_path


@torch.no_grad()
def answer(model, folder):
    return model(**_prompts(Checkpoint(folder / "base"), folder / "base")[0]["text"]).logits.float()


def test_too_little_memory_is_told_before_anything_is_written(copy, monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(
        ValueError, match=r"^verifying loads .*base in fp32, which takes 0\.\d+ GB of memory, and 1e-06 GB"
    ):
        merge_adapter(copy / "base", copy / "adapter", copy / "merged", verify=True, progress=False)
    assert not [*copy.glob("merged*")]
    assert merge_adapter(copy / "base", copy / "adapter", copy / "merged", progress=False).verification is None


# The numbers of a 4-bit base


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_through_four_bits_is_what_bitsandbytes_makes_of_the_whole_tensor(kind, double, dtype):
    quantization = four_bit(bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double)
    for shape in ((64, 64), (128, 72), (1100, 1000)):  # the last one is more than a block
        W = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        whole = dequantize_4bit(*quantize_4bit(W, quant_type=kind, compress_statistics=double))
        assert torch.equal(through_four_bits(W, quantization), whole)


@pytest.mark.parametrize("shape", [(130, 48), (3, 5), (1, 64)])
def test_through_four_bits_where_the_width_is_no_multiple_of_64(shape):
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    code = get_4bit_type("nf4", device="cpu").double()
    expected = []
    for block in W.flatten().split(64):
        nearest = (block[:, None] / block.abs().max() - code).abs().argmin(1)
        expected.append(code[nearest] * block.abs().max())
    found = through_four_bits(W.float(), four_bit(bnb_4bit_use_double_quant=False))
    torch.testing.assert_close(found.double(), torch.cat(expected).view(shape), rtol=1e-5, atol=1e-6)


def test_which_weights_are_quantized_is_what_transformers_says(tmp_path):
    save_base(tmp_path / "base", "qwen2_5_vl")
    for skip in (["lm_head"], SKIP, ["lm_head", "down_proj"]):
        quantization = four_bit(llm_int8_skip_modules=skip)
        model = load(tmp_path / "base", "qwen2_5_vl", quantization_config=quantization)
        expected = {name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
        assert set(DequantizedCheckpoint(tmp_path / "base", None, quantization).four_bit.values()) == expected


def test_what_is_recorded(pairs, trained):
    folder, _, model = trained
    own = json.loads((folder / "adapter" / "drift_config.json").read_text())["quantization"]
    assert own["load_in_4bit"] and own["bnb_4bit_use_double_quant"] and own["llm_int8_skip_modules"] == SKIP
    assert BitsAndBytesConfig.from_dict(own).to_dict() == model.config.quantization_config.to_dict()
    assert DriftConfig.from_pretrained(folder / "adapter").quantization == own
    full = wrap(load_quantized(pairs("llama"), "llama"), drift(pairs("llama")))
    assert full.peft_config["default"].quantization == {}


# Merging onto them


def test_onto_dequantized_is_exactly_what_was_trained(trained, copy):
    folder, family, model = trained
    expected = answer(model, folder)
    merged = merge(copy, onto="dequantized", verify=True)
    assert off(answer(load(merged.output, family), folder), expected) < 1e-5
    assert merged.logits_error < 1e-5 and merged.trained_on == "nf4 with double quantization"
    assert merged.modules == 4 and merged.verification.rows[1].name == "merged onto the dequantized base (this folder)"
    onto_base = merge(copy, overwrite=True)
    assert off(answer(load(onto_base.output, family), folder), expected) > 0.01
    assert onto_base.trained_on is None and onto_base.verification is None


def test_the_rows_are_the_models_that_they_name(trained, copy):
    folder, family, model = trained
    verification = merge(copy, verify=True).verification
    expected = answer(model, folder)
    auto = AutoModelForCausalLM if family == "llama" else AutoModelForImageTextToText
    again = auto.from_pretrained(
        copy / "merged", dtype=torch.float32, quantization_config=four_bit(llm_int8_skip_modules=SKIP)
    )
    keep_4bit_differentiable(again)  # that is without a kernel that computes in bf16
    with model.disable_adapter():
        alone = answer(model, folder)
    ways = {
        "the adapter on the 4-bit base, as trained": expected,
        "merged into the base (this folder)": answer(load(copy / "merged", family), folder),
        "merged onto the dequantized base": expected,
        "this folder, quantized to 4 bits again": answer(again.eval(), folder),
        "the 4-bit base alone": alone,
    }
    assert [row.name for row in verification.rows] == list(ways)
    for row, logits in zip(verification.rows, ways.values(), strict=True):
        assert row.text == pytest.approx(off(logits, expected), rel=1e-3, abs=2e-5), row.name
    assert verification.rows[0].text == 0 and all(row.text > 1e-3 for row in verification.rows if row.text > 1e-4)
    assert verification.no_image == "the model takes no images" if family == "llama" else verification.no_image


def test_a_wrong_merge_onto_the_dequantized_base_is_found(copy, monkeypatch):
    monkeypatch.setattr(DequantizedCheckpoint, "tensor", Checkpoint.tensor)
    with pytest.raises(ValueError, match=r"logits are \d.* off those of base \+ adapter, .* went wrong"):
        merge(copy, onto="dequantized", verify=True)
    assert {file.name for file in copy.iterdir()} == {"base", "adapter"}


def test_a_stock_adapter_is_assumed_to_come_from_nf4(tmp_path):
    save_base(tmp_path / "base", "qwen2_5_vl")
    save_adapter(tmp_path / "adapter", "qwen2_5_vl")
    report = merge(tmp_path, onto="dequantized")
    assert "nf4 with double quantization of the language model's projections (assumed" in report.trained_on
    quantized = load(tmp_path / "base", "qwen2_5_vl", quantization_config=four_bit(llm_int8_skip_modules=SKIP))
    expected = PeftModel.from_pretrained(quantized.dequantize(), tmp_path / "adapter").eval()
    assert off(answer(load(report.output, "qwen2_5_vl"), tmp_path), answer(expected, tmp_path)) < 0.01  # bf16


def test_a_stock_adapter_may_have_been_trained_in_full_precision(tmp_path):
    """Which it was nothing says, and merging into the base is exact then."""
    save_base(tmp_path / "base", "qwen2_5_vl")
    save_adapter(tmp_path / "adapter", "qwen2_5_vl")
    verdict = merge(tmp_path, verify=True).verification.verdict
    said = re.search(r"If it was in full precision, this folder is (\S+)% off .* If it was in 4 bits: merged", verdict)
    assert float(said[1]) < 1


def test_an_adapter_of_a_full_precision_base(pairs, tmp_path):
    (tmp_path / "base").symlink_to(pairs("llama") / "base")
    train(wrap(load_quantized(tmp_path, "llama"), drift(pairs("llama"))), lr=2e-2).save_pretrained(tmp_path / "adapter")
    verification = merge(tmp_path, verify=True).verification
    assert verification.trained_on == "full precision" and verification.verdict.startswith("Serve this folder: ")
    names, errors = zip(*((row.name, row.text) for row in verification.rows), strict=True)
    assert names[2:4] == ("the adapter on the base in 4 bits", "this folder, quantized to 4 bits")
    assert errors[0] == 0 and errors[1] < 1e-5 and min(errors[2:]) > 1e-3


def test_the_record_of_an_adapter_on_the_hub(trained, tmp_path, monkeypatch):
    with Hub() as hub:
        hub.use(monkeypatch, tmp_path / "cache")
        hub.add("org/adapter", trained[0] / "adapter")
        report = merge_adapter(
            trained[0] / "base", "org/adapter", tmp_path / "merged", onto="dequantized", progress=False
        )
    assert report.trained_on == "nf4 with double quantization"


# Prompts and verdicts


@pytest.mark.parametrize("family", ["llava_next", "gemma3", "qwen2_5_vl"])
def test_an_image_prompt(tmp_path, family):
    save_pair(tmp_path, family)
    save_adapter(tmp_path / "adapter", family)
    verification = merge(tmp_path, verify=True).verification
    assert verification.no_image is None
    assert all(0 < row.image != row.text for row in verification.rows[1:])


def test_the_image_of_a_processor_that_takes_grey_ones_alone():
    """The demo's own."""
    prompts, reason = _prompts(Checkpoint(VLM), VLM)
    assert reason is None and prompts["image"]["pixel_values"].isfinite().all()


def test_why_there_is_no_image_prompt(tmp_path):
    save_base(tmp_path / "base", "llava_next")
    prompts, reason = _prompts(Checkpoint(tmp_path / "base"), tmp_path / "base")
    assert list(prompts) == ["text"] and reason == "the folder holds no processor"
    (tmp_path / "base" / "processor_config.json").write_text('{"processor_class": "NoSuchProcessor"}')
    assert _prompts(Checkpoint(tmp_path / "base"), tmp_path / "base")[1].startswith("Unrecognized processing class")
    save_base(tmp_path / "text")
    assert _prompts(Checkpoint(tmp_path / "text"), tmp_path / "text")[1] == "the model takes no images"


@pytest.mark.parametrize(
    "errors, words",
    [
        (
            (0.1, 0.01, 0.12, 0.5),
            ["into the base, the model is 10% off what was trained", "(--onto dequantized) it is 1%"],
        ),
        (
            (0.1, 0.01, 0.12, 0.5),
            ["again, this folder is 12% off what was trained; in 4 bits, the adapter unmerged is"],
        ),
        ((0.1, 0.01, 0.3, 0.5), ["again, this folder is 30% off what was trained and loses much of the adapter"]),
        (
            (0.2, 0.01, 0.3, 0.1),
            ["The rounding noise of the 4-bit base exceeds", "30% off what was trained, farther than"],
        ),
    ],
)
def test_verdicts_on_a_4_bit_base(errors, words):
    folder, other, again, alone = (Row("", error / 2, error) for error in errors)
    assert all(word in _verdict_four_bit("base", folder, other, again, alone) for word in words)
    assert _verdict_four_bit("dequantized", other, folder, again, alone) == _verdict_four_bit(
        "base", folder, other, again, alone
    )


@pytest.mark.parametrize(
    "errors, words",
    [
        ((1e-5, 0.1, 0.12, 0.5), "the adapter unmerged is closer (10% off) than this folder quantized (12% off)."),
        ((1e-5, 0.1, 0.05, 0.02), "and both are farther off than the base without the adapter."),
    ],
)
def test_verdicts_on_a_full_precision_base(errors, words):
    verdict = _verdict_full(*(Row("", error, None) for error in errors))
    assert verdict.startswith("Serve this folder: it is 0.001% off") and verdict.endswith(words)


# Refusals


def record(value):
    return lambda p: (p / "adapter" / "drift_config.json").write_text(json.dumps({"quantization": value}))


EIGHT = {"quant_method": "bitsandbytes", "load_in_8bit": True}
REFUSED = {
    "8 bits": (record(EIGHT), {"verify": True}, "that bitsandbytes had quantized in 8 bits, and only 4-bit bases"),
    "8 bits, dequantized": (record(EIGHT), {"onto": "dequantized"}, "merge onto the base, without verify"),
    "gptq": (record({"quant_method": "gptq"}), {"verify": True}, "trained on a base that gptq had quantized, and"),
    "full precision": (
        record({}),
        {"onto": "dequantized"},
        "belongs to the full-precision base, .* merge it onto that",
    ),
    "damaged record": (
        lambda p: (p / "adapter" / "drift_config.json").write_text("{"),
        {"verify": True},
        "drift_config.json is no valid JSON",
    ),
    "unknown": (lambda p: None, {"onto": "bsae"}, "onto must be 'base' or 'dequantized', got 'bsae'"),
    "untrained": (lora(std=0), {"onto": "dequantized"}, "changes no weight of .* lora_B are zero"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(pair, case):
    change, options, message = REFUSED[case]
    change(pair)
    with pytest.raises(ValueError, match=message) as caught:
        merge(pair, **options)
    assert "\n" not in str(caught.value) and {file.name for file in pair.iterdir()} == {"base", "adapter"}


# The command line


def run(folder, *flags):
    where = "--base", folder / "base", "--adapter", folder / "adapter", "-o", folder / "merged"
    return entry.load()(["merge", *map(str, where), *flags])


def test_the_table_on_the_command_line(pair, capsys):
    assert run(pair, "--verify", "--onto", "dequantized") == 0
    out, err = capsys.readouterr()
    words = " ".join(out.split())
    assert "merged onto the dequantized base (this folder)" in words and "Quantized to 4 bits again" in words
    assert "image prompt: the model takes no images" in words and "(assumed: the" in words
    elements = sum(tensor.numel() for tensor in load_file(pair / "base" / "model.safetensors").values())
    assert f"loaded in fp32, in turn, {4 * elements / 1e9:.2g} GB of memory each" in err
    assert run(pair, "--verify", "--overwrite", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["onto"] == "base" and report["verification"]["rows"][0]["text"] == 0


@pytest.mark.parametrize(
    "change, message",
    [
        (lora(std=0), "changes no weight of"),
        (rename_module("layers.1", "layers.7"), "the base has no layers.7.mlp"),
        (lambda p: edit_config(p / "adapter", r=8), "says r=8 for"),
    ],
    ids=["nothing changed", "a module unused", "other rank"],
)
def test_the_exit_status_of_a_merge_that_did_not_merge_all(pair, capsys, change, message):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        change(pair)
    assert run(pair) == 1
    assert message in capsys.readouterr().err and not (pair / "merged").exists()
