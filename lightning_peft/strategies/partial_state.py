"""Exact checkpoints and switches under FSDP2 when only part of the parameters trains.

Torch's own optimizer save and load (``torch.distributed.checkpoint.state_dict``) takes ``requires_grad`` for "has
optimizer state": it demands state of every trainable parameter, drops the state of every frozen one, and fills an
empty optimizer by a step with learning rate zero. None of this holds where parameters freeze and thaw. The functions
here take the optimizer as it is: what has state is saved, and exactly that comes back. They leave every
``requires_grad`` flag alone, also if they fail.

The files are those of Lightning's ``ModelParallelStrategy``, so that either can read the other's: a *sharded*
checkpoint is a folder in torch's distributed format with ``meta.pt`` beside it, a *full* one a single file that a
one-process run reads as well.

:func:`keep_partial_state` puts all of it into a strategy that is already there. The single functions are for
strategies and guards:

    reshard(module)                          before parameters are touched
    refresh_dtypes(module)                   after flags have changed
    lazy_init_all_trainable(module)          once, after sharding
    optimizer_state(strategy, optimizer)     in place of ``strategy.optimizer_state``
    record_partial_state(strategy, dict)     before ``strategy.save_checkpoint``
    load_checkpoint(strategy, path)          in place of ``strategy.load_checkpoint``
"""

from __future__ import annotations

import pickle
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning.fabric.strategies.fsdp import _is_sharded_checkpoint
from lightning.fabric.utilities.load import _METADATA_FILENAME
from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, load
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from lightning_peft.core.instance import replace_on
from lightning_peft.core.masters import original
from lightning_peft.core.names import named_parameters
from lightning_peft.core.sharded import Shard, local
from lightning_peft.errors import ConfigError, ResumeMismatch, UnsupportedStrategy, nearest

__all__ = [
    "PARTIAL_STATE_KEY",
    "argument_of_fit",
    "keep_partial_state",
    "lazy_init_all_trainable",
    "load_checkpoint",
    "local_part",
    "optimizer_state",
    "param_groups",
    "read_checkpoint",
    "read_metadata",
    "record_partial_state",
    "refresh_dtypes",
    "reshard",
    "saved_members",
    "sharded_parameters",
    "weights_only_of_fit",
]

PARTIAL_STATE_KEY = "lightning_peft/partial_state"
"""Where a checkpoint says what was trainable and what had optimizer state."""


# ---------------------------------------------------------------------- the model in memory


def fsdp_modules(module: nn.Module) -> Iterator[FSDPModule]:
    """Yield every module at or below ``module`` that ``fully_shard`` was called on."""
    return (part for part in module.modules() if isinstance(part, FSDPModule))


def reshard(module: nn.Module) -> None:
    """Give up every gathered weight, so that ``named_parameters()`` returns the sharded parameters.

    After a forward pass without gradients (validation) the outermost group stays gathered: its parameters are then
    other objects than those the optimizer holds, and a flag set on them is undone at the next forward.
    """
    for part in fsdp_modules(module):
        part.reshard()


def sharded_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Clean canonical name -> parameter, each the sharded one."""
    reshard(module)
    return named_parameters(module)


def refresh_dtypes(module: nn.Module) -> None:
    """Let every group read its parameters' dtypes again; call it after ``requires_grad`` has changed.

    A group remembers the dtypes of the parameters that are trainable at the first forward. One that thaws later
    would get a gradient of the wrong dtype under a mixed precision policy.

    Raises:
        ConfigError: If a group holds trainable parameters of several dtypes, which FSDP2 cannot reduce together.
    """
    for part in fsdp_modules(module):
        for group in param_groups(part):
            _refresh_group(group)


def lazy_init_all_trainable(module: nn.Module) -> None:
    """Initialise FSDP2 now instead of at the first forward, as if every parameter were trainable.

    Each outermost ``fully_shard`` module below ``module`` becomes a root. ``requires_grad`` is as before afterwards,
    also if this fails. Calling it again does nothing.
    """
    flags = {parameter: parameter.requires_grad for parameter in sharded_parameters(module).values()}
    roots: list[nn.Module] = []
    inside: set[int] = set()
    for part in fsdp_modules(module):
        part = cast(nn.Module, part)
        if id(part) not in inside:
            roots.append(part)
            inside.update(id(child) for child in part.modules())
    try:
        for parameter in flags:
            parameter.requires_grad_(False)  # dtypes are read below, group by group: mixed ones must not fail here
        for root in roots:
            cast(Any, root)._get_fsdp_state()._lazy_init()
        for parameter in flags:
            if parameter.is_floating_point() or parameter.is_complex():
                parameter.requires_grad_(True)
        mixed = []
        for part in fsdp_modules(module):
            for group in param_groups(part):
                try:
                    group._init_mp_dtypes()
                except AssertionError:  # a frozen bfloat16 base with float32 adapters: what trains now decides
                    mixed.append(group)
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
    for group in mixed:
        _refresh_group(group)


def param_groups(part: FSDPModule) -> list[Any]:
    """Return what one ``fully_shard`` call gathers and reduces together."""
    state = cast(Any, part)._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)  # torch 2.13; one group or none before
    return list(groups) if groups is not None else [state._fsdp_param_group] if state._fsdp_param_group else []


def _refresh_group(group: Any) -> None:
    try:
        group._init_mp_dtypes()
    except AssertionError as error:
        trainable = [p for p in group.fsdp_params if p.sharded_param.requires_grad]
        found = sorted({str(p.orig_dtype).removeprefix("torch.") for p in trainable})
        raise ConfigError(
            f"Trainable parameters of {' and '.join(found)} lie in one FSDP2 group ({group._module_fqn or 'root'}), "
            "and FSDP2 reduces the gradients of a group together. Give them one dtype, or train only those of one."
        ) from error


# ---------------------------------------------------------------------- saving


def optimizer_state(strategy: ModelParallelStrategy, optimizer: Optimizer | LightningOptimizer) -> dict[str, Any]:
    """Return the state of ``optimizer`` in the format of ``ModelParallelStrategy.optimizer_state``.

    Unlike there, an optimizer without state stays without: nothing is stepped. To be called on every rank.

    Returns:
        Shards on the CPU by parameter name; or, for a full checkpoint, whole tensors by number on rank 0 and nothing
        on the others.

    Raises:
        UnsupportedStrategy: The optimizer keeps state of sharded weights that differs by rank and is not sharded.
    """
    inner = _inner(optimizer)
    assert strategy.model is not None
    parameters = sharded_parameters(strategy.model)
    full = not strategy._save_distributed_checkpoint
    leader = strategy.global_rank == 0
    keys: dict[int, Any] = {id(p): number if full else name for number, (name, p) in enumerate(parameters.items())}
    raw = inner.state_dict()
    members = [_key_of(member, keys, inner) for group in inner.param_groups for member in group["params"]]
    _check_layout(inner)
    state = {
        members[index]: tree_map(lambda leaf: _saved_leaf(leaf, full, leader), leaves)
        for index, leaves in raw["state"].items()
        if len(leaves)
    }
    if full and not leader:
        return {}
    groups = [{**group, "params": [members[index] for index in group["params"]]} for group in raw["param_groups"]]
    return {"state": state, "param_groups": groups}


def _check_layout(optimizer: Optimizer) -> None:
    for parameter, leaves in optimizer.state.items():
        if not isinstance(parameter, DTensor) or parameter.device_mesh.size() == 1:
            continue
        for key, leaf in leaves.items():
            if isinstance(leaf, Tensor) and not isinstance(leaf, DTensor) and leaf.numel() > 1:
                raise UnsupportedStrategy(
                    f"{type(optimizer).__name__} keeps {key!r} (shape {list(leaf.shape)}) of a sharded weight as a "
                    "plain tensor of each rank, which a checkpoint of all ranks cannot hold. Use an optimizer that "
                    "works with DTensor, such as those of torch.optim."
                )


def _saved_leaf(leaf: Any, full: bool, leader: bool) -> Any:
    """A leaf of the state as it is saved; gathering whole tensors is a collective call."""
    if not isinstance(leaf, Tensor):
        return leaf
    if full and isinstance(leaf, DTensor):
        # an offloaded shard cannot be sent from the CPU
        whole = cast(DTensor, leaf.to(leaf.device_mesh.device_type)).full_tensor()
        return whole.cpu() if leader else None
    return leaf.cpu()


def record_partial_state(strategy: ModelParallelStrategy, checkpoint: dict[str, Any]) -> None:
    """Write what is trainable and what has optimizer state into ``checkpoint``, under clean names."""
    assert strategy.model is not None
    parameters = sharded_parameters(strategy.model)
    names = {id(parameter): name for name, parameter in parameters.items()}
    with_state = [
        [names[key] for p, state in _inner(o).state.items() if len(state) and (key := id(original(p))) in names]
        for o in strategy.optimizers
    ]
    checkpoint[PARTIAL_STATE_KEY] = {
        "version": 1,
        "trainable": [name for name, parameter in parameters.items() if parameter.requires_grad],
        "has_state": with_state,
    }


def _inner(optimizer: Optimizer | LightningOptimizer) -> Optimizer:
    return optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


def _key_of(member: Tensor, keys: Mapping[int, Any], optimizer: Optimizer) -> Any:
    key = keys.get(id(original(member)))
    if key is None:
        raise ConfigError(
            f"{type(optimizer).__name__} holds a parameter of shape {tuple(member.shape)} that is not in the "
            "LightningModule, so that no checkpoint can name it."
        )
    return key


# ---------------------------------------------------------------------- loading


def load_checkpoint(
    strategy: ModelParallelStrategy, path: str | Path, weights_only: bool | None = None
) -> dict[str, Any]:
    """Load weights and, if the strategy has optimizers, their states from a sharded or a full checkpoint.

    Any number of processes may have written it. Parameters without saved state have none afterwards. Optimizer
    states of a full checkpoint go by their place in the parameter groups, as in ``Optimizer.load_state_dict``, so that
    those of a one-process run are right as well.

    Args:
        strategy: A strategy that has been set up.
        path: Folder (sharded) or file (full), visible to every rank.
        weights_only: As in ``torch.load``. None means what was given to ``Trainer.fit``, which Lightning 2.6 does not
            hand on to strategies that restore after setup.

    Returns:
        All else that the checkpoint holds.

    Raises:
        ConfigError: There is no checkpoint at ``path``, or a file of it is missing.
        ResumeMismatch: Names or shapes differ and ``strict_loading`` is on, or parameter groups differ. Raised on
            every rank.
    """
    path = Path(strategy.broadcast(path))
    if weights_only is None:
        weights_only = weights_only_of_fit()
    assert strategy.model is not None
    assert strategy.lightning_module is not None
    strict = bool(strategy.lightning_module.strict_loading)
    reshard(strategy.model)
    if _is_sharded_checkpoint(path):
        return _load_sharded(strategy, path, weights_only, strict)
    if path.is_file():
        return _load_full(strategy, path, weights_only, strict)
    kind = "a folder without meta.pt" if path.is_dir() else "neither a folder nor a file"
    raise ConfigError(f"No checkpoint at {str(path)!r}: it is {kind}.")


def weights_only_of_fit() -> bool | None:
    """The argument of the ``Trainer.fit`` (or ``validate``, ...) that is running."""
    return argument_of_fit("weights_only")


def argument_of_fit(name: str) -> Any:
    """An argument of the ``Trainer.fit`` (or ``validate``, ...) that is running, which Trainer keeps nowhere else."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is Trainer._run.__code__:
            return frame.f_locals.get(name)
        frame = frame.f_back
    return None


def read_checkpoint(path: Path, weights_only: bool | None, mmap: bool) -> dict[str, Any]:
    """Read a file of a checkpoint to the CPU; with ``mmap`` tensors are read when they are used.

    Raises:
        ConfigError: The file holds objects that ``torch.load`` refuses.
    """
    try:
        return torch.load(path, mmap=mmap, map_location="cpu", weights_only=weights_only)
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"{path.name} holds objects that torch.load refuses by default. If you trust the checkpoint, pass "
            f"weights_only=False to Trainer.fit. ({str(error).strip().splitlines()[0]})"
        ) from error


def read_metadata(strategy: Any, path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
    """Return what a checkpoint holds beside shards; the tensors of a single file are mapped and not read.

    Args:
        strategy: A strategy of several processes; every rank must call this.
        path: Folder or file. If there is none the result is empty, since whoever loads it says what is wrong.
        weights_only: As in :func:`load_checkpoint`.
    """
    path = Path(strategy.broadcast(path))
    meta = path / _METADATA_FILENAME if path.is_dir() else path
    if not meta.is_file():
        return {}
    return read_checkpoint(meta, weights_only_of_fit() if weights_only is None else weights_only, mmap=meta is path)


def _load_sharded(
    strategy: ModelParallelStrategy, path: Path, weights_only: bool | None, strict: bool
) -> dict[str, Any]:
    assert strategy.model is not None
    metadata = FileSystemReader(path).read_metadata()
    _check_files(strategy, path, metadata)
    target = get_model_state_dict(strategy.model)
    saved = {
        key.removeprefix("state_dict."): tuple(entry.size) if isinstance(entry, TensorStorageMetadata) else None
        for key, entry in metadata.state_dict_metadata.items()
        if key.startswith("state_dict.")
    }
    _check_model_keys(target, saved, strict)
    wanted = {key: value for key, value in target.items() if key in saved}
    load({"state_dict": wanted}, checkpoint_id=path)
    set_model_state_dict(strategy.model, {**target, **wanted}, options=StateDictOptions(strict=strict))
    for index, optimizer in enumerate(strategy.optimizers):
        _load_sharded_optimizer(strategy.model, optimizer, f"optimizer_{index}", path, metadata)
    return read_checkpoint(path / _METADATA_FILENAME, weights_only, mmap=False)


def _check_files(strategy: ModelParallelStrategy, path: Path, metadata: Metadata) -> None:
    files = {getattr(info, "relative_path", None) for info in (metadata.storage_data or {}).values()} - {None}
    missing = sorted(cast(str, name) for name in files if not (path / cast(str, name)).is_file())
    everywhere: list[list[str]] = [missing]
    if dist.is_initialized():
        everywhere = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everywhere, missing)
    absent = sorted({name for names in everywhere for name in names})
    if absent:
        ranks = [rank for rank, names in enumerate(everywhere) if names]
        raise ConfigError(
            f"The sharded checkpoint {str(path)!r} is not whole: rank(s) {', '.join(map(str, ranks))} cannot see "
            f"{', '.join(absent)}. Every rank needs all {len(files)} files."
        )


def _load_sharded_optimizer(
    model: nn.Module, optimizer: Optimizer, prefix: str, path: Path, metadata: Metadata
) -> None:
    optimizer = _inner(optimizer)
    parameters = named_parameters(model)
    paths: Mapping[str, tuple[Any, ...]] = metadata.planner_data
    flat: dict[str, Any] = {}
    for key, entry in metadata.state_dict_metadata.items():
        if not key.startswith(f"{prefix}."):
            continue
        if isinstance(entry, BytesStorageMetadata):
            flat[key] = None
            continue
        parameter = parameters.get(str(paths[key][2])) if paths[key][1] == "state" else None
        dtype = entry.properties.dtype
        if isinstance(parameter, DTensor) and tuple(entry.size) == tuple(parameter.shape):
            flat[key] = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
        else:
            flat[key] = torch.zeros(entry.size, dtype=dtype)
    if not flat:
        raise _no_optimizer_state(path)
    read_flat(flat, path)
    state, groups = optimizer_tree(flat, paths)
    names = {id(parameter): name for name, parameter in parameters.items()}
    now = [[_key_of(member, names, optimizer) for member in group["params"]] for group in optimizer.param_groups]
    _check_groups([list(group["params"]) for group in groups], now, state, path)
    order = [name for group in now for name in group]
    members = dict(zip(order, (p for group in optimizer.param_groups for p in group["params"]), strict=True))
    laid_out = {
        order.index(name): tree_map(lambda leaf, member=members[name]: _beside_shards(leaf, member), leaves)
        for name, leaves in state.items()
    }
    _apply_state(optimizer, laid_out, groups)


def read_flat(flat: dict[str, Any], path: Path, alone: bool = False) -> None:
    """Fill ``flat``, by the names that the sharded checkpoint at ``path`` uses; without other ranks if ``alone``."""
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as is meant
        load(flat, checkpoint_id=path, planner=planner, no_dist=alone)


def optimizer_tree(
    flat: Mapping[str, Any], paths: Mapping[str, tuple[Any, ...]]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the states by parameter name and the parameter groups of one optimizer in a sharded checkpoint."""
    state: dict[str, Any] = {}
    groups: list[dict[str, Any]] = []
    for key, value in flat.items():
        where = paths[key][1:]
        if where[0] == "state":
            if len(where) > 1:
                _put(state, where[1:], value)
        elif len(where) == 1:
            groups = value
        else:
            index = int(where[1])
            groups.extend({} for _ in range(index + 1 - len(groups)))
            _put(groups[index], where[2:], value)
    return state, groups


def _put(nested: dict[Any, Any], keys: tuple[Any, ...], value: Any) -> None:
    for key in keys[:-1]:
        nested = nested.setdefault(key, {})
    nested[keys[-1]] = value


def _check_groups(saved: list[list[str]], now: list[list[str]], state: Mapping[str, Any], path: Path) -> None:
    if len(saved) != len(now):
        raise ResumeMismatch(
            f"The optimizer has {len(now)} parameter group(s), that of {path.name} had {len(saved)}. "
            "Build the same groups as when the checkpoint was written."
        )
    for index, (then, present) in enumerate(zip(saved, now, strict=True)):
        lost, new = [n for n in then if n not in set(present)], [n for n in present if n not in set(then)]
        if any(name in state for name in lost) or new:
            raise ResumeMismatch(
                f"Parameter group {index} differs from that of {path.name}: "
                + "; ".join(filter(None, [_listed("only in the checkpoint", lost), _listed("only here", new)]))
                + ". Build the same groups as when the checkpoint was written."
            )


def _load_full(strategy: ModelParallelStrategy, path: Path, weights_only: bool | None, strict: bool) -> dict[str, Any]:
    assert strategy.model is not None
    checkpoint = read_checkpoint(path, weights_only, mmap=True)
    saved = checkpoint.pop("state_dict", None)
    if saved is None:
        raise ConfigError(f"{str(path)!r} is no Lightning checkpoint: it has no 'state_dict'.")
    target = get_model_state_dict(strategy.model)
    _check_model_keys(target, {key: _shape(value) for key, value in saved.items()}, strict)
    with torch.no_grad():
        for key, value in target.items():
            if key not in saved:
                continue
            if isinstance(value, Tensor):
                local(value).copy_(local_part(saved[key], value))
            else:
                target[key] = saved[key]
    set_model_state_dict(strategy.model, target, options=StateDictOptions(strict=strict))
    if not strategy.optimizers:
        return checkpoint
    states = checkpoint.pop("optimizer_states", None)
    if not states:
        raise _no_optimizer_state(path)
    if len(states) != len(strategy.optimizers):
        raise ResumeMismatch(f"There are {len(strategy.optimizers)} optimizers, and {path.name} has {len(states)}.")
    for optimizer, raw in zip(strategy.optimizers, states, strict=True):
        _load_full_optimizer(_inner(optimizer), raw, path)
    return checkpoint


def _load_full_optimizer(optimizer: Optimizer, raw: dict[str, Any], path: Path) -> None:
    state = {}
    for index, (key, member) in enumerate(saved_members(raw["param_groups"], optimizer, path)):
        if key in raw["state"]:
            state[index] = tree_map(lambda leaf, member=member: _loaded_leaf(leaf, member), raw["state"][key])
    _apply_state(optimizer, state, raw["param_groups"])


def saved_members(saved: list[dict[str, Any]], optimizer: Optimizer, path: Path) -> Iterator[tuple[Any, Tensor]]:
    """Yield what a file calls each parameter of ``optimizer``: the n-th of a saved group is the n-th of the group here.

    Raises:
        ResumeMismatch: If the groups are not of equal sizes.
    """
    then = [len(group["params"]) for group in saved]
    now = [len(group["params"]) for group in optimizer.param_groups]
    if then != now:
        raise ResumeMismatch(
            f"The optimizer's parameter groups hold {now} parameters, those of {path.name} {then}. "
            "Build the same groups as when the checkpoint was written."
        )
    for group, present in zip(saved, optimizer.param_groups, strict=True):
        yield from zip(group["params"], present["params"], strict=True)


def _loaded_leaf(leaf: Any, member: Tensor) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    if not isinstance(member, DTensor) or leaf.shape != member.shape:
        # the file is mapped and may be replaced while training goes on
        return _beside_shards(leaf.clone(), member)
    return Shard(member).of_local(local_part(leaf, member).clone())


def _beside_shards(leaf: Any, member: Tensor) -> Any:
    """A leaf that is not laid out as its parameter: the same on every rank (row and column sums of Adafactor)."""
    if not isinstance(leaf, Tensor) or isinstance(leaf, DTensor) or not isinstance(member, DTensor) or leaf.ndim == 0:
        return leaf
    placements = [Replicate()] * member.device_mesh.ndim
    piece = leaf.to(member.to_local().device)
    return DTensor.from_local(piece, member.device_mesh, placements, run_check=False)


def _apply_state(optimizer: Optimizer, state: dict[int, Any], groups: list[dict[str, Any]]) -> None:
    numbered, start = [], 0
    for present, saved in zip(optimizer.param_groups, groups, strict=True):
        count = len(present["params"])
        numbered.append({**saved, "params": list(range(start, start + count))})
        start += count
    optimizer.load_state_dict({"state": state, "param_groups": numbered})


def local_part(whole: Any, like: Tensor) -> Tensor:
    """The part of ``whole`` (a tensor, or a slice of a file) that this rank holds of ``like``."""
    if not isinstance(like, DTensor):
        return whole
    shape, offset = compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)
    return whole[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _check_model_keys(target: Mapping[str, Any], saved: Mapping[str, tuple[int, ...] | None], strict: bool) -> None:
    problems = []
    if strict:
        missing = [key for key in target if key not in saved]
        unexpected = [key for key in saved if key not in target]
        problems = [_listed("not in the checkpoint", missing, unexpected), _listed("not in the model", unexpected)]
    shapes = [
        f"{key} ({list(shape)} in the checkpoint, {list(value.shape)} in the model)"
        for key, value in target.items()
        if isinstance(value, Tensor) and (shape := saved.get(key)) is not None and tuple(shape) != tuple(value.shape)
    ]
    problems = list(filter(None, [*problems, _listed("of another shape", shapes)]))
    if problems:
        advice = " Set strict_loading=False on the LightningModule to load what fits by name." if strict else ""
        raise ResumeMismatch(f"The checkpoint does not fit the model: {'; '.join(problems)}.{advice}")


def _listed(what: str, names: Iterable[str], candidates: Iterable[str] = (), limit: int = 4) -> str:
    names = list(names)
    if not names:
        return ""
    more = f", ... ({len(names)} in all)" if len(names) > limit else ""
    close = nearest(names[0], candidates, 1)
    hint = f" (nearest there: {close[0]})" if close else ""
    return f"{what}: {', '.join(names[:limit])}{more}{hint}"


def _no_optimizer_state(path: Path) -> ResumeMismatch:
    return ResumeMismatch(
        f"{path.name} holds no optimizer states (saved with weights only?), so that training cannot go on from it. "
        "Load its weights and start a new run."
    )


# ---------------------------------------------------------------------- a strategy that is already there


def keep_partial_state(strategy: ModelParallelStrategy) -> Callable[[], None]:
    """Make ``strategy`` save and load partial optimizer states exactly, by methods on this one object.

    A strategy that says so itself (``saves_partial_state = True``) and one that has it attached are left alone. Attach
    it before anything else that wraps the strategy's loading: it does not call what was there.

    Returns:
        A function that takes it off again.
    """
    if getattr(strategy, "saves_partial_state", False):
        return lambda: None
    save = strategy.save_checkpoint

    def save_checkpoint(checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        record_partial_state(strategy, checkpoint)
        save(checkpoint, filepath, storage_options)

    return replace_on(
        strategy,
        optimizer_state=lambda optimizer: optimizer_state(strategy, optimizer),
        save_checkpoint=save_checkpoint,
        load_checkpoint=lambda checkpoint_path, weights_only=None: load_checkpoint(
            strategy, checkpoint_path, weights_only
        ),
        saves_partial_state=True,
    )
