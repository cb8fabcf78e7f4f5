"""SLoRA, NLoRA and IntTune: an r by r matrix between LoRA's two, and a Nystroem start for all three.

SLoRA: ``W + (alpha / r) · B N A``, B zero at the start. NLoRA: the factors start as blocks of the weight, B its first r
columns, A its first r rows, N the block in which they cross (or its pseudo-inverse, which makes ``B N A`` the Nystroem
approximation of W). IntTune: NLoRA of which only N trains. Guo, Chang and Wu, 2025, arXiv:2502.14482.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_peft.adapters.native.three_factor import ThreeFactorConfig, ThreeFactorLayer, ThreeFactorTuner
from lightning_peft.adapters.native.tuner import register

__all__ = ["IntTuneConfig", "NLoRAConfig", "SLoRAConfig"]


@dataclass
class SLoRAConfig(ThreeFactorConfig):
    """SLoRA: LoRA with a trained r by r matrix between A and B.

    Trains r · (in + out) + r² values per layer: LoRA's cost and r² more. The model starts exactly as its base.

    When: instead of LoRA, where its convergence is slow.

    Args:
        alpha: The product is scaled by ``alpha / r``; None for no scaling.

    Paper: Guo et al. 2025, arXiv:2502.14482 (StructuredLoRA).

    Differs from the paper: not knowingly. A and the matrix between start uniform in ±1/sqrt(columns), as in the
    authors' code.
    """

    alpha: float | None = field(default=None)

    method: ClassVar[str] = "slora"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha is not None:
            self._check_number("alpha", 0.0, float("inf"), low_included=False)


@dataclass
class _Nystroem(ThreeFactorConfig):
    """What NLoRA and IntTune share."""

    alpha: float | None = field(default=None)
    core: Literal["block", "pinv"] = field(default="block")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha is not None:
            self._check_number("alpha", 0.0, float("inf"), low_included=False)
        self._check_choice("core", ("block", "pinv"))


@dataclass
class NLoRAConfig(_Nystroem):
    """NLoRA: SLoRA whose factors start as blocks of the weight.

    Trains r · (in + out) + r² values per layer, and keeps as many at their start. No decomposition: the start is a
    copy. The model starts exactly as its base.

    When: like PiSSA, for faster convergence than LoRA's, without its singular value decomposition.

    Args:
        alpha: The product is scaled by ``alpha / r``; None for no scaling.
        core: The matrix between starts as ``"block"``, the upper left r by r block of the weight, which is what the
            authors' code does, or ``"pinv"``, its pseudo-inverse, which makes the product the Nystroem approximation.

    Paper: Guo et al. 2025, arXiv:2502.14482.

    Differs from the paper: the product at the start is subtracted, so that training starts from the base model; the
    authors' code adds it to the weight.
    """

    method: ClassVar[str] = "nlora"


@dataclass
class IntTuneConfig(_Nystroem):
    """IntTune: NLoRA of which only the r by r matrix in the middle trains.

    Trains r² values per layer, like LoRA-XS, between blocks of the weight instead of its singular vectors. No
    decomposition; the model starts exactly as its base.

    When: the fewest trained values at no cost at the start.

    Args:
        alpha: The product is scaled by ``alpha / r``; None for no scaling.
        core: As for NLoRA: ``"block"`` or ``"pinv"``.

    Paper: Guo et al. 2025, arXiv:2502.14482.

    Differs from the paper: the product at the start is subtracted; the authors' code adds it to the weight.
    """

    method: ClassVar[str] = "inttune"


def nystroem_blocks(weight_OI: Tensor, rank: int, core: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first columns B (out, r), the core (r, r) and the first rows A (r, in) of a matrix."""
    block = weight_OI[:rank, :rank]
    return weight_OI[:, :rank], torch.linalg.pinv(block) if core == "pinv" else block, weight_OI[:rank]


def _scaling(config: Any) -> float:
    return 1.0 if config.alpha is None else config.alpha / config.r


class SLoRALayer(ThreeFactorLayer):
    """A base layer with SLoRA adapters."""

    prefix = "slora_"
    trained = ("A", "R", "B")

    def initial(self, config: Any, weight_OI: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Return uniform A and R; B is zero."""
        shapes = self.shapes(config)
        return {
            role: (torch.rand(shapes[role], generator=generator, dtype=torch.float64) * 2 - 1)
            / math.sqrt(shapes[role][1])
            for role in ("A", "R")
        }

    def core(self, adapter_name: str) -> Tensor:
        """Return R, scaled."""
        return super().core(adapter_name) * _scaling(self.settings[adapter_name])


class NLoRALayer(ThreeFactorLayer):
    """A base layer with NLoRA adapters."""

    prefix = "nlora_"
    trained = ("A", "R", "B")
    frozen = ("A0", "R0", "B0")

    def initial(self, config: Any, weight_OI: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Return blocks of the weight, twice."""
        B, R, A = nystroem_blocks(weight_OI, config.r, config.core)
        return {"A": A, "R": R, "B": B, "A0": A, "R0": R, "B0": B}

    def products(self, adapter_name: str) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return the product and, negative, the one at the start."""
        scaling = _scaling(self.settings[adapter_name])
        B, R, A = (self.tensor(role, adapter_name) for role in ("B", "R", "A"))
        B0, R0, A0 = (self.tensor(role, adapter_name) for role in ("B0", "R0", "A0"))
        return [(B, R * scaling, A), (B0, R0 * -scaling, A0)]


class IntTuneLayer(ThreeFactorLayer):
    """A base layer with IntTune adapters."""

    prefix = "inttune_"
    trained = ("R",)
    frozen = ("A", "B", "R0")

    def initial(self, config: Any, weight_OI: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Return blocks of the weight; the one in the middle twice."""
        B, R, A = nystroem_blocks(weight_OI, config.r, config.core)
        return {"A": A, "R": R, "B": B, "R0": R}

    def core(self, adapter_name: str) -> Tensor:
        """Return what R has become since the start, scaled."""
        return super().core(adapter_name) * _scaling(self.settings[adapter_name])


class SLoRATuner(ThreeFactorTuner):
    """Puts SLoRA into a model."""

    prefix = "slora_"
    tuner_layer_cls = SLoRALayer


class NLoRATuner(ThreeFactorTuner):
    """Puts NLoRA into a model."""

    prefix = "nlora_"
    tuner_layer_cls = NLoRALayer


class IntTuneTuner(ThreeFactorTuner):
    """Puts IntTune into a model."""

    prefix = "inttune_"
    tuner_layer_cls = IntTuneLayer


register("slora", SLoRAConfig, SLoRATuner)
register("nlora", NLoRAConfig, NLoRATuner)
register("inttune", IntTuneConfig, IntTuneTuner)
