"""Give a sharded model that was built without memory (meta device) its weights, one tensor at a time.

The order: everything gets memory; what no file holds is initialised; what a file holds is read, each rank its own
part. No rank ever holds more than one whole tensor beside its shards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lightning_peft.core.names import clean_name, parameter_aliases
from lightning_peft.core.sharded import local
from lightning_peft.errors import BaseMismatch, ConfigError, nearest, suggest
from lightning_peft.strategies.partial_state import local_part

__all__ = [
    "WeightFiles",
    "fill_from_rank_zero",
    "has_meta_tensors",
    "materialize",
    "parameters_on_meta",
    "seed_of_rank_zero",
    "take_from_rank_zero",
]


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Build modules without memory for their parameters; their buffers are computed as always.

    Under ``torch.device("meta")`` buffers that no checkpoint holds (rotary frequencies, position ids) would be lost.
    """
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta and type(param) is nn.Parameter:
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def has_meta_tensors(model: nn.Module) -> bool:
    """Whether any parameter or buffer has no memory."""
    return any(t.is_meta for t in model.parameters()) or any(t.is_meta for t in model.buffers())


class WeightFiles:
    """The tensors of a safetensors file or folder, read part by part.

    Args:
        place: A ``.safetensors`` file, or a folder that holds some (a Hugging Face model folder, in one file or many).

    Raises:
        ConfigError: There is none, or a file that the folder's index names is missing.
    """

    def __init__(self, place: str | Path) -> None:
        from safetensors import safe_open

        place = Path(place)
        files = sorted(place.glob("*.safetensors")) if place.is_dir() else [place]
        if not files or not all(file.is_file() for file in files):
            beside = [str(path) for path in place.parent.glob("*")] if place.parent.is_dir() else []
            raise ConfigError(
                f"FSDP2Strategy: weights={str(place)!r} is neither a safetensors file nor a folder with one. "
                f"{suggest(str(place), beside)}"
            )
        self.place = place
        self._handles = [safe_open(str(file), framework="pt") for file in files]
        self._where = {key: handle for handle in self._handles for key in handle.keys()}  # noqa: SIM118
        self._check_index(place)

    def _check_index(self, place: Path) -> None:
        import json

        for index in place.glob("*.safetensors.index.json") if place.is_dir() else ():
            named: Mapping[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            absent = sorted({file for key, file in named.items() if key not in self._where})
            if absent:
                raise ConfigError(f"FSDP2Strategy: weights={str(place)!r} is not whole: {', '.join(absent)} missing.")

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return tuple(self._where[name].get_slice(name).get_shape())

    def read(self, name: str, like: Tensor) -> Tensor:
        """Return what this rank needs of tensor ``name`` to fill ``like``; only that is read."""
        if not isinstance(like, DTensor):
            return self._where[name].get_tensor(name)
        return local_part(self._where[name].get_slice(name), like)


def materialize(
    model: nn.Module, device: torch.device, buffer_device: torch.device, weights: WeightFiles | None, seed: int
) -> list[str]:
    """Give every tensor on the meta device memory and a value.

    Args:
        model: The sharded model.
        device: Where parameters shall lie.
        buffer_device: Where buffers shall lie.
        weights: Where pretrained weights lie, or None to initialise all.
        seed: Seed of what is initialised, equal on all ranks; whole tensors are drawn, so that it does not depend on
            the number of ranks.

    Returns:
        Clean names of the tensors that were initialised although weights were given (a new head).

    Raises:
        ConfigError: A module says nowhere how to initialise it.
        BaseMismatch: The weights do not fit the model.
    """
    meta = {id(t) for t in [*model.parameters(), *model.buffers()] if t.is_meta}
    waiting: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        own = [*module._parameters.items(), *module._buffers.items()]
        if names := [name for name, tensor in own if tensor is not None and id(tensor) in meta]:
            waiting[path] = names
    _allocate(model, device, buffer_device)
    sources = _sources(model, weights) if weights is not None else {}
    aliases = parameter_aliases(model)
    in_files = {aliases.get(key, key) for key in sources}
    owners = _huggingface_owners(model)
    fresh: list[str] = []
    generator = torch.Generator().manual_seed(seed)
    for path, names in waiting.items():
        # one seed per module, whether its weights are in a file or not: the others' do not depend on it
        module_seed = int(torch.randint(2**62, (), generator=generator))
        full = {name: clean_name(f"{path}.{name}" if path else name) for name in names}
        missing = [name for name in names if aliases.get(full[name], full[name]) not in in_files]
        if missing:
            _initialise(model.get_submodule(path), missing, full, owners.get(path), module_seed)
            fresh += [full[name] for name in missing if aliases.get(full[name]) == full[name]]
    if weights is None:
        return []
    targets = _targets(model)
    with torch.no_grad():
        for key, name in sources.items():
            local(targets[key]).copy_(weights.read(name, targets[key]))
    return fresh


def take_from_rank_zero(model: nn.Module) -> dict[str, Tensor] | None:
    """Where rank 0 has the weights and others have none, take them out of the model on rank 0.

    Returns:
        None if all ranks have weights, or none has. Otherwise every tensor of the model, on rank 0, and nothing on the
        others; the model itself is without memory on all of them then.

    Raises:
        ConfigError: Another rank has weights and rank 0 has not, or a weight is quantised.
    """
    empty: list[bool] = [has_meta_tensors(model)]
    if dist.is_initialized():
        empty = [False] * dist.get_world_size()
        dist.all_gather_object(empty, has_meta_tensors(model))
    if len(set(empty)) == 1:
        return None
    if empty[0]:
        raise ConfigError(
            f"Rank {empty.index(False)} has the model's weights and rank 0 has not: build it with its weights on rank "
            "0, on every rank, or on none."
        )
    taken: dict[str, Tensor] = {}
    replaced: dict[int, Tensor] = {}
    for path, module in model.named_modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is None or tensor.is_meta:
                    continue
                if type(tensor) not in (Tensor, nn.Parameter):
                    raise ConfigError(f"{path}.{name} is quantised: weights like it must be there on every rank.")
                if id(tensor) not in replaced:
                    replaced[id(tensor)] = _empty(tensor, torch.device("meta"))
                    taken[clean_name(f"{path}.{name}" if path else name)] = tensor.detach()
                cast(dict[str, Any], table)[name] = replaced[id(tensor)]
    return taken if dist.get_rank() == 0 else {}


def fill_from_rank_zero(
    model: nn.Module, taken: Mapping[str, Tensor], device: torch.device, buffer_device: torch.device
) -> None:
    """Give a sharded model without memory the tensors that rank 0 holds, one whole tensor on the way at a time.

    Raises:
        ConfigError: On every rank, if rank 0 built another model.
    """
    _allocate(model, device, buffer_device)
    named = [*model.named_parameters(), *model.named_buffers()]
    targets = {clean_name(name): tensor for name, tensor in named}
    given: list[Any] = [{name: (tuple(t.shape), t.dtype) for name, t in taken.items()}]
    dist.broadcast_object_list(given, src=0)
    mine = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in targets.items()}
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, sorted({*mine.items()} ^ {*given[0].items()}, key=str))
    for rank, different in enumerate(everywhere):
        if different:
            names = list(dict.fromkeys(name for name, _ in different))
            raise ConfigError(f"The model is built differently on rank 0 and rank {rank}: {', '.join(names[:3])}.")
    for name, target in targets.items():
        sent = taken[name].to(buffer_device, copy=True).contiguous() if name in taken else None
        if sent is None:
            sent = torch.empty(target.shape, dtype=target.dtype, device=buffer_device)
        dist.broadcast(sent, src=0)
        with torch.no_grad():
            local(target).copy_(local_part(sent, target))


def _targets(model: nn.Module) -> dict[str, Tensor]:
    targets: dict[str, Tensor] = {clean_name(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    return targets | {clean_name(name): b for name, b in model.named_buffers(remove_duplicate=False)}


def _sources(model: nn.Module, weights: WeightFiles) -> dict[str, str]:
    """Clean name in the model -> name in the files, of all that is in both."""
    targets = _targets(model)
    add, cut = _place_of(weights.names, model, set(targets))
    sources: dict[str, str] = {}
    unused, shapes = [], []
    for name in weights.names:
        key = add + name.removeprefix(cut)
        if key not in targets:
            unused.append(name)
        elif weights.shape(name) != tuple(targets[key].shape):
            shapes.append(f"{name} {list(weights.shape(name))}, in the model {list(targets[key].shape)}")
        else:
            sources[key] = name
    if shapes or len(unused) > len(weights.names) / 2:
        what = f"of another shape: {'; '.join(shapes[:3])}" if shapes else f"in no place of it: {', '.join(unused[:3])}"
        close = nearest(unused[0], targets, 1) if unused and not shapes else []
        hint = f" (nearest in the model: {close[0]})" if close else ""
        raise BaseMismatch(f"The weights at {str(weights.place)!r} do not fit the model; {what}{hint}.")
    return sources


def _place_of(names: list[str], model: nn.Module, known: set[str]) -> tuple[str, str]:
    """Where in the model the files' names belong: a prefix to add, after one that is taken off.

    A Hugging Face folder is named from its own root, which is some module of the LightningModule; a body alone may be
    saved with or without its ``base_model_prefix``.
    """
    best, choice = -1, ("", "")
    for path, module in model.named_modules():
        if path.count(".") > 3:
            continue
        prefix = f"{clean_name(path)}." if path else ""
        base = getattr(module, "base_model_prefix", "")
        for add, cut in [(prefix, "")] + ([(prefix, f"{base}."), (f"{prefix}{base}.", "")] if base else []):
            hits = sum(add + name.removeprefix(cut) in known for name in names)
            if hits > best:
                best, choice = hits, (add, cut)
        if best == len(names):
            break
    return choice


def _allocate(model: nn.Module, device: torch.device, buffer_device: torch.device) -> None:
    """Replace meta tensors by empty ones, tied ones by one; shards stay shards."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for table, place in ((module._parameters, device), (module._buffers, buffer_device)):
            for name, tensor in table.items():
                if tensor is None or not tensor.is_meta:
                    continue
                if id(tensor) not in made:
                    made[id(tensor)] = _empty(tensor, place)
                cast(dict[str, Any], table)[name] = made[id(tensor)]


def _empty(tensor: Tensor, device: torch.device) -> Tensor:
    empty = torch.empty_like(tensor, device=device)
    if not isinstance(tensor, nn.Parameter):
        return empty
    parameter = nn.Parameter(empty, requires_grad=tensor.requires_grad)
    vars(parameter).update(vars(tensor))  # pyright: ignore[reportAttributeAccessIssue]
    return parameter


def _huggingface_owners(model: nn.Module) -> dict[str, nn.Module]:
    """Module path -> the innermost Hugging Face model that it lies in."""
    owners: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if hasattr(module, "_init_weights") and hasattr(module, "config"):
            for inner, _ in module.named_modules(prefix=path):
                owners[inner] = module
    return owners


def _initialise(
    module: nn.Module, names: list[str], full: Mapping[str, str], owner: nn.Module | None, seed: int
) -> None:
    """Draw whole values in a stand-in of ``module`` on the CPU and keep this rank's part."""
    cls = type(module)
    stand_in = object.__new__(cls.__mro__[2] if issubclass(cls, FSDPModule) else cls)
    vars(stand_in).update(vars(module))  # pyright: ignore[reportAttributeAccessIssue]
    own = {**module._parameters, **module._buffers}
    whole: dict[str, Any] = {
        name: None if t is None else torch.zeros(t.shape, dtype=t.dtype) for name, t in own.items()
    }
    stand_in._parameters = {
        name: None if (value := whole[name]) is None else nn.Parameter(value, value.is_floating_point())
        for name in module._parameters
    }
    stand_in._buffers = {name: whole[name] for name in module._buffers}
    where = ", ".join(full[name] for name in names)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            if owner is not None:
                cast(Any, owner)._init_weights(stand_in)
            elif reset := getattr(stand_in, "reset_parameters", None) or getattr(stand_in, "_reset_parameters", None):
                with torch.no_grad():
                    reset()
            else:
                raise ConfigError(
                    f"{where}: built on the meta device and not in any file, and {type(module).__name__} has no "
                    "reset_parameters() that says how to initialise it. Build the model under "
                    "trainer.init_module(empty_init=True), which keeps buffers, give weights=, or write that method."
                )
        except (AttributeError, RuntimeError) as error:
            raise ConfigError(f"{where}: cannot be initialised apart from the rest of the model: {error}") from error
    with torch.no_grad():
        for name in names:
            target = own[name]
            assert target is not None
            value = {**stand_in._parameters, **stand_in._buffers}[name]
            assert value is not None
            local(target).copy_(local_part(value.detach(), target))


def seed_of_rank_zero() -> int:
    """A seed drawn from rank 0's generator, the same on every rank."""
    drawn = [int(torch.randint(2**62, ()))]
    if dist.is_initialized():
        dist.broadcast_object_list(drawn, src=0)
    return drawn[0]
