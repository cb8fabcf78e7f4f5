"""FSDP2Strategy on two processes against one process on the joined batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.launch import launch
from tests.strategies import fsdp2_probe as probe

pytestmark = [
    pytest.mark.distributed,
    # Lightning and transformers, in this process's run of the same fits
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
LOWER_PRECISION = {"bf16": 0.05, "bf16, tied": 0.05, "bf16 gathered in float32": 0.02, "bf16 true": 0.05}
BLOCKS = {"llama": 3, "vectors": 4, "named blocks": 6, "sharded by the user": 2, "tied": 3, "tied blocks": 2}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("fsdp2")
    launch(Path(probe.__file__), "cases", str(out))
    return [torch.load(out / f"cases_rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", probe.CASES)
def test_gradients_equal_one_process_on_the_joined_batch(
    name: str, ranks: list[dict[str, Any]], tmp_path: Path
) -> None:
    case = probe.CASES[name]
    if name == "bf16 by policy":  # one process has no policy: plain bfloat16 compute is compared with float32
        case = probe.CASES["vectors"]
    single = case.run(tmp_path, single=True)
    for rank in ranks:
        found = rank[name]
        assert len(found["gradients"]) == len(single["gradients"]) > 0
        for step, (ours, theirs) in enumerate(zip(found["gradients"], single["gradients"], strict=True)):
            assert ours.keys() == theirs.keys()
            assert len(ours) > 1
            tolerance = LOWER_PRECISION.get(name, 0.05 if name == "bf16 by policy" else 1e-6)
            for key in ours:
                torch.testing.assert_close(
                    ours[key], theirs[key], rtol=tolerance, atol=tolerance, msg=f"step {step}, {key}: ".__add__
                )
        if "outside" in single:
            torch.testing.assert_close(found["outside"], single["outside"], rtol=1e-5, atol=1e-5)
        tolerance = 1e-5 if name not in (*LOWER_PRECISION, "bf16 by policy") else 0.05
        torch.testing.assert_close(found["weights"], single["weights"], rtol=tolerance, atol=tolerance)
    for key, weight in ranks[0][name]["weights"].items():
        assert torch.equal(weight, ranks[1][name]["weights"][key]), key


@pytest.mark.parametrize("name", BLOCKS)
def test_groups(name: str, ranks: list[dict[str, Any]]) -> None:
    groups = ranks[0][name]["groups"]
    assert groups[0] == ""  # the LightningModule itself holds the rest
    assert len(groups) == BLOCKS[name] + 1
    assert all("." in group for group in groups[1:])


def test_bfloat16_is_what_was_computed_in(ranks: list[dict[str, Any]]) -> None:
    for name, exact in (("bf16", "llama"), ("bf16 by policy", "vectors"), ("bf16", "bf16 gathered in float32")):
        pairs = zip(ranks[0][name]["gradients"][0].values(), ranks[0][exact]["gradients"][0].values(), strict=True)
        assert max((a - b).abs().max().item() for a, b in pairs) > 1e-5
    assert {w.dtype for w in ranks[0]["bf16"]["weights"].values()} == {torch.float32}
    assert {g.dtype for g in ranks[0]["bf16"]["gradients"][0].values()} == {torch.float32}
    assert {w.dtype for w in ranks[0]["bf16 true"]["weights"].values()} == {torch.bfloat16}
