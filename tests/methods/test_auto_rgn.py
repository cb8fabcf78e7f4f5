"""Auto-RGN: norms against a slow loop, rates against arithmetic, schedules, state, resume."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_peft import AutoRGN
from lightning_peft.data.loader import ResumableDataLoader
from lightning_peft.errors import ConfigError
from lightning_peft.methods.layers.auto_rgn import rate_factors, relative_gradient_norm
from tests.contract.harness import (
    MODELS,
    NUM_SAMPLES,
    TinyModule,
    dataset,
    loader,
    trainer,
    weights,
)


def whole(model: str) -> ResumableDataLoader:
    return ResumableDataLoader(dataset(model), batch_size=NUM_SAMPLES, shuffle=True, seed=3)


class Rates(pl.Callback):
    """The learning rate of every parameter, and which have state, at each optimizer step, read from the optimizer."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.ages: list[set[float]] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        names = {id(p): name for name, p in pl_module.named_parameters()}
        groups = optimizer.param_groups
        self.steps.append({names[id(p)]: float(group["lr"]) for group in groups for p in group["params"]})
        self.ages.append({float(state.get("step", 0)) for state in optimizer.state.values()})


def fit(method: AutoRGN, tmp_path: Path, model: str = "gqa_decoder", module: Any = None, **kw: Any) -> Rates:
    rates = Rates()
    torch.manual_seed(0)
    module = module or TinyModule(model)
    data = kw.pop("data", None) or loader(model)
    trainer(tmp_path, [method, rates], **kw).fit(module, data, loader(model, shuffle=False))
    return rates


# ---------------------------------------------------------------------------------------------------- arithmetic


@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 100))
def test_norm_is_relative(scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    grad, weight = torch.randn(3, 4, generator=generator), torch.randn(3, 4, generator=generator)
    found = relative_gradient_norm(grad, weight)
    expected = math.sqrt(sum(float(g) ** 2 for g in grad.flatten()) / sum(float(w) ** 2 for w in weight.flatten()))
    assert found == pytest.approx(expected, rel=1e-5)
    assert relative_gradient_norm(scale * grad, scale * weight) == pytest.approx(found, rel=1e-4)
    assert relative_gradient_norm(scale * grad, weight) == pytest.approx(scale * found, rel=1e-4)


def test_norms_at_the_edges() -> None:
    zeros, ones = torch.zeros(3), torch.ones(3)
    assert relative_gradient_norm(None, ones) == 0
    assert relative_gradient_norm(zeros, ones) == 0
    assert relative_gradient_norm(zeros, zeros) == 0
    assert relative_gradient_norm(ones, zeros) == math.inf
    assert math.isnan(relative_gradient_norm(ones * math.inf, ones))
    assert math.isnan(relative_gradient_norm(ones * math.nan, zeros))


def test_factors() -> None:
    assert rate_factors({"a": 0.2, "b": 0.8, "c": 0.4}) == {"a": 0.25, "b": 1.0, "c": 0.5}
    assert rate_factors({"a": 0.2, "zeros": math.inf}) == {"a": 1.0, "zeros": 1.0}
    assert rate_factors({"a": 0.0, "b": 0.0}) == {"a": 1.0, "b": 1.0}
    assert rate_factors({"zeros": math.inf}) == {"zeros": 1.0}
    without = rate_factors({"a": 0.0, "b": 2.0})
    assert 0 < without["a"] < 1e-9
    assert without["b"] == 1.0


# ---------------------------------------------------------------------------------------------------- in a fit


@pytest.mark.parametrize("model", MODELS)
def test_rates_against_a_slow_loop(model: str, tmp_path: Path) -> None:
    """With the whole data set as one batch, so that the draw does not matter."""
    plain = TinyModule(model).eval()
    plain.loss(dataset(model).tensors).backward()
    norms = {}
    for name, parameter in plain.named_parameters():
        owner = plain.get_submodule(name.rpartition(".")[0])
        if "norm" in type(owner).__name__.lower():
            continue
        assert parameter.grad is not None
        weight = float((parameter.detach().double() ** 2).sum()) ** 0.5
        norms[name] = float((parameter.grad.double() ** 2).sum()) ** 0.5 / weight if weight else math.inf
    largest = max(norm for norm in norms.values() if math.isfinite(norm))
    expected = {name: 1.0 if math.isinf(norm) else norm / largest for name, norm in norms.items()}
    assert len(set(expected.values())) > 4

    method = AutoRGN(num_batches=3)
    rates = fit(method, tmp_path, model, data=whole(model), max_epochs=1, accumulate_grad_batches=1)
    assert method.factors == pytest.approx(expected, rel=1e-4, abs=1e-9)
    assert method.trainable_names == set(expected)
    for name, factor in method.factors.items():
        assert rates.steps[0][name] == pytest.approx(1e-2 * factor, rel=1e-6)
    assert method.describe()["factors"] == method.factors


def test_schedule_goes_on_inside_each_tensors_rate(tmp_path: Path) -> None:
    """Two epochs of six steps under ``1 / (1 + 0.1 step)``, measured anew in the second."""
    seen: list[dict[str, float]] = []

    class Factors(AutoRGN):
        def switched(self, trainer: Any) -> None:
            super().switched(trainer)
            if self.factors:
                seen.append(self.factors)

    rates = fit(Factors(num_batches=2), tmp_path)
    assert len(rates.steps) == 12
    assert len(seen) == 2
    assert seen[0] != seen[1]
    for step, found in enumerate(rates.steps):
        for name, factor in seen[step // 6].items():
            assert found[name] == pytest.approx(1e-2 / (1 + 0.1 * step) * factor, rel=1e-5)


@pytest.mark.parametrize(("state", "ages"), [("drop", [0, 1, 2, 0, 1, 2]), ("keep", [0, 1, 2, 3, 4, 5])])
def test_moments_at_a_new_measurement(state: Any, ages: list[int], tmp_path: Path) -> None:
    rates = fit(AutoRGN(num_batches=1, redraw=3, state=state), tmp_path, max_epochs=1)
    assert rates.ages == [{float(age)} if age else set() for age in ages]


@pytest.mark.parametrize(("redraw", "steps"), [("epoch", [0, 6]), ("never", [0]), (5, [0, 5, 10])])
def test_when_it_measures(redraw: Any, steps: list[int], tmp_path: Path) -> None:
    method = AutoRGN(num_batches=1, redraw=redraw)
    rates = fit(method, tmp_path)
    assert [step for step, _ in method.history] == steps
    ratios = [step["model.lm_head.weight"] / step["model.model.embed_tokens.weight"] for step in rates.steps]
    changes = [i for i in range(1, 12) if ratios[i] != pytest.approx(ratios[i - 1], rel=1e-6)]
    assert [0, *changes] == steps


def test_what_trains_always_trains_at_the_full_rate(tmp_path: Path) -> None:
    method = AutoRGN(num_batches=1, scope=["blocks", "!norms"], always=("head", "norms"))
    rates = fit(method, tmp_path, max_epochs=1)
    assert rates.steps[0]["model.lm_head.weight"] == 1e-2
    assert rates.steps[0]["model.model.norm.weight"] == 1e-2
    assert set(method.factors) == {n for n in method.trainable_names if ".layers." in n}


def test_measuring_leaves_no_trace(tmp_path: Path) -> None:
    """A run with the same rates from the start and no measurement is the same run bit for bit (with dropout)."""
    method = AutoRGN(num_batches=2, redraw="never")
    torch.manual_seed(0)
    module = TinyModule("tied_decoder", optimizer="sgd")
    fit(method, tmp_path, "tied_decoder", module)

    class Told(TinyModule):
        def configure_optimizers(self) -> Any:
            groups = []
            for name, parameter in self.named_parameters():
                if name in method.factors:
                    groups.append({"params": [parameter], "lr": 0.05 * method.factors[name]})
                else:
                    parameter.requires_grad_(False)
            optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9, weight_decay=0.1)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.1 * step))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    torch.manual_seed(0)
    told = Told("tied_decoder")
    data, held_out = loader("tied_decoder"), loader("tied_decoder", shuffle=False)
    trainer(tmp_path, []).fit(told, data, held_out)
    for name, value in weights(told).items():
        torch.testing.assert_close(weights(module)[name], value, rtol=1e-6, atol=1e-7, msg=name)


def test_norms_and_running_statistics_do_not_change(tmp_path: Path) -> None:
    module = TinyModule("conv_net")
    before = weights(module)
    fit(AutoRGN(num_batches=1), tmp_path, "conv_net", module)
    for name, value in weights(module).items():
        assert torch.equal(value, before[name]) == (".norm." in name), name


def test_plateau_scheduler(tmp_path: Path) -> None:
    class Plateau(TinyModule):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
            # by this threshold each epoch is a bad one
            schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=10.0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"}}

    method = AutoRGN(num_batches=1, redraw="never")
    rates = fit(method, tmp_path, "conv_net", Plateau("conv_net"), max_epochs=3)
    for epoch, factor in enumerate((1, 0.5, 0.25)):
        for name, own in method.factors.items():
            assert rates.steps[6 * epoch][name] == pytest.approx(0.05 * own * factor, rel=1e-5)


# ---------------------------------------------------------------------------------------------------- mistakes


def test_gradients_that_are_not_finite(tmp_path: Path) -> None:
    class Broken(TinyModule):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.loss(batch) * float("nan")

    with pytest.raises(ConfigError, match=r"AutoRGN: gradients of \d+ tensor.*not finite, such as model\."):
        fit(AutoRGN(num_batches=1), tmp_path, module=Broken("gqa_decoder"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_batches": 0}, "num_batches=0"),
        ({"num_batches": 1.5}, "num_batches=1.5"),
        ({"state": "offload"}, "'drop' or 'keep'"),
        ({"redraw": "epochs"}, "'epoch'"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AutoRGN(**arguments)


def test_parameters_are_cut_into_groups_of_one(tmp_path: Path) -> None:
    sizes = []

    class Look(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            sizes.extend(len(group["params"]) for group in trainer.optimizers[0].param_groups)

    method = AutoRGN(num_batches=1, always=("norms",))
    module = TinyModule("gqa_decoder")
    trainer(tmp_path, [method, Look()], max_epochs=1).fit(
        module, loader("gqa_decoder"), loader("gqa_decoder", shuffle=False)
    )
    assert sorted(sizes) == [1] * len(sizes)
    assert len(sizes) == len(method.units) + 1  # the final norm is a group of its own
