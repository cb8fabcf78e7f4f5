"""Guards attached to stock strategies, so that a change of the trainable set is right under each of them.

A guard knows nothing of methods. It is asked three things: whether the strategy can serve a changing trainable set at
all, what to do before parameters are touched, and what to do after.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch.nn.parallel import DistributedDataParallel

from lightning_peft.errors import EffectError, UnsupportedStrategy

__all__ = ["DDPGuard", "StrategyGuard", "all_ranks_agree", "guard_for"]


class StrategyGuard:
    """Nothing to do: the optimizer steps on the very parameters that autograd fills (one device)."""

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy

    def before_switch(self) -> None:
        """Called before any parameter is touched."""

    def after_switch(self) -> None:
        """Called when ``requires_grad`` has changed for at least one parameter."""


class DDPGuard(StrategyGuard):
    """Wrap the model anew after each switch.

    ``DistributedDataParallel`` fixes the parameters that it reduces when it wraps: a parameter that thaws later is
    never reduced and the ranks drift apart, one that freezes later is waited for. Wrapping again costs about a
    millisecond (nothing is broadcast) and keeps the reduction buckets as small as the trainable set, where
    ``find_unused_parameters=True`` would keep buckets for the whole model and search the graph in every step.
    """

    strategy: DDPStrategy

    def after_switch(self) -> None:
        """Replace the wrapper by one over the present trainable set."""
        strategy = self.strategy
        if not isinstance(strategy.model, DistributedDataParallel):
            return
        module = strategy.lightning_module
        assert module is not None
        strategy.model = None  # lets go of the old reducer, whose hooks go with it
        arguments = strategy._ddp_kwargs
        strategy._ddp_kwargs = {**arguments, "init_sync": False}
        try:
            strategy.model = strategy._setup_model(module)
        finally:
            strategy._ddp_kwargs = arguments
        strategy._register_ddp_hooks()


def guard_for(strategy: Strategy) -> StrategyGuard:
    """Return the guard for a Trainer's strategy.

    Raises:
        UnsupportedStrategy: If no guard makes this strategy right.
    """
    if isinstance(strategy, DDPStrategy):
        return DDPGuard(strategy)
    if isinstance(strategy, SingleDeviceStrategy):
        return StrategyGuard(strategy)
    raise UnsupportedStrategy(
        f"{type(strategy).__name__} is not supported yet by methods that choose what trains: whether a frozen or "
        "thawed parameter is handled right there has not been shown. Use one device or strategy='ddp'."
    )


def all_ranks_agree(value: int, what: str, device: torch.device) -> None:
    """Check that all ranks hold the same 62-bit ``value``.

    Raises:
        EffectError: On every rank, if they do not.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    bounds = torch.tensor([value, -value], dtype=torch.int64, device=device)
    dist.all_reduce(bounds, op=dist.ReduceOp.MAX)
    if bounds[0].item() != -bounds[1].item():
        raise EffectError(
            f"{what} differs between ranks (rank {dist.get_rank()} of {dist.get_world_size()}). Selection must be a "
            "pure function of the seed, the draw and scores that are the same on all ranks."
        )
