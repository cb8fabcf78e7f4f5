"""Methods that need the loop: two processes equal one on the joined batch, drop the same, and resume exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.adapters import drivers_probe
from tests.adapters.drivers_probe import METHODS, RESUMED, SHARDED, two_tasks
from tests.adapters.parallel_probe import fit
from tests.contract.harness import assert_same_weights
from tests.distributed.launch import launch

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("drivers")
    launch(Path(drivers_probe.__file__), str(out))
    return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", [name for name in METHODS if name != "poly"])
def test_equals_one_process(name: str, ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    expected = fit(tmp_path, METHODS[name]())
    forms = ["ddp", "fsdp2"] if name in SHARDED else ["ddp"]
    for form in forms:
        for rank in ranks:
            result = rank[f"{name}/{form}"]
            assert result["trainable"] == expected["trainable"]
            assert [set(step) for step in result["gradients"]] == [set(step) for step in expected["gradients"]]
            torch.testing.assert_close(result["gradients"], expected["gradients"], rtol=1e-4, atol=2e-6)
            torch.testing.assert_close(result["weights"], expected["weights"], rtol=1e-3, atol=2e-4)
        assert_same_weights(ranks[0][f"{name}/{form}"]["weights"], ranks[1][f"{name}/{form}"]["weights"])
    if name == "adamss":
        assert [len(step) for step in expected["gradients"]] == [16, 16, 16, 12, 12, 6]


def test_poly_has_the_tasks_of_each_process(ranks: list[dict[str, Any]]) -> None:
    for form in ("ddp", "fsdp2"):
        first, second = (rank[f"poly/{form}"] for rank in ranks)
        assert_same_weights(first["weights"], second["weights"])
        assert any("poly_router" in name for name in first["trainable"])


def test_lae_follows_on_every_process(ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    expected = two_tasks(tmp_path)
    assert_same_weights(ranks[0]["lae"], ranks[1]["lae"])
    torch.testing.assert_close(ranks[0]["lae"], expected, rtol=1e-3, atol=2e-4)
    online = {name.replace("_offline", "") for name in expected if "_offline" in name}
    assert len(online) == 8
    assert all(not torch.equal(expected[name], expected[name.replace("default", "default_offline")]) for name in online)


@pytest.mark.parametrize("name", RESUMED)
def test_resume_is_exact(name: str, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert_same_weights(rank[f"{name}/resumed"]["weights"], rank[f"{name}/expected"]["weights"])


@pytest.mark.parametrize("name", ["pego", "ba_lora", "adamss"])
def test_refused_where_it_would_see_pieces(name: str, ranks: list[dict[str, Any]]) -> None:
    assert all("UnsupportedStrategy" in rank[f"{name}/fsdp2"] for rank in ranks)
