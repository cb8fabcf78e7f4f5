"""Surgical fine-tuning: train one contiguous group of blocks, chosen by the kind of shift.

Early blocks for corrupted inputs, middle ones for new subpopulations, the last for changed labels (Lee et al. 2023,
arXiv:2210.11466).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from lightning.pytorch import Trainer
from torch import nn
from typing_extensions import override

from lightning_peft.core.blocks import Structure
from lightning_peft.core.draw import Draw
from lightning_peft.errors import ConfigError
from lightning_peft.methods.arguments import is_number, is_whole
from lightning_peft.methods.base import MethodCallback, units_by_block
from lightning_peft.methods.moment import Moment

__all__ = ["Surgical", "contiguous_groups"]


def contiguous_groups(num_blocks: int, num_groups: int) -> list[range]:
    """Cut ``num_blocks`` blocks into ``num_groups`` contiguous groups whose sizes differ by at most one.

    Larger groups come first.

    Example:
        >>> [list(group) for group in contiguous_groups(7, 3)]
        [[0, 1, 2], [3, 4], [5, 6]]
    """
    size, larger = divmod(num_blocks, num_groups)
    starts = [group * size + min(group, larger) for group in range(num_groups + 1)]
    return [range(first, last) for first, last in itertools.pairwise(starts)]


class Surgical(MethodCallback):
    """Train one contiguous group of blocks; freeze the rest and all running statistics of norms.

    Gradients and optimizer state of one group only; back-propagation stops below it. With few target samples it often
    beats full fine-tuning, if the group fits the shift: the first for corrupted or differently recorded inputs, a
    middle one for new subpopulations, the last (and the head) for changed labels.

    Use it to adapt a trained model to a small set of data from a shifted distribution; try every group on held-out
    data.

    Args:
        group: Which group, counted from 0 at the input; negative from the output, -1 is the last.
        num_groups: How many groups the scope's blocks are cut into, at least 1; their sizes differ by at most one.
        scope: The blocks to cut up, in model order.
        always: What trains beside the group: ``("embeddings",)`` adds the input layer to the first group, as the
            paper does, ``("head",)`` the output layer to the last.
        seed: Unused by the rule, which draws nothing; kept so that all methods take the same keywords.

    Raises:
        ConfigError: If there is no such group, or there are fewer blocks than groups.

    Example:
        >>> from lightning_peft import Surgical
        >>> Surgical(group=0, num_groups=4).group
        0

    Paper:
        Y. Lee, A. S. Chen, F. Tajwar, A. Kumar, H. Yao, P. Liang, C. Finn: Surgical Fine-Tuning Improves Adaptation to
        Distribution Shifts, ICLR 2023, arXiv:2210.11466.

    Differs from the paper:
        The authors' code leaves all gradients on and gives the optimizer the group only; here the rest is frozen, so
        that the backward pass ends at the group. It trains in evaluation mode; here only norms with running
        statistics do, also those that train, and dropout stays as the module has it.
    """

    def __init__(
        self,
        group: int = 0,
        num_groups: int = 4,
        scope: str | list[str] = "blocks",
        always: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        super().__init__(scope=scope, always=always, redraw="never", state="keep", seed=seed)
        if not is_whole(num_groups, least=1):
            raise ConfigError(f"Surgical(num_groups={num_groups!r}): a whole number from 1 on.")
        if not is_number(group) or int(group) != group or not -num_groups <= group < num_groups:
            raise ConfigError(
                f"Surgical(group={group!r}): a whole number from {-num_groups} to {num_groups - 1}, as there are "
                f"num_groups={num_groups}."
            )
        self.group = int(group)
        self.num_groups = int(num_groups)
        self._norms: list[nn.Module] = []
        self._held: list[nn.Module] = []

    @override
    def make_units(self, structure: Structure, names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
        """One unit per block of the group."""
        blocks = units_by_block(structure, names)
        if len(blocks) < self.num_groups:
            raise ConfigError(
                f"Surgical(num_groups={self.num_groups}): the scope has {len(blocks)} block(s). Take fewer groups."
            )
        chosen = contiguous_groups(len(blocks), self.num_groups)[self.group]
        self._norms = [
            module
            for module in structure.modules.values()
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None
        ]
        return dict(list(blocks.items())[chosen.start : chosen.stop])

    @override
    def select(self, draw: Draw) -> list[str]:
        return list(self.units)

    @override
    def switched(self, trainer: Trainer) -> None:
        self._hold()

    @override
    def observe(self, moment: Moment) -> None:
        self._hold()  # in case the user's code called train()

    @override
    def finished(self) -> None:
        for module in self._held:
            module.train()
        self._held = []

    def _hold(self) -> None:
        """Put norms with running statistics into evaluation mode; the engine did so with those that are frozen."""
        for module in self._norms:
            if module.training:
                module.eval()
                if module not in self._held:
                    self._held.append(module)
