"""Share the matrix multiplications of a model among processes, by the plan that it brings or that the user gives."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from lightning_peft.core.names import clean_name
from lightning_peft.errors import ConfigError, UnsupportedStrategy, suggest

__all__ = ["STYLES", "apply_tensor_parallel", "clip_grad_norm"]

STYLES = ("colwise", "rowwise", "colwise_gather_output", "embedding_rowwise")
"""What a plan may say of a linear layer or an embedding.

``colwise`` splits the outputs and ``rowwise`` the inputs, and one follows the other; ``colwise_gather_output`` (a head)
and ``embedding_rowwise`` stand alone.
"""

_ALIASES = {"colwise_rep": "colwise_gather_output", "embedding": "embedding_rowwise"}
_ALONE = ("colwise_gather_output", "embedding_rowwise")


def apply_tensor_parallel(model: nn.Module, mesh: DeviceMesh, plan: Mapping[str, str] | None) -> dict[str, str]:
    """Split the layers that the plan names over ``mesh``, in place.

    Heads and embeddings that share a weight, or whose size does not divide, stay whole on each process.

    Args:
        model: A model that every process of the mesh holds whole.
        mesh: A mesh of one dimension.
        plan: Glob of module paths -> style; None takes the plan of the Hugging Face model in it.

    Returns:
        Clean path of each layer that was split -> style.

    Raises:
        ConfigError: There is no plan, it names nothing, or sizes do not divide.
        UnsupportedStrategy: The plan asks for something else than :data:`STYLES`, or of layers that cannot be split.
    """
    size = mesh.size()
    modules = {clean_name(path): module for path, module in model.named_modules() if path}
    chosen = _own_plan(model) if plan is None else _users_plan(modules, plan)
    unknown = sorted({style for style in chosen.values() if style not in STYLES})
    if unknown:
        raise UnsupportedStrategy(
            f"FSDP2Strategy: the tensor-parallel plan asks for {', '.join(map(repr, unknown))}; only "
            f"{', '.join(STYLES)} are supported. Give a tensor_parallel_plan of these, or use tensor_parallel_size=1."
        )
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    applied: dict[str, str] = {}
    problems: list[str] = []
    for path, style in chosen.items():
        layer = modules[path]
        if not isinstance(layer, nn.Embedding if style == "embedding_rowwise" else nn.Linear):
            raise UnsupportedStrategy(
                f"FSDP2Strategy: {path} is a {type(layer).__name__}, and tensor parallelism splits "
                "torch.nn.Linear and torch.nn.Embedding only (no adapters, no quantised layers)."
            )
        tied = uses[id(layer.weight)] > 1
        divides = layer.weight.shape[1 if style == "rowwise" else 0] % size == 0
        if style in _ALONE and (tied or not divides):
            continue
        if tied or not divides:
            what = "shares its weight" if tied else f"has weight {list(layer.weight.shape)}"
            problems.append(f"{path} ({style}) {what}")
            continue
        applied[path] = style
    problems += _uneven_heads(model, size)
    if problems:
        more = f", ... ({len(problems)} in all)" if len(problems) > 3 else ""
        raise ConfigError(
            f"FSDP2Strategy: tensor_parallel_size={size} cannot split {'; '.join(problems[:3])}{more}. "
            "Choose a size that divides heads and widths."
        )
    for path, style in applied.items():
        parallelize_module(modules[path], mesh, _style(style), src_data_rank=None)
    return applied


def _style(name: str) -> ParallelStyle:
    if name == "colwise":
        return ColwiseParallel()
    if name == "rowwise":
        return RowwiseParallel()
    if name == "colwise_gather_output":
        return ColwiseParallel(output_layouts=Replicate())
    return RowwiseParallel(input_layouts=Replicate())


def _own_plan(model: nn.Module) -> dict[str, str]:
    """The plans of the outermost Hugging Face models in ``model``, by whole paths."""
    found: dict[str, str] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        plan: dict[str, str] | None = getattr(module, "_tp_plan", None)
        if id(module) in seen or not plan:
            continue
        seen.update(id(part) for part in module.modules())
        inside = {clean_name(name): part for name, part in module.named_modules() if name}
        prefix = f"{clean_name(path)}." if path else ""
        for pattern, style in plan.items():
            found.update((prefix + name, _ALIASES.get(style, style)) for name in inside if _matches(name, pattern))
    if not any(style in ("colwise", "rowwise") for style in found.values()):
        raise ConfigError(
            "FSDP2Strategy: tensor_parallel_size > 1, but the model brings no tensor-parallel plan. Give "
            "tensor_parallel_plan={module glob: style}, or use tensor_parallel_size=1."
        )
    return found


def _users_plan(modules: Mapping[str, nn.Module], plan: Mapping[str, str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for pattern, style in plan.items():
        if style not in STYLES:
            raise ConfigError(
                f"FSDP2Strategy: tensor_parallel_plan: {style!r} of {pattern!r} is no style. {suggest(style, STYLES)}"
            )
        matches = [path for path in modules if _matches(path, pattern)]
        if not matches:
            raise ConfigError(
                f"FSDP2Strategy: tensor_parallel_plan: {pattern!r} matches no module. {suggest(pattern, modules)}"
            )
        found.update((path, style) for path in matches)
    return found


def _matches(path: str, pattern: str) -> bool:
    """Whether ``path`` fits ``pattern``, a star standing for anything but a dot."""
    parts, wanted = path.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))


def _uneven_heads(model: nn.Module, size: int) -> list[str]:
    found: set[str] = set()
    for module in model.modules():
        config = getattr(module, "config", None)
        for key in ("num_attention_heads", "num_key_value_heads"):
            number: Any = getattr(config, key, None)
            if isinstance(number, int) and number % size:
                found.add(f"{number} {key}")
    return sorted(found)


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale gradients down to a total norm of ``max_norm`` where some are split over more processes than others.

    Returns:
        The total norm before.
    """
    meshes: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            mesh = parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None
            meshes.setdefault(mesh, []).append(parameter)
    norms = []
    for members in meshes.values():
        norm = torch.nn.utils.get_total_norm([p.grad for p in members if p.grad is not None])
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    total = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
    for members in meshes.values():
        torch.nn.utils.clip_grads_with_norm_(members, max_norm, total)
    return total
