"""Several low-rank experts beside one frozen linear layer, weighted per input: what LoRAMoE and MTLoRA share."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lightning_peft.adapters.native.tuner import NativeConfig, NativeLayer
from lightning_peft.errors import ConfigError

__all__ = ["MixtureLayer", "check_count", "rows_of", "uniform"]


def check_count(config: NativeConfig, name: str, low: int) -> None:
    """Raise a ``ConfigError`` if an option is no integer of at least ``low``."""
    value = getattr(config, name)
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ConfigError(f"{type(config).__name__}: {name}={value!r} is no integer of at least {low}.")


def uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return values uniform within one over the square root of the last size: PyTorch's own start of linear layers."""
    drawn = torch.rand(shape, generator=generator, dtype=torch.float64)
    return (2 * drawn - 1) / math.sqrt(shape[-1])


def rows_of(x: Tensor, count: int, what: str) -> None:
    """Raise a ``ConfigError`` if the input of a layer does not have one row for each of ``count`` entries."""
    if x.shape[0] != count:
        raise ConfigError(
            f"A layer got {x.shape[0]} rows and the batch has {count} {what}. Inside a step the model must be called "
            "with the rows of the batch, in their order."
        )


class MixtureLayer(NativeLayer):
    """A linear layer with experts ``B_e A_e``; A is of shape (experts, r, in), B (experts, out, r)."""

    def check_fit(self, config: Any, path: str) -> None:
        """Raise a ``ConfigError`` at a convolution, and if a rank is too large."""
        super().check_fit(config, path)
        if self.kind == "conv2d":
            raise ConfigError(f"{path} is a {type(self.get_base_layer()).__name__}; this method needs linear layers.")

    def experts(self, x: Tensor, A_ERI: Tensor, B_EOR: Tensor, weights: Tensor) -> Tensor:
        """Return ``sum_e weights_e B_e A_e x``.

        Args:
            x: (rows, ..., in).
            A_ERI: First factors.
            B_EOR: Second factors.
            weights: Per row or per token, (rows, ..., experts).
        """
        num, rank = A_ERI.shape[:2]
        h = functional.linear(x, A_ERI.flatten(0, 1).to(x.dtype)).unflatten(-1, (num, rank))
        h = (h * weights.to(x.dtype)[..., None]).flatten(-2)
        return functional.linear(h, B_EOR.transpose(0, 1).flatten(1).to(x.dtype))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Say that there is no one weight that the method adds."""
        return False
