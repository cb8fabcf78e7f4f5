"""A frozen module of any kind whose output an adapter changes: what scaled features and bottlenecks share.

The module may be a layer or a whole sublayer (attention, feed-forward). It is called as before, with all its arguments;
of a tuple that it returns, the first entry is changed.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_peft.adapters.native.tuner import NativeLayer
from lightning_peft.errors import ConfigError

__all__ = ["FeatureLayer", "add_bias", "axes_after_features", "input_of", "is_layer"]

_CHANNEL_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm)


def is_layer(module: nn.Module) -> bool:
    """Whether ``module`` is a linear layer or a convolution."""
    convolution = isinstance(module, nn.modules.conv._ConvNd) and not module.transposed
    return isinstance(module, (nn.Linear, Conv1D)) or convolution


def axes_after_features(base: nn.Module, ndim: int) -> int:
    """Return how many axes follow that of the features in the output of a layer or a norm: none for most.

    Args:
        base: The layer or norm.
        ndim: Of its output.
    """
    if isinstance(base, nn.modules.conv._ConvNd):
        return len(base.kernel_size)
    by_name = type(base).__name__.endswith("2d") or getattr(base, "data_format", None) == "channels_first"
    return ndim - 2 if by_name or isinstance(base, _CHANNEL_NORMS) else 0


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the first tensor that a module is called with; by name, ``hidden_states`` comes first."""
    for value in (*args, kwargs.get("hidden_states"), *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    raise ConfigError("An adapter sits beside a module that is called without any tensor. Put it somewhere else.")


class FeatureLayer(NativeLayer):
    """A frozen module with adapters that change what comes out of it."""

    def reference(self, path: str) -> Tensor:
        """Return the first parameter of the module."""
        for parameter in self.get_base_layer().parameters():
            return parameter
        raise ConfigError(f"{path} is a {type(self.get_base_layer()).__name__} without parameters: nothing to adapt.")

    def matrix(self) -> Tensor:
        """Return nothing: initial values do not depend on the base."""
        return torch.empty(0)

    def change(self, adapter_name: str, x: Tensor, y: Tensor) -> Tensor:
        """Return what the adapter makes of the output ``y`` of the module, which was called with ``x``."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module and let the active adapters change its output, one after the other."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(*args, **kwargs)
        names = [name for name in self.active_adapters if name in self.settings]
        if self.disable_adapters or self.merged or not names:
            return result
        features = result[0] if isinstance(result, tuple) else result
        if not isinstance(features, Tensor):
            raise ConfigError(
                f"{type(self.base_layer).__name__} returns a {type(result).__name__}; {type(self).__name__} changes a "
                "tensor, or the first one of a tuple. Choose a module inside it."
            )
        x = input_of(args, kwargs)
        for name in names:
            features = self.change(name, x, features)
        if not isinstance(result, tuple):
            return features
        rest = (features, *result[1:])
        return type(result)(*rest) if hasattr(result, "_fields") else rest

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Say that there is no weight that the method adds."""
        return False


def add_bias(base: Any, values: Tensor, method: str) -> None:
    """Give a layer without a bias one, and say so: a model that is built anew has none."""
    warnings.warn(
        f"{method} was merged into layers without a bias, which got one. Code that builds the model without it "
        "(transformers' from_pretrained) would leave it out: build it with biases, where its configuration can "
        "(Llama: attention_bias, mlp_bias), or keep the adapter beside the base.",
        stacklevel=2,
    )
    base.bias = nn.Parameter(values.to(base.weight.dtype), requires_grad=False)
