"""The projections of a block by what they do, in any architecture: queries, keys, values, up, gate, down.

Attention's matrices are told by name, since their shapes are alike. A feed-forward's are told by shape: *up* leads from
the width of the residual stream to the intermediate width, *down* leads back. The mixer of a state-space block that has
no feed-forward beside it (Mamba) is both in one, and its outer projections count as up and down.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

import torch
from torch import nn

from lightning_peft.core.blocks import Block, Structure, is_norm
from lightning_peft.errors import ConfigError, ScopeError, suggest
from lightning_peft.methods.arguments import is_number
from lightning_peft.methods.layers.hft import category_of, unit_of

__all__ = [
    "GROUPS",
    "Kind",
    "LayerRange",
    "Projection",
    "check_layer_range",
    "find_projections",
    "layers_in_range",
    "output_axis_mask",
    "product_of",
]

Kind = Literal["query", "key", "value", "qkv", "output", "up", "gate", "down"]
"""What a projection does; ``qkv`` is queries, keys and values in one matrix, ``output`` is attention's."""

GROUPS: dict[str, tuple[Kind, ...]] = {
    "attention": ("query", "key", "value", "qkv", "output"),
    "ffn": ("up", "gate", "down"),
}
"""Names for several kinds at once."""

LayerRange = tuple[float, float]
"""A part of a stack by depth: from a fraction, up to a fraction of its blocks."""

_NAMES: dict[Kind, frozenset[str]] = {
    "query": frozenset({"q_proj", "query", "q", "wq", "q_lin", "to_q", "q_attn", "query_proj"}),
    "key": frozenset({"k_proj", "key", "k", "wk", "k_lin", "to_k", "key_proj"}),
    "value": frozenset({"v_proj", "value", "v", "wv", "v_lin", "to_v", "value_proj"}),
    "qkv": frozenset({"c_attn", "qkv", "qkv_proj", "wqkv", "query_key_value"}),
    "output": frozenset({"o_proj", "out_proj", "o", "wo", "out_lin", "to_out", "c_proj", "proj", "dense"}),
}
_DOWN = re.compile(r"down|out|fc2|lin2|linear2|w2|wo|c_proj|4h_to_h")
_GATE = re.compile(r"(^|[._])gate|^wi_0$|^w1$")


@dataclass(frozen=True)
class Projection:
    """One matrix with its bias, or all experts' matrices in one tensor.

    Args:
        unit: Path of its module, or of the tensor where one module holds several.
        block: Path of its block.
        kind: What it does.
        weight: Name of the matrix.
        members: Names of the matrix and, if there is one, its bias.
        out_axis: Axis of the matrix along which its output units lie.
    """

    unit: str
    block: str
    kind: Kind
    weight: str
    members: tuple[str, ...]
    out_axis: int


def find_projections(structure: Structure) -> list[Projection]:
    """Find the projections of all blocks of a model, in model order."""
    found: list[Projection] = []
    for block in structure.blocks:
        found += _find_in_block(structure, block)
    return found


def layers_in_range(num_layers: int, layer_range: LayerRange) -> range:
    """Return which of ``num_layers`` blocks, counted from 0, a range means; at least one.

    Example:
        >>> layers_in_range(32, (0.25, 0.5))
        range(8, 16)
        >>> layers_in_range(2, (0.25, 0.5))
        range(0, 1)
    """
    first, last = (math.floor(Fraction(str(fraction)) * num_layers) for fraction in layer_range)
    first = min(first, num_layers - 1)
    return range(first, max(last, first + 1))


def check_layer_range(value: Sequence[float]) -> LayerRange:
    """Return ``value`` as a range.

    Raises:
        ConfigError: If it is none.
    """
    numbers = list(value) if isinstance(value, (list, tuple)) else []
    if len(numbers) != 2 or not all(map(is_number, numbers)) or not 0 <= numbers[0] < numbers[1] <= 1:
        raise ConfigError(
            f"layer_range={value!r}: two fractions of the depth, such as (0.25, 0.5) for the second quarter of the "
            "blocks; the first below the second, both in [0, 1]."
        )
    return float(numbers[0]), float(numbers[1])


def product_of(
    structure: Structure, layer_range: LayerRange, modules: Sequence[str], names: Sequence[str] | None = None
) -> dict[str, tuple[str, ...]]:
    """Return exactly the parameters of these modules in these layers: the product of the two.

    Args:
        structure: The model.
        layer_range: Which blocks of each stack.
        modules: Kinds (``up``, ``query``, ...), groups (``ffn``, ``attention``), names or paths of modules inside a
            block (``up_proj``, ``mlp.up_proj``), or ``all``.
        names: Parameters to take from; default all.

    Returns:
        Unit -> names, in model order. A unit is a matrix with its bias, or another single module.

    Raises:
        ScopeError: If an entry of ``modules`` is found in no block of the range.
    """
    allowed = set(structure.parameters if names is None else names)
    kinds = _kinds_of_names(structure)
    units: dict[str, list[str]] = {}
    hit: set[str] = set()
    present: set[str | None] = set()
    paths: dict[str, None] = {}
    for stack in structure.stacks:
        blocks = [block for block in structure.blocks if block.stack == stack]
        for index in layers_in_range(len(blocks), layer_range):
            for name in blocks[index].parameters:
                inside = unit_of(name).removeprefix(blocks[index].name).lstrip(".")
                entries = [entry for entry in modules if _is_meant(entry, inside, kinds.get(name))]
                hit.update(entries)
                if entries and name in allowed:
                    units.setdefault(unit_of(name), []).append(name)
                present.add(kinds.get(name))
                paths[inside] = None
    for entry in modules:
        if entry not in hit:
            groups = [group for group, members in GROUPS.items() if present.intersection(members)]
            choices = ["all", *groups, *(kind for kind in get_args(Kind) if kind in present), *paths]
            raise ScopeError(
                f"modules={entry!r} is in no block of layer_range={tuple(layer_range)}. {suggest(entry, choices)}"
            )
    return {unit: tuple(members) for unit, members in units.items()}


def _is_meant(entry: str, inside: str, kind: Kind | None) -> bool:
    if entry == "all":
        return True
    if entry in GROUPS:
        return kind in GROUPS[entry]
    if entry in get_args(Kind):
        return kind == entry
    return f".{entry}." in f".{inside}."


def _kinds_of_names(structure: Structure) -> dict[str, Kind]:
    """Parameter name -> kind of its projection; an adapter is of the kind of the layer that it was put into."""
    kinds: dict[str, Kind] = {}
    for projection in find_projections(structure):
        host = projection.unit.removesuffix(".base_layer")
        inside = projection.members
        if host != projection.unit:
            inside = tuple(name for name in structure.parameters if name.startswith(f"{host}."))
        kinds.update(dict.fromkeys(inside, projection.kind))
    return kinds


def _find_in_block(structure: Structure, block: Block) -> list[Projection]:
    members: dict[str, list[str]] = {}
    for name in block.parameters:
        members.setdefault(unit_of(name), []).append(name)
    attention: dict[str, Kind] = {}
    forward: list[str] = []
    mixers: list[str] = []
    matrices: dict[str, str] = {}
    for unit, names in members.items():
        weight = next((n for n in names if structure.parameters[n].ndim >= 2 and not n.endswith("bias")), None)
        if weight is None:
            continue
        category = category_of(unit, names, block.name, structure)
        matrices[unit] = weight
        if category in ("attention", "cross_attention"):
            kind = _attention_kind(unit, weight)
            if kind is None or _is_mixer(structure, unit, block):
                mixers.append(unit)
            else:
                attention[unit] = kind
        elif category == "ffn":
            forward.append(unit)
    width = _width(structure, block, [matrices[unit] for unit in (*attention, *forward, *mixers)])
    inner = forward or ([] if attention else mixers)
    sizes = {unit: _in_and_out(structure, matrices[unit], width) for unit in inner}
    kinds: dict[str, Kind] = {**attention, **_feed_forward_kinds(sizes, width)}
    return [
        Projection(unit, block.name, kinds[unit], weight, tuple(members[unit]), _out_axis(structure, weight, width))
        for unit, weight in matrices.items()
        if unit in kinds
    ]


def _attention_kind(unit: str, weight: str) -> Kind | None:
    if weight.endswith("in_proj_weight"):
        return "qkv"  # torch.nn.MultiheadAttention
    parts = [part.lower() for part in unit.split(".") if not part.isdigit() and part != "base_layer"]
    return next((kind for kind, names in _NAMES.items() if parts and parts[-1] in names), None)


def _is_mixer(structure: Structure, unit: str, block: Block) -> bool:
    """Whether a unit lies in a state-space mixer, which has no queries although it has an output projection."""
    parent = unit.rpartition(".")[0]
    siblings = [u for u in map(unit_of, block.parameters) if u.startswith(f"{parent}.")]
    return parent != block.name and any(u.rpartition(".")[2] in ("A_log", "conv1d", "dt_proj") for u in siblings)


def _width(structure: Structure, block: Block, weights: Sequence[str]) -> int:
    """Width of the residual stream: the size of the block's norms, or else the size most of its matrices share."""
    parameters = structure.parameters
    norms = [n for n in block.parameters if is_norm(structure.modules.get(n.rpartition(".")[0], nn.Identity()))]
    sizes = [parameters[name].numel() for name in norms] or [
        size for name in weights for size in parameters[name].shape[:2]
    ]
    return Counter(sizes).most_common(1)[0][0] if sizes else 0


def _in_and_out(structure: Structure, weight: str, width: int) -> tuple[int, int]:
    shape = structure.parameters[weight].shape
    owner = structure.modules.get(weight.rpartition(".")[0])
    axis = _out_axis(structure, weight, width)
    if isinstance(owner, nn.modules.conv._ConvNd):
        return owner.in_channels, owner.out_channels
    other = {0: 1, 1: 0 if len(shape) == 2 else 2, 2: 1}[axis]
    return shape[other], shape[axis]


def _out_axis(structure: Structure, weight: str, width: int) -> int:
    shape = structure.parameters[weight].shape
    owner = structure.modules.get(weight.rpartition(".")[0])
    if isinstance(owner, nn.modules.conv._ConvTransposeNd) or type(owner).__name__ == "Conv1D":
        return 1
    if len(shape) != 3 or isinstance(owner, nn.modules.conv._ConvNd):
        return 0
    transposed = getattr(owner, "is_transposed", None)  # experts: (experts, out, in), or (experts, in, out)
    if transposed is None:
        leads_down = _DOWN.search(weight.rpartition(".")[2]) is not None
        transposed = shape[2] == width != shape[1] if leads_down else shape[1] == width != shape[2]
    return 2 if transposed else 1


def _feed_forward_kinds(sizes: dict[str, tuple[int, int]], width: int) -> dict[str, Kind]:
    leaves = {unit: unit.rpartition(".")[2].lower() for unit in sizes}
    up = [unit for unit, (inner, outer) in sizes.items() if inner == width != outer]
    down = [unit for unit, (inner, outer) in sizes.items() if outer == width != inner]
    if not up and not down:
        square = [unit for unit, both in sizes.items() if both == (width, width)]
        down = [unit for unit in square if _DOWN.search(".".join(unit.split(".")[-2:]))] or square[-1:]
        up = [unit for unit in square if unit not in down]
    kinds: dict[str, Kind] = dict.fromkeys(down, "down")
    for unit in up:
        beside = {leaves[other] for other in up if other.rpartition(".")[0] == unit.rpartition(".")[0]}
        is_gate = _GATE.search(leaves[unit]) is not None and "up" not in leaves[unit]
        kinds[unit] = "gate" if is_gate and len(beside) > 1 else "up"
    return kinds


def output_axis_mask(values: torch.Tensor, parameter: torch.Tensor, out_axis: int) -> torch.Tensor:
    """Shape a value per output unit so that it broadcasts over a matrix (or bias) along the axis of these units.

    Args:
        values: Of shape ``(units,)``, or ``(experts, units)``.
        parameter: What it is for: the matrix, or a bias with as many dimensions as ``values``.
        out_axis: Axis of the matrix's output units.
    """
    if parameter.ndim == values.ndim:
        return values
    shape = [1] * parameter.ndim
    shape[out_axis] = values.shape[-1]
    if values.ndim == 2:
        shape[0] = values.shape[0]
    return values.reshape(shape)
