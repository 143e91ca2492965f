"""Nothing that was saved is lost: a run that is killed while it writes goes on from a whole checkpoint."""

import os
import resource
import shutil
import signal
import sys

import pytest
import sft_vlm
import torch
from parts import saving
from parts.checkpoints import checkpoints, is_whole, newest_whole
from recipe_runs import FAST
from safetensors.torch import load_file

pytestmark = pytest.mark.filterwarnings(
    "ignore:Switched off bitsandbytes", "ignore:.*gradient_checkpointing.*:FutureWarning"
)
STRIDE = 2  # writes that are left out between two kills
WRITES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


@pytest.fixture(scope="module")
def run(pair, data, tmp_path_factory):
    """A trainer with its output_dir, after four steps and checkpoints at the second and the fourth."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft_vlm, "plot_run", lambda history, output: None)
        settings = {**FAST, "max_steps": 4, "save_steps": 2, "data": data, "output_dir": folder / "run"}
        sources = {role: pair("qwen2_5_vl") / role for role in ("base", "expert", "prior.safetensors")}
        settings |= {
            "use_cpu": True,
            "reference": sources["base"],
            **{role.removesuffix(".safetensors"): path for role, path in sources.items()},
        }
        trainer = sft_vlm.main([part for key, value in settings.items() for part in (f"--{key}", str(value))])
    return trainer, folder / "run"


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def writes(event, args):
    """Is this audited event one that changes something on the disk?"""
    flags = args[2] if event == "open" and isinstance(args[2], int) else 0
    return event in WRITES or bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def in_a_child(save, at=None, size=None):
    """Run it in a fork that is killed at its write number `at`, or within the one that makes a file larger than `size`.
    Returns whether it was."""
    process = os.fork()
    if process == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        count = 0

        def kill(event, args):
            nonlocal count
            if writes(event, args):
                count += 1
                if count == at:
                    os.kill(os.getpid(), signal.SIGKILL)

        if size is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        try:
            sys.addaudithook(kill)
            save()
            os._exit(0)
        except BaseException:
            os._exit(1)
    _, status = os.waitpid(process, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a fork of this process")
def test_a_checkpoint_is_there_whole_or_not_at_all(run, tmp_path, monkeypatch):
    """Killed at its writes and within its larger files; also while it replaces one, and makes an old one go."""
    trainer, output = run
    place = tmp_path / "run"
    monkeypatch.setattr(trainer.args, "output_dir", str(place))
    monkeypatch.setattr(trainer.args, "save_total_limit", 1)
    held = {name: weights(output / name) for name in ("checkpoint-2", "checkpoint-4")}
    sizes = sorted(file.stat().st_size for file in (output / "checkpoint-4").iterdir())
    kills, tried = [{"at": at} for at in range(200, 0, -1)] + [{"size": size // 2} for size in sizes[-2:]], 0
    while kills:
        kill = kills.pop()
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(output / "checkpoint-2", place / "checkpoint-2")
        if tried % 2:
            (place / "checkpoint-4").mkdir()
            (place / "checkpoint-4" / "trainer_state.json").write_text("torn")
        if in_a_child(lambda: trainer._save_checkpoint(trainer.model, None), **kill):
            tried += 1
            del kills[-STRIDE:]
            found = newest_whole(place)
            kept = weights(found)
            assert kept.keys() == held[found.name].keys(), kill
            assert all(torch.equal(kept[key], held[found.name][key]) for key in kept), kill
        else:  # it has no more writes than that
            assert [path.name for path in place.glob("checkpoint*")] == ["checkpoint-4"] and is_whole(
                newest_whole(place)
            )
            break
    assert tried > 10


@pytest.mark.parametrize("file", ["trainer_state.json", "optimizer.pt", "scheduler.pt", "adapter_model.safetensors"])
def test_a_torn_checkpoint_is_left_aside(file, run, tmp_path):
    """As those of a run that something else has written, or that a machine lost in a crash."""
    _, output = run
    place = shutil.copytree(output, tmp_path / "run")
    assert [path.name for path in checkpoints(place)] == ["checkpoint-2", "checkpoint-4"]
    torn = place / "checkpoint-4" / file
    for cut in (torn.stat().st_size - 2, torn.stat().st_size // 2, 0):
        os.truncate(torn, cut)
        assert not is_whole(place / "checkpoint-4") and newest_whole(place) == place / "checkpoint-2"
    torn.unlink()
    assert newest_whole(place) == place / "checkpoint-2"


def test_a_run_goes_on_from_the_newest_whole_one_and_says_so(run, train, tmp_path, capsys):
    _, output = run
    place = shutil.copytree(output, tmp_path / "run")
    (place / "run.json").unlink()
    os.truncate(place / "checkpoint-4" / "optimizer.pt", 100)
    (place / "checkpoint.partial" / "checkpoint-4").mkdir(parents=True)
    settings = {**FAST, "max_steps": 4, "save_steps": 2, "output_dir": place}
    with pytest.raises(SystemExit, match=r"the checkpoint .*checkpoint-4 is not whole.*: name another one, or true"):
        train(**settings, resume_from_checkpoint=place / "checkpoint-4")
    train(**settings, resume_from_checkpoint="true")
    told = f"Training goes on from {place / 'checkpoint-2'}; checkpoint-4, which a run was writing when it was killed"
    assert told in capsys.readouterr().out and not (place / "checkpoint.partial").exists()
    for folder in ("", "checkpoint-4"):
        again, whole = weights(place / folder), weights(output / folder)
        assert all(torch.equal(again[key], whole[key]) for key in whole)
    for name in ("checkpoint-2", "checkpoint-4"):
        os.truncate(place / name / "trainer_state.json", 10)
    (place / "run.json").unlink()  # a run that was finished needs none
    with pytest.raises(
        SystemExit, match=r"none of checkpoint-2, checkpoint-4 in .* is whole.*: start in another output"
    ):
        train(**settings, resume_from_checkpoint="true")


def test_every_failure_of_saving_is_one_sentence(run, tmp_path, monkeypatch):
    """The tokenizer's is a bare Exception."""
    trainer, output = run
    place = shutil.copytree(output, tmp_path / "run")
    monkeypatch.setattr(trainer.args, "output_dir", str(place))

    def full(*args, **kwargs):
        raise Exception("No space left on device\n(os error 28)")

    monkeypatch.setattr(trainer.processing_class.tokenizer, "save_pretrained", full)
    way_on = f"go on with --resume-from-checkpoint {place / 'checkpoint-4'}"
    reason = "(No space left on device (os error 28))"
    with pytest.raises(OSError) as failed:
        saving.save_adapter(trainer)
    assert str(failed.value) == f"the adapter could not be written to {place} {reason}: make room, then {way_on}"
    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", full)
    monkeypatch.setattr(trainer.processing_class.tokenizer, "save_pretrained", lambda *args, **kwargs: ())
    with pytest.raises(OSError) as failed:
        trainer._save_checkpoint(trainer.model, None)
    assert str(failed.value).startswith(
        f"checkpoint-4 could not be written {reason}; the adapter as of this step is in"
    )
    assert str(failed.value).endswith(way_on) and is_whole(place / "checkpoint-4")
    assert not [path.name for path in place.iterdir() if "partial" in path.name or "tmp" in path.name]
