"""Where PEFT's tests may end otherwise, and why. A pattern is a regular expression that is searched for."""

IMPORTED: dict[str, str] = {}  # test -> why it ends otherwise when drift_peft is imported

REFUSED = {  # what the error says -> what DriftConfig refuses there
    r"changes how an adapter acts on the weight, so the guidance": "a variant of LoRA with another chain rule",
    r"init_lora_weights='\w+' is not available with guidance": "a start that changes the base's weights",
    r"does not say where its language model is: pass target_modules": "no target_modules but parameters alone",
    r"names \d+ modules of this ModelMha\w*, but PEFT adds": "nn.MultiheadAttention, of which PEFT adapts more",
    r"is wrapped already and has an adapter": "a second get_peft_model around a wrapped model",
    r"not guided beside other adapter types \(mixed=True\)": "adapters of several types",
    r"'DriftModel' == 'LoraModel'": "the name of the class",
}

PLACES = {  # test -> why it cannot pass with another class
    r"TestPeftConfig::test_from_pretrained_forward_compatible": "another warning comes before PEFT's or in its place",
    r"TestPeftConfig::test_from_json_file\[": "drift_config.json holds our settings, not adapter_config.json",
    r"TestPeftConfig::test_from_pretrained_sanity_check\[": "a config without peft_type is refused in our words",
}
