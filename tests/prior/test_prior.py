"""file.py: the file of a prior, what reads it, and what happens when it cannot be written."""

import copy
import hashlib
import json
import math
import os
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from drift_peft import ReasoningPrior
from drift_peft.checkpoints import hub
from drift_peft.checkpoints.output import OURS
from drift_peft.prior import PriorVector, PriorWeight
from drift_peft.prior.file import FILE_NAME, FORMAT, HEADER_KEY, partial_output, write_prior

NAMES = ["layers.2.mlp.up_proj.weight", "layers.10.self_attn.q_proj.weight"]
VECTOR = "layers.2.self_attn.q_proj.bias"
MEASURED = {"delta_norm": 2.0, "base_norm": 9.0, "cosine": 0.99}
HEADER = {"format": FORMAT, "rank": 64, "reference": None, "dtype": "bfloat16", "seed": 0, "modules": ["attn", "mlp"]}
HEADER |= {role: {"id": role, "revision": None} for role in ("base", "expert")}
STATS = {"shape": [6, 5], **MEASURED, "rank": 3, "energy": 0.75}


def write(path, **header):
    tensors = {}
    for name in NAMES:
        tensors[f"{name}.U"], tensors[f"{name}.Vh"] = torch.randn(6, 3).bfloat16(), torch.randn(3, 5).bfloat16()
        tensors[f"{name}.S"] = torch.tensor([3.0, 2.0, 1.0])
    weights = {name: {**STATS, "fingerprint": [0.5, -0.25, 1.0]} for name in NAMES}
    tensors[f"{VECTOR}.delta"] = torch.randn(6)
    weights[VECTOR] = {"shape": [6], **MEASURED, "energy": 1.0}
    metadata = {**HEADER, "not_steered": ["layers.3.mlp.up_proj.weight"], "weights": weights}
    with partial_output(path) as folder:
        write_prior(folder, path, tensors, metadata | header)
    return tensors


def test_a_prior_is_a_mapping(tmp_path):
    tensors = write(tmp_path / "p.safetensors")
    prior = ReasoningPrior.load(tmp_path / "p.safetensors")
    assert list(prior) == [NAMES[0], VECTOR, NAMES[1]] and len(prior) == 3
    assert NAMES[0] in prior and "norm.weight" not in prior and prior.get("norm.weight") is None
    weight, vector = prior[NAMES[1]], prior[VECTOR]
    assert isinstance(weight, PriorWeight) and isinstance(vector, PriorVector)
    assert torch.equal(vector.delta, tensors[f"{VECTOR}.delta"])
    assert (vector.delta_norm, vector.base_norm, vector.cosine) == (2.0, 9.0, 0.99)
    assert all(torch.equal(getattr(weight, f), tensors[f"{NAMES[1]}.{f}"]) for f in ("U", "S", "Vh"))
    assert (weight.delta_norm, weight.base_norm, weight.cosine, weight.energy) == (2.0, 9.0, 0.99, 0.75)
    assert weight.fingerprint == (0.5, -0.25, 1.0)
    assert prior.source == str(tmp_path / "p.safetensors")
    assert prior.sha256 == hashlib.sha256((tmp_path / "p.safetensors").read_bytes()).hexdigest()
    assert repr(prior).endswith("3 weights, rank 3)") and {prior: 1}[prior] == 1


@pytest.mark.parametrize("how", [copy.deepcopy, lambda prior: pickle.loads(pickle.dumps(prior))])
def test_a_prior_is_copied_and_pickled(tmp_path, how):
    write(tmp_path / "p.safetensors")
    prior = ReasoningPrior.load(tmp_path / "p.safetensors")
    again = how({"prior": prior})["prior"]
    assert type(again) is ReasoningPrior and (again.source, again.metadata) == (prior.source, prior.metadata)
    assert torch.equal(again[NAMES[0]].U, prior[NAMES[0]].U)


def test_header_is_one_sorted_json_string(tmp_path):
    write(tmp_path / "p.safetensors")
    with safe_open(tmp_path / "p.safetensors", "pt") as file:
        assert list(file.metadata()) == [HEADER_KEY]
        header = file.metadata()[HEADER_KEY]
        assert file.get_tensor(f"{NAMES[0]}.U").dtype == torch.bfloat16
        assert file.get_tensor(f"{NAMES[0]}.S").dtype == torch.float32
    assert header == json.dumps(json.loads(header), sort_keys=True)


def test_unknown_names_are_answered_with_the_nearest(tmp_path):
    write(tmp_path / "p.safetensors")
    prior = ReasoningPrior.load(tmp_path / "p.safetensors")
    with pytest.raises(KeyError, match=r"no weight layers.2.mlp.up_proj \(nearest: layers.2.mlp.up_proj.weight"):
        prior["layers.2.mlp.up_proj"]
    with pytest.raises(KeyError, match=r"no weight layers.3.mlp.up_proj.weight \(its Δ is zero\)"):
        prior["layers.3.mlp.up_proj.weight"]


def test_save_gives_the_same_bytes(tmp_path):
    write(tmp_path / "p.safetensors")
    prior = ReasoningPrior.load(tmp_path / "p.safetensors")
    prior.save(tmp_path / "copy.safetensors")
    assert (tmp_path / "copy.safetensors").read_bytes() == (tmp_path / "p.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match=r"copy.safetensors exists: .*overwrite=True"):
        prior.save(tmp_path / "copy.safetensors")
    prior.save(tmp_path / "copy.safetensors", overwrite=True)
    prior.save(tmp_path / "p.safetensors", overwrite=True)  # onto the file that it is mapped from
    assert torch.equal(ReasoningPrior.load(tmp_path / "p.safetensors")[NAMES[0]].U, prior[NAMES[0]].U)
    assert sorted(os.listdir(tmp_path)) == ["copy.safetensors", "p.safetensors"]


def test_folder_and_hub_repository(tmp_path, monkeypatch):
    write(tmp_path / FILE_NAME)
    assert len(ReasoningPrior.load(tmp_path)) == 3
    asked = []
    monkeypatch.setattr(hub, "download", lambda *call: asked.append(call) or tmp_path)
    assert ReasoningPrior.load("some/prior@v1").source == "some/prior@v1"
    assert ReasoningPrior.load("some/prior", revision="v2").source == "some/prior@v2"  # and so it is stored
    assert asked == [("some/prior", "v1", [FILE_NAME]), ("some/prior", "v2", [FILE_NAME])]
    (tmp_path / FILE_NAME).unlink()
    with pytest.raises(FileNotFoundError, match=r"some/prior holds no prior.safetensors"):
        ReasoningPrior.load("some/prior")


def test_files_that_are_no_prior(tmp_path):
    path = tmp_path / "p.safetensors"
    with pytest.raises(FileNotFoundError, match=r"there is no file .*p.safetensors"):
        ReasoningPrior.load(path)
    path.write_text("no tensors here")
    with pytest.raises(ValueError, match="is no prior: it is truncated or no safetensors file"):
        ReasoningPrior.load(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="is a safetensors file but no prior: make one with `drift-peft prior build`"):
        ReasoningPrior.load(path)
    path.unlink()
    write(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is no prior: it is truncated"):
        ReasoningPrior.load(path)
    path.unlink()
    write(path, format=99)
    with pytest.raises(ValueError, match=f"is of format 99, not {FORMAT}: read this prior with another drift_peft"):
        ReasoningPrior.load(path)


@pytest.mark.skipif(os.name != "posix", reason="modes of files are POSIX's")
@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o007, 0o660), (0o077, 0o600)])
def test_a_prior_is_readable_by_whom_the_umask_says(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        write(tmp_path / "p.safetensors")
        prior = ReasoningPrior.load(tmp_path / "p.safetensors")
        prior.truncate(1, tmp_path / "low.safetensors")
        prior.save(tmp_path / "copy.safetensors")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {mode}


def test_outputs_that_cannot_be_written_are_refused_before_any_work(tmp_path):
    (tmp_path / "file").touch()
    for output, error, message in (
        (tmp_path, IsADirectoryError, "is a folder: name a file"),
        (tmp_path / "file", FileExistsError, "file exists: name another file"),
        (tmp_path / "none" / "p", FileNotFoundError, "there is no folder"),
        (tmp_path / ("p" * 250), OSError, "cannot be written: File name too long"),
    ):
        with pytest.raises(error, match=message), partial_output(output):
            pytest.fail("the work has begun")
    assert os.listdir(tmp_path) == ["file"]


def test_interrupted_work_leaves_nothing_and_a_killed_one_is_cleaned_up(tmp_path):
    (tmp_path / "p.partial").mkdir()
    (tmp_path / "p.partial" / "old").touch()
    with pytest.raises(FileExistsError, match=r"p.partial is in the way, .*: rename or delete it, or name another"):
        with partial_output(tmp_path / "p"):
            pass
    assert os.listdir(tmp_path / "p.partial") == ["old"]
    (tmp_path / "p.partial" / OURS).touch()
    with pytest.raises(KeyboardInterrupt), partial_output(tmp_path / "p") as folder:
        assert folder == tmp_path / "p.partial" and os.listdir(folder) == [OURS]
        (folder / "half").touch()
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_full_disk(tmp_path):
    """The operating system refuses in the middle of the file, as a full disk does."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, hard))
    try:
        with pytest.raises(OSError, match=r"written.safetensors could not be written: .*File too large"):
            write(tmp_path / "p.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("header", ["{broken", "[]", '{"format": 1}'])
def test_damaged_header(tmp_path, header):
    save_file({"x": torch.zeros(1)}, tmp_path / "p.safetensors", metadata={"drift_prior": header})
    with pytest.raises(ValueError, match="is a damaged prior: make or fetch it again"):
        ReasoningPrior.load(tmp_path / "p.safetensors")


def change(stats, **changes):
    return {name: {**was, **(changes if name == NAMES[0] else {})} for name, was in stats.items()}


CHANGED = {
    "renamed": (lambda w: {n.replace("up", "gate"): s for n, s in w.items()}, "its header promises .* and the file"),
    "a weight less": (
        lambda w: {n: s for n, s in w.items() if n != NAMES[0]},
        r"for layers.2.mlp.up_proj.weight.S its header promises none and the file holds F32 \[3\]",
    ),
    "a vector less": (
        lambda w: {n: s for n, s in w.items() if n != VECTOR},
        r"for layers.2.self_attn.q_proj.bias.delta its header promises none and the file holds F32 \[6\]",
    ),
    "a weight more": (
        lambda w: {**w, "norm.weight": w[VECTOR]},
        r"for norm.weight.delta its header promises F32 \[6\] and the file holds none",
    ),
    "another shape": (
        lambda w: change(w, shape=[7, 5]),
        r"for \S*up_proj.weight.U its header promises BF16 \[7, 3\] and the file holds BF16 \[6, 3\]",
    ),
    "another rank": (lambda w: change(w, rank=4), r"promises F32 \[4\] and the file holds F32 \[3\]"),
    "no matrix": (lambda w: change(w, shape=[6]), r"up_proj.weight.S its header promises none"),
    "long fingerprint": (lambda w: change(w, fingerprint=[1.0] * 4), "is a damaged prior"),
    "no rank": (lambda w: {n: {k: v for k, v in s.items() if k != "rank"} for n, s in w.items()}, "is a damaged prior"),
    "a text": (lambda w: change(w, delta_norm="2"), "is a damaged prior"),
    "a cube": (lambda w: change(w, shape=[6, 5, 4]), "is a damaged prior"),
    "a list": (list, "is a damaged prior"),
}


@pytest.mark.parametrize("case", CHANGED)
def test_changed_metadata(tmp_path, case):
    """The header of a sound file is edited, and its tensors stay."""
    edit, message = CHANGED[case]
    path = tmp_path / "p.safetensors"
    tensors = write(path)
    weights = edit(ReasoningPrior.load(path).metadata["weights"])
    with partial_output(path, overwrite=True) as folder:
        write_prior(folder, path, tensors, {**HEADER, "not_steered": [], "weights": weights})
    with pytest.raises(ValueError, match=message) as caught:
        ReasoningPrior.load(path)
    assert "\n" not in str(caught.value) and "fetch it again" in str(caught.value)


NOT_NUMBERS = {
    "nan in U": ("U", lambda t: t[2].fill_(torch.nan), "holds NaN or infinite values"),
    "inf in U": ("U", lambda t: t[5, 2].fill_(torch.inf), "holds NaN or infinite values"),
    "-inf in Vh": ("Vh", lambda t: t[2, 4].fill_(-torch.inf), "holds NaN or infinite values"),
    "nan in S": ("S", lambda t: t[0].fill_(torch.nan), "holds NaN or infinite values"),
    "negative S": ("S", lambda t: t[1].neg_(), "holds a negative singular value"),
    "no S": ("S", lambda t: t.zero_(), "holds zeros alone"),
    "inf in a vector": ("delta", lambda t: t[3].fill_(torch.inf), "holds NaN or infinite values"),
    "no vector": ("delta", lambda t: t.zero_(), "holds zeros alone"),
}


@pytest.mark.parametrize("case", NOT_NUMBERS)
def test_numbers_that_are_none(tmp_path, case):
    part, spoil, message = NOT_NUMBERS[case]
    path, name = tmp_path / "p.safetensors", VECTOR if part == "delta" else NAMES[1]
    tensors = write(path)
    header = ReasoningPrior.load(path).metadata
    spoil(tensors[f"{name}.{part}"])
    with partial_output(path, overwrite=True) as folder:
        write_prior(folder, path, tensors, header)
    with pytest.raises(ValueError, match=f"is damaged: {name}.{part} {message}, so build or fetch it again"):
        ReasoningPrior.load(path)


@pytest.mark.parametrize(
    "stats", [{"fingerprint": [0.5, math.nan]}, {"probe": [-math.inf]}, {"delta_norm": 0.0}, {"cosine": math.nan}]
)
def test_numbers_of_the_header_that_are_none(tmp_path, stats):
    path = tmp_path / "p.safetensors"
    tensors = write(path)
    metadata = ReasoningPrior.load(path).metadata
    metadata["weights"][NAMES[0]] |= stats
    save_file(tensors, path, {HEADER_KEY: json.dumps(metadata)})
    with pytest.raises(ValueError, match="is a damaged prior: make or fetch it again"):
        ReasoningPrior.load(path)


def gate(header):
    """As a gated prior's is."""
    origin = {"id": "org/vlm", "revision": None}
    header["gated"] = {"prior": "0" * 64, "keep_set": "1" * 64, "base": origin, "expert": origin, "seed": 0}
    for stats in header["weights"].values():
        stats |= {"gates": [0.5] * stats["rank"], "ungated_norm": 2.0}


GATED = {
    "gated is a number": lambda h: h.update(gated=5),
    "gated is null": lambda h: h.update(gated=None),
    "no base": lambda h: h["gated"].pop("base"),
    "an expert without id": lambda h: h["gated"].update(expert={}),
    "no prior": lambda h: h["gated"].pop("prior"),
    "no keep set": lambda h: h["gated"].pop("keep_set"),
    "gates are a text": lambda h: h["weights"][NAMES[0]].update(gates="abc"),
    "too many gates": lambda h: h["weights"][NAMES[0]].update(gates=[0.5] * 4),
    "a weight without gates": lambda h: h["weights"][NAMES[0]].pop("gates"),
    "a norm of 0": lambda h: h["weights"][NAMES[0]].update(ungated_norm=0.0),
    "no norm": lambda h: h["weights"][NAMES[0]].pop("ungated_norm"),
    "gates of what is not gated": lambda h: h.pop("gated"),
}


@pytest.mark.parametrize("case", [None, *GATED])
def test_headers_of_gated_priors_that_are_damaged(tmp_path, case):
    path = tmp_path / "p.safetensors"
    tensors = {key: tensor for key, tensor in write(path).items() if not key.startswith(VECTOR)}
    metadata = ReasoningPrior.load(path).metadata
    del metadata["weights"][VECTOR]
    gate(metadata)
    (GATED[case] if case else lambda header: None)(metadata)
    save_file(tensors, path, {HEADER_KEY: json.dumps(metadata)})
    if case:
        with pytest.raises(ValueError, match="is a damaged prior: make or fetch it again"):
            ReasoningPrior.load(path)
    else:
        assert "gate_prior(" in ReasoningPrior.load(path).model_card().text


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_changed_dtype(tmp_path, dtype):
    path = tmp_path / "p.safetensors"
    tensors = write(path)
    header = ReasoningPrior.load(path).metadata
    tensors[f"{NAMES[0]}.U"] = tensors[f"{NAMES[0]}.U"].to(dtype)
    with partial_output(path, overwrite=True) as folder:
        write_prior(folder, path, tensors, header)
    with pytest.raises(ValueError, match=r"promises BF16 \[6, 3\] and the file holds F(16|32) \[6, 3\], so build or"):
        ReasoningPrior.load(path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_cut_short(tmp_path, share):
    path = tmp_path / "p.safetensors"
    write(path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"p.safetensors is no prior: it is truncated or no safetensors file"):
        ReasoningPrior.load(path)
