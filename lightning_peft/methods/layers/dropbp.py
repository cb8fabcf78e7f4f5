"""DropBP: in every step, skip the backward pass of random blocks; the forward pass is that of the whole model.

The gradient passes a dropped block along its residual stream, as if the block were not there; its weights rest for the
step (Woo et al. 2024, arXiv:2402.17812).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.core.blocks import Structure
from lightning_peft.core.draw import Draw
from lightning_peft.core.trainable import StatePolicy
from lightning_peft.errors import ConfigError, ScopeError
from lightning_peft.methods.arguments import is_number
from lightning_peft.methods.base import MethodCallback, units_by_block

__all__ = ["DropBP", "sample_dropped"]


def sample_dropped(num_blocks: int, drop_rate: float, generator: torch.Generator) -> list[int]:
    """Draw the blocks to drop: ``drop_rate * num_blocks`` on average, rounded at random, never all of them."""
    share = drop_rate * num_blocks
    count = math.floor(share + 1e-9)
    count += int(torch.rand((), generator=generator, dtype=torch.float64) < share - count)
    return sorted(torch.randperm(num_blocks, generator=generator)[: min(count, num_blocks - 1)].tolist())


class _AlongTheStream(torch.autograd.Function):
    """Forward: the block's output, exactly. Backward: the gradient goes to the block's input as it is."""

    @staticmethod
    def forward(ctx: Any, stream: Tensor, output: Tensor) -> Tensor:
        ctx.dtype = stream.dtype
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0].to(ctx.dtype), None


@dataclass
class _Branch:
    """Whether a block is dropped now. One flag for each block, so that ``torch.compile`` needs two variants of it."""

    is_dropped: bool = False


class DropBP(MethodCallback):
    """Skip the backward pass of random blocks in each optimizer step; drawn anew every step.

    A dropped block costs its forward pass only and saves no activations: at ``drop_rate=0.5`` a step costs 0.68 of full
    fine-tuning's FLOPs. The loss is that of the whole model, unlike with layer dropping; the gradient is not exact: it
    is that of the model without the dropped blocks' Jacobians. Optimizer state is that of everything in the scope.

    Use it to save time and activations with long sequences, over full fine-tuning or over adapters
    (``scope="adapters"``). Blocks must be residual: their output is their input plus something, as in pre-norm
    transformers; with a norm after the addition (BERT) that norm is skipped as well.

    Args:
        drop_rate: Fraction of the blocks dropped in a step on average, in ``[0, 1)``. One block is always left.
        scope: What trains; the blocks it lies in are dropped as a whole, so that no other method may train in them.
        always: What trains in every step, outside the blocks.
        state: What becomes of the optimizer state of a block that is dropped; it is back soon, so keep it.
        seed: Seed of the draws, the same on all ranks.

    Raises:
        ConfigError: If the rate is out of range, something else trains inside a dropped block, or a block's output
            has not the shape of one of its inputs.
        ScopeError: From the fit, if the scope lies in fewer than two blocks, outside blocks, or in bare layers.

    Example:
        >>> import torch
        >>> from lightning_peft.methods.layers.dropbp import sample_dropped
        >>> len(sample_dropped(8, 0.5, torch.Generator().manual_seed(0)))
        4

    Paper:
        S. Woo, B. Park, B. Kim, M. Jo, S. J. Kwon, D. Jeon, D. Lee: DropBP: Accelerating Fine-Tuning of Large Language
        Models by Dropping Backward Propagation, NeurIPS 2024, arXiv:2402.17812.

    Differs from the paper:
        All blocks have the same rate; the paper measures each one's sensitivity and gives insensitive ones a higher
        rate. Attention and feed-forward are dropped together, not each by itself. A draw lasts for an optimizer step,
        all its micro-batches, and is the same on all ranks.
    """

    def __init__(
        self,
        drop_rate: float = 0.5,
        scope: str | list[str] = "blocks",
        always: Sequence[str] = ("embeddings", "head", "norms"),
        state: StatePolicy = "keep",
        seed: int = 0,
    ) -> None:
        super().__init__(scope=scope, always=always, redraw=1, state=state, seed=seed)
        if not is_number(drop_rate) or not 0 <= drop_rate < 1:
            raise ConfigError(f"DropBP(drop_rate={drop_rate!r}): the fraction that is dropped must be in [0, 1).")
        self.drop_rate = float(drop_rate)
        self._modules: dict[str, nn.Module] = {}
        self._branches: dict[str, _Branch] = {}
        self._handles: list[Any] = []

    @override
    def make_units(self, structure: Structure, names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
        """One unit per block."""
        units = units_by_block(structure, names)
        blocks = {block.name: block for block in structure.blocks}
        outside = [unit for unit in units if unit not in blocks]
        if outside:
            raise ScopeError(f"{self.label}: {outside[0]} lies in no block. Name what trains outside them in always.")
        bare = [unit for unit in units if not list(structure.modules[unit].children())]
        if bare:
            raise ScopeError(f"{self.label}: {bare[0]} is a bare layer without a residual stream to pass along.")
        if len(units) < 2:
            raise ScopeError(f"{self.label} lies in {len(units)} block(s); dropping takes two or more.")
        self._modules = {unit: structure.modules[unit] for unit in units}
        self._branches = {unit: _Branch() for unit in units}
        self._inside = {unit: blocks[unit].parameters for unit in units}
        return units

    @override
    def select(self, draw: Draw) -> list[str]:
        dropped = sample_dropped(len(self.units), self.drop_rate, draw.generator("blocks"))
        return [unit for index, unit in enumerate(self.units) if index not in dropped]

    @override
    def switched(self, trainer: Trainer) -> None:
        active = self.active_units()
        parameters = self._structure.parameters
        for unit, branch in self._branches.items():
            branch.is_dropped = unit not in active
            if not branch.is_dropped:
                continue
            others = [name for name in self._inside[unit] if parameters[name].requires_grad]
            if others:
                raise ConfigError(
                    f"{self.label} drops the backward pass of {unit} as a whole, and {others[0]} in it is planned to "
                    "train by another method or by always. Leave these blocks out of one of the two."
                )
        if not self._handles:
            self._handles = [
                module.register_forward_hook(self._hook(unit), with_kwargs=True)
                for unit, module in self._modules.items()
            ]

    @override
    def finished(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for branch in self._branches.values():
            branch.is_dropped = False

    def _hook(self, unit: str) -> Any:
        branch = self._branches[unit]

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if not branch.is_dropped or not torch.is_grad_enabled():
                return None
            main = output if isinstance(output, Tensor) else output[0]
            inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            stream = next((x for x in inputs if x.shape == main.shape and x.is_floating_point()), None)
            if stream is None:
                raise ConfigError(
                    f"{self.label}: the output of {unit} has the shape {tuple(main.shape)}, which none of its inputs "
                    "has, so that there is no residual stream to pass the gradient along. Leave it out of the scope."
                )
            passed = _AlongTheStream.apply(stream, main.detach())
            if isinstance(output, Tensor):
                return passed
            return (passed, *(x.detach() if isinstance(x, Tensor) else x for x in output[1:]))

        return hook
