"""IncreLoRA: begin with rank one and give rank to the weights that turn out to matter.

``h = W x + (alpha / rank) · B diag(E) A x``. Every so many optimizer steps the most important layers gain rank. The
importance of a layer is the sum of ``|dW · dL/d(dW)|`` over the entries of its update dW, over the square root of their
number, smoothed over steps and multiplied by its smoothed uncertainty. What a layer will gain next trains in advance:
its rows of A and columns of B do, behind a gate E of 1e-5 that does not. F. Zhang, L. Li, J. Chen, Z. Jiang, B. Wang
and Y. Qian, 2023, arXiv:2308.12043.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_peft.adapters.native.growth import (
    GrowingAdapter,
    GrowingConfig,
    GrowingLayer,
    GrowthDriver,
    driver_of,
    top,
)
from lightning_peft.adapters.native.tuner import NativeTuner, register
from lightning_peft.methods.scoring import mean_over_ranks

__all__ = ["IncreLoRA", "IncreLoRAConfig"]

_AJAR = 1e-5


@dataclass
class IncreLoRAConfig(GrowingConfig):
    """IncreLoRA: rank that grows where it matters.

    Outside Lightning nothing grows: it trains at rank r, and ``peft`` counts values that are not reached as trainable.

    Args:
        layers_per_growth: How many layers gain rank at a time.
        advance_learning: Whether the rank that a layer gains next trains already.
        beta1: Smoothing of importances over steps, in [0, 1).
        beta2: Smoothing of their uncertainties, in [0, 1).
        warmup_steps: Optimizer steps in which the learning rate of new rank rises from 0 to the others'; 0 for none.

    Paper: F. Zhang et al. 2023, arXiv:2308.12043, algorithm 1.
    """

    layers_per_growth: int = field(default=2)
    advance_learning: bool = field(default=True)
    beta1: float = field(default=0.85)
    beta2: float = field(default=0.85)
    warmup_steps: int = field(default=0)

    method: ClassVar[str] = "increlora"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_whole("layers_per_growth", 1)
        self._check_whole("warmup_steps", 0)
        self._check_number("beta1", 0.0, 1.0)
        self._check_number("beta2", 0.0, 1.0)

    def make_driver(self, handle: Any, adapter_name: str) -> IncreLoRADriver:
        """Return what lets the adapter grow."""
        return driver_of(handle, adapter_name, IncreLoRADriver)


class IncreLoRALayer(GrowingLayer):
    """A base layer with IncreLoRA adapters."""

    prefix = "increlora_"
    slot_roles = ("A", "E", "B")
    gates = ("E",)

    def slot_shapes(self, config: Any, slot: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of rows of A, entries of E and columns of B."""
        rank = config.step_r if slot else config.r
        return {"A": (rank, self.in_features), "E": (rank,), "B": (self.out_features, rank)}

    def core(self, adapter_name: str) -> Tensor:
        """Return E."""
        return torch.cat(self.opened("E", adapter_name))


class IncreLoRADriver(GrowthDriver):
    """Scores layers in every backward pass, and lets the best ones grow."""

    def __init__(self, handle: Any, adapter_name: str) -> None:
        self.advances = handle.peft_config[adapter_name].advance_learning
        super().__init__(handle, adapter_name)
        weight = next(iter(self.layers.values())).tensor("A0", adapter_name)
        self._moments = torch.zeros(2, len(self.layers), device=weight.device)
        self._pending = torch.zeros(len(self.layers), device=weight.device)
        self._grown: dict[str, list[int]] = {}
        self._before: list[tuple[Tensor, Tensor, float]] = []
        self._scaler: Any = None

    def prepare_optimizers(self, trainer: Trainer) -> None:
        """Note what scales the loss."""
        super().prepare_optimizers(trainer)
        if trainer.global_step == 0:
            self._grown = {}
        self._scaler = getattr(trainer.precision_plugin, "scaler", None)

    def started(self) -> None:
        """Watch gradients; set the gates of opened slots ajar that train no gate yet."""
        super().started()
        device = next(iter(self.layers.values())).tensor("A0", self.adapter_name).device
        self._moments, self._pending = self._moments.to(device), self._pending.to(device)
        for index, layer in enumerate(self.layers.values()):
            layer.sinks[self.adapter_name] = partial(self._score, index, layer)
            allocated, opened = layer.counts(self.adapter_name)
            if opened > allocated:
                self._set_gate(layer, allocated, _AJAR)
        if not self.candidates:
            self.finished()

    def finished(self) -> None:
        """Watch no more."""
        for layer in self.layers.values():
            layer.sinks.pop(self.adapter_name, None)

    @torch.no_grad()
    def _set_gate(self, layer: GrowingLayer, slot: int, value: float) -> None:
        layer.tensor(f"E{slot}", self.adapter_name).fill_(value)

    @torch.no_grad()
    def _score(self, index: int, layer: GrowingLayer, x: Tensor, grad: Tensor) -> None:
        delta_OI = layer.delta_matrix(self.adapter_name)
        gradient_OI = layer.weight_gradient(x, grad)
        self._pending[index] += (delta_OI * gradient_OI).abs().sum() / delta_OI.numel() ** 0.5

    @torch.no_grad()
    def observe(self) -> None:
        """Smooth the scores of this step, summed over its micro-batches and averaged over processes."""
        scale = 1.0 if self._scaler is None else self._scaler.get_scale()
        scores = mean_over_ranks(self._pending) / scale
        self._pending = torch.zeros_like(self._pending)
        importance, uncertainty = self._moments
        importance = self.config.beta1 * importance + (1 - self.config.beta1) * scores
        uncertainty = self.config.beta2 * uncertainty + (1 - self.config.beta2) * (scores - importance).abs()
        smoothed = torch.stack([importance, uncertainty])
        self._moments = torch.where(scores.isfinite().all(), smoothed, self._moments)

    def choose(self, step: int, candidates: list[str], limit: int) -> list[str]:
        """Return the layers of the highest product of smoothed importance and uncertainty."""
        scores = dict(zip(self.layers, self._moments.prod(0).tolist(), strict=True))
        return top([scores[path] for path in candidates], candidates, min(self.config.layers_per_growth, limit))

    def opened(self, path: str) -> None:
        """Note when, for the warm-up; where growing ends, no gate is left ajar."""
        self._grown.setdefault(path, []).append(self._last_step)
        for layer in self.layers.values():
            allocated, opened = layer.counts(self.adapter_name)
            if opened == allocated < layer.num_slots(self.config) and self.advances:
                self._set_gate(layer, allocated, 0.0)

    # ------------------------------------------------------------------ the learning rate of new rank

    def _warming(self, step: int) -> list[tuple[Tensor, float]]:
        """Return parameters whose learning rate is still reduced in this step, and by which factor."""
        warmup, found = self.config.warmup_steps, []
        for path, steps in self._grown.items():
            layer = self.layers[path]
            for slot, grown in enumerate(steps, start=1):
                factor = (step - grown - 1) / warmup if warmup else 1.0
                if factor < 1.0:
                    ahead = slot + self.advances
                    roles = [f"E{slot}", *(f"{r}{ahead}" for r in "AB" if ahead < layer.num_slots(self.config))]
                    found += [(layer.tensor(role, self.adapter_name), factor) for role in roles]
        return found

    @torch.no_grad()
    def stepping(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep the values of what warms up: a step is as long as the learning rate, so part of it is taken back."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._before = [(p, p.detach().clone(), f) for p, f in self._warming(self._last_step + 1) if id(p) in held]

    @torch.no_grad()
    def stepped(self, step: int) -> None:
        """Take part of the step back where the learning rate warms up; then as all do."""
        for parameter, before, factor in self._before:
            parameter.copy_(before + factor * (parameter - before))
        self._before = []
        super().stepped(step)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Smoothed scores, and those of an unfinished step, of each process."""
        pending: list[Any] = [self._pending.tolist()]
        if dist.is_available() and dist.is_initialized():
            pending = [None] * dist.get_world_size()
            dist.all_gather_object(pending, self._pending.tolist())
        moments = self._moments.detach().cpu().clone()
        grown = {path: list(steps) for path, steps in self._grown.items()}
        return {**super().state_dict(), "moments": moments, "pending": pending, "grown": grown}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them; on another number of processes each gets the mean of an unfinished step's scores."""
        super().load_state_dict(state)
        ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        pending = torch.tensor(state["pending"])
        mine = pending[dist.get_rank()] if len(pending) == ranks > 1 else pending.mean(0)
        self._moments, self._pending = state["moments"].to(self._moments), mine.to(self._pending)
        self._grown = {path: list(steps) for path, steps in state["grown"].items()}


class IncreLoRATuner(NativeTuner):
    """Puts IncreLoRA into a model."""

    prefix = "increlora_"
    tuner_layer_cls = IncreLoRALayer


register("increlora", IncreLoRAConfig, IncreLoRATuner)


class IncreLoRA(GrowingAdapter):
    """Train low rank that grows, during training, in the layers where it matters.

    Begins with LoRA's cost at ``rank``, and ends with that of a mean rank of ``target_rank``. Each layer's values up to
    ``max_rank`` are allocated and kept in checkpoints from the start, without gradients and optimizer state until they
    are reached. While it grows, each backward pass also computes the gradient of each adapted weight, one at a time:
    half as much arithmetic again in those layers. Merged into the base it costs nothing in use.

    Use it instead of LoRA where few parameters must do, and no one knows which layers need them.

    Args:
        rank: Of every layer at the start.
        target_rank: Mean rank over the layers at which growing ends.
        step_rank: Rank that a layer gains when it grows.
        max_rank: Rank beyond which no layer grows; None: four times ``target_rank``.
        alpha: The update is scaled by ``alpha`` over the layer's rank at the time.
        start_step: Optimizer steps before the first growth.
        period_steps: Optimizer steps from one growth to the next.
        layers_per_growth: How many layers gain rank at a time.
        advance_learning: Whether the rank that a layer gains next trains already, behind a gate of 1e-5.
        beta1: Smoothing of importances over steps, in ``[0, 1)``.
        beta2: Smoothing of their uncertainties, in ``[0, 1)``.
        warmup_steps: Optimizer steps in which the learning rate of new rank rises from 0 to the others'; 0 for none.
            Exact for optimizers whose step is proportional to the learning rate (SGD, Adam, AdamW).
        orthogonality: Weight of the regulariser that keeps factors near orthogonal, added to the training loss.
        dropout: On the adapters' input, in ``[0, 1)``.
        layers: Which layers get one, as a scope.
        target: Path of the submodule that gets the adapters.
        adapter_name: Name of the adapter.
        always: What trains beside it although it lies inside the target.
        seed: Of the initial values.

    Example:
        >>> from lightning_peft import IncreLoRA
        >>> IncreLoRA(target_rank=2, period_steps=1000).method
        'increlora'

    Paper:
        F. Zhang et al.: IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient Fine-tuning, 2023,
        arXiv:2308.12043, algorithm 1.

    Differs from the paper:
        No layer grows beyond ``max_rank``; budgets are never exceeded, also where scores are equal. Scores of several
        micro-batches are summed, those of several processes averaged. The warm-up of new rank is a factor on the user's
        learning rate, not a schedule of its own.
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
        layers_per_growth: int = 2,
        advance_learning: bool = True,
        beta1: float = 0.85,
        beta2: float = 0.85,
        warmup_steps: int = 0,
        orthogonality: float = 0.1,
        dropout: float = 0.0,
        layers: str | list[str] = "blocks",
        target: str = "model",
        adapter_name: str = "default",
        always: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        self.rank, self.target_rank, self.step_rank, self.max_rank = rank, target_rank, step_rank, max_rank
        self.alpha, self.start_step, self.period_steps = alpha, start_step, period_steps
        self.layers_per_growth, self.advance_learning = layers_per_growth, advance_learning
        self.beta1, self.beta2, self.warmup_steps = beta1, beta2, warmup_steps
        self.orthogonality, self.dropout = orthogonality, dropout
        config: dict[str, Any] = {
            "r": rank,
            "target_r": target_rank,
            "step_r": step_rank,
            "max_r": max_rank,
            "alpha": alpha,
            "start_step": start_step,
            "period_steps": period_steps,
            "layers_per_growth": layers_per_growth,
            "advance_learning": advance_learning,
            "beta1": beta1,
            "beta2": beta2,
            "warmup_steps": warmup_steps,
            "orthogonality": orthogonality,
            "dropout": dropout,
            "seed": seed,
        }
        super().__init__("increlora", config, target, layers, adapter_name, always, seed)
