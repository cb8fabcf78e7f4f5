"""Low-bit adapters against a slow re-implementation: codebooks, rounding, gradients, resume, stored size."""

from __future__ import annotations

from pathlib import Path
from statistics import NormalDist
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.data import TensorDataset

from lightning_peft import IST, Adapter, LowBitAdapters, QLoRA, QuantizedPrecision
from lightning_peft.data.loader import ResumableDataLoader
from lightning_peft.errors import BaseMismatch, ConfigError, ScopeError
from lightning_peft.methods.quantized.low_bit_adapters import (
    LowBitWeight,
    bake,
    export_codes,
    load_codes,
    low_bit_weights,
    normal_codebook,
    stored_bytes,
)
from lightning_peft.precision import merge_adapter
from tests.precision.tiny import LoRAModule, add_lora, loader, rows, tiny_llama, trainer

NORMAL = NormalDist()


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("centre", ["median", "mean"])
def test_codebook_against_clusters_of_samples(bits: int, centre: Any) -> None:
    """k-medians and k-means on 100,000 quantiles of the standard normal distribution."""
    samples = np.array([NORMAL.inv_cdf((i + 0.5) / 100_000) for i in range(100_000)])
    levels = np.quantile(samples, (np.arange(2**bits) + 0.5) / 2**bits)
    for _ in range(300):
        owner = np.searchsorted((levels[1:] + levels[:-1]) / 2, samples)
        parts = [samples[owner == k] for k in range(2**bits)]
        levels = np.array([np.median(part) if centre == "median" else part.mean() for part in parts])
    np.testing.assert_allclose(normal_codebook(bits, centre).numpy(), levels, atol=5e-3)


def test_known_levels() -> None:
    """One bit: the quartiles, and the mean of a half-normal distribution; two bits: Max (1960), Table I."""
    torch.testing.assert_close(normal_codebook(1), torch.tensor([-0.67449, 0.67449]), rtol=0, atol=1e-5)
    torch.testing.assert_close(normal_codebook(1, "mean"), torch.tensor([-1, 1]) * (2 / np.pi) ** 0.5)
    expected = torch.tensor([-1.510, -0.4528, 0.4528, 1.510])
    torch.testing.assert_close(normal_codebook(2, "mean"), expected, rtol=0, atol=5e-4)
    for bits in range(1, 9):
        levels = normal_codebook(bits)
        assert len(levels) == 2**bits
        assert bool((levels[1:] > levels[:-1]).all())
        torch.testing.assert_close(levels, -levels.flip(0), rtol=0, atol=1e-5)


def slow(weight: np.ndarray, levels: np.ndarray) -> np.ndarray:
    flat = weight.reshape(-1)
    mean = sum(flat) / len(flat)
    std = (sum((value - mean) ** 2 for value in flat) / (len(flat) - 1)) ** 0.5
    out = [levels[np.abs(levels - (value - mean) / (std + 1e-5)).argmin()] * std + mean for value in flat]
    return np.array(out).reshape(weight.shape)


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_rounding_and_its_gradient(bits: int) -> None:
    torch.manual_seed(0)
    weight = (3 * torch.randn(12, 7) + 0.5).requires_grad_()
    how = LowBitWeight(bits, "median")
    rounded = how(weight)
    np.testing.assert_allclose(rounded.detach().numpy(), slow(weight.detach().numpy(), how.levels.numpy()), atol=1e-5)
    assert len(torch.unique(how.codes(weight))) == min(2**bits, len(torch.unique(how.codes(weight))))
    assert int(how.codes(weight).max()) < 2**bits
    # d/dw of (standard + const) * std + mean, const being what rounding adds
    upstream = torch.randn(12, 7)
    (got,) = torch.autograd.grad((rounded * upstream).sum(), weight)
    double = weight.detach().double().requires_grad_()
    mean, std = double.mean(), double.std()
    standard = (double - mean) / (std + 1e-5)
    constant = (how.levels.double()[how.codes(weight)] - standard).detach()
    (expected,) = torch.autograd.grad((((standard + constant) * std + mean) * upstream.double()).sum(), double)
    torch.testing.assert_close(got, expected.float(), rtol=1e-4, atol=1e-4)


def batches() -> ResumableDataLoader:
    return ResumableDataLoader(TensorDataset(rows(12)), batch_size=2, shuffle=True, seed=3)


def fit(module: LoRAModule, steps: int, *methods: Any, plugin: Any = None, ckpt: Path | None = None) -> pl.Trainer:
    run = trainer(plugin, steps, callbacks=list(methods))
    run.fit(module, batches(), loader(), ckpt_path=ckpt)
    return run


def zeros(where: Any = "bare", **config: Any) -> LoRAModule:
    module = LoRAModule(where)
    add_lora(module.model, init_lora_weights=True, **config)
    return module


def test_training_uses_the_rounded_weights_and_all_of_them_move() -> None:
    module = zeros()
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    run = fit(module, 5, LowBitAdapters(bits=1))
    method = run.callbacks[0]
    assert isinstance(method, LowBitAdapters)
    found = list(low_bit_weights(module))
    assert len(found) == 28
    assert len(method.trainable_names) == 28
    for name, part, how in found:
        values = torch.unique(part.weight.detach())
        mean, std = how.standardise(part.parametrizations.weight.original.detach())[1:]
        assert len(values) == 2
        assert float((values - mean).abs().max()) == pytest.approx(0.67449 * float(std), rel=1e-3), name
    for name, parameter in module.named_parameters():
        if name in before:
            assert torch.equal(parameter, before[name]), name
    latent = {n: p for n, p in module.named_parameters() if p.requires_grad}
    assert set(latent) == method.trainable_names
    description = method.describe()
    assert description["trained_bytes"] == sum(p.nbytes for p in latent.values())
    assert description["stored_bytes"] == stored_bytes(module)
    assert description["stored_bytes"] == sum(-(-p.numel() // 8) + 8 for p in latent.values()) + 8


def test_first_step_against_a_loop_of_ones_own() -> None:
    module = zeros()
    fit(module, 3, LowBitAdapters(bits=2))
    model: Any = zeros().model
    holder = nn.Module()
    holder.model = model
    LowBitAdapters(bits=2).convert(holder)
    adapters = [p for n, p in model.named_parameters() if "lora_" in n]
    optimizer = torch.optim.AdamW(adapters, lr=1e-2)
    losses = []
    for (ids,) in [batch for _, batch in zip(range(3), batches(), strict=False)]:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert module.losses == losses


def test_resume_is_exact(tmp_path: Path) -> None:
    whole, half, resumed = zeros(), zeros(), zeros()
    fit(whole, 9, LowBitAdapters())
    fit(half, 4, LowBitAdapters()).save_checkpoint(tmp_path / "half.ckpt")
    fit(resumed, 9, LowBitAdapters(seed=0), ckpt=tmp_path / "half.ckpt")
    assert resumed.losses == whole.losses[4:]
    pairs = zip(whole.state_dict().items(), resumed.state_dict().items(), strict=True)
    assert all(name == other and torch.equal(old, new) for (name, old), (other, new) in pairs)


def test_export_load_bake_and_merge(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    ids = rows(3)
    module = zeros()
    fit(module, 4, LowBitAdapters(bits=3))
    codes = export_codes(module)
    save_file(codes, tmp_path / "adapter.safetensors")
    assert sum(t.nbytes for t in codes.values()) == stored_bytes(module)
    assert (tmp_path / "adapter.safetensors").stat().st_size < 0.7 * sum(
        p.nbytes for p in module.parameters() if p.requires_grad
    )
    with torch.no_grad():
        expected = module.model(input_ids=ids).logits
    other = zeros()
    load_codes(other, load_file(tmp_path / "adapter.safetensors"))
    torch.testing.assert_close(other.model(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(BaseMismatch, match="no such plain weight"):
        load_codes(module, codes)
    with pytest.raises(BaseMismatch, match="bytes, for"):
        load_codes(zeros(rank=7), codes)
    assert len(bake(module)) == 28
    assert not any(parametrize.is_parametrized(part) for part in module.modules())
    assert {n for n, _ in module.named_parameters()} == {n for n, _ in other.named_parameters()}
    torch.testing.assert_close(module.model(input_ids=ids).logits, expected, rtol=1e-6, atol=1e-6)
    assert len(merge_adapter(module)) == 14
    torch.testing.assert_close(module.model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_beside_qlora_and_ist_it_only_rounds(tmp_path: Path) -> None:
    module = LoRAModule("bare")
    run = fit(module, 4, QLoRA(4), LowBitAdapters(), plugin=QuantizedPrecision("nf4"))
    assert len(list(low_bit_weights(module))) == 28
    qlora, low = run.callbacks[:2]
    assert len(qlora.trainable_names) == 28
    assert low.trainable_names == frozenset()
    torch.manual_seed(0)
    whole = LoRAModule("bare")
    fit(whole, 7, QLoRA(4), LowBitAdapters(), plugin=QuantizedPrecision("nf4"))
    torch.manual_seed(0)
    half = LoRAModule("bare")
    fit(half, 4, QLoRA(4), LowBitAdapters(), plugin=QuantizedPrecision("nf4")).save_checkpoint(tmp_path / "half.ckpt")
    resumed = LoRAModule("bare")
    fit(resumed, 7, QLoRA(4), LowBitAdapters(), plugin=QuantizedPrecision("nf4"), ckpt=tmp_path / "half.ckpt")
    assert resumed.losses == whole.losses[4:]
    rotating = zeros()
    run = fit(rotating, 4, IST(0.5, scope="adapters"), LowBitAdapters())
    assert len(run.callbacks[0].trainable_names) == 14
    assert len(list(low_bit_weights(rotating))) == 28


def test_beside_adapter_it_trains_what_it_rounds(tmp_path: Path) -> None:
    def methods() -> list[Any]:
        return [Adapter("lora", {"r": 4, "target_modules": "all-linear"}), LowBitAdapters(bits=2)]

    torch.manual_seed(0)
    whole = LoRAModule("bare")
    run = fit(whole, 7, *methods(), plugin=QuantizedPrecision("nf4"))
    assert len(run.callbacks[1].trainable_names) == 28
    assert len(list(low_bit_weights(whole))) == 28
    torch.manual_seed(0)
    half, resumed = LoRAModule("bare"), LoRAModule("bare")
    fit(half, 4, *methods(), plugin=QuantizedPrecision("nf4")).save_checkpoint(tmp_path / "half.ckpt")
    fit(resumed, 7, *methods(), plugin=QuantizedPrecision("nf4"), ckpt=tmp_path / "half.ckpt")
    assert resumed.losses == whole.losses[4:]


def test_other_adapters_of_peft() -> None:
    from peft import LoHaConfig, inject_adapter_in_model

    module = LoRAModule("bare")
    inject_adapter_in_model(LoHaConfig(r=2, target_modules=["q_proj"]), module.model)
    with pytest.raises(ConfigError, match="lies in a ParameterDict"):
        LowBitAdapters().convert(module)
    module = zeros(use_dora=True)
    assert len(LowBitAdapters().convert(module)) == 28  # DoRA's magnitudes are vectors


def test_mistakes() -> None:
    for settings, message in (({"bits": 0}, "bits=0"), ({"bits": 9}, "bits=9"), ({"codebook": "medan"}, "'median'")):
        with pytest.raises(ConfigError, match=message):
            LowBitAdapters(**settings)
    with pytest.raises(ScopeError, match="adapters"):
        fit(LoRAModule("bare"), 2, LowBitAdapters())
    with pytest.raises(ScopeError, match="only matrices are rounded"):
        LowBitAdapters(scope="*norm.weight").convert(tiny_llama())
