"""Which parameters the phases of a schedule mean on a model.

An entry of ``params``, ``freeze`` and ``only`` is a parameter name, or an entry of a scope
(:mod:`lightning_peft.core.scope`: roles, module paths, globs, ``re:``, ``class:``, ``!``), or, as in
finetuning-scheduler's files, a regular expression that is matched at the beginning of names. An entry that would mean
different parameters as a path or glob and as such an expression is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lightning_peft.core.blocks import ROLES, Structure
from lightning_peft.core.scope import resolve_scope
from lightning_peft.errors import ScopeError, suggest
from lightning_peft.methods.phases import Phase, list_mistakes

__all__ = ["PhaseNames", "resolve_entry", "resolve_phases"]


@dataclass(frozen=True)
class PhaseNames:
    """What a phase means on a model.

    Args:
        listed: Names of ``params`` or ``only`` that train in this phase, in model order.
        trains: All names that train in this phase.
        explicit: Those of ``listed`` that were asked for by name or pattern, not by role.
    """

    listed: tuple[str, ...]
    trains: frozenset[str]
    explicit: frozenset[str]


def resolve_phases(phases: Iterable[Phase], structure: Structure) -> list[PhaseNames]:
    """Turn the entries of all phases into names.

    Raises:
        ScopeError: With all entries that match nothing or are ambiguous, and all phases in which nothing trains.
    """
    mistakes: list[str] = []
    resolved: list[PhaseNames] = []
    trains: frozenset[str] = frozenset()
    for number, phase in enumerate(phases):
        before = len(mistakes)
        asked = phase.params if phase.only is None else phase.only
        listed, explicit = _resolve(asked, structure, f"phase {number}", mistakes)
        frozen, _ = _resolve(phase.freeze, structure, f"phase {number}, freeze", mistakes)
        candidates = listed if phase.only is not None else trains | listed
        idle = [entry for entry in phase.freeze if not entry.startswith("!")]
        if frozen and not frozen & candidates:
            mistakes.append(f"phase {number}: nothing of freeze={idle} trains at that time")
        trains = frozenset(candidates - frozen)
        if not trains and len(mistakes) == before:
            mistakes.append(f"phase {number}: nothing would train")
        ordered = tuple(name for name in structure.parameters if name in listed and name in trains)
        resolved.append(PhaseNames(ordered, trains, explicit & frozenset(ordered)))
    if mistakes:
        raise ScopeError(list_mistakes("The schedule does not fit the model and", mistakes))
    return resolved


def _resolve(
    entries: Sequence[str], structure: Structure, where: str, mistakes: list[str]
) -> tuple[frozenset[str], frozenset[str]]:
    chosen: dict[str, bool] = {}
    for entry in entries:
        try:
            names, explicit = resolve_entry(entry.removeprefix("!"), structure)
        except ScopeError as error:
            mistakes.append(f"{where}: {error}")
            continue
        for name in names:
            if entry.startswith("!"):
                chosen.pop(name, None)
            else:
                chosen[name] = chosen.get(name, False) or explicit
    return frozenset(chosen), frozenset(name for name, explicit in chosen.items() if explicit)


_ONLY_REGEX = re.compile(r"[()|{}\\^$+]")


def resolve_entry(entry: str, structure: Structure) -> tuple[tuple[str, ...], bool]:
    """Return the canonical names that one entry of a phase means, in model order, and whether it is explicit.

    Raises:
        ScopeError: If it means nothing, only integer tensors, or two different things.
    """
    if entry in ROLES or entry.startswith(("re:", "class:")) or entry in structure.aliases:
        scope = resolve_scope(entry, structure, argument="entry")
        return scope.names, entry not in ROLES
    error: ScopeError | None = None
    as_scope: tuple[str, ...] = ()
    if not _ONLY_REGEX.search(entry):
        try:
            as_scope = resolve_scope(entry, structure, argument="entry").names
        except ScopeError as problem:
            error = problem
    as_prefix = _match_beginning(entry, structure)
    if as_scope and as_prefix and as_scope != as_prefix:
        both = set(as_scope) & set(as_prefix)
        other = next(name for name in (*as_prefix, *as_scope) if name not in both)
        exact = entry if any(character in entry for character in "*?[") else f"{entry}.*"
        raise ScopeError(
            f"{entry!r} means {len(as_scope)} parameter(s) as a path or glob, but {len(as_prefix)} (such as {other!r}) "
            "as a regular expression matched at the beginning, which finetuning-scheduler takes it for. Write "
            f"{'re:' + _as_regex(exact)!r} for the first or {'re:' + entry + '.*'!r} for the second."
        )
    names = as_scope or as_prefix
    if not names:
        choices = [*ROLES, *structure.aliases, *(path for path in structure.modules if path)]
        raise (
            error
            if error is not None and "integer" in str(error)
            else ScopeError(
                f"{entry!r} matches no parameter of the model. {suggest(entry.removesuffix('.*'), choices)}"
            )
        )
    return names, True


def _as_regex(glob: str) -> str:
    pieces = {"*": ".*", "?": "."}
    return "".join(
        pieces.get(part, part if part.startswith("[") else re.escape(part))
        for part in re.split(r"(\*|\?|\[[^\]]*\])", glob)
        if part
    )


def _match_beginning(entry: str, structure: Structure) -> tuple[str, ...]:
    try:
        pattern = re.compile(entry)
    except re.error:
        return ()
    hits = {structure.aliases[alias] for alias in structure.aliases if pattern.match(alias)}
    return tuple(
        name for name, p in structure.parameters.items() if name in hits and (p.is_floating_point() or p.is_complex())
    )
