"""Two processes compute what one computes on the joined batch: the step, and every metric of an odd split."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed.launch import launch
from tests.models import ddp_probe

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore:The .* does not have many workers")]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ddp")
    launch(Path(ddp_probe.__file__), str(folder), "2")
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", ddp_probe.CASES)
def test_two_processes_equal_one_on_the_joined_batch(name: str, two_processes: list[dict], tmp_path: Path) -> None:
    torch.manual_seed(0)
    start = ddp_probe.CASES[name][0]().state_dict()
    state, metrics = ddp_probe.step_and_validate(name, tmp_path, 1)
    assert any((state[key] - start[key]).abs().max() > 1e-4 for key in state)
    for rank_state, rank_metrics in (ranks[name] for ranks in two_processes):
        for key, value in state.items():
            torch.testing.assert_close(rank_state[key], value, rtol=0, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")
        # the contrastive loss of an evaluation batch depends on which pairs were loaded together
        skip = {"before val/loss", "val/loss"} if name == "text_embedding" else set()
        assert set(rank_metrics) == set(metrics)
        for key in set(metrics) - skip:
            assert rank_metrics[key] == pytest.approx(metrics[key], rel=1e-5), key
