"""Optimizer groups and the learning-rate schedule of the ready modules; both are plain torch objects."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_peft.errors import ConfigError, suggest

__all__ = ["WarmupSchedule", "build_optimizer", "parameter_groups"]


def parameter_groups(
    module: nn.Module, *, weight_decay: float | None = None, no_decay: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Split the parameters with ``requires_grad`` in two groups: with weight decay, and without.

    Without decay are biases, vectors and scalars (fewer than two dimensions), every weight of a normalisation module,
    and the names that match ``no_decay``. Each parameter is in exactly one group, a tied weight too (under its first
    name). An empty group is left out.

    Args:
        module: Where the parameters are.
        weight_decay: Decay of the first group, 0 or more; None leaves it to the optimizer's own argument.
        no_decay: Glob patterns of parameter names, such as ``"*embed*"``.

    Raises:
        ConfigError: A negative ``weight_decay``, or a pattern that matches no parameter with ``requires_grad``.
    """
    if weight_decay is not None and weight_decay < 0:
        raise ConfigError(f"weight_decay={weight_decay} is negative; 0 or more is needed.")
    norm_weights = {
        id(parameter)
        for child in module.modules()
        if "norm" in type(child).__name__.lower()
        for parameter in child.parameters(recurse=False)
    }
    decayed, plain, names = [], [], []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        names.append(name)
        is_plain = (
            parameter.ndim < 2
            or id(parameter) in norm_weights
            or name.rpartition(".")[2] == "bias"
            or any(fnmatch.fnmatchcase(name, pattern) for pattern in no_decay)
        )
        (plain if is_plain else decayed).append(parameter)
    for pattern in no_decay:
        if not fnmatch.filter(names, pattern):
            raise ConfigError(f"no_decay: {pattern!r} matches no parameter. {suggest(pattern.strip('*'), names)}")
    first: dict[str, Any] = {"params": decayed}
    if weight_decay is not None:
        first["weight_decay"] = weight_decay
    return [group for group in (first, {"params": plain, "weight_decay": 0.0}) if group["params"]]


def build_optimizer(
    module: nn.Module,
    optimizer: Callable[[Any], Optimizer],
    *,
    weight_decay: float | None = None,
    no_decay: Sequence[str] = (),
) -> Optimizer:
    """Return ``optimizer`` over the groups of :func:`parameter_groups`.

    Raises:
        ConfigError: Nothing to train, or a weight decay asked of an optimizer that has none.
    """
    groups = parameter_groups(module, weight_decay=weight_decay, no_decay=no_decay)
    if not groups:
        raise ConfigError("No parameter has requires_grad, so there is nothing to optimise.")
    built = optimizer(groups)
    if "weight_decay" not in built.defaults and (weight_decay or no_decay):
        raise ConfigError(f"{type(built).__name__} has no weight decay; leave out weight_decay and no_decay.")
    return built


class WarmupSchedule(LRScheduler):
    """Warm up linearly to each group's learning rate, then keep it or let it fall to a floor, in optimizer steps.

    The factor on the learning rate after ``t`` optimizer steps, with warm-up ``w``, length ``T``, floor ``f`` and
    ``x = (t - w) / (T - w)`` clipped to [0, 1]: ``(t + 1) / (w + 1)`` while ``t < w``; then 1 (constant),
    ``1 - (1 - f) x`` (linear), or ``f + (1 - f) (1 + cos(pi x)) / 2`` (cosine). The ready modules fill in
    ``total_steps`` from the Trainer; a loop of your own gives it.

    Args:
        optimizer: The optimizer whose learning rates are scaled.
        decay: What follows the warm-up: ``constant``, ``linear`` or ``cosine``.
        warmup_steps: Length of the warm-up in optimizer steps; takes the place of ``warmup_fraction``.
        warmup_fraction: Length of the warm-up as a fraction of all steps, in [0, 1).
        min_fraction: The floor as a fraction of the peak, in [0, 1].
        total_steps: Optimizer steps of the whole run; None: filled in by the module from the Trainer.

    Raises:
        ConfigError: A value outside its range.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> schedule = WarmupSchedule(optimizer, decay="linear", warmup_steps=1, total_steps=5)
        >>> rates = []
        >>> for _ in range(5):
        ...     rates.append(optimizer.param_groups[0]["lr"])
        ...     optimizer.step()
        ...     schedule.step()
        >>> rates
        [0.5, 1.0, 0.75, 0.5, 0.25]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        decay: Literal["constant", "linear", "cosine"] = "linear",
        warmup_steps: int | None = None,
        warmup_fraction: float = 0.0,
        min_fraction: float = 0.0,
        total_steps: int | None = None,
    ) -> None:
        if decay not in ("constant", "linear", "cosine"):
            raise ConfigError(f"decay={decay!r}. {suggest(str(decay), ['constant', 'linear', 'cosine'])}")
        if not 0 <= warmup_fraction < 1 or not 0 <= min_fraction <= 1 or (warmup_steps or 0) < 0:
            raise ConfigError(
                f"WarmupSchedule: warmup_fraction={warmup_fraction} must lie in [0, 1), min_fraction={min_fraction} in "
                f"[0, 1], and warmup_steps={warmup_steps} must be 0 or more."
            )
        self.decay = decay
        self.warmup_steps = warmup_steps
        self.warmup_fraction = warmup_fraction
        self.min_fraction = min_fraction
        self.total_steps = total_steps
        super().__init__(optimizer)

    @property
    def needs_total_steps(self) -> bool:
        """Whether the schedule has no length yet, but depends on it."""
        return self.total_steps is None and (
            self.decay != "constant" or (self.warmup_steps is None and self.warmup_fraction > 0)
        )

    def set_total_steps(self, total_steps: int) -> None:
        """Give the schedule its length in optimizer steps, before the first step."""
        self.total_steps = total_steps
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate
        self._last_lr = self.get_lr()

    def factor(self, step: int) -> float:
        """Return the factor on the learning rate after ``step`` optimizer steps."""
        total = self.total_steps if self.total_steps is not None else step + 1
        warmup = self.warmup_steps if self.warmup_steps is not None else math.ceil(self.warmup_fraction * total)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if self.decay == "constant" or self.total_steps is None:
            return 1.0
        done = min(1.0, (step - warmup) / max(1, total - warmup))
        shape = 1 - done if self.decay == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.min_fraction + (1 - self.min_fraction) * shape

    def get_lr(self) -> list[float | torch.Tensor]:
        """Return the learning rate of each group; a method of torch's schedulers."""
        return [base * self.factor(self.last_epoch) for base in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """Return the position; the length is the new run's own, so a resumed run may be longer."""
        return {key: value for key, value in super().state_dict().items() if key != "total_steps"}
