"""Two processes with sharded parameters: the gradients of one process on the joined batch, exact resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.contract.harness import ROWS, assert_same_weights
from tests.distributed import fsdp_probe
from tests.distributed.fsdp_probe import ADAPTER_ROWS, POSITIONS, RESUMED, STRATEGIES, is_supported
from tests.distributed.launch import launch

pytestmark = pytest.mark.distributed

Ranks = list[dict[str, Any]]


@pytest.fixture(scope="module", params=STRATEGIES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Ranks]:
    out = tmp_path_factory.mktemp(request.param)
    launch(Path(fsdp_probe.__file__), str(out), request.param)
    return request.param, [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def assert_close(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], where: str, tolerance: float) -> None:
    assert left.keys() == right.keys(), where
    for name in left:
        torch.testing.assert_close(
            left[name].float(), right[name].float(), rtol=tolerance, atol=tolerance, msg=f"{where}, {name}: ".__add__
        )


def assert_same_gradients(ours: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-6) -> None:
    assert ours["histories"] == expected["histories"]
    assert ours["steps"] == expected["steps"]
    assert len(ours["gradients"]) == len(expected["gradients"]) > 0
    for step, (left, right) in enumerate(zip(ours["gradients"], expected["gradients"], strict=True)):
        assert_close(left, right, f"step {step}", tolerance)


@pytest.mark.parametrize("row", ROWS)
def test_gradients_equal_one_process_on_the_joined_batch(row: str, run: tuple[str, Ranks], tmp_path: Path) -> None:
    strategy, ranks = run
    if not is_supported(row, strategy):
        assert all("UnsupportedStrategy" in rank[f"refused/{row}"] for rank in ranks)
        return
    expected = fsdp_probe.single(tmp_path, ROWS[row].make())
    for rank in ranks:
        assert_same_gradients(rank[row], expected)
    assert_same_weights(ranks[0][row]["weights"], ranks[1][row]["weights"])


@pytest.mark.parametrize("row", ADAPTER_ROWS)
def test_adapters(row: str, run: tuple[str, Ranks], tmp_path: Path) -> None:
    _, ranks = run
    expected = fsdp_probe.single(tmp_path, ADAPTER_ROWS[row](), adapters=True)
    assert any("lora" in name for _, names in expected["histories"][-1] for name in names)
    for rank in ranks:
        assert_same_gradients(rank[f"adapters/{row}"], expected)


@pytest.mark.parametrize("row", ["lisa", "hft", "schedule", "badam"])
def test_mixed_precision(row: str, run: tuple[str, Ranks]) -> None:
    """bfloat16 forward and backward, float32 reduction and weights: close to float32, and moving the same set."""
    _, ranks = run
    for rank in ranks:
        mixed, full = rank[f"mixed/{row}"], rank[row]
        assert mixed["histories"] == full["histories"]
        assert [set(step) for step in mixed["gradients"]] == [set(step) for step in full["gradients"]]
        assert all(gradient.dtype == torch.float32 for step in mixed["gradients"] for gradient in step.values())
        first = zip(mixed["gradients"][0].values(), full["gradients"][0].values(), strict=True)
        assert all(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), 0) > 0.98 for a, b in first)


@pytest.mark.parametrize("form", ["sharded", "full"])
@pytest.mark.parametrize("row", RESUMED)
def test_resume_is_exact(row: str, form: str, run: tuple[str, Ranks]) -> None:
    """With dropout, from the middle of accumulation windows and of periods; states kept and dropped."""
    strategy, ranks = run
    if not is_supported(row, strategy):
        pytest.skip("refused; see the test of gradients")
    for rank in ranks:
        expected = rank[f"resume/{form}/{row}/expected"]
        for position in POSITIONS[form]:
            resumed = rank[f"resume/{form}/{row}/{position}"]
            assert resumed["histories"] == expected["histories"]
            assert_same_weights(resumed["weights"], expected["weights"])


@pytest.mark.parametrize("row", ["lisa", "hft_redraw", "schedule", "badam"])
def test_resume_in_mixed_precision_is_exact(row: str, run: tuple[str, Ranks]) -> None:
    _, ranks = run
    for rank in ranks:
        resumed, expected = rank[f"resume/mixed/{row}/5"], rank[f"resume/mixed/{row}/expected"]
        assert resumed["histories"] == expected["histories"]
        assert_same_weights(resumed["weights"], expected["weights"])


def test_fsdp1_replaces_optimizers(run: tuple[str, Ranks], tmp_path: Path) -> None:
    strategy, ranks = run
    if strategy != "fsdp1":
        pytest.skip("the row 'schedule_replacing' runs there")
    expected = fsdp_probe.single(tmp_path, fsdp_probe.replacing())
    for rank in ranks:
        assert_same_gradients(rank["schedule_replacing_keep"], expected)
        for position in POSITIONS["sharded"]:
            resumed = rank[f"resume/sharded/schedule_replacing_keep/{position}"]
            assert_same_weights(resumed["weights"], rank["schedule_replacing_keep"]["weights"])


def test_weights_gathered_before_a_step_are_not_used_after_it(run: tuple[str, Ranks], tmp_path: Path) -> None:
    strategy, ranks = run
    if strategy != "model_parallel":
        pytest.skip("FSDP2Strategy has a test of its own; FSDP1 gathers anew")
    expected = fsdp_probe.single(tmp_path, ROWS["lisa"].make())
    for rank in ranks:
        assert_same_gradients(rank["looks_between"], expected)


def test_what_would_be_wrong_is_refused(run: tuple[str, Ranks]) -> None:
    strategy, ranks = run
    for rank in ranks:
        if strategy == "model_parallel":
            assert "ConfigError: 3 parameter(s) that may train are in no fully_shard group" in rank["refused/left_out"]
        if strategy == "fsdp1":
            assert "already wrapped by FullyShardedDataParallel" in rank["refused/second_fit"]
