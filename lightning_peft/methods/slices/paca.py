"""PaCA: random input columns of the pretrained weights train, nothing is added to the model.

Of each weight ``W`` (out, in), ``rank`` columns are drawn at random and train; the rest is frozen. With ``x_P`` for the
chosen features of the input, the gradient of the columns ``P`` is ``grad_y.T @ x_P``: the forward pass is the plain
product, and ``x_P`` is all that it keeps for the gradient of the weight.

Paper: S. Woo et al. 2025, arXiv:2503.01905.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from typing_extensions import override

from lightning_peft.core.draw import draw_generator
from lightning_peft.errors import ConfigError
from lightning_peft.methods.arguments import is_whole
from lightning_peft.methods.slices.base import SliceMethod
from lightning_peft.methods.slices.layer import Slice

__all__ = ["PaCA", "random_columns"]


def random_columns(num_inputs: int, rank: int, generator: torch.Generator) -> torch.Tensor:
    """Return ``rank`` different columns of ``num_inputs``, each set with equal chance, in ascending order.

    Example:
        >>> random_columns(4, 4, torch.Generator())
        tensor([0, 1, 2, 3])
    """
    return torch.randperm(num_inputs, generator=generator)[:rank].sort().values


class PaCA(SliceMethod):
    """Train a few random input columns of each pretrained weight and freeze the rest (partial connection adaptation).

    Adds nothing to the model: the forward pass is that of the plain layer, ``rank`` features per token are kept for the
    gradient where the plain layer keeps all of its input, and optimizer state is ``rank`` columns per layer. A step
    costs the FLOPs of full fine-tuning without those of the weights' gradients, two thirds. Checkpoints hold the model
    under its own names, and the trained model is the plain one: nothing is left to merge.

    Use it where LoRA is too slow or keeps too many activations: with many tokens per step, or long sequences. It trains
    half as many parameters as LoRA of the same rank on square layers, and prefers larger learning rates than full
    fine-tuning.

    Args:
        rank: Columns per layer, from 1 to the layer's number of inputs. Parameters: ``rank`` times its outputs.
        scope: Which linear layers (``torch.nn.Linear`` and GPT-2's ``Conv1D``): roles, paths, patterns.
        always: What trains beside them, whole.
        seed: Seed of the columns; each layer draws its own, the same on all ranks.

    Raises:
        ConfigError: If ``rank`` is out of range; from the fit, if it is more than a layer has inputs.
        ScopeError: From the fit, if ``scope`` holds no linear layer with a weight of its own.
        PlanConflict: From the fit, if ``always`` or another method trains one of the weights too.
        UnsupportedStrategy: From the fit, under strategies that shard weights: the columns of a weight are written into
            it as a whole before each product.

    Example:
        >>> from lightning_peft import PaCA
        >>> PaCA(rank=16, always=["head"]).describe()["settings"]["rank"]
        16

    Paper:
        S. Woo, S. Namkung, S. Lee, I. Jeong, B. Kim, D. Jeon: PaCA: Partial Connection Adaptation for Efficient
        Fine-Tuning, ICLR 2025, arXiv:2503.01905.

    Differs from the paper:
        No ``alpha``: in the authors' code it scales the update of the columns and nothing else, as the learning rate
        does. The authors' code refreshes the weight every second forward pass, which is right under activation
        checkpointing only; here it is always that of the last optimizer step. Quantised weights (QPaCA) are left out.
    """

    def __init__(
        self,
        rank: int = 8,
        scope: str | list[str] = "blocks",
        always: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        super().__init__(scope=scope, always=always, seed=seed)
        if not is_whole(rank, 1):
            raise ConfigError(f"rank={rank!r}: a whole number from 1 on, the columns per layer.")
        self.rank = int(rank)

    @override
    def choose(self, layers: Mapping[str, nn.Module]) -> dict[str, Slice]:
        """Random columns of each layer."""
        widths = {path: _num_inputs(layer) for path, layer in layers.items()}
        narrow = [path for path, width in widths.items() if width < self.rank]
        if narrow:
            raise ConfigError(
                f"rank={self.rank} is more columns than {len(narrow)} layer(s) have, {narrow[0]} for one with "
                f"{widths[narrow[0]]}. Choose a smaller rank, or take them out of the scope."
            )
        return {
            path: Slice(random_columns(width, self.rank, draw_generator(self.seed, 0, path)))
            for path, width in widths.items()
        }


def _num_inputs(layer: nn.Module) -> int:
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    return weight.shape[1 if isinstance(layer, nn.Linear) else 0]
