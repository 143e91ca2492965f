"""bitsandbytes' 4-bit layers on a CPU: they stay trainable after an evaluation pass."""

from __future__ import annotations

import sys

from torch import nn

from ..warn import warn


def keep_4bit_differentiable(model: nn.Module) -> None:
    """Keep bitsandbytes 4-bit layers on a CPU trainable after an evaluation pass.

    On CPUs with AVX512-BF16, bitsandbytes repacks a layer's weight in its first forward pass in eval mode, for a kernel
    without a gradient: from then on, training raises an error, or goes on with wrong gradients where the layer has no
    bias. This switches that kernel off for the model's layers and unpacks what was packed before.
    """
    bnb = sys.modules.get("bitsandbytes")  # not imported: then the model has no layer of it
    if bnb is None:
        return
    layers = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit) and m.support_avx512bf16_for_cpu]
    for layer in layers:
        if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            layer.state_dict()  # where bitsandbytes unpacks the weight, in place
        layer.support_avx512bf16_for_cpu = False
    if any(layer.weight.device.type == "cpu" for layer in layers):
        warn(
            f"Switched off bitsandbytes' AVX512-BF16 inference kernel on {len(layers)} 4-bit layers: it has no "
            "gradient, and an evaluation pass would have made training wrong. Evaluation on this CPU is slower."
        )
