"""Who trained when: a small record of every draw, saved in checkpoints and plotted."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = ["Ledger"]


class Ledger:
    """Record which units were active from which optimizer step on.

    A draw costs two small integers lists, whatever the number of parameters, because rows refer to units.

    Args:
        units: Unit name -> canonical parameter names, in model order. Units are disjoint.
    """

    def __init__(self, units: dict[str, tuple[str, ...]]) -> None:
        self.units = dict(units)
        self._order = {unit: position for position, unit in enumerate(self.units)}
        self._keys = list(self.units)
        self._rows: list[tuple[int, tuple[int, ...]]] = []
        self._sets: dict[tuple[int, ...], tuple[frozenset[str], frozenset[str]]] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def record(self, step: int, active: Iterable[str]) -> None:
        """Add a row: from optimizer step ``step`` on, the units ``active`` train."""
        self._rows.append((step, tuple(sorted(self._order[unit] for unit in active))))

    def rows(self) -> list[tuple[int, frozenset[str]]]:
        """All rows as ``(optimizer step, active unit names)``."""
        return [(step, self._expand(row)[0]) for step, row in self._rows]

    def history(self) -> list[tuple[int, frozenset[str]]]:
        """All rows as ``(optimizer step, parameter names)``."""
        return [(step, self._expand(row)[1]) for step, row in self._rows]

    def steps_trained(self, until_step: int) -> dict[str, int]:
        """Optimizer steps each unit has trained before ``until_step``."""
        total = dict.fromkeys(self.units, 0)
        ends = [step for step, _ in self._rows[1:]] + [until_step]
        for (start, row), end in zip(self._rows, ends, strict=True):
            for unit in row:
                total[self._keys[unit]] += max(0, min(end, until_step) - start)
        return total

    def state_dict(self) -> dict[str, Any]:
        """Plain integers and strings."""
        return {"units": self._keys, "rows": [[step, list(row)] for step, row in self._rows]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the rows of a ledger over the same units.

        Raises:
            ValueError: If the state names other units.
        """
        if list(state["units"]) != self._keys:
            raise ValueError("the ledger was written for other units")
        self._rows = [(int(step), tuple(int(unit) for unit in row)) for step, row in state["rows"]]

    def _expand(self, row: tuple[int, ...]) -> tuple[frozenset[str], frozenset[str]]:
        if row not in self._sets:
            units = frozenset(self._keys[unit] for unit in row)
            self._sets[row] = units, frozenset(name for unit in units for name in self.units[unit])
        return self._sets[row]
