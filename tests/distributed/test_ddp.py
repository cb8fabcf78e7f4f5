"""Two processes under DDP: the gradients of one process on the joined batch, equal ranks, exact resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.contract.harness import ROWS, assert_same_weights
from tests.distributed import ddp_probe, fsdp_probe
from tests.distributed.launch import launch

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("ddp")
    launch(Path(ddp_probe.__file__), str(out))
    return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def single(row: str, accumulate: int, tmp_path: Path) -> dict[str, Any]:
    return ddp_probe.fit(tmp_path, ROWS[row].make(), accumulate_grad_batches=accumulate)


def assert_same_gradients(left: list[dict[str, torch.Tensor]], right: list[dict[str, torch.Tensor]]) -> None:
    assert len(left) == len(right) > 0
    for step, (ours, theirs) in enumerate(zip(left, right, strict=True)):
        assert ours.keys() == theirs.keys()
        for name in ours:
            where = f"step {step}, {name}: "
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-6, msg=where.__add__)


@pytest.mark.parametrize(("row", "accumulate"), ddp_probe.CASES)
def test_gradients_equal_one_process_on_the_joined_batch(
    row: str, accumulate: int, ranks: list[dict[str, Any]], tmp_path: Path
) -> None:
    expected = single(row, accumulate, tmp_path)
    for rank in ranks:
        result = rank[f"{row}/{accumulate}"]
        assert result["histories"] == expected["histories"]
        assert result["steps"] == expected["steps"]
        assert_same_gradients(result["gradients"], expected["gradients"])
    assert_same_weights(ranks[0][f"{row}/{accumulate}"]["weights"], ranks[1][f"{row}/{accumulate}"]["weights"])


@pytest.mark.parametrize("row", fsdp_probe.ADAPTER_ROWS)
def test_adapters(row: str, ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    expected = fsdp_probe.single(tmp_path, fsdp_probe.ADAPTER_ROWS[row](), adapters=True)
    for rank in ranks:
        assert rank[f"adapters/{row}"]["histories"] == expected["histories"]
        assert_same_gradients(rank[f"adapters/{row}"]["gradients"], expected["gradients"])


@pytest.mark.parametrize("row", ["lisa", "hft", "schedule", "badam"])
def test_mixed_precision(row: str, ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    """Under bfloat16 autocast: the same set, float32 gradients, as close to one process as bfloat16 is."""
    expected = ddp_probe.fit(tmp_path, ROWS[row].make(), precision="bf16-mixed")
    for rank in ranks:
        result = rank[f"mixed/{row}"]
        assert result["histories"] == expected["histories"]
        assert [set(step) for step in result["gradients"]] == [set(step) for step in expected["gradients"]]
        for name, gradient in result["gradients"][0].items():
            assert gradient.dtype == torch.float32
            torch.testing.assert_close(gradient, expected["gradients"][0][name], rtol=3e-2, atol=3e-3)
        assert_same_weights(rank[f"mixed/{row}/5"]["weights"], result["weights"])  # resumed
    assert_same_weights(ranks[0][f"mixed/{row}"]["weights"], ranks[1][f"mixed/{row}"]["weights"])


@pytest.mark.parametrize("variant", ["find_unused", "static_graph"])
def test_variants_of_ddp(variant: str, ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    expected = single("lisa", 1, tmp_path)
    for rank in ranks:
        assert_same_gradients(rank[variant]["gradients"], expected["gradients"])
    assert_same_weights(ranks[0][variant]["weights"], ranks[1][variant]["weights"])


def test_bucket_view(ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    expected = single("lisa", 2, tmp_path)
    for rank in ranks:
        assert_same_gradients(rank["bucket_view"]["gradients"], expected["gradients"])


def test_ddp_reduces_only_what_trains(ranks: list[dict[str, Any]]) -> None:
    result = ranks[0]["lisa/1"]
    sizes = [sum(gradient.numel() for gradient in step.values()) for step in result["gradients"]]
    assert result["reduced"] == sizes


@pytest.mark.parametrize("row", ["lisa", "lisa_offload", "hft_redraw"])
def test_resume_is_exact_on_every_rank(row: str, ranks: list[dict[str, Any]]) -> None:
    """With dropout, whose random state is each rank's own, and from the middle of accumulation windows."""
    for rank in ranks:
        expected = rank[f"resume/{row}/expected"]
        positions = [key for key in rank if key.startswith(f"resume/{row}/") and not key.endswith("expected")]
        assert len(positions) == 5
        for key in positions:
            assert rank[key]["histories"] == expected["histories"]
            assert_same_weights(rank[key]["weights"], expected["weights"])


def test_a_selection_that_differs_between_ranks_is_an_error_on_all(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "differs between ranks" in rank["diverging"]
