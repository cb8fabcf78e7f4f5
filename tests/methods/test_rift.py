"""RiFT: criticality against closed forms and a slow loop, exact restoration, interpolation."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_peft import RiFT, Surgical
from lightning_peft.data.loader import ResumableDataLoader
from lightning_peft.errors import ConfigError, ScopeError
from lightning_peft.methods.layers.rift import best_interpolation, interpolate, projected, robust_criticality
from tests.contract.harness import (
    MODELS,
    NUM_LAYERS,
    NUM_SAMPLES,
    TinyModule,
    assert_same_weights,
    dataset,
    loader,
    trainer,
    weights,
)

QUICK: dict[str, Any] = {"epochs": 2, "num_batches": 1}


def whole(model: str) -> ResumableDataLoader:
    """Held-out data in one batch, so that its order does not matter."""
    return ResumableDataLoader(dataset(model), batch_size=NUM_SAMPLES, shuffle=False)


def fit(method: Any, tmp_path: Path, model: str = "conv_net", module: Any = None, **kw: Any) -> TinyModule:
    torch.manual_seed(0)
    module = module or TinyModule(model)
    trainer(tmp_path, [method], **kw).fit(module, loader(model), whole(model))
    return module


# ---------------------------------------------------------------------------------------------------- the ball


@given(
    seed=st.integers(0, 1000), radius=st.floats(0.01, 1), scale=st.floats(0, 10) | st.just(0.0), size=st.integers(1, 9)
)
def test_projection(seed: int, radius: float, scale: float, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, change = torch.randn(size, generator=generator), scale * torch.randn(size, generator=generator)
    found = projected(change, weight, radius)
    limit = radius * float(weight.norm())
    assert float(found.norm()) <= limit * (1 + 1e-5)
    if float(change.norm()) < limit * (1 - 1e-5):
        assert torch.equal(found, change)
    elif scale > 0.01:
        assert float(found.norm()) == pytest.approx(limit, rel=1e-4)
        assert float(nn.functional.cosine_similarity(found, change, dim=0)) == pytest.approx(1, abs=1e-5)


def test_criticality_of_a_linear_loss_is_the_balls_edge() -> None:
    """``max of g . (w + d) - g . w`` over ``|d| <= r |w|`` is ``r |w| |g|``."""
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    slope = torch.tensor([1.0, -2.0])
    found = robust_criticality(weight, [slope], lambda g: g @ weight, radius=0.1, epochs=3, lr=10.0)
    assert found == pytest.approx(0.1 * 5 * 5**0.5, rel=1e-5)
    # Two batches with opposite slopes: the mean loss has no direction to rise in.
    none = robust_criticality(weight, [slope, -slope], lambda g: g @ weight, radius=0.1, epochs=3, lr=10.0)
    assert none == pytest.approx(0, abs=1e-6)


def test_criticality_of_a_convex_loss_is_at_the_edge() -> None:
    weight = nn.Parameter(torch.tensor([2.0, 0.0]))
    found = robust_criticality(weight, [None], lambda _: (weight**2).sum(), radius=0.5, epochs=20, lr=1.0)
    assert found == pytest.approx(3.0**2 - 2.0**2, rel=1e-5)


def test_criticality_is_never_negative_and_small_where_nothing_rises() -> None:
    weight = nn.Parameter(torch.tensor([1.0, -1.0]))
    top = weight.detach().clone()
    at_maximum = robust_criticality(weight, [None], lambda _: -((weight - top) ** 2).sum(), 0.1, 5, 1.0)
    assert at_maximum == 0
    overshooting = robust_criticality(weight, [None], lambda _: -50 * ((weight - 0.99 * top) ** 2).sum(), 0.1, 3, 1.0)
    assert overshooting >= 0
    assert robust_criticality(weight, [None], lambda _: torch.tensor(1.0, requires_grad=True) * 2, 0.1, 2, 1.0) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weight_is_put_back_bit_for_bit(dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.randn(20, 30, generator=torch.Generator().manual_seed(0)).to(dtype))
    before = weight.detach().clone()
    assert robust_criticality(weight, [None], lambda _: weight.float().pow(4).sum(), 0.3, 4, 1.0) > 0
    assert torch.equal(weight, before)
    assert weight.grad is None

    def explode(_: Any) -> torch.Tensor:
        if not torch.equal(weight, before):
            raise KeyboardInterrupt
        return weight.float().sum()

    with pytest.raises(KeyboardInterrupt):
        robust_criticality(weight, [None], explode, 0.3, 4, 1.0)
    assert torch.equal(weight, before)


def test_losses_that_are_not_finite() -> None:
    weight = nn.Parameter(torch.ones(3))
    steep = robust_criticality(weight, [None], lambda _: torch.exp(900 * (weight.sum() - 3)), 0.5, 3, 1.0)
    assert steep == math.inf
    with pytest.raises(ConfigError, match="held-out data is nan"):
        robust_criticality(weight, [None], lambda _: weight.sum() * float("nan"), 0.5, 3, 1.0)


# ---------------------------------------------------------------------------------------------------- interpolation


@given(data=st.data(), alpha=st.floats(0, 1))
def test_interpolation(data: st.DataObject, alpha: float) -> None:
    numbers = st.lists(st.floats(-1e3, 1e3, width=32), min_size=3, max_size=3)
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    before = {"w": torch.tensor(data.draw(numbers)).to(dtype)}
    after = {"w": torch.tensor(data.draw(numbers)).to(dtype)}
    kept = before["w"].clone(), after["w"].clone()
    found = interpolate(before, after, alpha)["w"]
    expected = (1 - alpha) * before["w"].double() + alpha * after["w"].double()
    assert found.dtype == dtype
    scale = float(torch.maximum(before["w"].abs(), after["w"].abs()).max()) + 1e-30
    assert float((found.double() - expected).abs().max()) <= scale * (1e-2 if dtype == torch.bfloat16 else 1e-6)
    assert torch.equal(interpolate(before, after, 0.0)["w"], before["w"])
    assert torch.equal(interpolate(before, after, 1.0)["w"], after["w"])
    interpolate(before, after, 0.0)["w"].add_(1)
    assert torch.equal(before["w"], kept[0])
    assert torch.equal(after["w"], kept[1])


@pytest.mark.parametrize(
    ("losses", "robust", "expected"),
    [
        ([3.0, 2.0, 1.0], None, 2),
        ([1.0, 2.0, 3.0], None, 0),
        ([3.0, 1.0, 1.0], None, 1),
        ([3.0, 2.0, 1.0], [1.0, 1.0, 1.1], 1),
        ([3.0, 2.0, 1.0], [1.0, 2.0, 2.0], 0),
        ([3.0, float("nan"), 2.0], None, 2),
        ([float("nan")] * 3, None, 0),
        ([3.0, 2.0, 1.0], [1.0, 1.0, float("nan")], 1),
    ],
)
def test_best_interpolation(losses: list[float], robust: list[float] | None, expected: int) -> None:
    assert best_interpolation(losses, robust) == expected


# ---------------------------------------------------------------------------------------------------- in a fit


def slow_criticality(model: str, radius: float, epochs: int, lr: float) -> dict[str, float]:
    """On copies of the whole module, one for each weight."""
    found = {}
    batch = dataset(model).tensors
    for name, parameter in TinyModule(model).named_parameters():
        inside = any(f".{index}." in name for index in range(NUM_LAYERS))
        if parameter.ndim < 2 or not inside:
            continue
        module: Any = copy.deepcopy(TinyModule(model)).eval()
        weight = module.get_parameter(name)
        start, trace = weight.detach().clone(), []
        with torch.no_grad():
            trace.append(float(module.loss(batch)))
        for _ in range(epochs):
            module.zero_grad()
            module.loss(batch).backward()
            with torch.no_grad():
                step = weight + lr * weight.grad - start
                if step.norm() > radius * start.norm():
                    step = step / step.norm() * radius * start.norm()
                weight.copy_(start + step)
                trace.append(float(module.loss(batch)))
        found[name.removesuffix(".weight")] = max(trace) - trace[0]
    return found


@pytest.mark.parametrize("model", MODELS)
def test_criticality_against_a_slow_loop_and_only_the_least_critical_trains(model: str, tmp_path: Path) -> None:
    expected = slow_criticality(model, 0.3, 3, 5.0)
    method = RiFT(radius=0.3, epochs=3, ascent_lr=5.0, num_batches=1, interpolation_steps=0)
    before = weights(TinyModule(model))
    module = fit(method, tmp_path, model)
    assert method.criticality.keys() == expected.keys()
    for unit, value in expected.items():
        assert method.criticality[unit] == pytest.approx(value, rel=1e-3, abs=1e-6)
    assert min(method.criticality.values()) >= 0
    least = min(method.criticality, key=lambda unit: method.criticality[unit])
    assert list(method.active_units()) == [least]
    moved = {name for name, value in weights(module).items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if name.startswith(f"{least}.")}  # no buffer among them


@pytest.mark.parametrize("model", MODELS)
def test_scoring_leaves_no_trace(model: str, tmp_path: Path) -> None:
    """The same run, bit for bit, as one that was told the module (models have dropout)."""
    method = RiFT(interpolation_steps=0, **QUICK)
    module = fit(method, tmp_path, model)
    (chosen,) = method.active_units()
    told = fit(Surgical(0, 1, scope=chosen), tmp_path, model)
    assert_same_weights(weights(module), weights(told))


def test_interpolation_keeps_the_best_point(tmp_path: Path) -> None:
    fine_tuned = weights(fit(RiFT(interpolation_steps=0, **QUICK), tmp_path))
    before = weights(TinyModule("conv_net"))
    method = RiFT(interpolation_steps=5, **QUICK)
    module = fit(method, tmp_path)
    losses = []
    for index in range(6):
        point: Any = TinyModule("conv_net").eval()
        mixed = {n: before[n] + index / 5 * (fine_tuned[n] - before[n]) for n in before if "num_batches" not in n}
        point.load_state_dict(mixed, strict=False)
        with torch.no_grad():
            losses.append(float(point.loss(dataset("conv_net").tensors)))
    best = losses.index(min(losses))
    assert method.alpha == best / 5
    assert method.describe()["alpha"] == best / 5
    for name, value in weights(module).items():
        if value.is_floating_point():
            torch.testing.assert_close(value, before[name] + best / 5 * (fine_tuned[name] - before[name]), msg=name)
    assert best > 0


class Ruined(TinyModule):
    """Fine-tuning only does harm."""

    def __init__(self) -> None:
        super().__init__("conv_net")

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.loss(batch)
        return -loss if self.training else loss


class Attacked(TinyModule):
    """With an attack: the robust loss is that of other labels, which fine-tuning on the right ones makes worse."""

    def __init__(self, identity: bool = False) -> None:
        super().__init__("conv_net")
        self.identity, self.calls = identity, 0

    def robust_batch(self, batch: Any) -> Any:
        assert not self.training
        torch.rand(3)
        x, y = batch
        return (x, y) if self.identity else (x, (y + 1) % 5)


def test_point_zero_is_the_model_before_bit_for_bit(tmp_path: Path) -> None:
    before = weights(TinyModule("conv_net"))
    method = RiFT(interpolation_steps=4, **QUICK)
    assert_same_weights(weights(fit(method, tmp_path, module=Ruined())), before)
    assert method.alpha == 0


def test_no_point_may_lose_robustness(tmp_path: Path) -> None:
    plain = RiFT(interpolation_steps=4, **QUICK)
    fit(plain, tmp_path)
    assert plain.alpha is not None
    assert plain.alpha > 0
    method = RiFT(interpolation_steps=4, **QUICK)
    module = fit(method, tmp_path, module=Attacked())
    assert method.alpha == 0  # fitting these labels cannot but hurt the others
    batch = dataset("conv_net").tensors
    with torch.no_grad():
        other, start = module.eval(), TinyModule("conv_net").eval()
        robust = [float(m.loss((batch[0], (batch[1] + 1) % 5))) for m in (start, other)]  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    assert robust[1] <= robust[0] * (1 + 1e-6)


def test_the_modules_own_attack_is_what_is_scored_on(tmp_path: Path) -> None:
    plain, same, attacked = (RiFT(interpolation_steps=0, **QUICK) for _ in range(3))
    results = [fit(plain, tmp_path), fit(same, tmp_path, module=Attacked(identity=True))]
    assert plain.criticality == same.criticality
    assert_same_weights(weights(results[0]), weights(results[1]))  # the attack's random numbers left no trace
    fit(attacked, tmp_path, module=Attacked())
    assert attacked.criticality != plain.criticality


def test_fit_reports_before_training_what_may_train(tmp_path: Path) -> None:
    method = RiFT(**QUICK)
    fit(method, tmp_path, max_epochs=1)
    assert len(method.history) == 1
    assert method.history[0][0] == 0
    assert method.trainable_names == method.history[0][1] < method.selectable


# ---------------------------------------------------------------------------------------------------- mistakes


def test_no_held_out_data(tmp_path: Path) -> None:
    run = trainer(tmp_path, [RiFT()], limit_val_batches=0)
    with pytest.raises(ConfigError, match=r"no validation loader.*score_on='train'"):
        run.fit(TinyModule("conv_net"), loader("conv_net"), whole("conv_net"))


def test_of_several_validation_loaders_the_first_counts(tmp_path: Path) -> None:
    class Two(TinyModule):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            pass

    one = RiFT(interpolation_steps=0, **QUICK)
    fit(one, tmp_path)
    several = RiFT(interpolation_steps=0, **QUICK)
    shifted = torch.utils.data.TensorDataset(dataset("conv_net").tensors[0] + 1, dataset("conv_net").tensors[1])
    torch.manual_seed(0)
    trainer(tmp_path, [several]).fit(
        Two("conv_net"), loader("conv_net"), [whole("conv_net"), torch.utils.data.DataLoader(shifted)]
    )
    assert several.criticality == one.criticality


def test_a_stream_cannot_be_sampled(tmp_path: Path) -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return iter(dataset("conv_net"))

    run = trainer(tmp_path, [RiFT()])
    with pytest.raises(ConfigError, match=r"data set with a length.*Stream"):
        run.fit(TinyModule("conv_net"), loader("conv_net"), torch.utils.data.DataLoader(Stream(), batch_size=2))


def test_one_module_is_no_choice(tmp_path: Path) -> None:
    with pytest.raises(ScopeError, match=r"has 1 module\(s\)"):
        fit(RiFT(scope="model.blocks.0"), tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("radius", 0),
        ("radius", 1.5),
        ("epochs", 0),
        ("ascent_lr", -1),
        ("ascent_lr", float("inf")),
        ("num_batches", 2.5),
        ("interpolation_steps", -1),
        ("score_on", "test"),
    ],
)
def test_arguments_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"RiFT: {name}="):
        RiFT(**{name: value})


def test_all_mistakes_are_told_together() -> None:
    with pytest.raises(ConfigError, match=r"radius=2 .*epochs=0 .*'val'"):
        RiFT(radius=2, epochs=0, score_on="valid")  # pyright: ignore[reportArgumentType]
