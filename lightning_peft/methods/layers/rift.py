"""RiFT: fine-tune the one module that robustness depends on least, then go only part of the way.

Each module's weight is pushed, within a small ball, in the direction that hurts the loss on held-out data most; the
module whose worst loss rises least is fine-tuned alone; then the weights between before and after are tried, and the
best ones kept (Zhu et al. 2023, arXiv:2308.02533).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.core.blocks import Structure
from lightning_peft.core.draw import Draw, draw_generator
from lightning_peft.errors import ConfigError, ScopeError, suggest
from lightning_peft.methods.arguments import is_fraction, is_number, is_whole
from lightning_peft.methods.base import MethodCallback
from lightning_peft.methods.batches import DataSource, sample_batches, source_loaders
from lightning_peft.methods.layers.hft import unit_of
from lightning_peft.methods.moment import Moment
from lightning_peft.methods.scoring import mean_over_ranks, scoring_gradients, scoring_loss, without_trace

__all__ = ["RiFT", "best_interpolation", "interpolate", "projected", "robust_criticality"]


def projected(change: Tensor, weight: Tensor, radius: float) -> Tensor:
    """Return ``change``, shortened so that its norm is at most ``radius`` times that of ``weight``."""
    limit = radius * torch.linalg.vector_norm(weight)
    return change * (limit / torch.linalg.vector_norm(change)).clamp(max=1.0).nan_to_num(1.0)


def robust_criticality(
    weight: nn.Parameter,
    batches: Sequence[Any],
    loss_of: Callable[[Any], Tensor],
    radius: float,
    epochs: int,
    lr: float,
) -> float:
    """Return how much the loss can rise when ``weight`` moves within its ball (module robust criticality, MRC).

    Gradient ascent, batch by batch, projected back into the ball after each step; the mean loss over all batches is
    looked at after each epoch. The weight is put back bit for bit.

    Args:
        weight: The weight that moves; all others stay.
        batches: Held-out batches.
        loss_of: The loss of a batch at the present weights.
        radius: Of the ball, relative to the weight's norm.
        epochs: Passes over the batches.
        lr: Step size.

    Returns:
        The largest loss less the loss before, at least 0; infinite if the loss overflows on the way.

    Raises:
        ConfigError: If the loss is not finite to begin with.
    """

    def mean_loss() -> float:
        with torch.no_grad():
            return float(mean_over_ranks(torch.stack([loss_of(batch).detach().float() for batch in batches]).mean()))

    start = mean_loss()
    if not math.isfinite(start):
        raise ConfigError(f"The loss on held-out data is {start}: no module's criticality can be told from it.")
    original = weight.detach().clone()
    base, worst = original.float(), start
    change = torch.zeros_like(base)
    try:
        for _ in range(epochs):
            for batch in batches:
                (grad,) = scoring_gradients(loss_of(batch), [weight])
                if grad is None:
                    return 0.0
                change = projected(change + lr * mean_over_ranks(grad.detach().float()), base, radius)
                with torch.no_grad():
                    weight.copy_(base + change)
            loss = mean_loss()
            if not math.isfinite(loss):
                return math.inf
            worst = max(worst, loss)
    finally:
        with torch.no_grad():
            weight.copy_(original)
    return worst - start


def interpolate(before: Mapping[str, Tensor], after: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Return ``(1 - alpha) * before + alpha * after``, bit for bit the one or the other at 0 and 1.

    Args:
        before: Name -> tensor.
        after: The same names and shapes.
        alpha: In ``[0, 1]``.
    """
    if alpha in (0, 1):
        return {name: (after if alpha else before)[name].clone() for name in before}
    return {
        name: torch.lerp(value.float(), after[name].to(value.device).float(), alpha).to(value.dtype)
        for name, value in before.items()
    }


def best_interpolation(losses: Sequence[float], robust_losses: Sequence[float] | None = None) -> int:
    """Choose the point with the lowest loss, among those that are no less robust than point 0; the first of equal ones.

    Args:
        losses: Loss at each point; point 0 is the model before.
        robust_losses: Loss on attacked samples at each point, if there is an attack.
    """
    allowed = [
        index
        for index, loss in enumerate(losses)
        if not math.isnan(loss) and (robust_losses is None or robust_losses[index] <= robust_losses[0])
    ]
    return min(allowed, key=lambda index: losses[index], default=0)


class RiFT(MethodCallback):
    """Fine-tune only the module that the model's robustness depends on least, then interpolate.

    For adversarially trained models: one matrix or kernel trains, so that memory and weight gradients are those of one
    module, and nothing else changes, running statistics of norms included. Scoring happens once, at the first batch,
    and costs about ``modules * epochs * num_batches`` steps' forward and backward passes; interpolation costs
    ``interpolation_steps * num_batches`` forward passes at the end.

    The interpolated weights are in the model when ``fit`` returns; checkpoints written during the fit hold the
    fine-tuned ones.

    Use it to win back accuracy on clean data after adversarial training. Give your LightningModule a method
    ``robust_batch(batch)`` that returns the attacked batch (PGD, say); scoring and interpolation call it on held-out
    batches. Without it, criticality is that of the plain loss, and the interpolation looks at the plain loss alone.

    Args:
        radius: How far a weight moves in scoring, relative to its norm (the paper's epsilon).
        epochs: Passes of the ascent over the held-out batches.
        ascent_lr: Step size of the ascent.
        num_batches: Held-out batches used, drawn at random, in the loader's batch size.
        interpolation_steps: How finely the way from before to after is tried: 10 means 0, 0.1, ..., 1. 0 keeps the
            fine-tuned weights.
        score_on: ``"val"``: the (first) validation loader's data; ``"train"``: the training data, if nothing is held
            out.
        scope: The modules to choose from: each linear, convolution or other matrix with its bias.
        always: What trains beside the chosen module.
        seed: Seed of the choice of held-out samples.

    Raises:
        ConfigError: If a number is out of range, there is no held-out data, or its loss is not finite.
        ScopeError: From the fit, if the scope has fewer than two modules.

    Example:
        >>> import torch
        >>> from lightning_peft.methods.layers.rift import interpolate
        >>> interpolate({"w": torch.zeros(2)}, {"w": torch.ones(2)}, 0.25)["w"]
        tensor([0.2500, 0.2500])

    Paper:
        K. Zhu, X. Hu, J. Wang, X. Xie, G. Yang: Improving Generalization of Adversarial Training via Robust Critical
        Fine-Tuning, ICCV 2023, arXiv:2308.02533.

    Differs from the paper:
        The authors' code scores on the test set and projects once per epoch; here it is held-out data, and every step.
        Their fine-tuning moves the running statistics of all norms and interpolates them; here they stay. The best
        interpolation is judged by losses on the held-out batches, not by accuracies.
    """

    def __init__(
        self,
        radius: float = 0.1,
        epochs: int = 10,
        ascent_lr: float = 1.0,
        num_batches: int = 8,
        interpolation_steps: int = 10,
        score_on: DataSource = "val",
        scope: str | list[str] = "blocks",
        always: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        super().__init__(scope=scope, always=always, redraw="never", state="keep", seed=seed)
        checks = (
            ("radius", radius, is_fraction(radius), "a number in (0, 1]"),
            ("epochs", epochs, is_whole(epochs, least=1), "a whole number from 1 on"),
            ("ascent_lr", ascent_lr, is_number(ascent_lr) and ascent_lr > 0, "a number above 0"),
            ("num_batches", num_batches, is_whole(num_batches, least=1), "a whole number from 1 on"),
            ("interpolation_steps", interpolation_steps, is_whole(interpolation_steps, least=0), "0, 1, 2, ..."),
        )
        problems = [f"{name}={value!r} must be {wanted}" for name, value, ok, wanted in checks if not ok]
        if score_on not in get_args(DataSource):
            problems.append(f"score_on={score_on!r}: {suggest(str(score_on), get_args(DataSource))}")
        if problems:
            raise ConfigError(f"RiFT: {'; '.join(problems)}")
        self.radius = float(radius)
        self.epochs = int(epochs)
        self.ascent_lr = float(ascent_lr)
        self.num_batches = int(num_batches)
        self.interpolation_steps = int(interpolation_steps)
        self.score_on: DataSource = score_on
        self._forget()

    def _forget(self) -> None:
        self._criticality: dict[str, float] = {}
        self._before: dict[str, Tensor] = {}
        self._alpha: float | None = None

    @property
    def criticality(self) -> dict[str, float]:
        """Module -> how much the loss rises in its ball; the lowest trains. Empty before the first batch."""
        return dict(self._criticality)

    @property
    def alpha(self) -> float | None:
        """Where between before (0) and fine-tuned (1) the last fit ended; None before."""
        return self._alpha

    @property
    @override
    def needs_whole_parameters(self) -> bool:
        return True

    @property
    @override
    def needs_batch(self) -> bool:
        return True

    @override
    def make_units(self, structure: Structure, names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
        """One unit per matrix, with its bias."""
        collected: dict[str, list[str]] = {}
        for name in names:
            collected.setdefault(unit_of(name), []).append(name)
        units = {
            unit: tuple(members)
            for unit, members in collected.items()
            if any(structure.parameters[name].ndim >= 2 for name in members)
        }
        if len(units) < 2:
            raise ScopeError(f"{self.label} has {len(units)} module(s) with a matrix; to choose takes two or more.")
        return units

    @override
    def begin(self, step: int, epoch: int, global_step: int, continues: bool) -> None:
        if not continues:
            self._forget()
        super().begin(step, epoch, global_step, continues)

    @override
    def observe(self, moment: Moment) -> None:
        if self._criticality:
            return
        trainer, pl_module = moment.trainer, moment.pl_module

        def loss_of(batch: Any) -> Tensor:
            return scoring_loss(trainer, pl_module, batch)

        with without_trace(pl_module), torch.compiler.set_stance("force_eager"):
            pl_module.eval()
            held_out = self._held_out(trainer)
            batches = self._attacked(pl_module, held_out) or held_out
            for unit, members in self._units.items():
                weights = [p for name in members if (p := self._structure.parameters[name]).ndim >= 2]
                found = [
                    robust_criticality(weight, batches, loss_of, self.radius, self.epochs, self.ascent_lr)
                    for weight in weights
                ]
                self._criticality[unit] = max(found)
        parameters = self._structure.parameters
        self._before = {name: parameters[name].detach().clone() for name in self._units[self._least_critical()]}

    def _least_critical(self) -> str:
        return min(self._criticality, key=lambda unit: self._criticality[unit])

    @override
    def select(self, draw: Draw) -> list[str]:
        return [self._least_critical()]

    def _held_out(self, trainer: Trainer) -> list[Any]:
        """The same held-out batches whenever they are asked for."""
        loaders = source_loaders(trainer, self.score_on, "RiFT")
        return sample_batches(trainer, loaders, self.num_batches, draw_generator(self.seed, 0, "held out"))

    def _attacked(self, pl_module: LightningModule, batches: Sequence[Any]) -> list[Any] | None:
        """The batches as the module's own attack makes them, with the same randomness each time; None without one."""
        attack = getattr(pl_module, "robust_batch", None)
        if attack is None:
            return None
        torch.manual_seed(self.seed)  # inside without_trace
        return [attack(batch) for batch in batches]

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._before or not self.interpolation_steps:
            return
        parameters = {name: self._structure.parameters[name] for name in self._before}
        after = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        alphas = [index / self.interpolation_steps for index in range(self.interpolation_steps + 1)]
        losses: list[float] = []
        robust_losses: list[float] = []

        def mean_loss(batches: Sequence[Any]) -> float:
            losses = [scoring_loss(trainer, pl_module, batch).detach().float() for batch in batches]
            return float(mean_over_ranks(torch.stack(losses).mean()))

        with without_trace(pl_module), torch.compiler.set_stance("force_eager"):
            pl_module.eval()
            batches = self._held_out(trainer)
            for alpha in alphas:
                _assign(parameters, interpolate(self._before, after, alpha))
                attacked = self._attacked(pl_module, batches)  # the attack is on the model at hand
                with torch.no_grad():
                    losses.append(mean_loss(batches))
                    if attacked is not None:
                        robust_losses.append(mean_loss(attacked))
        self._alpha = alphas[best_interpolation(losses, robust_losses or None)]
        _assign(parameters, interpolate(self._before, after, self._alpha))

    @override
    def method_state(self) -> dict[str, Any]:
        return {"criticality": dict(self._criticality), "before": {n: v.clone() for n, v in self._before.items()}}

    @override
    def load_method_state(self, state: dict[str, Any]) -> None:
        parameters = self._structure.parameters
        self._criticality = dict(state["criticality"])
        self._before = {name: value.to(parameters[name].device) for name, value in state["before"].items()}

    @override
    def describe(self) -> dict[str, Any]:
        """As for every method, with each module's criticality and the interpolation that was kept."""
        return {**super().describe(), "criticality": dict(self._criticality), "alpha": self._alpha}


def _assign(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])
