"""A run that writes a checkpoint in every hook, and the runs that resume from each: shared by the loader's tests.

As a script it does the same under ``strategy="ddp"`` with two processes and prints what each rank saw as JSON.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from lightning_peft.data.loader import ResumableDataLoader


class Recorder(pl.LightningModule):
    """Writes down the sample ids of every batch it is trained on."""

    def __init__(self, *, count_steps: bool = False) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.count_steps = count_steps
        self.seen: list[list[int]] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        batch = batch["input_ids"] if isinstance(batch, dict) else batch
        self.seen.append(batch.tolist())
        return (self.weight * batch.float().mean()).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.count_steps:  # what every learning-rate schedule over the whole run asks for
            assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Checkpoints(pl.Callback):
    """Saves a checkpoint in every hook and the number of batches whose training was over by then."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.points: list[tuple[str, int, str]] = []

    def _save(self, trainer: pl.Trainer, hook: str) -> None:
        if trainer.sanity_checking:
            return
        path = str(self.folder / f"{len(self.points)}-{hook}.ckpt")
        module: Any = trainer.lightning_module
        trainer.save_checkpoint(path)
        self.points.append((hook, len(module.seen) - (hook == "before_step"), path))

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._save(trainer, "train_start")

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._save(trainer, "epoch_start")

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._save(trainer, "before_forward")

    def on_before_backward(self, trainer: pl.Trainer, *_: Any) -> None:
        self._save(trainer, "before_step")

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._save(trainer, "batch_end")

    def on_validation_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._save(trainer, "validation_start")

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._save(trainer, "mid_validation")

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._save(trainer, "validation_end")

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._save(trainer, "epoch_end")


def fit(
    options: dict[str, Any],
    *,
    data: pl.LightningDataModule | None = None,
    num_workers: int = 0,
    checkpoints: Checkpoints | None = None,
    ckpt_path: str | None = None,
    count_steps: bool = False,
    num_samples: int = 10,
) -> list[list[int]]:
    """Train once and return the sample ids of every batch."""
    defaults: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
    defaults |= {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(**defaults | options, callbacks=[checkpoints] if checkpoints else None)
    module = Recorder(count_steps=count_steps)

    if data is None:
        train = ResumableDataLoader(range(num_samples), batch_size=3, seed=5, num_workers=num_workers, trainer=trainer)
        validation = DataLoader(torch.arange(4), batch_size=2)  # pyright: ignore[reportArgumentType]
        trainer.fit(module, train, validation, ckpt_path=ckpt_path, weights_only=True)
    else:
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return module.seen


def main(folder: Path) -> None:
    """Train and resume with two processes; rank by rank, what was seen goes to a file."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    options = {"strategy": "ddp", "devices": 2, "max_epochs": 2, "accumulate_grad_batches": 2}
    checkpoints = Checkpoints(folder)
    whole = fit(options, checkpoints=checkpoints, num_samples=13)
    rank = torch.distributed.get_rank()
    resumed = [
        (hook, done, fit(options, ckpt_path=path, num_samples=13))
        for hook, done, path in checkpoints.points
        if hook in ("before_step", "batch_end", "epoch_end")
    ]
    (folder / f"rank{rank}.json").write_text(json.dumps({"whole": whole, "resumed": resumed}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
