"""Run by ``test_ist.py`` on two processes: IST with data of each rank's own."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_peft import IST
from tests.contract.harness import trainer, weights
from tests.distributed.ddp_probe import MODEL, Quiet, loader


class Batches(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(batch[0].tolist())


def fit(out: Path, score_on: Any, **kw: Any) -> dict[str, Any]:
    torch.manual_seed(100)
    module, batches = Quiet(MODEL), Batches()
    samples = None if score_on == "batch" else 6
    method = IST(0.5, score_period_steps=2, scope="blocks", score_on=score_on, score_samples=samples)
    run = trainer(
        out, [method, batches], limit_val_batches=0, use_distributed_sampler=False, accumulate_grad_batches=1, **kw
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.fit(module, loader(kw.get("devices", 1)))
    return {
        "weights": weights(module),
        "importance": method.importance,
        "batches": batches.seen,
        "history": [(step, sorted(names)) for step, names in method.history],
    }


def main(out: Path) -> None:
    results = {score_on: fit(out, score_on, devices=2, strategy="ddp") for score_on in ("batch", "train")}
    torch.save(results, out / f"rank{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
