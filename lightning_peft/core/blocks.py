"""Find the block stack(s), embeddings, head and norms of any model by its structure.

A *stack* is a container that repeats composite modules of one class: the decoder layers of a Llama, the encoder and
the decoder layers of a T5, the residual blocks of a CNN. No architecture is listed by name:

1. Walk the model from the root. A container whose children repeat a class of composite modules (modules with at least
   two parameter-holding parts) is a stack, and what lies inside its blocks is not searched again. A ``ModuleList``
   counts whole if it has at most half as many classes as children (hybrid attention/Mamba stacks); of a
   ``Sequential`` only the repeated classes are blocks, so that a stem or a head in the same ``Sequential`` stays out.
2. A pyramid (blocks of different shapes that each hold most of their weights in an inner stack: the stages of a Swin
   or a ConvNeXt) is replaced by its inner stacks. What else a stage has, such as a layer that halves the resolution,
   belongs to its first block if it is registered before, to its last block if after. Lists of experts are never a
   stack.
3. Stacks with less than one per cent of the largest stack's parameters are not stacks but small heads.
4. A model without any such stack may have a ``ModuleList`` of a single composite block (a one-layer model, or ALBERT's
   shared layer group): that is the stack then.
5. A model without either (a plain MLP or CNN) is cut into its parameter-holding layers: each layer but the
   last is a block, together with the norms that follow it; the last layer is the head.

A block that is used several times (shared weights) counts once. Tied parameters belong to every role of every name
they have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from torch import nn

from lightning_peft.core.names import named_modules, named_parameters, parameter_aliases, unwrap

__all__ = ["ROLES", "Block", "Structure", "find_structure", "is_norm"]

ROLES = ("blocks", "embeddings", "head", "norms", "biases", "adapters", "all")
"""Names of the roles a scope may use."""

_SMALL_STACK_FRACTION = 0.01
_EMBEDDING_HINTS = ("embed", "pos", "cls", "token", "prompt")


@dataclass(frozen=True)
class Block:
    """One block of a stack.

    Args:
        name: Clean module path from the root, such as ``"model.layers.3"``.
        stack: Path of the container the block lies in.
        parameters: Clean canonical names of the block's parameters, in registration order. Beside what lies below
            ``name``: norms that follow a layer of a plain model, and what lies beside the blocks of a pyramid's stage.
    """

    name: str
    stack: str
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class Structure:
    """What :func:`find_structure` found in a model.

    Args:
        blocks: All blocks of all stacks, in registration order.
        roles: Role name -> canonical parameter names, in registration order. ``embeddings`` and ``head`` hold only
            parameters outside the blocks; ``norms``, ``biases`` and ``adapters`` reach into them.
        parameters: Canonical name -> parameter of the whole model.
        aliases: Every name of every parameter -> its canonical name.
        modules: Clean path -> unwrapped module.
    """

    blocks: tuple[Block, ...]
    roles: dict[str, tuple[str, ...]]
    parameters: dict[str, nn.Parameter] = field(repr=False)
    aliases: dict[str, str] = field(repr=False)
    modules: dict[str, nn.Module] = field(repr=False)

    @property
    def stacks(self) -> tuple[str, ...]:
        """Paths of the stacks' containers, in registration order."""
        return tuple(dict.fromkeys(block.stack for block in self.blocks))

    def outside_blocks(self) -> Structure:
        """The same model with every role but ``adapters`` cut down to what lies outside the blocks.

        Norms of the embeddings (BERT's) are embeddings here and not norms: whoever leaves the embeddings out means to
        end back-propagation above them.
        """
        inside = set(self.roles["blocks"])
        roles = {role: tuple(name for name in names if name not in inside) for role, names in self.roles.items()}
        roles["adapters"] = self.roles["adapters"]
        roles["norms"] = tuple(name for name in roles["norms"] if name not in self.roles["embeddings"])
        return replace(self, roles=roles)

    def block_of(self) -> dict[str, Block]:
        """Map each parameter name that lies in a block to its block."""
        return {name: block for block in self.blocks for name in block.parameters}


def is_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a normalisation layer: "norm" in its class name and no parameter above one dimension."""
    direct = list(module.parameters(recurse=False))
    named = "norm" in type(module).__name__.lower()
    return named and all(parameter.ndim <= 1 for parameter in direct) and not list(module.children())


def find_structure(root: nn.Module) -> Structure:
    """Find blocks and roles of ``root``.

    Args:
        root: Any module, wrapped or not.

    Returns:
        The structure. ``blocks`` is empty if the model has fewer than two layers.
    """
    modules = dict(named_modules(root))
    parameters = named_parameters(root)
    aliases = parameter_aliases(root)
    stacks = _find_stacks(unwrap(root), "") or _find_stacks(unwrap(root), "", lone=True)
    largest = max((stack.num_parameters for stack in stacks), default=0)
    stacks = [stack for stack in stacks if stack.num_parameters >= _SMALL_STACK_FRACTION * largest]
    if stacks:
        members = [(stack.path, name, stack.paths_of(name)) for stack in stacks for name, _ in stack.blocks]
    else:
        members = _plain_layers(modules)
    by_module = _parameters_by_module(aliases)
    blocks, taken = [], set()
    for stack, name, paths in members:
        inside = dict.fromkeys(n for path in paths for n in _under(by_module, path))
        own = tuple(n for n in inside if n not in taken)
        taken.update(own)
        if own:
            blocks.append(Block(name, stack, own))
    everywhere = dict(named_modules(root, remove_duplicate=False))
    owner = {alias: everywhere[path] for alias in aliases if (path := alias.rpartition(".")[0]) in everywhere}
    roles = _find_roles(modules, parameters, aliases, owner, blocks, taken)
    return Structure(tuple(blocks), roles, parameters, aliases, modules)


@dataclass
class _Stack:
    """A container's path, its blocks, and paths beside them in a pyramid's stage that go with the first and last."""

    path: str
    blocks: list[tuple[str, nn.Module]]
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()

    @property
    def num_parameters(self) -> int:
        return _num_parameters(block for _, block in self.blocks)

    def paths_of(self, name: str) -> tuple[str, ...]:
        """Module paths whose parameters are those of the block called ``name``."""
        before = self.before if name == self.blocks[0][0] else ()
        return (*before, name, *(self.after if name == self.blocks[-1][0] else ()))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _children(module: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
    """The unwrapped children of ``module`` that hold parameters, with their clean paths, each module once."""
    seen: dict[int, tuple[str, nn.Module]] = {}
    for name, child in module.named_children():
        inner = unwrap(child)
        if any(True for _ in inner.parameters()):
            seen.setdefault(id(inner), (_join(path, name), inner))
    return list(seen.values())


def _is_composite(module: nn.Module) -> bool:
    holders = (part for part in module.modules() if any(True for _ in part.parameters(recurse=False)))
    return sum(1 for _ in zip(holders, range(2), strict=False)) == 2


def _block_children(container: nn.Module, path: str, lone: bool) -> list[tuple[str, nn.Module]]:
    if "expert" in path.rsplit(".", 1)[-1].lower():
        return []
    numbered = isinstance(container, (nn.ModuleList, nn.Sequential)) or (
        len(container._modules) > 1 and all(name.isdigit() for name in container._modules)
    )
    if not numbered:
        return []
    children = [(name, child) for name, child in _children(container, path) if _is_composite(child)]
    classes = Counter(type(child) for _, child in children)
    if isinstance(container, nn.Sequential):
        return [(name, child) for name, child in children if classes[type(child)] >= 2]
    if len(children) == 1 and len({id(child) for child in container.children()}) == 1:
        return children if lone or len(container._modules) >= 2 else []  # one block, used once or several times
    return children if len(children) >= 2 and len(classes) <= len(children) / 2 else []


def _find_stacks(module: nn.Module, path: str, lone: bool = False, in_stage: bool = False) -> list[_Stack]:
    """Find the stacks at or below ``module``: of a single block too if ``lone``, no pyramid again if ``in_stage``."""
    blocks = _block_children(module, path, lone)
    if blocks:
        return (None if in_stage else _inner_stacks(blocks)) or [_Stack(path, blocks)]
    return [stack for name, child in _children(module, path) for stack in _find_stacks(child, name, lone, in_stage)]


def _inner_stacks(blocks: list[tuple[str, nn.Module]]) -> list[_Stack]:
    """The stacks inside the blocks of a pyramid; empty if the blocks are not stages of one."""
    shapes = {tuple(sorted(tuple(p.shape) for p in child.parameters())) for _, child in blocks}
    if len(shapes) == 1:
        return []
    found: list[_Stack] = []
    for name, stage in blocks:
        inside: list[_Stack] = []
        waiting: list[str] = []
        for part, sub in _children(stage, name):
            stacks = _find_stacks(sub, part, in_stage=True)
            if stacks:
                stacks[0].before = tuple(waiting)
                waiting = []
                inside += stacks
            else:
                waiting.append(part)
        if sum(stack.num_parameters for stack in inside) <= 0.5 * _num_parameters([stage]):
            return []
        inside[-1].after = tuple(waiting)
        found += inside
    return found


def _num_parameters(modules: Iterable[nn.Module]) -> int:
    return sum({id(p): p.numel() for module in modules for p in module.parameters()}.values())


def _plain_layers(modules: dict[str, nn.Module]) -> list[tuple[str, str, tuple[str, ...]]]:
    """Cut a model without a stack into layers: ``(stack, block name, module paths)``, the last layer left out."""
    layers: list[list[str]] = []
    for path, module in modules.items():
        if not any(True for _ in module.parameters(recurse=False)) or isinstance(module, nn.Embedding) or not path:
            continue
        if is_norm(module) and layers:
            layers[-1].append(path)
        elif not is_norm(module) and not any(path.startswith(f"{p}.") for layer in layers for p in layer):
            layers.append([path])
    if len(layers) < 2:
        return []
    return [("", layer[0], tuple(layer)) for layer in layers[:-1]]


def _parameters_by_module(aliases: dict[str, str]) -> dict[str, list[tuple[str, str]]]:
    """Module path -> ``(alias, canonical)`` of all parameters at or below it."""
    table: dict[str, list[tuple[str, str]]] = {}
    for alias, canonical in aliases.items():
        parts = alias.split(".")
        for depth in range(len(parts)):
            table.setdefault(".".join(parts[:depth]), []).append((alias, canonical))
    return table


def _under(table: dict[str, list[tuple[str, str]]], path: str) -> list[str]:
    return [canonical for _, canonical in table.get(path, [])]


def _find_roles(
    modules: dict[str, nn.Module],
    parameters: dict[str, nn.Parameter],
    aliases: dict[str, str],
    owner: dict[str, nn.Module],
    blocks: list[Block],
    in_blocks: set[str],
) -> dict[str, tuple[str, ...]]:
    norms = {aliases[alias] for alias, module in owner.items() if is_norm(module)}
    biases = {canonical for alias, canonical in aliases.items() if _is_bias(alias.rpartition(".")[2])}
    adapters = _adapter_names(modules, aliases)
    before = _modules_before_blocks(modules, blocks)
    embeddings: set[str] = set()
    for alias, canonical in aliases.items():
        path, _, leaf = alias.rpartition(".")
        early = any(path == early or path.startswith(f"{early}.") for early in before)
        direct = path in _ancestors(blocks) and any(hint in leaf.lower() for hint in _EMBEDDING_HINTS)
        if isinstance(owner.get(alias), nn.Embedding) or early or direct:
            embeddings.add(canonical)
    # A name of a tied weight may be outside the blocks although its first name is inside.
    block_paths = tuple(f"{block.name}." for block in blocks)
    outside = {c for a, c in aliases.items() if c not in in_blocks or not a.startswith(block_paths)} - in_blocks
    embeddings &= outside
    head = {
        aliases[alias]
        for alias in aliases
        if aliases[alias] in outside
        and aliases[alias] not in norms
        and (aliases[alias] not in embeddings or _is_tied_output(alias, aliases, owner))
    }
    found = {
        "blocks": in_blocks,
        "embeddings": embeddings,
        "head": head,
        "norms": norms,
        "biases": biases,
        "adapters": adapters,
        "all": set(parameters),
    }
    return {role: tuple(name for name in parameters if name in found[role]) for role in ROLES}


def _is_bias(leaf: str) -> bool:
    return leaf == "bias" or leaf.endswith("_bias") or leaf.startswith("bias_")


def _is_tied_output(alias: str, aliases: dict[str, str], owner: dict[str, nn.Module]) -> bool:
    """Whether ``alias`` is a second name of a tied weight, held by something else than an embedding (a head)."""
    return alias != aliases[alias] and not isinstance(owner.get(alias), nn.Embedding)


def _adapter_names(modules: dict[str, nn.Module], aliases: dict[str, str]) -> set[str]:
    """Parameters of layers that ``peft`` injected, told by peft's own list of adapter attributes on each layer."""
    prefixes: list[str] = []
    for path, module in modules.items():
        attributes = getattr(module, "adapter_layer_names", None)
        if attributes and any(base.__name__ == "BaseTunerLayer" for base in type(module).__mro__):
            prefixes += [_join(path, attribute) for attribute in attributes]
        elif type(module).__name__ == "PromptEncoder" or path.rpartition(".")[2] == "prompt_encoder":
            prefixes.append(path)
    return {
        canonical
        for alias, canonical in aliases.items()
        if any(alias == prefix or alias.startswith(f"{prefix}.") for prefix in prefixes)
    }


def _ancestors(blocks: list[Block]) -> set[str]:
    """Paths of all modules that contain a block, the root included."""
    found = {""}
    for block in blocks:
        parts = block.name.split(".")
        found.update(".".join(parts[:depth]) for depth in range(1, len(parts)))
    return found


def _modules_before_blocks(modules: dict[str, nn.Module], blocks: list[Block]) -> list[str]:
    """Paths of modules that are registered before a stack, beside it or beside one of its ancestors, and hold none."""
    if not blocks or (blocks[0].stack == "" and len({b.name.count(".") for b in blocks}) != 1):
        return []
    ancestors = _ancestors(blocks)
    names = {block.name for block in blocks}
    before: list[str] = []
    for ancestor in ancestors:
        if ancestor not in modules:
            continue
        waiting: list[str] = []
        for name, _ in modules[ancestor].named_children():
            path = _join(ancestor, name)
            if path in ancestors or path in names:
                before += waiting
                waiting = []
            else:
                waiting.append(path)
    return before
