"""torch's default dtype is the user's, and that of whatever library loads a model at this moment: no number of ours
depends on it."""

import contextlib
import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from older import scales_what_dare_keeps
from pairs import drift, load, wrap
from safetensors.torch import load_file

from drift_peft import ReasoningPrior, build_prior, merge_adapter, merge_baseline, telemetry, transplant
from drift_peft.demo.compare import EXPERT, VLM
from drift_peft.tuner.capture import _omega

IDS = torch.arange(7, 27).reshape(2, 10)
DTYPES = (torch.bfloat16, torch.float16, torch.float64)


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def adapted(folder):
    """An adapter of the demo's VLM with numbers in it."""
    report = transplant(EXPERT, VLM, folder / "adapter", rank=4, progress=False)
    return report.output


def weights(path):
    """The bytes of a prior; of a folder, those of its tensors, since safetensors writes metadata in random order."""
    if path.is_file():
        return path.read_bytes()
    tensors = {key: t for file in sorted(path.glob("*.safetensors")) for key, t in load_file(file).items()}
    return {key: (t.dtype, t.shape, t.view(torch.uint8).numpy().tobytes()) for key, t in sorted(tensors.items())}


def prior_of(folder, output, **settings):
    return build_prior(EXPERT, VLM, folder / output, progress=False, **settings).path


MADE = {
    "prior": lambda folder: prior_of(folder, "p", rank=4, modules=["attn", "mlp", "norm", "bias", "head"]),
    "by energy": lambda folder: prior_of(folder, "p", energy=0.7),
    "combined": lambda folder: ReasoningPrior.combine({prior_of(folder, "p", rank=4): 0.3}, folder / "c").path,
    "truncated": lambda folder: ReasoningPrior.load(prior_of(folder, "p", rank=4)).truncate(2, folder / "t").path,
    "exported": lambda folder: ReasoningPrior.load(prior_of(folder, "p", rank=4)).as_lora(0.3, folder / "a", base=VLM),
    "transplant": adapted,
    "merged": lambda folder: merge_adapter(VLM, adapted(folder), folder / "m", progress=False).output,
    **{
        method: lambda folder, method=method, **how: (
            merge_baseline(method, EXPERT, VLM, folder / method, scale=0.3, progress=False).output
        )
        for method in ("task_arithmetic", "ties", "dare_linear", "dare_ties")
    },
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    made = {}

    def of(case):
        if case not in made:
            made[case] = weights(MADE[case](tmp_path_factory.mktemp("expected")))
        return made[case]

    return of


@pytest.mark.parametrize("case", [pytest.param(c, marks=scales_what_dare_keeps if "dare" in c else ()) for c in MADE])
def test_files_are_the_same_bytes(case, expected, tmp_path):
    wanted = expected(case)
    with default_dtype(torch.float16):  # what is made without a dtype of its own is off in any other one
        assert weights(MADE[case](tmp_path)) == wanted


THREADED = {  # the others are made by the same code
    **{"prior": (), **dict.fromkeys(("combined", "merged", "ties"), pytest.mark.slow)},
    **dict.fromkeys(("dare_linear", "dare_ties"), scales_what_dare_keeps),
}


@pytest.mark.parametrize("case", [pytest.param(case, marks=marks) for case, marks in THREADED.items()])
def test_threads_make_the_same_bytes(case, expected, tmp_path):
    """While others change the default dtype, as reading a model does, and draw random numbers."""
    wanted = expected(case)
    folders = [tmp_path / name for name in "abcd"]
    for folder in folders:
        folder.mkdir()
    with ThreadPoolExecutor(4) as pool:
        for made in pool.map(MADE[case], folders):
            assert weights(made) == wanted
    assert torch.nn.Linear(1, 1).weight.device.type == "cpu"  # nothing that all threads share is left changed


SETTINGS = {
    "adaptive": {},
    "of the weight": {"drift_norm": "weight", "drift_sketch": 4},
    "decoupled": {"drift_scale": "decoupled", "drift_target": "factors"},
    "scheduled": {"drift_warmup_steps": 3, "drift_decay_steps": 3},
    "flat": {"drift_spectrum": "flat", "bias": "all", "modules_to_save": ["norm"]},
}


@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps_are_the_same(case, dtype, pairs):
    """Adapters get the default dtype from PEFT, so that of the steps alone is another one here."""
    folder, seen = pairs("llama"), []
    start = wrap(load(folder, "llama"), drift(folder, **SETTINGS[case]))
    for inside in (torch.float32, dtype):
        _omega.cache_clear()
        model = copy.deepcopy(start)
        groups = [{"params": [p], "lr": 1e-3 * (i + 1)} for i, p in enumerate(model.parameters()) if p.requires_grad]
        optimizer = torch.optim.SGD(groups)
        for _ in range(2):
            with default_dtype(inside if case == "of the weight" else torch.float32):
                model(input_ids=IDS, labels=IDS).loss.backward()
            with default_dtype(inside):
                optimizer.step()
            optimizer.zero_grad()
        with default_dtype(inside):
            seen.append((telemetry(model), [p.detach().clone() for p in model.parameters()]))
    (told, parameters), (other_told, others) = seen
    assert told == other_told and all(map(torch.equal, parameters, others))


def test_a_prior_says_its_fingerprint_in_fp32(pairs):
    prior = ReasoningPrior.load(pairs("llama") / "prior.safetensors")
    with default_dtype(torch.float16):
        assert {values.dtype for *_, values in prior.probes()} == {torch.float32}
