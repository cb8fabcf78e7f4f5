"""Freezing against a slow oracle: every parameter with an optimizer of its own that steps only while it trains."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_peft.core.blocks import find_structure
from lightning_peft.core.trainable import (
    FrozenNormStatistics,
    OffloadedStates,
    StatePolicy,
    check_state_policy,
    optimizer_members,
    parameter_fingerprints,
    set_flags,
    set_trainable,
    state_bytes,
)
from lightning_peft.errors import ConfigError

NAMES = ("a", "b", "c", "d")

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, MakeOptimizer] = {
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1),
    "adamw_amsgrad": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
}


def new_parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 2), (5,), (2, 2), (4, 3)]
    return {n: nn.Parameter(torch.randn(s, generator=generator)) for n, s in zip(NAMES, shapes, strict=True)}


def gradient(name: str, step: int, like: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * step + NAMES.index(name))
    return torch.randn(like.shape, generator=generator)


def backward(parameters: dict[str, nn.Parameter], step: int) -> None:
    """A backward pass with known gradients: autograd gives them to what requires one, as in training."""
    terms = [(p * gradient(name, step, p)).sum() for name, p in parameters.items() if p.requires_grad]
    if terms:
        torch.stack(terms).sum().backward()


def oracle(
    make: MakeOptimizer, schedule: list[frozenset[str]], policy: StatePolicy
) -> tuple[dict[str, nn.Parameter], dict[str, torch.optim.Optimizer]]:
    parameters = new_parameters()
    own = {name: make([p]) for name, p in parameters.items()}
    before: frozenset[str] = frozenset()
    for step, now in enumerate(schedule):
        for name, p in parameters.items():
            if name in before and name not in now and policy == "drop":
                own[name] = make([p])
            if name in now:
                p.grad = gradient(name, step, p)
                own[name].step()
                p.grad = None
        before = now
    return parameters, own


def assert_same_state(left: dict[str, object], right: dict[str, object]) -> None:
    assert left.keys() == right.keys()
    for key, value in left.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(right[key])), key


subsets = st.frozensets(st.sampled_from(NAMES), min_size=1)


@pytest.mark.parametrize("policy", ["keep", "drop", "offload"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@settings(max_examples=15, deadline=None)
@given(schedule=st.lists(subsets, min_size=2, max_size=7))
def test_any_schedule_equals_one_optimizer_per_parameter(
    name: str, policy: StatePolicy, schedule: list[frozenset[str]]
) -> None:
    parameters, offloaded = new_parameters(), OffloadedStates()
    optimizer = OPTIMIZERS[name](list(parameters.values()))
    initially_on = {n for n, p in parameters.items() if p.requires_grad}
    on = frozenset(initially_on)
    for step, now in enumerate(schedule):
        switch = set_trainable(parameters, now, optimizers=[optimizer], policy=lambda _: policy, offloaded=offloaded)
        assert set(switch.frozen) == on - now
        assert set(switch.thawed) == now - on
        assert bool(switch) == (on != now)
        backward(parameters, step)
        optimizer.step()
        # What froze lost its gradient; leave the others' behind, as a user who forgets zero_grad would.
        for p in parameters.values():
            if p.grad is not None:
                p.grad.zero_()
        on = now
    expected, own = oracle(OPTIMIZERS[name], schedule, policy)
    for n, p in parameters.items():
        assert torch.equal(p, expected[n]), n
        state = optimizer.state.get(p, {})
        if policy == "offload" and n not in schedule[-1]:
            assert not state
            state = offloaded.take(n, p) if n in offloaded else {}
        if policy == "drop" and n not in schedule[-1]:
            assert not state
        else:
            assert_same_state(dict(state), dict(own[n].state.get(expected[n], {})))


@pytest.mark.parametrize("name", ["sgd_momentum", "adam", "adamw_amsgrad", "rmsprop"])
def test_a_bare_flag_lets_frozen_weights_drift_and_set_trainable_does_not(name: str) -> None:
    """Both ways of leaving a gradient behind: the last one still there, and one zeroed in place."""
    for zero_in_place in (False, True):
        drift = {}
        for bare in (True, False):
            parameters = new_parameters()
            optimizer = OPTIMIZERS[name](list(parameters.values()))
            for step in range(2):
                optimizer.zero_grad()
                backward(parameters, step)
                optimizer.step()
            if zero_in_place:
                optimizer.zero_grad(set_to_none=False)
            before = parameters["a"].detach().clone()
            if bare:
                parameters["a"].requires_grad_(False)
            else:
                set_trainable(parameters, {"b", "c", "d"}, optimizers=[optimizer])
            for step in range(2, 5):
                optimizer.step()  # what remained of the old gradients is stepped again
                if zero_in_place:
                    optimizer.zero_grad(set_to_none=False)
                backward(parameters, step)
            drift[bare] = float((parameters["a"].detach() - before).abs().max())
        assert drift[True] > 1e-3
        assert drift[False] == 0


def test_offloaded_state_survives_a_checkpoint() -> None:
    parameters, offloaded = new_parameters(), OffloadedStates()
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    backward(parameters, 0)
    optimizer.step()
    saved = {n: {k: torch.as_tensor(v).clone() for k, v in optimizer.state[p].items()} for n, p in parameters.items()}
    bytes_before = state_bytes([optimizer])
    assert bytes_before == sum(v.nbytes for state in saved.values() for v in state.values())

    set_trainable(parameters, {"a"}, optimizers=[optimizer], policy=lambda _: "offload", offloaded=offloaded)
    assert state_bytes([optimizer]) + offloaded.num_bytes() == bytes_before
    assert state_bytes([optimizer]) == sum(v.nbytes for v in saved["a"].values())
    assert "b" in offloaded
    assert "a" not in offloaded

    again = OffloadedStates()
    again.load_state_dict(offloaded.state_dict())
    set_trainable(parameters, NAMES, optimizers=[optimizer], policy=lambda _: "offload", offloaded=again)
    assert again.num_bytes() == 0
    for n, p in parameters.items():
        assert_same_state(dict(optimizer.state[p]), dict(saved[n]))


def test_several_optimizers_and_policies_by_name() -> None:
    parameters, offloaded = new_parameters(), OffloadedStates()
    first = torch.optim.Adam([parameters["a"], parameters["b"]])
    second = torch.optim.SGD([parameters["c"], parameters["d"]], lr=0.1, momentum=0.9)
    optimizers = [first, second]
    backward(parameters, 0)
    for optimizer in optimizers:
        optimizer.step()
    buffer = second.state[parameters["c"]]["momentum_buffer"].clone()
    policies: dict[str, StatePolicy] = {"a": "drop", "b": "keep", "c": "offload"}
    set_trainable(parameters, {"d"}, optimizers=optimizers, policy=policies.__getitem__, offloaded=offloaded)
    assert set(first.state) == {parameters["b"]}
    assert set(second.state) == {parameters["d"]}
    set_trainable(parameters, NAMES, optimizers=optimizers, policy=policies.__getitem__, offloaded=offloaded)
    assert set(first.state) == {parameters["b"]}
    assert set(second.state) == {parameters["c"], parameters["d"]}
    assert torch.equal(second.state[parameters["c"]]["momentum_buffer"], buffer)
    assert optimizer_members(parameters, optimizers) == {"a": [0], "b": [0], "c": [1], "d": [1]}


@pytest.mark.parametrize("policy", ["keep", "drop", "offload"])
def test_eight_bit_adam_on_cpu(policy: StatePolicy) -> None:
    """Quantised moments and step counters: what rests comes back bit for bit, or fresh."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bnb = pytest.importorskip("bitsandbytes")
    generator = torch.Generator().manual_seed(0)
    parameters = {n: nn.Parameter(torch.randn(64, 128, generator=generator)) for n in ("a", "b")}
    optimizer, offloaded = bnb.optim.AdamW8bit(parameters.values(), lr=1e-2), OffloadedStates()

    def step(*names: str) -> None:
        set_trainable(parameters, names, optimizers=[optimizer], policy=lambda _: policy, offloaded=offloaded)
        for name in names:
            parameters[name].grad = torch.randn(64, 128, generator=generator)
        optimizer.step()
        optimizer.zero_grad()

    step("a", "b")
    state = {k: torch.as_tensor(v).clone() for k, v in optimizer.state[parameters["a"]].items()}
    assert state["state1"].dtype == torch.uint8
    weight = parameters["a"].detach().clone()
    step("b")
    step("b")
    assert torch.equal(parameters["a"], weight)
    assert (parameters["a"] in optimizer.state) == (policy == "keep")
    set_trainable(parameters, ["a"], optimizers=[optimizer], policy=lambda _: policy, offloaded=offloaded)
    if policy == "drop":
        assert parameters["a"] not in optimizer.state
    else:
        assert_same_state(dict(optimizer.state[parameters["a"]]), dict(state))
    step("a")
    assert optimizer.state[parameters["a"]]["step"] == (1 if policy == "drop" else 2)
    assert not torch.equal(parameters["a"], weight)


def test_flags_alone() -> None:
    parameters = new_parameters()
    backward(parameters, 0)
    set_flags(parameters, {"a": False, "b": True})
    assert [p.requires_grad for p in parameters.values()] == [False, True, True, True]
    assert parameters["a"].grad is not None


def test_unknown_state_policy_names_the_nearest() -> None:
    assert check_state_policy("offload") == "offload"
    with pytest.raises(ConfigError, match=r"'ofload'.*'offload'"):
        check_state_policy("ofload")  # pyright: ignore[reportArgumentType]


# ---------------------------------------------------------------------------------------------------- fingerprints


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64])
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_one_changed_bit_changes_the_fingerprint(dtype: torch.dtype, data: st.DataObject) -> None:
    tensor = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    raw = tensor.contiguous().view(torch.uint8).flatten()
    byte = data.draw(st.integers(0, len(raw) - 1))
    bit = data.draw(st.integers(0, 7))
    changed = raw.clone()
    changed[byte] ^= 1 << bit
    other = changed.view(dtype).reshape(3, 4)
    assert parameter_fingerprints([tensor, tensor.clone()])[0] == parameter_fingerprints([tensor.clone()])[0]
    assert parameter_fingerprints([tensor]) != parameter_fingerprints([other])


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(2, 40),
    ups=st.integers(1, 20),
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_changes_of_equal_size_do_not_cancel(size: int, ups: int, seed: int, dtype: torch.dtype) -> None:
    """Norm weights start at 1; Adam's first step moves all by the same amount, up or down."""
    before = torch.ones(size, dtype=dtype)
    signs = torch.ones(size, dtype=dtype)
    signs[torch.randperm(size, generator=torch.Generator().manual_seed(seed))[: min(ups, size)]] = -1
    assert parameter_fingerprints([before]) != parameter_fingerprints([before + 0.0078125 * signs])


def test_fingerprints_across_chunks_views_and_empty_tensors() -> None:
    from lightning_peft.core import trainable

    size = 2 * trainable._FINGERPRINT_CHUNK + 5
    tensor = torch.ones(size)
    for place in (0, trainable._FINGERPRINT_CHUNK, size - 1):
        other = tensor.clone()
        other[place] = -1.0
        assert parameter_fingerprints([tensor]) != parameter_fingerprints([other])
    swapped = torch.arange(float(size))
    other = swapped.clone()
    other[0], other[trainable._FINGERPRINT_CHUNK] = swapped[trainable._FINGERPRINT_CHUNK], swapped[0]
    assert parameter_fingerprints([swapped]) != parameter_fingerprints([other])
    matrix = torch.randn(4, 5)
    assert parameter_fingerprints([matrix.t()]) == parameter_fingerprints([matrix.t().contiguous()])
    assert parameter_fingerprints([]) == []
    assert len(parameter_fingerprints([torch.zeros(0), torch.tensor(1.0), nn.Parameter(torch.ones(2))])) == 3


# ---------------------------------------------------------------------------------------------------- norm statistics


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.two = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False))
        self.conv = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.two(self.one(x))
        return self.conv(x[:, None, :, None])


def statistics_of(model: Normed) -> tuple[FrozenNormStatistics, list[str]]:
    structure = find_structure(model)
    below: dict[str, tuple[str, ...]] = {}
    for path in structure.modules:
        below[path] = tuple(n for n in structure.parameters if not path or n.startswith(f"{path}."))
    return FrozenNormStatistics(structure.modules, below), list(structure.parameters)


def moved_statistics(model: Normed) -> set[str]:
    before = {n: b.clone() for n, b in model.named_buffers()}
    model(torch.randn(6, 3, generator=torch.Generator().manual_seed(0)) * 3 + 2)
    return {n.rpartition(".")[0] for n, b in model.named_buffers() if not torch.equal(b, before[n])}


def test_statistics_move_with_the_layers_that_train() -> None:
    model = Normed().train()
    norms, names = statistics_of(model)
    assert moved_statistics(model) == {"one.1", "two.1", "conv.1"}
    norms.apply({"one.1.bias", "two.0.weight", "conv.0.weight"})
    # conv.1 has parameters of its own, all frozen; two.1 has none and follows its parent
    assert moved_statistics(model) == {"one.1", "two.1"}
    norms.apply({"conv.1.weight"})
    assert moved_statistics(model) == {"conv.1"}
    norms.apply(names)
    assert moved_statistics(model) == {"one.1", "two.1", "conv.1"}
    norms.apply(())
    assert moved_statistics(model) == set()
    norms.release()
    assert moved_statistics(model) == {"one.1", "two.1", "conv.1"}
    assert all(module.training for module in model.modules())


def test_a_frozen_norm_normalises_by_its_running_statistics() -> None:
    model = Normed().train()
    moved_statistics(model)
    norms, _ = statistics_of(model)
    norms.apply(())
    x = torch.randn(6, 3) * 5
    expected = model.train(False)(x)
    model.train()
    norms.hold()
    assert torch.equal(model(x), expected)


def test_layers_in_evaluation_mode_stay_there() -> None:
    model = Normed().train()
    model.one[1].eval()
    norms, names = statistics_of(model)
    for trainable in (names, (), names):
        norms.apply(trainable)
        assert "one.1" not in moved_statistics(model)
    norms.release()
    assert not model.one[1].training
    assert model.two[1].training


def test_train_called_by_the_user_is_undone_by_hold() -> None:
    model = Normed().train()
    norms, _ = statistics_of(model)
    norms.apply({"one.1.weight"})
    model.train()  # as a training_step may, after it scored something in evaluation mode
    norms.hold()
    assert moved_statistics(model) == {"one.1"}


def test_norms_without_running_statistics_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False), nn.LayerNorm(2))
    structure = find_structure(model)
    norms = FrozenNormStatistics(structure.modules, {"1": ("1.weight", "1.bias")})
    norms.apply(())
    assert all(module.training for module in model.modules())
