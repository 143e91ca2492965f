"""KL of which k probabilities are known: at most the full one, and the same where all are."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drift_peft.keeping.distance import bucketed_kl

VOCABULARY = 24


def distributions(seed, sharpness):
    generator = torch.Generator().manual_seed(seed)
    theirs, ours = (sharpness * torch.randn(5, VOCABULARY, generator=generator).double() for _ in range(2))
    return torch.log_softmax(theirs, -1), ours


@settings(deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 8))
def test_the_more_is_known_the_nearer_it_is_to_the_full_one(seed, sharpness):
    theirs, ours = distributions(seed, sharpness)
    full = (theirs.exp() * (theirs - torch.log_softmax(ours, -1))).sum(-1)
    found = []
    for k in range(1, VOCABULARY + 1):
        top = theirs.topk(k)
        found.append(bucketed_kl(ours, top.indices, top.values))
    found = torch.stack(found)
    assert (found >= -1e-5).all() and (found.diff(dim=0) >= -1e-4).all() and (found <= full + 1e-4).all()
    torch.testing.assert_close(found[-1], full)


@settings(deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 3), st.integers(1, VOCABULARY))
def test_its_gradient_is_that_of_the_joined_distributions(seed, sharpness, k):
    """Σ over the kept tokens of q − p, and of the others q minus their share of the bucket's p."""
    theirs, ours = distributions(seed, sharpness)
    top = theirs.topk(k)
    ours.requires_grad_()
    bucketed_kl(ours, top.indices, top.values).sum().backward()
    q = torch.softmax(ours.detach(), -1)
    p = torch.zeros_like(q).scatter(-1, top.indices, top.values.exp())
    rest = 1 - p.sum(-1, keepdim=True)
    others = torch.where(p == 0, q, 0.0)
    p = p + torch.where(rest > 1e-6, rest * others / others.sum(-1, keepdim=True).clamp_min(1e-300), 0.0)
    torch.testing.assert_close(ours.grad, q * p.sum(-1, keepdim=True) - p, rtol=1e-6, atol=1e-9)


def test_a_distribution_is_at_no_distance_from_itself():
    theirs, _ = distributions(0, 2.0)
    for k in (1, 5, VOCABULARY):
        top = theirs.topk(k)
        assert bucketed_kl(theirs, top.indices, top.values).abs().max() < 1e-6
