"""Adapters on two processes equal one process on the joined batch, and resume exactly from files without the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.adapters import parallel_probe
from tests.adapters.parallel_probe import METHODS, STRATEGIES
from tests.contract.harness import assert_same_weights
from tests.distributed.launch import launch

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("adapters")
    launch(Path(parallel_probe.__file__), str(out))
    return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("form", [form for form in STRATEGIES if form != "fsdp2/full"])
@pytest.mark.parametrize("name", METHODS)
def test_gradients_equal_one_process(name: str, form: str, ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    expected = parallel_probe.fit(tmp_path, METHODS[name]())
    for rank in ranks:
        result = rank[f"{name}/{form}"]
        assert result["trainable"] == expected["trainable"]
        assert result["steps"] == expected["steps"]
        for step, (ours, theirs) in enumerate(zip(result["gradients"], expected["gradients"], strict=True)):
            assert ours.keys() == theirs.keys()
            for key in ours:
                where = f"step {step}, {key}: "
                torch.testing.assert_close(ours[key], theirs[key], rtol=1e-6, atol=1e-6, msg=where.__add__)
    assert_same_weights(ranks[0][f"{name}/{form}"]["weights"], ranks[1][f"{name}/{form}"]["weights"])


@pytest.mark.parametrize("form", STRATEGIES)
@pytest.mark.parametrize("name", METHODS)
def test_resume_is_exact(name: str, form: str, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        expected = rank[f"resume/{name}/{form}/expected"]
        assert_same_weights(rank[f"resume/{name}/{form}"]["weights"], expected["weights"])


def test_adalora_is_refused_where_it_would_see_pieces(ranks: list[dict[str, Any]]) -> None:
    assert all("UnsupportedStrategy" in rank["adalora"] for rank in ranks)
