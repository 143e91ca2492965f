"""benchmarks/smollm.py on a tiny language model in SmolLM2's place: its making, its runs and its tables."""

import contextlib
import json
from dataclasses import replace

import numpy as np
import pytest
import smollm
import torch
import transformers as tf
from rich.console import Console
from smollm_study import abilities, make
from smollm_study.four_bit import in_four_bits
from smollm_study.llama_cpp import round_trip
from smollm_study.make import CHAT_TEMPLATE, IMAGE, make_processor
from smollm_study.plan import FULL, SMALLEST, Plan, open_ledger
from smollm_study.report import report
from smollm_study.run import of_answers
from smollm_study.ways import WAYS
from smollm_study.world import PERCEPTION, Pictures, draw_many, text_chain
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from drift_peft.demo.evaluate import encode

pytestmark = pytest.mark.slow  # one making of all, in the smallest size
LONGEST = make.LONGEST  # less in these tests


@contextlib.contextmanager
def a_candidate_each():
    """Of each way's grid the first one alone: how one is chosen is shown on numbers."""
    with pytest.MonkeyPatch.context() as patch:
        for name in SMALLEST.ways:
            patch.setitem(WAYS, name, replace(WAYS[name], grid=WAYS[name].grid[:1]))
        yield


def tiny_base(folder):
    """A llama of two layers whose tokenizer knows SmolLM2's special tokens, where `make_all` looks for the ancestor."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words.train_from_iterator([], trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet))
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    sizes = dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    config = tf.LlamaConfig(
        vocab_size=len(tokenizer), tie_word_embeddings=True, eos_token_id=2, pad_token_id=0, **sizes
    )
    torch.manual_seed(0)
    tf.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory, request):
    """The folder and what the whole command printed in its smallest size."""
    folder = tiny_base(tmp_path_factory.mktemp("smollm"))
    patch = pytest.MonkeyPatch()
    patch.setattr(abilities, "PROMPTS", abilities.PROMPTS[:2])
    patch.setattr(abilities, "PROSE", abilities.PROSE[-1:])
    patch.setattr(make, "LONGEST", 12)
    patch.setattr(make, "CHAT_LENGTH", 24)
    patch.setattr(make, "CHATS", 1)
    request.addfinalizer(patch.undo)
    with a_candidate_each():
        smollm.main(["--smallest", "--folder", str(folder), "--device", "cpu"])
    (folder / "smollm.jsonl").rename(folder / "runs.jsonl")
    return folder


def test_logits_of_answers_alone_give_the_loss_of_all(made):
    model = tf.AutoModelForImageTextToText.from_pretrained(made / "vlm", dtype=torch.float32)
    processor, pictures = tf.AutoProcessor.from_pretrained(made / "vlm"), Pictures("train")
    samples = draw_many(5, lambda rng: pictures.draw("solve", rng), (0,))
    whole = model(**encode(processor, samples))
    part = model(**of_answers(encode(processor, samples)))
    assert part.logits.shape[1] < whole.logits.shape[1]
    torch.testing.assert_close(part.loss, whole.loss)


def test_the_vlm_is_smolvlm_and_says_its_images_tokens(made):
    model = tf.AutoModelForImageTextToText.from_pretrained(made / "vlm")
    processor = tf.AutoProcessor.from_pretrained(made / "vlm")
    assert type(model).__name__ == "SmolVLMForConditionalGeneration"
    assert model.get_input_embeddings().weight is model.lm_head.weight
    sample = Pictures("test").draw("read", np.random.default_rng(0))
    tokens = processor.apply_chat_template(sample.messages(), tokenize=True, return_dict=True, return_tensors="pt")
    names = processor.tokenizer.convert_ids_to_tokens(tokens["input_ids"][0])
    assert names.count("<image>") == 16 and {"<fake_token_around_image>", "<global-img>"} < {*names}
    assert len(make_processor(made).tokenizer) == len(tf.AutoTokenizer.from_pretrained(made / "base")) + len(IMAGE)


def test_a_question_is_asked_in_smollm2_s_own_form_and_padded_on_the_left(made):
    processor = make_processor(made)
    samples = [text_chain(np.random.default_rng(seed)) for seed in range(4)]
    asked = encode(processor, samples, answered=False)["input_ids"]
    texts = processor.batch_decode(asked)
    assert len({text.count("<|endoftext|>") for text in texts}) > 1
    for sample, text in zip(samples, texts, strict=True):
        prompt = f"<|im_start|>user\n{sample.question}<|im_end|>\n<|im_start|>assistant\n"
        assert text.replace("<|endoftext|>", "") == prompt and text.endswith("assistant\n")
    answered = encode(processor, samples)
    longest = [tf.GenerationConfig.from_pretrained(made / name).max_new_tokens for name in ("expert", "vlm")]
    chain = Pictures("test").draw("solve", np.random.default_rng(0), (5, 5)).answer
    assert longest == [make.LONGEST] * 2 and 5 * len("3+5=8. ") < len(chain) < LONGEST  # a token for each sign at most
    for sample, tokens, labels in zip(samples, answered["input_ids"], answered["labels"], strict=True):
        assert processor.decode(tokens[labels != -100]) == f"{sample.answer}<|im_end|>"


def test_the_vlm_goes_on_with_chats_that_the_ancestor_writes_itself(made, monkeypatch):
    monkeypatch.setattr(make, "CHATS", 2)
    processor = make_processor(made)
    torch.manual_seed(0)
    chats = make.own_chats(made, processor, torch.device("cpu"))
    asked = processor.tokenizer.encode("<|im_start|>user\n")
    assert chats.shape == (128, len(asked) + make.CHAT_LENGTH) and len({*map(tuple, chats.tolist())}) == 128
    assert (chats[:, : len(asked)] == torch.tensor(asked)).all()


def test_an_interrupted_training_goes_on_to_the_same_weights(made, monkeypatch):
    monkeypatch.setattr(make, "EVERY", 2)
    processor, place = make_processor(made), made / "some.state"

    def trained(steps):
        model, rng = (
            tf.AutoModelForCausalLM.from_pretrained(made / "base", dtype=torch.float32),
            np.random.default_rng(0),
        )

        def batch():
            if steps and rng.bit_generator.state == steps[-1]:
                raise KeyboardInterrupt
            seen.append(rng.bit_generator.state)
            return make.encode(processor, [text_chain(rng) for _ in range(2)])

        seen = []
        with contextlib.suppress(KeyboardInterrupt):
            make.train(model, batch, rng, 4, 1e-3, place)
        return model.state_dict(), seen

    whole, states = trained([])
    place.unlink()
    assert len(states) == 4 and len(trained(states)[1]) == 3  # stopped before its last step
    again, resumed = trained([])
    assert resumed == states[2:] and all(torch.equal(again[name], whole[name]) for name in whole)


def test_the_whole_command_goes_on_where_it_was_stopped(made, capsys):
    ledger = open_ledger(made / "runs.jsonl", made)
    assert {entry["way"] for entry in ledger} == set(SMALLEST.ways)
    before = (made / "runs.jsonl").read_bytes()
    with a_candidate_each():
        smollm.main(["--smallest", "--folder", str(made), "--ledger", str(made / "runs.jsonl"), "--device", "cpu"])
    printed = capsys.readouterr().out
    assert (made / "runs.jsonl").read_bytes() == before
    assert json.loads(printed.splitlines()[-1])["missing"] == 0
    assert "DRIFT, Δ from the ancestor, keeping" in printed and "prior-ancestor" in printed
    assert "less LoRA, keeping" in printed and "rate 0.0001, drift alpha 1" in printed


def test_ways_can_be_run_alone_and_on_every_core(made, tmp_path, capsys, monkeypatch):
    ledger, threads, before = str(tmp_path / "runs.jsonl"), [], torch.get_num_threads()
    perform = smollm.perform
    monkeypatch.setattr(smollm, "perform", lambda *given: threads.append(torch.get_num_threads()) or perform(*given))
    torch.set_num_threads(2)
    try:
        smollm.main(["--smallest", "--folder", str(made), "--ledger", ledger, "--device", "cpu", "--ways", "vlm"])
    finally:
        torch.set_num_threads(before)
    assert threads == [2]
    assert {entry["way"] for entry in open_ledger(tmp_path / "runs.jsonl", made)} == {"vlm"}
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["missing"] > 0  # of the whole plan


def test_the_ancestor_has_lost_nothing_and_a_noisy_model_has(made):
    tokenizer = tf.AutoTokenizer.from_pretrained(made / "base")
    model = tf.AutoModelForCausalLM.from_pretrained(made / "base", dtype=torch.bfloat16)
    kept = abilities.abilities(model, tokenizer, made / "base")
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn_like(weight)
    lost = abilities.abilities(model, tokenizer, made / "base")
    assert kept["kl"] == 0 < lost["kl"] and kept["perplexity"] == pytest.approx(len(tokenizer), rel=0.2)


def test_four_bits_cost_something(made, tmp_path):
    console = Console(width=200, record=True, file=open(tmp_path / "out", "w"))
    in_four_bits(made, torch.device("cpu"), 2, console)
    printed = console.export_text()
    rows = [line.split("│")[2:6] for line in printed.splitlines() if "│ 16 bits" in line or "│ NF4" in line]
    stored, _, perplexities, kls = zip(*([cell.strip() for cell in row] for row in rows), strict=True)
    assert stored == ("16 bits", "NF4") * 2 and len({*perplexities}) > 1
    assert float(kls[0]) == 0
    shares = next(line.split("│")[2:5] for line in printed.splitlines() if line.startswith("│ all"))
    noise, delta, along = map(float, shares)
    assert 0.05 < noise < 0.15 and 0 < delta < 1 and along < noise / delta


def test_other_checkpoints_and_other_ways_are_refused(made, tmp_path, monkeypatch):
    monkeypatch.setitem(WAYS, "vlm", replace(WAYS["vlm"], merged=0.5))
    with pytest.raises(ValueError, match=r"line 1 of .* when the way 'vlm' was something else"):
        open_ledger(made / "runs.jsonl", made)
    monkeypatch.undo()
    for name in ("base", "expert", "vlm"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"other")
    with pytest.raises(ValueError, match=r"line 1 of .* on other checkpoints"):
        open_ledger(made / "runs.jsonl", tmp_path)


def test_the_best_candidate_is_examined_and_shown(made, tmp_path):
    plan = Plan(("lora",), seeds=2, tuning_size=4, changes={"size": 4})
    ledger = open_ledger(tmp_path / "runs.jsonl", made)
    names = ("2-3 operations", "4-5 operations", "text reasoning", *PERCEPTION)
    while (run := next(plan.missing(ledger), None)) is not None:
        marks = "f0" if run["settings"]["rate"] == 3e-4 else "80"
        ledger.add(run, {"answers": dict.fromkeys(names, marks), "perplexity": 7.5, "kl": 0.25, "seconds": 1.0})
    assert len(ledger) == 3 + 2 and plan.choose(ledger, "lora") == {"rate": 3e-4}
    console = Console(width=200, record=True, file=open(tmp_path / "out", "w"))
    report(ledger, plan, console)
    (row,) = (line for line in console.export_text().splitlines() if "LoRA" in line and "7.5" in line)
    assert row.count("100 ± 0") == 5 and "0.25" in row and "rate 0.0003" in row


def test_ways_are_compared_in_pairs_and_single_settings_changed_afterwards(made, tmp_path):
    ways, change = ("lora-keep", "drift-ancestor-keep"), {"drift_target": "delta"}
    plan = Plan(ways, {"drift-ancestor-keep": (change,)}, seeds=2, tuning_size=4, changes={"size": 4})
    ledger = open_ledger(tmp_path / "runs.jsonl", made)
    names = ("2-3 operations", "4-5 operations", "text reasoning", *PERCEPTION)
    marks = {("lora-keep", 0): "80", ("lora-keep", 1): "80", ("drift-ancestor-keep", 0): "c0"}
    planned = []
    while (run := next(plan.missing(ledger), None)) is not None:
        planned.append((run["way"], run["split"], run["settings"].get("drift_target")))
        right = dict.fromkeys(names, marks.get((run["way"], run["seed"]), "f0"))
        ledger.add(run, {"answers": right, "perplexity": 7.5, "kl": 0.25, "seconds": 1.0})
    assert planned[-1] == ("drift-ancestor-keep", "validation", "delta") and len(planned) == 2 * (3 + 2) + 1
    console = Console(width=200, record=True, file=open(tmp_path / "out", "w"))
    report(ledger, plan, console)
    printed = console.export_text()
    half = 12.7062 * 25  # Student's t of two seeds, whose differences are 25 and 75 points
    assert f"50.0 [{50 - half:.1f}, {50 + half:.1f}]" in printed and f"-50.0 [{-50 - half:.1f}" in printed
    (line,) = (line for line in printed.splitlines() if "target delta" in line)
    assert "rate 0.0001, drift target delta " in line and line.count("100") == 5


def test_the_whole_study_is_planned_in_order_of_what_matters(made, tmp_path):
    ledger = open_ledger(tmp_path / "runs.jsonl", made)
    planned = [run["way"] for run in FULL.missing(ledger)]
    assert planned[0] == "vlm" and set(planned) == set(WAYS)


def test_a_converter_that_is_not_there_is_an_error_and_nothing_is_printed(made, tmp_path):
    console = Console(width=200, record=True, file=open(tmp_path / "out", "w"))
    with pytest.raises(RuntimeError, match=r"wrote no language model\.gguf: .*No such file"):
        round_trip(made, tmp_path, console)
    assert not console.export_text()


def test_another_expert_concerns_those_ways_alone_that_use_it(made, tmp_path):
    for name in ("base", "expert", "vlm"):
        (tmp_path / name).mkdir()
        weights = (made / name / "model.safetensors").read_bytes()
        (tmp_path / name / "model.safetensors").write_bytes(b"other" if name == "expert" else weights)
    lines = (made / "runs.jsonl").read_text().splitlines(keepends=True)
    for line in lines:
        (tmp_path / "one.jsonl").write_text(line)
        if json.loads(line)["run"]["way"] in {"vlm", "lora-keep"}:
            assert len(open_ledger(tmp_path / "one.jsonl", tmp_path)) == 1
        else:
            with pytest.raises(ValueError, match="on other checkpoints"):
                open_ledger(tmp_path / "one.jsonl", tmp_path)
    assert {key for key, way in WAYS.items() if "expert" not in way.checkpoints} == {"vlm", "lora", "lora-keep"}
