"""LISA: a few random blocks at a time, embeddings and head always.

Every ``period_steps`` optimizer steps, freeze all blocks but ``num_layers`` of them, drawn uniformly without
replacement; the embeddings, the head and the final norm train all the time (Pan et al. 2024, arXiv:2403.17919,
Algorithm 1). Blocks may also be drawn by weight: by their share of outlier weights, as in OwLore (Li et al. 2024,
arXiv:2405.18380), by depth, or by weights of your own.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from typing_extensions import override

from lightning_peft.core.blocks import Structure
from lightning_peft.core.draw import Draw
from lightning_peft.core.trainable import StatePolicy
from lightning_peft.core.weighted import inclusion_probabilities, sample_weighted
from lightning_peft.errors import ConfigError, suggest
from lightning_peft.methods.arguments import is_number, is_whole
from lightning_peft.methods.base import MethodCallback
from lightning_peft.methods.moment import Moment
from lightning_peft.methods.outliers import outlier_fractions

__all__ = ["LISA", "Sampling", "sample_blocks"]

Sampling = Literal["uniform", "increasing", "decreasing", "outliers"]
"""Weights of blocks in the draw: equal, 1 to L or L to 1 from the first to the last block, or shares of outliers."""


def sample_blocks(num_blocks: int, num_active: int, generator: torch.Generator) -> list[int]:
    """Draw ``num_active`` of ``num_blocks`` block indices uniformly without replacement, in ascending order."""
    return sorted(torch.randperm(num_blocks, generator=generator)[:num_active].tolist())


class LISA(MethodCallback):
    """Train a few random blocks at a time, with embeddings and head always on (layerwise importance sampling).

    Memory falls with the gradients and optimizer state of the blocks that rest: with ``state="drop"`` the optimizer
    holds state for the always-on tensors and ``num_layers`` blocks, whatever the length of the run. A step costs less
    by the weight gradients of the resting blocks: 0.75 of full fine-tuning's FLOPs at 2 of 16 blocks. Back-propagation
    still passes through all blocks while the embeddings train; ``always=("head", "norms")`` lets it stop at the lowest
    active block.

    Use it to fine-tune all weights of a model whose full optimizer state does not fit.

    With ``torch.compile``, compile block by block (``for block in model.layers: block.compile()``): a resting and an
    active variant serve all blocks of a class. A model compiled as a whole would be compiled anew for each draw.

    Args:
        num_layers: Blocks that train at a time (the paper's gamma), at least 1. More than there are means all.
        period_steps: Optimizer steps between draws (the paper's K), at least 1. Micro-batches do not count.
        scope: Which blocks to draw from: a role, paths or patterns.
        always: What trains all the time, outside the blocks. Each can be left out.
        state: What becomes of a resting block's optimizer state: ``"drop"`` (small, fresh moments at the next visit),
            ``"keep"`` (as the public code does, grows to full size), ``"offload"`` (to CPU memory and back).
        seed: Seed of the draws, the same on all ranks.
        sampling: How likely each block is: ``"uniform"`` (LISA); in proportion to its share of outlier weights,
            ``"outliers"`` (OwLore), found by one forward pass over the first training batch; to its
            depth counted from 1 at the bottom, ``"increasing"``, or at the top, ``"decreasing"`` (OwLore's LISA-D);
            or to your own weights, one per block of the scope, at least ``num_layers`` of them positive.
        outlier_factor: A weight is an outlier if its magnitude times the norm of its inputs exceeds this many times
            the mean of its block (the paper's M).

    Raises:
        ConfigError: If a number is out of range, the weights do not fit the blocks, or fewer than ``num_layers``
            blocks have outliers.

    Example:
        >>> from lightning_peft import LISA
        >>> LISA(num_layers=2, period_steps=20).describe()["method"]
        'LISA'

    Paper:
        R. Pan, X. Liu, S. Diao, R. Pi, J. Zhang, C. Han, T. Zhang: LISA: Layerwise Importance Sampling for
        Memory-Efficient Large Language Model Fine-Tuning, NeurIPS 2024, arXiv:2403.17919, Algorithm 1. Weighted
        sampling: P. Li, L. Yin, X. Gao, S. Liu: OwLore: Outlier-weighed Layerwise Sampled Low-Rank Projection for
        Memory-Efficient LLM Fine-tuning, 2024, arXiv:2405.18380.

    Differs from the paper:
        The paper's experiments reset the state of all parameters at each draw, its public code never frees any;
        ``state="drop"`` frees that of resting blocks and keeps that of the always-on tensors. The norm after the last
        block trains all the time, as in the public code. Blocks are drawn by weight so that each trains in exactly its
        share of the draws; OwLore's successive draws without replacement give heavy blocks less than their share.
        OwLore's low-rank projection of gradients is another method and is not part of this one.
    """

    def __init__(
        self,
        num_layers: int = 2,
        period_steps: int = 20,
        scope: str | list[str] = "blocks",
        always: Sequence[str] = ("embeddings", "head", "norms"),
        state: StatePolicy = "drop",
        seed: int = 0,
        sampling: Sampling | list[float] = "uniform",
        outlier_factor: float = 13.0,
    ) -> None:
        numbers = {"num_layers": num_layers, "period_steps": period_steps}
        wrong = ", ".join(f"{name}={value!r}" for name, value in numbers.items() if not is_whole(value, least=1))
        if wrong:
            raise ConfigError(f"LISA({wrong}): blocks and optimizer steps are whole numbers, at least 1.")
        super().__init__(scope=scope, always=always, redraw=period_steps, state=state, seed=seed)
        self.num_layers = int(num_layers)
        self.period_steps = int(period_steps)
        self.sampling: Sampling | list[float] = _check_sampling(sampling)
        if not is_number(outlier_factor) or outlier_factor <= 0:
            raise ConfigError(f"LISA(outlier_factor={outlier_factor!r}): a number above 0.")
        self.outlier_factor = float(outlier_factor)
        self._inclusion: Tensor | None = None

    @override
    def make_units(self, structure: Structure, names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
        units = super().make_units(structure, names)
        if isinstance(self.sampling, list):
            self._check_weights(self.sampling, len(units))
        return units

    @property
    @override
    def needs_batch(self) -> bool:
        return self.sampling == "outliers"

    @property
    @override
    def needs_whole_parameters(self) -> bool:
        return self.sampling == "outliers"

    @override
    def observe(self, moment: Moment) -> None:
        if self.sampling == "outliers" and self._inclusion is None:
            weights = outlier_fractions(moment, self._structure, self.units, self.outlier_factor)
            self._check_weights(weights, len(weights))
            self._inclusion = inclusion_probabilities(weights, min(self.num_layers, len(weights)))

    @override
    def begin(self, step: int, epoch: int, global_step: int, continues: bool) -> None:
        if not continues:
            self._inclusion = None
        super().begin(step, epoch, global_step, continues)

    def select(self, draw: Draw) -> list[str]:
        """Draw the blocks that train now."""
        blocks = list(self.units)
        if self.num_layers > len(blocks) and draw.index == 0:
            warnings.warn(
                f"LISA(num_layers={self.num_layers}) on {len(blocks)} block(s): all of them train all the time.",
                stacklevel=2,
            )
        generator = draw.generator("blocks")
        if self.sampling == "uniform":
            return [blocks[index] for index in sample_blocks(len(blocks), self.num_layers, generator)]
        if self._inclusion is None:
            depths = [float(depth) for depth in range(1, len(blocks) + 1)]
            given = self.sampling if isinstance(self.sampling, list) else depths
            weights = depths[::-1] if self.sampling == "decreasing" else given
            self._inclusion = inclusion_probabilities(weights, min(self.num_layers, len(blocks)))
        return [blocks[index] for index in sample_weighted(self._inclusion, generator)]

    def _check_weights(self, weights: list[float], num_blocks: int) -> None:
        if len(weights) != num_blocks:
            raise ConfigError(f"LISA(sampling=...) has {len(weights)} weights; its scope has {num_blocks} blocks.")
        positive = sum(weight > 0 for weight in weights)
        if positive < min(self.num_layers, num_blocks):
            found = self.sampling == "outliers"
            raise ConfigError(
                f"LISA(num_layers={self.num_layers}): only {positive} of {num_blocks} blocks have "
                f"{f'outliers at outlier_factor={self.outlier_factor}' if found else 'a weight above 0'}, and the "
                f"others would never be drawn. Take {'a smaller outlier_factor' if found else 'other weights'} or "
                "fewer layers."
            )

    @override
    def method_state(self) -> dict[str, Any]:
        return {} if self._inclusion is None else {"inclusion": self._inclusion.clone()}

    @override
    def load_method_state(self, state: dict[str, Any]) -> None:
        self._inclusion = state["inclusion"].clone() if "inclusion" in state else None

    @override
    def describe(self) -> dict[str, Any]:
        """As for every method, with each block's probability to be drawn if they differ."""
        if self._inclusion is None:
            return super().describe()
        return {**super().describe(), "inclusion": dict(zip(self.units, self._inclusion.tolist(), strict=True))}


def _check_sampling(sampling: Any) -> Sampling | list[float]:
    names = get_args(Sampling)
    if isinstance(sampling, str):
        if sampling not in names:
            raise ConfigError(f"LISA(sampling={sampling!r}): no such one. {suggest(sampling, names)}")
        return cast(Sampling, sampling)
    if not isinstance(sampling, (list, tuple)) or not all(is_number(w) and w >= 0 for w in sampling):
        raise ConfigError(f"LISA(sampling={sampling!r}): a name, or a list of finite weights from 0 on, one per block.")
    return [float(weight) for weight in sampling]
