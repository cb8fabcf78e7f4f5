"""HFT: train a random half of every layer, freeze the other half at its start value.

Per transformer layer, half of the attention matrices, half of the feed-forward matrices and half of the norms train;
embeddings and head train (Hui et al. 2024, arXiv:2404.18466). The half is drawn once per stage of training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import nn

from lightning_peft.core.blocks import Structure, is_norm
from lightning_peft.core.draw import Draw
from lightning_peft.core.trainable import StatePolicy
from lightning_peft.core.weighted import inclusion_probabilities, sample_weighted
from lightning_peft.errors import ConfigError, suggest
from lightning_peft.methods.base import MethodCallback, Redraw, units_by_block

__all__ = ["HFT", "Granularity", "sample_half", "spread_counts"]

Granularity = Literal["category", "layer", "model"]
"""Among what the fraction is drawn: each layer's matrices of a category, whole layers, or all matrices."""


def spread_counts(sizes: Sequence[int], fraction: float, generator: torch.Generator) -> list[int]:
    """Decide how many members of each group train, so that the total is the rounded ``fraction`` of all members.

    Each group gets ``floor(fraction * size)`` and randomly drawn groups get one more until the total is
    ``floor(fraction * sum(sizes) + 1/2)``: of three feed-forward matrices two train in one half of the layers, one in
    the other half. A group's chance of one more is in proportion to what rounding down took from it, so that groups of
    different sizes have the same fraction on average.

    Args:
        sizes: Members of each group.
        fraction: In ``(0, 1]``.
        generator: Source of the draw.
    """
    shares = [fraction * size for size in sizes]
    counts = [math.floor(share + 1e-9) for share in shares]
    wanted = math.floor(fraction * sum(sizes) + 0.5 + 1e-9)
    left = {group: share - counts[group] for group, share in enumerate(shares) if share - counts[group] > 1e-9}
    if wanted > sum(counts):
        chances = inclusion_probabilities(list(left.values()), wanted - sum(counts))
        for position in sample_weighted(chances, generator):
            counts[list(left)[position]] += 1
    return counts


def sample_half(groups: Sequence[list[str]], fraction: float, generator: torch.Generator) -> list[str]:
    """Draw ``fraction`` of the members of each group, the rounding spread over the groups at random."""
    counts = spread_counts([len(group) for group in groups], fraction, generator)
    chosen: list[str] = []
    for group, count in zip(groups, counts, strict=True):
        order = torch.randperm(len(group), generator=generator)[:count].tolist()
        chosen += [group[index] for index in sorted(order)]
    return chosen


class HFT(MethodCallback):
    """Train a random half of each layer's matrices and keep the other half at its pretrained value.

    What is frozen keeps old knowledge; gradients and optimizer state of the frozen half are never made. A step costs
    at least 0.83 of full fine-tuning's FLOPs, because back-propagation passes through everything. A half that is drawn
    once is frozen before the optimizer is built and DDP wraps, so that neither holds it.

    Use it to fine-tune a whole model while forgetting less than full fine-tuning at the same learning rate.

    *Half* is half of the count, by this rule: a unit is one module with its bias. In ``"category"`` granularity each
    layer's units fall into attention, cross-attention, feed-forward, router, norms and other, and each of these is
    halved by itself. An odd number is rounded up in a random half of the layers and down in the rest, so that 2 of 3
    feed-forward matrices train in ``ceil(L/2)`` layers and 1 of 3 in the others. A fused matrix (``qkv``,
    ``gate_up``, all experts in one tensor) counts as one; with grouped-query attention ``k`` and ``v`` count as much as
    ``q`` and ``o``; each expert's matrices count separately. The parameter fraction that results is in
    :meth:`describe`.

    With ``torch.compile``, every pattern of trained matrices is a variant of its block: with a redraw take
    ``granularity="layer"``, which needs two, or raise ``torch._dynamo.config.recompile_limit``.

    Args:
        fraction: Of the units that train, in ``(0, 1]``. 1 is full fine-tuning.
        granularity: ``"category"`` (the paper's), ``"layer"`` (whole layers) or ``"model"`` (any matrices).
        redraw: ``"never"``: one half for the run, as the paper does within a stage. ``"epoch"`` or a number of
            optimizer steps: each of them is a stage with a half of its own.
        scope: What is halved.
        always: What trains all the time, outside the layers.
        state: What becomes of optimizer state of what freezes at a redraw.
        seed: Seed of the draw, the same on all ranks. For the next stage in a new run (SFT, then DPO) take another.

    Raises:
        ConfigError: If an argument is out of range, or the fraction is so small that nothing would train.

    Example:
        >>> from lightning_peft import HFT
        >>> HFT(fraction=0.5).describe()["settings"]["granularity"]
        'category'

    Paper:
        T. Hui, Z. Zhang, S. Wang, W. Xu, Y. Sun, H. Wu: HFT: Half Fine-Tuning for Large Language Models, ACL 2025,
        arXiv:2404.18466.

    Differs from the paper:
        No official code is public. Norms are halved per layer however many there are (a layer with four trains two);
        the paper's models have two.
    """

    def __init__(
        self,
        fraction: float = 0.5,
        granularity: Granularity = "category",
        redraw: Redraw = "never",
        scope: str | list[str] = "blocks",
        always: Sequence[str] = ("embeddings", "head", "norms"),
        state: StatePolicy = "drop",
        seed: int = 0,
    ) -> None:
        super().__init__(scope=scope, always=always, redraw=redraw, state=state, seed=seed)
        if not isinstance(fraction, (int, float)) or not 0 < fraction <= 1:
            raise ConfigError(f"HFT(fraction={fraction!r}): the fraction that trains must be in (0, 1].")
        if granularity not in get_args(Granularity):
            raise ConfigError(
                f"HFT(granularity={granularity!r}): no such one. {suggest(str(granularity), get_args(Granularity))}"
            )
        self.fraction = float(fraction)
        self.granularity: Granularity = granularity
        self.redraw: Redraw = redraw
        self._groups: dict[str, list[list[str]]] = {}

    def make_units(self, structure: Structure, names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
        """One unit per module with parameters, or per block in ``"layer"`` granularity; sorted into groups."""
        if self.granularity == "layer":
            units = units_by_block(structure, names)
            self._groups = {"layer": [list(units)]}
            return units
        collected: dict[str, list[str]] = {}
        for name in names:
            collected.setdefault(unit_of(name), []).append(name)
        units = {unit: tuple(members) for unit, members in collected.items()}
        if self.granularity == "model":
            self._groups = {"model": [list(units)]}
            return units
        block_of = structure.block_of()
        groups: dict[str, dict[str, list[str]]] = {}
        for unit, members in units.items():
            block = block_of[members[0]].name if members[0] in block_of else ""
            groups.setdefault(category_of(unit, members, block, structure), {}).setdefault(block, []).append(unit)
        self._groups = {category: list(layers.values()) for category, layers in groups.items()}
        return units

    def select(self, draw: Draw) -> list[str]:
        """Draw the half that trains in this stage.

        Raises:
            ConfigError: If the fraction of every category rounds to nothing.
        """
        chosen = [
            unit
            for category, groups in self._groups.items()
            for unit in sample_half(groups, self.fraction, draw.generator(category))
        ]
        if not chosen:
            sizes = {category: sum(map(len, groups)) for category, groups in self._groups.items()}
            raise ConfigError(
                f"HFT(fraction={self.fraction}) rounds to no unit at all among "
                f"{', '.join(f'{size} of {category}' for category, size in sizes.items())}. "
                f"Take {math.ceil(500 / max(sizes.values())) / 1000} or more."
            )
        return chosen

    def describe(self) -> dict[str, Any]:
        """As for every method, with the groups' sizes and the fraction of the scope's parameters that trains."""
        description = super().describe()
        if self._draw_index >= 0:
            numels = {name: parameter.numel() for name, parameter in self._structure.parameters.items()}
            scope = [name for names in self._units.values() for name in names]
            trained = sum(numels[name] for name in scope if name in self._active)
            description["parameter_fraction"] = trained / sum(numels[name] for name in scope)
            description["units_per_category"] = {
                category: sum(len(group) for group in groups) for category, groups in self._groups.items()
            }
        return description


def unit_of(name: str) -> str:
    """Return the unit a parameter belongs to: its module, or a part of it where one module holds several matrices.

    ``attn.q_proj.bias`` belongs to ``attn.q_proj``, ``attn.in_proj_weight`` and ``attn.in_proj_bias`` to
    ``attn.in_proj``, an LSTM's ``weight_ih_l0`` and ``bias_ih_l0`` to ``ih_l0``; any other parameter is its own unit.
    """
    path, _, leaf = name.rpartition(".")
    if leaf in ("weight", "bias"):
        return path or name
    for kind in ("weight", "bias"):
        if leaf.endswith(f"_{kind}"):
            leaf = leaf[: -len(kind) - 1]
        elif leaf.startswith(f"{kind}_"):
            leaf = leaf[len(kind) + 1 :]
    return f"{path}.{leaf}" if path else leaf


_CROSS = ("cross", "encdec", "encoder_attn")
_MIXER = ("attn", "attention", "mixer", "mamba", "ssm")


def category_of(unit: str, members: Sequence[str], block: str, structure: Structure) -> str:
    """Sort a unit of a block: norms, attention, cross_attention, ffn, router or other.

    Matrices under a submodule whose attribute or class is called attention (or mixer, in state-space models) are
    attention; a top-k gate beside experts is a router; all other matrices are feed-forward.
    """
    owner = structure.modules.get(members[0].rpartition(".")[0])
    if owner is not None and is_norm(owner):
        return "norms"
    if isinstance(owner, nn.Embedding) or all(structure.parameters[name].ndim < 2 for name in members):
        return "other"
    words: list[str] = []
    parts = unit.split(".")
    for depth in range(len(block.split(".")) + 1 if block else 1, len(parts) + 1):
        module = structure.modules.get(".".join(parts[:depth]))
        words += [parts[depth - 1].lower(), type(module).__name__.lower() if module is not None else ""]
    if any(hint in word for word in words for hint in _CROSS):
        return "cross_attention"
    if any(hint in word for word in words for hint in _MIXER):
        return "attention"
    siblings = structure.modules.get(unit.rpartition(".")[0])
    beside_experts = siblings is not None and any("expert" in name for name, _ in siblings.named_children())
    if any("router" in word for word in words) or (beside_experts and parts[-1] in ("gate", "router")):
        return "router"
    return "ffn"
