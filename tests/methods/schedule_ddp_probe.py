"""Run by ``test_schedule_ddp.py`` on two processes: each rank writes down histories, and its weights at every phase."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_peft import FinetuningSchedule
from tests.contract.harness import TinyModule, loader, trainer, weights

PHASES = {
    0: {"params": ["head"], "max_steps": 2, "lr": 0.05},
    1: {"params": ["*.3.*"], "lr": 0.05, "monitor": "val_loss", "patience": 1},
    2: {"params": ["blocks"], "freeze": ["head"], "max_steps": 3, "lr": 0.05},
    3: {"only": ["embeddings", "norms"], "lr": 0.05},
}


class PerRank(TinyModule):
    """Logs a metric that each rank has for itself: the ranks alone would leave the phase at different times."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        rank = self.trainer.global_rank
        # rank 0 stops improving at once, rank 1 only in the third look; their mean in the second
        values = {0: [1.0, 1.5, 2.0, 2.5], 1: [3.0, 2.6, 2.6, 2.6]}[rank]
        self.log("val_loss", torch.tensor(values[min(self.current_epoch, 3)]))


class AtPhases(pl.Callback):
    def __init__(self, method: FinetuningSchedule) -> None:
        self.method, self.phase = method, -1
        self.found: list[tuple[int, int, dict[str, torch.Tensor]]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if self.method.draw_index != self.phase:
            self.phase = self.method.draw_index
            self.found.append((self.phase, trainer.global_step, weights(pl_module)))


class SaveEveryBatch(pl.Callback):
    def __init__(self, directory: Path) -> None:
        self.directory, self.count = directory, 0

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.directory / f"{self.count:03d}.ckpt")
        self.count += 1


def fit(out: Path, *callbacks: pl.Callback, ckpt: Path | None = None) -> dict[str, Any]:
    rank = int(os.environ["RANK"])
    torch.manual_seed(100 + rank if ckpt is None else 7)
    method, module = FinetuningSchedule(PHASES), PerRank("gqa_decoder")
    at_phases = AtPhases(method)
    run = trainer(
        out,
        [method, at_phases, *callbacks],
        devices=2,
        strategy="ddp",
        max_epochs=4,
        limit_train_batches=5,
        use_distributed_sampler=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.fit(module, loader("gqa_decoder"), loader("gqa_decoder", shuffle=False), ckpt_path=ckpt)
    return {
        "phases": [(phase, step) for phase, step, _ in at_phases.found],
        "weights_at": [found for *_, found in at_phases.found],
        "weights": weights(module),
        "history": [(step, sorted(names)) for step, names in method.history],
    }


def main(out: Path) -> None:
    rank = int(os.environ["RANK"])
    directory = out / "checkpoints"
    results = {"expected": fit(out, SaveEveryBatch(directory))}
    for position in (2, 4, 7, 9, 12):
        results[f"resume/{position}"] = fit(out, ckpt=directory / f"{position:03d}.ckpt")
    torch.save(results, out / f"rank{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
