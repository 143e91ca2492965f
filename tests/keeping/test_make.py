"""Making a keep set: the VLM's own greedy answers, whatever is beside them in a batch; same call, same bytes."""

import json
import shutil
import warnings
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import transformers as tf
from hub import Hub
from keep_sets import ENDS, PLACES, SETTINGS, dense_logprobs, make, save_folder, single_inputs
from peft import LoraConfig, get_peft_model
from PIL import Image

import drift_peft.demo
from drift_peft import KeepSet, make_keep_set
from drift_peft.keeping.pictures import read_pictures
from drift_peft.keeping.questions import BUILT_IN, read_questions


def load(folder):
    processor = tf.AutoProcessor.from_pretrained(folder / "base")
    return tf.AutoModelForImageTextToText.from_pretrained(folder / "base").eval(), processor


@pytest.fixture(scope="module", params=PLACES)
def made(request, tmp_path_factory):
    folder = save_folder(tmp_path_factory.mktemp(request.param), request.param)
    return make(folder), *load(folder), PLACES[request.param], folder


def test_logprobs_are_the_models_own(made):
    keep_set, model, processor, *_ = made
    model = model.double()
    try:
        for sample in keep_set:
            expected = dense_logprobs(model, processor, sample)
            top = expected.topk(5)
            assert sample.top_tokens.equal(top.indices)
            torch.testing.assert_close(sample.top_logprobs.double(), top.values, atol=1e-4, rtol=0)
    finally:
        model.float()


def test_answers_are_those_of_generate_one_by_one(made):
    keep_set, model, processor, places, _ = made
    greedy = {"do_sample": False, "repetition_penalty": 1.0, "temperature": None, "suppress_tokens": places}
    lengths = set()
    for sample in keep_set:
        inputs = single_inputs(processor, sample)
        expected = model.generate(**inputs, max_new_tokens=8, eos_token_id=ENDS, **greedy)
        assert sample.tokens.equal(expected[0, inputs["input_ids"].shape[1] :])
        words, last = processor.tokenizer, int(sample.tokens[-1])
        ended = last in ENDS and last in words.all_special_ids
        assert sample.answer == words.decode(sample.tokens[:-1] if ended else sample.tokens)
        lengths.add(len(sample.tokens))
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied or len(lengths) > 1  # so that there was padding; a random model that is tied says one word for ever


def test_what_is_asked(made):
    keep_set, *_ = made
    built_in = read_questions()
    assert len(keep_set) == 20 and sum(keep_set.kinds.values()) == 20
    assert {(sample.kind, sample.question) for sample in keep_set} <= {*built_in}
    assert max(keep_set.kinds.values()) - min(keep_set.kinds.values()) <= 1  # the kinds take turns
    asked = [(keep_set.image_of(i), keep_set[i].question) for i in range(20)]
    assert len({*asked}) == 20 and {image for image, _ in asked} == {*range(7)}


def test_the_same_call_gives_the_same_bytes(folder):
    again = make(folder, "again.safetensors")
    assert again.path.read_bytes() == (folder / "keep.safetensors").read_bytes()
    other = make(folder, "other.safetensors", samples=5, seed=1)
    drawn = [sample.image.tobytes() for sample in other]
    assert drawn != [again[i].image.tobytes() for i in range(5)]


def test_batches_change_nothing(folder):
    whole, single = KeepSet.load(folder / "keep.safetensors"), make(folder, "single.safetensors", batch_size=1)
    for a, b in zip(whole, single, strict=True):
        assert a.tokens.equal(b.tokens) and a.top_tokens.equal(b.top_tokens)
        torch.testing.assert_close(a.top_logprobs, b.top_logprobs, atol=1e-5, rtol=0)


def test_the_whole_vocabulary(folder):
    keep_set = make(folder, "whole.safetensors", samples=3, top_k=64)
    for sample in keep_set:
        assert sample.top_logprobs.exp().sum(-1).allclose(torch.ones(len(sample.tokens)), atol=1e-5)


def test_a_model_in_memory_is_left_as_it_was(folder, tmp_path):
    model, processor = load(folder)
    own = model.generation_config
    model.train()
    model.model.visual.eval()
    before = [module.training for module in model.modules()]
    keep_set = make_keep_set(model, folder / "pictures", tmp_path / "k.safetensors", processor=processor, **SETTINGS)
    assert [module.training for module in model.modules()] == before and model.generation_config is own
    assert all(parameter.grad is None for parameter in model.parameters())
    for a, b in zip(keep_set, KeepSet.load(folder / "keep.safetensors"), strict=True):
        assert a.tokens.equal(b.tokens) and a.top_logprobs.equal(b.top_logprobs)


def test_a_model_with_adapters_answers_with_them(folder, tmp_path):
    model, processor = load(folder)
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    given = folder / "pictures", tmp_path / "k.safetensors"
    with pytest.warns(UserWarning, match="The model answers with its adapter: unless that is meant, give the VLM"):
        keep_set = make_keep_set(adapted, *given, processor=processor, **{**SETTINGS, "samples": 4})
    for sample in keep_set:
        expected = dense_logprobs(adapted.double(), processor, sample).topk(5)
        torch.testing.assert_close(sample.top_logprobs.double(), expected.values, atol=1e-4, rtol=0)
        adapted.float()
    plain = KeepSet.load(folder / "keep.safetensors")
    assert any(not a.top_logprobs.equal(b.top_logprobs) for a, b in zip(keep_set, plain, strict=False))


def test_a_model_on_the_hub(folder, tmp_path, monkeypatch):
    with Hub() as hub:
        hub.use(monkeypatch, tmp_path / "cache")
        commit = hub.add("org/vlm", folder / "base", "v1")
        hub.add("org/vlm", {"config.json": b"{}"})
        keep_set = make(folder, tmp_path / "k.safetensors", model_or_id="org/vlm@v1")
    assert keep_set.metadata["vlm"] == {"id": "org/vlm", "revision": commit}
    for a, b in zip(keep_set, KeepSet.load(folder / "keep.safetensors"), strict=True):
        assert a.tokens.equal(b.tokens) and a.top_logprobs.equal(b.top_logprobs)


def test_a_vlm_of_gray_images(folder, tmp_path):
    """The demo's, whose processor normalizes one channel."""
    base = Path(drift_peft.demo.__file__).parent / "checkpoints" / "vlm"
    images = [Image.new("L", (36, 12), gray) for gray in range(0, 250, 10)]
    keep_set = make(folder, tmp_path / "k.safetensors", model_or_id=base, images=images)
    assert {sample.image.getpixel((0, 0)) for sample in keep_set} <= {*range(0, 250, 10)}
    assert keep_set.metadata["image_mode"] == "L" and {sample.image.mode for sample in keep_set} == {"L"}


def test_four_bit(folder, tmp_path):
    keep_set = make(folder, "nf4.safetensors", load_in_4bit=True, samples=4)
    assert keep_set.metadata["generation"]["load_in_4bit"] is True
    full = KeepSet.load(folder / "keep.safetensors")
    assert not keep_set[0].top_logprobs[0].equal(full[0].top_logprobs[0])


# Questions


def test_built_in_questions():
    questions = read_questions()
    kinds = {kind for kind, _ in questions}
    assert {"describe", "read", "count", "position", "color", "short", "follow_up"} == kinds
    assert len({*questions}) == len(questions) > 30
    assert len({kind for kind, _ in questions[: len(kinds)]}) == len(kinds)
    assert read_questions(BUILT_IN) == questions


def test_a_question_ends_at_its_line_feed(tmp_path):
    (tmp_path / "q.txt").write_bytes("count\tHow many\u2028are there?\r\n".encode())
    assert read_questions(tmp_path / "q.txt") == [("count", "How many\u2028are there?")]


def test_own_questions(folder, tmp_path):
    file = tmp_path / "q.txt"
    file.write_text("# mine\n\nsum\thow many ?\ndigit\twhich digit ?\nsum\t3 + 4 = ?\n", encoding="utf-8")
    keep_set = make(folder, "own.safetensors", questions=file, samples=6)
    assert keep_set.kinds == {"sum": 4, "digit": 2}
    assert [keep_set[i].question for i in range(3)] == ["how many ?", "which digit ?", "3 + 4 = ?"]
    pairs = make(folder, "pairs.safetensors", questions=[("sum", "how many ?")], samples=2)
    assert pairs.kinds == {"sum": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"sum how many ?\n", "line 1 of .*q.txt is no question: write its kind, a tab, and the question"),
        (b"# a\nsum\t\n", "line 2 of .*q.txt is no question"),
        (b"a\tb\n\na\tb\n", "line 3 of .*q.txt is the same question as line 1"),
        (b"# nothing\n", "q.txt holds no question"),
        (b"a\t\xff\xfe\n", "q.txt are no UTF-8 text"),
    ],
)
def test_wrong_questions(text, message, folder, tmp_path):
    (tmp_path / "q.txt").write_bytes(text)
    with pytest.raises(ValueError, match=message):
        make_keep_set(folder / "base", folder / "pictures", tmp_path / "k.safetensors", tmp_path / "q.txt")
    assert [*tmp_path.iterdir()] == [tmp_path / "q.txt"]


@pytest.mark.parametrize("given", ["questions", "images"])
def test_what_a_keep_set_is_made_of_is_not_replaced_by_it(folder, tmp_path, given):
    (tmp_path / "data.jsonl").write_text("a\thow many ?\n")
    with pytest.raises(FileExistsError, match=r"data.jsonl, which it is made of: name another file"):
        make(folder, tmp_path / "data.jsonl", overwrite=True, **{given: tmp_path / "data.jsonl"})
    assert (tmp_path / "data.jsonl").read_text() == "a\thow many ?\n"


def test_a_question_that_holds_a_place_of_images_is_refused(made, tmp_path, monkeypatch):
    """Before an image is read: the VLM has none for that place."""
    *_, folder = made
    monkeypatch.setattr("drift_peft.keeping.make.read_pictures", Mock(side_effect=AssertionError))
    (tmp_path / "q.txt").write_text("a\thow many ?\nb\tis <image> it ?\n")
    for questions, source in ((tmp_path / "q.txt", r"\S+q.txt"), ([("b", "is <image> it ?")], "questions")):
        with pytest.raises(ValueError, match=rf"^{source} holds the question 'is <image> it \?', in which <image> st"):
            make(folder, tmp_path / "k.safetensors", questions=questions)


# What is refused before any work


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"samples": 0}, ValueError, "samples must be a whole number ≥ 1, got 0"),
        ({"batch_size": 2.0}, ValueError, "batch_size must be a whole number, got 2.0"),
        ({"seed": "1"}, ValueError, "seed must be a whole number, got '1'"),
        ({"top_k": 65}, ValueError, r"top_k=65 \(--top-k\) is larger than the vocabulary of \S+base, which has 64 tok"),
        ({"questions": []}, ValueError, "questions is empty: give pairs of a kind and a question, or leave it out for"),
        (
            {"questions": ["what?"]},
            ValueError,
            r"questions must be .*entry of it \(a string, a string\), got",
        ),
        ({"questions": [("a", " ")]}, ValueError, r"questions holds \('a', ' '\), which is half empty"),
        ({"questions": [("a", "b")] * 2}, ValueError, r"questions holds \('a', 'b'\) twice"),
        ({"questions": [["a", "b"], ("a", "b ")]}, ValueError, r"questions holds \('a', 'b'\) twice"),
        ({"questions": "none.txt"}, FileNotFoundError, "there is no file of questions none.txt"),
        ({"samples": 10**4}, ValueError, "10000 is too many for 7 different images with 36 questions each: .*=252"),
        ({"api_key": "key"}, ValueError, r"api_key goes with server \(--server\)"),
        ({"images": "none.jsonl"}, FileNotFoundError, "there is no file none.jsonl"),
        ({"server": "localhost"}, ValueError, "server localhost is no address such as http://localhost:8000/v1"),
        (
            {"server": "http://x/v1?a=b"},
            ValueError,
            "such as http://localhost:8000/v1, without a password or a query",
        ),
        (
            {"server": "http://x/v1", "load_in_4bit": True},
            ValueError,
            "the server decides how its model is loaded: leave out load_in_4bit",
        ),
    ],
)
def test_refused(changes, error, message, folder, tmp_path):
    arguments = {"model_or_id": folder / "base", "images": folder / "pictures", **SETTINGS, **changes}
    with pytest.raises(error, match=message) as caught:
        make_keep_set(output=tmp_path / "k.safetensors", **arguments)
    assert "\n" not in str(caught.value) and not [*tmp_path.iterdir()]


def test_settings_of_a_processor_that_it_does_not_have(folder, tmp_path):
    """transformers passes over them, and the set would be made at the default resolution."""
    with pytest.raises(ValueError, match=r"Processor has no setting max_pixel: did you mean max_pixels\?$"):
        make(folder, tmp_path / "k.safetensors", processor={"max_pixel": 64})
    assert not [*tmp_path.iterdir()]
    fine = {"use_fast": False, "local_files_only": True, "extra_special_tokens": {}, "do_resize": True}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        make(folder, tmp_path / "fine.safetensors", processor=fine, samples=2)
    with pytest.warns(UserWarning, match="has no setting sharpness that is known here: it may be without effect"):
        make(folder, tmp_path / "k.safetensors", processor={"sharpness": 1})


def test_outputs_that_are_refused(folder, tmp_path):
    (tmp_path / "k.safetensors").write_text("mine")
    arguments = folder / "base", folder / "pictures"
    with pytest.raises(FileExistsError, match=r"k.safetensors exists: name another file, or pass overwrite=True"):
        make_keep_set(*arguments, tmp_path / "k.safetensors")
    with pytest.raises(IsADirectoryError, match=r"is a folder: name a file, such as \S+keep.safetensors"):
        make_keep_set(*arguments, tmp_path)
    assert (tmp_path / "k.safetensors").read_text() == "mine"
    assert len(make_keep_set(*arguments, tmp_path / "k.safetensors", overwrite=True, **SETTINGS)) == 20


def without(folder, target, *names, **config):
    target.mkdir()
    for file in folder.iterdir():
        if file.name not in names:
            (target / file.name).write_bytes(file.read_bytes())
    if config:
        file = target / "processor_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return target


def test_models_that_cannot_be_asked(folder, tmp_path):
    def refused(base, message, **arguments):
        with pytest.raises(ValueError, match=message) as caught:
            make_keep_set(base, folder / "pictures", tmp_path / "k.safetensors", **{**SETTINGS, **arguments})
        assert "\n" not in str(caught.value) and not (tmp_path / "k.safetensors.partial").exists()

    base = folder / "base"
    refused(without(base, tmp_path / "mute", "chat_template.jinja"), r"mute has no chat template, which says where")
    blind = without(base, tmp_path / "blind", "processor_config.json", "preprocessor_config.json")
    refused(blind, r"blind has no processor")
    model, processor = load(folder)
    refused(model, "give the processor of the model that is in memory: processor=")
    refused(model, "load_in_4bit goes with a model's id", load_in_4bit=True, processor=processor)
    refused(model, "with server=, give the id", server="http://localhost:1/v1", processor=processor)
    processor.tokenizer.pad_token = None
    refused(base, r"the tokenizer of \S+base has no padding token", processor=processor)
    model.lm_head.weight.data.fill_(float("nan"))
    processor.tokenizer.pad_token = "<pad>"
    refused(model, "gives NaN or infinite logits", processor=processor)
    with pytest.raises(FileNotFoundError):
        make_keep_set(tmp_path / "nothing.safetensors", folder / "pictures", tmp_path / "k.safetensors")


def test_remote_code_never_runs(folder, tmp_path):
    base = without(folder / "base", tmp_path / "base", auto_map={"AutoProcessor": "mine.Mine"}, processor_class="Mine")
    (base / "mine.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(ValueError, match="base has no processor that transformers can load"):
        make_keep_set(base, folder / "pictures", tmp_path / "k.safetensors", **SETTINGS)


# Images


def pixels(keep_set):
    return sorted({sample.image.tobytes() for sample in keep_set})


@pytest.fixture(scope="module")
def pictures(folder):
    return sorted((folder / "pictures").glob("*.png"))


def test_wherever_the_images_are(folder, pictures, tmp_path):
    """A folder with subfolders, training data of every layout, a data set, paths, PIL images, bytes: the same set."""
    datasets = pytest.importorskip("datasets")
    expected = pixels(make(folder, tmp_path / "a.safetensors"))
    assert len(expected) == 7
    nested = tmp_path / "nested" / "deeper"
    nested.mkdir(parents=True)
    for path in pictures:
        (nested / path.name).write_bytes(path.read_bytes())
    turns = [{"role": "user", "content": "<image>how many ?"}, {"role": "assistant", "content": "5"}]
    rows = [json.dumps({"messages": turns, "images": [f"deeper/{path.name}"]}) for path in pictures[:3]]
    for path in pictures[3:]:
        part = {"type": "image_url", "image_url": {"url": f"deeper/{path.name}"}}
        rows.append(json.dumps({"messages": [{"role": "user", "content": [part, {"type": "text", "text": "?"}]}]}))
    (tmp_path / "nested" / "data.jsonl").write_text("\n".join([*rows, "", rows[0]]))
    (tmp_path / "nested" / "data.json").write_text(json.dumps([json.loads(row) for row in rows]))
    one = {"images": [f"nested/deeper/{path.name}" for path in pictures]}
    (tmp_path / "pretty.json").write_text(json.dumps(one, indent=2))
    data = datasets.Dataset.from_dict({"images": [[str(path)] for path in pictures]})
    data = data.cast_column("images", datasets.List(datasets.Image()))
    data.to_parquet(tmp_path / "data.parquet")
    sources = {
        "folder": tmp_path / "nested",
        "jsonl": tmp_path / "nested" / "data.jsonl",
        "json": tmp_path / "nested" / "data.json",
        "one row over several lines": tmp_path / "pretty.json",
        "parquet": tmp_path / "data.parquet",
        "dataset": data,
        "dataset of arrays": data.with_format("numpy"),
        "paths": pictures,
        "bytes": [path.read_bytes() for path in pictures],
        "pictures": [Image.open(path) for path in pictures],
        "a column": data.rename_column("images", "image").map(lambda row: {"image": row["image"][0]})["image"],
        "rows": [{"images": [Image.open(path)], "messages": turns} for path in pictures],
    }
    for name, source in sources.items():
        assert pixels(make(folder, tmp_path / f"{name}.safetensors", images=source)) == expected, name


def test_photos_are_upright_and_their_files_as_they_were(folder, tmp_path):
    image = Image.new("RGB", (16, 24), (200, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(tmp_path / "photo.jpg", exif=exif)
    keep_set = make(folder, tmp_path / "k.safetensors", images=tmp_path, samples=2)
    assert keep_set[0].image.size == (24, 16) and keep_set[0].image.mode == "RGB"
    assert keep_set.image_file(0) == (tmp_path / "photo.jpg").read_bytes()


def test_images_that_are_refused(folder, pictures, tmp_path):
    def refused(images, message, error=ValueError):
        with pytest.raises(error, match=message) as caught:
            make(folder, tmp_path / "k.safetensors", images=images)
        assert "\n" not in str(caught.value) and not [*tmp_path.glob("k.*")]

    empty, broken = tmp_path / "empty", tmp_path / "broken"
    empty.mkdir(), broken.mkdir()
    refused(empty, r"there are no images in \S+empty: it has no file of the kinds .png, .jpg")
    (broken / "a.png").write_bytes(pictures[0].read_bytes()[:60])
    refused(broken, r"a.png is a broken image or none: take it out")
    refused(
        pictures[0], r"0.png is no data set: name a folder of pictures, or a file of the kinds .json, .jsonl, .parquet"
    )
    refused(tmp_path / "gone", r"gone, which is no file or folder here, cannot be read as a data set")
    refused([], "there are no images in what was given")
    numbered = type("Numbered", (), {"__getitem__": lambda self, i: [str(pictures[0])][i]})()  # as a data set of torch
    assert len(read_pictures(numbered, 5, 0)) == 1
    for wrong in (5, None, Image.new("RGB", (8, 8)), b"PNG", {"train": [str(pictures[0])]}):
        kind = type(wrong).__name__
        refused(wrong, rf"^images must be a folder, a data set \(one split of it\) or a list of images, got {kind}$")
    splits = pytest.importorskip("datasets").DatasetDict
    refused(splits(), r"\(one split of it\) or a list of images, got DatasetDict$")
    refused([3], "image 0 is '3': give a path, the bytes of a file, or a picture of PIL")
    refused(["gone.png"], "there is no image gone.png, which is image 0", FileNotFoundError)
    refused(["https://example.com/a.png"], "is the web address https://example.com/a.png: download it")
    refused(["data:image/png;base64,###"], "is a data: address that is not base64")
    (tmp_path / "data.jsonl").write_text('{"images": ["a.png"]}\n{"images"')
    refused(tmp_path / "data.jsonl", r"data.jsonl is no valid JSON")
    (tmp_path / "data.jsonl").write_text('{"messages": [{"role": "user", "content": "hello"}]}')
    refused(tmp_path / "data.jsonl", r"there are no images in \S+data.jsonl")


def test_without_datasets(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    (tmp_path / "data.parquet").write_bytes(b"")
    with pytest.raises(ImportError, match=r'needs the package datasets: pip install "drift_peft\[recipes\]"'):
        make(folder, tmp_path / "k.safetensors", images=tmp_path / "data.parquet")
    assert len(make(folder, tmp_path / "k.safetensors", samples=2)) == 2  # a folder needs none


def test_without_pillow(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with monkeypatch.context() as patch:  # as transformers says it, which looks for pillow once
        lacking = ImportError("AutoImageProcessor requires the PIL library. Install it with pip:\n`pip install`")
        patch.setattr(tf.AutoProcessor, "from_pretrained", Mock(side_effect=lacking))
        with pytest.raises(ImportError, match=r'images need pillow: pip install "drift_peft\[keep\]"'):
            make(folder, tmp_path / "k.safetensors")
    with pytest.raises(ImportError, match=r'images need pillow: pip install "drift_peft\[keep\]"'):
        make(folder, tmp_path / "k.safetensors")


def test_a_picture_that_the_processor_refuses_is_left_out(folder, pictures, tmp_path):
    """Whatever its place in the batches. The set is the one that is made without it."""
    images = tmp_path / "images"
    shutil.copytree(folder / "pictures", images)
    Image.new("RGB", (900, 2)).save(images / "wide.png")
    with pytest.warns(UserWarning, match=r"^1 of the 8 images that were drawn are left out: \S+wide.png has 900 x 2 "):
        made = make(folder, tmp_path / "k.safetensors", images=images, samples=8)
    assert len(made) == 8 and {made[i].image.size for i in range(8)} == {(16, 16), (24, 16)}
