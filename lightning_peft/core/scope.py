"""Turn what a user writes in ``scope=`` into parameter names.

A scope is one string or a list of strings. Each string is

* a role: ``blocks``, ``embeddings``, ``head``, ``norms``, ``biases``, ``adapters``, ``all``;
* a parameter name (``model.layers.3.mlp.up_proj.weight``) or a module path (``model.layers.3``), which stands for
  everything below it;
* a glob (``*.q_proj.*``, where ``*`` also matches dots);
* ``re:PATTERN``: a regular expression that must match the whole name;
* ``class:NAME``: all parameters below modules of that class;
* ``!`` before any of these: take these names away again.

Names given by the user are matched against every name of a tied weight. A name, path, glob, regex or class is
*explicit*: it also selects parameters that the user had frozen. A role selects only what the user left trainable.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_peft.core.blocks import ROLES, Structure
from lightning_peft.core.quantized import is_quantized
from lightning_peft.errors import ScopeError, suggest

__all__ = ["Scope", "match_names", "resolve_scope"]


@dataclass(frozen=True)
class Scope:
    """Names a scope stands for.

    Args:
        names: Canonical parameter names in model order.
        explicit: Those of ``names`` that the user asked for by name, path, pattern or class.
    """

    names: tuple[str, ...]
    explicit: frozenset[str]


def resolve_scope(scope: str | Sequence[str], structure: Structure, *, argument: str = "scope") -> Scope:
    """Resolve ``scope`` against a model.

    Args:
        scope: One entry or several, see the module's documentation.
        structure: The model, from :func:`~lightning_peft.core.blocks.find_structure`.
        argument: How the caller's argument is called, for error messages.

    Returns:
        The names, integer tensors (quantised weights) left out.

    Raises:
        ScopeError: If an entry matches nothing, matches only integer tensors, or nothing is left.
    """
    entries = [scope] if isinstance(scope, str) else list(scope)
    if not entries:
        return Scope((), frozenset())
    chosen: dict[str, bool] = {}
    for entry in entries:
        negative = entry.startswith("!")
        wanted = entry[1:] if negative else entry
        matched = match_names(wanted, structure)
        if not matched and wanted not in ROLES:
            raise ScopeError(_no_match(wanted, structure, argument))
        if negative:
            for name in matched:
                chosen.pop(name, None)
            continue
        trainable = [name for name in matched if not is_quantized(structure.parameters[name])]
        if matched and not trainable:
            raise ScopeError(
                f"{argument}={entry!r} matches only integer tensors such as {matched[0]!r} "
                f"({structure.parameters[matched[0]].dtype}). Quantised weights cannot be trained; "
                "train an adapter, norms or biases beside them."
            )
        for name in trainable:
            chosen[name] = chosen.get(name, False) or wanted not in ROLES
    names = tuple(name for name in structure.parameters if name in chosen)
    if not names and any(not entry.startswith("!") for entry in entries):
        raise ScopeError(_no_match(", ".join(entries), structure, argument))
    return Scope(names, frozenset(name for name, explicit in chosen.items() if explicit))


def match_names(entry: str, structure: Structure) -> list[str]:
    """Return the canonical names that one entry matches, quantised tensors too; none if it matches nothing.

    Raises:
        ScopeError: If a regular expression is not valid.
    """
    if entry in ROLES:
        return list(structure.roles[entry])
    aliases = structure.aliases
    if entry.startswith("re:"):
        try:
            pattern = re.compile(entry[3:])
        except re.error as error:
            raise ScopeError(f"{entry!r} is not a valid regular expression: {error}.") from None
        hits = [alias for alias in aliases if pattern.fullmatch(alias)]
    elif entry.startswith("class:"):
        owners = [path for path, module in structure.modules.items() if type(module).__name__ == entry[6:]]
        prefixes = tuple(f"{path}." if path else "" for path in owners)
        hits = [alias for alias in aliases if alias.startswith(prefixes)]
    elif any(character in entry for character in "*?["):
        hits = [alias for alias in aliases if fnmatch.fnmatchcase(alias, entry)]
        hits = hits or [alias for alias in aliases if fnmatch.fnmatchcase(alias, f"{entry}.*")]
    else:
        hits = [alias for alias in aliases if alias == entry or alias.startswith(f"{entry}.")]
    return list(dict.fromkeys(aliases[alias] for alias in hits))


def _no_match(entry: str, structure: Structure, argument: str) -> str:
    if entry in ROLES:
        found = [role for role in ROLES if structure.roles[role]]
        hint = f"This model has: {', '.join(repr(role) for role in found)}." if found else "It has no parameters."
        return f"{argument}={entry!r} matches no parameter of the model. {hint}"
    if entry.startswith("class:"):
        classes = {type(module).__name__ for module in structure.modules.values()}
        return f"{argument}={entry!r}: the model has no module of that class. {suggest(entry[6:], sorted(classes))}"
    choices = [*ROLES, *structure.aliases, *(path for path in structure.modules if path)]
    return f"{argument}={entry!r} matches no parameter of the model. {suggest(entry, choices)}"
