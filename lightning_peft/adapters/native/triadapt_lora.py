"""TriAdaptLoRA: a square matrix of two triangles between two factors, which grows in the layers where it changes most.

``h = W x + (alpha / rank) · B C A x`` with C (rank, rank) = L + U, the sum of a lower and an upper triangular matrix of
blocks: a growth by k adds k rows to A, k columns to B, k rows to L and k columns to U. The score of a layer is how much
``||C||_F``, over the number of its blocks, has changed since ranks were last allocated; no gradient is needed. How many
layers grow follows a threshold that moves with the run. Y. Liang, Y. Wang and Y. Zeng, 2025, arXiv:2501.08008.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.nn import functional

from lightning_peft.adapters.native.growth import (
    GrowingAdapter,
    GrowingConfig,
    GrowingLayer,
    GrowthDriver,
    driver_of,
    top,
)
from lightning_peft.adapters.native.tuner import NativeTuner, register
from lightning_peft.errors import ConfigError

__all__ = ["TriAdaptLoRA", "TriAdaptLoRAConfig", "num_growing"]


@dataclass
class TriAdaptLoRAConfig(GrowingConfig):
    """TriAdaptLoRA: rank and a triangular core that grow.

    Outside Lightning nothing grows: it trains at rank r, and ``peft`` counts values that are not reached as trainable.

    Args:
        threshold: How many layers grow at a time, see :func:`num_growing`.
        total_steps: Optimizer steps over which the threshold moves; None: those of the fit.

    Paper: Y. Liang et al. 2025, arXiv:2501.08008.
    """

    orthogonality: float = field(default=0.5)
    threshold: Literal["linear", "exponential"] = field(default="linear")
    total_steps: int | None = field(default=None)

    method: ClassVar[str] = "triadapt_lora"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("threshold", ("linear", "exponential"))
        if self.total_steps is not None:
            self._check_whole("total_steps", self.start_step + 1)

    def make_driver(self, handle: Any, adapter_name: str) -> TriAdaptLoRADriver:
        """Return what lets the adapter grow."""
        return driver_of(handle, adapter_name, TriAdaptLoRADriver)


def num_growing(missing: int, progress: float, threshold: str) -> int:
    """Return how many layers grow, at least 1.

    Args:
        missing: Total rank that the budget still has, at least 1.
        progress: Which part of the run after the first growth is over, in [0, 1].
        threshold: ``"linear"``: ``missing * progress``; ``"exponential"``: ``missing ** progress``; rounded down.
    """
    count = missing * progress if threshold == "linear" else math.exp(progress * math.log(missing))
    return max(1, int(count))


class TriAdaptLoRALayer(GrowingLayer):
    """A base layer with TriAdaptLoRA adapters."""

    prefix = "triadapt_lora_"
    slot_roles = ("A", "L", "U", "B")

    def slot_shapes(self, config: Any, slot: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of rows of A and L, and columns of U and B."""
        rank, width = config.step_r if slot else config.r, config.rank(slot + 1)
        return {"A": (rank, self.in_features), "L": (rank, width), "U": (width, rank), "B": (self.out_features, rank)}

    def core(self, adapter_name: str) -> Tensor:
        """Return C = L + U."""
        rows, columns = self.opened("L", adapter_name), self.opened("U", adapter_name)
        width = rows[-1].shape[1]
        lower = torch.cat([functional.pad(row, (0, width - row.shape[1])) for row in rows])
        upper = torch.cat([functional.pad(column, (0, 0, 0, width - len(column))) for column in columns], dim=1)
        return lower + upper


class TriAdaptLoRADriver(GrowthDriver):
    """Lets those layers grow whose core has changed most."""

    def __init__(self, handle: Any, adapter_name: str) -> None:
        super().__init__(handle, adapter_name)
        self._norms = dict.fromkeys(self.layers, 0.0)

    def prepare_optimizers(self, trainer: Trainer) -> None:
        """Note how long the run is.

        Raises:
            ConfigError: If it has no end and ``total_steps`` is not given.
        """
        super().prepare_optimizers(trainer)
        self.total_steps = self.config.total_steps or self.total_steps
        if self.total_steps is None:
            raise ConfigError("TriAdaptLoRA: the fit has no end that could be counted in steps. Give total_steps.")

    @torch.no_grad()
    def choose(self, step: int, candidates: list[str], limit: int) -> list[str]:
        """Return the layers of the highest scores, as many as the threshold says."""
        name, assigned = self.adapter_name, self.total_steps
        assert assigned is not None
        cores = [torch.linalg.norm(layer.core(name)) / layer.counts(name)[0] for layer in self.layers.values()]
        now = dict(zip(self.layers, torch.stack(cores).tolist(), strict=True))
        scores = [now[path] - self._norms[path] for path in candidates]
        self._norms = now
        missing = self.config.target_r * len(self.layers) - sum(self.ranks.values())
        progress = (step - self.config.start_step) / max(1, assigned - self.config.start_step)
        count = num_growing(missing, min(1.0, progress), self.config.threshold)
        return top(scores, candidates, min(count, limit))

    def state_dict(self) -> dict[str, Any]:
        """The norms at the last allocation, too."""
        return {**super().state_dict(), "norms": dict(self._norms)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        super().load_state_dict(state)
        self._norms = dict(state["norms"])


class TriAdaptLoRATuner(NativeTuner):
    """Puts TriAdaptLoRA into a model."""

    prefix = "triadapt_lora_"
    tuner_layer_cls = TriAdaptLoRALayer


register("triadapt_lora", TriAdaptLoRAConfig, TriAdaptLoRATuner)


class TriAdaptLoRA(GrowingAdapter):
    """Train low rank with a triangular core, both of which grow in the layers whose core changes most.

    Begins with little more than LoRA's cost at ``rank``, and ends with ``r * (in + out) + r * (r + step_rank)``
    parameters in a layer that has come to rank r, which is ``target_rank`` in the mean (with ``rank`` equal to
    ``step_rank``). Each layer's values up to ``max_rank`` are allocated and kept in checkpoints from the start, without
    gradients and optimizer state until they are reached. Scores come from weights and cost nothing. Merged into the
    base it costs nothing in use.

    Use it like IncreLoRA, where gradients of whole weights are too expensive to look at.

    Args:
        rank: Of every layer at the start.
        target_rank: Mean rank over the layers at which growing ends.
        step_rank: Rank that a layer gains when it grows.
        max_rank: Rank beyond which no layer grows; None: four times ``target_rank``.
        alpha: The update is scaled by ``alpha`` over the layer's rank at the time.
        start_step: Optimizer steps before the first growth.
        period_steps: Optimizer steps from one growth to the next.
        threshold: How many layers grow at a time: ``"linear"``, the rank that the budget still has times the part of
            the run that is over; ``"exponential"``, the one to the power of the other.
        total_steps: Optimizer steps over which the threshold moves; None: those of the fit. Give it if a fit may be
            resumed with another ``max_steps``.
        orthogonality: Weight of the regulariser that keeps A and B near orthogonal, added to the training loss.
        dropout: On the adapters' input, in ``[0, 1)``.
        layers: Which layers get one, as a scope.
        target: Path of the submodule that gets the adapters.
        adapter_name: Name of the adapter.
        always: What trains beside it although it lies inside the target.
        seed: Of the initial values.

    Example:
        >>> from lightning_peft import TriAdaptLoRA
        >>> TriAdaptLoRA(target_rank=8, period_steps=1000).method
        'triadapt_lora'

    Paper:
        Y. Liang, Y. Wang, Y. Zeng: TriAdaptLoRA: Brain-Inspired Triangular Adaptive Low-Rank Adaptation for
        Parameter-Efficient Fine-Tuning, 2025, arXiv:2501.08008.

    Differs from the paper:
        Formulas are those of the public code, whose values at the start leave the product without any gradient: here A
        and B start normal with standard deviation 0.02 and the core at zero. No layer grows beyond ``max_rank``;
        budgets are never exceeded, also where scores are equal.
    """

    def __init__(
        self,
        rank: int = 1,
        target_rank: int = 8,
        step_rank: int = 1,
        max_rank: int | None = None,
        alpha: float = 16.0,
        start_step: int = 0,
        period_steps: int = 100,
        threshold: Literal["linear", "exponential"] = "linear",
        total_steps: int | None = None,
        orthogonality: float = 0.5,
        dropout: float = 0.0,
        layers: str | list[str] = "blocks",
        target: str = "model",
        adapter_name: str = "default",
        always: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        self.rank, self.target_rank, self.step_rank, self.max_rank = rank, target_rank, step_rank, max_rank
        self.alpha, self.start_step, self.period_steps = alpha, start_step, period_steps
        self.threshold, self.total_steps = threshold, total_steps
        self.orthogonality, self.dropout = orthogonality, dropout
        config: dict[str, Any] = {
            "r": rank,
            "target_r": target_rank,
            "step_r": step_rank,
            "max_r": max_rank,
            "alpha": alpha,
            "start_step": start_step,
            "period_steps": period_steps,
            "threshold": threshold,
            "total_steps": total_steps,
            "orthogonality": orthogonality,
            "dropout": dropout,
            "seed": seed,
        }
        super().__init__("triadapt_lora", config, target, layers, adapter_name, always, seed)
