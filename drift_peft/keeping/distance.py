"""How far a model has gone from the VLM's own answers: KL(p_vlm || p_model) over the answer tokens.

Of p_vlm the k largest probabilities of each token are kept; what is left over is one bucket, in both distributions
(METHOD, "Keeping what the VLM can do"). Joining outcomes can only lower a KL divergence, so this one is at most the
full one, and equal to it where k is the whole vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .answers import answer_logits, to_model_device
from .feed import Part

REST = 1e-6  # a bucket below this is left out: in fp32 it is what rounding has left of the others' sum


def answer_rows(model: nn.Module, part: Part) -> Tensor:
    """[N, vocabulary] What the model says of each answer token."""
    logits = answer_logits(model, to_model_device(part.inputs, model), part.answer_mask.shape[1])
    return logits[part.answer_mask.to(logits.device)]


def divergence(rows: Tensor, part: Part) -> Tensor:
    """[N] KL divergence of each answer token from what is known of it. `rows` are those of `answer_rows`."""
    return bucketed_kl(rows, part.top_tokens.to(rows.device), part.top_logprobs.to(rows.device))


def bucketed_kl(logits: Tensor, top_tokens: Tensor, top_logprobs: Tensor) -> Tensor:
    """[N] KL divergence of each token in nats, differentiable in the logits.

    Args:
        logits: [N, vocabulary] of the model.
        top_tokens, top_logprobs: [N, k] the k most likely tokens of the VLM, and their log probabilities.
    """
    ours = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
    kept = ours.gather(-1, top_tokens)
    theirs = top_logprobs.to(ours.dtype)
    divergence = (theirs.exp() * (theirs - kept)).sum(-1)
    if top_tokens.shape[-1] == logits.shape[-1]:
        return divergence
    p_rest = 1 - theirs.exp().sum(-1)
    others = ours.scatter(-1, top_tokens, float("-inf"))
    rest = p_rest.clamp_min(REST).log() - torch.logsumexp(others, -1)
    return divergence + torch.where(p_rest > REST, p_rest * rest, 0.0)
