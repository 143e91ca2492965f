"""The model inside what trains it."""

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel


def inner_model(model: nn.Module) -> nn.Module:
    """Inside DDP, DataParallel and torch.compile, which pass on neither its methods nor what PEFT notes on it."""
    while isinstance(model, (DataParallel, DistributedDataParallel)) or "_orig_mod" in model._modules:
        model = model._modules.get("_orig_mod", model._modules.get("module"))
    return model
