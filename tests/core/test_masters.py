"""Masters: the optimizer steps float32, the weight is the rounded master, and nothing is left behind."""

from __future__ import annotations

import gc
import io
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_peft.core.masters import MasterWeights, is_low_precision, original
from lightning_peft.core.trainable import optimizer_members

Make = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1),
    "adamw_fused": lambda groups: torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1, fused=True),
    "amsgrad": lambda groups: torch.optim.AdamW(groups, lr=1e-3, amsgrad=True),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=1e-4),
}


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first = nn.Linear(4, 6)
            self.second = nn.Linear(6, 3)
        self.unused = nn.Parameter(torch.ones(2))
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def groups(net: nn.Module) -> list[dict[str, Any]]:
    named = list(net.named_parameters())
    return [
        {"params": [p for _, p in named if p.ndim > 1]},
        {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0, "lr": 5e-3},
    ]


def batch(step: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(step)).to(dtype)


def backward(net: nn.Module, step: int) -> None:
    net(batch(step, next(net.parameters()).dtype)).float().square().sum().backward()


def step(net: nn.Module, optimizer: torch.optim.Optimizer, masters: MasterWeights, number: int) -> None:
    optimizer.zero_grad()
    backward(net, number)
    masters.take_gradients(optimizer)
    optimizer.step()
    masters.write_back(optimizer)


def by_hand(make: Make, dtype: torch.dtype, steps: int) -> tuple[Net, list[torch.Tensor]]:
    """The obvious way: a separate list of float32 tensors under an optimizer of its own."""
    net = Net(dtype)
    copies = {name: nn.Parameter(p.detach().float()) for name, p in net.named_parameters()}
    optimizer = make(
        [
            {"params": [p for p in copies.values() if p.ndim > 1]},
            {"params": [p for p in copies.values() if p.ndim < 2], "weight_decay": 0.0, "lr": 5e-3},
        ]
    )
    for number in range(steps):
        backward(net, number)
        for name, p in net.named_parameters():
            copies[name].grad = None if p.grad is None else p.grad.float()
            p.grad = None
        optimizer.step()
        with torch.no_grad():
            for name, p in net.named_parameters():
                p.copy_(copies[name].to(dtype))
    return net, list(copies.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_equals_a_separate_list_of_float32_copies(make: Make, dtype: torch.dtype) -> None:
    net = Net(dtype)
    optimizer = make(groups(net))
    masters = MasterWeights(dict(net.named_parameters()), [optimizer])
    masters.hold([name for name, _ in net.named_parameters()])
    for number in range(6):
        step(net, optimizer, masters, number)
        for name, parameter in net.named_parameters():
            assert torch.equal(parameter, masters[name].to(dtype))
    expected, copies = by_hand(make, dtype, 6)
    for ours, theirs in zip(net.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(masters.names, copies, strict=True):
        assert torch.equal(masters[ours], theirs)
    assert not torch.equal(net.first.weight, Net(dtype).first.weight)


def test_small_updates_add_up() -> None:
    net = Net()
    start = net.first.weight.detach().clone()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-6)
    masters = MasterWeights(dict(net.named_parameters()), [optimizer])
    masters.hold(["first.weight"])
    for _ in range(3):
        net.first.weight.grad = torch.full_like(net.first.weight, 8.0)
        masters.take_gradients(optimizer)
        optimizer.step()
        masters.write_back(optimizer)
    expected = start.float() - 3 * 8e-6
    torch.testing.assert_close(masters["first.weight"], expected, rtol=0, atol=1e-7)


def test_place_in_the_groups_and_back() -> None:
    net = Net()
    optimizer = torch.optim.AdamW(groups(net))
    before = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    lists = [group["params"] for group in optimizer.param_groups]
    names = dict(net.named_parameters())
    masters = MasterWeights(names, [optimizer])
    masters.hold(["first.weight", "second.bias"])
    assert masters.names == ("first.weight", "second.bias")
    for group, identities, members in zip(optimizer.param_groups, before, lists, strict=True):
        assert group["params"] is members  # others may hold the list
        assert [id(original(p)) for p in members] == identities
    assert optimizer.param_groups[0]["params"][0] is masters["first.weight"]
    assert masters["first.weight"].dtype == torch.float32
    assert masters.num_bytes() == 4 * (24 + 3)
    assert optimizer_members(names, [optimizer]) == {name: [0] for name in names}
    masters.release()
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == before
    assert masters.names == ()
    assert masters.num_bytes() == 0


def test_hold_makes_and_frees_only_what_changes() -> None:
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters())
    masters = MasterWeights(dict(net.named_parameters()), [optimizer])
    masters.hold(["first.weight", "first.bias"])
    step(net, optimizer, masters, 0)
    kept, freed = masters["first.bias"], weakref.ref(masters["first.weight"])
    state = optimizer.state[kept]
    masters.hold(["first.bias", "second.bias"])
    gc.collect()
    assert masters["first.bias"] is kept
    assert optimizer.state[kept] is state
    assert state["step"] == 1
    assert freed() is None
    assert masters["second.bias"] in optimizer.state  # a step without a master was before
    assert id(net.first.weight) not in {id(original(p)) for p in optimizer.state}


def test_full_precision_needs_no_master() -> None:
    net = Net(torch.float32)
    optimizer = torch.optim.AdamW(net.parameters())
    masters = MasterWeights(dict(net.named_parameters()), [optimizer])
    masters.hold([name for name, _ in net.named_parameters()])
    assert masters.names == ()
    assert [is_low_precision(torch.zeros(1, dtype=d)) for d in (torch.float32, torch.float64, torch.int8)] == [
        False
    ] * 3


def test_state_that_the_weight_has_becomes_the_masters() -> None:
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters())
    backward(net, 0)
    optimizer.step()
    moment = optimizer.state[net.first.weight]["exp_avg"]
    assert moment.dtype == torch.bfloat16
    masters = MasterWeights(dict(net.named_parameters()), [optimizer])
    masters.hold(["first.weight"])
    assert net.first.weight not in optimizer.state
    state = optimizer.state[masters["first.weight"]]
    assert state["exp_avg"].dtype == torch.float32
    assert torch.equal(state["exp_avg"], moment.float())
    assert state["step"] == 1


def test_gradients_are_the_very_tensors_the_optimizer_uses() -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    masters = MasterWeights(dict(net.named_parameters()), [optimizer])
    masters.hold([name for name, _ in net.named_parameters()])
    backward(net, 0)
    rounded = net.first.weight.grad
    assert rounded is not None
    assert rounded.dtype == torch.bfloat16
    masters.take_gradients(optimizer)
    assert net.first.weight.grad is not None
    assert torch.equal(net.first.weight.grad, rounded.float())
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1e-3)  # what a user writes over the model's parameters
    held = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.stack([grad.norm() for grad in held]).norm()
    torch.testing.assert_close(norm, torch.tensor(1e-3), rtol=1e-3, atol=0)
    optimizer.step()
    masters.write_back(optimizer)
    assert all(p.grad is None for p in net.parameters())
    assert all(p.grad is None for group in optimizer.param_groups for p in group["params"])
    backward(net, 1)  # and the next backward pass starts afresh, in the weights' own dtype
    fresh = Net()
    fresh.load_state_dict(net.state_dict())
    backward(fresh, 1)
    for ours, theirs in zip(net.parameters(), fresh.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None and theirs.grad is not None:
            assert ours.grad.dtype == torch.bfloat16
            assert torch.equal(ours.grad, theirs.grad)


def test_a_parameter_without_gradient_is_left_alone() -> None:
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.5)
    masters = MasterWeights(dict(net.named_parameters()), [optimizer])
    masters.hold(["unused", "first.bias"])
    for number in range(3):
        step(net, optimizer, masters, number)
    assert torch.equal(net.unused, torch.ones(2, dtype=torch.bfloat16))
    assert not torch.equal(net.first.bias, Net().first.bias)


def test_the_users_own_gradient_dtype_is_given_back() -> None:
    net = Net()
    net.first.weight.grad_dtype = torch.float32
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    masters = MasterWeights(dict(net.named_parameters()), [optimizer])
    masters.hold(["first.weight", "first.bias"])
    step(net, optimizer, masters, 0)
    backward(net, 1)
    assert net.first.weight.grad is not None
    assert net.first.weight.grad.dtype == torch.float32
    masters.release()
    assert net.first.weight.grad_dtype == torch.float32
    assert net.first.bias.grad_dtype == torch.bfloat16


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_restored_in_a_new_process_goes_on_bit_for_bit(make: Make) -> None:
    """Through a file without pickled code, around an ``optimizer.load_state_dict`` that rounds the moments."""
    net = Net()
    optimizer = make(groups(net))
    masters = MasterWeights(dict(net.named_parameters()), [optimizer])
    held = ["first.weight", "second.weight", "second.bias"]
    masters.hold(held)
    for number in range(3):
        step(net, optimizer, masters, number)
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "opt": optimizer.state_dict(), "masters": masters.state_dict()}, file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)

    other = Net()
    other.load_state_dict(saved["net"])
    resumed = make(groups(other))
    resumed.load_state_dict(saved["opt"])
    again = MasterWeights(dict(other.named_parameters()), [resumed])
    again.hold(held, saved["masters"])
    for name in held:
        assert torch.equal(again[name], masters[name])
        assert again[name].data_ptr() != saved["masters"][name]["master"].data_ptr()
    for number in range(3, 6):
        step(net, optimizer, masters, number)
        step(other, resumed, again, number)
    for name in held:
        assert torch.equal(again[name], masters[name])
        ours, theirs = resumed.state[again[name]], optimizer.state[masters[name]]
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert torch.equal(torch.as_tensor(ours[key]), torch.as_tensor(theirs[key]))
    for ours, theirs in zip(other.parameters(), net.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_checkpoint_holds_no_tensor_twice() -> None:
    """The moments in ``state_dict`` share their storage with the optimizer's, which a checkpoint saves too."""
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters())
    masters = MasterWeights(dict(net.named_parameters()), [optimizer])
    masters.hold(["first.weight"])
    step(net, optimizer, masters, 0)
    state = masters.state_dict()["first.weight"]["state"]
    assert state["exp_avg"].data_ptr() == optimizer.state[masters["first.weight"]]["exp_avg"].data_ptr()


def test_follows_to_another_optimizer() -> None:
    net = Net()
    first = torch.optim.AdamW(net.parameters())
    masters = MasterWeights(dict(net.named_parameters()), [first])
    masters.hold(["first.weight"])
    second = torch.optim.SGD([dict(group) for group in first.param_groups], lr=0.1)  # built with the master inside
    masters.follow([second])
    assert masters.names == ()
    assert all(original(p) is p for optimizer in (first, second) for g in optimizer.param_groups for p in g["params"])
    masters.hold(["first.weight"])
    assert any(p is masters["first.weight"] for group in second.param_groups for p in group["params"])


def test_each_optimizer_has_its_own_masters() -> None:
    net = Net()
    optimizers = [torch.optim.SGD(net.first.parameters(), lr=0.1), torch.optim.SGD(net.second.parameters(), lr=0.1)]
    masters = MasterWeights(dict(net.named_parameters()), optimizers)
    masters.hold(["first.weight", "second.weight"])
    backward(net, 0)
    masters.take_gradients(optimizers[0])
    assert masters["first.weight"].grad is not None
    assert masters["second.weight"].grad is None
    assert net.second.weight.grad is not None
    assert net.second.weight.grad.dtype == torch.bfloat16
