"""Bits per weight and what is lost by them: bases of ``QuantizedPrecision``, PEQA's integers, low-bit adapters.

Weights are drawn from the normal distribution, whose shape trained matrices have nearly, and errors are relative
Frobenius norms. No time is measured.

    python -m benchmarks.quantisation
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

sys.path.append(str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

from benchmarks.harness import environment, write_json
from lightning_peft.methods.quantized.low_bit_adapters import (
    LowBitAdapters,
    LowBitWeight,
    low_bit_weights,
    stored_bytes,
)
from lightning_peft.methods.quantized.peqa import IntegerLinear
from lightning_peft.precision import dequantize, merge_adapter, quantize, quantized_bytes, quantized_layers

SIDE = 1024
RESULT = Path(__file__).parent / "results" / "quantisation.json"


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def linear(side: int) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(side, side, bias=False))
    with torch.no_grad():
        model[0].weight.normal_(std=0.02)
    return model


def bases(side: int) -> list[dict[str, Any]]:
    """Bits and error of each mode; and what a merge into it loses of an adapter as large as 2 % of the weight."""
    from peft import LoraConfig, inject_adapter_in_model

    rows = []
    for backend, modes in (
        ("bitsandbytes", ("nf4", "nf4-dq", "fp4", "fp4-dq", "int8")),
        ("torchao", ("nf4", "int8")),
    ):
        for mode in modes:
            model = linear(side)
            weight = model[0].weight.detach().clone()
            quantize(model, mode, skip=(), backend=backend)
            bits = 8 * quantized_bytes(model) / weight.numel()
            base = dequantize(model[0])
            torch.manual_seed(1)
            inject_adapter_in_model(LoraConfig(r=8, target_modules=["0"], init_lora_weights=False), model)
            layer: Any = model[0]
            with torch.no_grad():
                lora = layer.lora_B["default"].weight
                lora.mul_(0.02 * base.norm() / layer.get_delta_weight("default").norm())
                delta = layer.get_delta_weight("default").detach()
                merge_adapter(model, dequantize=True)
                exact = error(model[0].weight - base, delta)
                quantize(model, mode, skip=(), backend=backend)
                again = error(dequantize(dict(quantized_layers(model))["0"]) - base, delta)
            row = {"backend": backend, "mode": mode, "bits": bits, "error": error(base, weight)}
            rows.append({**row, "adapter_lost_by_dequantised_merge": exact, "adapter_lost_by_merge_in_mode": again})
    return rows


def integers(side: int) -> list[dict[str, Any]]:
    """PEQA's starting point."""
    rows = []
    for bits in (4, 3, 2):
        for group in (None, 64):
            for fit in ("range", "error"):
                model = linear(side)
                weight = model[0].weight.detach()
                layer = IntegerLinear(model[0], bits, group, fit)
                size = layer.codes.nbytes + layer.zeros.nbytes + layer.scales.nbytes
                values = {"bits": bits, "group_size": group, "fit": fit, "stored_bits": 8 * size / weight.numel()}
                trained = layer.scales.numel() / weight.numel()
                rows.append({**values, "trained_fraction": trained, "error": error(layer.weight, weight)})
    return rows


def adapters(side: int) -> list[dict[str, Any]]:
    """A LoRA of rank 8 in few bits: size and rounding error."""
    from peft import LoraConfig, inject_adapter_in_model

    rows = []
    for bits in (1, 2, 4, 8):
        for codebook in ("median", "mean"):
            model = linear(side)
            torch.manual_seed(1)
            inject_adapter_in_model(LoraConfig(r=8, target_modules=["0"], init_lora_weights="gaussian"), model)
            LowBitAdapters(bits, codebook).convert(model)
            torch.manual_seed(2)
            weight = torch.randn(side, side)
            size = sum(part.weight.numel() for _, part, _ in low_bit_weights(model)) * 4
            rounded = LowBitWeight(bits, codebook)(weight)
            values = {"bits": bits, "codebook": codebook, "error": error(rounded, weight)}
            rows.append({**values, "float32_bytes": size, "stored_bytes": stored_bytes(model)})
    return rows


def show(title: str, rows: list[dict[str, Any]]) -> None:
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name)
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=160).print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small matrices, to try the script out")
    parser.add_argument("--output", type=Path, default=RESULT)
    given = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", "TorchaoLoraLinear was instantiated without")
    torch.set_num_threads(1)
    side = 128 if given.tiny else SIDE
    result = {"side": side, "bases": bases(side), "integers": integers(side), "adapters": adapters(side)}
    for title in ("bases", "integers", "adapters"):
        show(title, result[title])
    write_json(given.output, {"environment": environment("quantisation", arguments), **result})


if __name__ == "__main__":
    main()
