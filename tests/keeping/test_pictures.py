"""The images that a keep set is made of: what becomes of those that cannot be read."""

import importlib
import json
import re
import warnings

import numpy as np
import pytest
from chain_files import encoded
from keep_sets import count_decoded
from PIL import Image

from drift_peft.keeping import pictures
from drift_peft.keeping.file import decode_image
from drift_peft.keeping.pictures import Shown, read_pictures


def test_an_image_that_is_broken_or_missing_is_left_out_of_a_folder_and_a_data_set(tmp_path):
    """And named; in a list, each is meant."""
    whole = [encoded(0), encoded(1)]
    for name, content in (("a", whole[0]), ("b", whole[1]), ("c", whole[0][:60])):
        (tmp_path / f"{name}.png").write_bytes(content)
    with pytest.warns(
        UserWarning, match=r"^1 of the 3 images that were drawn are left out: \S+c.png is a broken image"
    ):
        assert {*read_pictures(tmp_path, 5, 0)} == {*whole}
    rows = [{"images": [name]} for name in ("a.png", "gone.png", "c.png", "b.png", "a.png")]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.warns(UserWarning, match=r"^2 of the \d images that were drawn are left out: "):
        assert {*read_pictures(tmp_path / "data.jsonl", 5, 0)} == {*whole}
    data = pytest.importorskip("datasets").Dataset.from_list(
        [{"images": [str(tmp_path / f"{name}.png")]} for name in "ac"]
    )
    with pytest.warns(UserWarning, match=r"^1 of the 2 images that were drawn are left out: "):
        assert read_pictures(data, 5, 0) == whole[:1]
    with pytest.raises(ValueError, match=r"^image 1 is a broken image or none: take it out"):
        read_pictures([str(tmp_path / f"{name}.png") for name in "ac"], 5, 0)


def test_a_mistake_in_a_path_is_told_before_the_hub_is_asked(tmp_path, monkeypatch):
    datasets, asked = pytest.importorskip("datasets"), []
    find_files = importlib.import_module("parts.sources").find_files

    def load(name, **options):
        asked.append(len(told))
        raise OSError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my").mkdir()
    for read in (lambda source: read_pictures(source, 5, 0), lambda source: find_files(source, "train", None, False)):
        asked.clear()
        for source in ("my/pix", "org/pix", "pix", str(tmp_path / "pix")):
            with warnings.catch_warnings(record=True) as told, pytest.raises(ValueError, match="no network"):
                warnings.simplefilter("always")
                read(source)
            assert [str(warning.message) for warning in told] == [
                "There is a folder my here, but no pix in it: looking for my/pix on the hub."
            ] * (source == "my/pix")
        assert asked == [1, 0, 0, 0]


def test_a_picture_that_the_processor_refuses_is_left_out_and_named(tmp_path):
    """Each size is shown once. Of a list, each is meant; a processor that refuses all is told by the first ones."""
    shown = []

    def show(image):
        shown.append(image.size)
        if image.width > 100 * image.height:
            raise TypeError("absolute aspect ratio\nmust be smaller")

    for i in range(4):
        Image.new("RGB", (24, 12), (i, 0, 0)).save(tmp_path / f"{i}.png")
    whole = {*read_pictures(tmp_path, 5, 0)}
    Image.new("RGB", (900, 2)).save(tmp_path / "wide.png")
    told = r"wide.png has 900 x 2 pixels and is refused by the VLM's processor: take it out \(absolute aspect"
    with pytest.warns(UserWarning, match=rf"^1 of the 5 images that were drawn are left out: \S+{told}"):
        assert {*read_pictures(tmp_path, 5, 0, show)} == whole
    assert sorted(shown) == [(24, 12), (900, 2)]
    with pytest.raises(ValueError, match=r"^image 0 has 900 x 2 pixels and is refused"):
        read_pictures([str(tmp_path / "wide.png")], 5, 0, show)
    wide = [str(tmp_path / name) for name in ("0.png", "1.png", "2.png", "3.png")]
    shown.clear()
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"image": name}) for name in wide))
    told = r"^the VLM's processor refuses all {} images that were drawn: division by zero$"
    with pytest.raises(ValueError, match=told.format(4)):
        read_pictures(tmp_path / "rows.jsonl", 2, 0, lambda image: shown.append(image.size) or 1 / 0)
    assert len(shown) == 4
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"image": name}) for name in 5 * wide))
    with pytest.raises(ValueError, match=told.format(16)):
        read_pictures(tmp_path / "rows.jsonl", 2, 0, lambda image: 1 / 0)
    for seed in range(5):  # also where the only one that is wanted would have been that one
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert {*read_pictures(tmp_path, 1, seed, show)} <= whole

    def lacks(image):
        raise ImportError("needs num2words")

    with pytest.raises(ImportError, match="needs num2words"):
        read_pictures(tmp_path, 5, 0, lacks)


def test_rows_of_arrays_rows_with_a_path_beside_and_lists_of_paths(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="give a path, the bytes of a file, or a picture of PIL"):
        read_pictures([{"image": np.zeros((4, 4, 3), dtype=np.uint8)}], 1, 0)
    assert read_pictures([{"image": Image.new("RGB", (4, 4)), "path": "gone.jpg"}], 1, 0)
    (tmp_path / "list.json").write_text(json.dumps(["a.png"]))
    assert read_pictures(tmp_path / "list.json", 1, 0) == [(tmp_path / "a.png").read_bytes()]


NO_FILES = {
    "https://x.org/a.png": "is the web address https://x.org/a.png: download it, and name the file",
    "data:image/png;base64,###": "is a data: address that is not base64",
    "memory://gone.png": "memory://gone.png cannot be read: /gone.png",
    "x" * 5000: "cannot be read as a file: File name too long",  # base64, of which nothing says so
    5: "is '5': give a path, the bytes of a file, or a picture of PIL",
}


@pytest.mark.parametrize("image", NO_FILES)
def test_what_is_no_file_is_left_out_too(image, tmp_path, monkeypatch):
    """Whatever the seed. A data set of nothing else is not read to its end."""
    (tmp_path / "a.png").write_bytes(encoded(0))
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"images": [name]}) for name in ("a.png", image)))
    told = rf"^1 of the 2 images that were drawn are left out: .*{re.escape(NO_FILES[image])}"
    with pytest.warns(UserWarning, match=told) as warned:
        assert read_pictures(data, 5, 0) == [encoded(0)]
    assert len(str(warned[0].message)) < 1000
    with pytest.raises(ValueError, match=re.escape(NO_FILES[image])):
        read_pictures([str(tmp_path / "a.png"), image], 5, 0)
    read, content = [], pictures._content
    monkeypatch.setattr(pictures, "_content", lambda *given: read.append(given) or content(*given))
    data.write_text("\n".join([json.dumps({"image": image})] * 50))
    with pytest.raises(ValueError, match=re.escape(NO_FILES[image])):
        read_pictures(data, 5, 0)
    assert len(read) == 16


@pytest.mark.parametrize("columns", [["picture", "label"], ["messages"]])
def test_where_there_are_no_images_the_columns_are_named(columns, tmp_path):
    row = {column: [{"role": "user", "content": "how many ?"}] for column in columns}
    (tmp_path / "data.jsonl").write_text(json.dumps(row))
    sources = [(tmp_path / "data.jsonl", "data.jsonl"), ([row, row], "what was given")]
    if importlib.util.find_spec("datasets"):
        data = importlib.import_module("datasets").Dataset.from_list([row, row])
        data.to_parquet(tmp_path / "data.parquet")
        sources += [(data, "the data set"), (data.to_iterable_dataset(), "the data set")]
        sources += [(tmp_path / "data.parquet", "data.parquet")]
    for source, name in sources:
        told = f"there are no images in .*{name}, whose rows hold {', '.join(columns)}: have them in images or image"
        with pytest.raises(ValueError, match=told):
            read_pictures(source, 5, 0)
    with pytest.raises(ValueError, match=r"^image 0 is \"{'file': 'a.png'}\": give a path, the bytes of a file"):
        read_pictures([{"image": {"file": "a.png"}}], 5, 0)


def test_gray_of_16_bits_is_scaled(tmp_path):
    """Pillow's own convert makes white of all above 255. Where the range is not known, a picture is left out."""
    gray = np.linspace(0, 65535, 24 * 16, dtype=np.uint16).reshape(16, 24)
    for name, pixels in (("a.png", gray), ("b.tif", gray), ("c.tif", gray.astype(np.int32))):
        Image.fromarray(pixels).save(tmp_path / name)
    Image.fromarray(gray.astype(">u2")).save(tmp_path / "d.tif")
    Image.fromarray(gray / np.float32(65535)).save(tmp_path / "e.tif")
    told = r"^2 of the 5 images that were drawn are left out: \S+[ce].tif cannot be shown to a VLM: .* mode [IF] of PIL"
    with pytest.warns(UserWarning, match=told):
        files = read_pictures(tmp_path, 9, 0)
    files += read_pictures([Image.open(tmp_path / "a.png")], 9, 0)
    for file in files:
        assert (np.asarray(decode_image(file, "L")) == gray >> 8).all()
        assert (np.asarray(decode_image(file)) == (gray >> 8)[..., None]).all()
    assert len(files) == 4
    for image, name in ((tmp_path / "c.tif", "I"), (Image.open(tmp_path / "e.tif"), "F")):
        with pytest.raises(ValueError, match=rf"^image 0 cannot be shown to a VLM: its pixels are of the mode {name} "):
            read_pictures([image], 9, 0)


def test_a_network_that_fails_ends_it(tmp_path, monkeypatch):
    """Or all the rest of a data set would be tried, and a keep set made of what came before."""
    fsspec, opened = pytest.importorskip("fsspec"), []
    memory = fsspec.filesystem("memory")
    for i in range(9):
        with memory.open(f"/pictures/{i}.png", "wb") as file:
            file.write(encoded(i))

    def failing(name, mode):
        opened.append(name)
        if len(opened) > 2:
            raise ConnectionError("Name or service not known")
        return memory.open(name, mode)

    monkeypatch.setattr(fsspec, "open", failing)
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"images": [f"memory://pictures/{i}.png"]}) for i in range(9)))
    with pytest.raises(ValueError, match=r"memory://pictures/\d.png cannot be read: Name or service not known"):
        read_pictures(data, 5, 0)
    assert len(opened) == 3


def test_pictures_that_are_left_out_are_not_held(tmp_path, monkeypatch):
    """A decoded photograph takes tens of MB; an error keeps it alive, in the frames of its traceback."""

    def refuse(image):
        if image.width > 100:
            raise ValueError("too wide")

    alive = count_decoded(monkeypatch, pictures)
    for i in range(12):
        Image.new("RGB", (200 + i, 2)).save(tmp_path / f"{i}.png")
    Image.new("RGB", (20, 2)).save(tmp_path / "taken.png")
    with pytest.warns(UserWarning, match=r"^12 of the 13 images that were drawn are left out"):
        read_pictures(tmp_path, 20, 0, refuse)
    assert len(alive) == 13 and max(alive) <= 3  # of the first one that is left out, the last one, and this one


def test_what_is_less_extreme_than_what_was_taken_need_not_be_shown():
    shown = Shown()
    assert not shown.covers((64, 64))
    shown.take([(640, 480)])
    assert shown.covers((640, 480)) and shown.covers((480, 640)) and shown.covers((500, 500))
    assert not any(map(shown.covers, ((400, 400), (1000, 800), (640, 470), (600, 480 - 1))))
    shown.take([(900, 32)])
    assert shown.covers((40, 40)) and shown.covers((900, 40)) and not shown.covers((900, 31))
