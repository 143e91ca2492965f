"""An interrupted keep set: what is done is kept, and the same call ends in the bytes of an uninterrupted one."""

import os
import shutil

import pytest
import torch
from interrupted_builds import interrupt, kill_at_any_moment
from keep_sets import SETTINGS, make
from openai_server import OpenAI
from transformers import AutoModelForImageTextToText, AutoProcessor

from drift_peft.keeping import make as module

KILLS = 20


def done(output):
    return sorted(file.name for file in output.with_name(f"{output.name}.partial").glob("*.safetensors"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.slow
def test_killed_at_any_moment(folder, tmp_path):
    output = tmp_path / "keep.safetensors"
    arguments = folder / "base", folder / "pictures", output
    settings = {**SETTINGS, "samples": 24, "batch_size": 2, "max_new_tokens": 3}
    halfway = kill_at_any_moment(
        module.make_keep_set, arguments, settings, output, lambda: done(output), pieces=12, kills=KILLS, earliest=0.5
    )
    assert halfway >= KILLS / 4, f"{halfway} of {KILLS} kills left something to go on with"


def test_goes_on_with_what_is_missing(folder, tmp_path, monkeypatch):
    output = tmp_path / "k.safetensors"
    with monkeypatch.context() as patch:
        interrupt(patch, after=3, module=module)
        with pytest.raises(KeyboardInterrupt) as caught:
            make(folder, output)
    assert len(done(output)) == 3 and not output.exists()
    assert caught.value.__notes__ == [
        f"{output}.partial keeps the 3 batches that are done: run the same again to go on from there"
    ]
    (tmp_path / "k.safetensors.partial" / "00000004.safetensors").write_bytes(b"torn")  # a crash of the machine
    asked = []
    answer = module.Vlm.answer
    monkeypatch.setattr(module.Vlm, "answer", lambda *args: asked.append(len(args[1])) or answer(*args))
    assert make(folder, output).path.read_bytes() == (folder / "keep.safetensors").read_bytes()
    assert asked == [4, 4, 4] and not [*tmp_path.glob("*.partial")]  # 5 batches of 4, of which 2 were there


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"top_k": 4}, r"k \(5, now 4\), top_k \(5, now 4\)"),
        ({"samples": 21}, r"samples \(20, now 21\)"),
        ({"batch_size": 5}, r"batch_size \(4, now 5\)"),
        ({"seed": 1}, r"seed \(0, now 1\), prompt_tokens \(\d+, now \d+\), images"),
        ({"questions": [(str(i), "what ?") for i in range(9)]}, r"questions, prompt_tokens \(\d+, now \d+\)"),
        ({"load_in_4bit": True}, "generation"),
        ({"images": "other"}, r"(prompt_tokens \(\d+, now \d+\), )?images"),
        ({"model_or_id": "other"}, r"vlm, files of the VLM"),
    ],
)
def test_other_settings_are_refused(changes, named, folder, tmp_path, monkeypatch):
    output = tmp_path / "k.safetensors"
    with monkeypatch.context() as patch:
        interrupt(patch, after=2, module=module)
        with pytest.raises(KeyboardInterrupt):
            make(folder, output)
    if "images" in changes:
        shutil.copytree(folder / "pictures", tmp_path / "other")
        (tmp_path / "other" / "0.png").write_bytes((folder / "pictures" / "1.png").read_bytes())
        (tmp_path / "other" / "8.png").write_bytes((folder / "pictures" / "0.png").read_bytes())
        changes = {"images": tmp_path / "other"}
    if "model_or_id" in changes:
        changes = {"model_or_id": shutil.copytree(folder / "base", tmp_path / "base")}
    with pytest.raises(
        FileExistsError, match=f"partial holds an interrupted build that differs in {named}: "
    ) as caught:
        make(folder, output, **changes)
    assert "\n" not in str(caught.value) and len(done(output)) == 2
    if "samples" in changes:  # with overwrite they are taken, whichever they are
        assert len(make(folder, output, overwrite=True, **changes)) == 21


def test_nothing_is_left_where_nothing_was_done(folder, tmp_path, monkeypatch):
    interrupt(monkeypatch, after=0, error=OSError("no space left"), module=module)
    with pytest.raises(OSError, match="no space left"):
        make(folder, tmp_path / "k.safetensors")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("loaded", ["as it is", "in 4 bits", "by the caller"])
def test_a_gpu_without_room(loaded, folder, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("drift_peft.keeping.vlm.greedy", full)
    options = {"load_in_4bit": True} if loaded == "in 4 bits" else {}
    if loaded == "by the caller":
        options["model_or_id"] = AutoModelForImageTextToText.from_pretrained(folder / "base")
        options["processor"] = AutoProcessor.from_pretrained(folder / "base")
    helps = r", or load_in_4bit=True \(--load-in-4bit\)" if loaded == "as it is" else ""
    with pytest.raises(ValueError, match=rf"no room for 4 questions .* a smaller batch_size \(--batch-size\){helps}$"):
        make(folder, tmp_path / "k.safetensors", **options)


def test_a_server_that_goes_away(folder, tmp_path, monkeypatch):
    """What it has answered is kept, and asked for no more."""
    monkeypatch.setattr("drift_peft.keeping.server.RETRIES", 1)
    top = [{"token": f"token_id:{i}", "logprob": -1.0 - i} for i in range(8, 13)]
    said = [{"token": "token_id:8", "logprob": -9.0, "top_logprobs": top}]
    output = tmp_path / "k.safetensors"
    with OpenAI(lambda question: "8", logprobs=lambda body: said) as server:
        server.fail("What is shown", "status 500")  # once: it is asked again
        server.fail("How many objects can", *["reset"] * 9)
        with pytest.raises(ConnectionError, match="does not answer: ") as caught:
            make(folder, output, server=server.url, batch_size=1)
        assert "batches that are done" in caught.value.__notes__[0]
        before, kept = len(server.answered), len(done(output))
        assert before == kept > 0
        server.faults.clear()
        assert len(make(folder, output, server=server.url, batch_size=1)) == 20
        assert len(server.answered) == 20
