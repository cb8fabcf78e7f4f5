"""LoLDU: train the diagonal of a low-rank lower-diagonal-upper factorisation of the weight.

``W = P L D U`` with unit triangular L and U. The first r columns of P L, entries of D and rows of U are taken out of W
and put back as ``s · P L_r diag(z) U_r``, where z and the scalar s train. Shi, Wei, Wu, Ran, Sun, He and Yang, 2024,
arXiv:2410.13618.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_peft.adapters.native.three_factor import ThreeFactorConfig, ThreeFactorLayer, ThreeFactorTuner
from lightning_peft.adapters.native.tuner import register

__all__ = ["LoLDUConfig", "ldu"]

_STARTS = ("ldu", "uniform", "normal", "constant", "zeros")


@dataclass
class LoLDUConfig(ThreeFactorConfig):
    """LoLDU: a trained diagonal between frozen triangular factors of the weight.

    Trains r + 1 values per layer, fewer than any other method here. One LU decomposition per layer at the start, which
    is much cheaper than a singular value decomposition. The model starts exactly as its base.

    When: a thousand adapters must fit where one of LoRA would. It can rescale r directions that the weight has, and
    turn none: raise r, up to the layer's width, before giving up on it.

    Args:
        alpha: The scalar starts as ``alpha / r``; None for 1.
        init: Where z starts: ``"ldu"`` at D; ``"uniform"`` within half the mean of D around zero; ``"normal"`` with
            mean and standard deviation of D; ``"constant"`` at the mean of D; ``"zeros"``.

    Paper: Shi et al. 2024, arXiv:2410.13618.

    Differs from the paper: the residual weight is not stored. The layer computes
    ``W + P L_r diag(s z - s0 z0) U_r``, which is the same function with an untouched base.
    """

    alpha: float | None = field(default=None)
    init: Literal["ldu", "uniform", "normal", "constant", "zeros"] = field(default="ldu")

    method: ClassVar[str] = "loldu"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha is not None:
            self._check_number("alpha", 0.0, float("inf"), low_included=False)
        self._check_choice("init", _STARTS)


def ldu(weight_OI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return P L (out, k), the diagonal D (k,) and U (k, in) with ``weight = P L diag(D) U``, k the smaller side.

    U has a unit diagonal, but for rows whose pivot is exactly zero (a singular weight): there D is 1.
    """
    P, L, U = torch.linalg.lu(weight_OI)
    D = U.diagonal()
    D = torch.where(D == 0, torch.ones_like(D), D)
    return P @ L, D, U / D[:, None]


class LoLDULayer(ThreeFactorLayer):
    """A base layer with LoLDU adapters."""

    prefix = "loldu_"
    trained = ("R", "scale")
    frozen = ("A", "B", "R0")

    def shapes(self, config: Any) -> dict[str, tuple[int, ...]]:
        """Return the shapes: the middle factor is a diagonal."""
        sizes = {"A": (config.r, self.in_features), "R": (config.r,), "B": (self.out_features, config.r)}
        return {**sizes, "R0": (config.r,), "scale": (1,)}

    def initial(self, config: Any, weight_OI: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the leading factors; R0 is the scaled diagonal that is subtracted."""
        lower, diagonal, upper = ldu(weight_OI)
        leading = diagonal[: config.r]
        z = _start(leading, config.init, generator)
        scale = torch.full((1,), 1.0 if config.alpha is None else config.alpha / config.r).to(z)
        return {"A": upper[: config.r], "B": lower[:, : config.r], "R": z, "scale": scale, "R0": scale * z}

    def core(self, adapter_name: str) -> Tensor:
        """Return s z - s0 z0."""
        scaled = self.tensor("scale", adapter_name) * self.tensor("R", adapter_name)
        return scaled - self.tensor("R0", adapter_name)


def _start(diagonal: Tensor, init: str, generator: torch.Generator) -> Tensor:
    size = diagonal.shape[0]
    if init == "ldu":
        return diagonal
    if init == "zeros":
        return torch.zeros_like(diagonal)
    mean = diagonal.mean()
    if init == "constant":
        return mean.expand(size)
    if init == "uniform":
        return (torch.rand(size, generator=generator, dtype=torch.float64).to(diagonal) - 0.5) * mean.abs()
    spread = diagonal.std(correction=0)
    return mean + spread * torch.randn(size, generator=generator, dtype=torch.float64).to(diagonal)


class LoLDUTuner(ThreeFactorTuner):
    """Puts LoLDU into a model."""

    prefix = "loldu_"
    tuner_layer_cls = LoLDULayer


register("loldu", LoLDUConfig, LoLDUTuner)
