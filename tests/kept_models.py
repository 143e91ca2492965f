"""Models that are kept, and the gradient that keeping adds, from its definition: one sample at a time, in fp64."""

import copy

import torch
from keep_sets import dense_logprobs
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor
from twin import BATCH, backward, randomized, trainable

from drift_peft import KeepSet, keep

LORA = {"r": 4, "lora_alpha": 6, "target_modules": r".*language_model.*\.(q_proj|up_proj)"}


class Watched(KeepSet):
    """A keep set that writes down which samples were read."""

    def __init__(self, folder, name="keep.safetensors"):
        super().__init__(folder / name, name)
        self.whole, self.read = KeepSet.load(folder / name), []

    def __getitem__(self, i):
        self.read.append(i)
        return self.whole[i]

    def __reduce__(self):
        return type(self), (self.path.parent, self.path.name)

    def check(self, processor):
        self.whole.check(processor)

    def batch(self, number, size):
        """As it was read by a process that reads all of them."""
        return [self.whole[i] for i in self.read[number * size : (number + 1) * size]]


def load(folder, **options):
    return AutoModelForImageTextToText.from_pretrained(folder / "base", **{"dtype": torch.float32, **options})


def processor_of(folder):
    return AutoProcessor.from_pretrained(folder / "base")


def adapted(folder, dtype=torch.float64, base=None, **changes):
    """With plain LoRA whose factors are as in the middle of training."""
    torch.manual_seed(0)
    return randomized(get_peft_model(base or load(folder), LoraConfig(**{**LORA, **changes})), dtype=dtype)


def kl_of_sample(model, processor, sample):
    """Sum over an answer's tokens of KL(VLM || model), what the set does not know of the VLM as one outcome."""
    log_q = dense_logprobs.__wrapped__(model, processor, sample).double()
    total = 0.0
    for row, known, log_p in zip(log_q, sample.top_tokens, sample.top_logprobs.double(), strict=True):
        total = total + (log_p.exp() * (log_p - row[known])).sum()
        unknown = torch.ones(len(row), dtype=torch.bool)
        unknown[known] = False
        if unknown.any() and (p_rest := 1 - float(log_p.exp().sum())) > 1e-6:
            total = total + p_rest * (torch.tensor(p_rest).double().log() - row[unknown].exp().sum().log())
    return total


def keep_loss(model, processor, samples):
    return sum(kl_of_sample(model, processor, s) for s in samples) / sum(len(s.tokens) for s in samples)


def keep_gradients(model, processor, samples, parameters):
    return torch.autograd.grad(keep_loss(model, processor, samples), parameters, materialize_grads=True)


def with_keeping(gradients, kept, weight=1.0, bound=1.0):
    """g + k·min(1, ρ·‖g‖/‖k‖) of lists of gradients."""
    k = [weight * each for each in kept]
    g_norm, k_norm = (torch.cat([t.flatten() for t in each]).norm() for each in (gradients, k))
    share = 1.0 if bound is None else min(1.0, float(bound * g_norm / k_norm))
    return [g + share * each for g, each in zip(gradients, k, strict=True)]


def task_gradients(model, ids=BATCH):
    loss = model(input_ids=ids, labels=ids).loss
    return torch.autograd.grad(loss, trainable(model))


def expected_step(model, processor, samples, parameters=None, **settings):
    """Gradients that an optimizer's step shall see, of `parameters` or all that are trained."""
    parameters = trainable(model) if parameters is None else parameters
    model.zero_grad()
    backward(model)
    gradients = [p.grad.clone() for p in parameters]
    model.zero_grad()
    return with_keeping(gradients, keep_gradients(model, processor, samples, parameters), **settings)


def gradients_of_step(model, optimizer, ids=BATCH):
    """What an optimizer's step with lr=0 saw."""
    optimizer.zero_grad()
    backward(model, ids)
    optimizer.step()
    return [p.grad.clone() for p in trainable(model)]


def kept_twin(model, folder, name="keep.safetensors", batch_size=3, **settings):
    """A copy that is kept, and the set that it reads."""
    twin, watched = copy.deepcopy(model), Watched(folder, name)
    keep(twin, watched, processor_of(folder), batch_size=batch_size, **settings)
    return twin, watched


def assert_close(found, expected, tolerance=1e-9):
    for one, other in zip(found, expected, strict=True):
        off, size = (one.double() - other.double()).norm(), other.double().norm()
        assert off <= tolerance * size, f"off by {float(off):.3g} of {float(size):.3g}"
