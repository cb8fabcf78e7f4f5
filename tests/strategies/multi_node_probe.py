"""Run by ``test_multi_node.py`` as two nodes of two processes: FSDP2 and LISA, in Python and on the command line."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from lightning_peft import LISA, FSDP2Strategy
from lightning_peft.cli import main as command_line
from tests.strategies import fsdp2_probe as base

CONFIGS = Path(__file__).parents[2] / "configs"


def schedule() -> LISA:
    return LISA(num_layers=1, period_steps=1)


def fit(out: Path, strategy: Any, *callbacks: Any, **kw: Any) -> dict[str, Any]:
    method = schedule()
    result = base.fit(out, strategy, base.Language, method, *callbacks, **kw)
    return {**result, "history": [(step, sorted(names)) for step, names in method.history]}


def recipe(out: Path, *more: str) -> int:
    """The many-nodes recipe with a tiny model, on the CPU."""
    overrides = {
        "model.model_name_or_path": out / "llama",
        "data.train_path": out / "pairs.jsonl",
        "data.max_length": 16,
        "data.batch_size": 2,
        "data.val_fraction": 0.25,
        "trainer.accelerator": "cpu",
        "trainer.devices": 2,
        "trainer.default_root_dir": out / "run",
        "trainer.logger": "false",
        "trainer.enable_progress_bar": "false",
        "trainer.callbacks.dirpath": out / "run",
        "trainer.callbacks.every_n_train_steps": 1,
        "method.period_steps": 1,
    }
    options = [f"--{key}={value}" for key, value in overrides.items()]
    return command_line(["fit", f"--config={CONFIGS / 'recipes/many_nodes.yaml'}", *options, *more])


def main(out: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    results: dict[str, Any] = {"sharded everywhere": fit(out, "fsdp2", base.Save(out / "lisa.ckpt"))}
    results["resumed"] = fit(out, "fsdp2", ckpt=out / "lisa.ckpt", seed=6)
    results["sharded within a node"] = fit(out, FSDP2Strategy(num_replicas=2))
    results["recipe"] = recipe(out, "--trainer.max_steps=2")
    hybrid = f"--config={CONFIGS / 'strategies/fsdp2_hybrid.yaml'}"
    results["recipe, hybrid"] = recipe(out, hybrid, "--trainer.max_steps=3", "--ckpt_path=last")
    torch.save(results, out / f"rank{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
