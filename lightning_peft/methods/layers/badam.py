"""BAdam: Adam on one block at a time.

Go through the blocks in cycles. Each visit takes ``period_steps`` steps of a fresh Adam on one block while everything
else is frozen, in float32 if the weights are not (Luo et al. 2024, arXiv:2404.02827, Algorithm 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_peft.core.blocks import Structure
from lightning_peft.core.draw import Draw, draw_generator
from lightning_peft.core.masters import MasterWeights, is_low_precision
from lightning_peft.errors import ConfigError, suggest
from lightning_peft.methods.arguments import is_whole
from lightning_peft.methods.base import MethodCallback

__all__ = ["BAdam", "Order", "block_at"]

Order = Literal["random", "ascending", "descending", "fixed"]
"""In which order the blocks are visited: reshuffled for each cycle, first to last, last to first, or one block only."""


def block_at(visit: int, num_blocks: int, order: Order, start_block: int | None = None, seed: int = 0) -> int:
    """Return which block a visit goes to: a pure function, so that a resumed run needs no saved order.

    Args:
        visit: Number of the visit, from 0. ``num_blocks`` visits make a cycle that sees each block once.
        num_blocks: Number of blocks.
        order: In which order.
        start_block: Block of the first visit; default the first block if ascending, the last if descending.
        seed: Seed of the shuffles; each cycle has one of its own.

    Example:
        >>> [block_at(visit, 3, "descending") for visit in range(5)]
        [2, 1, 0, 2, 1]
    """
    if order == "random":
        cycle, place = divmod(visit, num_blocks)
        return int(torch.randperm(num_blocks, generator=draw_generator(seed, cycle, "order"))[place])
    if order == "fixed":
        assert start_block is not None
        return start_block
    if order == "ascending":
        return ((start_block or 0) + visit) % num_blocks
    return ((num_blocks - 1 if start_block is None else start_block) - visit) % num_blocks


class BAdam(MethodCallback):
    """Train one block at a time, each for ``period_steps`` steps of a fresh Adam (block-coordinate Adam).

    Gradients and optimizer state exist for one block only: M parameters in bfloat16, cut into D blocks of a size, take
    ``2 M + 16 M / D`` bytes (weights; float32 master, gradient and two moments of the active block), where mixed
    precision takes ``18 M``. Back-propagation stops at the active block and makes weight gradients for nothing else, so
    that a step costs little more than half of full fine-tuning's FLOPs on average over a cycle of many blocks: least
    for the last block, most for the first.

    Low-precision weights (bfloat16, float16) get a float32 master while their block is active, freed at the switch;
    the optimizer and the clipping work on it, and the weight is the rounded master after each step. The optimizer is
    the one that ``configure_optimizers`` returns, whatever its class: parameter groups, their weight decay and the
    learning-rate schedule apply as they do without BAdam.

    Use it to fine-tune all weights of a model where memory is scarcer still than for LISA.

    Args:
        order: In which order blocks are visited: ``"random"`` (reshuffled for each cycle), ``"ascending"``,
            ``"descending"``, or ``"fixed"`` (``start_block`` alone, for the whole run).
        period_steps: Optimizer steps in each visit (the paper's K), at least 1. Micro-batches do not count. The paper
            suggests 50 to 100.
        scope: What to visit: a role, paths or patterns. Each block is one visit; what lies outside the blocks is
            visited by module, so that ``["blocks", "embeddings", "head"]`` adds the embeddings and the head as blocks
            of their own.
        always: What trains all the time beside the active block; keeps its optimizer state, and master, throughout.
        start_block: Number of the first block to visit, counted from 0 in the scope; needed if ``order="fixed"``, not
            for ``"random"``.
        seed: Seed of the shuffles, the same on all ranks.

    Raises:
        ConfigError: If an argument is out of range. From the fit, if ``start_block`` is, or if low-precision weights
            meet manual optimisation (whose clipping would not see the masters) or a gradient scaler.

    Example:
        >>> from lightning_peft import BAdam
        >>> BAdam(order="ascending").describe()["settings"]["period_steps"]
        50

    Paper:
        Q. Luo, H. Yu, X. Li: BAdam: A Memory Efficient Full Parameter Optimization Method for Large Language Models,
        NeurIPS 2024, arXiv:2404.02827, Algorithm 1.

    Differs from the paper:
        The authors' code gives the first visit one step less than the others, decays norms and biases whatever the
        user's groups say, and cannot resume; here every visit has ``period_steps`` steps, groups are the user's, and a
        resumed run is bit-exact. A block whose parameter gets no gradient (an expert that no token chose) is no error.
        With ``order="fixed"`` there is no switch, so nothing is reset. The code's mode of training a slice of every
        tensor is not here.
    """

    def __init__(
        self,
        order: Order = "random",
        period_steps: int = 50,
        scope: str | list[str] = "blocks",
        always: Sequence[str] = (),
        start_block: int | None = None,
        seed: int = 0,
    ) -> None:
        problems = []
        if order not in get_args(Order):
            problems.append(f"order={order!r} is no order. {suggest(str(order), get_args(Order))}")
        if not is_whole(period_steps, least=1):
            problems.append(f"period_steps={period_steps!r} must be a whole number of optimizer steps, at least 1.")
        if start_block is not None and not is_whole(start_block, least=0):
            problems.append(f"start_block={start_block!r} must be the number of a block, counted from 0.")
        if order == "fixed" and start_block is None:
            problems.append("order='fixed' trains one block: say which with start_block.")
        if order == "random" and start_block is not None:
            problems.append("order='random' draws its first block too: leave start_block out, or take another order.")
        if problems:
            raise ConfigError(f"BAdam: {' '.join(problems)}")
        redraw = "never" if order == "fixed" else int(period_steps)
        super().__init__(scope=scope, always=always, redraw=redraw, state="drop", seed=seed)
        self.order: Order = order
        self.period_steps = int(period_steps)
        self.start_block = None if start_block is None else int(start_block)
        self._masters: MasterWeights | None = None
        self._saved_masters: dict[str, Any] = {}
        self._last_masters: dict[str, Any] = {}
        self._visit: int | None = None

    @override
    def make_units(self, structure: Structure, names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
        units = super().make_units(structure, names)
        if self.start_block is not None and self.start_block >= len(units):
            raise ConfigError(
                f"{self.label} has {len(units)} block(s), numbered 0 to {len(units) - 1}; there is no "
                f"start_block={self.start_block}."
            )
        return units

    @override
    def select(self, draw: Draw) -> list[str]:
        blocks = list(self.units)
        return [blocks[block_at(draw.index, len(blocks), self.order, self.start_block, draw.seed)]]

    @property
    @override
    def needs_whole_parameters(self) -> bool:
        return any(is_low_precision(self._structure.parameters[name]) for name in self.selectable)

    @override
    def prepare_optimizers(self, trainer: Trainer) -> None:
        parameters = self._structure.parameters
        low = [name for name in parameters if name in self.selectable and is_low_precision(parameters[name])]
        if low:
            _check_masters_can_work(trainer, self.label, low[0], parameters[low[0]].dtype)
        self._masters = MasterWeights(parameters, trainer.strategy.optimizers)
        self._last_masters = {}
        self._visit = None

    @override
    def switched(self, trainer: Trainer) -> None:
        assert self._masters is not None
        self._masters.follow(trainer.strategy.optimizers)
        active = [name for name in self._structure.parameters if name in self._active]
        if self._visit is not None and self._visit != self.draw_index:
            # A block that is visited twice in a row did not freeze in between: it starts anew like any other.
            visited = self.scope_names
            self._masters.release([name for name in self._masters.names if name in visited])
            for optimizer in trainer.strategy.optimizers:
                for name in active:
                    if name in visited:
                        optimizer.state.pop(self._structure.parameters[name], None)
        self._visit = self.draw_index
        self._masters.hold(active, self._saved_masters)
        self._saved_masters = {}

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self._masters is not None:
            self._masters.take_gradients(optimizer)

    @override
    def stepped(self, optimizer: torch.optim.Optimizer) -> None:
        if self._masters is not None:
            self._masters.write_back(optimizer)

    @override
    def finished(self) -> None:
        if self._masters is not None:
            self._last_masters = self._masters.state_dict()  # for what is saved on an exception or after the fit
            self._masters.release()
        self._masters = None
        self._saved_masters = {}

    @override
    def method_state(self) -> dict[str, Any]:
        return {"masters": self._last_masters if self._masters is None else self._masters.state_dict()}

    @override
    def load_method_state(self, state: dict[str, Any]) -> None:
        self._saved_masters = state["masters"]


def _check_masters_can_work(trainer: Trainer, label: str, name: str, dtype: torch.dtype) -> None:
    """Raise a ConfigError where gradients are clipped or unscaled before the masters have them."""
    remedy = f"{name} is {dtype}: load the weights in float32 (and use precision='bf16-mixed')"
    if not trainer.lightning_module.automatic_optimization:
        raise ConfigError(
            f"{label} with manual optimisation: low-precision weights are stepped through float32 masters, which get "
            f"their gradients only inside optimizer.step(), so that clipping before it would do nothing. {remedy}, or "
            "use automatic optimisation."
        )
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise ConfigError(
            f"{label}: a gradient scaler cannot unscale the gradients of low-precision weights. {remedy}."
        )
