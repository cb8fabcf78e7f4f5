"""LISA: a few random blocks at a time, embeddings and head always.

Every ``period_steps`` optimizer steps, freeze all blocks but ``num_layers`` of them, drawn uniformly without
replacement; the embeddings, the head and the final norm train all the time (Pan et al. 2024, arXiv:2403.17919,
Algorithm 1).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from lightning_peft.core.draw import Draw
from lightning_peft.core.trainable import StatePolicy
from lightning_peft.errors import ConfigError
from lightning_peft.methods.base import MethodCallback

__all__ = ["LISA", "sample_blocks"]


def sample_blocks(num_blocks: int, num_active: int, generator: torch.Generator) -> list[int]:
    """Draw ``num_active`` of ``num_blocks`` block indices uniformly without replacement, in ascending order."""
    return sorted(torch.randperm(num_blocks, generator=generator)[:num_active].tolist())


def _is_count(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and float(value).is_integer() and value >= 1


class LISA(MethodCallback):
    """Train a few random blocks at a time, with embeddings and head always on (layerwise importance sampling).

    Memory falls with the gradients and optimizer state of the blocks that rest: with ``state="drop"`` the optimizer
    holds state for the always-on tensors and ``num_layers`` blocks, whatever the length of the run. A step costs less
    by the weight gradients of the resting blocks: 0.75 of full fine-tuning's FLOPs at 2 of 16 blocks. Back-propagation
    still passes through all blocks while the embeddings train; ``always=("head", "norms")`` lets it stop at the lowest
    active block.

    Use it to fine-tune all weights of a model whose full optimizer state does not fit.

    Args:
        num_layers: Blocks that train at a time (the paper's gamma), at least 1. More than there are means all.
        period_steps: Optimizer steps between draws (the paper's K), at least 1. Micro-batches do not count.
        scope: Which blocks to draw from: a role, paths or patterns.
        always: What trains all the time, outside the blocks. Each can be left out.
        state: What becomes of a resting block's optimizer state: ``"drop"`` (small, fresh moments at the next visit),
            ``"keep"`` (as the public code does, grows to full size), ``"offload"`` (to CPU memory and back).
        seed: Seed of the draws, the same on all ranks.

    Raises:
        ConfigError: If a number is out of range.

    Example:
        >>> from lightning_peft import LISA
        >>> LISA(num_layers=2, period_steps=20).describe()["method"]
        'LISA'

    Paper:
        R. Pan, X. Liu, S. Diao, R. Pi, J. Zhang, C. Han, T. Zhang: LISA: Layerwise Importance Sampling for
        Memory-Efficient Large Language Model Fine-Tuning, NeurIPS 2024, arXiv:2403.17919, Algorithm 1.

    Differs from the paper:
        The paper's experiments reset the state of all parameters at each draw, its public code never frees any;
        ``state="drop"`` frees that of resting blocks and keeps that of the always-on tensors. The norm after the last
        block trains all the time, as in the public code.
    """

    def __init__(
        self,
        num_layers: int = 2,
        period_steps: int = 20,
        scope: str | list[str] = "blocks",
        always: Sequence[str] = ("embeddings", "head", "norms"),
        state: StatePolicy = "drop",
        seed: int = 0,
    ) -> None:
        numbers = {"num_layers": num_layers, "period_steps": period_steps}
        wrong = ", ".join(f"{name}={value!r}" for name, value in numbers.items() if not _is_count(value))
        if wrong:
            raise ConfigError(f"LISA({wrong}): blocks and optimizer steps are whole numbers, at least 1.")
        super().__init__(scope=scope, always=always, redraw=period_steps, state=state, seed=seed)
        self.num_layers = int(num_layers)
        self.period_steps = int(period_steps)

    def select(self, draw: Draw) -> list[str]:
        """Draw the blocks that train now."""
        blocks = list(self.units)
        if self.num_layers > len(blocks) and draw.index == 0:
            warnings.warn(
                f"LISA(num_layers={self.num_layers}) on {len(blocks)} block(s): all of them train all the time.",
                stacklevel=2,
            )
        return [blocks[index] for index in sample_blocks(len(blocks), self.num_layers, draw.generator("blocks"))]
