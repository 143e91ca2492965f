"""`peft_config=DriftConfig(…)` in TRL's trainers: guided at every step. SFTTrainer's is in tuner/test_trainer.py."""

import pytest
import torch
from datasets import Dataset
from pairs import drift, load
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, RLOOConfig, RLOOTrainer

from drift_peft import telemetry

STEPS = 2
PAIRS = Dataset.from_list([{"prompt": "how many ?", "chosen": "4 + 3 = 7", "rejected": "4 + 3 = 8"}] * 4)
SAMPLES = {"num_generations": 2, "max_completion_length": 4}
TRAINERS = {  # name -> (trainer, its arguments, their values)
    "dpo": (DPOTrainer, DPOConfig, {}),
    "grpo": (GRPOTrainer, GRPOConfig, SAMPLES),
    "rloo": (RLOOTrainer, RLOOConfig, SAMPLES),
    "reward": (RewardTrainer, RewardConfig, {}),
}


def lengths(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


@pytest.mark.parametrize("name", TRAINERS)
def test_guided_at_every_step(folder, tmp_path, name):
    make, configure, settings = TRAINERS[name]
    arguments = configure(
        tmp_path,
        per_device_train_batch_size=2,
        max_steps=STEPS,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        **settings,
    )
    config, rewards = drift(folder), {"reward_funcs": lengths} if settings else {}
    if name == "reward":
        config.task_type = "SEQ_CLS"
        model = AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=1, dtype=torch.float32)
    else:
        model = load(folder, "llama")
    words = AutoTokenizer.from_pretrained(folder / "base")
    run = make(model, args=arguments, train_dataset=PAIRS, processing_class=words, peft_config=config, **rewards)
    run.train()
    assert run.state.global_step == telemetry(run.model)["guided_steps"] == STEPS
    assert [logs["drift/guided_steps"] for logs in run.state.log_history[:STEPS]] == [1, 2]
