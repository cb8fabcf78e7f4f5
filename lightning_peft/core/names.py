"""Parameter names that stay the same whatever wraps the model.

``torch.compile``, activation checkpointing and FSDP insert path components of their own. All names in this package
are *clean*: without those components, so that a plan, a ledger or a checkpoint made in one setting fits the other.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

__all__ = ["clean_name", "named_modules", "named_parameters", "parameter_aliases", "unwrap"]

_WRAPPER_PARTS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def clean_name(name: str) -> str:
    """Return ``name`` without the path components that wrappers add."""
    if "_orig_mod" not in name and "_wrapped_module" not in name:
        return name
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_PARTS)


def unwrap(module: nn.Module) -> nn.Module:
    """Return the innermost module inside compile, checkpoint and FSDP wrappers."""
    while True:
        inner = next((module._modules[part] for part in _WRAPPER_PARTS if part in module._modules), None)
        if inner is None:
            return module
        module = inner


def named_modules(root: nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """Yield ``(clean path, unwrapped module)``, parents first, in registration order.

    Args:
        root: Any module, wrapped or not.
        remove_duplicate: Yield a module that is registered several times only under its first path. Otherwise each
            path is yielded, that of a wrapped module once for each wrapper.
    """
    seen: set[int] = set()
    for name, module in root.named_modules(remove_duplicate=remove_duplicate):
        inner = unwrap(module)
        if not remove_duplicate or id(inner) not in seen:
            seen.add(id(inner))
            yield clean_name(name), inner


def named_parameters(root: nn.Module) -> dict[str, nn.Parameter]:
    """Return each parameter of ``root`` once, under its clean canonical name, in registration order.

    A tied parameter appears under the first name it is registered with, as in
    :meth:`torch.nn.Module.named_parameters`.
    """
    return {clean_name(name): parameter for name, parameter in root.named_parameters()}


def parameter_aliases(root: nn.Module) -> dict[str, str]:
    """Map every clean name of every parameter, tied ones included, to its canonical name."""
    canonical: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, parameter in root.named_parameters(remove_duplicate=False):
        aliases[clean_name(name)] = canonical.setdefault(id(parameter), clean_name(name))
    return aliases
