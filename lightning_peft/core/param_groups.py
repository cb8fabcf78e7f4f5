"""Cut an optimizer's parameter groups finer, once, and give each group a learning rate of its own.

Groups that are added while a run lasts cannot be restored in one piece and make schedulers disagree with optimizers.
Here all groups exist from the start; one that does not train yet costs nothing, because its parameters have no
gradient. Learning-rate schedulers keep lists with one entry per group; they are cut alike.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from lightning_peft.errors import ConfigError

__all__ = ["scale_learning_rate", "schedulers_of", "set_learning_rate", "split_param_groups"]

_PER_GROUP_LISTS = ("base_lrs", "_last_lr", "lr_lambdas", "min_lrs", "max_lrs", "base_momentums", "max_momentums")
_PEAKS = ("initial_lr", "max_lr", "min_lr")


def schedulers_of(optimizer: torch.optim.Optimizer, schedulers: Iterable[Any]) -> Iterator[Any]:
    """Yield the schedulers of ``optimizer``, those inside chained and sequential ones included."""
    for scheduler in schedulers:
        if getattr(scheduler, "optimizer", None) is optimizer:
            yield scheduler
        yield from schedulers_of(optimizer, getattr(scheduler, "_schedulers", ()))


def split_param_groups(
    optimizer: torch.optim.Optimizer,
    schedulers: Iterable[Any],
    part_of: Callable[[nn.Parameter], Any],
    order: Callable[[Any], Any] = lambda part: part,
) -> None:
    """Cut every parameter group so that all parameters of a group belong to the same part.

    Options are copied; state is not touched. The groups come in the order of their parts, those of one part in the
    order they had. An optimizer whose groups are not cut is left as it is.

    Args:
        optimizer: Any optimizer.
        schedulers: Schedulers of the run; only those of this optimizer change.
        part_of: Parameter -> its part, any hashable value.
        order: Part -> sort key.

    Raises:
        ConfigError: If the optimizer keeps its groups in a second place, where they cannot be cut.
    """
    old = optimizer.param_groups
    pieces: list[tuple[Any, int, list[int]]] = []
    for index, group in enumerate(old):
        parts: dict[Any, list[int]] = {}
        for position, parameter in enumerate(group["params"]):
            parts.setdefault(part_of(parameter), []).append(position)
        pieces += [(part, index, positions) for part, positions in parts.items()]
    pieces.sort(key=lambda piece: (order(piece[0]), piece[1]))
    if [index for _, index, _ in pieces] == list(range(len(old))):
        return
    if hasattr(optimizer, "_partition_parameters") or hasattr(optimizer, "partition_parameters"):
        raise ConfigError(
            f"{type(optimizer).__name__} shares its parameter groups out among the ranks when it is built, so that "
            "they cannot be cut for learning rates of their own. Use an optimizer that is not sharded."
        )
    groups = []
    for _, index, positions in pieces:
        group = {key: _own(value) for key, value in old[index].items() if key not in ("params", "param_names")}
        for key in ("params", "param_names"):
            if key in old[index]:
                group[key] = [old[index][key][position] for position in positions]
        groups.append(group)
    for scheduler in schedulers_of(optimizer, schedulers):
        for name in _PER_GROUP_LISTS:
            values = getattr(scheduler, name, None)
            if isinstance(values, list) and len(values) == len(old):
                setattr(scheduler, name, [_own(values[index]) for _, index, _ in pieces])
    optimizer.param_groups[:] = groups


def set_learning_rate(
    optimizer: torch.optim.Optimizer, schedulers: Iterable[Any], index: int, lr: float, *, joins: bool = False
) -> None:
    """Let group ``index`` train at ``lr`` and follow its schedulers from there.

    The rate counts as the group's initial one for its schedulers. Of a scheduler with a peak per group
    (``OneCycleLR``, ``CyclicLR``) it becomes the peak, and the group joins the cycle where it is.

    Args:
        optimizer: The optimizer.
        schedulers: Schedulers of the run.
        index: Of the group.
        lr: Learning rate.
        joins: What the schedulers have made of the initial rate so far (a warm-up, a decay) holds for ``lr`` at once.
            Otherwise the group starts at ``lr`` itself, until the next step of a scheduler.
    """
    group = optimizer.param_groups[index]
    cyclic = [s for s in schedulers_of(optimizer, schedulers) if hasattr(s, "max_lrs")]
    peak = group["max_lr"] if "max_lr" in group else cyclic[0].max_lrs[index] if cyclic else None
    start = peak or (group.get("initial_lr") if joins else None)
    if start:
        scale_learning_rate(optimizer, schedulers, index, lr / float(start))
        return
    _fill(group, "lr", lr)
    _fill(group, "initial_lr", lr)
    for scheduler in schedulers_of(optimizer, schedulers):
        for name in ("base_lrs", "_last_lr"):
            if isinstance(getattr(scheduler, name, None), list):
                _fill(getattr(scheduler, name), index, lr)


def scale_learning_rate(optimizer: torch.optim.Optimizer, schedulers: Iterable[Any], index: int, factor: float) -> None:
    """Multiply the learning rate of group ``index`` by ``factor``, now and in all that its schedulers will make of it.

    Floors that a scheduler has as one number (``eta_min``) are not scaled.
    """
    group = optimizer.param_groups[index]
    for key in ("lr", *_PEAKS):
        if key in group:
            _fill(group, key, group[key] * factor)
    for scheduler in schedulers_of(optimizer, schedulers):
        for name in ("base_lrs", "max_lrs", "_last_lr"):
            values = getattr(scheduler, name, None)
            if isinstance(values, list):
                _fill(values, index, values[index] * factor)


def _own(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else copy.copy(value)


def _fill(owner: Any, key: Any, value: Any) -> None:
    """Set a number, in place where it is a tensor (a captured graph or a compiled step reads it there)."""
    present = owner.get(key) if isinstance(owner, dict) else owner[key]
    if isinstance(present, torch.Tensor):
        present.fill_(float(value))
    else:
        owner[key] = float(value)
