"""Auto-RGN: every tensor trains at a rate of its own, in proportion to how much its gradient is of its weight.

The relative gradient norm ``|g| / |w|`` of each tensor is measured every epoch; the tensor with the largest trains at
the full learning rate, the others at their share of it (Lee et al. 2023, arXiv:2210.11466).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from typing_extensions import override

from lightning_peft.core.blocks import Structure
from lightning_peft.core.draw import Draw, draw_generator
from lightning_peft.core.param_groups import scale_learning_rate, split_param_groups
from lightning_peft.core.trainable import StatePolicy
from lightning_peft.errors import ConfigError
from lightning_peft.methods.arguments import is_whole
from lightning_peft.methods.base import MethodCallback, Redraw
from lightning_peft.methods.batches import sample_batches
from lightning_peft.methods.moment import Moment
from lightning_peft.methods.scoring import mean_over_ranks, scoring_gradients, scoring_loss, without_trace

__all__ = ["AutoRGN", "rate_factors", "relative_gradient_norm"]

_SMALLEST_FACTOR = 1e-12  # a tensor without gradient must not lose its rate for good: factors are undone by division


def relative_gradient_norm(grad: Tensor | None, weight: Tensor) -> float:
    """Return ``|grad| / |weight|``: 0 without a gradient, infinite for a weight of zeros, NaN if it overflows."""
    size = 0.0 if grad is None else float(torch.linalg.vector_norm(grad.detach().float()))
    if size == 0:
        return 0.0
    norm = float(torch.linalg.vector_norm(weight.detach().float()))
    if not math.isfinite(size):
        return math.nan
    return size / norm if norm else math.inf


def rate_factors(norms: Mapping[str, float]) -> dict[str, float]:
    """Turn relative gradient norms into factors on the learning rate: each by the largest finite one, at most 1.

    A tensor of zeros (a fresh bias) has no relative norm and trains at the full rate.

    Args:
        norms: Tensor -> relative gradient norm, never NaN.
    """
    largest = max((norm for norm in norms.values() if math.isfinite(norm)), default=0.0)
    return {
        name: 1.0 if math.isinf(norm) or not largest else max(norm / largest, _SMALLEST_FACTOR)
        for name, norm in norms.items()
    }


class AutoRGN(MethodCallback):
    """Train all tensors, each at a learning rate scaled by its relative gradient norm, measured anew every epoch.

    Memory is that of full fine-tuning; what changes is where the update goes. Measuring costs ``num_batches`` forward
    and backward passes per ``redraw``. The optimizer's parameter groups are cut to one per tensor; learning-rate
    schedules go on within each.

    Use it where surgical fine-tuning helps but the right group of blocks is not known: few target samples, shifted
    distribution.

    Args:
        num_batches: Training batches that gradients are measured on, drawn at random, at least 1.
        redraw: When to measure: ``"epoch"``, a number of optimizer steps, or ``"never"``: once, at the first batch.
        scope: What trains. Norms are left out, as in the authors' code, and keep their running statistics.
        always: What trains beside it, at the full rate.
        state: What becomes of the optimizer's moments at each new measurement: ``"drop"`` as in the authors' code,
            which makes a new optimizer every epoch, or ``"keep"``.
        seed: Seed of the choice of samples.

    Raises:
        ConfigError: If an argument is out of range, or a gradient is not finite.

    Example:
        >>> from lightning_peft.methods.layers.auto_rgn import rate_factors
        >>> rate_factors({"stem": 0.5, "block": 0.25})
        {'stem': 1.0, 'block': 0.5}

    Paper:
        Y. Lee, A. S. Chen, F. Tajwar, A. Kumar, H. Yao, P. Liang, C. Finn: Surgical Fine-Tuning Improves Adaptation to
        Distribution Shifts, ICLR 2023, arXiv:2210.11466 (Auto-RGN).

    Differs from the paper:
        A tensor of zeros, whose relative norm is infinite, trains at the full rate instead of taking it from all
        others. Gradients are measured in evaluation mode; training goes on in the mode the module is in.
    """

    def __init__(
        self,
        num_batches: int = 5,
        redraw: Redraw = "epoch",
        scope: str | list[str] = ["all", "!norms"],  # noqa: B006
        always: Sequence[str] = (),
        state: StatePolicy = "drop",
        seed: int = 0,
    ) -> None:
        super().__init__(scope=scope, always=always, redraw=redraw, state=state, seed=seed)
        if not is_whole(num_batches, least=1):
            raise ConfigError(f"AutoRGN(num_batches={num_batches!r}): a whole number from 1 on.")
        if state == "offload":
            raise ConfigError("AutoRGN(state='offload'): nothing freezes here that could wait. Take 'drop' or 'keep'.")
        self.num_batches = int(num_batches)
        self.redraw: Redraw = redraw
        self._factors: dict[str, float] = {}
        self._in_force: dict[str, float] = {}
        self._reset_state = False

    @property
    def factors(self) -> dict[str, float]:
        """Tensor -> factor on its learning rate, from the first batch on."""
        return dict(self._factors)

    @property
    @override
    def needs_whole_parameters(self) -> bool:
        return True

    @override
    def lasting(self) -> frozenset[str]:
        return self.selectable

    @property
    @override
    def needs_batch(self) -> bool:
        return True

    @override
    def make_units(self, structure: Structure, names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
        return {name: (name,) for name in names}

    @override
    def select(self, draw: Draw) -> list[str]:
        return list(self.units)

    @override
    def prepare_optimizers(self, trainer: Trainer) -> None:
        self._in_force, self._reset_state = {}, False
        parameters = self._structure.parameters
        own = {id(parameters[name]): position for position, name in enumerate(self.units)}
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        for optimizer in trainer.strategy.optimizers:
            split_param_groups(optimizer, schedulers, lambda parameter: own.get(id(parameter), -1))

    @override
    def begin(self, step: int, epoch: int, global_step: int, continues: bool) -> None:
        if not continues:
            self._factors = {}
        super().begin(step, epoch, global_step, continues)

    @override
    def observe(self, moment: Moment) -> None:
        due = self.draw_due(moment.step, moment.epoch)
        if due == self._draw_index:
            return
        trainer, pl_module = moment.trainer, moment.pl_module
        parameters = [self._structure.parameters[name] for name in self.units]
        norms = dict.fromkeys(self.units, 0.0)
        with without_trace(pl_module), torch.compiler.set_stance("force_eager"):
            pl_module.eval()
            generator = draw_generator(self.seed, due, "batches")
            batches = sample_batches(trainer, trainer.train_dataloader, self.num_batches, generator)
            for batch in batches:
                loss = scoring_loss(trainer, pl_module, batch)
                grads = scoring_gradients(loss, parameters)
                for name, parameter, grad in zip(self.units, parameters, grads, strict=True):
                    grad = mean_over_ranks(torch.zeros_like(parameter) if grad is None else grad)
                    norms[name] += relative_gradient_norm(grad, parameter) / len(batches)
        bad = [name for name, norm in norms.items() if math.isnan(norm)]
        if bad:
            raise ConfigError(f"AutoRGN: gradients of {len(bad)} tensor(s) are not finite, such as {bad[0]}.")
        self._factors = rate_factors(norms)

    @override
    def advance(self, step: int, epoch: int, global_step: int) -> bool:
        changed = super().advance(step, epoch, global_step)
        self._reset_state = changed and self.state == "drop"
        return changed

    @override
    def switched(self, trainer: Trainer) -> None:
        parameters = self._structure.parameters
        names = {id(parameters[name]): name for name in self.units}
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        for optimizer in trainer.strategy.optimizers:
            for index, group in enumerate(optimizer.param_groups):
                name = names.get(id(group["params"][0])) if group["params"] else None
                if name is None or not self._factors:
                    continue
                factor = self._factors[name] / self._in_force.get(name, 1.0)
                if factor != 1.0:
                    scale_learning_rate(optimizer, schedulers, index, factor)
                if self._reset_state:
                    optimizer.state.pop(group["params"][0], None)
        self._in_force = dict(self._factors)
        self._reset_state = False

    @override
    def method_state(self) -> dict[str, Any]:
        return {"factors": dict(self._factors)}

    @override
    def load_method_state(self, state: dict[str, Any]) -> None:
        self._factors = dict(state["factors"])
        self._in_force = dict(state["factors"])  # the optimizer was restored with these rates

    @override
    def describe(self) -> dict[str, Any]:
        """As for every method, with the factor on each tensor's learning rate."""
        return {**super().describe(), "factors": dict(self._factors)}
