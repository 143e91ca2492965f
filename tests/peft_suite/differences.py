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
    # Without target_modules PEFT has a table of types, mostly queries and values. DriftConfig takes attention and MLP.
    # In GPT-2 these are no linear layers. OPT's MLP has flattened inputs, and the smallest models' is as narrow as 16:
    # plain LoRA on the same layers raises the same.
    r"GPT2LMHeadModel has no attention or MLP projection": "no target_modules: GPT-2's layers are Conv1D",
    r"shape of the mask \[2\] at index 0 does not match": "no target_modules: aLoRA fails on OPT's MLP",
    r"`adapter_names` .* but got (6 and 18|24 and 72) resp": "no target_modules: mixed batches fail on OPT's MLP",
    r"shapes cannot be multiplied \(\d+x20 and 16x16\)": "no target_modules: an SVD of rank 20 of a narrower layer",
    r"target_modules=\[lstm\] names 1 modules": "a layer of the user's own class",
}

PLACES = {  # test -> why it cannot pass with another class
    r"TestPeftConfig::test_from_pretrained_forward_compatible": "another warning comes before PEFT's or in its place",
    r"TestPeftConfig::test_from_json_file\[": "drift_config.json holds our settings, not adapter_config.json",
    r"TestPeftConfig::test_from_pretrained_sanity_check\[": "a config without peft_type is refused in our words",
    r"test_target_multiple_parameters_on_same_module": "no target_modules: Llama 4 is not in PEFT's table",
    r"test_lora_conversion\[LoraConfig-config_kwargs16-.*OPT": "it asks the caller's config which targets PEFT took",
}
