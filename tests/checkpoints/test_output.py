"""lock.py, watch.py, output.py, standalone.py: one writer at a time, whole outputs, inputs that stay what they were."""

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import filelock
import pytest
import torch
from older import needs
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from sample_prior import sample_prior
from tiny import save_layout, tiny_llm

from drift_peft import build_prior, make_keep_set, merge_adapter, merge_baseline
from drift_peft.checkpoints import lock, standalone
from drift_peft.checkpoints.checkpoint import INDEX
from drift_peft.checkpoints.lock import only_writer
from drift_peft.checkpoints.output import resumable_folder
from drift_peft.checkpoints.standalone import replaced_when_complete
from drift_peft.keeping import write_page
from drift_peft.prior import ReasoningPrior
from drift_peft.prior import build as build_module
from drift_peft.prior.report import prior_summary, write_report


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """base/ and expert/ in shards, and adapter/ of the base."""
    folder = tmp_path_factory.mktemp("template")
    model = tiny_llm("llava")
    save_layout(model, folder / "base", max_shard_size="60KB")
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.1 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    save_layout(model, folder / "expert", max_shard_size="60KB")
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    wrapped.save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def models(template, tmp_path):
    return shutil.copytree(template, tmp_path / "models")


def test_the_weights_of_a_model_are_replaced_by_nothing_else(models, tmp_path):
    """Whatever writes one file. What we wrote beside them may be."""
    prior = sample_prior(tmp_path / "p.safetensors")
    weights = [max((models / part).glob("*.safetensors")) for part in ("base", "expert", "adapter")]
    before = {file: file.read_bytes() for file in weights}
    for file in weights:
        for write in (
            lambda out: build_prior(models / "expert", models / "base", out, overwrite=True, progress=False),
            lambda out: prior.truncate(1, out, overwrite=True),
            lambda out: make_keep_set(models / "base", "no/images", out, overwrite=True),
        ):
            with pytest.raises(FileExistsError, match=r"output .* is a file of the model in that folder: name another"):
                write(file)
    assert before == {file: file.read_bytes() for file in weights}
    beside = models / "base" / "prior.safetensors"
    for _ in range(2):
        prior.save(beside, overwrite=True)
    assert ReasoningPrior.load(beside).sha256 == prior.sha256


# One writer at a time

WRITERS = {
    "build": lambda prior, out: build_prior("no/expert", "no/base", out),
    "keep make": lambda prior, out: make_keep_set("no/vlm", "no/images", out),
    "combine": lambda prior, out: ReasoningPrior.combine({prior: 2.0}, out),
    "truncate": lambda prior, out: prior.truncate(1, out),
    "save": lambda prior, out: prior.save(out),
    "export": lambda prior, out: prior.as_lora(1.0, out, base="no/base"),
    "merge": lambda prior, out: merge_adapter("no/base", "no/adapter", out),
    "merge-baseline": lambda prior, out: merge_baseline("layer_swap", "no/expert", "no/base", out),
    "page of a prior": lambda prior, out: write_report(prior_summary(prior), html=out),
    "page of a keep set": lambda prior, out: write_page(None, out),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_the_second_writer_is_told_of_the_first(writer, tmp_path):
    """Before it opens anything: there is no model of these names."""
    prior = sample_prior(tmp_path / "p.safetensors")
    out = tmp_path / "out.html"
    with only_writer(out):
        with pytest.raises(FileExistsError, match=rf"out.html is being written by process {os.getpid()} on \S+: wait"):
            WRITERS[writer](prior, out)
        assert (tmp_path / "out.html.lock").exists()
    assert sorted(os.listdir(tmp_path)) == ["p.safetensors"]


def test_the_lock_of_a_killed_process_holds_nobody_up(tmp_path):
    # The file alone: the package would import torch.
    script = (
        "import os, runpy, sys; from pathlib import Path; only_writer = runpy.run_path(sys.argv[1])['only_writer']\n"
    )
    script += "with only_writer(Path(sys.argv[2])): os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", script, lock.__file__, tmp_path / "out"])
    assert os.listdir(tmp_path) == ["out.lock"]
    with only_writer(tmp_path / "out"):
        assert str(os.getpid()) in (tmp_path / "out.lock").read_text()
    assert os.listdir(tmp_path) == []


def test_a_writer_that_finishes_just_then_holds_nobody_up(tmp_path, monkeypatch):
    """Its lock is there when the next one asks for it, and gone when that one looks who it is."""
    acquire, first = filelock.FileLock.acquire, contextlib.ExitStack()
    first.enter_context(only_writer(tmp_path / "out"))

    def late(self, *args, **options):
        try:
            return acquire(self, *args, **options)
        except filelock.Timeout:
            first.close()
            raise

    monkeypatch.setattr(filelock.FileLock, "acquire", late)
    with only_writer(tmp_path / "out"):
        assert os.listdir(tmp_path) == ["out.lock"]
    assert os.listdir(tmp_path) == []


@needs(filelock, "4.2.6", "empties or deletes the other's lock where there is no flock")
@pytest.mark.skipif(sys.platform == "win32", reason="has no flock")
@pytest.mark.filterwarnings("ignore:flock not supported")
def test_where_there_is_no_flock(tmp_path, monkeypatch):
    """filelock then takes over what a killed process held, by what itself has written there."""
    script = "import errno, fcntl, os, runpy, sys; from pathlib import Path; from unittest.mock import Mock\n"
    script += "fcntl.flock = Mock(side_effect=OSError(errno.ENOSYS, 'no flock'))\n"
    script += "with runpy.run_path(sys.argv[1])['only_writer'](Path(sys.argv[2])): os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", script, lock.__file__, tmp_path / "out"])
    assert os.listdir(tmp_path) == ["out.lock"]
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError(errno.ENOSYS, "no flock")))
    with only_writer(tmp_path / "out"):
        with pytest.raises(FileExistsError, match=rf"out is being written by process {os.getpid()} on [\w.-]+: wait"):
            with only_writer(tmp_path / "out"):
                pass
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(sys.platform != "linux", reason="names are UTF-8 there")
def test_a_path_that_is_not_utf8_is_refused_before_the_work(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    with pytest.raises(ValueError, match="its path is not UTF-8, and safetensors writes to no other"):
        build_prior("no/expert", "no/base", folder / "p.safetensors")
    assert os.listdir(folder) == []


@pytest.mark.parametrize("writer", WRITERS)
def test_a_home_that_no_shell_has_put_in_is_named(writer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prior = sample_prior(tmp_path / "p.safetensors")
    home = r"there is no folder \S*~: ~ stands for your folder in a shell alone, so write [^~]+out.html$"
    with pytest.raises(FileNotFoundError, match=home):
        WRITERS[writer](prior, "~/out.html")


# Outputs


def folder_of(path, text):
    path.mkdir()
    (path / "config.json").write_text(text)
    return path


def test_what_was_killed_between_two_renames_is_put_back(tmp_path, monkeypatch):
    output, replace = folder_of(tmp_path / "merged", "before"), os.replace

    class Killed(BaseException):
        pass

    def killed(source, target):
        if str(source).endswith(".partial"):
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(Killed), replaced_when_complete(output, True, ()) as partial:
            (partial / "config.json").write_text("after")
    assert os.listdir(tmp_path) == ["merged.drift_peft-replaced"]
    with pytest.raises(FileExistsError, match="merged exists: name another folder"):
        with replaced_when_complete(output, False, ()):
            raise AssertionError
    assert os.listdir(tmp_path) == ["merged"] and (output / "config.json").read_text() == "before"
    with replaced_when_complete(output, True, ()) as partial:
        (partial / "config.json").write_text("after")
    assert os.listdir(tmp_path) == ["merged"] and (output / "config.json").read_text() == "after"


@pytest.mark.parametrize(("error", "left"), [(ValueError("NaN"), []), (OSError("no network"), ["out.partial"])])
def test_only_an_error_that_may_pass_keeps_what_is_done(error, left, tmp_path):
    with pytest.raises(type(error)) as caught:
        with resumable_folder(tmp_path / "out", {}, final=(ValueError,)) as folder:
            (folder / "a.safetensors").touch()
            raise error
    assert os.listdir(tmp_path) == left
    assert bool(getattr(caught.value, "__notes__", ())) == bool(left)


# Inputs that change while they are read


def renamed(file):
    other = file.with_name("other")
    other.write_bytes(file.read_bytes()[::-1])
    os.replace(other, file)


def in_place(file):
    with open(file, "r+b") as opened:
        opened.seek(-4, os.SEEK_END)
        opened.write(b"\0\0\0\0")


def cut(file):
    os.truncate(file, file.stat().st_size // 2)


CHANGES = {"renamed": renamed, "in place": in_place, "cut": cut, "gone": os.unlink}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("role", ["expert", "base"])
def test_a_build_of_models_that_change_is_none(role, change, models, tmp_path, monkeypatch):
    taken = []

    def take(*arguments, real=build_module.take_delta):
        taken.append(1)
        if len(taken) == 3:
            CHANGES[change](sorted((models / role).glob("*.safetensors"))[-1])
        return real(*arguments)

    monkeypatch.setattr(build_module, "take_delta", take)
    with pytest.raises(ValueError, match=rf"models/{role}/\S+ has changed while \S+{role} was read, .*: run the same"):
        build_prior(models / "expert", models / "base", tmp_path / "p.safetensors", rank=2, progress=False)
    assert os.listdir(tmp_path) == ["models"]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("file", ["base/*-00001-*.safetensors", "base/config.json", "adapter/adapter_config.json"])
def test_a_merge_of_what_changes_is_none(file, change, models, tmp_path, monkeypatch):
    (file,) = models.glob(file)

    def write(*arguments, real=standalone._write_tensor):
        squares = real(*arguments)
        if file.exists() and not taken:
            CHANGES[change](file)
        taken.append(1)
        return squares

    taken = []
    monkeypatch.setattr(standalone, "_write_tensor", write)
    with pytest.raises((ValueError, OSError), match=rf"{file.name} has changed while|could not be written"):
        merge_adapter(models / "base", models / "adapter", tmp_path / "merged", progress=False)
    assert os.listdir(tmp_path) == ["models"]


def test_a_prior_that_changes(tmp_path):
    prior = sample_prior(tmp_path / "p.safetensors")
    in_place(prior.path)
    for write in (lambda out: prior.truncate(1, out), lambda out: prior.save(out)):
        with pytest.raises(ValueError, match=r"p.safetensors has changed while"):
            write(tmp_path / "q.safetensors")
    assert os.listdir(tmp_path) == ["p.safetensors"]


# Shards in subfolders


def into(folder, place):
    """Move each shard to place(number, name), and the index with it."""
    index = json.loads((folder / INDEX).read_text())
    places = {name: place(i, name) for i, name in enumerate(sorted({*index["weight_map"].values()}))}
    for name, target in places.items():
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(folder / name, folder / target)
    index["weight_map"] = {key: places[name] for key, name in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))
    return places


@pytest.mark.parametrize(
    "place", [lambda i, name: f"sub/{name}", lambda i, name: f"{i}/deep/x.safetensors", lambda i, name: f"./{name}"]
)
def test_shards_in_subfolders_stay_there(place, models, tmp_path):
    sources = {"base": models / "base", "adapter": models / "adapter", "progress": False}
    flat = merge_adapter(**sources, output=tmp_path / "flat").output
    places = into(models / "base", place)
    assert len(places) > 1
    nested = merge_adapter(**sources, output=tmp_path / "nested").output
    for name, target in places.items():
        assert (nested / target).read_bytes() == (flat / name).read_bytes()
    assert {*load_file(nested / target)} <= {*json.loads((nested / INDEX).read_text())["weight_map"]}
    merge_baseline("task_arithmetic", models / "expert", models / "base", tmp_path / "b", scale=0.5, progress=False)
    assert all((tmp_path / "b" / target).is_file() for target in places.values())


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no folder where nothing can be made")
def test_where_nothing_can_be_made_nobody_is_writing():
    with pytest.raises(OSError, match=r"output /proc/x.safetensors cannot be written: /proc takes no file"):
        with only_writer(Path("/proc/x.safetensors")):
            pass
