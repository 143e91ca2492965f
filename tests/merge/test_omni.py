"""Models that also talk, whole as they are published: the thinker is steered, and merging leaves the talker alone."""

import pytest
import torch
import transformers as tf
from peft import get_peft_model
from safetensors.torch import load_file
from tiny import TEXT

from drift_peft import DriftConfig, build_prior, merge_adapter
from drift_peft.checkpoints import Checkpoint
from drift_peft.prior.report import targets_summary
from drift_peft.tuner.fit import adapted_modules

ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
AUDIO = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 40, "output_dim": 64}
VISION = {
    "depth": 1,
    "hidden_size": 32,
    "num_heads": 4,
    "out_hidden_size": 64,
    "intermediate_size": 40,
    "patch_size": 4,
}


def qwen2_5_omni():
    dit = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16, "ff_mult": 1}
    dit |= {"emb_dim": 16, "enc_dim": 16, "enc_emb_dim": 16, "enc_channels": [16] * 5, "enc_attention_channels": 8}
    dit |= {"enc_se_channels": 8, "mel_dim": 8, "num_embeds": 16}
    wave = {"mel_dim": 8, "upsample_initial_channel": 16, "resblock_kernel_sizes": [3], "upsample_rates": [2]}
    wave |= {"resblock_dilation_sizes": [[1, 3, 5]], "upsample_kernel_sizes": [4]}
    text = {**TEXT, "rope_parameters": ROPE}
    config = tf.Qwen2_5OmniConfig(
        thinker_config={"audio_config": AUDIO, "vision_config": VISION, "text_config": text},
        talker_config={**text, "embedding_size": 64},
        token2wav_config={"dit_config": dit, "bigvgan_config": wave},
    )
    expert = tf.Qwen2ForCausalLM(tf.Qwen2Config(**TEXT))
    return tf.Qwen2_5OmniForConditionalGeneration(config), expert


def qwen3_omni():
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    text = {**TEXT, **experts, "rope_parameters": ROPE}
    vision = {**VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    talker = {"text_config": {**text, "shared_expert_intermediate_size": 32}, "thinker_hidden_size": 64}
    talker |= {"code_predictor_config": {**TEXT, "num_code_groups": 2}, "num_code_groups": 2, "accept_hidden_layer": 1}
    sound = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    sound |= {"num_key_value_heads": 4, "decoder_dim": 16, "codebook_size": 16, "num_quantizers": 2}
    config = tf.Qwen3OmniMoeConfig(
        thinker_config={
            "audio_config": {**AUDIO, "downsample_hidden_size": 8}, "vision_config": vision, "text_config": text,
        },
        talker_config={**talker, "speaker_id": {}, "spatial_merge_size": 2},
        code2wav_config={**sound, "upsample_rates": [2, 2], "upsampling_ratios": [2]},
    )  # fmt: skip
    expert = tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**TEXT, **experts))
    return tf.Qwen3OmniMoeForConditionalGeneration(config), expert


def language_model(thinker):
    """Older versions of transformers have no class around it."""
    return getattr(thinker.model, "language_model", thinker.model)


MODELS = {  # -> how it is made, class of its thinker, weights that are steered, and adapted
    "qwen2_5_omni": (qwen2_5_omni, tf.Qwen2_5OmniThinkerForConditionalGeneration, 14),
    "qwen3_omni": (qwen3_omni, tf.Qwen3OmniMoeThinkerForConditionalGeneration, 8),
}


@pytest.fixture(scope="module", params=MODELS)
def omni(request, tmp_path_factory):
    make, thinker, number = MODELS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model, expert = make()
    model.save_pretrained(folder / "base")
    torch.save({}, folder / "base" / "spk_dict.pt")  # the published folder of Qwen2.5-Omni has its speakers in there
    state = {name: value.clone() for name, value in language_model(model.thinker).state_dict().items()}
    for name, value in state.items():
        if name.endswith("_proj.weight"):
            value += 0.1 * value.std() * torch.randn(value.shape)
    expert.model.load_state_dict(state)
    expert.save_pretrained(folder / "expert")
    prior = build_prior(folder / "expert", folder / "base", folder / "prior.safetensors", rank=8, progress=False)
    assert len(prior) == number
    return folder, thinker, number


def test_targets_are_the_thinkers(omni):
    folder, _, number = omni
    rows = targets_summary(Checkpoint(folder / "base"))["rows"]
    assert sum(row["adapted"] for row in rows) == number
    assert all(row["left"] for row in rows)  # the talker's, and the towers'


@pytest.mark.parametrize("whole", [True, False])
def test_the_published_folder_is_trained_and_merged(omni, whole, tmp_path):
    folder, thinker, number = omni
    checkpoint = Checkpoint(folder / "base")
    cls = checkpoint.auto_class if whole else thinker
    model = cls.from_pretrained(folder / "base", dtype=torch.float32)
    model = get_peft_model(model, DriftConfig(prior=folder / "prior.safetensors", r=4))
    adapted = adapted_modules(model.get_base_model(), ["default"])
    assert len(adapted) == number
    base = model.get_base_model()
    path = next(n for n, m in base.named_modules() if m is language_model(base.thinker if whole else base))
    assert path.startswith("thinker.model" if whole else "model") and all(n.startswith(f"{path}.") for n in adapted)
    ids = torch.arange(7, 27).reshape(2, 10)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    speaks = model.thinker if whole else model
    speaks(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert model.peft_config["default"].drift_steps == 1
    model.save_pretrained(tmp_path / "adapter")
    report = merge_adapter(folder / "base", tmp_path / "adapter", tmp_path / "merged", verify=True, progress=False)
    assert report.modules == number and report.logits_error < 1e-5
    before, after = (load_file(place / "model.safetensors") for place in (folder / "base", tmp_path / "merged"))
    changed = {name for name in before if not torch.equal(*(of[name].view(torch.uint8) for of in (before, after)))}
    assert len(changed) == number and all(name.startswith("thinker.model.layers.") for name in changed)
    merged = thinker.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    torch.testing.assert_close(merged(ids).logits, speaks.eval()(ids).logits, rtol=1e-4, atol=1e-5)
