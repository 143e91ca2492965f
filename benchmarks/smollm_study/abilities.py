"""What the language model could do before, apart from all that it was trained for since."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import sklearn.datasets
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from .precision import compute_dtype

PROSE = ("iris.rst", "wine_data.rst", "breast_cancer.rst", "linnerud.rst")  # what scikit-learn says of its data sets
LENGTH = 512  # tokens of prose at a time
PROMPTS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain why the sky is blue.",
    "Give me three tips for a good night's sleep.",
    "Translate 'good morning' into Spanish.",
    "What is the difference between a cat and a dog?",
    "Who wrote Romeo and Juliet?",
    "Name five fruits.",
    "How do I boil an egg?",
    "What is photosynthesis?",
    "Tell me a joke.",
    "Summarize the story of Cinderella in two sentences.",
    "Write a polite email that declines an invitation.",
    "What should I pack for a weekend in the mountains?",
    "Explain gravity to a child.",
    "What are the seasons of the year?",
)
ANSWER = 48  # tokens of the ancestor's answer that count


@torch.no_grad()
def abilities(model, tokenizer, ancestor: Path) -> dict[str, float]:
    """`perplexity` on prose, and `kl`: mean KL(ancestor || model) in nats over the ancestor's own answers."""
    folder = Path(sklearn.datasets.__file__).parent / "descr"
    prose = "\n\n".join((folder / name).read_text(encoding="utf-8") for name in PROSE)
    tokens = torch.tensor(tokenizer.encode(prose, add_special_tokens=False), device=model.device)
    losses = []
    for part in tokens[: len(tokens) // LENGTH * LENGTH].view(-1, 1, LENGTH):
        losses.append(F.cross_entropy(model(input_ids=part).logits[0, :-1].float(), part[0, 1:]))
    total = count = 0.0
    for ids, theirs in answers_of(ancestor, model.device):
        length, rows = theirs.shape  # the VLM has a few rows more, for images
        mine = model(input_ids=ids).logits[0, -length - 1 : -1, :rows].float().log_softmax(-1)
        total += F.kl_div(mine, theirs, log_target=True, reduction="sum").item()
        count += length
    return {"perplexity": round(torch.stack(losses).mean().exp().item(), 3), "kl": round(total / count, 4)}


@cache
def answers_of(ancestor: Path, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Prompt and answer [1, tokens], and the log probabilities of the answer's tokens [answer tokens, vocabulary]."""
    base = AutoModelForCausalLM.from_pretrained(ancestor, dtype=compute_dtype(device), device_map={"": device})
    tokenizer, found = AutoTokenizer.from_pretrained(ancestor), []
    for prompt in PROMPTS:
        chat = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=False)
        asked = ids.shape[1]
        ids = base.generate(ids.to(device), do_sample=False, max_new_tokens=ANSWER)
        found.append((ids, base(input_ids=ids).logits[0, asked - 1 : -1].float().log_softmax(-1)))
    return found
