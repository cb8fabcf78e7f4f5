"""torchao as the second backend: the same promises, through the same plugin."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("torchao")

from lightning_peft import QLoRA, QuantizedPrecision
from lightning_peft.core.quantized import is_quantized
from lightning_peft.errors import BaseMismatch, ConfigError
from lightning_peft.precision import dequantize, merge_adapter, quantize, quantized_bytes, quantized_layers
from tests.oracles.block_quantization import NF4_LEVELS, int8_rows, nearest_level
from tests.precision.tiny import LoRAModule, add_lora, loader, rows, tiny_llama, trainer

pytestmark = pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without:UserWarning")


def holder() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(64, 96))


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_weight_against_the_formula_and_gradient(mode: str) -> None:
    module = holder()
    weight = module[0].weight.detach().numpy().copy()
    assert quantize(module, mode, skip=(), backend="torchao") == ["0"]
    assert is_quantized(module[0].weight)
    got = dequantize(module[0]).numpy()
    if mode == "nf4":
        apart = np.abs(got - nearest_level(weight, NF4_LEVELS, 64)) / np.abs(weight).max()
        assert apart.max() < 0.31  # one level, where a scale of 8 bits moves the border over the value
        assert (apart > 0.02).mean() < 2e-3
        assert quantized_bytes(module) < 0.55 * weight.size
    else:
        np.testing.assert_allclose(got, int8_rows(weight), atol=1.01 * np.abs(weight).max() / 127)
        assert np.abs(got - weight).max() <= 0.51 * np.abs(weight).max() / 127
        assert quantized_bytes(module) < 1.1 * weight.size
    x = torch.randn(4, 64, requires_grad=True)
    expected = torch.nn.functional.linear(x, torch.from_numpy(got), module[0].bias)
    (grad,) = torch.autograd.grad(expected.square().sum(), x)
    result = module(x)
    (other,) = torch.autograd.grad(result.square().sum(), x)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(other, grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_orders_evaluation_and_resume(mode: str, tmp_path: Path) -> None:
    losses = []
    for where in ("init", "configure", "quantize_first"):
        module = LoRAModule(where)
        trainer(QuantizedPrecision(mode, backend="torchao"), 6, val_check_interval=2).fit(module, loader(), loader())
        losses.append(module.losses)
        assert len(list(quantized_layers(module))) == 14
    assert losses[0] == losses[1] == losses[2]
    half = LoRAModule()
    run = trainer(QuantizedPrecision(mode, backend="torchao"), 3)
    run.fit(half, loader(), loader())
    run.save_checkpoint(tmp_path / "half.ckpt")
    assert not [key for key in torch.load(tmp_path / "half.ckpt")["state_dict"] if "base_layer.weight" in key]
    whole, resumed = LoRAModule(), LoRAModule()
    trainer(QuantizedPrecision(mode, backend="torchao"), 6).fit(whole, loader(), loader())
    again = trainer(QuantizedPrecision(mode, backend="torchao"), 6)
    again.fit(resumed, loader(), loader(), ckpt_path=tmp_path / "half.ckpt")
    assert resumed.losses == whole.losses[3:]
    with pytest.raises(BaseMismatch, match="14 of 14 layers differ"):
        trainer(QuantizedPrecision(mode, backend="torchao"), 6).fit(
            LoRAModule(seed=2), loader(), loader(), ckpt_path=tmp_path / "half.ckpt"
        )


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_merge(mode: str) -> None:
    ids = rows(3)
    model = tiny_llama()
    quantize(model, mode, backend="torchao")
    add_lora(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.01)
        expected = model(input_ids=ids).logits
        with pytest.raises(ConfigError, match="quantised"):
            merge_adapter(model)
        assert len(merge_adapter(model, dequantize=True)) == 14
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-3, atol=1e-3)


def test_qlora_and_state_dicts() -> None:
    module = LoRAModule("bare")
    fit = trainer(QuantizedPrecision("nf4", backend="torchao"), 3, callbacks=[QLoRA(4)])
    fit.fit(module, loader(), loader())
    assert len(fit.callbacks[0].trainable_names) == 28
    source, target = holder(), holder()
    with torch.no_grad():
        target[0].weight.normal_()
    plain = {key: value.clone() for key, value in source.state_dict().items()}
    for each in (source, target):
        quantize(each, "nf4", skip=(), backend="torchao")
    target.load_state_dict({"0.bias": plain["0.bias"]})
    assert not torch.equal(dequantize(target[0]), dequantize(source[0]))
    target.load_state_dict(plain)
    assert torch.equal(dequantize(target[0]), dequantize(source[0]))
    with torch.no_grad():
        target.load_state_dict({**plain, "0.weight": torch.randn(96, 64)})
    target.load_state_dict(source.state_dict())
    assert torch.equal(dequantize(target[0]), dequantize(source[0]))


def test_odd_weights_are_refused_by_name() -> None:
    module = nn.Sequential(nn.Linear(10, 10))
    with pytest.raises(ConfigError, match="multiple of 64 elements"):
        quantize(module, "nf4", skip=(), backend="torchao")
