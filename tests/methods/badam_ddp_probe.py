"""Run by ``test_badam.py`` on two processes: BAdam on bfloat16 weights under DDP, and its resume."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_peft import BAdam
from tests.contract.harness import trainer, weights
from tests.distributed.ddp_probe import MODEL, Quiet, SaveEveryBatch, loader

POSITIONS = (2, 3, 7)


class Masters(pl.Callback):
    def __init__(self, method: BAdam) -> None:
        self.method = method

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        masters = self.method.method_state()["masters"]
        self.masters = {name: entry["master"].clone() for name, entry in masters.items()}


def fit(out: Path, *callbacks: pl.Callback, ckpt: Path | None = None, **kw: Any) -> dict[str, Any]:
    torch.manual_seed(100 if ckpt is None else 7)
    method = BAdam("random", period_steps=4, seed=1)
    module, last = Quiet(MODEL), Masters(method)
    run = trainer(
        out,
        [method, last, *callbacks],
        limit_val_batches=0,
        use_distributed_sampler=False,
        precision="bf16-true",
        accumulate_grad_batches=1,
        **kw,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.fit(module, loader(kw.get("devices", 1)), ckpt_path=ckpt)
    return {
        "weights": weights(module),
        "masters": last.masters,
        "history": [(step, sorted(names)) for step, names in method.history],
    }


def main(out: Path) -> None:
    arguments: dict[str, Any] = {"devices": 2, "strategy": "ddp"}
    results = fit(out, SaveEveryBatch(out), **arguments)
    for position in POSITIONS:
        results[f"resumed/{position}"] = fit(out, ckpt=out / f"{position:03d}.ckpt", **arguments)
    torch.save(results, out / f"rank{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
