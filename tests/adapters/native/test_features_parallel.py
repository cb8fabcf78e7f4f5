"""Adapters that change features have the gradients of one process on two, or are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.adapters.native import features_probe
from tests.adapters.native.features_probe import METHODS
from tests.adapters.parallel_probe import fit
from tests.contract.harness import assert_same_weights
from tests.distributed.launch import launch

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # peft
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("features")
    launch(Path(features_probe.__file__), str(out))
    return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", METHODS)
def test_gradients_equal_one_process(name: str, ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    expected = fit(tmp_path, METHODS[name]())
    for form in ("ddp", "fsdp2"):
        for rank in ranks:
            result = rank[f"{name}/{form}"]
            if name == "compacter" and form == "fsdp2":
                assert result.startswith("UnsupportedStrategy: Compacter's shared matrices are used in every block")
                continue
            assert result["trainable"] == expected["trainable"]
            assert result["steps"] == expected["steps"] > 0
            for step, (ours, theirs) in enumerate(zip(result["gradients"], expected["gradients"], strict=True)):
                assert ours.keys() == theirs.keys()
                for key in ours:
                    where = f"{form}, step {step}, {key}: "
                    torch.testing.assert_close(ours[key], theirs[key], rtol=1e-6, atol=1e-6, msg=where.__add__)
    assert_same_weights(ranks[0][f"{name}/ddp"]["weights"], ranks[1][f"{name}/ddp"]["weights"])
