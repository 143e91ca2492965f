"""When PEFT comes to know DRIFT: with the first of our names, whatever was wrapped before."""

import textwrap

from processes import run_program

SCRIPT = """
    import sys, warnings
    warnings.simplefilter("ignore")
    import drift_peft
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(sys.argv[1]), LoraConfig(target_modules=["q_proj"]))
    assert type(model.base_model).__name__ == "LoraModel" and "drift_peft.tuner" not in sys.modules
    for name, start in (("a", "drift"), ("b", True)):
        model.add_adapter(name, drift_peft.DriftConfig(prior=sys.argv[2], r=4, init_lora_weights=start))
        model.set_adapter(name)
        told = drift_peft.telemetry(model)
        assert "alignment/attn" in told and "alignment/mlp" in told, told
    assert type(model.base_model) is drift_peft.DriftModel
"""


def test_a_model_that_was_wrapped_before_is_guided_all_the_same(pair, tmp_path):
    run_program(tmp_path, "-c", textwrap.dedent(SCRIPT), pair.folder / "base", pair.path)
