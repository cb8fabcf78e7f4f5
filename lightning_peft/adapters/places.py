"""Choose modules of any kind, where adapters go after or beside whole sublayers."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence

from torch import nn

from lightning_peft.core.blocks import find_structure
from lightning_peft.errors import ScopeError, suggest

__all__ = ["module_paths"]


def module_paths(root: nn.Module, layers: str | Sequence[str], target: str, places: Mapping[str, str]) -> list[str]:
    """Return the paths, below ``target``, of modules of any kind.

    Args:
        root: The LightningModule.
        layers: Names of ``places``, ``"blocks"``, or paths, globs, ``re:`` and ``class:`` patterns of modules of
            ``root``; ``!`` before one takes its modules away.
        target: Path of the submodule.
        places: Name -> regular expression of module paths.

    Raises:
        ScopeError: If an entry names no module with parameters, or a module inside another that is named.
    """
    structure = find_structure(root)
    prefix = f"{target}." if target else ""
    inside = tuple(f"{path}." for path, module in structure.modules.items() if hasattr(module, "adapter_layer_names"))
    known = {
        path.removesuffix(".base_layer"): module
        for path, module in structure.modules.items()
        if path.startswith(prefix) and any(True for _ in module.parameters())
        if not path.startswith(inside) or path.endswith(".base_layer")
    }
    chosen: dict[str, None] = {}
    for entry in [layers] if isinstance(layers, str) else layers:
        wanted = entry.removeprefix("!")
        found = _match_modules(wanted, known, {block.name for block in structure.blocks}, places)
        if not found:
            near = [path for path in known if path.startswith(prefix)]
            hint = (
                f"No module there is called as such modules usually are: name paths or patterns, such as {near[-1]!r}."
                if (wanted in places or wanted == "blocks") and near
                else suggest(wanted, [*places, "blocks", *known])
            )
            raise ScopeError(f"layers={entry!r} names no module with parameters in {target!r}. {hint}")
        for path in found:
            if entry.startswith("!"):
                chosen.pop(path, None)
            else:
                chosen[path] = None
    for path in chosen:
        outer = [other for other in chosen if path.startswith(f"{other}.")]
        if outer:
            raise ScopeError(f"layers={layers!r} names {outer[0]!r} and {path!r} inside it. Name one of them.")
    return [path[len(prefix) :] for path in chosen]


def _match_modules(
    entry: str, known: Mapping[str, nn.Module], blocks: set[str], places: Mapping[str, str]
) -> list[str]:
    if entry == "blocks":
        return [path for path in known if path in blocks]
    if entry.startswith("class:"):
        return [path for path, module in known.items() if type(module).__name__ == entry[6:]]
    if entry in places:
        return [path for path in known if re.fullmatch(places[entry], path, re.IGNORECASE)]
    if entry.startswith("re:"):
        return [path for path in known if re.fullmatch(entry[3:], path)]
    return [path for path in known if fnmatch.fnmatchcase(path, entry)]
