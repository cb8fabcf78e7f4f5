from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightning_peft.errors import ConfigError
from lightning_peft.models.optimizer import WarmupSchedule, build_optimizer, parameter_groups


class Small(nn.Module):
    """A tied embedding, a frozen layer, a norm with a matrix weight: every case of the rule."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm([2, 4])  # weights of two dimensions
        self.fc = nn.Linear(4, 4)
        self.odd = nn.Linear(4, 4, bias=False)
        self.odd.bias = nn.Parameter(torch.zeros(2, 2))  # a bias of two dimensions
        self.scale = nn.Parameter(torch.ones(4))
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def _names(module: nn.Module, group: dict) -> set[str]:
    names = {id(p): n for n, p in module.named_parameters()}
    assert len({id(p) for p in group["params"]}) == len(group["params"])
    return {names[id(p)] for p in group["params"]}


def test_groups_are_exact() -> None:
    module = Small()
    decayed, plain = parameter_groups(module, weight_decay=0.1)
    assert _names(module, decayed) == {"embed.weight", "fc.weight", "odd.weight"}
    assert _names(module, plain) == {"norm.weight", "norm.bias", "fc.bias", "odd.bias", "scale"}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)


def test_no_decay_moves_a_name_and_a_pattern_without_match_is_an_error() -> None:
    module = Small()
    decayed, plain = parameter_groups(module, no_decay=["embed*"])
    assert _names(module, decayed) == {"fc.weight", "odd.weight"}
    assert "embed.weight" in _names(module, plain)
    with pytest.raises(ConfigError, match=r"'\*embedd\*' matches no parameter.*'embed.weight'"):
        parameter_groups(module, no_decay=["*embedd*"])
    with pytest.raises(ConfigError, match="negative"):
        parameter_groups(module, weight_decay=-0.1)


def test_decay_comes_from_the_optimizer_unless_given() -> None:
    own = build_optimizer(Small(), lambda params: torch.optim.AdamW(params, lr=1.0, weight_decay=0.3))
    assert [group["weight_decay"] for group in own.param_groups] == [0.3, 0.0]
    given = build_optimizer(Small(), torch.optim.AdamW, weight_decay=0.2)
    assert [group["weight_decay"] for group in given.param_groups] == [0.2, 0.0]


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match="Rprop has no weight decay"):
        build_optimizer(Small(), torch.optim.Rprop, weight_decay=0.1)
    with pytest.raises(ConfigError, match="nothing to optimise"):
        build_optimizer(Small().requires_grad_(False), torch.optim.AdamW)


def _rates(total: int, **kwargs) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = WarmupSchedule(optimizer, **kwargs)
    if schedule.needs_total_steps:
        schedule.set_total_steps(total)
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def test_schedule_against_the_formula() -> None:
    assert _rates(4, decay="constant") == [2.0] * 4
    assert _rates(4, decay="constant", warmup_fraction=0.5) == pytest.approx([2 / 3, 4 / 3, 2.0, 2.0])
    assert _rates(6, decay="linear", warmup_steps=2) == pytest.approx([2 / 3, 4 / 3, 2.0, 1.5, 1.0, 0.5])
    cosine = [2 * (0.1 + 0.9 * (1 + math.cos(math.pi * i / 5)) / 2) for i in range(5)]
    assert _rates(5, decay="cosine", min_fraction=0.1) == pytest.approx(cosine)


def test_schedule_resumes_and_may_be_longer() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = WarmupSchedule(optimizer, total_steps=4)
    for _ in range(2):
        optimizer.step()
        schedule.step()
    again = WarmupSchedule(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), total_steps=8)
    again.load_state_dict(schedule.state_dict())
    assert (again.last_epoch, again.total_steps) == (2, 8)
    assert again.factor(2) == 0.75


@pytest.mark.parametrize(
    "wrong", [{"decay": "lienar"}, {"warmup_fraction": 1.0}, {"min_fraction": -0.1}, {"warmup_steps": -1}]
)
def test_schedule_refuses_values_out_of_range(wrong: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        WarmupSchedule(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), **wrong)
