"""Cut parameter groups step exactly like the uncut ones, under every scheduler of torch, and survive a state dict."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_peft.core.param_groups import scale_learning_rate, set_learning_rate, split_param_groups
from lightning_peft.errors import ConfigError

lr = torch.optim.lr_scheduler
STEPS = 8

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "lambda": lambda o: lr.LambdaLR(o, [lambda step: 0.9**step, lambda step: 1 / (1 + step)]),
    "multiplicative": lambda o: lr.MultiplicativeLR(o, [lambda step: 0.9, lambda step: 0.8]),
    "step": lambda o: lr.StepLR(o, 2),
    "multi_step": lambda o: lr.MultiStepLR(o, [2, 5]),
    "constant": lambda o: lr.ConstantLR(o, 0.5, 3),
    "linear": lambda o: lr.LinearLR(o, 0.2, total_iters=4),
    "exponential": lambda o: lr.ExponentialLR(o, 0.9),
    "polynomial": lambda o: lr.PolynomialLR(o, STEPS + 1),
    "cosine": lambda o: lr.CosineAnnealingLR(o, STEPS + 1),
    "restarts": lambda o: lr.CosineAnnealingWarmRestarts(o, 3),
    "one_cycle": lambda o: lr.OneCycleLR(o, [0.1, 0.02], total_steps=STEPS + 1),
    "cyclic": lambda o: lr.CyclicLR(o, [0.01, 0.002], [0.1, 0.02], step_size_up=3),
    "sequential": lambda o: lr.SequentialLR(o, [lr.ConstantLR(o, 0.1, 2), lr.ExponentialLR(o, 0.9)], [3]),
    "chained": lambda o: lr.ChainedScheduler([lr.ConstantLR(o, 0.1, 2), lr.ExponentialLR(o, 0.9)]),
    "plateau": lambda o: lr.ReduceLROnPlateau(o, patience=1, min_lr=[1e-3, 1e-4]),
}


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(3, generator=generator)) for _ in range(6)]


def optimizer_over(params: list[nn.Parameter], kind: str) -> torch.optim.Optimizer:
    groups = [{"params": params[:4], "weight_decay": 0.3}, {"params": params[4:], "lr": 0.01}]
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=0.05, momentum=0.9)
    return torch.optim.AdamW(groups, lr=0.05)


def step(optimizer: torch.optim.Optimizer, scheduler: Any, number: int) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = p.detach() * 0.7 + number
    optimizer.step()
    scheduler.step(*([1.0] if isinstance(scheduler, lr.ReduceLROnPlateau) else []))


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_cut_groups_step_like_uncut_ones(scheduler: str, kind: str) -> None:
    ours, theirs = parameters(), parameters()
    optimizers = [optimizer_over(ours, kind), optimizer_over(theirs, kind)]
    schedulers = [SCHEDULERS[scheduler](optimizer) for optimizer in optimizers]
    part = {id(p): part for p, part in zip(ours, [1, 0, 1, 2, 0, 2], strict=True)}
    split_param_groups(optimizers[0], schedulers, lambda p: part[id(p)])
    assert [[part[id(p)] for p in group["params"]] for group in optimizers[0].param_groups] == [
        [0], [0], [1, 1], [2], [2]
    ]  # fmt: skip
    rates = []
    for number in range(STEPS):
        rates.append({group["lr"] for group in optimizers[1].param_groups})
        of = [{id(p): g["lr"] for g in o.param_groups for p in g["params"]} for o in optimizers]
        assert [of[0][id(p)] for p in ours] == [of[1][id(p)] for p in theirs]
        for optimizer, each in zip(optimizers, schedulers, strict=True):
            step(optimizer, each, number)
    assert len(set(map(frozenset, rates))) > 1
    for left, right in zip(ours, theirs, strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_state_goes_on_after_a_restart(scheduler: str) -> None:
    def make() -> tuple[list[nn.Parameter], torch.optim.Optimizer, Any]:
        params = parameters()
        optimizer = optimizer_over(params, "adamw")
        each = SCHEDULERS[scheduler](optimizer)
        part = {id(p): index % 3 for index, p in enumerate(params)}
        split_param_groups(optimizer, [each], lambda p: part[id(p)])
        return params, optimizer, each

    params, optimizer, each = make()
    set_learning_rate(optimizer, [each], 1, 0.03)
    for number in range(3):
        step(optimizer, each, number)
    again, second, other = make()
    for old, new in zip(params, again, strict=True):
        new.data.copy_(old.data)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.load_state_dict(copy.deepcopy(each.state_dict()))
    for number in range(3, STEPS):
        step(optimizer, each, number)
        step(second, other, number)
    for left, right in zip(params, again, strict=True):
        assert torch.equal(left, right)


def test_named_parameters_keep_their_names() -> None:
    params = parameters()
    optimizer = torch.optim.SGD([(f"p{index}", p) for index, p in enumerate(params)], lr=0.1)
    split_param_groups(optimizer, [], lambda p: any(p is q for q in params[::2]))
    assert [group["param_names"] for group in optimizer.param_groups] == [["p1", "p3", "p5"], ["p0", "p2", "p4"]]


def test_what_needs_no_cut_is_left_alone() -> None:
    params = parameters()
    optimizer = optimizer_over(params, "sgd")
    groups = list(optimizer.param_groups)
    split_param_groups(optimizer, [], lambda p: 0)
    assert all(left is right for left, right in zip(groups, optimizer.param_groups, strict=True))


def test_tensor_rates_are_set_in_place_and_not_shared() -> None:
    params = parameters()
    optimizer = torch.optim.Adam(params, lr=torch.tensor(0.1), capturable=False, foreach=False)
    split_param_groups(optimizer, [], lambda p: p is params[0])
    rate = optimizer.param_groups[1]["lr"]
    set_learning_rate(optimizer, [], 1, 0.5)
    assert rate is optimizer.param_groups[1]["lr"]
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.1, 0.5])


def test_setting_a_rate_starts_there_or_joins_the_warm_up() -> None:
    for joins, first, second in [(False, 0.4, 0.4 * 0.2), (True, 0.4 * 0.1, 0.4 * 0.2)]:
        params = parameters()
        optimizer = torch.optim.SGD([{"params": params[:3]}, {"params": params[3:]}], lr=1.0)
        warm_up = lr.LambdaLR(optimizer, lambda step: min(1.0, 0.1 * (step + 1)))
        set_learning_rate(optimizer, [warm_up], 1, 0.4, joins=joins)
        assert optimizer.param_groups[1]["lr"] == pytest.approx(first)
        step(optimizer, warm_up, 0)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.2, second])


@pytest.mark.parametrize("scheduler", [name for name in SCHEDULERS if name != "plateau"])
def test_a_scaled_rate_stays_in_proportion(scheduler: str) -> None:
    params = parameters()
    optimizer = torch.optim.SGD([{"params": params[:3]}, {"params": params[3:]}], lr=0.05, momentum=0.9)
    flat = {
        "lambda": lambda o: lr.LambdaLR(o, lambda step: 0.9**step),
        "multiplicative": lambda o: lr.MultiplicativeLR(o, lambda step: 0.9),
        "one_cycle": lambda o: lr.OneCycleLR(o, 0.1, total_steps=STEPS + 1),
        "cyclic": lambda o: lr.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    }
    each = flat.get(scheduler, SCHEDULERS[scheduler])(optimizer)
    scale_learning_rate(optimizer, [each], 1, 1 / 2.6)
    for number in range(STEPS):
        above, below = (group["lr"] for group in optimizer.param_groups)
        assert above / below == pytest.approx(2.6)
        step(optimizer, each, number)


def test_sharded_optimizers_are_refused() -> None:
    class Sharded(torch.optim.SGD):
        def _partition_parameters(self) -> None: ...

    params = parameters()
    with pytest.raises(ConfigError, match="Sharded shares its parameter groups out among the ranks"):
        split_param_groups(Sharded(params, lr=0.1), [], lambda p: p is params[0])
