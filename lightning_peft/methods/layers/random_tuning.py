"""RandomTuning: train random tensors, wherever they are, up to a parameter budget.

At scale the design of the tunable module matters little against how many parameters it has: the APET baseline of
Su et al. 2023 (arXiv:2306.02320).
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import torch

from lightning_peft.core.blocks import Structure
from lightning_peft.core.draw import Draw
from lightning_peft.core.trainable import StatePolicy
from lightning_peft.errors import ConfigError
from lightning_peft.methods.arguments import is_fraction
from lightning_peft.methods.base import MethodCallback, Redraw

__all__ = ["RandomTuning", "sample_to_budget"]


def sample_to_budget(sizes: Sequence[int], budget: int, generator: torch.Generator) -> list[int]:
    """Draw indices in random order, keeping each whose size still fits into ``budget``; ascending."""
    chosen, left = [], budget
    for index in torch.randperm(len(sizes), generator=generator).tolist():
        if sizes[index] <= left:
            chosen.append(index)
            left -= sizes[index]
    return sorted(chosen)


class RandomTuning(MethodCallback):
    """Train randomly placed tensors that together hold at most ``fraction`` of the scope's parameters (APET).

    Tensors are drawn in random order and taken while they fit, so that the budget is never exceeded and is filled up to
    the smallest tensor left over. Optimizer state and gradients are those of the drawn tensors; FLOPs hardly fall below
    0.7 of full fine-tuning's, because some drawn tensor is always near the bottom.

    Use it as the control that a cleverer choice of tensors has to beat at the same budget.

    With ``torch.compile``, each draw compiles each block that it cuts through anew.

    Args:
        fraction: Of the scope's parameters, in ``(0, 1]``.
        redraw: ``"never"``, ``"epoch"`` or a number of optimizer steps.
        scope: What is drawn from.
        always: What trains all the time beside it and outside the budget, for example ``("head",)``.
        state: What becomes of optimizer state of what freezes at a redraw.
        seed: Seed of the draw, the same on all ranks.

    Raises:
        ConfigError: If the fraction is out of range, or no tensor fits into the budget.

    Example:
        >>> import torch
        >>> from lightning_peft.methods.layers.random_tuning import sample_to_budget
        >>> chosen = sample_to_budget([5, 3, 9], 8, torch.Generator().manual_seed(0))
        >>> sum([5, 3, 9][index] for index in chosen) <= 8
        True

    Paper:
        Y. Su, C.-M. Chan, J. Cheng, Y. Qin, Y. Lin, S. Hu, Z. Yang, N. Ding, X. Sun, G. Xie, Z. Liu, M. Sun: Exploring
        the Impact of Model Scaling on Parameter-Efficient Tuning, EMNLP 2023, arXiv:2306.02320 (arbitrary PET).

    Differs from the paper:
        The paper places new tunable modules at random; here the model's own tensors are chosen at random.
    """

    def __init__(
        self,
        fraction: float = 0.1,
        redraw: Redraw = "never",
        scope: str | list[str] = "all",
        always: Sequence[str] = (),
        state: StatePolicy = "drop",
        seed: int = 0,
    ) -> None:
        super().__init__(scope=scope, always=always, redraw=redraw, state=state, seed=seed)
        if not is_fraction(fraction):
            raise ConfigError(f"RandomTuning(fraction={fraction!r}): the fraction that trains must be in (0, 1].")
        self.fraction = float(fraction)
        self.redraw: Redraw = redraw

    def make_units(self, structure: Structure, names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
        """One unit per tensor."""
        self._sizes = [structure.parameters[name].numel() for name in names]
        self._budget = int(Fraction(str(self.fraction)) * sum(self._sizes))
        if min(self._sizes) > self._budget:
            raise ConfigError(
                f"RandomTuning(fraction={self.fraction}): the budget of {self._budget} parameters holds not even the "
                f"smallest tensor of the scope ({min(self._sizes)}). Take a larger fraction."
            )
        return {name: (name,) for name in names}

    def select(self, draw: Draw) -> list[str]:
        """Draw the tensors that train."""
        names = list(self.units)
        return [names[index] for index in sample_to_budget(self._sizes, self._budget, draw.generator("tensors"))]
