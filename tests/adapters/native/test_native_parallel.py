"""Native adapters on two processes: one plan on all ranks, gradients of one process on the joined batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.adapters.native import native_probe
from tests.adapters.native.native_probe import METHODS, OTHERS, STRATEGIES
from tests.adapters.parallel_probe import fit
from tests.contract.harness import assert_same_weights
from tests.distributed.launch import launch

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("native")
    launch(Path(native_probe.__file__), str(out))
    return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def assert_same_gradients(ours: Any, theirs: Any) -> None:
    for mine, expected in zip(ours["gradients"], theirs["gradients"], strict=True):
        assert mine.keys() == expected.keys()
        for key in mine:
            torch.testing.assert_close(mine[key], expected[key], rtol=1e-4, atol=1e-5, msg=f"{key}: ".__add__)


@pytest.mark.parametrize("name", METHODS)
def test_ranks_grow_alike(name: str, ranks: list[dict[str, Any]]) -> None:
    first, second = (rank[name] for rank in ranks)
    assert first["ranks"] == second["ranks"]
    assert first["history"] == second["history"]
    assert len(set(first["ranks"].values())) > 1
    assert_same_weights(first["weights"], second["weights"])


def test_growth_from_weights_is_that_of_one_process(ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    one = native_probe.run(tmp_path, "triadapt_lora")
    assert one["ranks"] == ranks[0]["triadapt_lora"]["ranks"]
    assert_same_gradients(ranks[0]["triadapt_lora"], one)


def test_growth_resumes_exactly_and_is_refused_where_weights_are_cut(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        whole, resumed = rank["whole"], rank["resumed"]
        assert resumed["ranks"] == whole["ranks"]
        assert resumed["history"] == whole["history"]
        assert_same_weights(resumed["weights"], whole["weights"])
        assert "UnsupportedStrategy" in rank["fsdp2"]["error"]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", OTHERS)
def test_gradients_equal_one_process(name: str, strategy: str, ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    expected = fit(tmp_path, [OTHERS[name]()])
    for rank in ranks:
        assert rank[f"{name}/{strategy}"]["trainable"] == expected["trainable"]
        assert_same_gradients(rank[f"{name}/{strategy}"], expected)
