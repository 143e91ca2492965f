"""An interrupted build: what is done is kept, and the same build ends in the bytes of one that was not interrupted."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from interrupted_builds import LAYERS, build, done, interrupt, kill_at_any_moment, save_pair
from safetensors.torch import load_file, save_file
from tiny import edit_config, save_layout, tiny_llm

from drift_peft.checkpoints import output as output_module
from drift_peft.checkpoints.checkpoint import Checkpoint
from drift_peft.cli import main
from drift_peft.prior import build as module
from drift_peft.prior import reading
from drift_peft.prior.build import build_prior
from drift_peft.prior.prior import ReasoningPrior

KILLS = 24


@pytest.fixture
def pair(tmp_path):
    return save_pair(tmp_path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.slow
def test_killed_at_any_moment(pair):
    output = pair / "p.safetensors"
    arguments, settings = (pair / "expert", pair / "vlm", output), {"rank": 16, "progress": False}
    halfway = kill_at_any_moment(
        build_prior, arguments, settings, output, lambda: done(pair), pieces=7 * LAYERS, kills=KILLS
    )
    assert halfway >= KILLS / 3, f"{halfway} of {KILLS} kills left something to go on with"


def test_goes_on_with_what_is_missing(pair, monkeypatch):
    expected = build(pair, output=pair / "q.safetensors").path.read_bytes()
    with monkeypatch.context() as patch:
        interrupt(patch, after=10)
        with pytest.raises(KeyboardInterrupt) as caught:
            build(pair)
    assert len(done(pair)) == 10 and not (pair / "p.safetensors").exists()
    assert caught.value.__notes__ == [
        f"{pair / 'p.safetensors.partial'} keeps the 10 weights that are done: run the same again to go on from there"
    ]
    taken = []
    monkeypatch.setattr(module, "take_delta", lambda *args, real=module.take_delta: taken.append(1) or real(*args))
    assert build(pair).path.read_bytes() == expected
    assert len(taken) == 7 * LAYERS - 10 and not (pair / "p.safetensors.partial").exists()


def test_a_gpu_without_room_leaves_what_is_done(pair, monkeypatch, capsys):
    """It is said in one sentence, and the same call goes on once there is room."""
    flags = ["--expert", str(pair / "expert"), "--base", str(pair / "vlm"), "-o", str(pair / "p.safetensors")]
    with monkeypatch.context() as patch:
        interrupt(patch, after=10, error=torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.03 GiB."))
        assert main(["prior", "build", *flags]) == 1
    said = capsys.readouterr().err
    assert "drift-peft: error: the device cpu has no room for a weight of each model" in said
    assert f"{pair / 'p.safetensors.partial'} keeps the 10 weights that are done" in said and "Traceback" not in said
    assert len(done(pair)) == 10 and main(["prior", "build", *flags]) == 0


def test_goes_on_from_another_folder(pair, monkeypatch):
    """The paths are the same ones, however they are written."""
    with monkeypatch.context() as patch:
        interrupt(patch, after=10)
        with pytest.raises(KeyboardInterrupt):
            build(pair)
    monkeypatch.chdir(pair)
    taken = []
    monkeypatch.setattr(module, "take_delta", lambda *args, real=module.take_delta: taken.append(1) or real(*args))
    build_prior("expert", "vlm", "p.safetensors", rank=8, progress=False)
    assert len(taken) == 7 * LAYERS - 10


def test_torn_files_are_not_trusted(pair, monkeypatch):
    expected = build(pair, output=pair / "q.safetensors").path.read_bytes()
    with monkeypatch.context() as patch:
        interrupt(patch, after=8)
        with pytest.raises(KeyboardInterrupt):
            build(pair)
    files = sorted((pair / "p.safetensors.partial").glob("*.safetensors"))
    for file, length in zip(files, (0, 7, 100, -1), strict=False):  # a crash of the machine, not of the process
        file.write_bytes(file.read_bytes()[:length])
    files[4].write_bytes(bytes(len(files[4].read_bytes())))
    (pair / "p.safetensors.partial" / f"{files[5].name}.tmp").write_bytes(b"half")
    assert build(pair).path.read_bytes() == expected


def test_nothing_is_left_where_nothing_was_done(pair, monkeypatch):
    interrupt(monkeypatch, after=0, error=OSError("the network is down"))
    with pytest.raises(OSError, match="the network is down"):
        build(pair)
    assert sorted(os.listdir(pair)) == ["expert", "vlm"]


def touch(folder):
    file = next((folder / "expert").glob("*00001*.safetensors"))
    os.utime(file, ns=(1, 1))


def other_config(folder):
    edit_config(folder / "vlm", eos_token_id=3)


@pytest.mark.parametrize(
    ("change", "arguments", "named"),
    [
        (None, {"rank": 9}, r"rank \(8, now 9\)"),
        (
            None,
            {"rank": None, "energy": 0.5},
            r"rank \(8, now 256\), energy \(None, now 0.5\), max_rank \(None, now 256\)",
        ),
        (None, {"modules": ["attn"]}, r"modules \(\['attn', 'mlp'\], now \['attn'\]\)"),
        (None, {"only_layers": [0]}, r"only_layers \(None, now \[0\]\)"),
        (None, {"skip_first": 1}, r"skip_first \(0, now 1\)"),
        (None, {"seed": 1}, r"seed \(0, now 1\)"),
        (None, {"expert": "other"}, "expert, files of the expert"),
        (None, {"reference": "other"}, "reference, files of the reference"),
        (touch, {}, "files of the expert"),
        (other_config, {}, "files of the base"),
    ],
)
def test_other_settings_are_refused(change, arguments, named, pair, monkeypatch):
    save_layout(tiny_llm("llava", seed=3, num_hidden_layers=LAYERS), pair / "other")
    with monkeypatch.context() as patch:
        interrupt(patch, after=3)
        with pytest.raises(KeyboardInterrupt):
            build(pair)
    left = done(pair)
    if change:
        change(pair)
    arguments = {key: pair / value if value == "other" else value for key, value in arguments.items()}
    message = (
        rf"^\S+p.safetensors.partial holds an interrupted build that differs in {named}: take its settings or another"
    )
    with pytest.raises(FileExistsError, match=message) as caught:
        build(pair, force=True, **arguments)
    assert "\n" not in str(caught.value) and done(pair) == left


def test_after_a_refusal_the_old_settings_still_go_on(pair, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, after=3)
        with pytest.raises(KeyboardInterrupt):
            build(pair)
    with pytest.raises(FileExistsError):
        build(pair, rank=9)
    build(pair)
    assert build(pair, overwrite=True, rank=9)


def test_other_threads_are_refused(pair, monkeypatch):
    """The last bits of a sum depend on how many threads share it."""
    with monkeypatch.context() as patch:
        interrupt(patch, after=3)
        with pytest.raises(KeyboardInterrupt):
            build(pair)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    with pytest.raises(FileExistsError, match=r"differs in threads \(1, now 7\): "):
        build(pair)


def test_parts_of_an_older_version_are_refused(pair, monkeypatch):
    """They hold less, and were taken otherwise."""
    with monkeypatch.context() as patch:
        interrupt(patch, after=3)
        with pytest.raises(KeyboardInterrupt):
            build(pair)
    partial = pair / "p.safetensors.partial"
    settings = json.loads((partial / output_module.SETTINGS).read_text(encoding="utf-8"))
    settings.pop("version of the parts", None)
    (partial / output_module.SETTINGS).write_text(json.dumps(settings), encoding="utf-8")
    for name in done(pair):
        stats = output_module.finished(partial / name)
        del stats["cosines"]
        output_module.finish(partial / name, load_file(partial / name), stats)
    for force in (False, True):
        with pytest.raises(FileExistsError, match=r"differs in version of the parts \(None, now 2\): .*--overwrite"):
            build(pair, force=force)
    assert len(done(pair)) == 3
    assert build(pair, overwrite=True)


def test_what_does_not_change_the_bytes_may_differ(pair, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, after=3)
        with pytest.raises(KeyboardInterrupt):
            build(pair)
    build(pair, force=True, delete_shards=True, modules=["mlp", "attn"])


def test_what_was_begun_with_force_is_checked_without(pair, monkeypatch):
    """Matrices that are done already, too."""
    key = "model.layers.0.self_attn.q_proj.weight"
    shard = Checkpoint(pair / "expert").keys[key]
    save_file({**load_file(shard), key: torch.randn(64, 64, generator=torch.Generator().manual_seed(9))}, shard)
    with monkeypatch.context() as patch:
        interrupt(patch, after=7 * LAYERS - 1)
        with pytest.raises(KeyboardInterrupt):
            build(pair, force=True)
    assert f"{key.removeprefix('model.')}.safetensors" in done(pair)
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj.weight of .* has cosine .*: no common ancestor"):
        build(pair)
    assert not (pair / "p.safetensors.partial").exists()


def test_overwrite_goes_on_with_the_same_settings_and_gives_up_others(pair, monkeypatch):
    (pair / "p.safetensors").write_text("mine")
    interrupt(monkeypatch, after=3)
    with pytest.raises(KeyboardInterrupt):
        build(pair, overwrite=True)
    with pytest.raises(FileExistsError, match=r"p.safetensors exists: .*overwrite=True"):
        build(pair)
    assert (pair / "p.safetensors").read_text() == "mine" and len(done(pair)) == 3
    monkeypatch.undo()
    interrupt(monkeypatch, after=1)
    with pytest.raises(KeyboardInterrupt):
        build(pair, overwrite=True)
    assert len(done(pair)) == 4
    monkeypatch.undo()
    interrupt(monkeypatch, after=1)
    with pytest.raises(KeyboardInterrupt):
        build(pair, overwrite=True, rank=5)
    assert len(done(pair)) == 1


def test_nothing_else_throws_an_interrupted_build_away(pair, monkeypatch):
    prior = build(pair, output=pair / "whole.safetensors")
    with monkeypatch.context() as patch:
        interrupt(patch, after=10)
        with pytest.raises(KeyboardInterrupt):
            build(pair)
    before = done(pair)
    with pytest.raises(FileExistsError, match=r"p.safetensors.partial holds an interrupted run: go on with it, or"):
        prior.truncate(2, pair / "p.safetensors")
    with pytest.raises(FileExistsError, match=r"p.safetensors.partial holds an interrupted run: go on with it, or"):
        prior.save(pair / "p.safetensors")
    assert before and done(pair) == before
    assert prior.truncate(2, pair / "p.safetensors", overwrite=True).rank == 2 and not done(pair)


def test_a_folder_without_settings_is_not_trusted(pair):
    partial = pair / "p.safetensors.partial"
    partial.mkdir()
    (partial / "layers.0.mlp.up_proj.weight.safetensors").write_bytes(b"what is this")
    with pytest.raises(FileExistsError, match=r"p.safetensors.partial is in the way, .*: rename or delete it, or name"):
        build(pair)
    (partial / "settings.json").write_text("{}")  # somebody's own
    with pytest.raises(FileExistsError, match=r"p.safetensors.partial is in the way, .*: rename or delete it, or name"):
        build(pair, overwrite=True)
    (partial / ".drift_peft").touch()
    (partial / "settings.json").write_text("{torn")
    build(pair)
    assert not partial.exists()


def test_full_disk(pair):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))  # each weight fits, the whole prior does not
    try:
        with pytest.raises(OSError, match=r"written.safetensors could not be written: .*File too large"):
            build(pair)
        assert len(done(pair)) == 7 * LAYERS  # and nothing torn
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
        with pytest.raises(OSError, match=r"q.safetensors cannot be written: File too large"):
            build(pair, output=pair / "q.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(os.listdir(pair)) == ["expert", "p.safetensors.partial", "vlm"]
    assert len(build(pair)) == 7 * LAYERS


def test_an_unreadable_weight_leaves_nothing(pair, capsys):
    """Through the command line: one sentence that names the tensor. The same command would end in it again."""
    source = Checkpoint(pair / "expert")
    (key,) = source.claims["layers.5.mlp.up_proj.weight"]
    shard, tensor = source.keys[key], source.tensor(key).numpy().tobytes()
    # Damage that has no other traces: the file's size and time stay.
    content, times = shard.read_bytes(), shard.stat()
    where = content.index(tensor)
    shard.write_bytes(content[:where] + b"\0\0\xc0\x7f" + content[where + 4 :])
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    where = ["--expert", f"{pair / 'expert'}", "--base", f"{pair / 'vlm'}", "-o", f"{pair / 'p.safetensors'}"]
    assert main(["prior", "build", *where, "--rank", "8"]) == 1
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("drift-peft: error: ")]
    assert error == [f"drift-peft: error: {key} of {pair / 'expert'} holds NaN or infinite values"]
    assert sorted(os.listdir(pair)) == ["expert", "vlm"]
    shard.write_bytes(content)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert main(["prior", "build", *where, "--rank", "8"]) == 0
    assert len(ReasoningPrior.load(pair / "p.safetensors")) == 7 * LAYERS


def test_interrupted_on_the_command_line(pair, monkeypatch, capsys, request):
    """Ctrl-C: one sentence, status 130, and the same command goes on."""
    keep = module.finish

    def interrupted(file, *args):
        keep(file, *args)
        if len(done(pair)) == 20:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(module, "finish", interrupted)
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, inherited))
    command = ["prior", "build", "--expert", f"{pair / 'expert'}", "--base", f"{pair / 'vlm'}", "--rank", "8"]
    command += ["-o", f"{pair / 'p.safetensors'}"]
    assert main(command) == 130
    partial = pair / "p.safetensors.partial"
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == (
        f"drift-peft: error: interrupted; {partial} keeps the 20 weights that are done: "
        "run the same again to go on from there"
    )
    assert main(command) == 0 and not partial.exists()


def test_nothing_is_read_any_more_when_an_interrupted_build_has_ended(pair, monkeypatch):
    """Python's end would cut torch off in the midst of it, and abort."""
    begun, ended = [], []

    def slowly(tensor, device):
        begun.append(device)
        time.sleep(0.2)
        ended.append(device)
        return tensor

    monkeypatch.setattr(reading, "_page_in", slowly)
    interrupt(monkeypatch, after=2)
    with pytest.raises(KeyboardInterrupt):
        build(pair)
    so_far = len(begun)
    assert len(ended) == so_far
    time.sleep(0.5)
    assert len(begun) == so_far


def test_settings_that_cannot_be_read_are_an_error(pair, monkeypatch):
    """Work that is there but cannot be reached is not thrown away."""
    interrupt(monkeypatch, after=3)
    with pytest.raises(KeyboardInterrupt):
        build(pair)
    read_text = Path.read_text

    def broken(path, *args, **kwargs):
        if path.name == output_module.SETTINGS:
            raise PermissionError(13, "Permission denied", str(path))
        return read_text(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", broken)
    with pytest.raises(PermissionError):
        build(pair)
    assert len(done(pair)) == 3
