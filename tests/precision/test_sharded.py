"""Quantised bases with adapters on two processes equal one process on the joined batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_peft.strategies.sharding import shards_integers
from tests.distributed.launch import launch
from tests.precision import sharded_probe as probe

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("sharded")
    launch(Path(probe.__file__), str(out))
    return [*torch.load(out / "results.pt", weights_only=False), {"files": out}]


def single(mode: str, where: str = "init", steps: int = probe.STEPS, **settings: Any) -> dict[str, Any]:
    module = probe.Recorded(where)
    probe.run(module, mode, "auto", devices=1, steps=steps, **settings)
    return probe.result(module)


def assert_equal(got: dict[str, Any], expected: dict[str, Any], first: int = 0) -> None:
    assert got["layers"] == expected["layers"]
    assert len(got["layers"]) == 14
    assert len(got["grads"]) == len(expected["grads"]) - first > 0
    for mine, other in zip(got["grads"], expected["grads"][first:], strict=True):
        assert mine.keys() == other.keys()
        assert len(mine) == 28
        for name, grad in other.items():
            torch.testing.assert_close(mine[name], grad, rtol=0, atol=1e-6)
    for name, value in expected["adapters"].items():
        torch.testing.assert_close(got["adapters"][name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("ddp", "nf4"),
        ("ddp int8", "int8"),
        ("stock", "nf4"),
        ("fsdp2 init", "nf4"),
        ("fsdp2 configure", "nf4-dq"),
    ],
)
def test_gradients_of_every_step_equal_one_process(name: str, mode: str, ranks: list[dict[str, Any]]) -> None:
    expected = single(mode)
    for rank in ranks[:2]:
        assert_equal(rank[name], expected)
    held = [rank[name]["codes"] for rank in ranks[:2]]
    if name.startswith("ddp") or not shards_integers():
        assert held == [expected["codes"]] * 2
    else:
        assert sum(held) == expected["codes"]  # the base itself is sharded
        assert held[0] == held[1]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("method", list(probe.METHODS))
def test_peqa_and_low_bit_adapters_equal_one_process(method: str, strategy: str, ranks: list[dict[str, Any]]) -> None:
    module = probe.make(method)
    probe.run(module, None, "auto", devices=1, callbacks=probe.METHODS[method]())
    for rank in ranks[:2]:
        got = rank[f"{method} {strategy}"]
        assert len(got["grads"]) == len(module.grads) == probe.STEPS
        for mine, other in zip(got["grads"], module.grads, strict=True):
            assert mine.keys() == other.keys()
            assert len(mine) == (28 if method == "low_bit" else 14)
            for name, grad in other.items():
                # the gradient of a scale is a sum of products with integers up to 15, which cancel in part
                size = (4.0 if method == "peqa" else 1.0) * max(1.0, float(grad.abs().max()))
                torch.testing.assert_close(mine[name], grad, rtol=0, atol=1e-6 * size)


@pytest.mark.parametrize("sharded_files", [True, False])
@pytest.mark.parametrize("name", ["fsdp2", "stock"])
def test_quantised_bases_resume_sharded(name: str, sharded_files: bool, ranks: list[dict[str, Any]]) -> None:
    where, settings = ("bare", probe.qlora) if name == "fsdp2" else ("quantize_first", probe.all_adapters)
    expected = single("nf4", where, steps=4, **settings())
    half = single("nf4", where, steps=2, **settings())
    path = ranks[2]["files"] / f"half-{name}-{sharded_files}.ckpt"
    if sharded_files:
        from torch.distributed.checkpoint import FileSystemReader

        metadata = FileSystemReader(path).read_metadata().state_dict_metadata
        keys = [key for key in metadata if key.startswith("state_dict")]
    else:
        keys = list(torch.load(path, weights_only=False)["state_dict"])
    assert not [key for key in keys if "base_layer.weight" in key]
    assert len([key for key in keys if "lora_" in key]) == 28
    for rank in ranks[:2]:
        assert_equal(rank[f"resumed {name} {sharded_files}"]["half"], half)
        assert_equal(rank[f"resumed {name} {sharded_files}"], expected, first=2)


def test_mistakes_are_said_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks[:2]:
        assert "are sharded already" in rank["late"]
        assert "before fully_shard" in rank["late"]
        assert rank["int8"].startswith("UnsupportedStrategy: FSDP2Strategy cannot shard 8-bit weights")
