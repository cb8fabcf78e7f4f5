"""What a training step costs, and what each tensor's training adds to it: counted on the real autograd graph.

Reverse-mode differentiation walks the graph of the forward pass. Each edge of that graph carries the gradient of one
intermediate tensor, and PyTorch computes it exactly if a trainable tensor can be reached through the edge. So the cost
of back-propagation for *any* trainable set follows from one recorded pass in which everything trains: the operations
of a node are counted, each is assigned to the edges whose gradient it feeds, and an edge costs what it costs if, and
only if, the trainable set meets the set of tensors ("leaves") behind it. No architecture is known by name.

An edge with one leaf behind it is that tensor's own weight gradient; one with several is an activation gradient.

As everywhere in this field, FLOPs are those of matrix products, convolutions and attention, a multiplication and an
addition counting as two; element-wise work (norms, activations, softmax) is not counted.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from typing_extensions import override

from lightning_peft.errors import ConfigError

__all__ = ["LinearCost", "StepCost", "count_step_flops", "measure_step"]

_aten = torch.ops.aten


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Scores and weighted values."""
    *rows, width = query.shape
    return 2 * math.prod(rows) * key.shape[-2] * (width + value.shape[-1])


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Scores once more, and two products for each of the two of the forward pass."""
    *rows, width = query.shape
    return 2 * math.prod(rows) * key.shape[-2] * (3 * width + 2 * value.shape[-1])


_ATTENTION = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
_FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    # PyTorch's counter knows no attention on the CPU, and until 2.12 none with fewer key-value heads.
    **{getattr(_aten, f"_scaled_dot_product_{kind}"): _attention for kind in _ATTENTION},
    **{getattr(_aten, f"_scaled_dot_product_{kind}_backward"): _attention_backward for kind in _ATTENTION},
}


# ---------------------------------------------------------------------------------------------------- costs


@dataclass(frozen=True)
class LinearCost:
    """Cost of back-propagation as in a chain: to reach a tensor, the gradient passes all that come before it.

    Args:
        order: Names, the cheapest to reach first.
        weight_flops: Of the tensor's own gradient, for each of ``order``.
        reach_flops: Activation-gradient FLOPs to be spent if this tensor and any before it train; never decreasing.
    """

    order: tuple[str, ...]
    weight_flops: tuple[int, ...]
    reach_flops: tuple[int, ...]


@dataclass(frozen=True)
class StepCost:
    """FLOPs of a training step as a function of what trains.

    Args:
        names: The tensors that were trainable when the pass was recorded and that the loss depends on.
        forward_flops: Of the forward pass.
        items: Costs of back-propagation: the set of tensors behind an edge, as indices into ``names``, and the FLOPs
            that are due when any of them trains.
        fixed_flops: Backward FLOPs that are due in any case: on the way to inputs that require a gradient.
    """

    names: tuple[str, ...]
    forward_flops: int
    items: tuple[tuple[frozenset[int], int], ...] = field(repr=False)
    fixed_flops: int = 0

    def backward_flops(self, selection: Iterable[str] | None = None) -> int:
        """FLOPs of back-propagation when exactly ``selection`` trains; by default everything."""
        if selection is None:
            return self.fixed_flops + sum(flops for _, flops in self.items)
        position = {name: index for index, name in enumerate(self.names)}
        chosen = {position[name] for name in selection if name in position}
        return self.fixed_flops + sum(flops for leaves, flops in self.items if not chosen.isdisjoint(leaves))

    def step_flops(self, selection: Iterable[str] | None = None) -> int:
        """FLOPs of forward pass and back-propagation when exactly ``selection`` trains; by default everything."""
        return self.forward_flops + self.backward_flops(selection)

    def linear(self, candidates: Collection[str], paid: Iterable[str] = ()) -> LinearCost:
        """Cost of training ``candidates`` on top of ``paid``, which train anyway, as that of a chain.

        Never less than the exact cost, and equal to it where the model is a chain: of parallel branches the chain
        pays for all that lie before the deepest chosen tensor.

        Args:
            candidates: Names to choose from; those that the loss does not depend on are left out.
            paid: Names that train in any case. What they need costs nothing more.
        """
        position = {name: index for index, name in enumerate(self.names)}
        wanted = {position[name] for name in candidates if name in position}
        trained = {position[name] for name in paid if name in position}
        weight = dict.fromkeys(sorted(wanted), 0)
        reach = dict.fromkeys(weight, 0)
        shared: list[tuple[frozenset[int], int]] = []
        for leaves, flops in self.items:
            behind = leaves & wanted
            if not behind or not trained.isdisjoint(leaves):
                continue
            if len(behind) == 1:
                weight[next(iter(behind))] += flops
                continue
            shared.append((behind, flops))
            for leaf in behind:
                reach[leaf] += flops
        order = sorted(weight, key=lambda leaf: (reach[leaf], leaf))
        rank = {leaf: place for place, leaf in enumerate(order)}
        steps = [0] * len(order)
        for behind, flops in shared:
            steps[min(rank[leaf] for leaf in behind)] += flops
        total, along = 0, []
        for flops in steps:
            total += flops
            along.append(total)
        names = tuple(self.names[leaf] for leaf in order)
        return LinearCost(names, tuple(weight[leaf] for leaf in order), tuple(along))


# ---------------------------------------------------------------------------------------------------- measuring


def measure_step(
    loss_of: Callable[[], Tensor], parameters: Mapping[str, nn.Parameter]
) -> tuple[StepCost, Tensor, dict[str, Tensor | None]]:
    """Run a forward and a backward pass and count what each part costs.

    ``grad`` of no parameter is touched, and hooks of parameters (DDP's among them) do not run.

    Args:
        loss_of: Runs the forward pass and returns the scalar loss.
        parameters: The tensors whose cost is wanted, by name, all with ``requires_grad``.

    Returns:
        The cost, the detached loss, and the gradient of each parameter (None where the loss does not depend on it).

    Raises:
        ConfigError: If the model uses reentrant activation checkpointing, which hides the graph, or if the loss
            depends on none of the parameters.
    """
    recorder = _Recorder(parameters)
    with recorder:
        loss = loss_of()
        recorder.read_graph(loss)
        inputs = [*parameters.values(), *recorder.other_leaves]
        with recorder.watching():
            gradients = torch.autograd.grad(loss, inputs, allow_unused=True)[: len(parameters)]
    names = tuple(name for index, name in enumerate(parameters) if recorder.everything >> index & 1)
    return recorder.cost(names), loss.detach(), dict(zip(parameters, gradients, strict=True))


def count_step_flops(loss_of: Callable[[], Tensor]) -> int:
    """Run a forward and a backward pass with the present ``requires_grad`` flags and return the FLOPs of both.

    ``grad`` of no parameter is touched.
    """
    recorder = _Recorder({})
    with recorder:
        loss = loss_of()
        leaves = [leaf for node in _topological(loss) if isinstance(leaf := getattr(node, "variable", None), Tensor)]
        torch.autograd.grad(loss, leaves, allow_unused=True)
    return recorder.forward_flops


def _topological(loss: Tensor) -> list[Node]:
    """All nodes behind ``loss``, each after the nodes that its edges lead to."""
    if loss.grad_fn is None:
        raise ConfigError("The loss depends on no parameter that requires a gradient.")
    done: dict[Node, None] = {}
    stack: list[tuple[Node, bool]] = [(loss.grad_fn, False)]
    while stack:
        node, expanded = stack.pop()
        if node in done:
            continue
        if expanded:
            done[node] = None
            continue
        if node.name().startswith("CheckpointFunction"):
            raise ConfigError(
                "Reentrant activation checkpointing hides the graph whose cost is to be measured. Give "
                "torch.utils.checkpoint (or transformers' gradient_checkpointing_kwargs) use_reentrant=False."
            )
        stack.append((node, True))
        stack.extend((following, False) for following, _ in node.next_functions if following is not None)
    return list(done)


@dataclass
class _Frame:
    """What happened in one node so far."""

    flops: list[int] = field(default_factory=list)
    feeds: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    alive: list[Tensor] = field(default_factory=list)


class _Recorder(TorchDispatchMode):
    """Count FLOPs of a forward pass, then those of each edge of its graph.

    Within a node the flow of data is followed from operation to operation by storage, so that each counted operation
    is known to feed some of the gradients that the node returns. Sets of leaves are integers, one bit per parameter,
    and one more bit for inputs that require a gradient themselves.
    """

    supports_higher_order_operators = True

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        positions = {id(parameter): index for index, parameter in enumerate(parameters.values())}
        self.forward_flops = 0
        self.other_leaves: list[Tensor] = []
        self.everything = 0
        self._positions = positions
        self._other = 1 << len(positions)
        self._storages = {_storage(parameter): index for index, parameter in enumerate(parameters.values())}
        self._nodes: dict[Node, int] = {}
        self._leaves: list[int] = []
        self._edges: list[list[int]] = []
        self._frames: dict[int, _Frame] = {}
        self._recomputed: dict[int, list[int]] = {}
        self._items: dict[int, int] = defaultdict(int)
        self._in_backward = False

    def read_graph(self, loss: Tensor) -> None:
        """Find the leaves behind every edge."""
        for node in _topological(loss):
            variable = getattr(node, "variable", None)
            edges = [
                0 if following is None else self._leaves[self._nodes[following]] for following, _ in node.next_functions
            ]
            leaves = 0
            if isinstance(variable, Tensor):
                index = self._positions.get(id(variable))
                leaves = self._other if index is None else 1 << index
                if index is None:
                    self.other_leaves.append(variable)
            for edge in edges:
                leaves |= edge
            self._nodes[node] = len(self._leaves)
            self._leaves.append(leaves)
            self._edges.append(edges)
        self.everything = self._leaves[-1]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Assign what is counted from now on to the nodes of the graph."""
        handles = [
            node.register_hook(self._finish(index))
            for node, index in self._nodes.items()
            if node.next_functions and not _is_custom(node)
        ]
        self._in_backward = True
        try:
            yield
        finally:
            self._in_backward = False
            for handle in handles:
                handle.remove()
            self._nodes.clear()

    def cost(self, names: tuple[str, ...]) -> StepCost:
        """The counts, over the parameters that the loss depends on."""
        for leaves, flops in self._recomputed.values():
            self._items[leaves] += flops
        self._recomputed = {}
        present = [index for index in range(len(self._positions)) if self.everything >> index & 1]
        items, fixed = [], 0
        for leaves, flops in self._items.items():
            if leaves & self._other:
                fixed += flops
            else:
                members = frozenset(place for place, index in enumerate(present) if leaves >> index & 1)
                items.append((members, flops))
        return StepCost(names, self.forward_flops, tuple(items), fixed)

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = getattr(func, "_overloadpacket", func)
        if packet not in _FORMULAS and isinstance(func, torch._ops.OpOverload):
            with self:
                decomposed = func.decompose(*args, **kwargs)
            if decomposed is not NotImplemented:
                return decomposed
        out = func(*args, **kwargs)
        if not self._in_backward:
            self.forward_flops += self._count(packet, args, kwargs, out)
            return out
        node = torch._C._current_autograd_node()
        index = self._nodes.get(node) if node is not None else None
        if index is None:
            self._charge(self.everything, self._count(packet, args, kwargs, out))
        elif torch.is_grad_enabled():
            self._recompute(index, self._count(packet, args, kwargs, out), args, kwargs)
        elif _is_custom(node):
            self._charge(self._leaves[index], self._count(packet, args, kwargs, out))
        else:
            self._follow(self._frames.setdefault(index, _Frame()), packet, args, kwargs, out)
        return out

    def _count(self, packet: Any, args: Any, kwargs: Any, out: Any) -> int:
        formula = _FORMULAS.get(packet)
        return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))

    def _charge(self, leaves: int, flops: int) -> None:
        if flops:
            self._items[leaves] += flops

    def _recompute(self, index: int, flops: int, args: Any, kwargs: Any) -> None:
        """A forward pass inside back-propagation (activation checkpointing): due if anything of the segment trains."""
        entry = self._recomputed.setdefault(index, [self._leaves[index], 0])
        entry[1] += flops
        for tensor in _tensors((args, kwargs)):
            position = self._storages.get(_storage(tensor))
            if position is not None:
                entry[0] |= 1 << position

    def _follow(self, frame: _Frame, packet: Any, args: Any, kwargs: Any, out: Any) -> None:
        sources: set[int] = set()
        for tensor in _tensors((args, kwargs)):
            sources |= frame.feeds.get(_storage(tensor), set())
        outputs = out if isinstance(out, (tuple, list)) else (out,)
        if packet is _aten.convolution_backward:
            counts = self._count_convolution(args, kwargs, out)
        else:
            counts = [self._count(packet, args, kwargs, out)]
        own: list[set[int]] = []
        for flops in counts:
            own.append({len(frame.flops)} if flops else set())
            if flops:
                frame.flops.append(flops)
        for place, output in enumerate(outputs):
            for tensor in _tensors(output):
                frame.feeds[_storage(tensor)] |= sources | own[min(place, len(own) - 1)]
                frame.alive.append(tensor)

    def _count_convolution(self, args: Any, kwargs: Any, out: Any) -> list[int]:
        """One operation, three gradients: count input, weight and bias apart."""
        *rest, mask = args
        apart = [[place == wanted and bool(mask[place]) for place in range(3)] for wanted in range(3)]
        return [self._count(_aten.convolution_backward, (*rest, only), kwargs, out) for only in apart]

    def _finish(self, index: int) -> Callable[[Any, Any], None]:
        def hook(grad_inputs: Sequence[Tensor | None], grad_outputs: Sequence[Tensor | None]) -> None:
            frame = self._frames.pop(index, None)
            if frame is None:
                return
            leaves = [0] * len(frame.flops)
            for edge, gradient in zip(self._edges[index], grad_inputs, strict=False):
                if gradient is not None:
                    for operation in frame.feeds.get(_storage(gradient), ()):
                        leaves[operation] |= edge
            for behind, flops in zip(leaves, frame.flops, strict=True):
                self._charge(behind or self._leaves[index], flops)

        return hook


def _is_custom(node: Node) -> bool:
    """Whether the node runs a user's ``torch.autograd.Function``, which may do all its work for any gradient."""
    return isinstance(node, torch.autograd.function.BackwardCFunction)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse and opaque tensors
        return id(tensor)
