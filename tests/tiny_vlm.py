"""Tiny pairs as the recipes take them: base with processor and chat template, expert, and pictures to train on.

Model and processor are of the real classes. Six of these processors also read videos, or cut images, which needs
torchvision; without it, another class of transformers takes their place that does the same for these images.
"""

import json

import numpy as np
import transformers as tf
from PIL import Image
from tiny import save_layout, tiny_expert, tiny_vlm
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.utils import is_torchvision_available

VIDEO = is_torchvision_available()
SIDE = 16  # pixels; what the towers of tiny.py see
# The ids of the tiny configs: 0 to 2 are pad, begin and end, 3 to 6 image, video, start and end of an image.
SPECIAL = ["<pad>", "<s>", "</s>", "<image>", "<video>", "<start>", "<end>"]
SPECIAL += ["<fake_token_around_image>", "<end_of_utterance>", "<global-img>"]
WORDS = ["<unk>", *SPECIAL, "user:", "assistant:", *"0123456789+=?", "how", "many"]
NAMED = {"image_token": "<image>", "video_token": "<video>", "boi_token": "<start>", "eoi_token": "<end>"}
NAMED |= {"vision_start_token": "<start>", "vision_end_token": "<end>", "image_boundary_token": SPECIAL[7]}
NAMED |= {"start_image_token": "<start>", "end_image_token": "<end>", "context_image_token": "<image>"}
NAMED |= {"audio_token": SPECIAL[8], "boa_token": "<start>", "eoa_token": "<end>"}
CHAT = (
    "{% for message in messages %}{{ message.role }}: {% for part in message.content %}"
    "{% if part.type == 'image' %}IMAGE{% else %} {{ part.text }} {% endif %}"
    "{% endfor %}</s>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def tokenizer(rows=40):
    """Words of the pictures' captions, and as many more as it takes for `rows` tokens."""
    words = [*SPECIAL, *(word for word in WORDS if word not in SPECIAL)]
    words += [f"word{i}" for i in range(rows - len(words))]
    model = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = WhitespaceSplit()
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return tf.PreTrainedTokenizerFast(tokenizer_object=model, extra_special_tokens=NAMED, **named)


def qwen(name):
    images = Qwen2VLImageProcessorPil(patch_size=4, size={"shortest_edge": 64, "longest_edge": SIDE**2})
    if not VIDEO:
        return lambda words, **chat: tf.PaddleOCRVLProcessor(images, words, **chat)
    videos = tf.Qwen3VLVideoProcessor if name == "Qwen3VLProcessor" else tf.Qwen2VLVideoProcessor
    return lambda words, **chat: getattr(tf, name)(images, words, videos(patch_size=4), **chat)


def llava_next(words, **chat):
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size=SIDE, image_grid_pinpoints=[[SIDE, SIDE]]
    )
    return tf.LlavaNextProcessor(images, words, 4, "default", num_additional_image_tokens=1, **chat)


def idefics2(words, **chat):
    images = Idefics2ImageProcessorPil(size={"shortest_edge": SIDE, "longest_edge": SIDE})
    return tf.Idefics2Processor(images, words, image_seq_len=4, **chat)


def internvl(words, **chat):
    images = GotOcr2ImageProcessorPil(size={"height": SIDE, "width": SIDE})
    if VIDEO:
        return tf.InternVLProcessor(images, words, tf.InternVLVideoProcessor(), image_seq_length=4, **chat)
    tokens = dict(start_of_img_token="<start>", end_of_img_token="<end>", img_patch_token="<image>")
    return tf.AyaVisionProcessor(images, words, patch_size=8, img_size=SIDE, image_token="IMAGE", **tokens, **chat)


def gemma3(words, **chat):
    return tf.Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE}), words, image_seq_length=4, **chat
    )


def gemma4(words, **chat):
    images = Gemma4ImageProcessorPil(patch_size=4, pooling_kernel_size=2, max_soft_tokens=70)  # its least
    if VIDEO:
        videos = tf.Gemma4VideoProcessor(patch_size=4, pooling_kernel_size=2, max_soft_tokens=70)
        return tf.Gemma4Processor(tf.Gemma4AudioFeatureExtractor(), images, words, videos, **chat)
    return tf.DeepseekVLProcessor(images, words, num_image_tokens=64, **chat)  # of a square: 8 x 8


def lfm2_vl(words, **chat):
    if VIDEO:
        sizes = dict(encoder_patch_size=4, tile_size=SIDE, min_image_tokens=4, max_image_tokens=4)
        return tf.Lfm2VlProcessor(tf.Lfm2VlImageProcessor(**sizes), words, **chat)
    images = Siglip2ImageProcessorPil(patch_size=4, max_num_patches=16)
    return tf.DeepseekVLProcessor(images, words, num_image_tokens=4, **chat)


def smolvlm(words, **chat):
    images = SmolVLMImageProcessorPil(size={"longest_edge": SIDE}, max_image_size={"longest_edge": SIDE})
    if VIDEO:
        return tf.SmolVLMProcessor(images, words, tf.SmolVLMVideoProcessor(), image_seq_len=4, **chat)
    return tf.Idefics3Processor(images, words, image_seq_len=4, **chat)


def mllama(words, **chat):
    images = MllamaImageProcessorPil(size={"height": SIDE, "width": SIDE}, max_image_tiles=1)
    return tf.MllamaProcessor(images, words, **chat)


PROCESSORS = {  # family -> (what makes its processor, how its chat template writes an image)
    "qwen2_vl": (qwen("Qwen2VLProcessor"), "<start><image><end>"),
    "qwen2_5_vl": (qwen("Qwen2_5_VLProcessor"), "<start><image><end>"),
    "qwen3_vl": (qwen("Qwen3VLProcessor"), "<start><image><end>"),
    "llava_next": (llava_next, "<image>"),
    "idefics2": (idefics2, "<image>"),
    "internvl": (internvl, "<image>" if VIDEO else "IMAGE"),
    "gemma3": (gemma3, "<start>"),
    "smolvlm": (smolvlm, "<image>"),
    "qwen3_5": (qwen("Qwen3VLProcessor"), "<start><image><end>"),
    "gemma4": (gemma4, "<image>" if VIDEO else "<start><image><end>"),
    "lfm2_vl": (lfm2_vl, "<image>"),
}
ASKED = PROCESSORS | {"mllama": (mllama, "<image>")}  # also those of which no recipe has a pair


def save_pair(folder, family, rows=40):
    """Write `base` and `expert` of a family into the folder; the tokenizer has that many of the model's 64 rows."""
    base = tiny_vlm(family)
    save_layout(base, folder / "base")
    save_layout(tiny_expert(family, base)[0], folder / "expert")
    make, image = PROCESSORS[family]
    make(tokenizer(rows), chat_template=CHAT.replace("IMAGE", image)).save_pretrained(folder / "base")
    return folder


def save_pictures(folder, count=8):
    """Write `data.jsonl`, and the pictures that it names: sums of two digits with their chain of thought."""
    generator = np.random.default_rng(0)
    lines = []
    for i in range(count):
        a, b = generator.integers(5, size=2)
        Image.fromarray(generator.integers(256, size=(SIDE, SIDE, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        answer = f"<think> {a} + {b} = {a + b} </think> {a + b}"
        turns = [{"role": "user", "content": "<image>how many ?"}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": turns, "images": [f"{i}.png"]}))
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "data.jsonl"


def save_texts(folder, count=8):
    """Write `data.jsonl`: such sums without pictures."""
    lines = []
    for i in range(count):
        turns = [("user", f"how many {i} + 1 ?"), ("assistant", f"<think> {i} + 1 = {i + 1} </think> {i + 1}")]
        lines.append(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}))
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "data.jsonl"
