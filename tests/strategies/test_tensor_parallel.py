"""FSDP2Strategy with tensor parallelism on four processes against one process on the joined batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.launch import launch
from tests.strategies import fsdp2_probe as base
from tests.strategies import tensor_parallel_probe as probe

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore::UserWarning")]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("tensor_parallel")
    launch(Path(probe.__file__), str(out), num_processes=4)
    return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in range(4)]


def assert_same(ours: dict[str, Any], theirs: dict[str, Any], skip: int = 0) -> None:
    assert len(ours["gradients"]) == len(theirs["gradients"]) - skip > 0
    torch.testing.assert_close(ours["gradients"], theirs["gradients"][skip:], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours["weights"], theirs["weights"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", probe.CASES)
def test_gradients_equal_one_process(name: str, ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    make, _, kw = probe.CASES[name]
    single = base.fit(tmp_path, "auto", make, **kw)
    for rank in ranks:
        assert_same(rank[name], single)


@pytest.mark.parametrize("form", ["sharded", "full"])
def test_checkpoints(form: str, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        expected = rank[form]
        assert all(torch.equal(w, rank[f"{form}/resumed"]["weights"][n]) for n, w in expected["weights"].items())
        assert_same(rank[f"{form}/data only"], expected, skip=2)  # no tensor parallelism any more


def test_pieces_are_cut_both_ways(ranks: list[dict[str, Any]]) -> None:
    whole = {name: p.numel() for name, p in probe.CASES["llama"][0]().named_parameters()}
    for rank in ranks:
        for name in ("model.model.layers.0.self_attn.q_proj.weight", "model.model.layers.1.mlp.down_proj.weight"):
            assert rank["pieces"][name] == whole[name] / 4
        assert rank["pieces"]["model.model.norm.weight"] == whole["model.model.norm.weight"] / 2


def test_mistakes(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "brings no tensor-parallel plan" in rank["no plan"]
        assert "2 num_key_value_heads" in rank["heads"]
        assert "'model.7' matches no module. Did you mean 'model." in rank["nothing"]
        assert "Did you mean 'colwise'" in rank["style"]
        assert rank["layer"].startswith("UnsupportedStrategy: FSDP2Strategy: model.1 is a Tanh")
