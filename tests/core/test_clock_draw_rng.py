"""The optimizer-step clock, private draws, and the saved random states."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_peft.core.clock import OptimizerStepClock
from lightning_peft.core.draw import Draw, draw_generator
from lightning_peft.core.rng import get_rng_state, set_rng_state


def parameter_with_grad(value: float = 1.0) -> nn.Parameter:
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.full((2,), value)
    return parameter


# ---------------------------------------------------------------------------------------------------- clock


def test_several_optimizers_are_counted_apart() -> None:
    calls: list[tuple[Any, ...]] = []
    first = torch.optim.SGD([parameter_with_grad()], lr=0.1)
    second = torch.optim.Adam([parameter_with_grad()], lr=0.1)
    clock = OptimizerStepClock(
        lambda index, optimizer: calls.append(("before", index, optimizer, list(clock.counts))),
        lambda index, optimizer: calls.append(("after", index, optimizer, list(clock.counts))),
    )
    first.step()  # not attached yet
    clock.attach([first, second])
    first.step()
    second.step()
    first.step()
    assert clock.counts == [2, 1]
    assert calls == [
        ("before", 0, first, [0, 0]),
        ("after", 0, first, [1, 0]),
        ("before", 1, second, [1, 0]),
        ("after", 1, second, [1, 1]),
        ("before", 0, first, [1, 1]),
        ("after", 0, first, [2, 1]),
    ]
    assert (clock.time([0]), clock.time([1]), clock.time([0, 1]), clock.time([]), clock.time([7])) == (2, 1, 2, 0, 0)


def test_closures_tick_once_and_run_inside_the_step() -> None:
    parameter = parameter_with_grad()
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    order: list[str] = []
    clock = OptimizerStepClock(lambda *_: order.append("before"), lambda *_: order.append("after"))
    clock.attach([optimizer])

    def closure() -> float:
        order.append("closure")
        return 1.0

    assert optimizer.step(closure) == 1.0
    assert clock.counts == [1]
    assert order == ["before", "closure", "after"]


def test_attaching_again_does_not_count_twice_and_goes_on() -> None:
    optimizer = torch.optim.SGD([parameter_with_grad()], lr=0.1)
    clock = OptimizerStepClock()
    clock.attach([optimizer])
    optimizer.step()
    clock.attach([optimizer])
    optimizer.step()
    assert clock.counts == [2]
    clock.detach()
    optimizer.step()
    assert clock.counts == [2]
    clock.detach()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_restored_counts_go_on() -> None:
    optimizer = torch.optim.SGD([parameter_with_grad()], lr=0.1)
    clock = OptimizerStepClock()
    clock.counts = [40]
    clock.attach([optimizer])
    optimizer.step()
    assert clock.counts == [41]


def test_steps_that_the_gradient_scaler_skips_do_not_tick() -> None:
    parameter = parameter_with_grad()
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    clock = OptimizerStepClock()
    clock.attach([optimizer])
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    weights = []
    for overflow in (False, True, True, False):
        optimizer.zero_grad()
        loss = (parameter * (float("inf") if overflow else 1.0)).sum()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        weights.append(parameter[0].item())
    assert weights == pytest.approx([0.9, 0.9, 0.9, 0.8])
    assert clock.counts == [2]


def test_a_step_inside_a_step_ticks_once() -> None:
    """An optimizer that calls its parent's ``step`` runs the hooks of both."""

    class Twice(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    optimizer = Twice([parameter_with_grad()], lr=0.1)
    seen: list[str] = []
    clock = OptimizerStepClock(lambda *_: seen.append("before"), lambda *_: seen.append("after"))
    clock.attach([optimizer])
    optimizer.step()
    optimizer.step()
    assert clock.counts == [2]
    assert seen == ["before", "after"] * 2


def test_a_step_that_raises_is_forgotten() -> None:
    optimizer = torch.optim.SGD([parameter_with_grad()], lr=0.1)
    clock = OptimizerStepClock()
    clock.attach([optimizer])

    def closure() -> float:
        raise KeyError("the user's own")

    with pytest.raises(KeyError):
        optimizer.step(closure)
    clock.settle()
    assert clock.counts == [0]
    optimizer.step()
    assert clock.counts == [1]


# ---------------------------------------------------------------------------------------------------- draws


def numbers(generator: torch.Generator) -> tuple[int, ...]:
    return tuple(torch.randint(0, 2**31, (4,), generator=generator).tolist())


def test_draws_leave_the_global_random_state_alone_and_do_not_read_it() -> None:
    results = []
    for seed in (0, 1):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        before = get_rng_state()
        results.append((numbers(draw_generator(7, 3)), numbers(Draw(3, 60, 1, 7).generator("blocks"))))
        after = get_rng_state()
        assert torch.equal(before["torch"], after["torch"])
        assert before["python"] == after["python"]
        assert torch.equal(before["numpy"][1], after["numpy"][1])
    assert results[0] == results[1]


def test_draws_differ_by_seed_index_and_stream() -> None:
    keys = [(seed, index, stream) for seed in range(4) for index in range(8) for stream in ("", "a", "b")]
    keys += [(1, 11, ""), (11, 1, ""), (111, 1, ""), (-1, 0, "")]  # no mix-up of digits
    found = {key: numbers(draw_generator(*key)) for key in keys}
    assert len(set(found.values())) == len(keys)
    assert found == {key: numbers(draw_generator(*key)) for key in keys}


def test_draws_are_the_same_for_ever() -> None:
    """A resumed run must draw as the first did, whatever the process: no use of ``hash`` or of the time."""
    assert draw_generator(0, 0, "blocks").initial_seed() == 8600332332704010220
    script = "from lightning_peft.core.draw import draw_generator; print(draw_generator(3, 4, 'x').initial_seed())"
    environment = {**os.environ, "PYTHONHASHSEED": "123"}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert int(run.stdout) == draw_generator(3, 4, "x").initial_seed()


def test_streams_of_a_draw_are_independent_and_go_on() -> None:
    draw = Draw(2, 40, 0, 5)
    assert draw.generator("a") is draw.generator("a")
    first = numbers(draw.generator("a"))
    other = numbers(draw.generator("b"))
    assert numbers(draw.generator("a")) != first  # goes on
    fresh = Draw(2, 40, 0, 5)
    assert numbers(fresh.generator("b")) == other  # whether or not another stream was used
    assert numbers(fresh.generator("a")) == first
    assert draw == fresh
    assert numbers(Draw(2, 99, 7, 5).generator("a")) == first  # a function of seed and index alone


# ---------------------------------------------------------------------------------------------------- global states


def roll() -> tuple[Any, ...]:
    return (
        random.random(),
        random.gauss(0, 1),
        np.random.rand(),
        np.random.randn(),
        torch.rand(3).tolist(),
        torch.randn(2).tolist(),
    )


@pytest.mark.parametrize("warm", [0, 1, 2])
def test_random_states_round_trip_through_a_checkpoint(warm: int, tmp_path: Any) -> None:
    """An odd number of Gaussian draws leaves a cached second value in Python's and NumPy's generators."""
    random.seed(warm)
    np.random.seed(warm)
    for _ in range(warm):
        roll()
    torch.save(get_rng_state(), tmp_path / "rng.pt")
    expected = [roll() for _ in range(3)]
    torch.manual_seed(4711)
    random.seed(4711)
    np.random.seed(4711)
    assert [roll() for _ in range(3)] != expected
    set_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert [roll() for _ in range(3)] == expected


def test_reading_the_state_changes_nothing() -> None:
    set_rng_state(start := get_rng_state())
    expected = roll()
    set_rng_state(start)
    get_rng_state()
    assert roll() == expected
