"""Entry point that Lightning asks for callbacks whenever a Trainer is made; imports only what is there already."""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["callbacks"]


def callbacks() -> list[Any]:
    """Return the callback that stands beside ``QuantizedPrecision``; none in a process that has not made a plugin."""
    plugin = sys.modules.get("lightning_peft.precision.plugin")
    return [] if plugin is None else plugin.companion_callbacks()
