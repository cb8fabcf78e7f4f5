"""PEQA: weights as frozen integers, of which only the scales are trained.

Kim et al. 2023, arXiv:2305.14152. Shapes: O outputs, I inputs, G groups of inputs with a scale of their own, K inputs
per group (``I = G * K``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from typing_extensions import override

from lightning_peft.core.bits import pack, unpack
from lightning_peft.core.blocks import Structure, find_structure
from lightning_peft.core.draw import Draw
from lightning_peft.core.names import named_modules
from lightning_peft.core.quantized import is_quantized
from lightning_peft.core.scope import Scope, match_names, resolve_scope
from lightning_peft.errors import BaseMismatch, ConfigError, ScopeError, suggest
from lightning_peft.methods.arguments import is_whole
from lightning_peft.methods.base import MethodCallback
from lightning_peft.methods.build import when_built

__all__ = ["PEQA", "IntegerLinear", "get_scales", "integer_layers", "round_to_nearest", "set_scales", "to_plain"]

Fit = Literal["error", "range"]
_SHRINKS = 50  # ranges tried, from the whole one down to half of it


def round_to_nearest(
    weight_OI: torch.Tensor, bits: int, group_size: int | None = None, fit: Fit = "error"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantise a weight to integers with a scale and a zero point per group of inputs of each output.

    ``W`` becomes ``s * (clamp(round(W / s) + z, 0, 2**bits - 1) - z)``.

    Args:
        weight_OI: The weight.
        bits: From 1 to 8.
        group_size: Inputs per group; None is all inputs of an output.
        fit: ``"range"``: the scale spans the group from its least to its largest value (zero included).
            ``"error"``: of 50 ranges from that one down to half of it, the one with the least squared error.

    Returns:
        Codes (O, I) and zero points (O, G) as ``uint8``, scales (O, G) as ``float32``.
    """
    num_out, num_in = weight_OI.shape
    weight_OGK = weight_OI.detach().float().reshape(num_out, -1, group_size or num_in)
    top = 2**bits - 1
    low = weight_OGK.amin(-1, keepdim=True).clamp(max=0)
    high = weight_OGK.amax(-1, keepdim=True).clamp(min=0)
    best: tuple[torch.Tensor, ...] | None = None
    for step in range(_SHRINKS if fit == "error" else 1):
        shrink = 1 - 0.5 * step / (_SHRINKS - 1)
        scale = ((high - low) * shrink / top).clamp(min=torch.finfo(torch.float32).tiny)
        zero = (-low * shrink / scale).round().clamp(0, top)
        codes = (weight_OGK / scale).round().add(zero).clamp(0, top)
        error = (scale * (codes - zero) - weight_OGK).square().sum(-1, keepdim=True)
        if best is None:
            best = (codes, scale, zero, error)
        else:
            better = error < best[3]
            best = tuple(
                torch.where(better, new, old) for new, old in zip((codes, scale, zero, error), best, strict=True)
            )
    assert best is not None
    codes, scale, zero, _ = best
    return codes.to(torch.uint8).reshape(num_out, num_in), scale[..., 0], zero[..., 0].to(torch.uint8)


class IntegerLinear(nn.Module):
    """A linear layer with packed integers as its weight and one trainable tensor of scales.

    Args:
        linear: The layer it stands for; its bias stays the same parameter.
        bits: Per weight, from 1 to 8.
        group_size: Inputs that share a scale; None is all of an output.
        fit: See :func:`round_to_nearest`.
    """

    codes: torch.Tensor
    zeros: torch.Tensor

    def __init__(self, linear: nn.Linear, bits: int, group_size: int | None, fit: Fit) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bits = bits
        codes_OI, scales_OG, zeros_OG = round_to_nearest(linear.weight, bits, group_size, fit)
        self.register_buffer("codes", pack(codes_OI, bits))
        self.register_buffer("zeros", zeros_OG)
        self.scales = nn.Parameter(scales_OG)
        self.bias = linear.bias
        self.train(linear.training)

    def integers(self) -> torch.Tensor:
        """Return codes minus zero points (O, G, K), as ``int16``."""
        codes = unpack(self.codes, self.bits, self.out_features * self.in_features)
        codes_OGK = codes.reshape(self.out_features, self.scales.shape[1], -1)
        return codes_OGK.to(torch.int16) - self.zeros[..., None].to(torch.int16)

    @property
    def weight(self) -> torch.Tensor:
        """The weight (O, I) that the layer computes with now, without gradient."""
        weight_OGK = self.scales.detach()[..., None] * self.integers()
        return weight_OGK.reshape(self.out_features, self.in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x @ W.T + b``."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        y: torch.Tensor = _TimesIntegers.apply(x.to(dtype), self.scales, self)  # pyright: ignore[reportAssignmentType]
        return y if self.bias is None else y + self.bias.to(dtype)

    def extra_repr(self) -> str:
        """Shapes and bits."""
        groups = self.scales.shape[1]
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, groups={groups}"


class _TimesIntegers(torch.autograd.Function):
    """``x @ (s * q).T``; the backward pass dequantises again, so that no floating-point weight is kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scales_OG: torch.Tensor, layer: IntegerLinear) -> torch.Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x if scales_OG.requires_grad else None, scales_OG)
        return nn.functional.linear(x, _weight(layer, scales_OG, x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        (grad,) = grads
        x, scales_OG = ctx.saved_tensors
        grad_x = grad @ _weight(ctx.layer, scales_OG, grad.dtype) if ctx.needs_input_grad[0] else None
        grad_scales = None
        if ctx.needs_input_grad[1]:
            grad_OI = grad.flatten(0, -2).T.float() @ x.flatten(0, -2).float()
            integers_OGK = ctx.layer.integers()
            grad_scales = (grad_OI.reshape(integers_OGK.shape) * integers_OGK).sum(-1).to(scales_OG.dtype)
        return grad_x, grad_scales, None


def _weight(layer: IntegerLinear, scales_OG: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    weight_OGK = scales_OG[..., None] * layer.integers()
    return weight_OGK.reshape(layer.out_features, layer.in_features).to(dtype)


def integer_layers(root: nn.Module) -> Iterator[tuple[str, IntegerLinear]]:
    """Yield clean path and module of every :class:`IntegerLinear` below ``root``."""
    for path, module in named_modules(root):
        if isinstance(module, IntegerLinear):
            yield path, module


def get_scales(root: nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of all scales by parameter name: all that a task adds to the integers."""
    return {f"{path}.scales": layer.scales.detach().clone() for path, layer in integer_layers(root)}


@torch.no_grad()
def set_scales(root: nn.Module, scales: Mapping[str, torch.Tensor]) -> None:
    """Switch to another task: put ``scales``, from :func:`get_scales`, in the place of the present ones.

    Raises:
        BaseMismatch: If names or shapes are not those of ``root``; nothing is changed then.
    """
    present = {f"{path}.scales": layer.scales for path, layer in integer_layers(root)}
    apart = sorted(present.keys() ^ scales.keys())
    wrong = [name for name in present.keys() & scales.keys() if present[name].shape != scales[name].shape]
    if apart or wrong:
        raise BaseMismatch(
            f"These scales belong to another model: {len(apart)} name(s) are on one side only and {len(wrong)} of "
            f"another shape, {(apart or wrong)[0]} for one."
        )
    for name, parameter in present.items():
        parameter.copy_(scales[name])


def to_plain(root: nn.Module, dtype: torch.dtype = torch.float32) -> list[str]:
    """Put a plain ``torch.nn.Linear`` in the place of every :class:`IntegerLinear`; return their paths."""
    layers = {id(layer): (path, layer) for path, layer in integer_layers(root)}
    for module in list(root.modules()):
        for name, child in module._modules.items():
            if id(child) in layers:
                _, layer = layers[id(child)]
                plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
                plain.weight = nn.Parameter(layer.weight.to(dtype))
                plain.bias = layer.bias
                module._modules[name] = plain.train(layer.training)
    return [path for path, _ in layers.values()]


class PEQA(MethodCallback):
    """Turn weights into integers of few bits and train nothing but their scales (quantisation-aware adaptation).

    A weight takes ``bits`` bits plus ``40 / group_size`` for scale and zero point, packed; one scale per output (or
    group) has a gradient and optimizer state, about 0.03 % of a 7 B model's parameters. A step unpacks and dequantises
    each weight twice and computes the gradient of each whole matrix, one at a time, to sum it up.

    Use it where the model will be served in few bits anyway: unlike adapters beside a quantised base, what was trained
    stays in the quantised form, and tasks are switched by exchanging scales (:func:`set_scales`).

    Args:
        bits: Per weight, from 1 to 8; the paper uses 3 and 4.
        group_size: Inputs that share a scale: smaller is closer to the model and trains more. None: one per output.
        fit: How scales and zero points start: ``"error"`` finds the least squared error, as in the paper;
            ``"range"`` spans the values, faster.
        scope: Which linear layers: roles, paths, patterns.
        skip: Which of them to leave in floating point, and frozen.
        always: What trains beside the scales.
        seed: Unused by the rule, which draws nothing.

    Raises:
        ConfigError: If a number is out of range. From the fit, if a layer's inputs are no multiple of ``group_size``.
        ScopeError: From the fit, if ``scope`` without ``skip`` holds no linear layer.

    Example:
        >>> from lightning_peft import PEQA
        >>> PEQA(bits=4, group_size=64).describe()["settings"]["fit"]
        'error'

    Paper:
        J. Kim, J. H. Lee, S. Kim, J. Park, K. M. Yoo, S. J. Kwon, D. Lee: Memory-Efficient Fine-Tuning of Compressed
        Large Language Models via sub-4-bit Integer Quantization, NeurIPS 2023, arXiv:2305.14152, Equations 1 and 2.

    Differs from the paper:
        The paper does not say how it minimises the error of the initial scales; here 50 ranges are tried per group.
    """

    def __init__(
        self,
        bits: int = 4,
        group_size: int | None = None,
        fit: Fit = "error",
        scope: str | list[str] = "blocks",
        skip: str | list[str] = (),  # pyright: ignore[reportArgumentType]
        always: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        super().__init__(scope=scope, always=always, redraw="never", state="keep", seed=seed)
        if not is_whole(bits, 1) or bits > 8:
            raise ConfigError(f"bits={bits!r}: a whole number from 1 to 8.")
        if group_size is not None and not is_whole(group_size, 1):
            raise ConfigError(f"group_size={group_size!r}: None, or a whole number from 1 on.")
        if fit not in ("error", "range"):
            raise ConfigError(f"fit={fit!r} is unknown. {suggest(str(fit), ('error', 'range'))}")
        self.bits = int(bits)
        self.group_size = None if group_size is None else int(group_size)
        self.fit: Fit = fit
        self.skip = [skip] if isinstance(skip, str) else list(skip)

    def select(self, draw: Draw) -> list[str]:
        """All scales."""
        return list(self.units)

    @override
    def resolve(self, structure: Structure) -> Scope:
        """The scales of all integer layers."""
        names = [f"{path}.scales" for path, layer in structure.modules.items() if isinstance(layer, IntegerLinear)]
        return Scope(tuple(names), frozenset(names))

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        when_built(pl_module, lambda: self.convert(pl_module))

    def convert(self, root: nn.Module) -> list[str]:
        """Turn the linear layers in scope below ``root`` into integer layers; done once, a second call does nothing.

        Returns:
            Paths of the layers converted now.
        """
        if any(True for _ in integer_layers(root)):
            return []
        structure = find_structure(root)
        names = set(resolve_scope(self.scope, structure).names)
        for entry in self.skip:
            matched = match_names(entry, structure)
            if not matched and entry not in structure.roles:
                raise ScopeError(f"skip={entry!r} matches no parameter. {suggest(entry, [*structure.aliases])}")
            names.difference_update(matched)
        uses: dict[str, int] = {}
        for canonical in structure.aliases.values():
            uses[canonical] = uses.get(canonical, 0) + 1
        layers: dict[str, nn.Linear] = {
            path: module
            for path, module in structure.modules.items()
            if type(module) is nn.Linear
            and (name := f"{path}.weight") in names
            and uses[name] == 1
            and not is_quantized(module.weight)
        }
        if not layers:
            raise ScopeError(f"{self.label}: no torch.nn.Linear is left in scope without skip={self.skip!r}.")
        size = self.group_size
        odd = [path for path, layer in layers.items() if size is not None and layer.in_features % size]
        if odd:
            raise ConfigError(
                f"group_size={size} does not divide the inputs of {len(odd)} layer(s), {odd[0]} for one with "
                f"{layers[odd[0]].in_features}. Name them in skip, or choose a size that divides them."
            )
        for module in list(root.modules()):
            for name, child in module._modules.items():
                path = next((path for path, layer in layers.items() if layer is child), None)
                if path is not None:
                    module._modules[name] = IntegerLinear(layers[path], self.bits, size, self.fit)
        return list(layers)
