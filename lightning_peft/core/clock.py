"""The optimizer-step clock: counts what the optimizers really did.

One tick is one call of ``step`` on an optimizer, counted by the optimizer's own hooks. Micro-batches of an
accumulation window, steps that a gradient scaler skips, and validation do not tick. It works for automatic and manual
optimisation alike. With several optimizers a method's time is the largest count among those that hold a parameter of
its scope.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

__all__ = ["OptimizerStepClock"]

_Hook = Callable[[int, torch.optim.Optimizer], None]


class OptimizerStepClock:
    """Count the steps of each optimizer.

    Args:
        before_step: Called with ``(optimizer index, optimizer)`` before each step (and its closure) runs.
        after_step: The same after each step, when the count is already up to date.
    """

    def __init__(self, before_step: _Hook | None = None, after_step: _Hook | None = None) -> None:
        self.counts: list[int] = []
        self._before, self._after = before_step, after_step
        self._handles: list[Any] = []
        self._depth: list[int] = []

    def attach(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Start counting the steps of ``optimizers``; counts already there go on."""
        self.detach()
        self.counts += [0] * (len(optimizers) - len(self.counts))
        self._depth = [0] * len(optimizers)
        for index, optimizer in enumerate(optimizers):
            self._handles.append(optimizer.register_step_pre_hook(self._pre_hook(index)))
            self._handles.append(optimizer.register_step_post_hook(self._post_hook(index)))

    def settle(self) -> None:
        """Forget a step that never ended (an exception that the user's code caught); call it between batches."""
        self._depth = [0] * len(self._depth)

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def time(self, optimizer_indices: Iterable[int]) -> int:
        """Largest step count among the given optimizers; 0 if there are none."""
        return max((self.counts[index] for index in optimizer_indices if index < len(self.counts)), default=0)

    # An optimizer whose `step` calls its parent's `step` runs the hooks of both: only the outermost call counts.

    def _pre_hook(self, index: int) -> Callable[..., None]:
        def hook(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            self._depth[index] += 1
            if self._depth[index] == 1 and self._before is not None:
                self._before(index, optimizer)

        return hook

    def _post_hook(self, index: int) -> Callable[..., None]:
        def hook(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            self._depth[index] -= 1
            if self._depth[index] > 0:
                return
            self._depth[index] = 0
            self.counts[index] += 1
            if self._after is not None:
                self._after(index, optimizer)

        return hook
