"""Cut any model into FSDP2 groups: one per block, one for all the rest. Plain functions; no Lightning."""

from __future__ import annotations

import fnmatch
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from lightning_peft.core.blocks import find_structure
from lightning_peft.core.names import clean_name, unwrap
from lightning_peft.core.trainable import parameter_fingerprints
from lightning_peft.errors import ConfigError, suggest
from lightning_peft.strategies.partial_state import param_groups

__all__ = [
    "checkpoint_activations",
    "find_blocks",
    "is_sharded_model",
    "lay_out_processes",
    "no_gradient_sync",
    "same_on_all_ranks",
    "shard_model",
    "shards_integers",
    "unsharded_names",
]

_CHECKPOINTED = "_lightning_peft_checkpointed"
_MESHES: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[tuple[str, int, int, int], DeviceMesh]]
_MESHES = weakref.WeakKeyDictionary()


def lay_out_processes(device_type: str, replicas: int, shards: int, tensor: int) -> DeviceMesh:
    """Return all processes as a mesh with the dimensions ``data_parallel`` and ``tensor_parallel``.

    With more than one replica, ``data_parallel`` is ``replicate`` times ``shard``. Every group of a mesh holds
    communicators and threads until the process ends: strategies of one process, one after the other, share theirs.
    """
    world = dist.group.WORLD
    assert world is not None
    known = _MESHES.setdefault(world, {})
    layout = (device_type, replicas, shards, tensor)
    if layout not in known:
        if replicas > 1:
            names = ("replicate", "shard", "tensor_parallel")
            mesh = init_device_mesh(device_type, (replicas, shards, tensor), mesh_dim_names=names)
            mesh["replicate", "shard"]._flatten("data_parallel")
        else:
            names = ("data_parallel", "tensor_parallel")
            mesh = init_device_mesh(device_type, (shards, tensor), mesh_dim_names=names)
        known[layout] = mesh
    return known[layout]


def find_blocks(model: nn.Module, patterns: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """Return the modules that each get a group of their own, by clean path, in registration order.

    Args:
        model: The whole model.
        patterns: Class names or globs of class names or module paths (``"LlamaDecoderLayer"``,
            ``"model.layers.*"``). None finds the blocks by the model's structure, and takes the modules beside them
            that a Hugging Face model asks not to split (``_no_split_modules``) as well.

    Raises:
        ConfigError: If a pattern matches nothing, or only modules that never run ``forward``.
    """
    modules = {clean_name(path): module for path, module in model.named_modules() if path}
    if patterns is None:
        return _structural_blocks(model, modules)
    found: dict[str, nn.Module] = {}
    for pattern in patterns:
        matches = {
            path: module
            for path, module in modules.items()
            if fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(_class_name(module), pattern)
        }
        with_parameters = {path: m for path, m in matches.items() if any(True for _ in m.parameters())}
        if not with_parameters:
            problem = "matches no module" if not matches else "matches only modules without parameters"
            names = dict.fromkeys([*(_class_name(m) for m in modules.values()), *modules])
            raise ConfigError(f"FSDP2Strategy: blocks={pattern!r} {problem}. {suggest(pattern, names)}")
        if containers := [path for path, module in with_parameters.items() if _is_container(module)]:
            raise ConfigError(
                f"FSDP2Strategy: blocks={pattern!r} matches {containers[0]!r}, a {_class_name(modules[containers[0]])} "
                f"that never runs forward. Did you mean {containers[0] + '.*'!r}?"
            )
        found.update(with_parameters)
    return {path: module for path, module in modules.items() if path in found}


def _structural_blocks(model: nn.Module, modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    paths = {block.name for block in find_structure(model).blocks}
    hints = {hint for module in model.modules() for hint in getattr(module, "_no_split_modules", None) or ()}
    for path, module in modules.items():
        apart = not any(path == b or path.startswith(f"{b}.") or b.startswith(f"{path}.") for b in paths)
        if _class_name(module) in hints and apart and any(True for _ in module.parameters()):
            paths.add(path)
    return {path: module for path, module in modules.items() if path in paths and not _is_container(module)}


def _class_name(module: nn.Module) -> str:
    """The name of the class, without what ``fully_shard`` puts in front of it."""
    cls = type(unwrap(module))
    return (cls.__mro__[2] if issubclass(cls, FSDPModule) and len(cls.__mro__) > 2 else cls).__name__


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, (nn.ModuleList, nn.ModuleDict))


def is_sharded_model(model: nn.Module) -> bool:
    """Whether ``fully_shard`` was called on any part of ``model``."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def unsharded_names(model: nn.Module) -> list[str]:
    """Clean names of the parameters in no ``fully_shard`` group; integer ones (quantised) need none."""
    return [
        clean_name(name)
        for name, parameter in model.named_parameters()
        if not isinstance(parameter, DTensor) and _is_number(parameter)
    ]


def shards_integers() -> bool:
    """Whether this torch shards integer (quantised) weights, and leaves them alone where it casts others: 2.13 does."""
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2] if part.isdigit())
    return version >= (2, 13)


def _is_number(parameter: Tensor) -> bool:
    return parameter.is_floating_point() or parameter.is_complex()


def shard_model(
    root: nn.Module,
    blocks: dict[str, nn.Module],
    mesh: DeviceMesh,
    *,
    policy: MixedPrecisionPolicy,
    root_policy: MixedPrecisionPolicy,
    offload: OffloadPolicy,
    reshard_after_forward: bool,
) -> None:
    """Call ``fully_shard`` on each block, innermost first, and on ``root`` for all that is left.

    Two groups cannot own one weight: a block that shares one with another block or with the rest joins the root's
    group, which is there for the whole step. Before torch 2.13, integer weights stay whole on every rank.
    """
    for module in root.modules():  # bitsandbytes looks there when the weight has become a plain tensor
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None and getattr(module, "quant_state", None) is None:
            module.quant_state = state
    own = {id(block) for block in blocks.values()} - _sharing(root, list(blocks.values()))
    whole = set() if shards_integers() else {p for p in root.parameters() if not _is_number(p)}
    for module in reversed(list(root.modules())):
        if id(module) in own:
            fully_shard(
                module,
                mesh=mesh,
                mp_policy=policy,
                offload_policy=offload,
                reshard_after_forward=reshard_after_forward,
                ignored_params=whole,
            )
    fully_shard(root, mesh=mesh, mp_policy=root_policy, offload_policy=offload, ignored_params=whole)
    assert not unsharded_names(root), unsharded_names(root)
    gather_root_on_demand(root)


def _sharing(root: nn.Module, blocks: list[nn.Module]) -> set[int]:
    """Ids of the blocks that hold a weight which lies outside of them, too."""
    found: set[int] = set()
    for block in blocks:
        weights = {id(parameter) for parameter in block.parameters()}
        outside = (p for part in _beside(root, block) for p in part._parameters.values())
        if any(id(parameter) in weights for parameter in outside):
            found.add(id(block))
    return found


def _beside(root: nn.Module, block: nn.Module) -> Iterator[nn.Module]:
    """Every module that is reached without going through ``block``, also if ``block`` holds it as well."""
    seen, waiting = {id(block)}, [root]
    while waiting:
        part = waiting.pop()
        if id(part) not in seen:
            seen.add(id(part))
            yield part
            waiting.extend(child for child in part._modules.values() if child is not None)


def gather_root_on_demand(root: nn.Module) -> None:
    """Gather the root's group again where one of its weights is needed and is not there.

    The group is there from the start of a step on and given up at the end of a backward pass. A step that goes on
    after that (manual optimisation), and calls of a part of the model outside a step, find it gathered here.
    """
    assert isinstance(root, FSDPModule)
    own = {id(parameter) for group in param_groups(root) for parameter in (p.sharded_param for p in group.fsdp_params)}

    def gather(module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return  # a compiled part is looked after where it is entered, below
        if not all(group.is_unsharded for group in param_groups(root)):
            root.unshard()

    def owns(module: nn.Module) -> bool:
        return any(id(parameter) in own for parameter in module._parameters.values() if parameter is not None)

    entered = [part for part in root.children() if any(map(owns, part.modules()))]
    for module in dict.fromkeys([*entered, *filter(owns, root.modules())]):
        if module is not root:
            module.register_forward_pre_hook(gather, prepend=True)


def same_on_all_ranks(model: nn.Module) -> list[str]:
    """Make every rank start from rank 0's weights and buffers, and return the names of what differed.

    Only what differs is sent: one pass over the memory finds it. Tensors on the meta device are left alone.

    Raises:
        ConfigError: If a quantised weight differs, which cannot be sent as it is.
    """
    tensors = {
        clean_name(name): tensor
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if not tensor.is_meta and tensor.dtype != torch.bool and _has_plain_memory(tensor)
    }
    names = list(tensors)
    marks = [(name, tuple(tensors[name].shape), str(tensors[name].dtype)) for name in names]
    prints = parameter_fingerprints(list(tensors.values()))
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, (marks, prints))
    first = everywhere[0]
    for rank, (other, _) in enumerate(everywhere):
        if other != first[0]:
            unequal = sorted({m[0] for m in {*other} ^ {*first[0]}})[:3]
            raise ConfigError(
                f"The model is built differently on rank 0 and rank {rank}: {', '.join(map(str, unequal))}. "
                "Every rank must build the same modules."
            )
    different = [n for i, n in enumerate(names) if len({prints[i] for _, prints in everywhere}) > 1]
    for name in different:
        tensor = tensors[name]
        if isinstance(tensor, nn.Parameter) and type(tensor) is not nn.Parameter:
            raise ConfigError(
                f"{name} ({type(tensor).__name__}) differs between ranks, and quantised weights cannot be sent. "
                "Load the same weights on every rank before they are quantised."
            )
        device = _group_device(tensor)
        sent = tensor.detach().to(device, copy=True).contiguous()
        dist.broadcast(sent, src=0)
        with torch.no_grad():
            tensor.copy_(sent)
    return different


def _has_plain_memory(tensor: Tensor) -> bool:
    """Whether the bits of ``tensor`` are its own; not so of shards and of torchao's quantised weights."""
    return type(tensor) in (Tensor, nn.Parameter) or type(tensor).__module__.startswith("bitsandbytes")


def _group_device(tensor: Tensor) -> torch.device:
    """Where the default process group can take a tensor from."""
    if tensor.device.type == "cpu" and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return tensor.device


@contextmanager
def no_gradient_sync(model: nn.Module) -> Iterator[None]:
    """Let gradients pile up whole on each rank, without a reduce-scatter; the next backward after it reduces all."""
    parts = [part for part in model.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.set_requires_gradient_sync(False, recurse=False)
    try:
        yield
    finally:
        for part in parts:
            part.set_requires_gradient_sync(True, recurse=False)


def checkpoint_activations(model: nn.Module, blocks: dict[str, nn.Module]) -> None:
    """Keep only each block's input for the backward pass and compute the block again there.

    A block through which no gradient flows (frozen, below the lowest trainable one) saves nothing and is not
    computed again. A Hugging Face model that holds the blocks does it its own way, which knows of caches.

    Raises:
        ConfigError: If there is no block to recompute.
    """
    if not blocks:
        raise ConfigError("FSDP2Strategy: activation_checkpointing=True, but no block was found. Name them in blocks.")
    own_way = [m for m in model.modules() if getattr(type(m), "supports_gradient_checkpointing", False) is True]
    covered: set[int] = set()
    for part in own_way:
        if id(part) in covered:
            continue
        covered.update(id(child) for child in part.modules())
        if not getattr(part, "is_gradient_checkpointing", False):
            _checkpoint_in_its_own_way(part)
    for module in blocks.values():
        if id(module) not in covered and not hasattr(module, _CHECKPOINTED):
            setattr(module, _CHECKPOINTED, True)
            module.forward = _Recomputed(module.forward)


def _checkpoint_in_its_own_way(model: Any) -> None:
    if hasattr(model, "activation_checkpointing_enable"):  # the name of newer transformers
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # Only reentrant checkpointing needs what this takes off; it would send gradients through frozen blocks below.
    model.disable_input_require_grads()


class _Recomputed:
    """A block's ``forward`` that is computed again in the backward pass."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        return checkpoint(self.forward, *args, use_reentrant=False, **kwargs)
