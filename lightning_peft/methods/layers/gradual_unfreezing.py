"""Gradual unfreezing: thaw from the last layer down, with smaller learning rates further down (ULMFiT).

The head trains first; after every epoch the next lower layer joins, until all train. Each layer's learning rate is that
of the layer above divided by 2.6 (Howard & Ruder 2018, arXiv:1801.06146, sections 3.2 and 3.3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import nn
from typing_extensions import override

from lightning_peft.core.blocks import Structure
from lightning_peft.core.draw import Draw
from lightning_peft.core.names import named_parameters
from lightning_peft.core.param_groups import scale_learning_rate, split_param_groups
from lightning_peft.errors import ConfigError
from lightning_peft.methods.base import MethodCallback, units_by_block

__all__ = ["GradualUnfreezing", "layer_groups", "slanted_triangular_factor"]


def slanted_triangular_factor(step: int, total_steps: int, cut_fraction: float = 0.1, ratio: float = 32.0) -> float:
    """Return the factor of the peak learning rate at ``step``: a short rise, a long fall.

    With ``cut = floor(total_steps * cut_fraction)``, ``p`` rises from 0 to 1 in ``cut`` steps and falls back to 0 at
    ``total_steps``; the factor is ``(1 + p * (ratio - 1)) / ratio``.

    Args:
        step: Optimizer steps done, from 0.
        total_steps: Of the run, at least 1.
        cut_fraction: Fraction of the steps that rise, in ``(0, 1)``.
        ratio: Peak over lowest learning rate, at least 1.

    Example:
        >>> [slanted_triangular_factor(step, 100) for step in (0, 10, 100)]
        [0.03125, 1.0, 0.03125]
    """
    cut = max(1, int(total_steps * cut_fraction))
    p = step / cut if step < cut else 1 - (step - cut) / max(1.0, cut * (1 / cut_fraction - 1))
    return (1 + max(0.0, p) * (ratio - 1)) / ratio


def layer_groups(structure: Structure, names: Sequence[str], blocks_per_group: int = 1) -> dict[str, tuple[str, ...]]:
    """Sort names into layers, lowest first: embeddings, groups of blocks, and the head with what else follows.

    A tied output embedding belongs to the head. Of a model with several stacks the blocks come in registration order.
    Names of which none lies in a block (a head of several layers) are sorted by module.
    """
    blocks = {block.name for block in structure.blocks}
    head = set(structure.roles["head"])
    lowest = [name for name in structure.roles["embeddings"] if name in names and name not in head]
    by_block = units_by_block(structure, [name for name in names if name not in lowest])
    inside = [(unit, members) for unit, members in by_block.items() if unit in blocks]
    top = [name for unit, members in by_block.items() if unit not in blocks for name in members]
    groups: dict[str, tuple[str, ...]] = {"embeddings": tuple(lowest)}
    first = len(inside) % blocks_per_group  # groups are counted from the top: the lowest one may be smaller
    starts = [*([0] if first else []), *range(first, len(inside), blocks_per_group)]
    for start, end in zip(starts, [*starts[1:], len(inside)], strict=False):
        part = inside[start:end]
        label = part[0][0] if len(part) == 1 else f"{part[0][0]} to {part[-1][0]}"
        groups[label] = tuple(name for _, members in part for name in members)
    groups.update({"head": tuple(top)} if inside else by_block)
    return {label: members for label, members in groups.items() if members}


class GradualUnfreezing(MethodCallback):
    """Thaw the model from the head down, one layer per epoch, with smaller learning rates for lower layers.

    Early epochs are cheap: back-propagation stops at the lowest thawed layer, and the optimizer holds state for thawed
    layers only. When all layers have thawed, a step costs what full fine-tuning costs. The parameter groups of the
    user's optimizer are cut once, by layer, before training; the discriminative rates scale what the optimizer and its
    scheduler give.

    Use it to adapt a pretrained model to a task with little data, where thawing all layers at once forgets too much.

    The layers are, from the top: everything outside blocks and embeddings (head, final norm), each block or
    ``blocks_per_group`` of them, the embeddings. Nothing freezes again.

    Args:
        period_steps: Optimizer steps between thaws, at least 1. None: one layer per epoch, as in the paper.
        lr_decay: Learning rate of a layer over that of the layer below it, at least 1. 1 gives all the same.
        blocks_per_group: Blocks that thaw together and share a rate, at least 1.
        slanted_triangular: Replace the run's scheduler by the paper's: a short linear rise and a long linear fall over
            all optimizer steps of the run, whose number must be known (``max_steps`` or ``max_epochs``).
        cut_fraction: Fraction of the steps that rise, in ``(0, 1)``.
        ratio: Peak over lowest learning rate of that schedule, at least 1.
        scope: What thaws at all.

    Raises:
        ConfigError: If a number is out of range, or the number of steps is unknown to ``slanted_triangular``.

    Example:
        >>> from lightning_peft import GradualUnfreezing
        >>> GradualUnfreezing().describe()["settings"]["lr_decay"]
        2.6

    Paper:
        J. Howard, S. Ruder: Universal Language Model Fine-tuning for Text Classification, ACL 2018, arXiv:1801.06146,
        sections 3.2 (discriminative rates, slanted triangular rates) and 3.3 (gradual unfreezing).

    Differs from the paper:
        ``slanted_triangular`` is one rise and fall over the run; it is off by default, so that the user's own scheduler
        counts.
    """

    def __init__(
        self,
        period_steps: int | None = None,
        lr_decay: float = 2.6,
        blocks_per_group: int = 1,
        slanted_triangular: bool = False,
        cut_fraction: float = 0.1,
        ratio: float = 32.0,
        scope: str | list[str] = "all",
    ) -> None:
        wrong = []
        if period_steps is not None and (isinstance(period_steps, bool) or period_steps < 1):
            wrong.append(f"period_steps={period_steps!r} must be at least 1, or None for one layer per epoch")
        if not lr_decay >= 1:
            wrong.append(f"lr_decay={lr_decay!r} must be at least 1")
        if isinstance(blocks_per_group, bool) or blocks_per_group != int(blocks_per_group) or blocks_per_group < 1:
            wrong.append(f"blocks_per_group={blocks_per_group!r} must be a whole number, at least 1")
        if not 0 < cut_fraction < 1:
            wrong.append(f"cut_fraction={cut_fraction!r} must be in (0, 1)")
        if not ratio >= 1:
            wrong.append(f"ratio={ratio!r} must be at least 1")
        if wrong:
            raise ConfigError(f"GradualUnfreezing: {'; '.join(wrong)}.")
        redraw = "epoch" if period_steps is None else period_steps
        super().__init__(scope=scope, always=(), redraw=redraw, state="keep", seed=0)
        self.period_steps = period_steps
        self.lr_decay = float(lr_decay)
        self.blocks_per_group = int(blocks_per_group)
        self.slanted_triangular = slanted_triangular
        self.cut_fraction = float(cut_fraction)
        self.ratio = float(ratio)

    def make_units(self, structure: Structure, names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
        """One unit per layer, the lowest first."""
        return layer_groups(structure, names, self.blocks_per_group)

    @override
    def draw_due(self, step: int, epoch: int) -> int:
        return min(super().draw_due(step, epoch), len(self._units) - 1)

    def select(self, draw: Draw) -> list[str]:
        """Return the layers that have thawed: one more from the top with each draw."""
        return list(self._units)[-(draw.index + 1) :]

    @override
    def prepare_optimizers(self, trainer: Trainer) -> None:
        """Cut the parameter groups by layer and give each layer its learning rate."""
        depth_of = {name: depth for depth, names in enumerate(reversed(self._units.values())) for name in names}
        depths = {
            id(parameter): depth_of[name]
            for name, parameter in named_parameters(trainer.lightning_module).items()
            if name in depth_of
        }

        def depth(parameter: nn.Parameter) -> int:
            return depths.get(id(parameter), -1)

        strategy = trainer.strategy
        if self.slanted_triangular:
            if len(strategy.optimizers) != 1:
                raise ConfigError("GradualUnfreezing(slanted_triangular=True) schedules one optimizer, not several.")
            strategy.lr_scheduler_configs = [self._slanted(trainer, strategy.optimizers[0])]
        schedulers = [config.scheduler for config in strategy.lr_scheduler_configs]
        for optimizer in strategy.optimizers:
            split_param_groups(optimizer, schedulers, depth, order=lambda part: (part < 0, part))
            for index, group in enumerate(optimizer.param_groups):
                below = depth(group["params"][0]) if group["params"] else -1
                if below > 0:
                    scale_learning_rate(optimizer, schedulers, index, self.lr_decay**-below)

    def _slanted(self, trainer: Trainer, optimizer: torch.optim.Optimizer) -> LRSchedulerConfig:
        total = trainer.estimated_stepping_batches
        if total == float("inf"):
            raise ConfigError(
                "GradualUnfreezing(slanted_triangular=True) needs to know how many steps the run has: set "
                "trainer.max_steps or trainer.max_epochs."
            )
        if trainer.strategy.lr_scheduler_configs:
            rank_zero_info("GradualUnfreezing: the slanted triangular schedule replaces the module's own.")
        for group in optimizer.param_groups:
            group["lr"] = group.get("initial_lr", group["lr"])
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._factor(int(total)))
        return LRSchedulerConfig(scheduler=scheduler, interval="step")

    def _factor(self, total: int) -> Callable[[int], float]:
        return lambda step: slanted_triangular_factor(step, total, self.cut_fraction, self.ratio)

    @override
    def describe(self) -> dict[str, Any]:
        """As for every method, with each layer's learning rate over that of the top layer."""
        description = super().describe()
        layers = list(reversed(self._units))
        description["lr_factors"] = {unit: self.lr_decay**-depth for depth, unit in enumerate(layers)}
        return description
