"""Guards attached to stock strategies, so that a change of the trainable set is right under each of them.

A guard knows nothing of methods. It is asked whether the strategy can serve a changing trainable set at all, what to
do when the model has been wrapped, before parameters are touched, and after.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import (
    DDPStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_peft.core.sharded import Shard, is_sharded, local
from lightning_peft.errors import ConfigError, EffectError, UnsupportedStrategy
from lightning_peft.strategies.fsdp1_state import keep_partial_state_fsdp1
from lightning_peft.strategies.partial_state import (
    fsdp_modules,
    keep_partial_state,
    lazy_init_all_trainable,
    param_groups,
    read_metadata,
    refresh_dtypes,
    reshard,
)

__all__ = ["DDPGuard", "FSDP1Guard", "FSDP2Guard", "StrategyGuard", "all_ranks_agree", "guard_for"]


class StrategyGuard:
    """Nothing to do: the optimizer steps on the very parameters that autograd fills (one device)."""

    shards = False
    """Whether a process holds pieces of parameters only."""

    can_offload_state = True
    """Whether the optimizer state of a parameter can leave the optimizer and come back."""

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy

    def attach(self) -> None:
        """Called when a fit is set up, before anything else wraps the strategy's saving and loading."""

    @contextmanager
    def whole_parameters(self) -> Iterator[None]:
        """Show each parameter in its whole shape, before wrapping."""
        yield

    def wrapped(self, parameters: Mapping[str, nn.Parameter], selectable: Collection[str]) -> None:
        """Called when the model is wrapped and the optimizers exist, before any state is restored.

        Args:
            parameters: Canonical name -> parameter of the whole model, as the optimizers hold it.
            selectable: Names that may train at some time of the run.

        Raises:
            ConfigError: If the model is wrapped in a way that would leave some of them out.
            UnsupportedStrategy: If it is wrapped in a way in which a trainable set cannot change.
        """

    def on_restore(self, look: Callable[[dict[str, Any]], None]) -> None:
        """Show ``look`` a checkpoint before optimizer states are taken from it, if callbacks have not seen it by then.

        It is called with all that the checkpoint holds beside weights and optimizer states.
        """

    def before_switch(self) -> None:
        """Called before any parameter is touched."""

    def after_switch(self) -> None:
        """Called when ``requires_grad`` has changed for at least one parameter."""

    def after_step(self) -> None:
        """Called after each step of each optimizer."""

    def take_gradients(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
        """Return the gradients that this process has accumulated, on the CPU."""
        return {name: local(p.grad).cpu() for name, p in parameters.items() if p.grad is not None}

    def put_gradients(self, parameters: Mapping[str, nn.Parameter], saved: Mapping[str, torch.Tensor]) -> None:
        """Make what :meth:`take_gradients` returned on a process of the same rank the gradients."""
        for name, gradient in saved.items():
            parameter = parameters[name]
            placed = Shard(parameter).of_local(gradient) if is_sharded(parameter) else gradient.to(parameter.device)
            parameter.grad = placed

    def merge(self, flags: list[bool]) -> list[bool]:
        """Make of what is true of the pieces on this process what is true of the whole parameters."""
        return flags


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


class _ShardingGuard(StrategyGuard):
    shards = True
    strategy: FSDPStrategy | ModelParallelStrategy

    def on_restore(self, look: Callable[[dict[str, Any]], None]) -> None:
        """These strategies restore optimizers in ``load_checkpoint``, ahead of the callbacks."""
        strategy: Any = self.strategy
        load = getattr(strategy.load_checkpoint, "inner", strategy.load_checkpoint)

        def load_checkpoint(checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
            if strategy.optimizers:
                look(read_metadata(strategy, checkpoint_path, weights_only))
            return load(checkpoint_path, weights_only)

        setattr(load_checkpoint, "inner", load)  # noqa: B010
        strategy.load_checkpoint = load_checkpoint

    def merge(self, flags: list[bool]) -> list[bool]:
        """A flag is set if it is set on any rank."""
        if not flags or dist.get_world_size() == 1:
            return flags
        found = torch.tensor(flags, dtype=torch.int32, device=self.strategy.root_device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return [bool(flag) for flag in found.tolist()]


_WAITING = "waiting "


class FSDP2Guard(_ShardingGuard):
    """Let parameters of ``fully_shard`` groups freeze and thaw, and save and load the states of those that train.

    The sharded parameters are what the optimizer holds; a group that was not resharded after its last forward pass
    shows others in their place, so that it is resharded before anything is touched. torch saves and loads optimizer
    states of parameters that require a gradient at that time; the states of the others would be lost, or be asked for
    in vain (:mod:`lightning_peft.strategies.partial_state`).
    """

    strategy: ModelParallelStrategy

    @contextmanager
    def whole_parameters(self) -> Iterator[None]:
        """Sharded parameters have their whole shape anyway."""
        self.before_switch()
        yield

    def attach(self) -> None:
        """Make saving and loading right."""
        keep_partial_state(self.strategy)

    def wrapped(self, parameters: Mapping[str, nn.Parameter], selectable: Collection[str]) -> None:
        """Check that every parameter that may train is sharded, and start FSDP2 as if all of them trained."""
        strategy = self.strategy
        left_out = [name for name, p in parameters.items() if name in selectable and not is_sharded(p)]
        num_replicas = strategy.device_mesh["data_parallel"].size()
        if left_out and num_replicas > 1:
            raise ConfigError(
                f"{len(left_out)} parameter(s) that may train are in no fully_shard group, such as {left_out[0]}: "
                "their gradients would never be synchronised, and the ranks would drift apart. Call "
                "fully_shard(<the whole model>) at the end of configure_model, or use "
                "strategy='fsdp2' (lightning_peft.FSDP2Strategy), which shards the whole module."
            )
        if strategy.world_size > 1 and num_replicas == 1:
            warnings.warn(
                f"The device mesh is 1 (data parallel) x {strategy.world_size} (tensor parallel): all ranks get the "
                f"same batches. {type(strategy).__name__}(data_parallel_size={strategy.world_size}, "
                "tensor_parallel_size=1) splits them.",
                stacklevel=2,
            )
        assert strategy.model is not None
        lazy_init_all_trainable(strategy.model)

    def before_switch(self) -> None:
        """Bring the sharded parameters back into their modules."""
        assert self.strategy.model is not None
        reshard(self.strategy.model)

    def after_step(self) -> None:
        """Give up weights that were gathered before the step (by a forward without gradients): they are old now."""
        self.before_switch()

    def after_switch(self) -> None:
        """Let the groups read again in which dtype they reduce gradients."""
        assert self.strategy.model is not None
        refresh_dtypes(self.strategy.model)

    def take_gradients(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
        """Return shards, and whole gradients that wait to be reduced at the end of the accumulation window."""
        waiting: dict[str, torch.Tensor] = {}
        for name, part in self._parts(parameters):
            whole = part.unsharded_accumulated_grad
            if whole is None and hasattr(part, "_unsharded_param"):
                whole = part._unsharded_param.grad
            if whole is not None:
                waiting[_WAITING + name] = local(whole).cpu()
        return {**super().take_gradients(parameters), **waiting}

    def put_gradients(self, parameters: Mapping[str, nn.Parameter], saved: Mapping[str, torch.Tensor]) -> None:
        """Make them what they were; those that wait are added to the next micro-batch's before it is reduced."""
        shards = {name: gradient for name, gradient in saved.items() if not name.startswith(_WAITING)}
        super().put_gradients(parameters, shards)
        for name, part in self._parts(parameters):
            whole = saved.get(_WAITING + name)
            if whole is not None:
                whole = whole.to(self.strategy.root_device)
                spec = getattr(part, "_tp_spec", None)
                part.unsharded_accumulated_grad = whole if spec is None else Shard.of_spec(whole, spec)

    def _parts(self, parameters: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, Any]]:
        """FSDP2's own record of each of its parameters, by name."""
        names = {id(parameter): name for name, parameter in parameters.items()}
        assert self.strategy.model is not None
        for module in fsdp_modules(self.strategy.model):
            for group in param_groups(module):
                for part in group.fsdp_params:
                    yield names[id(part.sharded_param)], part


class FSDP1Guard(_ShardingGuard):
    """Let parameters of ``FullyShardedDataParallel`` units freeze and thaw, which needs ``use_orig_params=True``."""

    strategy: FSDPStrategy
    can_offload_state = False

    def __init__(self, strategy: FSDPStrategy) -> None:
        super().__init__(strategy)
        if not strategy.kwargs.get("use_orig_params"):
            raise self._no_orig_params()
        if strategy.world_size == 1:
            raise UnsupportedStrategy(
                "FSDPStrategy with one process does not shard, and torch then loses parameters of a unit that is "
                "frozen as a whole from the state dict. Use strategy='auto', which also resumes from full checkpoints "
                "(state_dict_type='full') of several processes."
            )

    @contextmanager
    def whole_parameters(self) -> Iterator[None]:
        """Refuse a model that is sharded already: pieces are all that could be seen of its parameters."""
        module = self.strategy.lightning_module
        assert module is not None
        wrapped = [name for name, child in module.named_modules() if _is_fsdp1(child)]
        if wrapped:
            raise UnsupportedStrategy(
                f"{wrapped[0] or 'The module'} is already wrapped by FullyShardedDataParallel (by configure_model, or "
                "by an earlier fit of the same module): methods that choose what trains have to see the parameters "
                "before they are cut up. Let the strategy wrap them (auto_wrap_policy=), build a fresh module for "
                "another fit, or use strategy='fsdp2'."
            )
        yield

    def attach(self) -> None:
        """Make saving and loading right."""
        keep_partial_state_fsdp1(self.strategy, self.merge)

    def wrapped(self, parameters: Mapping[str, nn.Parameter], selectable: Collection[str]) -> None:
        """Check all units."""
        assert self.strategy.model is not None
        if any(_is_fsdp1(child) and not child._use_orig_params for child in self.strategy.model.modules()):
            raise self._no_orig_params()

    def put_gradients(self, parameters: Mapping[str, nn.Parameter], saved: Mapping[str, torch.Tensor]) -> None:
        """Make the gradients those of an accumulation window, which lie unsharded in one tensor per unit."""
        if not saved:
            return
        assert self.strategy.model is not None
        names = {id(parameter): name for name, parameter in parameters.items()}
        handles: list[Any] = [
            child._handle for child in self.strategy.model.modules() if _is_fsdp1(child) and child._handle
        ]
        for handle in handles:
            flat = handle.flat_param
            found = [saved.get(names[id(parameter)]) for parameter in flat._params]
            given = next((gradient for gradient in found if gradient is not None), None)
            if given is None:
                continue
            flat.grad = torch.empty_like(flat)
            flat.grad.data = torch.zeros(flat._unpadded_unsharded_size, dtype=given.dtype, device=handle.device)
            handle._use_unsharded_grad_views()
            for parameter, gradient in zip(flat._params, found, strict=True):
                if gradient is None:
                    parameter.grad = None
                else:
                    parameter.grad.copy_(gradient)

    def _no_orig_params(self) -> UnsupportedStrategy:
        return UnsupportedStrategy(
            "FSDPStrategy(use_orig_params=False) freezes and thaws whole units only, and hides the parameters' names. "
            "Use use_orig_params=True (the default), or strategy='fsdp2'."
        )


def _is_fsdp1(module: Any) -> bool:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return isinstance(module, FullyShardedDataParallel)


def guard_for(strategy: Strategy) -> StrategyGuard:
    """Return the guard for a Trainer's strategy.

    Raises:
        UnsupportedStrategy: If no guard makes this strategy right.
    """
    guards: list[tuple[type[Strategy], type[StrategyGuard]]] = [
        (DDPStrategy, DDPGuard),
        (FSDPStrategy, FSDP1Guard),
        (ModelParallelStrategy, FSDP2Guard),
        (SingleDeviceStrategy, StrategyGuard),
    ]
    for kind, guard in guards:
        if isinstance(strategy, kind):
            return guard(strategy)
    raise UnsupportedStrategy(
        f"{type(strategy).__name__} is not supported by methods that choose what trains: whether a frozen or thawed "
        "parameter is handled right there has not been shown. Use one device, 'ddp', 'fsdp' or 'fsdp2'."
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
