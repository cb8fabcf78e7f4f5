"""Full-precision masters that stand in an optimizer for low-precision weights.

An update that is smaller than the rounding of a bfloat16 weight is lost. Here the optimizer steps a float32 copy, the
*master*, in the weight's place (same group, same position, so that its learning rate, weight decay and schedule apply),
and the weight becomes the rounded master after each step. Only what is asked for gets a master, and only while it is
needed: 12 bytes per parameter with the moments of Adam, 16 while there is a gradient.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

__all__ = ["MasterWeights", "is_low_precision", "original"]

_LOW_PRECISION = (torch.bfloat16, torch.float16)
_MARK = "_stands_in_for"


def is_low_precision(tensor: Tensor) -> bool:
    """Whether ``tensor`` is bfloat16 or float16."""
    return tensor.dtype in _LOW_PRECISION


def original(tensor: Tensor) -> Tensor:
    """Return the parameter that ``tensor``, found in an optimizer's group, stands in for; mostly itself."""
    return getattr(tensor, _MARK, tensor)


class MasterWeights:
    """Hold the masters of some parameters of a model.

    The order of a step: backward fills the weights' ``grad`` (and DDP reduces it); :meth:`take_gradients`; clipping;
    the optimizer's ``step``; :meth:`write_back`.

    Args:
        parameters: Canonical name -> parameter of the whole model.
        optimizers: The optimizers, which hold each of them at most once.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
        >>> optimizer = torch.optim.SGD([weight], lr=0.001)
        >>> masters = MasterWeights({"weight": weight}, [optimizer])
        >>> masters.hold(["weight"])
        >>> for _ in range(4):
        ...     weight.sum().backward()
        ...     masters.take_gradients(optimizer)
        ...     optimizer.step()
        ...     masters.write_back(optimizer)
        >>> weight.item()  # a step of 0.001 alone would round to nothing
        0.99609375
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self._parameters = parameters
        self._optimizers = list(optimizers)
        self._held: dict[str, _Held] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters that have a master now."""
        return tuple(self._held)

    def __getitem__(self, name: str) -> Tensor:
        return self._held[name].master

    def num_bytes(self) -> int:
        """Bytes of the masters themselves, without their gradients and optimizer state."""
        return sum(held.master.nbytes for held in self._held.values())

    def follow(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Go on with ``optimizers``: masters that stand in one that is not among them any more are released."""
        self._optimizers = list(optimizers)
        kept = {id(optimizer) for optimizer in optimizers}
        self.release([name for name, held in self._held.items() if id(held.optimizer) not in kept])

    def hold(self, names: Collection[str], saved: Mapping[str, Any] | None = None) -> None:
        """Make exactly the low-precision parameters among ``names`` have a master; all others are released.

        A new master starts as the weight's exact value, and any state that the optimizer has for the weight becomes
        its own.

        Args:
            names: Names to hold.
            saved: From :meth:`state_dict`: what new masters start from instead.
        """
        wanted = [name for name in names if is_low_precision(self._parameters[name])]
        self.release(set(self._held).difference(wanted))
        for name in wanted:
            if name not in self._held:
                self._held[name] = self._create(name, (saved or {}).get(name))

    def release(self, names: Iterable[str] | None = None) -> None:
        """Free masters with gradient and optimizer state, and give the parameters their places back.

        Args:
            names: Which; default all.
        """
        for name in list(self._held if names is None else names):
            held = self._held.pop(name)
            for optimizer in (held.optimizer, *self._optimizers):
                _replace(optimizer, held.master, self._parameters[name])
            held.optimizer.state.pop(held.master, None)
            _set_gradient(self._parameters[name], None, held.grad_dtype)

    def take_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Give the masters of ``optimizer`` their weights' gradients in float32.

        From here to :meth:`write_back`, the weight's ``grad`` is the very tensor that the optimizer will use, so that
        whoever logs the gradients of the model, or clips them in place, reaches the right ones.
        """
        for name, held in self._of(optimizer):
            parameter = self._parameters[name]
            gradient = parameter.grad
            if gradient is not None:
                gradient = gradient.to(held.master.dtype)
                _set_gradient(parameter, gradient, gradient.dtype)
            held.master.grad = gradient

    @torch.no_grad()
    def write_back(self, optimizer: torch.optim.Optimizer) -> None:
        """Round the masters of ``optimizer`` into their weights, and free the gradients."""
        for name, held in self._of(optimizer):
            self._parameters[name].copy_(held.master)
            _set_gradient(self._parameters[name], None, held.grad_dtype)
            held.master.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Masters and their optimizer state, by name; not copied.

        An optimizer's own ``load_state_dict`` rounds the moments to the dtype of the parameter it finds in the group.
        """
        return {
            name: {
                "master": held.master.detach(),
                "state": tree_map(_detached, dict(held.optimizer.state.get(held.master, {}))),
            }
            for name, held in self._held.items()
        }

    def _create(self, name: str, saved: Mapping[str, Any] | None) -> _Held:
        parameter = self._parameters[name]
        optimizer = next((optimizer for optimizer in self._optimizers if _holds(optimizer, parameter)), None)
        assert optimizer is not None, f"{name} is in no optimizer"
        source = parameter if saved is None else saved["master"]
        master = source.detach().to(parameter.device, torch.float32, copy=True).requires_grad_(True)
        setattr(master, _MARK, parameter)
        loaded = optimizer.state.pop(parameter, {})
        if saved is not None:
            state = {key: _placed_like(value, loaded.get(key), master) for key, value in saved["state"].items()}
        else:
            state = {key: _widened(value) for key, value in loaded.items()}
        if state:
            optimizer.state[master] = state
        _replace(optimizer, parameter, master)
        return _Held(master, optimizer, parameter.grad_dtype)

    def _of(self, optimizer: torch.optim.Optimizer) -> list[tuple[str, _Held]]:
        return [(name, held) for name, held in self._held.items() if held.optimizer is optimizer]


@dataclass(frozen=True)
class _Held:
    """A master, the optimizer it stands in, and the dtype in which backward fills its weight's gradient."""

    master: Tensor
    optimizer: torch.optim.Optimizer
    grad_dtype: torch.dtype | None


def _holds(optimizer: torch.optim.Optimizer, tensor: Tensor) -> bool:
    return any(tensor is member for group in optimizer.param_groups for member in group["params"])


def _replace(optimizer: torch.optim.Optimizer, old: Tensor, new: Tensor) -> None:
    for group in optimizer.param_groups:
        group["params"][:] = [new if member is old else member for member in group["params"]]


def _set_gradient(parameter: nn.Parameter, gradient: Tensor | None, dtype: torch.dtype | None) -> None:
    parameter.grad = None
    if parameter.grad_dtype != dtype:
        parameter.grad_dtype = dtype
    parameter.grad = gradient


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _widened(leaf: Any) -> Any:
    is_rounded = isinstance(leaf, Tensor) and leaf.ndim > 0 and is_low_precision(leaf)
    return leaf.to(torch.float32) if is_rounded else leaf


def _placed_like(value: Any, loaded: Any, master: Tensor) -> Any:
    """Put saved state on the devices where the optimizer's own ``load_state_dict`` put its rounded copy."""

    def place(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if isinstance(loaded, Tensor):
            return leaf.to(loaded.device, copy=True)
        return leaf.to(master.device if leaf.ndim > 0 else leaf.device, copy=True)

    return tree_map(place, value)
