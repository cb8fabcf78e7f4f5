"""The benchmarks run; what they count (not what they time) is checked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import step_cost


@pytest.mark.filterwarnings("ignore")
def test_step_cost_counts(tmp_path: Path) -> None:
    output = tmp_path / "step_cost.json"
    step_cost.main(["--rounds", "2", "--tiny", "--output", str(output)])
    result = json.loads(output.read_text())
    bytes_after = result["optimizer_bytes_after_switches"]
    dropped = next(values for name, values in bytes_after.items() if "drop" in name)
    kept = next(values for name, values in bytes_after.items() if "keep" in name)
    assert len(dropped) == len(kept) == 13
    assert len(set(dropped)) == 1
    assert kept[-1] > kept[0]
