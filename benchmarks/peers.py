"""Shapes of other people's methods, written plainly here to be measured beside this package's. Nothing is copied."""

from __future__ import annotations

import random
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

__all__ = ["KeptStateLISA"]


class KeptStateLISA(Callback):
    """LISA in the shape of LMFlow's public callback: ``requires_grad`` is toggled, the optimizer is left alone.

    What it costs is what this shape costs: moments of blocks that rest stay in the optimizer, so that its state grows
    towards that of full fine-tuning.

    Args:
        num_layers: Blocks that train at a time.
        period_steps: Optimizer steps between draws.
        seed: Seed of the draws.
    """

    def __init__(self, num_layers: int = 2, period_steps: int = 20, seed: int = 0) -> None:
        self.num_layers, self.period_steps = num_layers, period_steps
        self.history: list[tuple[int, frozenset[str]]] = []
        self._random = random.Random(seed)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Freeze all blocks but a few."""
        if trainer.global_step % self.period_steps:
            return
        decoder: Any = pl_module.model
        blocks = decoder.model.layers
        chosen = self._random.sample(range(len(blocks)), self.num_layers)
        for index, block in enumerate(blocks):
            block.requires_grad_(index in chosen)
        trained = frozenset(name for name, parameter in pl_module.named_parameters() if parameter.requires_grad)
        self.history.append((trainer.global_step, trained))
