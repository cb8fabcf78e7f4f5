"""What a method is shown of the run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningModule, Trainer

__all__ = ["Moment"]


@dataclass(frozen=True)
class Moment:
    """Where a run stands, right before the first micro-batch of an optimizer step.

    Args:
        trainer: The Trainer.
        pl_module: The user's module, unwrapped.
        batch: The micro-batch about to be trained on, on the device.
        batch_idx: Its index in the epoch.
        step: Optimizer steps done, on the method's clock.
        epoch: The epoch.
    """

    trainer: Trainer
    pl_module: LightningModule
    batch: Any
    batch_idx: int
    step: int
    epoch: int
