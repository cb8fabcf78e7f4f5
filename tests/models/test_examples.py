"""The examples run as a user runs them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_peft import CausalLM

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(script: str, *arguments: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def test_existing_module_learns_the_digits(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    found = re.search(r"test accuracy: ([\d.]+)", run("existing_module.py", cwd=tmp_path))
    assert found is not None
    assert float(found[1]) > 0.93


def test_llm_finetune_learns_and_writes_a_folder(llama_folder: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"w{i % 20} w{i % 7}", "response": f"w{i % 20 + 1}"} for i in range(60)]
    (tmp_path / "my.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    arguments = [f"--model={llama_folder}", "--data=my.jsonl", "--epochs=12", "--lr=1e-2", "--num-layers=1"]
    out = run("llm_finetune.py", *arguments, "--period-steps=3", cwd=tmp_path)
    before, after = (float(value) for value in re.findall(r"val/loss\s+│\s+([\d.]+)", out))
    assert after < 0.8 * before
    assert CausalLM(str(tmp_path / "finetuned")).tokenizer.pad_token is not None
