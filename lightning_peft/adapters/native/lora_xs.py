"""LoRA-XS: train an r by r matrix between the frozen leading singular vectors of the weight.

``h = W x + (alpha / r) · U_r R (S_r V_r^T) x`` with W = U S V^T, where only R trains: r² parameters per layer, whatever
the layer's size. Balazy, Banaei, Aberer and Tabor, 2024, arXiv:2405.17604.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_peft.adapters.native.three_factor import (
    ThreeFactorConfig,
    ThreeFactorLayer,
    ThreeFactorTuner,
    top_singular,
)
from lightning_peft.adapters.native.tuner import register

__all__ = ["LoRAXSConfig"]


@dataclass
class LoRAXSConfig(ThreeFactorConfig):
    """LoRA-XS: an r by r matrix between frozen singular vectors of the weight.

    Trains r² values per layer. Memory for activations is LoRA's; optimizer state and gradients are next to nothing.
    One singular value decomposition per layer at the start.

    When: many adapters must be kept, or sent, and LoRA at rank 1 is still too large. On small ranks and hard tasks it
    learns less than LoRA does.

    Args:
        alpha: The product is scaled by ``alpha / r``; None for no scaling.
        init_std: Standard deviation of R at the start. 1e-5 in the paper, so that the model starts next to its base;
            0 starts exactly there, and trains as well, since the factors around R are not zero.
        svd: ``"exact"``, or ``"randomized"``, which is faster on large layers.

    Paper: Balazy et al. 2024, arXiv:2405.17604, section 3.

    Differs from the paper: signs of singular vectors are fixed, so that a seed gives one initialisation.
    """

    alpha: float | None = field(default=None)
    init_std: float = field(default=1e-5)
    svd: Literal["exact", "randomized"] = field(default="exact")

    method: ClassVar[str] = "lora_xs"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha is not None:
            self._check_number("alpha", 0.0, float("inf"), low_included=False)
        self._check_number("init_std", 0.0, float("inf"))
        self._check_choice("svd", ("exact", "randomized"))


class LoRAXSLayer(ThreeFactorLayer):
    """A base layer with LoRA-XS adapters."""

    prefix = "lora_xs_"
    trained = ("R",)
    frozen = ("A", "B")

    def initial(self, config: Any, weight_OI: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Return A = S_r V_r^T, B = U_r and a small random R."""
        R = torch.randn(config.r, config.r, generator=generator, dtype=torch.float64) * config.init_std
        U, S, Vh = top_singular(weight_OI, config.r, generator=generator if config.svd == "randomized" else None)
        return {"A": S[:, None] * Vh, "R": R, "B": U}

    def core(self, adapter_name: str) -> Tensor:
        """Return R, scaled."""
        config: Any = self.settings[adapter_name]
        return super().core(adapter_name) * (1.0 if config.alpha is None else config.alpha / config.r)


class LoRAXSTuner(ThreeFactorTuner):
    """Puts LoRA-XS into a model."""

    prefix = "lora_xs_"
    tuner_layer_cls = LoRAXSLayer


register("lora_xs", LoRAXSConfig, LoRAXSTuner)
