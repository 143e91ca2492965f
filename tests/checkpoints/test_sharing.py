"""What cards and headings call a model: never by a place on somebody's disk."""

import pytest

from drift_peft.checkpoints import hub_id, named, pinned, repository_of, shown, with_full_path
from drift_peft.checkpoints.sharing import find_file


@pytest.mark.parametrize(
    "source, hub, name",
    [
        ("org/vlm", "org/vlm", "org/vlm"),
        ("org/vlm@v1", None, "org/vlm@v1"),
        ("/data/someone/vlm", None, "vlm"),
        ("/data/someone/vlm/", None, "vlm"),
        ("./vlm", None, "vlm"),
        ("../models/vlm@v1", None, "vlm@v1"),
        (r"C:\Users\someone\vlm", None, "vlm"),
        ("runs/here", None, "here"),
        ("/home/me/hub/models--org--my-vlm/snapshots/0a1b", "org/my-vlm", "org/my-vlm"),
        (r"D:\hub\models--org--vlm\snapshots\0a1b", "org/vlm", "org/vlm"),
        ("vlm", None, "vlm"),
        ("/", None, "/"),
    ],
)
def test_names(source, hub, name, tmp_path, monkeypatch):
    (tmp_path / "runs" / "here").mkdir(parents=True)  # what there is on this disk is no hub id
    monkeypatch.chdir(tmp_path)
    assert (hub_id(source), shown(source)) == (hub, name)


@pytest.mark.parametrize(
    "id, revision, repository, name",
    [
        ("org/vlm", "0a1b", ("org/vlm", "0a1b"), "org/vlm@0a1b"),
        ("models/vlm", None, None, "vlm"),  # a folder of another place: the hub's have a commit
        ("/data/vlm@v1/", None, None, "vlm@v1"),
        (r"C:\models\vlm", None, None, "vlm"),
        ("/hub/models--org--vlm/snapshots/0a1b", None, ("org/vlm", "0a1b"), "org/vlm@0a1b"),
        ("LlavaForConditionalGeneration", None, None, "LlavaForConditionalGeneration"),
    ],
)
def test_names_of_what_is_known_to_be_of_the_hub_or_not(id, revision, repository, name):
    origin = {"id": id, "revision": revision}
    assert (repository_of(origin), pinned(origin)) == (repository, name)
    assert named(origin) == name.removesuffix("@0a1b")


@pytest.mark.parametrize("source", [".", "prior.safetensors"])
def test_a_path_has_no_revision(source, tmp_path):
    (tmp_path / "prior.safetensors").touch()
    with pytest.raises(ValueError, match=r"is a local path, which has no revision 'v2': leave out revision="):
        find_file(tmp_path / source, "v2", "prior.safetensors")


def test_a_home_that_no_shell_has_put_in_is_named():
    with pytest.raises(
        FileNotFoundError, match=r"there is no file ~/k.safetensors: ~ stands for .*, so write [^~]+k.s"
    ):
        find_file("~/k.safetensors", None, "keep.safetensors")
    with pytest.raises(FileNotFoundError, match=r"there is no file no/k~.safetensors$"):
        find_file("no/k~.safetensors", None, "keep.safetensors")


def test_folders_get_their_whole_path_and_hub_ids_stay(tmp_path, monkeypatch):
    """Also of an adapter's base, and beside a folder that is called like the hub id."""
    monkeypatch.chdir(tmp_path)
    for folder in ("org/llm", "runs/adapter"):
        (tmp_path / folder).mkdir(parents=True)
    base, hub = ({"id": "org/llm", "revision": revision} for revision in (None, "0a1b"))
    whole = {"id": str(tmp_path / "org" / "llm"), "revision": None}
    assert with_full_path(base) == whole and with_full_path(hub) == hub
    place = str(tmp_path / "runs" / "adapter")
    for of, expected in ((base, whole), (hub, hub)):
        adapter = with_full_path({"id": "runs/adapter", "revision": None, "base": of})
        assert adapter == {"id": place, "revision": None, "base": expected}
