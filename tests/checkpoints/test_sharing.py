"""What cards and headings call a model: never by a place on somebody's disk."""

import pytest

from drift_peft.checkpoints import hub_id, shown


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
