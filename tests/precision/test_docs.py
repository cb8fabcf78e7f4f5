"""The numbers of the guide are those of the result file, and its snippets are right."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import quantisation
from lightning_peft import QLoRA, QuantizedPrecision

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "quantisation.md").read_text(encoding="utf-8")
RESULT = json.loads((ROOT / "benchmarks" / "results" / "quantisation.json").read_text())


def rows(columns: int) -> list[list[str]]:
    lines = [line.strip("| ").split(" | ") for line in GUIDE.splitlines() if line.startswith("| ")]
    return [line for line in lines if len(line) == columns]


def test_modes_are_as_measured() -> None:
    found = [row for row in rows(4) if row[0].startswith("`") and row[2][0].isdigit()]
    assert len(found) == 5
    for name, backends, bits, error in found:
        measured = [row for row in RESULT["bases"] if row["mode"] == name.strip("`")]
        assert measured
        for row in measured:
            if row["backend"] in backends:
                assert float(bits) == pytest.approx(row["bits"], abs=0.011)
                assert float(error) == pytest.approx(row["error"], abs=5e-4)


def test_integers_are_as_measured() -> None:
    found = [row for row in rows(5) if row[0].isdigit()]
    assert len(found) == 5
    for bits, per, stored, fitted, ranged in found:
        group = None if per == "output" else int(per.split()[0])
        both = {r["fit"]: r for r in RESULT["integers"] if r["bits"] == int(bits) and r["group_size"] == group}
        assert float(stored) == pytest.approx(both["error"]["stored_bits"], abs=0.006)
        assert float(fitted) == pytest.approx(both["error"]["error"], abs=6e-4)
        assert float(ranged) == pytest.approx(both["range"]["error"], abs=6e-4)


def test_sentences_are_as_measured() -> None:
    bases = {(row["backend"], row["mode"]): row for row in RESULT["bases"]}
    lost = {mode: bases["bitsandbytes", mode]["adapter_lost_by_merge_in_mode"] for mode in ("nf4", "int8")}
    assert f"error of {lost['nf4']:.2f} times the adapter, into `int8` {lost['int8']:.2f}" in GUIDE
    assert all(row["adapter_lost_by_dequantised_merge"] < 2e-6 for row in RESULT["bases"])
    sizes = {row["bits"]: row["stored_bytes"] for row in RESULT["adapters"] if row["codebook"] == "median"}
    for bits in (1, 2, 4):
        assert f"{sizes[bits]:,}" in GUIDE
    assert f"{RESULT['adapters'][0]['float32_bytes']:,}" in GUIDE


@pytest.mark.filterwarnings("ignore:.*tensorboardX:UserWarning")
def test_snippets_compile_and_the_first_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        compile(block, "guide", "exec")
    scope: dict[str, object] = {}
    exec(blocks[0], scope)
    trainer = scope["trainer"]
    assert isinstance(trainer.precision_plugin, QuantizedPrecision)  # pyright: ignore[reportAttributeAccessIssue]
    assert isinstance(trainer.callbacks[0], QLoRA)  # pyright: ignore[reportAttributeAccessIssue]


def test_benchmark_runs(tmp_path: Path) -> None:
    quantisation.main(["--tiny", "--output", str(tmp_path / "result.json")])
    result = json.loads((tmp_path / "result.json").read_text())
    assert [row["mode"] for row in result["bases"]] == [row["mode"] for row in RESULT["bases"]]
