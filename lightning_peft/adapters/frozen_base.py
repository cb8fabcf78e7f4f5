"""Leave a frozen base out of checkpoints, and never load what is left onto another base.

Below, the *base* are parameters that cannot train in a run. A checkpoint holds a fingerprint of each in its place, so
that it is small, ``strict_loading`` stays on for everything else, and a resumed run on another base is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import nn

from lightning_peft.adapters.injection import injected
from lightning_peft.core.names import clean_name, named_parameters, parameter_aliases
from lightning_peft.core.sharded import whole
from lightning_peft.core.trainable import parameter_fingerprints
from lightning_peft.errors import BaseMismatch

__all__ = ["CHECKPOINT_KEY", "attach_frozen_base", "check_base", "fingerprints", "without_base"]

CHECKPOINT_KEY = "lightning_peft/adapters"
"""Where a checkpoint says which adapters it holds, and on which base."""

_ATTACHED = "_lightning_peft_frozen_base"


def fingerprints(root: nn.Module, names: Iterable[str]) -> dict[str, int]:
    """Return an integer per parameter that changes with its bits; sharded ones are gathered, one at a time.

    Of a parameter that an adapter's start from data has changed, what it was and how it was changed count.
    """
    parameters = named_parameters(root)
    marks = {name: mark for adapter in injected(root).values() for name, mark in adapter.base_marks.items()}
    return {
        name: marks[name] if name in marks else parameter_fingerprints([whole(parameters[name])])[0]
        for name in names
        if name in parameters
    }


def check_base(root: nn.Module, saved: Mapping[str, int]) -> None:
    """Compare the base that a checkpoint was written on with the parameters of ``root``.

    Raises:
        BaseMismatch: If a parameter differs or is not there.
    """
    now = fingerprints(root, saved)
    missing = [name for name in saved if name not in now]
    if missing:
        raise BaseMismatch(
            f"The checkpoint belongs to a base with other parameters: {len(missing)} of {len(saved)} are not in this "
            f"model, {missing[0]} for one. Build the model that it was trained on."
        )
    wrong = [name for name, value in saved.items() if now[name] != value]
    if wrong:
        raise BaseMismatch(
            f"The base is not the one of the checkpoint: {len(wrong)} of {len(saved)} parameters differ, {wrong[0]} "
            "for one. The checkpoint holds no base weights: start from the same pretrained model, in the same dtype."
        )


@contextmanager
def without_base(root: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Leave parameters out of every state dict of ``root``, and do not miss them in one that is loaded."""
    hidden = set(names)
    hidden.update(alias for alias, canonical in parameter_aliases(root).items() if canonical in hidden)

    def drop(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
        for key in [key for key in state_dict if clean_name(key.removeprefix(prefix)) in hidden]:
            del state_dict[key]

    def forgive(module: nn.Module, incompatible: Any) -> None:
        incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if clean_name(key) not in hidden]

    handles = [root.register_state_dict_post_hook(drop), root.register_load_state_dict_post_hook(forgive)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def attach_frozen_base(
    strategy: Any,
    base_of: Callable[[nn.Module], Mapping[str, int] | None],
    record_of: Callable[[nn.Module], dict[str, Any]],
) -> None:
    """Let a strategy save and load without the base; by methods on this one object, once.

    Args:
        strategy: The Trainer's strategy. ``FSDPStrategy`` cannot leave parameters out; it saves the base as well.
        base_of: Returns names and fingerprints of the base of a module, or None where nothing is to be left out.
        record_of: Returns what else to note in the checkpoint, as plain values.
    """
    if getattr(strategy, _ATTACHED, False):
        return
    setattr(strategy, _ATTACHED, True)
    gather, save, load_weights = (
        strategy.lightning_module_state_dict,
        strategy.save_checkpoint,
        strategy.load_model_state_dict,
    )
    keeps_all = isinstance(strategy, FSDPStrategy)

    def lightning_module_state_dict() -> dict[str, Any]:
        base = None if keeps_all else base_of(strategy.lightning_module)
        if not base:
            return gather()
        with without_base(strategy.lightning_module, base):
            return gather()

    def save_checkpoint(checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        base = None if keeps_all else base_of(strategy.lightning_module)
        checkpoint[CHECKPOINT_KEY] = {
            "version": 1,
            "base": dict(base or {}),
            **record_of(strategy.lightning_module),
        }
        save(checkpoint, filepath, storage_options)

    def load_model_state_dict(checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        base = checkpoint.get(CHECKPOINT_KEY, {}).get("base")
        if not base or isinstance(strategy, (FSDPStrategy, ModelParallelStrategy)):
            return load_weights(checkpoint, strict=strict)
        check_base(strategy.lightning_module, base)
        with without_base(strategy.lightning_module, base):
            return load_weights(checkpoint, strict=strict)

    strategy.lightning_module_state_dict = lightning_module_state_dict
    strategy.save_checkpoint = save_checkpoint
    strategy.load_model_state_dict = load_model_state_dict
    if isinstance(strategy, ModelParallelStrategy):
        _attach_sharded_load(strategy)


def _attach_sharded_load(strategy: Any) -> None:
    from lightning_peft.strategies.partial_state import read_metadata

    load = strategy.load_checkpoint

    def load_checkpoint(checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        base = read_metadata(strategy, checkpoint_path, weights_only).get(CHECKPOINT_KEY, {}).get("base")
        if not base:
            return load(checkpoint_path, weights_only)
        check_base(strategy.lightning_module, base)
        with without_base(strategy.lightning_module, base):
            return load(checkpoint_path, weights_only)

    strategy.load_checkpoint = load_checkpoint
