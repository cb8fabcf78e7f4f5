"""MTLoRA: one low-rank update for all tasks and one for each, beside frozen weights.

``h = W x + s · B A x + s_t · B_t A_t x`` for a row of task t: the task-agnostic part carries what tasks share, the
task-specific one keeps them from pulling at each other. A. Agiza, M. Neseem and S. Reda, CVPR 2024, arXiv:2403.20320.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_peft.adapters.adapter import Adapter
from lightning_peft.adapters.drivers import Driver
from lightning_peft.adapters.native.mixtures import MixtureLayer, check_count, rows_of, uniform
from lightning_peft.adapters.native.tuner import NativeConfig, NativeTuner, register
from lightning_peft.adapters.poly import ids_of
from lightning_peft.errors import ConfigError

__all__ = ["MTLoRA", "MTLoRAConfig", "set_tasks"]


@dataclass
class MTLoRAConfig(NativeConfig):
    """MTLoRA: a shared update and one per task. Outside Lightning, :func:`set_tasks` says which rows are of which task.

    Args:
        r: Rank of the task-agnostic update.
        num_tasks: Tasks; ids go from 0 to ``num_tasks - 1``.
        task_r: Rank of each task-specific update.
        scale: What the task-agnostic update is multiplied by.
        task_scale: What the task-specific ones are multiplied by.
        task_modules: Names, or one regular expression, of those targets that have task-specific updates beside the
            shared one; None for all.
        task_ids: Where in the batch the task of each row is.

    Paper: A. Agiza, M. Neseem, S. Reda 2024, arXiv:2403.20320.
    """

    r: int = field(default=16)
    num_tasks: int = field(default=2)
    task_r: int = field(default=4)
    scale: float = field(default=4.0)
    task_scale: float = field(default=4.0)
    task_modules: list[str] | str | None = field(default=None)
    task_ids: str | int = field(default="task_ids")

    method: ClassVar[str] = "mtlora"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_rank()
        check_count(self, "num_tasks", 1)
        check_count(self, "task_r", 1)
        for name in ("scale", "task_scale"):
            self._check_number(name, 0.0, float("inf"), low_included=False)

    def has_tasks(self, path: str) -> bool:
        """Whether the layer at ``path`` has task-specific updates."""
        if self.task_modules is None:
            return True
        if isinstance(self.task_modules, str):
            return re.fullmatch(self.task_modules, path) is not None
        return any(path == name or path.endswith(f".{name}") for name in self.task_modules)

    def make_driver(self, handle: Any, adapter_name: str) -> MTLoRADriver:
        """Return what tells the layers the tasks of a batch."""
        return MTLoRADriver(handle, adapter_name)


class MTLoRALayer(MixtureLayer):
    """A linear layer with MTLoRA adapters."""

    prefix = "mtlora_"
    trained = ("A", "B", "taskA", "taskB")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.tasks: dict[str, int | Tensor] = {}
        self._path = ""
        super().__init__(*args, **kwargs)

    def update_layer(self, adapter_name: str, config: Any, path: str) -> None:
        """Add an adapter, with task-specific factors where the settings say so."""
        self._path = path
        super().update_layer(adapter_name, config, path)

    def shapes(self, config: Any) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the shared and the task-specific factors."""
        shared = {"A": (config.r, self.in_features), "B": (self.out_features, config.r)}
        if not config.has_tasks(self._path):
            return shared
        num, rank = config.num_tasks, config.task_r
        return {**shared, "taskA": (num, rank, self.in_features), "taskB": (num, self.out_features, rank)}

    def initial(self, config: Any, weight_OI: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Return first factors uniform, second ones zero."""
        return {role: uniform(s, generator) for role, s in self.shapes(config).items() if role.endswith("A")}

    def delta(self, adapter_name: str, x: Tensor) -> Tensor:
        """Return the shared update and that of each row's task.

        Raises:
            ConfigError: If no one has said which task it is.
        """
        config: Any = self.settings[adapter_name]
        shared = self.mix(self.multiply(x, self.tensor("A", adapter_name)), self.tensor("B", adapter_name))
        if not config.has_tasks(self._path):
            return shared * config.scale
        tasks = self._known_tasks(adapter_name)
        if isinstance(tasks, Tensor):
            rows_of(x, len(tasks), "task_ids")
            chosen = functional.one_hot(tasks.to(x.device), config.num_tasks)
            chosen = chosen.reshape(len(tasks), *(1,) * (x.ndim - 2), config.num_tasks)
        else:
            chosen = functional.one_hot(torch.tensor(tasks, device=x.device), config.num_tasks)
        own = self.experts(x, self.tensor("taskA", adapter_name), self.tensor("taskB", adapter_name), chosen)
        return shared * config.scale + own * config.task_scale

    def _known_tasks(self, adapter_name: str) -> int | Tensor:
        if adapter_name not in self.tasks:
            raise ConfigError(
                f"MTLoRA adapter {adapter_name!r}: which task is it? Inside a Trainer's steps the batch says it; "
                "elsewhere call lightning_peft.set_tasks(model, task) first."
            )
        return self.tasks[adapter_name]

    def delta_matrix(self, adapter_name: str) -> Tensor:
        """Return the shared update and that of the one task that is set.

        Raises:
            ConfigError: If none is set, or rows have tasks of their own.
        """
        config: Any = self.settings[adapter_name]
        delta_OI = config.scale * self.tensor("B", adapter_name) @ self.tensor("A", adapter_name)
        if not config.has_tasks(self._path):
            return delta_OI
        task = self._known_tasks(adapter_name)
        if isinstance(task, Tensor):
            raise ConfigError(
                "MTLoRA merges one task: call lightning_peft.set_tasks(model, task) with its number first."
            )
        own = self.tensor("taskB", adapter_name)[task] @ self.tensor("taskA", adapter_name)[task]
        return delta_OI + config.task_scale * own


def set_tasks(model: nn.Module, tasks: int | Tensor | None, *, adapter_name: str = "default") -> None:
    """Say which task the model works on, wherever no Trainer's step does: before inference or merging.

    Args:
        model: The model with MTLoRA adapters, or anything around it.
        tasks: One task for all rows, or one id per row; None to forget it.
        adapter_name: Which adapter.

    Raises:
        ConfigError: If there is no such adapter, or no such task.
    """
    layers = [m for m in model.modules() if isinstance(m, MTLoRALayer) and adapter_name in m.settings]
    if not layers:
        raise ConfigError(f"The model has no MTLoRA adapter {adapter_name!r}.")
    config: Any = layers[0].settings[adapter_name]
    if tasks is not None:
        ids = torch.as_tensor(tasks)
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < config.num_tasks:
            raise ConfigError(
                f"Task ids from {int(ids.min())} to {int(ids.max())}: with num_tasks={config.num_tasks} they go from 0 "
                f"to {config.num_tasks - 1}."
            )
    for layer in layers:
        if tasks is None:
            layer.tasks.pop(adapter_name, None)
        else:
            layer.tasks[adapter_name] = tasks


class MTLoRADriver(Driver):
    """Tells the layers the tasks of each batch."""

    def batch(self, batch: Any) -> None:
        """Read the ids."""
        config: Any = self.handle.peft_config[self.adapter_name]
        set_tasks(self.handle.get_base_model(), ids_of(batch, config.task_ids), adapter_name=self.adapter_name)

    def finished(self) -> None:
        """Forget them."""
        set_tasks(self.handle.get_base_model(), None, adapter_name=self.adapter_name)


class MTLoRATuner(NativeTuner):
    """Puts MTLoRA into a model."""

    prefix = "mtlora_"
    tuner_layer_cls = MTLoRALayer


register("mtlora", MTLoRAConfig, MTLoRATuner)


class MTLoRA(Adapter):
    """Train one low-rank update that all tasks share, and a small one for each task.

    ``rank * (in + out)`` parameters per layer, and ``num_tasks * task_rank * (in + out)`` where there are task-specific
    updates. Each row of a batch goes through those of its task. For one task, the update merges into the base.

    Use it for several tasks in one run that disagree: what they share is learnt once.

    Args:
        num_tasks: Tasks; ids go from 0 to ``num_tasks - 1``.
        rank: Of the shared update.
        task_rank: Of each task's own.
        scale: What the shared update is multiplied by.
        task_scale: What the tasks' own are multiplied by.
        task_modules: Names, or one regular expression, of those layers that have tasks' own updates; None for all. In
            the paper these are the last blocks of each stage.
        task_ids: Where in the batch the task of each row is: key of a mapping, or position in a sequence.
        dropout: On the adapters' input, in ``[0, 1)``.
        layers: Which linear layers get one, as a scope.
        target: Path of the submodule that gets the adapters.
        adapter_name: Name of the adapter.
        always: What trains beside it although it lies inside the target.
        seed: Of the initial values.

    Raises:
        ConfigError: If an argument is out of its range. From a step, if the batch has no task ids, or not one for each
            row that the model gets.

    Example:
        >>> from lightning_peft import MTLoRA
        >>> MTLoRA(num_tasks=3, task_ids="task").method
        'mtlora'

    Paper:
        A. Agiza, M. Neseem, S. Reda: MTLoRA: A Low-Rank Adaptation Approach for Efficient Multi-Task Learning, CVPR
        2024, arXiv:2403.20320.

    Differs from the paper:
        There each image has labels of all tasks, and its features part into one stream per task; here each row has one
        task, as in batches of mixed tasks. For a row with several, call the model once per task. Of the forms in the
        authors' code it is the one whose task-specific outputs contain the shared update.
    """

    def __init__(
        self,
        num_tasks: int,
        rank: int = 16,
        task_rank: int = 4,
        scale: float = 4.0,
        task_scale: float = 4.0,
        task_modules: str | list[str] | None = None,
        task_ids: str | int = "task_ids",
        dropout: float = 0.0,
        layers: str | list[str] = "blocks",
        target: str = "model",
        adapter_name: str = "default",
        always: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        self.num_tasks, self.rank, self.task_rank = num_tasks, rank, task_rank
        self.scale, self.task_scale, self.task_modules = scale, task_scale, task_modules
        self.task_ids, self.dropout = task_ids, dropout
        config: dict[str, Any] = {
            "r": rank,
            "num_tasks": num_tasks,
            "task_r": task_rank,
            "scale": scale,
            "task_scale": task_scale,
            "task_modules": task_modules,
            "task_ids": task_ids,
            "dropout": dropout,
            "seed": seed,
        }
        super().__init__("mtlora", config, target, layers, adapter_name, always, seed)
