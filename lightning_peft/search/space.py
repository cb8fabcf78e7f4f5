"""What a search chooses from: layers times modules, level by level, or units that are each on or off."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from lightning_peft.core.blocks import ROLES, Structure
from lightning_peft.errors import ScopeError
from lightning_peft.methods.base import units_by_block
from lightning_peft.methods.projections import GROUPS, LayerRange, find_projections, product_of

__all__ = ["LAYER_RANGES", "Level", "block_modules", "coarse_levels", "compact_names"]

Level = Callable[[Mapping[str, Any]], Mapping[str, Mapping[str, Any]]]
"""One level of a tree: settings so far -> label of each branch -> the settings it adds or replaces."""

LAYER_RANGES: dict[str, LayerRange] = {
    "bottom1": (0.0, 0.25),
    "bottom2": (0.25, 0.5),
    "bottom-plus": (0.0, 0.5),
    "middle": (0.5, 0.75),
    "middle-plus": (0.25, 0.75),
    "top": (0.75, 1.0),
    "top-plus": (0.5, 1.0),
}
"""The ranges of layers that CoFiTune's authors tried, by their names."""

_FINER: dict[str, tuple[tuple[str, ...], ...]] = {
    "ffn": (("up", "down"), ("up",), ("down",)),
    "attention": (("query", "key", "value"), ("qkv",), ("output",)),
}


def coarse_levels(structure: Structure, layer_ranges: Mapping[str, LayerRange] = LAYER_RANGES) -> list[Level]:
    """Return the levels of CoFiTune's tree: the layers, then attention or feed-forward, then their projections.

    The first level trains attention and feed-forward of each range. Branches that the model does not have are left
    out.

    Args:
        structure: The model.
        layer_ranges: Label -> range to try on the first level.
    """
    kinds = {projection.kind for projection in find_projections(structure)}
    groups = [group for group, members in GROUPS.items() if kinds.intersection(members)]

    def layers(_: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        return {
            label: {"layer_range": layer_range, "modules": tuple(groups)}
            for label, layer_range in layer_ranges.items()
            if _has(structure, layer_range, groups)
        }

    def modules(chosen: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        return {g: {"modules": (g,)} for g in groups if _has(structure, chosen["layer_range"], [g])}

    def finer(chosen: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        parts = _FINER[chosen["modules"][0]] if len(chosen["modules"]) == 1 else ()
        return {"+".join(p): {"modules": p} for p in parts if _has(structure, chosen["layer_range"], p)}

    return [layers, modules, finer]


def block_modules(structure: Structure, groups: Sequence[str] = ("attention", "ffn")) -> dict[str, tuple[str, ...]]:
    """Return units of blocks times module groups: label, such as ``model.layers.3 ffn`` -> parameter names.

    A block without any of the groups (of a CNN) is one unit.

    Args:
        structure: The model.
        groups: Kinds, groups or module names, as in :class:`~lightning_peft.CoFiTune`.
    """
    units: dict[str, tuple[str, ...]] = {}
    for block, names in units_by_block(structure, structure.roles["blocks"]).items():
        parts: dict[str, tuple[str, ...]] = {}
        for group in groups:
            try:
                found = product_of(structure, (0.0, 1.0), [group], names)
            except ScopeError:
                continue
            if found:
                parts[f"{block} {group}"] = tuple(name for members in found.values() for name in members)
        units.update(parts or {block: names})
    return units


def compact_names(structure: Structure, names: Collection[str]) -> list[str]:
    """Return scope entries that stand for exactly ``names``: paths of modules all of whose parameters are among them.

    Args:
        structure: The model.
        names: Canonical parameter names.
    """
    wanted = set(names)
    below: dict[str, set[str]] = {}
    for alias, canonical in structure.aliases.items():
        parts = alias.split(".")
        for depth in range(1, len(parts) + 1):
            below.setdefault(".".join(parts[:depth]), set()).add(canonical)
    entries: list[str] = []
    covered: set[str] = set()
    for path in sorted(below.keys() - set(ROLES), key=lambda path: (path.count("."), path)):
        if below[path] <= wanted and not below[path] <= covered:
            entries.append(path)
            covered |= below[path]
    assert covered == wanted, "every name is a path of its own"
    order = {name: index for index, name in enumerate(structure.parameters)}
    return sorted(entries, key=lambda path: min(order[name] for name in below[path]))


def _has(structure: Structure, layer_range: LayerRange, modules: Sequence[str]) -> bool:
    try:
        return bool(product_of(structure, layer_range, modules))
    except ScopeError:
        return False
