"""The benchmarks run; what they count (not what they time) is checked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import method_flops, step_cost
from benchmarks.harness import DecoderShape
from lightning_peft.cli.methods import method_classes


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


TINY = DecoderShape(num_layers=3, width=16, ffn_width=24, num_heads=2, vocab_size=24, batch_size=1, num_tokens=6)
LAYERS = "lightning_peft.methods.layers."
RESULTS = Path(method_flops.__file__).parent / "results" / "method_flops.json"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["GreenTrainer(0.5)", "RandomTuning(0.1)", "DropBP(0.5)", "BAdam, mean over blocks"])
def test_flops_of_methods_are_the_arithmetics(name: str) -> None:
    """To the last product, for selections that cut through blocks in different ways."""
    row = method_flops.rows()[name]
    for flops, trained in method_flops.measure([row.make()], 3, TINY):
        assert trained
        assert flops == method_flops.arithmetic(trained, TINY, row.skips)


def test_every_method_has_a_row_in_the_results() -> None:
    """As measured as calculated, and as an independent calculation has it where there is one."""
    rows = {row["method"]: row for row in json.loads(RESULTS.read_text())["rows"]}
    assert list(rows) == list(method_flops.rows())
    classes = {name: cls for name, cls in method_classes().items() if cls.__module__.startswith(LAYERS)}
    layers = classes.keys() - {"SearchedSubset"}  # which trains what it is told
    assert len(layers) >= 18
    for method in layers:
        assert any(name.startswith(method) for name in rows), method
    for row in rows.values():
        assert row["ratio"] == pytest.approx(row["arithmetic"], abs=1e-6)
        assert 1 / 3 < row["lowest"] <= row["ratio"] <= row["highest"] <= 1 + 1e-6
        if row["anchor"] is not None:
            assert row["ratio"] == pytest.approx(row["anchor"], abs=6e-4)
    assert rows["GreenTrainer(0.5)"]["highest"] <= 0.5
    assert rows["GreenTrainer(0.7)"]["highest"] <= 0.7
