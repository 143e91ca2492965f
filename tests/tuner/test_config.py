"""DriftConfig: every refusal by its message, and what stands on disk."""

import dataclasses
import inspect
import json
import math
from pathlib import Path

import numpy as np
import peft
import pytest
from older import known, variant
from peft import LoraConfig, PeftConfig, PeftType

from drift_peft import DriftConfig
from drift_peft.checkpoints import DRIFT_CONFIG


def config(**settings):
    return DriftConfig(**{"prior": "prior.safetensors", **settings})


CHANGES_W = "is not available with guidance.*'gaussian'.*also change Δ"
FACTORS = {"drift_target": "factors"}
BASE = {"drift_scale": "decoupled", "drift_target": "base"}
REFUSED = [
    # drift_alpha
    ({"drift_alpha": -1.0}, r"drift_alpha=-1\.0 is negative: a positive strength pulls toward the expert"),
    ({"drift_alpha": -0.5}, r"where the paper writes α = -0\.5 set drift_alpha=0\.5"),
    ({"drift_alpha": math.nan}, r"drift_alpha must be a finite number ≥ 0, got nan"),
    ({"drift_alpha": math.inf}, r"drift_alpha must be a finite number ≥ 0, got inf"),
    ({"drift_alpha": "1"}, r"drift_alpha must be a finite number ≥ 0, got '1'"),
    ({"drift_alpha": True}, r"drift_alpha must be a finite number ≥ 0, got True"),
    ({"drift_alpha": None}, r"drift_alpha must be a finite number ≥ 0, got None"),
    # LoRA's
    ({"modules_to_save": "lm_head"}, r"modules_to_save must be a list, such as \['lm_head'\], got 'lm_head'"),
    # modes
    ({"drift_scale": "gradnrm"}, r"drift_scale='gradnrm' is unknown.*'adaptive', .*; did you mean gradnorm\?"),
    ({"drift_scale": "adaptiv"}, r"did you mean adaptive\?"),
    ({"drift_scale": "zzz"}, r"drift_scale='zzz' is unknown: choose one of .*'decoupled'$"),
    ({"drift_scale": None}, r"drift_scale=None is unknown"),
    ({"drift_target": "Residual"}, r"drift_target='Residual' is unknown.*did you mean residual\?"),
    ({"drift_target": "bse"}, r"drift_target='bse' is unknown.*'base'; did you mean base\?"),
    ({"drift_norm": "factors"}, r"drift_norm='factors' is unknown.*did you mean factor\?"),
    # where and when
    *[
        ({"drift_modules": m}, r"drift_modules must be None, or name presets \(attn, .*got")
        for m in ([], "", ["attn", 3], 5, {"attn": 1}, b"attn")
    ],
    ({"drift_modules": ["attn", "q_(proj"]}, r"^drift_modules: 'q_\(proj' is no regular expression: missing \)"),
    ({"drift_alpha_pattern": {"*": 1.0}}, r"^drift_alpha_pattern: '\*' is no regular expression: nothing to repeat\.$"),
    *[
        ({"drift_alpha_pattern": pattern}, r"drift_alpha_pattern must be a dict of a string to anything, got")
        for pattern in ({3: 1.0}, None, ["attn"], 0.5)
    ],
    *[
        ({"drift_alpha_pattern": {"q_proj": a}}, r"drift_alpha_pattern\['q_proj'\] must be a finite number ≥ 0, got")
        for a in (-1, math.nan, math.inf, "1", True, None)
    ],
    *[({"drift_warmup_steps": n}, r"drift_warmup_steps must be a .* ≥ 0, got") for n in (-1, 2.5, "8", True, None)],
    *[({"drift_log_kinds": kinds}, r"drift_log_kinds must be True or False, got") for kinds in (1, "yes", None)],
    *[({"drift_decay_steps": n}, r"drift_decay_steps must be None or a .* ≥ 1, got") for n in (0, -4, 2.5, "8", True)],
    (
        {"drift_spectrum": "flt"},
        r"drift_spectrum='flt' is unknown: choose one of 'full', 'flat'; did you mean flat\?",
    ),
    *[
        ({"drift_spectrum": p}, r"drift_spectrum must be .* a power between 0 and 4, got")
        for p in (-1, 5, math.nan, None, True)
    ],
    # ranks
    *[({"drift_rank": k}, rf"drift_rank must be None or a .* ≥ 1, got {k!r}") for k in (0, -4, 2.5, "8", True)],
    *[({"r": r}, rf"r must be a whole number ≥ 1, got {r!r}") for r in (0, -8, 2.5, "8", True, None)],
    # the start
    *[
        ({"drift_start": s}, rf"drift_start is a share of Δ, a number from 0 to 1, got {s!r}")
        for s in (-0.1, 1.5, math.nan, "0.5", True, None)
    ],
    *[
        ({"drift_start": 0.5, "init_lora_weights": start}, rf"drift_start=0.5 .* init_lora_weights={start!r} starts it")
        for start in (True, False, "gaussian", "eva")
    ],
    *[
        ({"drift_start": 0.5, **alpha}, r"drift_start=0\.5 needs a positive LoRA scaling, since what it makes of Δ is")
        for alpha in ({"lora_alpha": 0}, {"lora_alpha": -8}, {"alpha_pattern": {"q_proj": 0}})
    ],
    ({"drift_start": 0.5, "drift_alpha": 0, "prior": None}, "DriftConfig needs a prior to train"),
    ({"drift_start": 0.5, **BASE}, "drift_start=0.5 puts a part of Δ into .*'base' would pull it out again: leave out"),
    # combinations
    ({"drift_scale": "decoupled"}, r"moves the factors.*drift_target='residual'.*set drift_target='factors'"),
    (
        {"drift_scale": "decoupled", "drift_target": "delta"},
        r"drift_target='delta' has no meaning.*'factors' or 'base'",
    ),
    ({"drift_target": "base"}, r"drift_scale='adaptive' has no meaning for it: set drift_scale='decoupled'"),
    ({**FACTORS, "drift_rank": 4}, r"drift_rank=4 has no meaning with drift_target='factors'.*leave drift_rank=None"),
    ({**FACTORS, "lora_alpha": 0}, r"'factors' needs a positive LoRA scaling.* got lora_alpha=0"),
    ({**FACTORS, "lora_alpha": -8}, r"'factors' needs a positive LoRA scaling.* got lora_alpha=-8"),
    ({**FACTORS, "alpha_pattern": {"q_proj": 0}}, r"'factors' needs a positive .*alpha_pattern=\{'q_proj': 0\}"),
    # the prior
    ({"prior": None}, r"DriftConfig needs a prior to train.*build_prior.*use peft\.LoraConfig for training without"),
    ({"prior": 7}, r"prior must be a path or a hub id, got int"),
    ({"lora_alpha": float("nan")}, r"lora_alpha=nan is no finite number"),
    ({"lora_alpha": float("inf")}, r"lora_alpha=inf is no finite number"),
    ({"lora_alpha": "16"}, r"lora_alpha='16' is no finite number"),
    ({"alpha_pattern": {"q_proj": float("-inf")}}, r"alpha_pattern\['q_proj'\]=-inf is no finite number"),
    # what changes the chain rule or the base weight
    ({"use_dora": True}, r"use_dora changes how an adapter acts on the weight.*leave out use_dora"),
    ({"use_qalora": True}, r"use_qalora changes how"),
    (variant("kasa_config", "KasaConfig"), r"kasa_config changes how"),
    (variant("monteclora_config", "MontecloraConfig"), r"monteclora_config changes how"),
    (variant("use_bdlora", "BdLoraConfig", target_modules_bd_a=["q_proj"]), r"use_bdlora changes how"),
    (variant("arrow_config", "ArrowConfig"), r"arrow_config changes how"),
    ({"layer_replication": [(0, 1)]}, r"layer_replication changes how"),
    ({"use_dora": True, "use_qalora": True}, r"leave out use_dora and use_qalora"),
    ({"init_lora_weights": "pissa"}, f"init_lora_weights='pissa' {CHANGES_W}"),
    ({"init_lora_weights": "pissa_niter_4"}, CHANGES_W),
    ({"init_lora_weights": "olora"}, CHANGES_W),
    ({"init_lora_weights": "corda"}, CHANGES_W),
    ({"init_lora_weights": "mica"}, CHANGES_W),
    ({"init_lora_weights": "drfit"}, CHANGES_W),
    ({"prior": ""}, "prior is empty: name a file"),
    ({"drift_steps": "5"}, "drift_steps must be a whole number"),
    ({"drift_steps": -5}, "drift_steps must be a whole number ≥ 0, got -5"),
    ({"prior_sha256": 3}, "prior_sha256 must be"),
    ({"drift_scale": "decoupled", "drift_target": "base", "drift_rank": 2}, "drift_rank=2 has no meaning with"),
    ({"drift_scale": "decoupled", "drift_target": "base", "drift_spectrum": "flat"}, "drift_spectrum='flat' has no"),
]


@pytest.mark.parametrize(("settings", "message"), [known(settings, settings, told) for settings, told in REFUSED])
@pytest.mark.filterwarnings("ignore")
def test_refusals(settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)


@pytest.mark.parametrize(
    ("key", "near"),
    [("drift_alhpa", "drift_alpha"), ("drift_scales", "drift_scale"), ("lora_alfa", "lora_alpha"), ("priors", "prior")],
)
def test_unknown_key_names_the_nearest(key, near):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{key}'; did you mean {near}\\?"):
        config(**{key: 1})


def test_biases_that_peft_would_not_save_are_refused(monkeypatch):
    monkeypatch.setattr(peft, "__version__", "0.20.0")
    message = r"^bias='lora_only' needs PEFT 0\.21 or newer, since PEFT 0\.20\.0 does not save .* or take bias='all'\.$"
    with pytest.raises(ValueError, match=message):
        config(bias="lora_only")
    assert config(bias="lora_only", inference_mode=True).bias == "lora_only"


def test_unknown_key_without_a_near_one():
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'zzz'$"):
        config(zzz=1)


ACCEPTED = [
    {"drift_alpha": 0},
    {"drift_alpha": 3, "drift_scale": "decoupled", "drift_target": "factors"},
    {"drift_rank": 3, "r": 8},
    {"drift_target": "factors", "lora_alpha": 0.5},
    {"layers_to_transform": [1], "target_modules": {"q_proj"}},
    {"layers_to_transform": [1]},
    {"drift_modules": "attn", "drift_alpha_pattern": {"q_proj": 0, r"layers\.1\..*": 2.5}},
    {"drift_modules": ["mlp", "bias", "norm", "head", "embed", r"self_attn\.[qk]_proj"]},
    {"drift_warmup_steps": 10, "drift_decay_steps": 1},
    {"drift_spectrum": 0},
    {"drift_spectrum": 0.5},
    {"drift_start": 1, "drift_rank": 3},
    {"drift_start": 0.5, "drift_alpha": 0},
    {"prior": None, "drift_scale": "decoupled", "drift_target": "base", "init_lora_weights": True},
    {"alora_invocation_tokens": [1, 2], "task_type": "CAUSAL_LM"},
    {**variant("velora_config", "VeloraConfig"), "lora_bias": True},
    {"init_lora_weights": True},
    {"init_lora_weights": False},
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": "orthogonal"},
    {"use_rslora": True, "alpha_pattern": {"q_proj": 4}, "rank_pattern": {"q_proj": 2}},
    {"prior": None, "inference_mode": True},
]


@pytest.mark.parametrize("settings", [known(settings, settings) for settings in ACCEPTED])
def test_accepted_as_given(settings):
    made = config(**settings)
    assert made.peft_type == PeftType.LORA and isinstance(made, LoraConfig)
    assert {key: getattr(made, key) for key in settings} == settings


def test_defaults():
    made = config()
    assert (made.drift_alpha, made.drift_scale, made.drift_target, made.drift_rank, made.drift_norm) == (
        0.3, "adaptive", "residual", None, "factor",
    )  # fmt: skip
    assert made.init_lora_weights == "drift" and made.target_modules is None and made.drift_steps == 0
    assert (made.drift_modules, made.drift_alpha_pattern, made.drift_spectrum) == (None, {}, "full")
    assert (made.drift_warmup_steps, made.drift_decay_steps) == (0, None)
    held = DriftConfig(drift_scale="decoupled", drift_target="base")
    assert held.init_lora_weights is True  # without a prior there is no Δ to start from


# On disk

SETTINGS = {
    "prior": "some/prior@abc", "prior_sha256": "0f" * 32, "drift_alpha": 0.3, "drift_scale": "gradnorm",
    "drift_target": "delta", "drift_rank": 5, "drift_start": 0.5, "drift_steps": 17, "drift_spectrum": 0.5,
    "drift_modules": ["attn", "o_proj"], "drift_alpha_pattern": {"q_proj": 0.5},
    "drift_warmup_steps": 3, "drift_decay_steps": 9,
}  # fmt: skip
LORA = {"r": 6, "lora_alpha": 12, "lora_dropout": 0.1, "use_rslora": True, "target_modules": ["q_proj"]}


def test_round_trip_is_plain_lora_and_a_file_beside_it(tmp_path):
    made = config(**SETTINGS, **LORA, rank_pattern={"q_proj": 3}, task_type="CAUSAL_LM")
    made.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", DRIFT_CONFIG]

    stock = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stock["peft_type"] == "LORA" and stock["init_lora_weights"] is True
    assert stock.keys() <= set(LoraConfig.__dataclass_fields__)
    assert type(PeftConfig.from_pretrained(tmp_path)) is LoraConfig

    own = json.loads((tmp_path / DRIFT_CONFIG).read_text())
    assert own == {
        **SETTINGS,
        "drift_norm": "factor",
        "drift_sketch": 64,
        "init_lora_weights": "drift",
        "quantization": None,
    }
    assert DriftConfig.from_pretrained(tmp_path) == made
    assert DriftConfig.from_pretrained(tmp_path.parent, subfolder=tmp_path.name) == made


@pytest.mark.parametrize("start", ["drift", True, False, "gaussian"])
def test_the_start_survives(tmp_path, start):
    config(init_lora_weights=start).save_pretrained(tmp_path)
    assert DriftConfig.from_pretrained(tmp_path).init_lora_weights == start
    stored = LoraConfig.from_pretrained(tmp_path).init_lora_weights
    assert stored == (True if start == "drift" else start)


def test_prior_is_stored_as_given_and_can_be_replaced(tmp_path):
    config(prior=Path("moved") / "prior.safetensors", prior_sha256="ab").save_pretrained(tmp_path)
    assert DriftConfig.from_pretrained(tmp_path).prior == str(Path("moved") / "prior.safetensors")
    for prior in ("new.safetensors", Path("new.safetensors")):
        made = DriftConfig.from_pretrained(tmp_path, prior=prior)
        assert (made.prior, made.prior_sha256) == ("new.safetensors", None)


def test_fields_given_by_name_replace_the_stored_ones(tmp_path):
    config(**SETTINGS, **LORA).save_pretrained(tmp_path)
    made = DriftConfig.from_pretrained(tmp_path, drift_alpha=0.7, lora_dropout=0.0)
    assert made == config(**SETTINGS | {"drift_alpha": 0.7}, **LORA | {"lora_dropout": 0.0})
    with pytest.raises(ValueError, match=r"drift_alpha=-1 is negative"):
        DriftConfig.from_pretrained(tmp_path, drift_alpha=-1)
    with pytest.raises(TypeError, match=r"argument 'drift_alhpa'; did you mean drift_alpha\?"):
        DriftConfig.from_pretrained(tmp_path, drift_alhpa=1)


def test_saving_again_replaces_and_leaves_nothing_else(tmp_path):
    config(drift_alpha=0.5).save_pretrained(tmp_path)
    config(drift_alpha=0.25).save_pretrained(tmp_path)
    assert DriftConfig.from_pretrained(tmp_path).drift_alpha == 0.25
    assert len(list(tmp_path.iterdir())) == 2


def test_folder_of_plain_lora_is_refused_with_the_way_out(tmp_path):
    LoraConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"has no {DRIFT_CONFIG}.*PeftModel\.from_pretrained.*guide\(model, prior\)"):
        DriftConfig.from_pretrained(tmp_path)


def test_a_folder_is_no_repository(tmp_path, monkeypatch):
    """Whose path would be asked for on the hub, and whose answer taken for this adapter's."""
    monkeypatch.setattr("drift_peft.tuner.config.hf_hub_download", lambda *_, **__: pytest.fail("the hub was asked"))
    LoraConfig().save_pretrained(tmp_path)
    assert DriftConfig.stored(str(tmp_path)) is None


def test_stored_settings_are_validated_too(tmp_path):
    config().save_pretrained(tmp_path)
    path = tmp_path / DRIFT_CONFIG
    own = json.loads(path.read_text())
    path.write_text(json.dumps({**own, "drift_new": 1}))
    with pytest.raises(ValueError, match="holds the unknown setting 'drift_new': was it written by a newer drift_peft"):
        DriftConfig.from_pretrained(tmp_path)
    path.write_text(json.dumps({**own, "drift_scale": "adaptiv"}))
    with pytest.raises(ValueError, match="drift_scale='adaptiv' is unknown"):
        DriftConfig.from_pretrained(tmp_path)
    path.write_text(json.dumps(own)[:-9])
    with pytest.raises(ValueError, match=rf"{DRIFT_CONFIG} .*no valid JSON"):
        DriftConfig.from_pretrained(tmp_path)


def test_the_signature_has_every_field_for_completion():
    parameters = inspect.signature(DriftConfig).parameters
    assert parameters.keys() == {f.name for f in dataclasses.fields(DriftConfig) if f.init}
    assert parameters["r"].default == 8 and parameters["prior"].default is None


def test_numbers_of_numpy_are_numbers(tmp_path):
    """As a sweep gives them. They are stored as Python's."""
    given = {"r": np.int64(4), "lora_alpha": np.float32(3), "drift_alpha": np.float32(0.5), "drift_rank": np.int64(2)}
    given |= {"drift_alpha_pattern": {"q_proj": np.float64(0.25)}, "drift_log_kinds": np.bool_(True)}
    config = DriftConfig(prior="p.safetensors", target_modules={"q_proj"}, **given)
    config.save_pretrained(tmp_path)
    again = DriftConfig.from_pretrained(tmp_path)
    assert (again.r, again.lora_alpha, again.drift_alpha, again.drift_rank) == (4, 3, 0.5, 2)
    assert again.drift_alpha_pattern == {"q_proj": 0.25} and config.target_modules == {"q_proj"}
