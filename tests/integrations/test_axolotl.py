"""DriftPlugin in axolotl's own training, as its command line calls it. `make test-integrations` brings axolotl."""

import json
import os

import pytest
import yaml
from safetensors.torch import load_file

from drift_peft import DriftConfig, telemetry

os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")
pytest.importorskip("axolotl", reason="axolotl is not installed: make test-integrations installs it beside the rest")
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_datasets
from axolotl.integrations.base import PluginManager
from axolotl.train import train

PLUGIN = "drift_peft.integrations.axolotl.DriftPlugin"


@pytest.fixture
def write(folder, tmp_path):
    """A recipe in axolotl's YAML, with changes."""

    def make(**changes):
        settings = {
            "plugins": [PLUGIN],
            "base_model": str(folder / "base"),
            "datasets": [{"path": str(folder / "data.json"), "ds_type": "json", "type": "chat_template"}],
            "dataset_prepared_path": str(tmp_path / "prepared"),
            "output_dir": str(tmp_path / "out"),
            "adapter": "lora",
            "lora_r": 4,
            "lora_alpha": 8,
            "lora_target_modules": ["q_proj", "up_proj"],
            "sequence_len": 64,
            "micro_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "max_steps": 2,
            "num_epochs": 1,
            "learning_rate": 1e-3,
            "optimizer": "adamw_torch",
            "logging_steps": 1,
            "bf16": False,
            "fp16": False,
            "tf32": False,
            "attn_implementation": "eager",
            **dict.fromkeys(["lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"], False),  # Triton
            "save_only_model": True,
            "drift_prior": str(folder / "prior.safetensors"),
            **changes,
        }
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(settings))
        return str(file)

    yield make
    PluginManager.get_instance().plugins.clear()


def test_lora_is_steered_at_every_step(write, tmp_path):
    cfg = load_cfg(write(drift_alpha=0.5, drift_sketch=None))
    assert cfg.drift_alpha == 0.5  # axolotl knows the keys
    model, _, trainer = train(cfg=cfg, dataset_meta=load_datasets(cfg=cfg))
    assert trainer.state.global_step == telemetry(model)["guided_steps"] == 2
    assert [logs["drift/guided_steps"] for logs in trainer.state.log_history[:2]] == [1, 2]
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert saved["peft_type"] == "LORA" and saved["r"] == 4


def test_a_new_adapter_starts_at_a_part_of_delta(write, tmp_path):
    cfg = load_cfg(write(drift_start=0.5, learning_rate=1e-9))
    train(cfg=cfg, dataset_meta=load_datasets(cfg=cfg))
    stored = DriftConfig.stored(tmp_path / "out")
    assert (stored["init_lora_weights"], stored["drift_start"]) == ("drift", 0.5)
    factors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(B.any() for name, B in factors.items() if "lora_B" in name)


def test_a_wrong_key_ends_it_before_anything_is_loaded(write):
    with pytest.raises(ValueError, match=r"^'drift_alhpa' is no setting of drift_peft; did you mean drift_alpha\?"):
        load_cfg(write(drift_alhpa=0.5))


def test_relora_is_refused_since_it_would_add_the_prior_at_each_restart(write):
    with pytest.raises(ValueError, match=r"^relora merges the adapter .*: leave out relora"):
        load_cfg(write(relora=True, jagged_restart_steps=2))


def test_null_is_refused_where_rays_workers_would_take_the_default(write):
    with pytest.raises(ValueError, match=r"^drift_sketch: null does not reach the workers of use_ray.*: leave it out"):
        load_cfg(write(drift_sketch=None, use_ray=True))
    load_cfg(write(drift_alpha=0.5, use_ray=True))


def test_every_key_has_its_type_in_axolotls_schema():
    from drift_peft.integrations.axolotl import DriftArgs

    assert set(DriftArgs.model_fields) >= {"drift_prior", "drift_alpha", "drift_keep", "drift_keep_weight"}
    assert DriftArgs(drift_alpha="0.5").drift_alpha == 0.5 and DriftArgs().drift_alpha is None
    assert (
        DriftConfig.__dataclass_fields__["drift_scale"].metadata["help"]
        == DriftArgs.model_fields["drift_scale"].description
    )
