"""The only code that touches ``requires_grad``, and what becomes of gradients, moments and norm statistics with it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.utils._pytree import tree_map

from lightning_peft.core.masters import original
from lightning_peft.core.sharded import Shard, is_sharded, local, whole
from lightning_peft.errors import ConfigError, suggest

__all__ = [
    "FrozenNormStatistics",
    "OffloadedStates",
    "StatePolicy",
    "Switch",
    "check_state_policy",
    "optimizer_members",
    "parameter_fingerprints",
    "set_flags",
    "set_trainable",
    "state_bytes",
]

StatePolicy = Literal["keep", "drop", "offload"]
"""What becomes of the optimizer state of a parameter that freezes.

``keep``: it stays where it is, stale, and goes on when the parameter thaws.
``drop``: it is freed; a parameter that thaws starts with fresh moments and bias correction.
``offload``: it moves to CPU memory and comes back, bit for bit, when the parameter thaws.
"""


def check_state_policy(state: StatePolicy) -> StatePolicy:
    """Return ``state`` if it is a policy.

    Raises:
        ConfigError: If it is not, with the nearest policy.
    """
    policies = get_args(StatePolicy)
    if state not in policies:
        raise ConfigError(f"state={state!r} is not a state policy. {suggest(str(state), policies)}")
    return state


class OffloadedStates:
    """Optimizer states of frozen parameters that wait in CPU memory, by parameter name."""

    def __init__(self) -> None:
        self._states: dict[str, Any] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._states

    def put(self, name: str, state: Mapping[str, Any]) -> None:
        """Move ``state`` to CPU memory."""
        self._states[name] = tree_map(_to_cpu, dict(state))

    def take(self, name: str, parameter: nn.Parameter) -> dict[str, Any]:
        """Give the state back, its tensors on the devices they came from."""
        return tree_map(lambda leaf: _from_cpu(leaf, parameter), self._states.pop(name))

    def num_bytes(self) -> int:
        """Bytes held in CPU memory."""
        leaves: list[int] = []
        tree_map(lambda leaf: leaves.append(leaf.tensor.nbytes) if isinstance(leaf, _Waiting) else None, self._states)
        return sum(leaves)

    def state_dict(self) -> dict[str, Any]:
        """Plain whole tensors and numbers, for a checkpoint; with sharded states every process must call it."""
        return tree_map(lambda leaf: leaf.whole() if isinstance(leaf, _Waiting) else leaf, self._states)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore from :meth:`state_dict`; zero-dimensional tensors (step counts) stay on the CPU."""
        self._states = tree_map(
            lambda leaf: _Waiting(leaf.cpu(), follows=leaf.ndim > 0) if isinstance(leaf, torch.Tensor) else leaf,
            dict(state),
        )


@dataclass(frozen=True)
class _Waiting:
    """A tensor on the CPU that returns to its parameter's device if ``follows``; with a ``shard``, a piece of one."""

    tensor: torch.Tensor
    follows: bool
    shard: Shard | None = None

    def whole(self) -> torch.Tensor:
        return self.tensor if self.shard is None else whole(self.shard.of_local(self.tensor)).cpu()


def _to_cpu(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    follows = leaf.device.type != "cpu" or leaf.ndim > 0
    return _Waiting(local(leaf).to("cpu", copy=True), follows, Shard(leaf) if is_sharded(leaf) else None)


def _from_cpu(leaf: Any, parameter: nn.Parameter) -> Any:
    if not isinstance(leaf, _Waiting):
        return leaf
    if leaf.shard is not None:
        return leaf.shard.of_local(leaf.tensor)
    if is_sharded(parameter) and leaf.tensor.shape == parameter.shape:  # whole, from a checkpoint
        return Shard(parameter).of_whole(leaf.tensor)
    return leaf.tensor.to(parameter.device) if leaf.follows else leaf.tensor


@dataclass(frozen=True)
class Switch:
    """What one call of :func:`set_trainable` changed."""

    frozen: tuple[str, ...]
    thawed: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.frozen or self.thawed)


def set_flags(parameters: Mapping[str, nn.Parameter], flags: Mapping[str, bool]) -> None:
    """Set ``requires_grad`` to ``flags`` and nothing else: before an optimizer exists, or to restore what was."""
    for name, flag in flags.items():
        parameter = parameters[name]
        if parameter.requires_grad != flag:
            parameter.requires_grad_(flag)


def set_trainable(
    parameters: Mapping[str, nn.Parameter],
    trainable: Collection[str],
    *,
    optimizers: Sequence[torch.optim.Optimizer] = (),
    policy: Callable[[str], StatePolicy] = lambda _: "keep",
    offloaded: OffloadedStates | None = None,
) -> Switch:
    """Make exactly ``trainable`` trainable.

    Call it between an optimizer step and the next backward pass. A parameter that freezes loses its gradient at once,
    so that momentum and weight decay cannot move it any more, and its optimizer state follows ``policy``. A parameter
    that thaws gets offloaded state back.

    Args:
        parameters: Canonical name -> parameter of the whole model.
        trainable: Names to train from now on.
        optimizers: The optimizers that may hold state.
        policy: State policy of a name.
        offloaded: Where offloaded states wait; needed if a policy is ``"offload"``.

    Returns:
        The names that froze and that thawed.
    """
    wanted = frozenset(trainable)
    unknown = wanted - parameters.keys()
    assert not unknown, f"not parameters of the model: {sorted(unknown)[:3]}"
    frozen, thawed = [], []
    for name, parameter in parameters.items():
        if name in wanted:
            if not parameter.requires_grad:
                parameter.grad = None
                parameter.requires_grad_(True)
                thawed.append(name)
            if offloaded is not None and name in offloaded:
                _holder(parameter, optimizers).state[parameter] = offloaded.take(name, parameter)
            continue
        parameter.grad = None
        if parameter.requires_grad:
            parameter.requires_grad_(False)
            frozen.append(name)
        _release_state(name, parameter, optimizers, policy, offloaded)
    return Switch(tuple(frozen), tuple(thawed))


def _release_state(
    name: str,
    parameter: nn.Parameter,
    optimizers: Sequence[torch.optim.Optimizer],
    policy: Callable[[str], StatePolicy],
    offloaded: OffloadedStates | None,
) -> None:
    for optimizer in optimizers:
        if parameter not in optimizer.state:
            continue
        chosen = policy(name)
        if chosen == "keep":
            continue
        state = optimizer.state[parameter]
        if chosen == "offload":
            if any(getattr(leaf, "is_paged", False) for leaf in state.values()):
                continue  # paged optimizers keep their state in CPU memory already
            assert offloaded is not None
            offloaded.put(name, state)
        del optimizer.state[parameter]


def _holder(parameter: nn.Parameter, optimizers: Sequence[torch.optim.Optimizer]) -> torch.optim.Optimizer:
    for optimizer in optimizers:
        if any(parameter is member for group in optimizer.param_groups for member in group["params"]):
            return optimizer
    raise AssertionError("a parameter with offloaded state is in no optimizer")


def optimizer_members(
    parameters: Mapping[str, nn.Parameter], optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, list[int]]:
    """Map each name to the indices of the optimizers that hold it, once for each time it is held."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    members: dict[str, list[int]] = {name: [] for name in parameters}
    for index, optimizer in enumerate(optimizers):
        for group in optimizer.param_groups:
            for member in group["params"]:
                if (key := id(original(member))) in names:
                    members[names[key]].append(index)
    return members


def state_bytes(optimizers: Iterable[torch.optim.Optimizer]) -> int:
    """Bytes of all tensors in the optimizers' states, on this process."""
    total = 0
    for optimizer in optimizers:
        for state in optimizer.state.values():
            for leaf in state.values() if isinstance(state, dict) else ():
                if isinstance(leaf, torch.Tensor):
                    total += local(leaf).nbytes
    return total


_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_FINGERPRINT_CHUNK = 1 << 18
_CHUNK_FACTOR = 0x9E3779B97F4A7C15 - (1 << 64)  # odd


@torch.no_grad()
def parameter_fingerprints(parameters: Iterable[torch.Tensor]) -> list[int]:
    """Return an integer per tensor: the sum of its elements' bits, each times an odd random factor of its place.

    A change of one element always changes it. Changes of several cancel by a chance below ``2**-32``, also where all
    of them have the same size, as in the first step of Adam. One pass over the memory in chunks, one synchronisation
    for all tensors.
    """
    factors: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}
    sums = []
    for parameter in parameters:
        piece = local(parameter)
        piece = torch.view_as_real(piece) if piece.is_complex() else piece
        bits = piece.contiguous().view(_INTEGER_OF_SIZE[piece.element_size()]).flatten()
        dtype = torch.int64 if bits.dtype == torch.int64 else torch.int32
        factor = factors.get((bits.device, dtype))
        if factor is None:
            factor = factors[bits.device, dtype] = _odd_factors(dtype).to(bits.device)
        total = torch.zeros((), dtype=torch.int64, device=bits.device)
        for chunk in bits.split(_FINGERPRINT_CHUNK):
            products = chunk.to(dtype) * factor[: len(chunk)]  # wraps; an odd factor keeps different bits different
            total = total * _CHUNK_FACTOR + products.sum(dtype=torch.int64)
        sums.append(total)
    if not sums:
        return []
    return torch.stack([total.to(sums[0].device) for total in sums]).tolist()


@functools.cache
def _odd_factors(dtype: torch.dtype) -> torch.Tensor:
    limits = torch.iinfo(dtype)
    generator = torch.Generator().manual_seed(0x5EED)
    return torch.randint(limits.min, limits.max, (_FINGERPRINT_CHUNK,), dtype=dtype, generator=generator) | 1


class FrozenNormStatistics:
    """Keep the running statistics of frozen normalisation layers constant.

    A frozen BatchNorm in training mode still normalises by the batch and still moves its running mean and variance.
    Here such a layer works as in evaluation while its parameters are frozen: it normalises by its running statistics,
    and they stay bit-identical. A layer without parameters follows the other parameters of its parent module. Layers
    that the user put into evaluation mode stay there.
    """

    def __init__(self, modules: Mapping[str, nn.Module], names: Mapping[str, tuple[str, ...]]) -> None:
        """Find the layers.

        Args:
            modules: Clean path -> module of the whole model.
            names: Module path -> canonical names of all parameters at or below it.
        """
        self._root = modules[""]
        self._layers: list[tuple[nn.Module, tuple[str, ...]]] = []
        for path, module in modules.items():
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
                members = names.get(path, ()) or names.get(path.rpartition(".")[0], ())
                self._layers.append((module, members))
        self._ours: list[nn.Module] = []

    def apply(self, trainable: Collection[str]) -> None:
        """Freeze the statistics of every layer none of whose parameters is in ``trainable``; thaw the others."""
        for module in self._ours:
            module.train()
        self._ours = [
            module
            for module, members in self._layers
            if module.training and members and not any(name in trainable for name in members)
        ]
        self.hold()

    def hold(self) -> None:
        """Put the frozen layers back into evaluation mode, in case the user's code called ``train()``."""
        for module in self._ours:
            if module.training:
                module.eval()

    def release(self) -> None:
        """Put every layer that was frozen here back into the mode that the whole model is in."""
        for module in self._ours:
            module.train(self._root.training)
        self._ours = []
