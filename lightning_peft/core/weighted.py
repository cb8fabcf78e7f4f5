"""Draw without replacement by weight, so that each member is drawn in exactly its share of the draws."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["inclusion_probabilities", "sample_weighted"]


def inclusion_probabilities(weights: Sequence[float], num_active: int) -> Tensor:
    """Return the probability that each member is drawn: in proportion to its weight, and never above 1.

    Members whose share exceeds 1 are always drawn; what is left is shared by the others in proportion.

    Args:
        weights: Finite, non-negative; at least ``num_active`` of them positive.
        num_active: How many are drawn; the sum of the probabilities.

    Shapes:
        Returns ``(len(weights),)`` in double precision.
    """
    odds = torch.as_tensor(weights, dtype=torch.float64)
    certain = torch.zeros(len(odds), dtype=torch.bool)
    while True:
        left = num_active - int(certain.sum())
        rest = odds.masked_fill(certain, 0.0)
        share = rest * (left / rest.sum()) if left else torch.zeros_like(odds)
        above = (share > 1 - 1e-9) & ~certain
        if not above.any():
            return torch.where(certain, 1.0, share)
        certain |= above


def sample_weighted(probabilities: Tensor, generator: torch.Generator) -> list[int]:
    """Draw distinct indices, each with exactly the given probability; ascending.

    Systematic sampling: the members, in random order, are laid end to end on a line, each as long as its probability,
    and those that lie at ``u, u + 1, u + 2, ...`` are taken, for one ``u`` uniform in ``[0, 1)``.

    Args:
        probabilities: From :func:`inclusion_probabilities`; they sum to the number of indices drawn.
        generator: Source of the draw.
    """
    certain = probabilities >= 1
    open_blocks = (~certain).nonzero().flatten()
    order = open_blocks[torch.randperm(len(open_blocks), generator=generator)]
    count = round(float(probabilities[order].sum()))
    ends = probabilities[order].cumsum(0)
    marks = torch.rand(1, generator=generator, dtype=torch.float64) + torch.arange(count, dtype=torch.float64)
    at = torch.searchsorted(ends, marks, right=True).clamp(max=len(order) - 1)
    return sorted([*certain.nonzero().flatten().tolist(), *order[at].tolist()])
