"""Loud checks that what was planned is what happens."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_peft.core.blocks import Structure
from lightning_peft.core.masters import original
from lightning_peft.core.sharded import local
from lightning_peft.core.trainable import optimizer_members, parameter_fingerprints
from lightning_peft.errors import ConfigError, EffectError

__all__ = ["GradientWatch", "MovementCheck", "check_checkpointing", "check_flags", "check_optimizers"]

_STARVED_STEPS = 5

_Merge = Callable[[list[bool]], list[bool]]
"""Makes of what is true of the pieces that a process holds what is true of the whole tensors."""


def _as_they_are(flags: list[bool]) -> list[bool]:
    return flags


def _some(names: Iterable[str], limit: int = 4) -> str:
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def check_optimizers(
    parameters: Mapping[str, nn.Parameter],
    planned: Collection[str],
    optimizers: Sequence[torch.optim.Optimizer],
) -> None:
    """Check that each planned parameter is in exactly one optimizer exactly once, and that freezing works there.

    Raises:
        ConfigError: With all that is wrong.
    """
    members = optimizer_members(parameters, optimizers)
    missing = [name for name in parameters if name in planned and not members[name]]
    doubled = [name for name in parameters if name in planned and len(members[name]) > 1]
    problems = []
    if missing:
        problems.append(
            f"{len(missing)} parameter(s) planned to train are in no optimizer and would never move: {_some(missing)}. "
            "Build the optimizer over self.parameters() (or all with requires_grad) in configure_optimizers, or take "
            "them out of the method's scope and always."
        )
    if doubled:
        problems.append(
            f"{len(doubled)} parameter(s) are in more than one parameter group or optimizer and would be stepped "
            f"twice: {_some(doubled)}. Put each into one group."
        )
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            problems.append(
                "torch.optim.LBFGS treats a parameter without gradient as one with zero gradient, and mixes all "
                "parameters in one history: it cannot leave frozen ones alone. Use another optimizer."
            )
    if problems:
        raise ConfigError(" ".join(problems))


def check_checkpointing(structure: Structure, planned: Collection[str], lasting: Collection[str]) -> None:
    """Check that reentrant activation checkpointing does not cut active blocks off from the loss.

    Reentrant checkpointing gives a block no gradient at all unless one of its inputs needs one, which is so only if
    something before the first block trains, or if the embeddings' output is made to require one. For the other kind of
    checkpointing the latter is a waste, which is said.

    Args:
        structure: The model.
        planned: Names that may train at some time of the run.
        lasting: Names that train all the time.

    Raises:
        ConfigError: If it would, at any time of the run.
    """
    if any(name in lasting for name in structure.roles["embeddings"]):
        return
    if not any(name in planned for name in structure.roles["blocks"]):
        return
    functions = {
        path: function
        for path, module in structure.modules.items()
        if getattr(module, "gradient_checkpointing", False)
        and isinstance(function := getattr(module, "_gradient_checkpointing_func", None), functools.partial)
    }
    reentrant = [path for path, function in functions.items() if function.keywords.get("use_reentrant")]
    if any(getattr(module, "_require_grads_hook", None) is not None for module in structure.modules.values()):
        if functions and not reentrant:
            rank_zero_info(
                "Activation checkpointing made the embeddings' output require a gradient (enable_input_require_grads) "
                "so that every step recomputes and goes back through all blocks. The non-reentrant kind that is in use "
                "does not need it: call disable_input_require_grads() on the model after switching checkpointing on, "
                "and steps end at the lowest block that trains."
            )
        return
    if reentrant:
        raise ConfigError(
            f"{reentrant[0] or 'the model'} uses reentrant activation checkpointing while the embeddings are frozen, "
            "all or some of the time: the active blocks would get no gradient. Use gradient_checkpointing_enable("
            "gradient_checkpointing_kwargs={'use_reentrant': False}), or train the embeddings all the time too."
        )


def check_flags(parameters: Mapping[str, nn.Parameter], planned: Collection[str]) -> None:
    """Check that ``requires_grad`` is still what was set.

    Raises:
        EffectError: Naming what something else changed.
    """
    wrong = [name for name, parameter in parameters.items() if parameter.requires_grad != (name in planned)]
    if wrong:
        raise EffectError(
            f"requires_grad of {len(wrong)} parameter(s) was changed during training by something else than the "
            f"method that plans it: {_some(wrong)}. Let one of the two decide."
        )


class MovementCheck:
    """Check after the first step of each optimizer that exactly the planned parameters moved.

    A step with learning rate 0 (the first of a warm-up) proves nothing; the check waits for the next one.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        optimizers: Sequence[torch.optim.Optimizer],
        merge: _Merge = _as_they_are,
    ) -> None:
        self._parameters = parameters
        self._merge = merge
        members = optimizer_members(parameters, optimizers)
        self._members = [[name for name in parameters if index in members[name]] for index in range(len(optimizers))]
        self._before: dict[int, list[int]] = {}
        self._pending = set(range(len(optimizers)))

    @property
    def is_pending(self) -> bool:
        """Whether an optimizer has not made its first step yet."""
        return bool(self._pending)

    def before_step(self, index: int, optimizer: torch.optim.Optimizer) -> None:
        """Remember the parameters' bits."""
        if index in self._pending and any(float(group["lr"]) != 0 for group in optimizer.param_groups):
            self._before[index] = parameter_fingerprints(tensor for tensor, _ in self._held(index, optimizer))

    def after_step(self, index: int, optimizer: torch.optim.Optimizer, planned: Collection[str]) -> None:
        """Compare.

        Raises:
            EffectError: If a frozen parameter moved or no planned one did.
        """
        before = self._before.pop(index, None)
        if before is None:
            return
        self._pending.discard(index)
        names = self._members[index]
        held = self._held(index, optimizer)
        after = parameter_fingerprints(tensor for tensor, _ in held)
        changed = self._merge([old != new for old, new in zip(before, after, strict=True)])
        moved = {name for name, flag in zip(names, changed, strict=True) if flag}
        drifted = [name for name in names if name in moved and name not in planned]
        if drifted:
            raise EffectError(
                f"{len(drifted)} frozen parameter(s) moved in an optimizer step: {_some(drifted)}. "
                f"{type(optimizer).__name__} changes parameters that have no gradient."
            )
        rates = dict(zip(names, (rate for _, rate in held), strict=True))
        expected = [name for name in names if name in planned and rates[name] != 0]
        still = [name for name in expected if name not in moved]
        grads = [self._parameters[name].grad for name in still]
        filled = self._merge([grad is not None for grad in grads])
        pushed = self._merge([grad is not None and bool(local(grad).any()) for grad in grads])
        silent = [name for name, flag in zip(still, filled, strict=True) if not flag]
        stuck = [name for name, flag in zip(still, pushed, strict=True) if flag]
        if expected and not moved:
            raise EffectError(
                f"None of the {len(expected)} parameters planned to train moved in the first optimizer step: "
                f"{len(silent)} got no gradient, {len(stuck)} had one and did not change. {_some(silent or stuck)}"
            )
        if silent:
            warnings.warn(
                f"{len(silent)} parameter(s) are planned to train but got no gradient in the first optimizer step "
                f"(unused in the forward pass?): {_some(silent)}",
                stacklevel=2,
            )
        if stuck:
            dtypes = sorted({str(self._parameters[name].dtype) for name in stuck})
            warnings.warn(
                f"{len(stuck)} parameter(s) had a gradient but did not change in the first optimizer step: "
                f"{_some(stuck)}. With {', '.join(dtypes)} weights the update may be smaller than the rounding.",
                stacklevel=2,
            )

    def _held(self, index: int, optimizer: torch.optim.Optimizer) -> list[tuple[torch.Tensor, float]]:
        """What the optimizer steps for each member (the parameter, or its master) and the learning rate."""
        found = {id(original(p)): (p, float(group["lr"])) for group in optimizer.param_groups for p in group["params"]}
        return [found[id(self._parameters[name])] for name in self._members[index]]


class GradientWatch:
    """Watch that every unit that was chosen gets a gradient, from each draw's first optimizer step on."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        optimizers: Sequence[torch.optim.Optimizer],
        merge: _Merge = _as_they_are,
    ) -> None:
        self._parameters = parameters
        self._merge = merge
        self._members = optimizer_members(parameters, optimizers)
        self._waiting: list[dict[str, tuple[str, ...]]] = [{} for _ in optimizers]
        self._steps = [0 for _ in optimizers]
        self._proven = [False for _ in optimizers]
        self._warned: set[str] = set()

    def expect(self, units: Mapping[str, tuple[str, ...]]) -> None:
        """Expect a gradient in at least one parameter of each unit from now on."""
        for index in range(len(self._waiting)):
            self._waiting[index] = {
                unit: names for unit, names in units.items() if any(index in self._members[name] for name in names)
            }

    def after_step(self, index: int) -> None:
        """Look at the gradients of this optimizer's units that have not had one yet.

        Raises:
            EffectError: If, at the start of the run, none of the chosen units gets a gradient step after step.
        """
        if not self._waiting[index]:
            return
        self._steps[index] += 1
        waiting = self._waiting[index]
        fed = [any(self._parameters[name].grad is not None for name in names) for names in waiting.values()]
        starved = {
            unit: names for (unit, names), flag in zip(waiting.items(), self._merge(fed), strict=True) if not flag
        }
        self._proven[index] |= len(starved) < len(self._waiting[index])
        self._waiting[index] = starved
        news = [unit for unit in starved if unit not in self._warned]
        if news:
            self._warned.update(news)
            warnings.warn(
                f"Chosen to train, but without any gradient in this step: {_some(news)}. "
                "A layer that is skipped at random (LayerDrop) may be; otherwise something detaches it from the loss.",
                stacklevel=2,
            )
        if not self._proven[index] and self._steps[index] >= _STARVED_STEPS:
            raise EffectError(
                f"None of the units chosen to train got a gradient in {self._steps[index]} optimizer steps: "
                f"{_some(starved)}. Something between them and the loss is detached (reentrant activation "
                "checkpointing with frozen inputs, torch.no_grad, .detach())."
            )
