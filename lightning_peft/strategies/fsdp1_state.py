"""Exact checkpoints under ``FSDPStrategy`` (FSDP1) when only part of the parameters trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch.strategies.fsdp as lightning_fsdp
import torch
from lightning.pytorch.trainer.states import TrainerFn

from lightning_peft.errors import ResumeMismatch
from lightning_peft.strategies.partial_state import read_checkpoint, read_metadata, saved_members, weights_only_of_fit

__all__ = ["keep_partial_state_fsdp1"]

_NO_STATE_KEY = "lightning_peft/no_optimizer_state"


def keep_partial_state_fsdp1(strategy: Any, merge: Callable[[list[bool]], list[bool]]) -> None:
    """Make an ``FSDPStrategy`` save the optimizer states that there are, and load just those.

    By methods on this one object. As they are,

    * torch wants state of every parameter of a unit that requires a gradient if one of them has state;
    * neither torch nor Lightning loads a checkpoint from before the first optimizer step;
    * Lightning takes the numbers in a full checkpoint for positions in the model, though a run on one device, or with
      other parameter groups, numbers by position in the groups: states would go to other parameters.

    Args:
        strategy: The strategy, set up.
        merge: Makes of flags of this process flags that are set if they are on any.
    """
    if hasattr(strategy.save_checkpoint, "inner"):
        return
    save, load, gather = strategy.save_checkpoint, strategy.load_checkpoint, strategy.optimizer_state

    def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        flags = {parameter: parameter.requires_grad for parameter in strategy.lightning_module.parameters()}
        try:
            for parameter in flags:
                parameter.requires_grad_(False)
            return gather(optimizer)
        finally:
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)

    def save_checkpoint(checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if strategy.optimizers and not any(merge([bool(optimizer.state) for optimizer in strategy.optimizers])):
            checkpoint.pop("optimizer_states", None)
            checkpoint[_NO_STATE_KEY] = True
        save(checkpoint, filepath, storage_options)

    def load_checkpoint(checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(strategy.broadcast(checkpoint_path))
        if path.is_file():
            return _load_full(strategy, path, weights_only_of_fit() if weights_only is None else weights_only)
        if not strategy.optimizers or not read_metadata(strategy, path, weights_only).get(_NO_STATE_KEY):
            return load(path, weights_only)
        optimizers, strategy.optimizers = strategy.optimizers, []
        try:
            return load(path, weights_only)
        finally:
            strategy.optimizers = optimizers

    setattr(save_checkpoint, "inner", save)  # noqa: B010
    strategy.save_checkpoint, strategy.load_checkpoint = save_checkpoint, load_checkpoint
    strategy.optimizer_state = optimizer_state


def _load_full(strategy: Any, path: Path, weights_only: bool | None) -> dict[str, Any]:
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
    from torch.distributed.fsdp._common_utils import _get_param_to_fqns

    checkpoint = read_checkpoint(path, weights_only, mmap=True)
    module = strategy.lightning_module
    lightning_fsdp._load_raw_module_state(
        checkpoint.pop("state_dict"),
        module=strategy.model,
        world_size=strategy.world_size,
        strict=module.strict_loading,
    )
    states = checkpoint.pop("optimizer_states", None)
    if states is None or module.trainer.state.fn != TrainerFn.FITTING or checkpoint.get(_NO_STATE_KEY):
        return checkpoint
    if len(states) != len(strategy.optimizers):
        raise ResumeMismatch(f"There are {len(strategy.optimizers)} optimizers, and {path.name} has {len(states)}.")
    names = {parameter: fqns[0] for parameter, fqns in _get_param_to_fqns(strategy.model).items()}
    whole: Any = lightning_fsdp._get_full_state_dict_context(strategy.model, strategy.world_size, rank0_only=False)
    with whole:
        for optimizer, raw in zip(strategy.optimizers, states, strict=True):
            named = _named_state(raw, optimizer, names, path)
            optimizer.load_state_dict(FSDP.optim_state_dict_to_load(strategy.model, optimizer, named))
    return checkpoint


def _named_state(
    raw: dict[str, Any], optimizer: torch.optim.Optimizer, names: dict[Any, str], path: Path
) -> dict[str, Any]:
    """The state by parameter names: the n-th of a saved group is the n-th of the group here."""
    name_of = {key: names[member] for key, member in saved_members(raw["param_groups"], optimizer, path)}
    groups = [{**group, "params": [name_of[key] for key in group["params"]]} for group in raw["param_groups"]]
    return {"state": {name_of[key]: state for key, state in raw["state"].items()}, "param_groups": groups}
