"""Float32 adapters over a base of lower precision: masters for the optimizer, multiplied in the activations' dtype.

``peft`` keeps adapters in float32 over a bfloat16 base, which an optimizer needs: an update of a small learning rate
is less than the rounding of a bfloat16 weight. It casts the activations to float32 for them, though, so that backward
keeps a float32 copy of the input of every adapted layer: more than full fine-tuning keeps. Here the small matrices are
cast to the dtype of the activations instead, in each forward pass, by layers that are otherwise ``peft``'s. Values,
gradients, optimizer states and files stay float32. Where the activations are float32 LoRA computes what it did, bit for
bit, and DoRA the same sum in another order.

Per adapted linear layer of ``n`` rows and rank ``r``, backward then keeps the input, which layers of the same input
share, and ``n r`` elements of the inner activation, in the activations' dtype. The matrices are cast again in backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import HalfPrecision
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from peft.tuners.adalora.layer import AdaLoraLayer, SVDLinear
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import Embedding, LoraLayer, MultiheadAttention, ParamWrapper
from peft.tuners.lora.variants import DoraLinearVariant
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import transpose
from torch import Tensor, nn
from torch.nn import functional

from lightning_peft.core.instance import replace_on

__all__ = ["compute_in_input_dtype", "keep_masters"]


class _Multiply(torch.autograd.Function):
    """``x @ weight.T + bias`` in the dtype of ``x``; keeps ``x`` and the weight as it is, no copy of it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight, bias = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        gradient = gradients[0]
        rows = gradient.flatten(0, -2)
        return (
            gradient @ weight.to(x.dtype) if for_x else None,
            (rows.T @ x.flatten(0, -2)).to(weight.dtype) if for_weight else None,
            rows.sum(0).to(bias.dtype) if for_bias else None,
        )


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    others_decide = torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling()  # what backward keeps
    if x.dtype != weight.dtype and x.ndim > 1 and not others_decide:
        return cast(Tensor, _Multiply.apply(x, weight, bias))
    return functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


class LinearInInputDtype(nn.Linear):
    """A linear layer whose weights take part in the dtype of its input."""

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input @ weight.T + bias`` in the dtype of ``input``."""
        return _multiply(input, self.weight, self.bias)


class _ConvInInputDtype:
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        bias = None if bias is None else bias.to(input.dtype)
        return super()._conv_forward(input, weight.to(input.dtype), bias)  # type: ignore[misc]


class Conv1dInInputDtype(_ConvInInputDtype, nn.Conv1d):
    """A convolution whose weights take part in the dtype of its input."""


class Conv2dInInputDtype(_ConvInInputDtype, nn.Conv2d):
    """A convolution whose weights take part in the dtype of its input."""


class Conv3dInInputDtype(_ConvInInputDtype, nn.Conv3d):
    """A convolution whose weights take part in the dtype of its input."""


class DoraInInputDtype(DoraLinearLayer):
    """DoRA's part of a linear layer: lengths of columns in the adapter's dtype, products in that of the input."""

    def forward(
        self,
        x: Tensor,
        *,
        lora_A: nn.Module,
        lora_B: nn.Module,
        scaling: float,
        base_layer: nn.Module,
        base_result: Tensor | None = None,
        adapter_name: str = "default",
    ) -> Tensor:
        """Return what is added to the base layer's output."""
        with torch.no_grad():  # the paper takes the lengths as constants, section 4.3
            stored: Any = dequantize_module_weight(base_layer)
            lora_weight = self.get_lora_weight(lora_A=lora_A, lora_B=lora_B, adapter_name=adapter_name)
            lengths = self.get_weight_norm(
                weight=stored.to(lora_weight.dtype), lora_weight=lora_weight, scaling=scaling, adapter_name=adapter_name
            )
        scale = (self.weight / lengths).view(1, -1)
        if base_result is None:
            base_result = functional.linear(x, transpose(stored.to(x.dtype), self.fan_in_fan_out))
        elif base_layer.bias is not None:
            base_result = base_result - base_layer.bias  # type: ignore[operator]
        return (scale - 1).to(x.dtype) * base_result + (scale * scaling).to(x.dtype) * lora_B(lora_A(x))


class SVDLinearInInputDtype(SVDLinear):
    """AdaLoRA's linear layer, its factors in the dtype of the input."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base layer's output and the adapters'."""
        factors = [self.lora_A[name] for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or all(factor.dtype == x.dtype for factor in factors):
            return super().forward(x, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        for name in self.active_adapters:
            if name in self.lora_A:
                scale = self.scaling[name] / (self.ranknum[name] + 1e-5) * self.lora_E[name].T
                inner = _multiply(self.lora_dropout[name](x), self.lora_A[name]) * scale.to(x.dtype)
                result = result + _multiply(inner, self.lora_B[name])
        return result


_IN_INPUT_DTYPE: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: LinearInInputDtype,
    nn.Conv1d: Conv1dInInputDtype,
    nn.Conv2d: Conv2dInInputDtype,
    nn.Conv3d: Conv3dInInputDtype,
    DoraLinearLayer: DoraInInputDtype,
}


def compute_in_input_dtype(root: nn.Module) -> None:
    """Let the LoRA and AdaLoRA layers below ``root`` compute in the dtype of their input.

    Left to ``peft`` are layers with an adapter of another variant than plain LoRA or DoRA, which each compute in a way
    of their own, and the kinds that cast no activations: embeddings, ``nn.MultiheadAttention``, ``target_parameters``.
    """
    for layer in root.modules():
        if type(layer) is SVDLinear:
            layer.__class__ = SVDLinearInInputDtype
        elif _is_plain(layer):
            for container in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
                modules: Any = container.values()  # type: ignore[operator]
                for module in modules:
                    module.__class__ = _IN_INPUT_DTYPE.get(type(module), type(module))
            layer.cast_input_dtype_enabled = False  # type: ignore[assignment]
        elif isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = True


def _is_plain(layer: nn.Module) -> bool:
    if not isinstance(layer, LoraLayer) or isinstance(
        layer, (AdaLoraLayer, Embedding, MultiheadAttention, ParamWrapper)
    ):
        return False
    known = {*_IN_INPUT_DTYPE, *_IN_INPUT_DTYPE.values()}
    matrices: list[nn.Module] = [*layer.lora_A.values(), *layer.lora_B.values()]
    lengths: Any = layer.lora_magnitude_vector.values()
    variants: Any = getattr(layer, "lora_variant", {}).values()
    return (
        bool(matrices)
        and all(type(module) in known for module in (*matrices, *lengths))
        and all(isinstance(variant, DoraLinearVariant) for variant in variants)
    )


def keep_masters(trainer: Trainer, root: nn.Module) -> Callable[[], None]:
    """Let ``bf16-true`` and ``16-true`` leave adapters as they are that compute in the dtype of their input anyway.

    Not under a strategy that shards: it wants one dtype per block.

    Returns:
        A function that undoes it.
    """
    precision = trainer.precision_plugin
    if not isinstance(precision, HalfPrecision) or isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy)):
        return lambda: None
    convert = precision.convert_module

    def convert_module(module: nn.Module) -> nn.Module:
        parts = list(_masters(root))
        values = [(parameter, parameter.data) for part in parts for parameter in part.parameters(recurse=False)]
        buffers = [(part, name, buffer) for part in parts for name, buffer in part.named_buffers(recurse=False)]
        converted = convert(module)
        for parameter, value in values:
            parameter.data = value
        for part, name, buffer in buffers:
            part._buffers[name] = buffer
        return converted

    return replace_on(precision, convert_module=convert_module)


def _masters(root: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that hold the adapters below ``root`` whose layers compute in the dtype of their input."""
    from lightning_peft.adapters.native.tuner import NativeLayer

    for layer in root.modules():
        follows = isinstance(layer, (NativeLayer, SVDLinearInInputDtype)) or (
            isinstance(layer, LoraLayer) and getattr(layer, "cast_input_dtype_enabled", True) is False
        )
        if follows:
            for name, child in layer.named_children():
                if name != "base_layer":
                    yield from child.modules()
