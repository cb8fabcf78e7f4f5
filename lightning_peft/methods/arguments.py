"""Checks of the plain numbers that methods are configured with."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["is_fraction", "is_number", "is_whole"]


def is_number(value: Any) -> bool:
    """Whether ``value`` is a finite real number; ``True`` and ``False`` are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: Any, least: int) -> bool:
    """Whether ``value`` is a whole number (2 or 2.0), at least ``least``."""
    return is_number(value) and int(value) == value and value >= least


def is_fraction(value: Any) -> bool:
    """Whether ``value`` is a number in ``(0, 1]``."""
    return is_number(value) and 0 < value <= 1
