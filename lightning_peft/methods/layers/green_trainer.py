"""GreenTrainer: the tensors that matter most per FLOP, within a budget of FLOPs.

At each draw, measure what every tensor's training would cost in back-propagation and how much the loss gains from it,
then choose the set of the largest gain whose step stays within a fraction of full fine-tuning's FLOPs (Huang et al.
2024, arXiv:2309.13192, sections 3.1 to 3.3).
"""

from __future__ import annotations

import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from typing_extensions import override

from lightning_peft.core.blocks import Structure
from lightning_peft.core.draw import Draw
from lightning_peft.core.flops import StepCost, count_step_flops, measure_step
from lightning_peft.core.plan import Claim
from lightning_peft.core.rng import get_rng_state, set_rng_state
from lightning_peft.core.trainable import StatePolicy, set_flags
from lightning_peft.errors import ConfigError, EffectError
from lightning_peft.methods.base import MethodCallback, Redraw
from lightning_peft.methods.moment import Moment
from lightning_peft.methods.scoring import mean_over_ranks, scoring_gradients, scoring_loss, without_trace

__all__ = ["GreenTrainer", "backward_budget", "fill_budget", "rehearsed_step", "select_tensors"]

_SMALLEST_BACKWARD = Fraction(1, 20)
"""Share of full back-propagation that the budget never falls below, as in the authors' code."""


def backward_budget(flops_fraction: float, forward_flops: int, backward_flops: int) -> Fraction:
    """FLOPs of back-propagation that make a step cost ``flops_fraction`` of full fine-tuning's.

    The forward pass is paid in full, so that a third or so of the step cannot be saved; the budget is at least 5 % of
    full back-propagation.

    Args:
        flops_fraction: Of forward plus full back-propagation, in ``(0, 1]`` (the paper's rho).
        forward_flops: Of the forward pass.
        backward_flops: Of full back-propagation.
    """
    wanted = Fraction(str(flops_fraction)) * (forward_flops + backward_flops) - forward_flops
    return max(wanted, _SMALLEST_BACKWARD * backward_flops)


def select_tensors(
    importance: Sequence[float],
    weight_flops: Sequence[int],
    reach_flops: Sequence[int],
    budget: float | Fraction,
    resolution: int = 10_000,
) -> list[int]:
    """Choose tensors of the largest total importance within a budget: an exact knapsack in one pass.

    The gradient passes tensor 0 first. A set costs the weight gradients of its members plus ``reach_flops`` of its
    deepest member. For each possible deepest member ``j``, what is left of the budget after reaching and training ``j``
    is filled from ``0 .. j - 1``, which is a plain 0/1 knapsack, and all of them share one table.

    Args:
        importance: Of each tensor; one that is not positive is never chosen.
        weight_flops: FLOPs of each tensor's own gradient.
        reach_flops: FLOPs to be spent to reach each tensor, never decreasing.
        budget: FLOPs that may be spent. With integer costs and a budget up to ``resolution`` the result is optimal;
            above, costs are rounded up to ``budget / resolution``, so that the budget holds in any case.
        resolution: Columns of the table.

    Returns:
        Indices in ascending order; empty if no tensor of positive importance fits.

    Example:
        >>> select_tensors([3, 2, 4], weight_flops=[2, 2, 2], reach_flops=[0, 1, 4], budget=6)
        [0, 1]
    """
    budget = Fraction(budget)
    columns = min(resolution, int(budget)) if budget > 0 else 0
    scale = Fraction(columns) / budget if budget > resolution else Fraction(1)
    best = torch.zeros(columns + 1, dtype=torch.float64)
    taken = torch.zeros(len(importance), columns + 1, dtype=torch.bool)
    found, deepest, column = 0.0, -1, 0
    for index, (value, weight, reach) in enumerate(zip(importance, weight_flops, reach_flops, strict=True)):
        if value <= 0 or weight + reach > budget:
            continue
        left = int((budget - weight - reach) * scale)
        if value + float(best[left]) > found:
            found, deepest, column = value + float(best[left]), index, left
        units = -int(-weight * scale // 1)
        if units <= columns:
            with_it = torch.full_like(best, -torch.inf)
            with_it[units:] = best[: columns + 1 - units] + value
            taken[index] = with_it > best
            best = torch.maximum(best, with_it)
    if deepest < 0:
        return []
    chosen = [deepest]
    for index in range(deepest - 1, -1, -1):
        if taken[index, column]:
            chosen.append(index)
            column -= -int(-weight_flops[index] * scale // 1)
    return chosen[::-1]


def fill_budget(
    cost: StepCost, importance: Mapping[str, float], budget: float | Fraction, paid: Collection[str] = ()
) -> list[str]:
    """Choose tensors by :func:`select_tensors` until the budget of the *exact* cost is used up.

    The chain that the knapsack sees costs too much where the model branches (queries, keys and values), so that FLOPs
    are left over. What is chosen counts as paid, and the rest is chosen from again.

    Args:
        cost: What training costs.
        importance: Of each tensor to choose from.
        budget: FLOPs of back-propagation.
        paid: Tensors that train in any case, within the budget.

    Returns:
        Names in the order of ``importance``. If none of positive importance fits, the most important one that does;
        empty if no tensor fits.
    """
    budget = Fraction(budget)
    chosen: set[str] = set()
    while True:
        trained = [*paid, *chosen]
        chain = cost.linear([name for name, gain in importance.items() if gain > 0 and name not in chosen], trained)
        gains = [importance[name] for name in chain.order]
        left = budget - cost.backward_flops(trained)
        picked = select_tensors(gains, chain.weight_flops, chain.reach_flops, left)
        if not picked:
            break
        chosen.update(chain.order[index] for index in picked)
    if not chosen:
        fitting = [name for name in importance if name in cost.names and cost.backward_flops([*paid, name]) <= budget]
        chosen.update(sorted(fitting, key=lambda name: -importance[name])[:1])
    return [name for name in importance if name in chosen]


@contextmanager
def rehearsed_step(
    optimizers: Sequence[torch.optim.Optimizer], parameters: Sequence[nn.Parameter]
) -> Iterator[list[Tensor]]:
    """Take one step of ``optimizers`` from the gradients of ``parameters``, and take it back at the end, bit for bit.

    The step is the optimizers' own, with copies of their state, and without weight decay: it is what the loss alone
    asks for. Step hooks do not run. Where all learning rates are 0 (the first step of a warm-up), the rates that the
    schedule started from are used.

    Yields:
        The values of ``parameters`` before the step.

    Raises:
        ConfigError: If an optimizer wraps another one, whose state is out of sight.
    """
    for optimizer in optimizers:
        inner = next((v for v in vars(optimizer).values() if isinstance(v, torch.optim.Optimizer)), None)
        if inner is not None:
            raise ConfigError(
                f"{type(optimizer).__name__} wraps {type(inner).__name__}, whose state cannot be put back after a "
                "trial step. Return the inner optimizer from configure_optimizers, or use a method without trial steps."
            )
    members = {id(parameter) for parameter in parameters}
    values = [parameter.detach().clone() for parameter in parameters]
    attributes = [dict(vars(optimizer)) for optimizer in optimizers]
    groups = [[dict(group) for group in optimizer.param_groups] for optimizer in optimizers]
    asleep = not any(float(group["lr"]) for optimizer in optimizers for group in optimizer.param_groups)
    try:
        for optimizer in optimizers:
            copies = {
                key: tree_map(_clone, state)
                for key, state in optimizer.state.items()
                if id(key) in members or not isinstance(key, Tensor)
            }
            optimizer.state = defaultdict(dict, copies)
            optimizer._optimizer_step_pre_hooks = OrderedDict()
            optimizer._optimizer_step_post_hooks = OrderedDict()
            for group in optimizer.param_groups:
                group.update({key: _clone(value) for key, value in group.items() if key != "params"})
                if "weight_decay" in group:
                    group["weight_decay"] = 0.0
                if asleep:
                    group["lr"] = group.get("initial_lr", group["lr"])
            optimizer.step()
        yield values
    finally:
        for optimizer, before, old in zip(optimizers, attributes, groups, strict=True):
            vars(optimizer).clear()
            vars(optimizer).update(before)
            for group, settings in zip(optimizer.param_groups, old, strict=True):
                group.clear()
                group.update(settings)
        with torch.no_grad():
            for parameter, value in zip(parameters, values, strict=True):
                parameter.copy_(value)


def _clone(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


class GreenTrainer(MethodCallback):
    """Train the tensors that lower the loss most within a budget of FLOPs (adaptive back-propagation).

    A step costs at most ``flops_fraction`` of full fine-tuning's FLOPs, forward pass included: FLOPs are saved where
    back-propagation stops early and where weight gradients are not computed. The forward pass cannot be saved, so that
    fractions below about 0.4 leave next to nothing to train. Each draw costs about three full steps and, while it
    lasts, the memory of full fine-tuning (all gradients, copies of the weights and of optimizer state): the method
    saves time and energy, not memory.

    Use it where the time or energy of training is what limits, with a draw per epoch or every few hundred steps.

    FLOPs are counted on the autograd graph of the batch at hand, for any model: matrix products, convolutions and
    attention. The gain of a tensor is ``-sum(g * dw)``, to first order the loss that one step of your optimizer takes
    off through it: ``dw`` is its change in that step, ``g`` its gradient after it, both averaged over all ranks. The
    step is rolled back.

    With ``torch.compile``, each draw compiles each block that it cuts through anew; scoring runs uncompiled.

    The budget is that of a step in which this method trains alone: what other methods of the run train comes on top.

    Args:
        flops_fraction: Of a full fine-tuning step's FLOPs, in ``(0, 1]`` (the paper's rho). 1 trains everything.
        redraw: ``"epoch"``, a number of optimizer steps, or ``"never"``: one draw, at the first batch.
        scope: What is chosen from, tensor by tensor.
        always: What trains all the time beside it, within the budget.
        state: What becomes of optimizer state of tensors that rest.
        seed: Without effect on the choice, which is not random.

    Raises:
        ConfigError: If the fraction is out of range, or, from the fit, if nothing fits into the budget.

    Example:
        >>> from lightning_peft import GreenTrainer
        >>> GreenTrainer(flops_fraction=0.5, redraw="epoch").describe()["num_units"]
        0

    Paper:
        K. Huang, H. Yin, H. Huang, W. Gao: Towards Green AI in Fine-tuning Large Language Models via Adaptive
        Backpropagation, ICLR 2024, arXiv:2309.13192, equation (1) and Algorithm 1.

    Differs from the paper:
        FLOPs are measured on the real graph, not taken from a table for OPT and BLOOM. The knapsack over the paper's
        chain of tensors is optimal; that of the authors' code, which keeps one candidate per depth and budget, is not.
        Where the model branches, the budget that the chain leaves over is spent too. Trial steps leave nothing behind
        in the optimizer and are made without weight decay, which would pass for a gain or a loss. If no tensor that
        fits has a gain, the one with the smallest loss trains.
    """

    def __init__(
        self,
        flops_fraction: float = 0.5,
        redraw: Redraw = "epoch",
        scope: str | list[str] = "all",
        always: Sequence[str] = (),
        state: StatePolicy = "keep",
        seed: int = 0,
    ) -> None:
        super().__init__(scope=scope, always=always, redraw=redraw, state=state, seed=seed)
        if not 0 < flops_fraction <= 1:
            raise ConfigError(
                f"GreenTrainer(flops_fraction={flops_fraction!r}): the fraction of full fine-tuning's FLOPs must be in "
                "(0, 1]."
            )
        self.flops_fraction = float(flops_fraction)
        self.redraw: Redraw = redraw
        self._chosen: list[str] = []
        self._importance: dict[str, float] = {}
        self._reports: list[dict[str, Any]] = []

    @property
    @override
    def needs_whole_parameters(self) -> bool:
        return True

    @property
    @override
    def needs_batch(self) -> bool:
        return True

    @property
    def importance(self) -> dict[str, float]:
        """Gain of each tensor at the last draw, in units of the loss."""
        return dict(self._importance)

    @override
    def make_units(self, structure: Structure, names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
        return {name: (name,) for name in names}

    @override
    def bind(self, structure: Structure, user_flags: dict[str, bool]) -> Claim:
        claim = super().bind(structure, user_flags)
        self._full = [name for name, flag in user_flags.items() if flag or name in self.selectable]
        return claim

    @override
    def begin(self, step: int, epoch: int, global_step: int, continues: bool) -> None:
        if not continues:
            self._chosen, self._importance, self._reports = [], {}, []
        super().begin(step, epoch, global_step, continues)

    @override
    def select(self, draw: Draw) -> list[str]:
        return self._chosen

    @override
    def observe(self, moment: Moment) -> None:
        if self.draw_due(moment.step, moment.epoch) == self._draw_index:
            return
        parameters = self._structure.parameters
        with without_trace(moment.pl_module), _flags_put_back(parameters), torch.compiler.set_stance("force_eager"):
            cost, self._importance = self._score(moment)
            budget = self._budget(cost)
            always = sorted(self.selectable - self.scope_names)
            self._chosen = self._choose(cost, budget, always)
            trained = [*always, *self._chosen]
            set_flags(parameters, {name: name in trained for name in parameters})
            measured = count_step_flops(lambda: _loss(moment))
        report = {
            "step": moment.trainer.global_step,
            "full_flops": cost.step_flops(),
            "forward_flops": cost.forward_flops,
            "budget_flops": int(cost.forward_flops + budget),
            "planned_flops": cost.step_flops([*trained, *self._forced()]),
            "measured_flops": int(moment.trainer.strategy.broadcast(measured)),
        }
        self._tell(report, len(trained))
        self._reports.append(report)

    def _score(self, moment: Moment) -> tuple[StepCost, dict[str, float]]:
        """Count a full step on this batch and find what each tensor of the scope contributes to a step's gain."""
        parameters = self._structure.parameters
        set_flags(parameters, {name: name in self._full for name in parameters})
        rng = get_rng_state()
        cost, _, gradients = measure_step(lambda: _loss(moment), {name: parameters[name] for name in self._full})
        cost = moment.trainer.strategy.broadcast(cost)
        names = [name for name in parameters if name in self.selectable]
        members = [parameters[name] for name in names]
        for parameter, gradient in zip(members, _averaged([gradients[name] for name in names], members), strict=True):
            parameter.grad = gradient
        del gradients
        _clip(moment.trainer)
        with rehearsed_step(moment.trainer.optimizers, members) as before:
            for parameter in members:
                parameter.grad = None
            set_rng_state(rng)  # the same dropout: the loss is the same function of the weights
            after = scoring_gradients(_loss(moment), members)
            gains = torch.stack([_gain(grad, new, old) for grad, new, old in zip(after, members, before, strict=True)])
        gains = mean_over_ranks(gains).tolist()
        bad = [name for name, gain in zip(names, gains, strict=True) if gain != gain or abs(gain) == float("inf")]
        if bad:
            raise EffectError(
                f"{self.label}: the importance of {len(bad)} tensor(s), such as {bad[0]}, is not finite: one step on "
                "this batch makes the loss overflow. Lower the learning rate, or clip gradients (gradient_clip_val)."
            )
        if not any(gains):
            warnings.warn(
                f"{self.label}: no tensor has any importance; a step of the optimizer changes nothing to first order "
                "(learning rate 0? weights of too few bits?). The choice is arbitrary.",
                stacklevel=2,
            )
        return cost, {name: gain for name, gain in zip(names, gains, strict=True) if name in self.scope_names}

    def _budget(self, cost: StepCost) -> Fraction:
        budget = backward_budget(self.flops_fraction, cost.forward_flops, cost.backward_flops())
        spent = float((cost.forward_flops + budget) / cost.step_flops())
        if self._draw_index < 0 and spent > self.flops_fraction + 1e-9:
            warnings.warn(
                f"{self.label}: flops_fraction={self.flops_fraction} cannot be met, since the forward pass alone takes "
                f"{cost.forward_flops / cost.step_flops():.3f} of a full step. The budget is {spent:.3f}, with 5 % of "
                "back-propagation.",
                stacklevel=2,
            )
        return budget

    def _forced(self) -> list[str]:
        """Tensors whose gradient is computed, or nearly so, whatever trains."""
        hooked = any(getattr(module, "_require_grads_hook", None) for module in self._structure.modules.values())
        return list(self._structure.roles["embeddings"]) if hooked else []

    def _choose(self, cost: StepCost, budget: Fraction, always: list[str]) -> list[str]:
        if self.flops_fraction == 1:
            return list(self.units)
        forced = self._forced()
        if forced and self._draw_index < 0:
            warnings.warn(
                f"{self.label}: the embeddings' output is made to require a gradient (enable_input_require_grads(), "
                "which transformers calls when it turns activation checkpointing on), so that back-propagation always "
                "passes through the whole model. Call disable_input_require_grads() to let it stop early.",
                stacklevel=2,
            )
        paid = [*always, *forced]
        chosen = fill_budget(cost, self._importance, budget, paid)
        if chosen:
            return chosen
        cheapest = min(cost.backward_flops([*paid, name]) for name in self.units if name in cost.names)
        needed = (cost.forward_flops + cheapest) / cost.step_flops()
        raise ConfigError(
            f"{self.label}: no tensor fits into flops_fraction={self.flops_fraction}; the cheapest one needs "
            f"{needed:.3f} of a full step. Take a larger fraction, or fewer tensors in always."
        )

    def _tell(self, report: dict[str, Any], num_tensors: int) -> None:
        full, budget, measured = report["full_flops"], report["budget_flops"], report["measured_flops"]
        if measured > budget:
            warnings.warn(
                f"{self.label}: a step takes {measured} FLOPs, more than the budget of {budget}: something makes "
                "back-propagation go further than the chosen tensors ask for.",
                stacklevel=2,
            )
        if self._draw_index < 0:
            rank_zero_info(
                f"{self.label} trains {num_tensors} tensors at {measured / full:.3f} of full fine-tuning's {full:.3g} "
                f"FLOPs per step (budget {budget / full:.3f})."
            )

    @override
    def method_state(self) -> dict[str, Any]:
        return {"importance": self._importance, "reports": self._reports}

    @override
    def load_method_state(self, state: dict[str, Any]) -> None:
        self._importance, self._reports = dict(state["importance"]), [dict(report) for report in state["reports"]]

    @override
    def describe(self) -> dict[str, Any]:
        """As for every method; and of each draw the FLOPs of a step: full, budget, planned and measured."""
        latest = self._reports[-1] if self._reports else {}
        return {**super().describe(), **{k: v for k, v in latest.items() if k != "step"}, "draws": list(self._reports)}


def _loss(moment: Moment) -> Tensor:
    return scoring_loss(moment.trainer, moment.pl_module, moment.batch, moment.batch_idx)


@contextmanager
def _flags_put_back(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    flags = {name: parameter.requires_grad for name, parameter in parameters.items()}
    try:
        yield
    finally:
        set_flags(parameters, flags)


def _averaged(gradients: list[Tensor | None], parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
    """Gradients averaged over all ranks; one that is missing on some rank counts as zero there."""
    present = mean_over_ranks(torch.tensor([g is not None for g in gradients], device=parameters[0].device).float())
    return [
        mean_over_ranks(torch.zeros_like(parameter) if gradient is None else gradient) if there else None
        for gradient, parameter, there in zip(gradients, parameters, present.tolist(), strict=True)
    ]


def _clip(trainer: Trainer) -> None:
    """Clip as the Trainer does before each step."""
    if trainer.gradient_clip_val is None:
        return
    algorithm = (
        {} if trainer.gradient_clip_algorithm is None else {"gradient_clip_algorithm": trainer.gradient_clip_algorithm}
    )
    for optimizer in trainer.optimizers:
        trainer.precision_plugin.clip_gradients(optimizer, trainer.gradient_clip_val, **algorithm)


def _gain(gradient: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    if gradient is None:
        return torch.zeros((), device=new.device)
    dense = gradient.to_dense() if gradient.layout != torch.strided else gradient
    return -(dense.float() * (new.detach().float() - old.float())).sum()
