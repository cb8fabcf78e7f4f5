"""PEQA against a slow re-implementation: initial scales, gradients, frozen integers, resume, task switching, export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from lightning_peft import PEQA
from lightning_peft.core.trainable import state_bytes
from lightning_peft.data.loader import ResumableDataLoader
from lightning_peft.errors import BaseMismatch, ConfigError, ResumeMismatch, ScopeError
from lightning_peft.methods.quantized.peqa import (
    IntegerLinear,
    get_scales,
    integer_layers,
    round_to_nearest,
    set_scales,
    to_plain,
)
from tests.precision.tiny import LoRAModule, loader, rows, tiny_llama, trainer


def oracle(weight: np.ndarray, bits: int, group: int, fit: str) -> np.ndarray:
    """Equation 1 of the paper for each group on its own, over the same grid of ranges."""
    out = np.empty_like(weight)
    top = np.float32(2**bits - 1)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], group):
            part = weight[row, start : start + group]
            low, high = min(part.min(), np.float32(0)), max(part.max(), np.float32(0))
            best = None
            for step in range(50 if fit == "error" else 1):
                shrink = np.float32(1 - 0.5 * step / 49)
                scale = (high - low) * shrink / top
                zero = np.clip(np.round(-low * shrink / scale), 0, top)
                value = scale * (np.clip(np.round(part / scale) + zero, 0, top) - zero)
                error = ((value - part) ** 2).sum()
                if best is None or error < best[0]:
                    best = (error, value)
            assert best is not None
            out[row, start : start + group] = best[1]
    return out


@pytest.mark.parametrize("fit", ["error", "range"])
@pytest.mark.parametrize(("bits", "group"), [(4, 16), (3, None), (2, 8), (8, 48), (1, None)])
def test_initial_weight_is_that_of_equation_1(bits: int, group: int | None, fit: Any) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(48, 6)
    with torch.no_grad():
        linear.weight[0].abs_()  # zero is outside the values of this row
    layer = IntegerLinear(linear, bits, group, fit)
    expected = oracle(linear.weight.detach().numpy(), bits, group or 48, fit)
    np.testing.assert_allclose(layer.weight.numpy(), expected, atol=1e-5)
    assert layer.codes.numel() == 48 * 6 * bits // 8
    assert layer.scales.shape == (6, 48 // (group or 48))


def test_error_fit_is_closer_than_range_fit() -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 64)
    errors = []
    for fit in ("error", "range"):
        codes, scales, zeros = round_to_nearest(weight, 3, None, fit)
        errors.append((scales * (codes.float() - zeros.float()) - weight).square().sum())
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "group"), [(4, 16), (3, None)])
def test_gradients_are_those_of_the_dequantised_product(bits: int, group: int | None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = IntegerLinear(nn.Linear(48, 6), bits, group, "error")
    x = torch.randn(2, 5, 48, dtype=dtype, requires_grad=True)
    target = torch.randn(2, 5, 6, dtype=dtype)
    scales = layer.scales.detach().clone().requires_grad_()
    weight = (scales[..., None] * layer.integers()).reshape(6, 48)
    reference = nn.functional.linear(x, weight.to(dtype)) + layer.bias.detach().to(dtype)
    expected = torch.autograd.grad(((reference - target) ** 2).sum(), [x, scales])
    result = layer(x)
    got = torch.autograd.grad(((result - target) ** 2).sum(), [x, layer.scales])
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.5}
    assert result.dtype == dtype
    torch.testing.assert_close(result, reference, rtol=1e-5, atol=1e-5)
    for mine, other in zip(got, expected, strict=True):
        assert mine.dtype == other.dtype
        torch.testing.assert_close(mine, other, **tolerance)


def batches() -> ResumableDataLoader:
    return ResumableDataLoader(TensorDataset(rows(12)), batch_size=2, shuffle=True, seed=3)


def fit(module: LoRAModule, steps: int, ckpt: Path | None = None, **settings: Any) -> pl.Trainer:
    run = trainer(None, steps, callbacks=[PEQA(**settings)])
    run.fit(module, batches(), loader(), ckpt_path=ckpt)
    return run


def test_only_scales_train_and_integers_keep_their_bits() -> None:
    module = LoRAModule("bare")
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    run = fit(module, 5, group_size=16)
    method = run.callbacks[0]
    assert isinstance(method, PEQA)
    layers = dict(integer_layers(module))
    assert len(layers) == 14
    assert method.trainable_names == {f"{path}.scales" for path in layers}
    fresh = LoRAModule("bare")
    PEQA(group_size=16).convert(fresh)
    for (path, layer), (_, other) in zip(layers.items(), integer_layers(fresh), strict=True):
        assert torch.equal(layer.codes, other.codes), path
        assert torch.equal(layer.zeros, other.zeros), path
        assert not torch.equal(layer.scales, other.scales), path
    for name, parameter in module.named_parameters():
        if name in before:
            assert torch.equal(parameter, before[name]), name
    num_scales = sum(layer.scales.numel() for layer in layers.values())
    num_weights = sum(layer.in_features * layer.out_features for layer in layers.values())
    assert num_scales * 16 == num_weights
    assert state_bytes(run.optimizers) == num_scales * 8 + 14 * 4  # two moments and a step counter each
    packed = sum(layer.codes.nbytes + layer.zeros.nbytes + layer.scales.nbytes for layer in layers.values())
    assert packed == num_weights * (4 + 40 / 16) / 8
    assert module.losses[-1] < module.losses[0] + 0.5


@pytest.mark.parametrize("where", ["bare", "configure_bare"])
def test_resume_is_exact(where: Any, tmp_path: Path) -> None:
    whole, half, resumed = LoRAModule("bare"), LoRAModule("bare"), LoRAModule(where, seed=4)
    fit(whole, 9)
    fit(half, 4).save_checkpoint(tmp_path / "half.ckpt")
    fit(resumed, 9, tmp_path / "half.ckpt")  # built from another model: the checkpoint holds the integers
    assert resumed.losses == whole.losses[4:]
    pairs = zip(whole.state_dict().items(), resumed.state_dict().items(), strict=True)
    assert all(name == other and torch.equal(old, new) for (name, old), (other, new) in pairs)
    with pytest.raises((ResumeMismatch, RuntimeError), match=r"bits|size mismatch"):
        fit(LoRAModule("bare"), 9, tmp_path / "half.ckpt", bits=3)


def test_tasks_are_switched_by_their_scales_and_exported() -> None:
    ids = rows(3)
    module = LoRAModule("bare")
    method = PEQA(bits=4)
    assert len(method.convert(module)) == 14
    assert method.convert(module) == []
    base = get_scales(module)
    with torch.no_grad():
        before = module.model(input_ids=ids).logits
        for _, layer in integer_layers(module):
            layer.scales.mul_(1.1)
        task = get_scales(module)
        other = module.model(input_ids=ids).logits
        assert not torch.equal(other, before)
        set_scales(module, base)
        assert torch.equal(module.model(input_ids=ids).logits, before)
        set_scales(module, task)
        assert torch.equal(module.model(input_ids=ids).logits, other)
        with pytest.raises(BaseMismatch, match="belong to another model"):
            set_scales(module, dict(list(base.items())[1:]))
        with pytest.raises(BaseMismatch, match="another shape"):
            set_scales(module, {name: value[:1] for name, value in base.items()})
        assert torch.equal(module.model(input_ids=ids).logits, other)
        assert len(to_plain(module)) == 14
        torch.testing.assert_close(module.model(input_ids=ids).logits, other, rtol=1e-5, atol=1e-5)
    assert {n for n, _ in module.model.named_parameters()} == {n for n, _ in tiny_llama().named_parameters()}


def test_chosen_layers_and_mistakes() -> None:
    module = LoRAModule("bare")
    paths = PEQA(scope=["blocks", "head"], skip=["*.mlp.*"]).convert(module)
    assert len(paths) == 9
    assert "model.lm_head" in paths
    for settings, message in (
        ({"bits": 9}, "bits=9"),
        ({"bits": 0}, "bits=0"),
        ({"group_size": 0}, "group_size=0"),
        ({"fit": "eror"}, "Did you mean 'error'"),
    ):
        with pytest.raises(ConfigError, match=message):
            PEQA(**settings)
    with pytest.raises(ConfigError, match=r"group_size=32 does not divide.*down_proj.* 48"):
        PEQA(group_size=32).convert(LoRAModule("bare"))
    with pytest.raises(ScopeError, match=r"no torch.nn.Linear is left"):
        PEQA(scope="norms").convert(LoRAModule("bare"))
    with pytest.raises(ScopeError, match=r"skip='model.model.layers.7'"):
        PEQA(skip="model.model.layers.7").convert(LoRAModule("bare"))
