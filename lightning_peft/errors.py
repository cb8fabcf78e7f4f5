"""The package's exceptions: each names the mistake, the place, and the nearest valid choice.

Every exception is a :class:`LightningPeftError` and also a ``ValueError`` (a wrong input) or a ``RuntimeError``
(a run that cannot go on), so that existing handlers keep working.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "BaseMismatch",
    "ConfigError",
    "EffectError",
    "LightningPeftError",
    "PlanConflict",
    "ResumeMismatch",
    "ScopeError",
    "UnsupportedStrategy",
    "nearest",
    "suggest",
]


class LightningPeftError(Exception):
    """Base of all errors that ``lightning_peft`` raises on purpose."""


class ConfigError(LightningPeftError, ValueError):
    """An argument or a combination of settings that cannot work."""


class ScopeError(LightningPeftError, ValueError):
    """A scope that names nothing, or names something that cannot be trained."""


class PlanConflict(LightningPeftError, ValueError):
    """Two methods claim the same parameter."""


class ResumeMismatch(LightningPeftError, RuntimeError):
    """A checkpoint was written under settings that differ from the current ones."""


class BaseMismatch(LightningPeftError, RuntimeError):
    """A delta or adapter belongs to another base model."""


class UnsupportedStrategy(LightningPeftError, RuntimeError):
    """The Trainer's strategy cannot serve the method."""


class EffectError(LightningPeftError, RuntimeError):
    """What was planned to train and what really moved are not the same set."""


def nearest(name: str, choices: Iterable[str], limit: int = 3) -> list[str]:
    """Return up to ``limit`` of ``choices`` that look most like ``name``, best first."""
    choices = list(dict.fromkeys(choices))
    lowered: dict[str, str] = {}
    for choice in choices:
        lowered.setdefault(choice.lower(), choice)
    return [lowered[match] for match in difflib.get_close_matches(name.lower(), list(lowered), n=limit, cutoff=0.5)]


def suggest(name: str, choices: Iterable[str], limit: int = 3) -> str:
    """Return a sentence with the nearest of ``choices``; a few of them if none is near; empty if there are none."""
    choices = list(dict.fromkeys(choices))
    close = nearest(name, choices, limit)
    if close:
        return f"Did you mean {' or '.join(repr(choice) for choice in close)}?"
    if not choices:
        return ""
    shown = ", ".join(repr(choice) for choice in choices[:8])
    return f"Valid choices: {shown}{', ...' if len(choices) > 8 else ''}."
