"""A table of what can train, what trains now, and what the optimizer holds.

Three sets that are easily confused decide what a partial fine-tuning run costs: the parameters that some method may
switch on during the run, those whose gradient is computed now, and those the optimizer was built over. The optimizer's
state is counted from the tensors that exist at this moment, so a method that drops the state of frozen layers shows it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, fields

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from rich import box
from rich.table import Table
from torch import nn
from torch.optim import Optimizer

from lightning_peft.core.blocks import Structure, find_structure
from lightning_peft.core.masters import original
from lightning_peft.report.console import format_bytes, format_count, show
from lightning_peft.report.methods import find_methods

__all__ = ["TrainableRow", "TrainableTable", "trainable_rows", "trainable_table"]


@dataclass(frozen=True)
class TrainableRow:
    """One line of the table. Counts are numbers of parameters, sizes are bytes; tied parameters count once.

    Args:
        part: What the line is about: ``"embeddings"``, ``"blocks"``, ``"norms"``, ``"head"``, a top-level module, or
            ``"total"``.
        all_count: All parameters of the part.
        all_bytes: Their size.
        can_count: Parameters that train now or that a method of this run may switch on.
        can_bytes: Their size.
        now_count: Parameters with ``requires_grad`` at this moment.
        now_bytes: Their size.
        optimizer_count: Parameters that are in some optimizer's groups.
        optimizer_bytes: Their size.
        state_bytes: Size of the optimizer state that exists for them at this moment.
    """

    part: str
    all_count: int = 0
    all_bytes: int = 0
    can_count: int = 0
    can_bytes: int = 0
    now_count: int = 0
    now_bytes: int = 0
    optimizer_count: int = 0
    optimizer_bytes: int = 0
    state_bytes: int = 0

    def __add__(self, other: TrainableRow) -> TrainableRow:
        """Return the sum of two rows under the name of the first."""
        numbers = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self) if f.name != "part"}
        return TrainableRow(part=self.part, **numbers)


def trainable_rows(
    module: nn.Module, optimizers: Iterable[Optimizer] = (), can_train: Collection[str] | None = None
) -> list[TrainableRow]:
    """Count what can train, trains now and is in the optimizer, by part of the model.

    Every parameter is counted in exactly one part: norms wherever they lie, then embeddings, head and blocks as found
    by :func:`lightning_peft.core.blocks.find_structure`, and everything else under its top-level module. A model
    without blocks is listed by its top-level modules.

    Args:
        module: The model, usually the LightningModule.
        optimizers: Its optimizers; their ``state`` is read, nothing is changed.
        can_train: Names of parameters that may train at some point of the run. Default: those that train now.

    Returns:
        The rows of the parts that exist, in model order of their first parameter, and last the row ``"total"``.
    """
    structure = find_structure(module)
    state_bytes: dict[int, int] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                size = sum(_num_bytes(v) for v in optimizer.state.get(parameter, {}).values() if torch.is_tensor(v))
                key = id(original(parameter))
                state_bytes[key] = state_bytes.get(key, 0) + size
    part_of = _parts(structure)
    rows: dict[str, TrainableRow] = {}
    for name, parameter in structure.parameters.items():
        count, size = parameter.numel(), _num_bytes(parameter)
        now = parameter.requires_grad
        can = now or (can_train is not None and name in can_train)
        held = id(parameter) in state_bytes
        row = TrainableRow(
            part_of[name],
            *(count, size),
            *((count, size) if can else (0, 0)),
            *((count, size) if now else (0, 0)),
            *((count, size) if held else (0, 0)),
            state_bytes.get(id(parameter), 0),
        )
        rows[row.part] = rows[row.part] + row if row.part in rows else row
    return [*rows.values(), sum(rows.values(), start=TrainableRow("total"))]


def trainable_table(
    module: nn.Module,
    optimizers: Iterable[Optimizer] = (),
    can_train: Collection[str] | None = None,
    title: str = "What trains",
) -> Table:
    """Return :func:`trainable_rows` as a rich table.

    Args:
        module: The model, usually the LightningModule.
        optimizers: Its optimizers.
        can_train: Names of parameters that may train at some point of the run. Default: those that train now.
        title: Heading of the table.

    Example:
        >>> import torch, rich
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        >>> table = trainable_table(net, [torch.optim.SGD(net.parameters(), lr=0.1)])
        >>> table.row_count
        3
    """
    rows = trainable_rows(module, optimizers, can_train)
    total = rows[-1]
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left")
    table.add_column("part")
    for heading in ("parameters", "can train", "trains now", "in the optimizer"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("state now", justify="right", no_wrap=True)
    for row in rows:
        if row is total:
            table.add_section()
        table.add_row(
            row.part,
            format_count(row.all_count),
            _cell(row.can_count, row.can_bytes),
            _cell(row.now_count, row.now_bytes),
            _cell(row.optimizer_count, row.optimizer_bytes),
            format_bytes(row.state_bytes) if row.state_bytes else "-",
            style="bold" if row is total else None,
        )
    if total.all_count:
        table.caption = (
            f"{100 * total.now_count / total.all_count:.1f} % of the parameters train now, "
            f"{100 * total.can_count / total.all_count:.1f} % can train in this run"
        )
    return table


class TrainableTable(Callback):
    """Prints what can train, trains now and is in the optimizer, in parameters and bytes.

    Costs one pass over the parameter list when it prints; nothing during training. It works with every LightningModule,
    with or without a method of this package, wherever it stands in the list of callbacks: it prints after all callbacks
    have started. Only the process of global rank zero prints.

    Args:
        at_end: Also print the table when training ends, when the optimizer's state exists.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> trainer = Trainer(callbacks=[TrainableTable()], max_steps=1, logger=False, enable_checkpointing=False,
        ...                   enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
    """

    def __init__(self, at_end: bool = False) -> None:
        self.at_end = at_end
        self._printed = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Print again in a second fit."""
        self._printed = False

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print once, after every callback's ``on_train_start``."""
        self._print_first(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Print once if training resumed in the middle of an epoch, where no epoch starts."""
        self._print_first(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the state at the end, if asked for."""
        if self.at_end:
            self._print(trainer, pl_module, f"What trains, after {trainer.global_step} optimizer steps")

    def _print_first(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._printed:
            self._printed = True
            self._print(trainer, pl_module, "What trains, at the start")

    @rank_zero_only
    def _print(self, trainer: Trainer, pl_module: LightningModule, title: str) -> None:
        can_train = {
            name
            for method in find_methods(trainer)
            for name in (method.trainable_names if method.is_static else method.selectable)
        }
        show(trainable_table(pl_module, trainer.optimizers, can_train, title))


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _cell(count: int, size: int) -> str:
    return f"{format_count(count)} {format_bytes(size):>9}" if count else "-"


def _parts(structure: Structure) -> dict[str, str]:
    """Map each parameter name to the one part it is counted in."""
    if not structure.blocks:
        return {name: name.partition(".")[0] for name in structure.parameters}
    tied = set(structure.roles["embeddings"]) & set(structure.roles["head"])
    parts: dict[str, str] = {}
    for name in structure.parameters:
        if name in structure.roles["norms"]:
            parts[name] = "norms"
        elif name in tied:
            parts[name] = "embeddings = head"
        else:
            role = next((r for r in ("embeddings", "head", "blocks") if name in structure.roles[r]), None)
            parts[name] = role or name.partition(".")[0]
    return parts
