"""Three-factor low rank: ``B · R · A`` beside a frozen weight, in one layer for every paper of the family.

Shapes: A (r, in), R (r, r) or a diagonal (r,), B (out, r). Methods differ in where the factors come from, which of
them train, and whether the product they start with is subtracted, so that the model starts as its base: the residual
weight ``W - B0 R0 A0`` of the papers is never written into the base layer. It stays what it was, quantised or not;
``disable_adapter`` is the base model, and a small checkpoint is enough.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_peft.adapters.native.tuner import NativeConfig, NativeLayer, NativeTuner
from lightning_peft.errors import ConfigError

__all__ = ["ThreeFactorConfig", "ThreeFactorLayer", "ThreeFactorTuner", "top_singular"]


@dataclass
class ThreeFactorConfig(NativeConfig):
    """Options of all three-factor methods.

    Args:
        r: Rank, at least 1 and at most the smaller side of every target.
        save_frozen: Save factors that do not train. False makes files as small as the number of trained parameters;
            the factors are then computed anew from the base weight when the adapter is loaded, which gives the same
            numbers only on the same kind of hardware and libraries.
    """

    r: int = field(default=16)
    save_frozen: bool = field(default=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_rank()


class ThreeFactorLayer(NativeLayer):
    """``y = base(x) + B R A x``, minus the product at the start where a method keeps one (roles A0, R0, B0)."""

    def shapes(self, config: Any) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the factors; those at the start like those now."""
        sizes = {"A": (config.r, self.in_features), "R": (config.r, config.r), "B": (self.out_features, config.r)}
        return {role: sizes[role[0]] for role in (*self.trained, *self.frozen)}

    def core(self, adapter_name: str) -> Tensor:
        """Return R with everything that scales it; minus R0 if A and B do not train."""
        core = self.tensor("R", adapter_name)
        return core - self.tensor("R0", adapter_name) if "R0" in self.frozen else core

    def products(self, adapter_name: str) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return the products (B, R, A) whose sum is what the adapter adds to the weight."""
        return [(self.tensor("B", adapter_name), self.core(adapter_name), self.tensor("A", adapter_name))]

    def delta(self, adapter_name: str, x: Tensor) -> Tensor:
        """Return the sum of the products, applied to ``x`` from the right: the large matrix is never made."""
        parts = [self.mix(self.mix(self.multiply(x, A), R), B) for B, R, A in self.products(adapter_name)]
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    def delta_matrix(self, adapter_name: str) -> Tensor:
        """Return the sum of the products as a matrix (out, in)."""
        parts = [(B * R if R.ndim == 1 else B @ R) @ A for B, R, A in self.products(adapter_name)]
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]


class ThreeFactorTuner(NativeTuner):
    """Puts three-factor layers into a model, and leaves frozen factors out of files if asked to."""

    tuner_layer_cls: ClassVar[type[ThreeFactorLayer]]  # type: ignore[misc]

    @classmethod
    def _is_frozen_factor(cls, key: str) -> bool:
        names = {cls.tuner_layer_cls.prefix + role for role in cls.tuner_layer_cls.frozen}
        return not names.isdisjoint(key.split(".")[-2:])

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, config: Any, adapter_name: str, *args: Any, **kwargs: Any
    ) -> Any:
        state = super()._get_adapter_state_dict(model, config, adapter_name, *args, **kwargs)
        if config.save_frozen:
            return state
        return {key: value for key, value in state.items() if not cls._is_frozen_factor(key)}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        state = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        if not config.save_frozen:
            own = {key: value for key, value in model.state_dict().items() if key.endswith(f".{adapter_name}")}
            if any(key in own and own[key].is_meta for key in state):
                raise ConfigError(
                    "The adapter was saved without its frozen factors (save_frozen=False), which are computed from the "
                    "base weight when it is loaded: load it without low_cpu_mem_usage."
                )
            state = {**{key: value for key, value in own.items() if cls._is_frozen_factor(key)}, **state}
        return state


def top_singular(
    matrix_OI: Tensor, rank: int, *, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ``rank`` largest singular triplets U (out, r), S (r,), V^T (r, in) of a matrix.

    Signs are fixed: the entry of largest magnitude of each row of V^T is positive.

    Args:
        matrix_OI: The matrix, in floating point.
        rank: How many triplets.
        generator: None: an exact decomposition. Otherwise a randomised one with this CPU generator: a random start of
            ``rank + 8`` columns and 8 rounds of subspace iteration.
    """
    if generator is None:
        U, S, Vh = torch.linalg.svd(matrix_OI, full_matrices=False)
    else:
        width = min(rank + 8, *matrix_OI.shape)
        start = torch.randn(matrix_OI.shape[1], width, generator=generator, dtype=torch.float64)
        basis = torch.linalg.qr(matrix_OI @ start.to(matrix_OI)).Q
        for _ in range(8):
            basis = torch.linalg.qr(matrix_OI @ torch.linalg.qr(matrix_OI.T @ basis).Q).Q
        U, S, Vh = torch.linalg.svd(basis.T @ matrix_OI, full_matrices=False)
        U = basis @ U
    U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]
    largest = Vh.gather(1, Vh.abs().argmax(dim=1, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(Vh)
    return U * sign.T, S, Vh * sign
