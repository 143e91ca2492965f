"""Interrupted builds whose models are on the hub: nothing is fetched twice, and what is used up goes."""

import os
import shutil
import signal
import time

import pytest
from interrupted_builds import LAYERS, build, done, interrupt, save_pair
from older import frees_files
from peft import LoraConfig, get_peft_model
from processes import Program
from safetensors.torch import load_file
from tiny import edit_config, tiny_llm

from drift_peft.checkpoints.checkpoint import Checkpoint
from drift_peft.prior import build as module
from drift_peft.prior import same

PATIENCE = 300  # seconds, for a process beside others


@pytest.fixture
def pair(tmp_path):
    return save_pair(tmp_path)


def shards(names):
    return [name for name in names if name.endswith(".safetensors")]


def cached(folder):
    return shards(file.name for file in (folder / "cache").rglob("snapshots/*/*"))


def test_network_loss(pair, hub, monkeypatch):
    hub.add("org/expert", pair / "expert")
    expected = build(pair, expert="org/expert", output=pair / "q.safetensors").path.read_bytes()
    shutil.rmtree(pair / "cache")
    hub.forget()
    third = shards(sorted(hub.files("org/expert")))[2]
    keep = module.finish
    monkeypatch.setattr(module, "finish", lambda *args: (keep(*args), hub.cut(third, size=100)))
    with pytest.raises(OSError, match=f"{third} of org/expert .*cannot be fetched") as caught:
        build(pair, expert="org/expert")
    assert "run the same again to go on" in caught.value.__notes__[0] and len(done(pair)) > 5
    before = shards(hub.fetched("org/expert"))
    monkeypatch.setattr(module, "finish", keep)
    hub.heal()
    assert build(pair, expert="org/expert").path.read_bytes() == expected
    fetched = shards(hub.fetched("org/expert"))
    assert not set(before) & set(fetched[len(before) :]) - {third}  # what came is not fetched again


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_ctrl_c_waits_for_no_download(pair, hub, tmp_path_factory):
    """Python's end waits for threads that are no daemons, and a second Ctrl-C there is a traceback."""
    hub.add("org/expert", pair / "expert")
    expected = build(pair, expert="org/expert", output=pair / "q.safetensors").path.read_bytes()
    shutil.rmtree(pair / "cache")
    last = shards(hub.fetched("org/expert"))[-1]
    waiting = [name for name in load_file(pair / "expert" / last) if name.endswith("_proj.weight")]
    hub.forget()
    hub.stall(last)
    command = ["prior", "build", "--expert", "org/expert", "--base", f"{pair / 'vlm'}", "--rank", "8"]
    environment = {**hub.env(pair / "cache"), "HF_HUB_DOWNLOAD_TIMEOUT": f"{3 * PATIENCE}"}
    output = pair / "p.safetensors"
    program = Program(tmp_path_factory.mktemp("printed"), "-m", "drift_peft", *command, "-o", output, **environment)
    try:
        end = time.monotonic() + PATIENCE
        while last not in hub.fetched("org/expert") or len(done(pair)) < 7 * LAYERS - len(waiting):
            assert program.process.is_alive() and time.monotonic() < end, (hub.requests, done(pair))
            time.sleep(0.05)
        os.kill(program.process.pid, signal.SIGINT)  # while all that is left waits for the download
        program.process.join(PATIENCE)
    finally:
        program.process.kill()
        hub.heal()
    status, _, err = program.ended()
    assert status == 130 and "Traceback" not in err
    assert f"error: interrupted; {pair / 'p.safetensors.partial'} keeps the " in err.splitlines()[-1]
    assert sorted(os.listdir(pair)) == ["cache", "expert", "p.safetensors.partial", "q.safetensors", "vlm"]
    assert build(pair, expert="org/expert").path.read_bytes() == expected


@frees_files
def test_shards_are_freed_as_they_are_used_up(pair, hub, monkeypatch):
    hub.add("org/expert", pair / "expert")
    hub.add("org/base", pair / "vlm")
    sources = {"expert": "org/expert", "base": "org/base"}
    expected = build(pair, **sources, output=pair / "q.safetensors").path.read_bytes()
    names = shards(sorted(hub.files("org/expert")))
    assert len(names) > 4 and set(names) <= set(cached(pair))
    shutil.rmtree(pair / "cache")
    mine = Checkpoint("org/expert").fetch(Checkpoint("org/expert").files[1]).name  # in the cache before
    at_once = []
    keep = module.finish

    def watched(*args):
        at_once.append({*cached(pair)} & {*names} - {mine})
        keep(*args)

    monkeypatch.setattr(module, "finish", watched)
    interrupt(monkeypatch, after=15)
    with pytest.raises(KeyboardInterrupt):
        build(pair, **sources, delete_shards=True)
    left = {*cached(pair)} & {*names} - {mine}
    assert left and len(done(pair)) == 15
    monkeypatch.setattr(module, "finish", watched)
    hub.forget()
    assert build(pair, **sources, delete_shards=True).path.read_bytes() == expected
    assert {*cached(pair)} & {*names} == {mine}  # also what the interrupted build had brought
    assert max(map(len, at_once)) <= 2  # the one in use and the one that is read ahead
    fetched = shards(hub.fetched("org/expert"))
    assert len(fetched) == len(set(fetched)) and not left & set(fetched)
    assert {*cached(pair)} >= {*shards(hub.files("org/base"))}


@frees_files
def test_shards_are_freed_that_an_existing_prior_is_compared_by(pair, hub, monkeypatch):
    hub.add("org/expert", pair / "expert")
    build(pair, expert="org/expert", delete_shards=True)
    before = cached(pair)
    at_once = []
    real = same.measure_delta
    monkeypatch.setattr(same, "measure_delta", lambda *args: at_once.append({*cached(pair)} - {*before}) or real(*args))
    build(pair, expert="org/expert", delete_shards=True, exist_ok=True)
    with pytest.raises(FileExistsError, match="built with seed=0, not 1"):
        build(pair, expert="org/expert", delete_shards=True, exist_ok=True, seed=1)
    assert 1 <= max(map(len, at_once)) <= 2  # the one in use and the one that is read ahead
    assert cached(pair) == before and not (pair / "p.safetensors.partial").exists()


@frees_files
def test_shards_that_are_read_before_there_is_a_record(pair, hub):
    """A base that says it is tied, and holds both ends: whether it is tells their tensors alone."""
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = get_peft_model(tiny_llm("llava", num_hidden_layers=LAYERS), lora)
    adapted.peft_config["default"].base_model_name_or_path = "org/expert"
    adapted.save_pretrained(pair / "adapter", save_embedding_layers=False)
    edit_config(pair / "expert", tie_word_embeddings=True)
    hub.add("org/expert", pair / "expert")
    build(pair, expert=pair / "adapter", delete_shards=True)
    assert not cached(pair)
