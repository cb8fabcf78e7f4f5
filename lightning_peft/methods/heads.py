"""How the output units of attention's projections fall into heads, with grouped-query attention too."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_peft.core.blocks import Structure
from lightning_peft.methods.projections import Projection, find_projections

__all__ = ["HeadLayout", "find_heads", "spread_over_heads"]

_NUM_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")


def spread_over_heads(importance: Tensor, num_heads: int, num_units: int) -> Tensor:
    """Return the importance of each output unit of a query, key or value projection from that of the query heads.

    With grouped-query attention a key or value head is as important as the most important query head that it serves.

    Args:
        importance: Of each query head.
        num_heads: Heads of the projection: those of the queries, or fewer that serve equal groups of them.
        num_units: Its output units.

    Shapes:
        ``(num_query_heads,)``; returns ``(num_units,)``.

    Example:
        >>> spread_over_heads(torch.tensor([0.1, 0.9, 0.0, 0.2]), num_heads=2, num_units=4)
        tensor([0.9000, 0.9000, 0.2000, 0.2000])
    """
    return importance.reshape(num_heads, -1).amax(1).repeat_interleave(num_units // num_heads)


@dataclass(frozen=True)
class HeadLayout:
    """Heads of a query, key or value projection.

    Args:
        kind: Kind of the projection.
        output: The output projection of the same attention, whose input units are the heads' responses.
        num_query_heads: Heads of the queries.
        num_groups: Heads of keys and values, each for an equal share of the query heads.
        head_size: Units of one head's response.
        num_units: Output units of the projection.
    """

    kind: str
    output: Projection
    num_query_heads: int
    num_groups: int
    head_size: int
    num_units: int

    def fits(self) -> bool:
        """Whether the numbers go together."""
        fused = (self.num_query_heads + 2 * self.num_groups) * self.head_size
        return self.num_query_heads % self.num_groups == 0 and {
            "query": self.num_units % self.num_query_heads == 0,
            "key": self.num_units % self.num_groups == 0,
            "value": self.num_units == self.num_groups * self.head_size,
            "qkv": self.num_units == fused,
        }.get(self.kind, False)

    def spread(self, importance: Tensor) -> Tensor:
        """Importance of each output unit from that of each query head."""
        if self.kind == "qkv":
            parts = (self.num_query_heads, self.num_groups, self.num_groups)
            return torch.cat([spread_over_heads(importance, part, part * self.head_size) for part in parts])
        num_heads = self.num_query_heads if self.kind == "query" else self.num_groups
        return spread_over_heads(importance, num_heads, self.num_units)


def find_heads(structure: Structure, projection: Projection) -> HeadLayout | None:
    """Find the heads of a query, key or value projection; None if they cannot be told.

    The number of heads is looked up on the modules around it, and held against the shapes. One matrix for queries, keys
    and values holds them one after the other; that named ``query_key_value`` interleaves them in ways that differ
    between models, and is not told apart.

    Args:
        structure: The model.
        projection: One of its projections.
    """
    parameters = structure.parameters
    outputs = [p for p in find_projections(structure) if p.kind == "output" and p.block == projection.block]
    output = max(outputs, key=lambda p: _num_shared_parts(p.unit, projection.unit), default=None)
    num_heads = _attribute(structure, projection, _NUM_HEADS)
    num_groups = _attribute(structure, projection, ("num_key_value_heads",)) or num_heads
    if output is None or not num_heads or not num_groups or projection.unit.endswith("query_key_value"):
        return None
    response = parameters[output.weight].numel() // parameters[output.weight].shape[output.out_axis]
    num_units = parameters[projection.weight].shape[projection.out_axis]
    found = HeadLayout(projection.kind, output, num_heads, num_groups, response // num_heads, num_units)
    return found if response % num_heads == 0 and found.fits() else None


def _num_shared_parts(path: str, other: str) -> int:
    together = zip(path.split("."), other.split("."), strict=False)
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], together)))


def _attribute(structure: Structure, projection: Projection, names: Sequence[str]) -> int | None:
    """Look a number up on the modules around a projection, innermost first, or on their configurations."""
    parts = projection.unit.split(".")
    for depth in range(len(parts) - 1, len(projection.block.split(".")) - 1, -1):
        module = structure.modules.get(".".join(parts[:depth]))
        for holder in (module, getattr(module, "config", None)):
            for name in names:
                value = getattr(holder, name, None)
                if isinstance(value, int) and value > 0:
                    return value
    return None
