"""Two processes under DDP: the ranks are equal at every phase of a schedule, also where each logs its own metric."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.contract.harness import assert_same_weights
from tests.distributed.launch import launch
from tests.methods import schedule_ddp_probe

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("ddp")
    launch(Path(schedule_ddp_probe.__file__), str(out))
    return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def test_ranks_are_equal_at_every_phase(ranks: list[dict[str, Any]]) -> None:
    left, right = (rank["expected"] for rank in ranks)
    # 3 steps an epoch; the mean of the ranks' metrics stalls in the look after the second epoch
    assert left["phases"] == right["phases"] == [(0, 0), (1, 2), (2, 6), (3, 9)]
    for one, other in zip(left["weights_at"], right["weights_at"], strict=True):
        assert_same_weights(one, other)
    assert_same_weights(left["weights"], right["weights"])
    for before, after in zip(left["weights_at"], [*left["weights_at"][1:], left["weights"]], strict=True):
        assert any(not torch.equal(before[name], after[name]) for name in before)


def test_resume_is_exact_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        found = [key for key in rank if key.startswith("resume/")]
        assert len(found) == 5
        for key in found:
            assert rank[key]["history"] == rank["expected"]["history"], key
            assert_same_weights(rank[key]["weights"], rank["expected"]["weights"])
