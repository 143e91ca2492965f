"""KeepSet: what the file holds, where it is found, which processors and models it is for, and files that are none."""

import copy
import json
import os
import shutil
import types
import warnings

import pytest
import torch
import transformers as tf
from hub import Hub
from keep_sets import SETTINGS, count_decoded, make
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny_vlm
from tiny_vlm import tokenizer

from drift_peft import KeepSet, make_keep_set
from drift_peft.keeping import file as keeping_file
from drift_peft.keeping import keep_summary, training_samples
from drift_peft.keeping.page import render_page

DTYPES = {"images": "U8", "image_ends": "I64", "samples": "I32", "tokens": "I32", "token_ends": "I64"}
DTYPES |= {"top_tokens": "I32", "top_logprobs": "F32"}


@pytest.fixture
def keep_set(folder):
    return KeepSet.load(folder / "keep.safetensors")


@pytest.fixture(scope="module")
def processor(folder):
    return tf.AutoProcessor.from_pretrained(folder / "base")


def header(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()[KeepSet.HEADER_KEY])


def rewritten(keep_set, path, change=None, **changes):
    """The set with other tensors or another header."""
    tensors = load_file(keep_set.path)
    if change:
        change(tensors)
    said = {key: value for key, value in {**header(keep_set.path), **changes}.items() if value is not None}
    save_file(tensors, path, metadata={KeepSet.HEADER_KEY: json.dumps(said)})
    return path


def test_samples(keep_set):
    assert len(keep_set) == 20 and repr(keep_set).endswith("keep.safetensors', 20 samples, k 5)")
    assert [sample.answer for sample in keep_set] == keep_set.metadata["answers"]
    for sample in keep_set:
        length = len(sample.tokens)
        assert sample.image.mode == "RGB" and sample.top_tokens.shape == sample.top_logprobs.shape == (length, 5)
        assert sample.tokens.dtype == sample.top_tokens.dtype == torch.int64
        assert sample.top_logprobs.dtype == torch.float32
        assert (sample.top_logprobs.diff(dim=-1) <= 0).all() and (sample.top_logprobs <= 0).all()
        assert sample.top_tokens[:, 0].equal(sample.tokens)  # greedy, and nothing was suppressed here
    assert keep_set[-1].question == keep_set[19].question
    every_fifth = [keep_set.metadata["answers"][i] for i in (17, 12, 7)]
    assert [sample.answer for sample in keep_set[-3:5:-5]] == every_fifth and keep_set[20:] == []
    for i in (20, -21):
        with pytest.raises(IndexError, match=f"keep.safetensors has 20 samples, and none of number {i}"):
            keep_set[i]


def test_pictures_are_decoded_where_they_are_looked_at_and_one_at_a_time(keep_set, monkeypatch):
    """A decoded photograph takes tens of MB, and a keep set has hundreds."""
    alive = count_decoded(monkeypatch, keeping_file)
    whole = [*keep_set]
    assert max(alive) == len(keep_set)
    for sample, said in zip(whole, keep_set.unpictured(), strict=True):
        assert said.image is None and said.tokens.equal(sample.tokens) and said.top_tokens.equal(sample.top_tokens)
        assert said.top_logprobs.equal(sample.top_logprobs)
        assert all(getattr(said, name) == getattr(sample, name) for name in ("question", "kind", "answer"))
    del whole, sample
    alive.clear()
    keep_summary(keep_set)
    training_samples(keep_set)
    assert not alive
    render_page(keep_set)
    assert alive == [1] * len(keep_set)


def test_what_the_header_says(keep_set, folder, processor):
    said = header(keep_set.path)
    assert said == keep_set.metadata
    assert said["vlm"] == {"id": f"{folder / 'base'}", "revision": None} and said["model_type"] == "qwen2_5_vl"
    assert (said["format"], said["k"], said["seed"], said["vocabulary"]) == (1, 5, 0, 64)
    assert said["processor"] == type(processor).__name__ and said["tokenizer"]["size"] == 64
    assert said["generation"] == {"max_new_tokens": 8, "load_in_4bit": False, "server": False}
    with safe_open(keep_set.path, framework="pt") as file:
        assert {key: file.get_slice(key).get_dtype() for key in file.keys()} == DTYPES
        assert len(file.get_tensor("image_ends")) == 7  # each image once


def test_it_is_for_one_tokenizer_and_class_of_processor(keep_set, processor):
    keep_set.check(processor)
    words = tokenizer(64)
    words.add_tokens(["<think>"])  # tokens that were added since then are no matter
    keep_set.check(_like(processor, words))
    words = tokenizer(63)
    words.add_tokens(["other"])
    with pytest.raises(ValueError, match=r"was made with another tokenizer than this \w+'s: make one of your model"):
        keep_set.check(_like(processor, words))
    with pytest.raises(
        ValueError, match=r"was made with the processor \w+, and not with SimpleNamespace: make one of your model"
    ):
        keep_set.check(types.SimpleNamespace(tokenizer=processor.tokenizer))


@pytest.mark.parametrize(
    "change",
    [
        lambda p: setattr(p.image_processor, "size", {"shortest_edge": 64, "longest_edge": 64}),
        lambda p: setattr(p, "chat_template", "{{ 'many many many ' }}" + p.chat_template),
    ],
    ids=["resolution", "template"],
)
def test_it_says_where_it_was_asked_in_another_way(keep_set, folder, processor, change, tmp_path):
    """The VLM's answers are to other inputs then, and keeping would pull an untouched VLM."""
    other = copy.deepcopy(processor)
    change(other)
    with pytest.warns(UserWarning, match=r"another resolution .* chat template: its question \d+ had \d+ tokens"):
        keep_set.check(other)
    mine = make_keep_set(folder / "base", folder / "pictures", tmp_path / "k", processor=other, **SETTINGS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mine.check(other)
        keep_set.check(processor)


def test_another_resolution_shows_in_the_largest_picture(folder, processor, tmp_path):
    """And not in the first one, where that is as small as the setting allows."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i, width in enumerate((8, 64, 8, 8)):
        Image.new("RGB", (width, width), (i, 0, 0)).save(pictures / f"{i}.png")
    small = {"size": {"shortest_edge": 64, "longest_edge": 64}}
    for seed in range(4):
        made = make_keep_set(folder / "base", pictures, tmp_path / f"{seed}", **SETTINGS | {"samples": 4}, seed=seed)
        assert made[made.metadata["prompt_sample"]].image.width == 64
        other = type(processor).from_pretrained(folder / "base", **small)
        with pytest.warns(UserWarning, match="another resolution"):
            made.check(other)


def test_a_set_that_is_written_to_while_it_is_read_is_told(folder, tmp_path):
    copied = shutil.copy(folder / "keep.safetensors", tmp_path / "k.safetensors")
    keep_set = KeepSet.load(copied)
    assert keep_set[0].answer
    with open(copied, "r+b") as file:
        file.seek(-64, 2)
        file.write(bytes(64))
    os.utime(copied, ns=(1, 1))
    shutil.move(copied, tmp_path / "moved")
    assert keep_set[0].answer  # of the file that it has open
    shutil.move(tmp_path / "moved", copied)
    with pytest.raises(
        ValueError, match=r"k\.safetensors has changed while .* was read, so that the result would be a"
    ):
        keep_set[0]


def test_a_processor_by_its_settings(folder, tmp_path):
    size = {"shortest_edge": 64, "longest_edge": 64}
    mine = make_keep_set(folder / "base", folder / "pictures", tmp_path / "k", processor={"size": size}, **SETTINGS)
    whole = make_keep_set(folder / "base", folder / "pictures", tmp_path / "w", **SETTINGS)
    assert mine.metadata["prompt_tokens"] < whole.metadata["prompt_tokens"]


def _like(processor, words):
    """A processor of the same class with another tokenizer."""
    other = copy.copy(processor)
    other.tokenizer = words
    return other


def test_it_is_for_one_type_of_model(keep_set):
    keep_set.check_model(tiny_vlm("qwen2_5_vl", seed=1))  # whatever its weights are
    with pytest.raises(ValueError, match=r"holds a qwen2_5_vl's answers, and the model is a llava_next: make one"):
        keep_set.check_model(tiny_vlm("llava_next"))
    smaller = tiny_vlm("qwen2_5_vl")
    smaller.resize_token_embeddings(60)
    with pytest.raises(ValueError, match="knows 64 tokens, and the model 60: make one"):
        keep_set.check_model(smaller)


def test_folder_and_hub(keep_set, folder, tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "keep.safetensors").write_bytes(keep_set.path.read_bytes())
    assert KeepSet.load(tmp_path / "set").sha256 == keep_set.sha256
    with pytest.raises(FileNotFoundError, match=r"holds no keep\.safetensors"):
        KeepSet.load(folder / "base")
    with pytest.raises(FileNotFoundError, match=r"there is no file gone.safetensors"):
        KeepSet.load("gone.safetensors")
    (folder / "base" / "README.md").write_text("---\nlicense: mit\n---\n")
    with Hub() as hub:
        hub.use(monkeypatch, tmp_path / "cache")
        commit = keep_set.push_to_hub("someone/keep", revision="v2")
        assert "/commit/" in commit and {*hub.files("someone/keep", "v2")} >= {"keep.safetensors", "README.md"}
        pulled = KeepSet.load("someone/keep@v2")
        assert pulled.sha256 == keep_set.sha256 and pulled.source == "someone/keep@v2"
        assert pulled[3].image.tobytes() == keep_set[3].image.tobytes()
        card = hub.files("someone/keep", "v2")["README.md"].decode()
        with pytest.raises(ValueError, match="no/hub/id is no hub id"):
            keep_set.push_to_hub("no/hub/id")
        hub.fail("/api/models/someone/keep/commit", status=403)
        with pytest.raises(OSError, match=r"could not be uploaded to someone/keep: "):
            keep_set.push_to_hub("someone/keep")
    (folder / "base" / "README.md").unlink()
    assert 'KeepSet.load("someone/keep@v2")' in card and keep_set.sha256 in card
    assert "| count | 3 |" in card and card.rstrip().endswith("gives this licence: mit")
    assert "20 answers" in card and "(7 of them)" in card


def drop(name):
    return lambda tensors: tensors.pop(name)


def replace(name, value):
    return lambda tensors: tensors.update({name: value(tensors[name])})


@pytest.mark.parametrize(
    "change",
    [
        *map(drop, DTYPES),
        replace("images", lambda t: t[:-1].clone()),
        replace("image_ends", lambda t: t.flip(0)),
        replace("token_ends", lambda t: t[:-1].clone()),
        replace("samples", lambda t: t + 40),
        replace("samples", lambda t: t - 1),
        replace("tokens", lambda t: t.long()),
        replace("top_tokens", lambda t: t[:, :4].clone()),
        replace("top_logprobs", lambda t: t.half()),
        replace("top_logprobs", lambda t: t / 0),
        replace("top_logprobs", lambda t: t * torch.nan),
        replace("top_tokens", lambda t: t + 64),
        replace("top_tokens", lambda t: t - 64),
        replace("tokens", lambda t: t + 64),
        replace("tokens", lambda t: t - 64),
        lambda tensors: tensors.update(more=torch.zeros(1)),
    ],
)
def test_tensors_that_are_not_what_the_header_says(change, keep_set, tmp_path):
    path = rewritten(keep_set, tmp_path / "k.safetensors", change)
    with pytest.raises(ValueError, match=r"k.safetensors is a damaged keep set: make or fetch it again$"):
        KeepSet.load(path)


@pytest.mark.parametrize(
    "key",
    [
        "vlm",
        "model_type",
        "vocabulary",
        "tokenizer",
        "processor",
        "image_mode",
        "k",
        "seed",
        "generation",
        "questions",
        "answers",
    ],
)
def test_headers_without_something(key, keep_set, tmp_path):
    with pytest.raises(ValueError, match=r"k\.safetensors is a damaged keep set"):
        KeepSet.load(rewritten(keep_set, tmp_path / "k.safetensors", **{key: None}))


def test_files_that_are_no_keep_set(keep_set, tmp_path):
    def refused(message):
        with pytest.raises(ValueError, match=message) as caught:
            KeepSet.load(path)
        assert "\n" not in str(caught.value)

    path = tmp_path / "k.safetensors"
    path.write_bytes(keep_set.path.read_bytes()[:-1])
    refused("is no keep set: it is truncated or no safetensors file")
    path.write_text("nothing of the kind")
    refused("is no keep set: it is truncated or no safetensors file")
    save_file({"weight": torch.zeros(2)}, path)
    refused("is a safetensors file but no keep set: make one with `drift-peft keep make`")
    save_file({"weight": torch.zeros(2)}, path, metadata={KeepSet.HEADER_KEY: "{"})
    refused("is a damaged keep set")
    rewritten(keep_set, path, format=2)
    refused("is of format 2, not 1: read this keep set with another drift_peft")


def test_a_full_disk_leaves_nothing(folder, tmp_path):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, hard))  # each batch fits, the whole set does not
    try:
        with pytest.raises(OSError, match=r"written.safetensors could not be written: .*File too large"):
            make(folder, tmp_path / "k.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["k.safetensors.partial"]
    assert make(folder, tmp_path / "k.safetensors").path.read_bytes() == (folder / "keep.safetensors").read_bytes()
