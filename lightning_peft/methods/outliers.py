"""The share of outlier weights in each unit of a model: weights whose product with their inputs is far above the mean.

Layerwise outlier distribution of Yin et al. 2024 (OWL, arXiv:2310.05175), which OwLore (Li et al. 2024,
arXiv:2405.18380) draws layers by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.blocks import Structure
from lightning_peft.errors import ConfigError
from lightning_peft.methods.moment import Moment
from lightning_peft.methods.scoring import mean_over_ranks, scoring_loss, without_trace

__all__ = ["outlier_fraction", "outlier_fractions"]


def outlier_fraction(magnitudes: Sequence[Tensor], factor: float) -> float:
    """Return the fraction of entries larger than ``factor`` times the mean of all entries."""
    count = sum(part.numel() for part in magnitudes)
    mean = sum(part.sum(dtype=torch.float64) for part in magnitudes) / count
    return sum(int((part > factor * mean).sum()) for part in magnitudes) / count


def outlier_fractions(
    moment: Moment, structure: Structure, units: Mapping[str, tuple[str, ...]], factor: float
) -> list[float]:
    """Return each unit's fraction of outliers among its linear and convolution weights, for the batch at hand.

    The magnitude of a weight is its absolute value times the norm of its input feature over the batch.

    Args:
        moment: Where the run stands; the batches of all ranks are looked at as one.
        structure: The model.
        units: Unit name -> parameter names.
        factor: How many times the unit's mean magnitude an outlier exceeds.

    Raises:
        ConfigError: If a unit has no such layer.
    """
    owners = {name: structure.modules.get(name.rpartition(".")[0]) for names in units.values() for name in names}
    layers = {name: module for name, module in owners.items() if name.endswith(".weight") and _has_inputs(module)}
    squares: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            features = args[0].detach().float().movedim(1 if isinstance(module, nn.modules.conv._ConvNd) else -1, -1)
            total = features.reshape(-1, features.shape[-1]).square().sum(0)
            squares[name] = squares[name] + total if name in squares else total

        return hook

    with without_trace(moment.pl_module), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        moment.pl_module.eval()
        handles = [module.register_forward_pre_hook(watch(name)) for name, module in layers.items() if module]
        try:
            scoring_loss(moment.trainer, moment.pl_module, moment.batch, moment.batch_idx)
        finally:
            for handle in handles:
                handle.remove()
        weights = []
        for unit, names in units.items():
            seen = [name for name in names if name in squares]
            if not seen:
                raise ConfigError(
                    f"No outliers to look for: {unit} has no linear or convolution layer with floating-point weights "
                    "that ran in the forward pass. Take another sampling, or narrow the scope."
                )
            norms = [mean_over_ranks(squares[name]).sqrt() for name in seen]
            parts = [_magnitudes(layers[name], norm) for name, norm in zip(seen, norms, strict=True)]
            weights.append(outlier_fraction(parts, factor))
    return weights


def _has_inputs(module: nn.Module | None) -> bool:
    return isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) or type(module).__name__ == "Conv1D"


def _magnitudes(module: Any, norm_I: Tensor) -> Tensor:
    """``|weight| * norm of its input feature``; the weight's shape does not matter."""
    weight = module.weight.detach().abs().float()
    if isinstance(module, nn.Linear):
        return weight * norm_I
    if isinstance(module, nn.modules.conv._ConvNd):
        grouped = weight.reshape(module.groups, -1, len(norm_I) // module.groups, weight[0, 0].numel())
        return grouped * norm_I.view(module.groups, 1, -1, 1)
    return weight * norm_I[:, None]  # transformers' Conv1D stores (in, out)
