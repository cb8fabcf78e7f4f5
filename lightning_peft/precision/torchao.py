"""Linear layers whose weight is a tensor subclass of torchao; imported only if that backend is asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import NF4Tensor, to_nf4

from lightning_peft.errors import ConfigError

__all__ = ["TorchaoLinear", "adopt", "is_torchao", "quantize_linear"]

_BLOCK = 64
_SCALER_BLOCK = 256


class TorchaoLinear(nn.Linear):
    """A linear layer with a weight of torchao that loads weights in floating point, in codes, or not at all."""

    mode: str = ""

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = f"{prefix}weight"
        rest = {name: value for name, value in state_dict.items() if name.startswith(prefix) and name != key}
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if key in missing_keys:
            missing_keys.remove(key)
        stored = state_dict.get(key)
        if stored is None:
            return
        if type(stored) is type(self.weight.data):
            self.weight = nn.Parameter(stored.detach().to(self.weight.device), requires_grad=False)
        else:
            self.set_weight(stored.to(self.weight.device))

    def set_weight(self, weight: torch.Tensor) -> None:
        """Quantise ``weight`` (out, in) into this layer, on the weight's device."""
        weight = weight.detach().contiguous()
        if self.mode == "int8":
            holder = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
            holder.weight = nn.Parameter(weight, requires_grad=False)
            quantize_(holder, Int8WeightOnlyConfig())
            self.weight = nn.Parameter(holder.weight.detach(), requires_grad=False)
            return
        num_blocks, rest = divmod(weight.numel(), _BLOCK)
        if rest:
            raise ConfigError(
                f"torchao's NF4 needs weights of a multiple of {_BLOCK} elements, this one has shape "
                f"{tuple(weight.shape)}. Name the layer in skip, or use backend='bitsandbytes'."
            )
        self.weight = nn.Parameter(to_nf4(weight, _BLOCK, math.gcd(num_blocks, _SCALER_BLOCK)), requires_grad=False)


def is_torchao(module: nn.Module) -> bool:
    """Whether ``module`` is a linear layer with a weight that torchao has quantised."""
    weight = getattr(module, "weight", None)
    return isinstance(module, nn.Linear) and weight is not None and type(weight.data).__module__.startswith("torchao.")


def quantize_linear(linear: nn.Linear, mode: str, device: torch.device | None = None) -> TorchaoLinear:
    """Return a quantised layer in the place of ``linear``; its bias stays the same parameter.

    Args:
        linear: A linear layer with a floating-point weight that is not on the meta device.
        mode: ``"nf4"`` or ``"nf4-dq"`` (torchao always quantises the scales of NF4), or ``"int8"``.
        device: Where to quantise and leave the weight; None: where it is.
    """
    layer = TorchaoLinear(linear.in_features, linear.out_features, bias=False, device="meta")
    layer.mode = mode
    layer.set_weight(linear.weight.to(device))
    layer.bias = linear.bias
    return layer.train(linear.training)


def adopt(module: nn.Module) -> None:
    """Give a plain layer with a torchao weight the loading of :class:`TorchaoLinear`; no bit changes."""
    if type(module) is nn.Linear:
        mode = "nf4-dq" if isinstance(module.weight.data, NF4Tensor) else "int8"
        module.__class__ = TorchaoLinear
        setattr(module, "mode", mode)  # noqa: B010
