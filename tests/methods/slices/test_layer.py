"""Sliced layers against plain ones: values, gradients, bytes kept for backward, freshness, state dicts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from benchmarks.harness import saved_activations
from lightning_peft.methods.slices.layer import Side, Slice, SlicedLayer, slice_layer, sliced_layers, unslice

INPUTS, OUTPUTS = 7, 5
INDEX = torch.tensor([4, 0, 3])
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(INPUTS, OUTPUTS),
    "no bias": lambda: nn.Linear(INPUTS, OUTPUTS, bias=False),
    "conv1d": lambda: Conv1D(OUTPUTS, INPUTS),
}
SIDES: tuple[Side, ...] = ("inputs", "outputs")


def pair(kind: str, side: Side, dtype: torch.dtype = torch.float32) -> tuple[Any, SlicedLayer]:
    torch.manual_seed(0)
    plain = LAYERS[kind]().to(dtype)
    return plain, slice_layer(copy.deepcopy(plain), Slice(INDEX, side))


def part(kind: str, side: Side, dense: torch.Tensor) -> torch.Tensor:
    """The chosen columns or rows, written out."""
    by_last = (side == "inputs") != (kind == "conv1d")
    return dense[:, INDEX] if by_last else dense[INDEX]


@pytest.mark.parametrize("precision", ["float32", "float64", "bfloat16", "autocast"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (kind, shape)
        for kind in LAYERS
        for shape in ((INPUTS,), (4, INPUTS), (2, 3, INPUTS))
        if (kind, len(shape)) != ("conv1d", 1)  # which takes no vectors
    ],
)
def test_values_and_gradients_are_those_of_the_plain_layer(
    kind: str, side: Side, shape: tuple[int, ...], precision: str
) -> None:
    dtype = torch.float32 if precision == "autocast" else getattr(torch, precision)
    plain, sliced = pair(kind, side, dtype)
    results: list[Any] = []
    layer: Any
    for layer in (plain, sliced):
        torch.manual_seed(1)
        x = torch.randn(shape, dtype=dtype, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            y = layer(x)
        (y.float() * torch.randn(y.shape)).sum().backward()
        results.append((y, x.grad, None if plain.bias is None else layer.bias.grad))
    assert sliced.weight.grad is None
    expected = part(kind, side, plain.weight.grad)
    got = sliced.weight_slice.grad
    assert got is not None
    assert (got.shape, got.dtype, got.is_contiguous()) == (expected.shape, expected.dtype, True)
    tolerance: Any = (
        {"rtol": 0.02, "atol": 0.03} if precision in ("bfloat16", "autocast") else {"rtol": 1e-5, "atol": 1e-6}
    )
    torch.testing.assert_close(got, expected, **tolerance)
    for mine, other in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(mine, other, **tolerance)


def kept_bytes(layer: nn.Module, x: torch.Tensor) -> int:
    counter = saved_activations(layer)
    with counter:
        layer(x)
    return counter.num_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", LAYERS)
def test_bytes_kept_for_backward(kind: str, dtype: torch.dtype) -> None:
    x = torch.randn(6, INPUTS, dtype=dtype, requires_grad=True)
    plain, sliced = pair(kind, "inputs", dtype)
    assert kept_bytes(plain, x) == 6 * INPUTS * dtype.itemsize
    assert kept_bytes(sliced, x) == 6 * len(INDEX) * dtype.itemsize
    assert kept_bytes(pair(kind, "outputs", dtype)[1], x) == 6 * INPUTS * dtype.itemsize
    assert kept_bytes(sliced.requires_grad_(False), x) == 0


def test_autocast_keeps_no_copy_of_the_weight() -> None:
    _, sliced = pair("linear", "inputs")
    with torch.autocast("cpu", torch.bfloat16):
        assert kept_bytes(sliced, torch.randn(6, INPUTS, requires_grad=True)) == 6 * len(INDEX) * 2


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", LAYERS)
def test_the_weight_is_never_old(kind: str, side: Side) -> None:
    """Whatever changes the slice, the next use of the layer, of any sort, has its values."""
    _, sliced = pair(kind, side)
    x = torch.randn(4, INPUTS)
    frozen = sliced.weight.detach().clone()

    def product() -> torch.Tensor:
        dense = frozen.clone()
        if (side == "inputs") != (kind == "conv1d"):
            dense[:, INDEX] = sliced.weight_slice.detach()
        else:
            dense[INDEX] = sliced.weight_slice.detach()
        y = x @ (dense if kind == "conv1d" else dense.T)
        return y if sliced.bias is None else y + sliced.bias.detach()

    optimizer = torch.optim.AdamW([sliced.weight_slice], lr=0.1, weight_decay=0.5)
    uses: list[Callable[[], torch.Tensor]] = [lambda: sliced(x), lambda: sliced(x.requires_grad_(False)).detach()]
    for _ in range(3):
        for _ in range(2):  # accumulated
            sliced(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.inference_mode():
            torch.testing.assert_close(sliced(x), product())
        with torch.no_grad():
            sliced.weight_slice.mul_(1.5)
            torch.testing.assert_close(sliced.eval()(x), product())
        sliced.weight_slice.data.add_(0.25)  # as kernels that autograd does not see
        torch.testing.assert_close(sliced.train()(x), product())
        sliced.weight_slice.data.add_(0.25)
        torch.testing.assert_close(part(kind, side, sliced.state_dict()["weight"]), sliced.weight_slice.detach())
        for use in uses:
            torch.testing.assert_close(use(), product())
    sliced.weight_slice.data.copy_(part(kind, side, frozen))
    sliced.write()
    assert torch.equal(sliced.weight, frozen)


def test_a_graph_outlives_other_forward_passes_but_not_an_optimizer_step() -> None:
    plain, sliced = pair("linear", "inputs")
    x, other = torch.randn(4, INPUTS, requires_grad=True), torch.randn(4, INPUTS)
    loss = sliced(x).square().sum() + sliced(other).square().sum()
    with torch.no_grad():
        sliced(other)
    loss.backward()
    (plain(x).square().sum() + plain(other).square().sum()).backward()
    torch.testing.assert_close(sliced.weight_slice.grad, plain.weight.grad[:, INDEX])
    loss = sliced(x).square().sum()
    torch.optim.SGD([sliced.weight_slice], lr=0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("side", SIDES)
def test_activation_checkpointing_changes_no_bit(side: Side, reentrant: bool) -> None:
    gradients = []
    for recompute in (False, True):
        _, sliced = pair("linear", side)
        torch.manual_seed(1)
        x = torch.randn(4, INPUTS, requires_grad=True)
        y = checkpoint(sliced, x, use_reentrant=reentrant) if recompute else sliced(x)
        assert isinstance(y, torch.Tensor)
        y.square().sum().backward()
        gradients.append((sliced.weight_slice.grad, x.grad))
    for mine, other in zip(*gradients, strict=True):
        assert mine is not None
        assert other is not None
        assert torch.equal(mine, other)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", LAYERS)
def test_state_dicts_are_those_of_the_plain_layer(kind: str, side: Side) -> None:
    plain, sliced = pair(kind, side)
    assert {k: v.shape for k, v in sliced.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    with torch.no_grad():
        sliced.weight_slice.add_(1.0)
    plain.load_state_dict(sliced.state_dict())
    expected = plain(torch.ones(2, INPUTS))
    _, fresh = pair(kind, side)
    fresh.load_state_dict(plain.state_dict())
    assert torch.equal(fresh.weight_slice, sliced.weight_slice)
    torch.testing.assert_close(fresh(torch.ones(2, INPUTS)), expected)
    with torch.no_grad():
        fresh.weight_slice.mul_(2.0)
    kept = fresh.weight_slice.detach().clone()
    assert fresh.load_state_dict({}, strict=False).missing_keys == list(plain.state_dict())
    assert torch.equal(fresh.weight_slice, kept)
    with pytest.raises(RuntimeError, match=r'Missing key.*"weight"'):
        fresh.load_state_dict({})
    fresh.load_state_dict({k: v.double() for k, v in plain.state_dict().items()}, assign=True)
    assert fresh.weight_slice.dtype == torch.float64
    torch.testing.assert_close(fresh(torch.ones(2, INPUTS).double()).float(), expected)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", LAYERS)
def test_slicing_and_back_is_the_same_object(kind: str, side: Side) -> None:
    plain, _ = pair(kind, side)
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    names, kind_of, weight = set(vars(plain)), type(plain), plain.weight
    calls = []
    plain.register_forward_hook(lambda *_: calls.append(1))
    sliced = slice_layer(plain, Slice(INDEX, side))
    assert sliced is plain
    assert isinstance(sliced, kind_of)
    sliced(torch.ones(2, INPUTS))
    assert [path for path, _ in sliced_layers(nn.Sequential(nn.ReLU(), sliced))] == ["1"]
    with torch.no_grad():
        sliced.weight_slice.add_(1.0)
    back: Any = unslice(sliced)
    assert back is plain
    assert type(back) is kind_of
    assert back.weight is weight
    assert set(vars(back)) == names
    assert set(dict(back.named_parameters())) == set(before)
    assert not dict(back.named_buffers())
    assert calls == [1]
    changed = back.weight.detach() - before["weight"]
    torch.testing.assert_close(part(kind, side, changed), torch.ones_like(part(kind, side, changed)))
    assert int(changed.count_nonzero()) == part(kind, side, changed).numel()


# dynamo makes an instance of every autograd function that it traces
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("side", SIDES)
def test_compiles_into_one_graph(side: Side) -> None:
    _, sliced = pair("linear", side)
    compiled = torch.compile(copy.deepcopy(sliced), backend="aot_eager", fullgraph=True)
    x = torch.randn(4, INPUTS, requires_grad=True)
    for _ in range(3):
        results = []
        for layer in (sliced, compiled):
            y = layer(x)
            (grad,) = torch.autograd.grad(y.square().sum(), [layer.weight_slice])
            results.append((y, grad))
            with torch.no_grad():
                layer.weight_slice.sub_(0.1 * grad)  # pyright: ignore[reportOperatorIssue]
        for mine, other in zip(*results, strict=True):
            assert torch.equal(mine, other)


def test_other_columns_and_copies() -> None:
    _, sliced = pair("linear", "inputs")
    with torch.no_grad():
        sliced.weight_slice.add_(1.0)
    twin = copy.deepcopy(sliced)
    sliced.choose(torch.tensor([1, 2, 5]))
    assert torch.equal(sliced.weight_slice, sliced.weight[:, [1, 2, 5]])
    assert torch.equal(sliced(torch.eye(INPUTS)), twin(torch.eye(INPUTS)))
    with torch.no_grad():
        twin.weight_slice.zero_()
    assert not torch.equal(sliced(torch.eye(INPUTS)), twin(torch.eye(INPUTS)))
    assert sliced.double().weight_slice.dtype == torch.float64
    assert sliced(torch.eye(INPUTS).double()).dtype == torch.float64
    assert "inputs=3" in repr(sliced)
