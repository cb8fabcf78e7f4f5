"""Linear layers of bitsandbytes that behave the same on every device and in every mode.

What is changed against the layers of bitsandbytes:

* The weight stays as it was quantised. On a CPU with ``avx512_bf16`` bitsandbytes repacks a 4-bit weight in place at
  the first evaluation, and the next training step fails.
* A bias keeps its dtype and may be trained; bitsandbytes casts it, for good, to the dtype of the first input.
* 8-bit layers compute the same in training and in evaluation on a CPU.
* 4-bit weights whose rows are not whole blocks are dequantised right. The CPU kernels of bitsandbytes 0.50 apply the
  scales of other blocks where the number of inputs is a multiple of 16 and not of the block size.
* Loading a state dict that lacks the weight leaves the weight alone; floating-point weights are quantised while they
  are loaded, quantised ones are taken as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import bitsandbytes
import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn.modules import fix_4bit_weight_quant_state_from_module
from torch import nn

from lightning_peft.errors import BaseMismatch

__all__ = ["Linear4bit", "Linear8bit", "adopt", "dequantize_4bit", "is_bnb", "quantize_linear"]

bnb: Any = bitsandbytes  # its attributes are typed too narrowly or not at all
Linear4bitBase: Any = bnb.nn.Linear4bit
Linear8bitBase: Any = bnb.nn.Linear8bitLt


def _result_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype a linear layer answers in: autocast's where it is on, otherwise that of its input."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def dequantize_4bit(codes: torch.Tensor, state: QuantState) -> torch.Tensor:
    """Return the weight (out, in) of packed 4-bit codes, in the dtype it was quantised from."""
    shape: Any = state.shape
    flat = copy.copy(state)
    flat.shape = torch.Size((1, shape.numel()))  # one row, so that no row ends inside a block
    return bnb.functional.dequantize_4bit(codes.view(-1, 1), flat).reshape(shape)


class _TimesDequantized(torch.autograd.Function):
    """``x @ W.T`` that keeps the codes of ``W`` for the backward pass and nothing else."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, codes: torch.Tensor, state: QuantState) -> torch.Tensor:
        ctx.codes, ctx.state = codes, state
        return nn.functional.linear(x, dequantize_4bit(codes, state).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grad,) = grads
        return grad @ dequantize_4bit(ctx.codes, ctx.state).to(grad.dtype), None, None


class _LoadsAnyWeight:
    """Loading of a weight in floating point, in codes, or not at all; mixed into a layer of bitsandbytes."""

    def _load_from_state_dict(
        self: Any,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        stored = {key: value for key, value in state_dict.items() if self._is_of_weight(key, prefix)}
        rest = {key: value for key, value in state_dict.items() if key.startswith(prefix) and key not in stored}
        nn.Module._load_from_state_dict(
            self, rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        key = f"{prefix}weight"
        if key in missing_keys:
            missing_keys.remove(key)
        if key not in stored:
            return
        try:
            if stored[key].is_floating_point() and stored[key].shape == (self.out_features, self.in_features):
                self.set_weight(stored[key].to(self.weight.device))
            else:
                self.set_codes({name.removeprefix(prefix): value for name, value in stored.items()})
        except BaseMismatch as error:
            error_msgs.append(f"{prefix}weight: {error}")

    @staticmethod
    def _is_of_weight(key: str, prefix: str) -> bool:
        leaf = key.removeprefix(prefix) if key.startswith(prefix) else ""
        return leaf in ("weight", "SCB", "weight_format") or leaf.startswith("weight.")


class Linear4bit(_LoadsAnyWeight, Linear4bitBase):
    """A linear layer with a 4-bit weight; create it with :func:`quantize_linear`."""

    compute_dtype: torch.dtype | None

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        """Return ``x @ W.T + b``, ``W`` dequantised to the compute dtype, or to that of ``x`` if there is none."""
        fix_4bit_weight_quant_state_from_module(self)
        result = _result_dtype(x)
        dtype = self.compute_dtype or result
        state = self.weight.quant_state
        if x.device.type == "cpu" and self.in_features % state.blocksize:
            y: torch.Tensor = _TimesDequantized.apply(x.to(dtype), self.weight, state)  # pyright: ignore[reportAssignmentType]
        else:
            y = bnb.matmul_4bit(x.to(dtype), self.weight, quant_state=state)
        if self.bias is not None:
            y = y + self.bias.to(dtype)
        return y.to(result)

    def set_weight(self, weight: torch.Tensor) -> None:
        """Quantise ``weight`` (out, in) into this layer, on the weight's device."""
        old = self.weight
        fresh = bnb.nn.Params4bit(
            weight.detach().contiguous(),
            requires_grad=False,
            blocksize=old.blocksize,
            compress_statistics=old.compress_statistics,
            quant_type=old.quant_type,
            quant_storage=old.quant_storage,
            module=self,
        )
        self.weight = fresh._quantize(weight.device)

    def set_codes(self, stored: Mapping[str, torch.Tensor]) -> None:
        """Take packed codes and their statistics, as :meth:`state_dict` gives them."""
        codes = stored["weight"]
        statistics = {key.removeprefix("weight."): value for key, value in stored.items() if key != "weight"}
        if codes.shape != self.weight.shape or not statistics:
            raise BaseMismatch(
                f"a quantised weight of shape {tuple(codes.shape)} and {len(statistics)} statistics does not fit "
                f"{tuple(self.weight.shape)}"
            )
        device = self.weight.device
        state = QuantState.from_dict(dict(statistics), device=device)
        if state.quant_type != self.weight.quant_type:
            raise BaseMismatch(f"the stored weight is {state.quant_type}, this layer is {self.weight.quant_type}")
        with torch.no_grad():
            self.weight.copy_(codes)
        self.weight.quant_state = self.quant_state = state


class Linear8bit(_LoadsAnyWeight, Linear8bitBase):
    """A linear layer with an 8-bit weight, one scale per row; create it with :func:`quantize_linear`."""

    compute_dtype: torch.dtype | None = None

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        """Return ``x @ W.T + b``; on a GPU in 8-bit integers (LLM.int8()), on a CPU with ``W`` dequantised."""
        on_gpu = x.device.type == "cuda"
        self.state.is_training = self.training or not on_gpu
        if self.weight.CB is not None:
            self.init_8bit_state()
        result = _result_dtype(x)
        dtype = torch.float16 if on_gpu else self.compute_dtype or result
        y = bnb.matmul(x.to(dtype), self.weight, state=self.state)
        if self.state.CB is not None:
            self.weight.data = self.state.CB
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.to(result)

    def set_weight(self, weight: torch.Tensor) -> None:
        """Quantise ``weight`` (out, in) into this layer, on the weight's device."""
        fresh = bnb.nn.Int8Params(weight.detach().contiguous(), requires_grad=False, has_fp16_weights=False)
        self.weight = fresh._quantize(weight.device)
        self.state.CB = self.state.SCB = None

    def set_codes(self, stored: Mapping[str, torch.Tensor]) -> None:
        """Take codes and row scales, as :meth:`state_dict` gives them."""
        codes, scales = stored["weight"], stored.get("SCB")
        if codes.shape != self.weight.shape or scales is None or codes.dtype != torch.int8:
            raise BaseMismatch(
                f"a stored weight of {codes.dtype} {tuple(codes.shape)} is no 8-bit weight of this layer"
            )
        device = self.weight.device
        fresh = bnb.nn.Int8Params(codes.to(device), requires_grad=False, has_fp16_weights=False)
        fresh.CB, fresh.SCB = fresh.data, scales.to(device)
        self.weight = fresh
        self.state.CB = self.state.SCB = None


def is_bnb(module: Any) -> bool:
    """Whether ``module`` is a linear layer of bitsandbytes with a quantised weight, ours or not."""
    if isinstance(module, Linear4bitBase):
        return True
    return isinstance(module, Linear8bitBase) and not module.state.has_fp16_weights


def quantize_linear(linear: nn.Linear, mode: str, device: torch.device | None = None) -> Linear4bit | Linear8bit:
    """Return a quantised layer in the place of ``linear``; its bias stays the same parameter.

    Args:
        linear: A linear layer with a floating-point weight that is not on the meta device.
        mode: ``"nf4"``, ``"fp4"``, ``"nf4-dq"``, ``"fp4-dq"`` or ``"int8"``.
        device: Where to quantise and leave the weight; None: where it is.
    """
    layer: Any
    eight: Any = Linear8bit
    four: Any = Linear4bit
    if mode == "int8":
        layer = eight(linear.in_features, linear.out_features, False, has_fp16_weights=False, device="meta")
    else:
        layer = four(
            linear.in_features,
            linear.out_features,
            False,
            compress_statistics=mode.endswith("-dq"),
            quant_type=mode.removesuffix("-dq"),
            device="meta",
        )
        layer.support_avx512bf16_for_cpu = False
    layer.set_weight(linear.weight.to(device))
    layer.bias = linear.bias
    return layer.train(linear.training)


def adopt(module: nn.Module) -> None:
    """Give a layer that bitsandbytes or transformers made the behaviour of this module's classes; no bit changes."""
    layer: Any = module
    if isinstance(module, Linear4bitBase):
        layer.support_avx512bf16_for_cpu = False
        if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

            layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu_inverse(
                layer.weight.data, layer.weight.quant_state
            )
            layer.quant_state = layer.weight.quant_state
        if type(module) in (bnb.nn.Linear4bit, bnb.nn.LinearNF4, bnb.nn.LinearFP4):
            module.__class__ = Linear4bit
    elif type(module) is bnb.nn.Linear8bitLt:
        module.__class__ = Linear8bit
