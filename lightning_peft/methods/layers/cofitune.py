"""CoFiTune: train the feed-forward of some middle layers only, and there spare the units that matter.

Coarse: a range of layers and some of their modules train, everything else is frozen. Fine: units whose response the
model's output depends on, as the divergence between two passes with dropout shows, are changed less: their share of
each update is multiplied by one minus their importance (Zhang et al. 2024, arXiv:2404.10306).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.core.blocks import Structure
from lightning_peft.core.draw import Draw, draw_generator
from lightning_peft.core.trainable import set_flags
from lightning_peft.errors import ConfigError, ScopeError, suggest
from lightning_peft.methods.arguments import is_number, is_whole
from lightning_peft.methods.base import MethodCallback
from lightning_peft.methods.batches import sample_batches
from lightning_peft.methods.heads import HeadLayout, find_heads
from lightning_peft.methods.logits import batch_logits
from lightning_peft.methods.moment import Moment
from lightning_peft.methods.projections import (
    LayerRange,
    Projection,
    check_layer_range,
    find_projections,
    output_axis_mask,
    product_of,
)
from lightning_peft.methods.scoring import mean_over_ranks, scoring_gradients, without_trace

__all__ = ["CoFiTune", "SoftMask", "disagreement", "head_scores", "unit_importance", "unit_scores"]

SoftMask = Literal["update", "gradient", "none"]
"""What is multiplied by one minus the importance: what the optimizer adds to the weights, the gradients, or nothing."""

_NORMALISING = re.compile(r"adam|adagrad|adadelta|adafactor|rmsprop|rprop|lion|lamb|lars|sophia|muon", re.IGNORECASE)


def disagreement(logits: Tensor, others: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the divergence ``KL(softmax(others) || softmax(logits))``, summed over all positions.

    Args:
        logits: From one pass.
        others: From another pass over the same batch.
        weights: Of each position, such as an attention mask; default 1.

    Shapes:
        ``(..., classes)`` twice and ``(...)``; returns a scalar.
    """
    per_position = nn.functional.kl_div(
        logits.log_softmax(-1), others.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    return (per_position if weights is None else per_position * weights).sum()


def unit_scores(weight: Tensor, grad: Tensor, out_axis: int) -> Tensor:
    """Return the derivative of the loss by a factor on each output unit of a matrix, where the factor is 1.

    Multiplying unit ``j`` by ``m`` is multiplying its weights by ``m``, so that the derivative is
    ``sum_i w_ji * g_ji``; a bias adds its own product.

    Args:
        weight: The matrix, or all experts' matrices in one tensor.
        grad: Its gradient.
        out_axis: Axis of the output units.

    Shapes:
        Returns ``(units,)``; ``(experts, units)`` if ``out_axis`` is not among the first two of two dimensions.
    """
    products = weight.detach().float() * grad.float()
    is_stack = weight.ndim == 3 and out_axis > 0
    kept = {out_axis, 0} if is_stack else {out_axis}
    axes = [axis for axis in range(weight.ndim) if axis not in kept]
    return products.sum(axes) if axes else products


def head_scores(weight: Tensor, grad: Tensor, out_axis: int, num_heads: int) -> Tensor:
    """Return the derivative of the loss by a factor on each attention head's response.

    The response enters through the columns of attention's output projection that belong to the head.

    Args:
        weight: The output projection.
        grad: Its gradient.
        out_axis: Axis of its output units.
        num_heads: Number of (query) heads.

    Shapes:
        Returns ``(num_heads,)``.
    """
    columns = (weight.detach().float() * grad.float()).sum(out_axis)
    return columns.reshape(num_heads, -1).sum(1)


def unit_importance(scores: Tensor) -> Tensor:
    """Return ``|tanh(z)|`` of the scores standardised over all units of the matrix: 0 free to change, near 1 spared.

    Units that all score the same, or a single one, are all free.

    Example:
        >>> unit_importance(torch.tensor([0.0, 1.0, 2.0]))
        tensor([0.7616, 0.0000, 0.7616])
    """
    if scores.numel() < 2:
        return torch.zeros_like(scores)
    centred = scores - scores.mean()
    spread = centred.square().sum().div(scores.numel() - 1).sqrt()
    return torch.tanh(centred / spread).abs().nan_to_num(0.0) if spread > 0 else torch.zeros_like(scores)


_PER_HEAD = ("query", "key", "value", "qkv")


class CoFiTune(MethodCallback):
    """Train some modules in a range of layers, and there change the units less that the model depends on.

    By default these are the up- and down-projections of the feed-forward in the second quarter of the blocks: a tenth
    of Llama-2-7B's parameters have gradients and optimizer state, and back-propagation ends below the range. The
    importance of units is measured once, before the first step, with ``2 * num_batches`` forward and ``num_batches``
    backward passes. With ``soft_mask="update"`` each step copies the weights that train.

    Use it to teach an aligned model a speciality without losing its versatility.

    A unit is an attention head or an output unit of any other projection: each row of ``up`` and ``gate`` is an
    intermediate unit, each row of ``down`` an output unit. Its importance is ``|tanh(z)|`` of the derivative of ``KL``
    between two passes with dropout by a factor on the unit's output, standardised within its matrix. Logits are found
    in your ``training_step``; if they are not, give your LightningModule a method ``batch_logits(batch)``.

    *A mask on gradients that is constant in time does next to nothing under Adam*, which divides each weight's gradient
    by its own size; it binds under SGD. So the default multiplies the optimizer's update, weight decay included, by one
    minus the importance: under SGD without weight decay that is the same, under Adam it is what the paper means to do.

    Args:
        layer_range: Which blocks of each stack, as fractions of the depth: ``(0.25, 0.5)`` is the second quarter.
        modules: What trains in them: kinds (``"up"``, ``"gate"``, ``"down"``, ``"query"``, ``"key"``, ``"value"``,
            ``"qkv"``, ``"output"``), groups (``"ffn"``, ``"attention"``), module names as in the model
            (``"up_proj"``, ``"mlp.experts"``), or ``"all"``.
        soft_mask: What is multiplied by one minus the importance: each ``"update"`` of the weights; each
            ``"gradient"``, before clipping, as the paper has it; ``"none"``: the coarse level alone.
        num_batches: Training batches that importance is measured on, drawn at random; ranks average.
        dropout: Rate of the dropout behind attention and feed-forward in the two passes, in ``[0, 1)``, beside the
            model's own; the authors' value. 0 adds none, for models that have dropout.
        scope: What the product of layers and modules is taken from.
        always: What trains beside it, unmasked.
        seed: Seed of the choice of batches and of the passes' dropout.

    Raises:
        ConfigError: If an argument is out of range. From the fit, if the two passes do not differ, there are no logits,
            or heads cannot be told from a matrix.
        ScopeError: From the fit, if no block of the range has one of the modules.

    Example:
        >>> from lightning_peft import CoFiTune
        >>> CoFiTune(layer_range=(0.5, 0.75), modules=["ffn"]).layer_range
        (0.5, 0.75)

    Paper:
        H. Zhang, Y. Wu, D. Li, S. Yang, R. Zhao, Y. Jiang, F. Tan: Balancing Speciality and Versatility: a Coarse to
        Fine Framework for Supervised Fine-tuning Large Language Model, Findings of ACL 2024, arXiv:2404.10306. The
        search for layers and modules is :meth:`lightning_peft.SubsetSearch.tree`.

    Differs from the paper:
        The paper multiplies gradients; see above. The authors' code lays the mask along the flattened weight, so that
        it does not meet the units it was measured on, and breaks with grouped-query attention; here each mask lies
        along the axis of its units. It measures on the whole training set and counts padding. Rows of ``gate``, and
        output units of attention, which it leaves unmasked, are treated like the others when they train.
    """

    def __init__(
        self,
        layer_range: tuple[float, float] = (0.25, 0.5),
        modules: Sequence[str] = ("up", "down"),
        soft_mask: SoftMask = "update",
        num_batches: int = 16,
        dropout: float = 0.003,
        scope: str | list[str] = "blocks",
        always: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        super().__init__(scope=scope, always=always, redraw="never", state="keep", seed=seed)
        problems = []
        try:
            self.layer_range: LayerRange = check_layer_range(layer_range)
        except ConfigError as error:
            problems.append(str(error))
        names = [modules] if isinstance(modules, str) else modules
        if not isinstance(names, (list, tuple)) or not names or not all(isinstance(name, str) for name in names):
            problems.append(f"modules={modules!r}: a kind, a group or a module's name, or a list of them")
        if soft_mask not in get_args(SoftMask):
            problems.append(f"soft_mask={soft_mask!r}: {suggest(str(soft_mask), get_args(SoftMask))}")
        if not is_whole(num_batches, least=1):
            problems.append(f"num_batches={num_batches!r} must be a whole number from 1 on")
        if not is_number(dropout) or not 0 <= dropout < 1:
            problems.append(f"dropout={dropout!r} must be in [0, 1)")
        if problems:
            raise ConfigError(f"CoFiTune: {'; '.join(problems)}")
        self.modules = tuple(names)
        self.soft_mask: SoftMask = soft_mask
        self.num_batches = int(num_batches)
        self.dropout = float(dropout)
        self._projections: dict[str, Projection] = {}
        self._forget()

    def _forget(self) -> None:
        self._importance: dict[str, Tensor] = {}
        self._masks: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}

    @property
    def importance(self) -> dict[str, Tensor]:
        """Unit of the scope -> importance of each of its output units, from the first batch on."""
        return {unit: values.clone() for unit, values in self._importance.items()}

    @property
    @override
    def needs_whole_parameters(self) -> bool:
        return self.soft_mask != "none"

    @override
    def make_units(self, structure: Structure, names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
        """One unit per matrix with its bias: exactly the product of layers and modules."""
        units = product_of(structure, self.layer_range, self.modules, names)
        if not units:
            raise ScopeError(
                f"{self.label}: nothing of modules={list(self.modules)} in layer_range={self.layer_range} is in the "
                "scope, or all of it was frozen before."
            )
        self._projections = {p.unit: p for p in find_projections(structure) if p.unit in units}
        if self.soft_mask != "none" and not self._projections:
            raise ConfigError(
                f"{self.label}: no unit of modules={list(self.modules)} is a projection with output units to mask. "
                "Take soft_mask='none'."
            )
        return units

    @override
    def select(self, draw: Draw) -> list[str]:
        return list(self.units)

    @override
    def prepare_optimizers(self, trainer: Trainer) -> None:
        kinds = {type(o).__name__ for o in trainer.strategy.optimizers if _NORMALISING.search(type(o).__name__)}
        if self.soft_mask == "gradient" and kinds:
            rank_zero_warn(
                f"CoFiTune(soft_mask='gradient') does next to nothing under {', '.join(sorted(kinds))}: it divides "
                "each gradient by its own size, and with it the constant mask. Take soft_mask='update', or SGD."
            )

    @override
    def begin(self, step: int, epoch: int, global_step: int, continues: bool) -> None:
        if not continues:
            self._forget()
        super().begin(step, epoch, global_step, continues)

    # ------------------------------------------------------------------ importance

    @override
    def observe(self, moment: Moment) -> None:
        if self._importance or self.soft_mask == "none":
            return
        trainer, pl_module = moment.trainer, moment.pl_module
        parameters = self._structure.parameters
        heads = {unit: self._heads_of(p) for unit, p in self._projections.items() if p.kind in _PER_HEAD}
        measured = {p.unit: p for p in self._projections.values() if p.kind not in _PER_HEAD}
        measured.update({found.output.unit: found.output for found in heads.values()})
        weights = [parameters[name] for p in measured.values() for name in p.members]
        with without_trace(pl_module), _all_trainable(weights), torch.compiler.set_stance("force_eager"):
            generator = draw_generator(self.seed, 0, "batches")
            batches = sample_batches(trainer, trainer.train_dataloader, self.num_batches, generator)
            torch.manual_seed(draw_generator(self.seed, trainer.global_rank, "dropout").initial_seed())
            totals = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
            with _dropout_behind(self._structure, self.dropout):
                for batch in batches:
                    first, second = (batch_logits(trainer, pl_module, self._structure, batch) for _ in range(2))
                    loss = disagreement(first, second, _attention_mask(batch, first))
                    for total, grad in zip(totals, scoring_gradients(loss, weights), strict=True):
                        if grad is not None:
                            total += grad.float()
        gradients = dict(zip((name for p in measured.values() for name in p.members), totals, strict=True))
        raw: dict[str, Tensor] = {}
        for unit, projection in measured.items():
            raw[unit] = mean_over_ranks(self._scores(projection, gradients))
        for unit, found in heads.items():
            weight = found.output.weight
            scores = head_scores(parameters[weight], gradients[weight], found.output.out_axis, found.num_query_heads)
            raw[f"heads of {unit}"] = mean_over_ranks(scores)
        self._check(raw)
        for unit, projection in self._projections.items():
            if unit in heads:
                values = heads[unit].spread(unit_importance(raw[f"heads of {unit}"]))
            else:
                values = unit_importance(raw[unit])
            self._importance[projection.unit] = values.cpu()

    def _scores(self, projection: Projection, gradients: Mapping[str, Tensor]) -> Tensor:
        parameters = self._structure.parameters
        scores = unit_scores(parameters[projection.weight], gradients[projection.weight], projection.out_axis)
        for name in projection.members:
            if name != projection.weight and parameters[name].shape == scores.shape:
                scores = scores + parameters[name].detach().float() * gradients[name]
        return scores

    def _check(self, raw: Mapping[str, Tensor]) -> None:
        bad = [unit for unit, scores in raw.items() if not bool(scores.isfinite().all())]
        if bad:
            raise ConfigError(f"CoFiTune: the importance of {len(bad)} unit(s) is not finite, such as {bad[0]}.")
        if not any(bool(scores.any()) for scores in raw.values()):
            raise ConfigError(
                f"CoFiTune cannot measure importance: two passes over the same batch gave the same logits. With "
                f"dropout={self.dropout} and no dropout of the model's own there is nothing to compare; take the "
                "default 0.003."
            )

    def _heads_of(self, projection: Projection) -> HeadLayout:
        """Find how the output units of a query, key or value projection fall into heads.

        Raises:
            ConfigError: If it cannot be told.
        """
        found = find_heads(self._structure, projection)
        if found is None:
            num_units = self._structure.parameters[projection.weight].shape[projection.out_axis]
            raise ConfigError(
                f"CoFiTune cannot tell which of the {num_units} output units of {projection.unit} belong to which "
                "head. Leave attention out of modules, or take soft_mask='none'."
            )
        return found

    # ------------------------------------------------------------------ mask

    def _masks_of(self, optimizer: torch.optim.Optimizer) -> Iterator[tuple[nn.Parameter, str, Tensor]]:
        """What this optimizer holds: parameter, name, and one minus the importance in a shape that broadcasts."""
        parameters = self._structure.parameters
        held = {id(member) for group in optimizer.param_groups for member in group["params"]}
        for unit, values in self._importance.items():
            projection = self._projections[unit]
            for name in projection.members:
                parameter = parameters[name]
                if name not in self._active or id(parameter) not in held:
                    continue
                if name not in self._masks:
                    keep = (1 - values).to(parameter.device)
                    self._masks[name] = output_axis_mask(keep, parameter, projection.out_axis)
                yield parameter, name, self._masks[name]

    @override
    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        for parameter, name, mask in self._masks_of(optimizer):
            if self.soft_mask == "update":
                self._before[name] = parameter.detach().clone()
            elif parameter.grad is not None:
                parameter.grad.mul_(mask)

    @override
    @torch.no_grad()
    def stepped(self, optimizer: torch.optim.Optimizer) -> None:
        for parameter, name, mask in self._masks_of(optimizer):
            before = self._before.pop(name, None)
            if before is not None:
                dtype = torch.promote_types(parameter.dtype, torch.float32)
                weight = mask.to(dtype).expand_as(parameter)
                parameter.copy_(torch.lerp(before.to(dtype), parameter.to(dtype), weight))

    @override
    def finished(self) -> None:
        self._before, self._masks = {}, {}

    @override
    def method_state(self) -> dict[str, Any]:
        return {"importance": {unit: values.clone() for unit, values in self._importance.items()}}

    @override
    def load_method_state(self, state: dict[str, Any]) -> None:
        self._importance, self._masks = dict(state["importance"]), {}

    @override
    def describe(self) -> dict[str, Any]:
        """As for every method, with the mean importance of each matrix's units."""
        means = {unit: float(values.mean()) for unit, values in self._importance.items()}
        return {**super().describe(), "mean_importance": means}


def _attention_mask(batch: Any, logits: Tensor) -> Tensor | None:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.shape == logits.shape[:-1] else None


@contextmanager
def _all_trainable(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    flags = {str(index): parameter for index, parameter in enumerate(parameters)}
    before = {index: parameter.requires_grad for index, parameter in flags.items()}
    set_flags(flags, dict.fromkeys(flags, True))
    try:
        yield
    finally:
        set_flags(flags, before)


@contextmanager
def _dropout_behind(structure: Structure, rate: float) -> Iterator[None]:
    """Drop outputs of attention and feed-forward of every block at random while the context lasts."""

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        return nn.functional.dropout(output, rate) if isinstance(output, Tensor) else output

    with ExitStack() as stack:
        if rate:
            behind = [p for p in find_projections(structure) if p.kind in ("output", "down")]
            modules = {path: structure.modules.get(path) for path in (p.weight.rpartition(".")[0] for p in behind)}
            for module in modules.values():
                if module is not None:
                    stack.callback(module.register_forward_hook(hook).remove)
        yield
