"""Give one object a method of its own for a while."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["replace_on"]


def replace_on(instance: Any, **attributes: Any) -> Callable[[], None]:
    """Set ``attributes`` on ``instance``, in front of those of its class.

    Returns:
        A function that makes the instance what it was, whatever was set on it since; a second call does nothing.
    """
    own: dict[str, Any] = vars(instance)
    before = {name: own[name] for name in attributes if name in own}
    waiting = set(attributes)
    own.update(attributes)

    def undo() -> None:
        while waiting:
            name = waiting.pop()
            if name in before:
                own[name] = before[name]
            else:
                own.pop(name, None)

    return undo
