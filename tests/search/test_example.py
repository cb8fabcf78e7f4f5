"""The example runs as a user runs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

EXAMPLE = Path(__file__).parents[2] / "examples" / "search.py"


def test_search_example(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "--steps=20", "--trials=4", "--storage=sqlite:///search.db"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "memorised" in done.stdout
    found = re.search(r"trained on: ([\d.]+)", done.stdout)
    assert found is not None
    assert float(found[1]) < 1.0  # a guess costs 3.2
    (callback,) = yaml.safe_load((tmp_path / "found.yaml").read_text())["trainer"]["callbacks+"]
    assert callback["class_path"] == "SearchedSubset"
    assert callback["init_args"]["always"] == ["embeddings", "head", "norms"]
    assert (tmp_path / "search.db").exists()
