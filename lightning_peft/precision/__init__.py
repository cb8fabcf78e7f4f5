"""Quantised base weights: right on every device, in every order with injection and sharding, through every resume."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_PUBLIC = {
    "Backend": "layers",
    "Mode": "layers",
    "QuantizedPrecision": "plugin",
    "dequantize": "layers",
    "dequantize_layers": "layers",
    "merge_adapter": "layers",
    "quantize": "layers",
    "quantized_bytes": "layers",
    "quantized_layers": "layers",
}

__all__ = [
    "Backend",
    "Mode",
    "QuantizedPrecision",
    "dequantize",
    "dequantize_layers",
    "merge_adapter",
    "quantize",
    "quantized_bytes",
    "quantized_layers",
]

if TYPE_CHECKING:
    from lightning_peft.precision.layers import (
        Backend,
        Mode,
        dequantize,
        dequantize_layers,
        merge_adapter,
        quantize,
        quantized_bytes,
        quantized_layers,
    )
    from lightning_peft.precision.plugin import QuantizedPrecision


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"lightning_peft.precision.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'lightning_peft.precision' has no attribute {name!r}")
