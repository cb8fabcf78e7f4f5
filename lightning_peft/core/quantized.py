"""Which parameters are quantised, whatever library holds them."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["is_quantized"]


def is_quantized(parameter: torch.Tensor) -> bool:
    """Whether ``parameter`` holds codes instead of values, so that it cannot be trained.

    Integer tensors are, and tensors of bitsandbytes and torchao whose dtype looks like floating point: packed 4-bit
    codes stored as ``bfloat16``, and subclasses that report the dtype they dequantise to. Under FSDP2 the local shard
    is looked at.
    """
    local = getattr(parameter, "_local_tensor", parameter)
    if not (local.dtype.is_floating_point or local.dtype.is_complex):
        return True
    if getattr(parameter, "bnb_quantized", False) or getattr(local, "bnb_quantized", False):
        return True
    kinds = (local, parameter.data if isinstance(parameter, nn.Parameter) else parameter)
    return any(type(tensor).__module__.startswith("torchao.") for tensor in kinds)
