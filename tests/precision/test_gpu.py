"""The same on a CUDA device: every mode, autocast, memory, resume. Not run where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_peft import QLoRA, QuantizedPrecision
from lightning_peft.precision import dequantize, quantize, quantized_layers
from tests.precision.tiny import LoRAModule, loader, tiny_llama, trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class OnGPU(LoRAModule):
    """Remembers what the device held."""

    peak = 0

    def on_train_start(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def on_train_end(self) -> None:
        type(self).peak = torch.cuda.max_memory_allocated()


def fit(module: LoRAModule, mode: Any, steps: int = 6, ckpt: Path | None = None, **settings: Any) -> Any:
    run = trainer(QuantizedPrecision(mode, **settings), steps, accelerator="gpu", callbacks=[QLoRA(4, dropout=0.0)])
    run.fit(module, loader(), loader(), ckpt_path=ckpt)
    return run


@pytest.mark.parametrize("mode", ["nf4", "fp4", "nf4-dq", "fp4-dq", "int8"])
def test_every_mode_trains_evaluates_and_resumes(mode: str, tmp_path: Path) -> None:
    whole, half, resumed = OnGPU("bare"), OnGPU("bare"), OnGPU("bare")
    fit(whole, mode)
    assert all(layer.weight.device.type == "cuda" for _, layer in quantized_layers(whole))
    assert {p.dtype for n, p in whole.named_parameters() if "lora_" in n} == {torch.float32}
    run = fit(half, mode, 3)
    run.save_checkpoint(tmp_path / "half.ckpt")
    fit(resumed, mode, 6, tmp_path / "half.ckpt")
    assert resumed.losses == pytest.approx(whole.losses[3:], rel=1e-3)


@pytest.mark.parametrize("mode", ["nf4", "fp4", "nf4-dq", "int8"])
def test_weights_are_those_of_the_cpu_up_to_ties(mode: str) -> None:
    here, there = tiny_llama(hidden=64, intermediate=128), tiny_llama(hidden=64, intermediate=128)
    quantize(here, mode)
    quantize(there, mode, device=torch.device("cuda"))
    for (_, a), (_, b) in zip(quantized_layers(here), quantized_layers(there), strict=True):
        apart = (dequantize(a) - dequantize(b).cpu()).abs()
        assert float((apart > 1e-3).float().mean()) < 0.01


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_first_losses_are_those_of_the_cpu(dtype: Any) -> None:
    losses = []
    for accelerator in ("cpu", "gpu"):
        module = LoRAModule("bare")
        plugin = QuantizedPrecision("nf4", compute_dtype=dtype)
        run = trainer(plugin, 2, accelerator=accelerator, callbacks=[QLoRA(4, dropout=0.0)])
        run.fit(module, loader(), loader())
        losses.append(module.losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3 if dtype == "float32" else 3e-2)


def test_paged_optimizer_under_lisa_on_the_device() -> None:
    import bitsandbytes as bnb

    from tests.precision.test_optimizers import Stack
    from tests.precision.test_optimizers import fit as fit_stack

    module = Stack(bnb.optim.PagedAdamW8bit)
    fit_stack(module, 9, "offload")
    assert module.losses[-1] < module.losses[0] * 2
