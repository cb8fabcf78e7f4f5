"""Passes over the user's model that leave no trace: what scores layers, tensors or weights.

A scoring pass runs the LightningModule's own ``training_step``. Afterwards weights, gradients, optimizer state,
buffers, metrics, logs, random states, training flags, the batch, and numbers and collections that the module keeps as
attributes are what they were.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_peft.core.rng import get_rng_state, set_rng_state
from lightning_peft.errors import ConfigError

__all__ = ["mean_over_ranks", "scoring_gradients", "scoring_loss", "without_trace"]

_COLLECTIONS = (list, dict, set, deque)
_METRIC_FIELDS = ("_update_count", "_computed", "_forward_cache", "_update_called", "_is_synced", "_cache")


@contextmanager
def without_trace(pl_module: LightningModule) -> Iterator[None]:
    """Put back, at the end or on an exception, everything that passes over ``pl_module`` may change.

    That is: parameter values stay the caller's business; ``grad``, buffers, metric states, ``training`` flags, the
    random states of Python, NumPy and torch, what ``self.log`` would have logged, and the module's own attributes if
    they are numbers, strings, tensors or collections (a list of outputs, a count of tokens).
    """
    rng = get_rng_state()
    restore_attributes = _remember_attributes(pl_module)
    modules = list(pl_module.modules())
    training = [module.training for module in modules]
    buffers = [
        {name: (b, None if b is None else b.detach().clone()) for name, b in m._buffers.items()} for m in modules
    ]
    metrics = [(m, _metric_state(m)) for m in modules if isinstance(m, Metric)]
    parameters = list(pl_module.parameters())
    gradients = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    muted = {name: pl_module.__dict__.get(name) for name in ("log", "log_dict", "print")}
    for name in muted:
        pl_module.__dict__[name] = _mute
    try:
        yield
    finally:
        for name, previous in muted.items():
            if previous is None:
                del pl_module.__dict__[name]
            else:
                pl_module.__dict__[name] = previous
        restore_attributes()
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        for metric, state in metrics:
            for name, value in state.items():
                object.__setattr__(metric, name, value)
        for module, saved in zip(modules, buffers, strict=True):
            for name, (buffer, value) in saved.items():
                if buffer is not None and value is not None and not torch.equal(buffer, value):
                    with torch.no_grad():
                        buffer.copy_(value)
                module._buffers[name] = buffer
        for module, flag in zip(modules, training, strict=True):
            module.training = flag
        set_rng_state(rng)


def scoring_loss(trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int = 0) -> Tensor:
    """Return the scalar training loss of one batch, under the Trainer's precision, on the unwrapped module.

    Call it inside :func:`without_trace`. The module gets a copy of the batch. Its mode (``train`` or ``eval``) is the
    caller's choice.

    Raises:
        ConfigError: If ``training_step`` does not return a loss: with manual optimisation, or by returning ``None``.
    """
    if not pl_module.automatic_optimization:
        raise ConfigError(
            "Scoring needs the loss of a batch, and with manual optimisation training_step does not return it before "
            "it steps. Use a method without scoring, or automatic optimisation."
        )
    if isinstance(trainer.strategy, FSDPStrategy):  # gathers the weights only around a forward pass of its wrapper
        output = trainer.strategy.training_step(_copied(batch), batch_idx)
    else:
        with trainer.precision_plugin.train_step_context():
            output = pl_module.training_step(_copied(batch), batch_idx)
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise ConfigError(f"Scoring needs a loss from training_step; it returned {type(output).__name__}.")
    return loss


def scoring_gradients(loss: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
    """Return the gradients of ``loss`` without filling ``grad`` or waking DDP; None where there is no path."""
    return list(torch.autograd.grad(loss, list(parameters), allow_unused=True))


def mean_over_ranks(values: Tensor) -> Tensor:
    """Average ``values`` over all ranks, bit-identical on each of them; with one process they are returned as is."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return values
    total = values.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def _copied(batch: Any) -> Any:
    """Copy collections and tensors: a training_step may take entries out of its batch, or write into it."""
    return apply_to_collection(batch, Tensor, Tensor.clone, allow_frozen=True)


def _remember_attributes(pl_module: LightningModule) -> Callable[[], None]:
    """Return a function that puts the user's plain attributes back, collections with the entries they have now."""
    ours = vars(LightningModule())
    kept: dict[str, tuple[Any, Any]] = {
        name: (value, copy.copy(value) if isinstance(value, _COLLECTIONS) else _copy_tensor(value))
        for name, value in vars(pl_module).items()
        if name not in ours and isinstance(value, (*_COLLECTIONS, Tensor, int, float, complex, str, tuple, type(None)))
    }
    known = set(vars(pl_module))

    def restore() -> None:
        attributes = vars(pl_module)
        for name in set(attributes) - known:
            del attributes[name]
        for name, (value, entries) in kept.items():
            attributes[name] = value
            if isinstance(value, Tensor) and not torch.equal(value, entries):
                with torch.no_grad():
                    value.copy_(entries)
            elif isinstance(value, _COLLECTIONS):
                value.clear()
                (value.extend if isinstance(value, (list, deque)) else value.update)(entries)

    return restore


def _copy_tensor(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _mute(*_: Any, **__: Any) -> None:
    return None


def _metric_state(metric: Metric) -> dict[str, Any]:
    state = {name: _copy(getattr(metric, name)) for name in metric._defaults}
    fields = {name: metric.__dict__[name] for name in _METRIC_FIELDS if name in metric.__dict__}
    return {**state, **fields}


def _copy(value: Any) -> Any:
    return [item.clone() for item in value] if isinstance(value, list) else value.detach().clone()
