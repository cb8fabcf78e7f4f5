"""Two processes under DDP: one importance on both ranks, masks after the reduction, exact resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.contract.harness import assert_same_weights
from tests.distributed.launch import launch
from tests.distributed.test_ddp import assert_same_gradients
from tests.methods import cofitune_ddp_probe

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("ddp")
    launch(Path(cofitune_ddp_probe.__file__), str(out))
    return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def test_masked_gradients_equal_one_process_on_the_joined_batch(ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    expected = cofitune_ddp_probe.masked(tmp_path)
    for rank in ranks:
        assert_same_gradients(rank["masked"]["gradients"], expected["gradients"])
    assert_same_weights(ranks[0]["masked"]["weights"], ranks[1]["masked"]["weights"])


def test_ranks_have_one_importance(ranks: list[dict[str, Any]]) -> None:
    left, right = (rank["measured"] for rank in ranks)
    assert left["importance"].keys() == right["importance"].keys()
    assert len(left["importance"]) == 7
    for unit, values in left["importance"].items():
        assert torch.equal(values, right["importance"][unit])
        assert float(values.max()) > 0
    assert_same_weights(left["weights"], right["weights"])


def test_resume_is_exact_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        found = [key for key in rank if key.startswith("resume/")]
        assert len(found) == 3
        for key in found:
            assert_same_weights(rank[key]["weights"], rank["measured"]["weights"])
            for unit, values in rank["measured"]["importance"].items():
                assert torch.equal(rank[key]["importance"][unit], values)
