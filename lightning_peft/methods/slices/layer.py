"""A linear layer of which only some input columns or output rows train.

The layer keeps its weight, frozen, and gets one small dense parameter beside it, ``weight_slice``: the values of the
chosen columns or rows, which is all that autograd and the optimizer see. Before every product the slice is written
into the weight, so that one plain product is computed, with the values of this moment, whoever changed them last: the
optimizer, a checkpoint, an average of weights.

Of chosen columns, the backward pass needs the chosen features of the input and nothing else. Of chosen rows, it needs
the whole input, as a plain layer does, and multiplies it by the chosen features of the output's gradient.

``state_dict`` is that of the plain layer, in both directions. Which columns or rows they are is not in it: it belongs
to the optimizer's state, and a method saves it there.

Shapes: T tokens, I inputs, O outputs, K chosen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_peft.core.names import named_modules

__all__ = ["Side", "Slice", "SlicedLayer", "SlicedLinear", "can_slice", "slice_layer", "sliced_layers", "unslice"]

Side = Literal["inputs", "outputs"]
"""Whether input columns or output rows of the weight matrix (out, in) train."""


@dataclass(frozen=True)
class Slice:
    """A part of a weight.

    Args:
        index: Which columns or rows, each once.
        side: Columns (``"inputs"``) or rows (``"outputs"``).
    """

    index: Tensor
    side: Side = "inputs"


class SlicedLayer(nn.Module):
    """What sliced layers of every kind share. Made of a plain layer by :func:`slice_layer`, in place."""

    plain_class: ClassVar[type[nn.Module]]
    input_dim: ClassVar[int]
    """The dimension of ``weight`` that the inputs lie along."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    weight_slice: nn.Parameter
    slice_index: Tensor
    slice_side: Side

    @property
    def slice_dim(self) -> int:
        """The dimension of ``weight`` that is sliced."""
        return self.input_dim if self.slice_side == "inputs" else 1 - self.input_dim

    @torch.no_grad()
    def write(self) -> None:
        """Put the values of the slice into the weight."""
        # Through .data: graphs that hold the weight stay valid, and tell by the slice whether they are out of date.
        self.weight.data.index_copy_(self.slice_dim, self.slice_index, self.weight_slice.data)

    @torch.no_grad()
    def read(self) -> None:
        """Take the values of the slice from the weight."""
        values = self.weight.data.index_select(self.slice_dim, self.slice_index)
        held = getattr(self, "weight_slice", None)
        if held is not None and (held.shape, held.dtype, held.device) == (values.shape, values.dtype, values.device):
            held.copy_(values)
            return
        flag = self.weight.requires_grad if held is None else held.requires_grad
        self.weight_slice = nn.Parameter(values, requires_grad=flag)

    def choose(self, index: Tensor) -> None:
        """Train other columns or rows from now on, of the same number; the weight keeps its values."""
        self.write()
        self.slice_index.copy_(index)
        self.read()

    def forward(self, x: Tensor) -> Tensor:
        """Return what the plain layer returns."""
        self.write()
        if not (torch.is_grad_enabled() and self.weight_slice.requires_grad):
            return super().forward(x)
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        arguments = (x, self.weight_slice, self.bias, self.weight, self.slice_index, self.input_dim, self.slice_side)
        return _Product.apply(*arguments)  # pyright: ignore[reportReturnType]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.write()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[f"{prefix}weight_slice"]

    def _load_from_state_dict(  # the arguments are torch's
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        self.write()
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        missing_keys[:] = [key for key in missing_keys if key != f"{prefix}weight_slice"]
        self.read()

    def extra_repr(self) -> str:
        """The plain layer's, and how much of it trains."""
        return f"{super().extra_repr()}, {self.slice_side}={len(self.slice_index)}"


class _Product(torch.autograd.Function):
    """``x @ W.T + b``, of which the gradient of the whole weight is never computed."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_slice: Tensor,
        bias: Tensor | None,
        weight: Tensor,
        index: Tensor,
        input_dim: int,
        side: Side,
    ) -> Tensor:
        kept = x.reshape(-1, x.shape[-1]).index_select(1, index) if side == "inputs" else x
        # With the slice, autograd refuses a backward pass after the optimizer has moved it, as with any parameter.
        ctx.save_for_backward(kept, weight_slice, weight if ctx.needs_input_grad[0] else None, index)
        ctx.input_dim, ctx.side = input_dim, side
        return functional.linear(x, _matrix(weight, input_dim, x.dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight_slice, weight, index = ctx.saved_tensors
        grad_x = grad @ _matrix(weight, ctx.input_dim, grad.dtype) if ctx.needs_input_grad[0] else None
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None
        left, right = grad.reshape(-1, grad.shape[-1]), kept.reshape(-1, kept.shape[-1])
        left = left if ctx.side == "inputs" else left.index_select(1, index)
        grad_slice = left.T @ right if ctx.input_dim == 1 else right.T @ left
        return grad_x, grad_slice.to(weight_slice.dtype), grad_bias, None, None, None, None


def _matrix(weight: Tensor, input_dim: int, dtype: torch.dtype) -> Tensor:
    return (weight if input_dim == 1 else weight.T).to(dtype)


class SlicedLinear(SlicedLayer, nn.Linear):
    """A ``torch.nn.Linear`` of which a part trains."""

    plain_class = nn.Linear
    input_dim = 1


def _sliced_class(module: nn.Module) -> type[SlicedLayer] | None:
    kind = type(module)
    if kind is nn.Linear:
        return SlicedLinear
    if kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils":
        from lightning_peft.methods.slices.conv1d import SlicedConv1D

        return SlicedConv1D
    return None


def can_slice(module: nn.Module) -> bool:
    """Whether ``module`` is a plain layer that :func:`slice_layer` knows, and not quantised."""
    return _sliced_class(module) is not None and "forward" not in vars(module)


def slice_layer(module: nn.Module, part: Slice) -> SlicedLayer:
    """Turn a plain layer into a sliced one, in place: the same object, with its hooks, under the same names.

    Args:
        module: A ``torch.nn.Linear``, or the ``Conv1D`` of GPT-2.
        part: What of its weight trains. Whether it does now follows the weight's own flag.
    """
    kind = _sliced_class(module)
    assert kind is not None, f"{type(module).__name__} cannot be sliced"
    module.__class__ = kind
    assert isinstance(module, SlicedLayer)
    module.slice_side = part.side
    module.register_buffer("slice_index", part.index.to(module.weight.device), persistent=False)
    module.read()
    return module


def unslice(module: SlicedLayer) -> nn.Module:
    """Turn a sliced layer into the plain one it was, in place, its weight holding what was trained."""
    module.write()
    del module.weight_slice, module.slice_index, module.slice_side
    plain: Any = module
    plain.__class__ = module.plain_class
    return plain


def sliced_layers(root: nn.Module) -> Iterator[tuple[str, SlicedLayer]]:
    """Yield clean path and module of every sliced layer below ``root``."""
    for path, module in named_modules(root):
        if isinstance(module, SlicedLayer):
            yield path, module
