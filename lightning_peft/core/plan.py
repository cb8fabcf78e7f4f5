"""Who may train what, and who trains now: set algebra over parameter names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations

from lightning_peft.errors import PlanConflict

__all__ = ["Claim", "check_disjoint", "fingerprint_names"]


@dataclass(frozen=True)
class Claim:
    """What one method may train at some time of the run.

    Args:
        owner: How the method is called in messages.
        selectable: Canonical parameter names.
    """

    owner: str
    selectable: frozenset[str]


def check_disjoint(claims: Iterable[Claim]) -> None:
    """Check that no two methods claim the same parameter.

    Raises:
        PlanConflict: Naming every conflicting pair of methods, some of the parameters, and what to change.
    """
    conflicts = []
    for first, second in combinations(claims, 2):
        shared = sorted(first.selectable & second.selectable)
        if shared:
            more = f" and {len(shared) - 3} more" if len(shared) > 3 else ""
            conflicts.append(f"{first.owner} and {second.owner} both claim {', '.join(shared[:3])}{more}")
    if conflicts:
        raise PlanConflict(
            "; ".join(conflicts) + ". A parameter can follow one schedule only: give the methods disjoint scopes, "
            "for example with scope=[..., '!pattern'] or a shorter always=(...)."
        )


def fingerprint_names(names: Iterable[str]) -> int:
    """Return a 62-bit hash of a set of names, to compare plans across ranks cheaply."""
    digest = hashlib.blake2b("\n".join(sorted(names)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2
