"""Poly and MHR: tasks mix shared skills, each a LoRA, by routers that are learnt; the batch says which task a row has.

Layer by layer, task ``t`` has a logit per skill and head. Training draws a relaxed Bernoulli variable from each,
evaluation takes the sigmoid; normalised over the skills they are the weights by which ``A`` and ``B`` are averaged.
E. M. Ponti et al., arXiv:2202.13914; with several heads, each over a slice of inputs and outputs, L. Caccia et al.,
arXiv:2211.03831.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.adapters.adapter import Adapter
from lightning_peft.adapters.drivers import Driver, entry_of, scale_rates
from lightning_peft.adapters.injection import Injected
from lightning_peft.errors import ConfigError
from lightning_peft.methods.arguments import is_whole

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["Poly", "PolyDriver", "ids_of"]


def ids_of(batch: Any, key: str | int, argument: str = "task_ids") -> Tensor:
    """Return the task ids of a batch, (rows,).

    Args:
        batch: A mapping, or a sequence for a number as ``key``.
        key: Where they are.
        argument: How the user's argument is called that says it.

    Raises:
        ConfigError: If the batch has none there, or they are no vector of whole numbers.
    """
    found = entry_of(batch, key, argument)
    ids = torch.as_tensor(found)
    if ids.ndim != 1 or ids.is_floating_point() or ids.is_complex():
        raise ConfigError(
            f"{argument}={key!r}: one whole number per row of the batch is needed, and this is a tensor of shape "
            f"{tuple(ids.shape)} and {ids.dtype}."
        )
    return ids


class PolyDriver(Driver):
    """Give every Poly layer the task ids of the batch that a step of the module works on.

    Args:
        handle: ``peft``'s model.
        adapter_name: The adapter.
        task_ids: Key or position of the ids in the batch.
        router_lr_ratio: Learning rate of the routers over that of the skills.
    """

    def __init__(
        self, handle: PeftModel, adapter_name: str, task_ids: str | int = "task_ids", router_lr_ratio: float = 1.0
    ) -> None:
        from peft.tuners.poly.layer import PolyLayer

        super().__init__(handle, adapter_name)
        self.task_ids, self.router_lr_ratio = task_ids, router_lr_ratio
        self._ids: Tensor | None = None
        self._num_tasks = self.handle.peft_config[adapter_name].n_tasks
        for layer in self.handle.get_base_model().modules():
            if isinstance(layer, PolyLayer):
                assert isinstance(layer, nn.Module)
                layer.register_forward_pre_hook(self._before_forward, with_kwargs=True)

    def _before_forward(self, layer: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if self._ids is None:
            return None
        rows = args[0].shape[0]
        if rows != len(self._ids):
            raise ConfigError(
                f"Poly: a layer got {rows} rows and the batch has {len(self._ids)} task ids. Inside a step the model "
                "must be called with the rows of the batch, in their order."
            )
        return args, {"task_ids": self._ids, **kwargs}

    @override
    def batch(self, batch: Any) -> None:
        ids = ids_of(batch, self.task_ids)
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self._num_tasks:
            raise ConfigError(
                f"task_ids={self.task_ids!r}: ids from {int(ids.min())} to {int(ids.max())}, with {self._num_tasks} "
                f"tasks they go from 0 to {self._num_tasks - 1}."
            )
        self._ids = ids

    @override
    def finished(self) -> None:
        self._ids = None

    @override
    def prepare_optimizers(self, trainer: Trainer) -> None:
        """Give the routers their learning rate."""
        if self.router_lr_ratio != 1:
            named = self.handle.get_base_model().named_parameters()
            routers = (p for name, p in named if f".poly_router.{self.adapter_name}." in name)
            scale_rates(trainer, routers, self.router_lr_ratio)


class Poly(Adapter):
    """Train an inventory of skills, each a small LoRA, and for each task the weights by which it mixes them.

    ``num_skills * rank * (in + out)`` parameters per layer, and ``num_tasks * num_skills * num_splits`` for its router.
    Every row of a batch has weights of its own, so that the update cannot be merged into the base.

    Use it for many related tasks in one run: tasks with few examples borrow from the others.

    Args:
        num_tasks: Tasks; ids go from 0 to ``num_tasks - 1``.
        num_skills: Skills per layer.
        rank: Of each skill.
        num_splits: Heads of the router, each over a slice of the layer's inputs and outputs; above 1 this is MHR
            (multi-head routing). Must divide both.
        task_ids: Where in the batch the task ids are: key of a mapping, or position in a sequence.
        router_lr_ratio: Learning rate of the routers over that of the skills, above 0.
        layers: Which layers get one, as a scope; linear layers on inputs of shape (rows, tokens, features).
        target: Path of the submodule that gets the adapters.
        adapter_name: Name of the adapter.
        always: What trains beside it although it lies inside the target.
        seed: Of the initial values.

    Raises:
        ConfigError: If an argument is out of its range. From a step, if the batch has no task ids, or not one for each
            row that the model gets.

    Example:
        >>> from lightning_peft import Poly
        >>> Poly(num_tasks=12, task_ids="task").config["n_tasks"]
        12

    Paper:
        E. M. Ponti, A. Sordoni, Y. Bengio, S. Reddy: Combining Modular Skills in Multitask Learning, 2022,
        arXiv:2202.13914; L. Caccia et al.: Multi-Head Adapter Routing for Cross-Task Generalization, NeurIPS 2023,
        arXiv:2211.03831.

    Differs from the paper:
        No prior on the routers (Indian Buffet Process), as in ``peft``.
    """

    def __init__(
        self,
        num_tasks: int,
        num_skills: int = 4,
        rank: int = 8,
        num_splits: int = 1,
        task_ids: str | int = "task_ids",
        router_lr_ratio: float = 1.0,
        layers: str | list[str] = "blocks",
        target: str = "model",
        adapter_name: str = "default",
        always: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        counts = {"num_tasks": num_tasks, "num_skills": num_skills, "rank": rank, "num_splits": num_splits}
        wrong = [f"{name}={value!r}" for name, value in counts.items() if not is_whole(value, 1)]
        if wrong:
            raise ConfigError(f"Poly: {', '.join(wrong)}: whole numbers from 1 on.")
        if not router_lr_ratio > 0:
            raise ConfigError(f"Poly: router_lr_ratio={router_lr_ratio!r}: above 0.")
        self.num_tasks, self.num_skills, self.rank, self.num_splits = num_tasks, num_skills, rank, num_splits
        self.task_ids, self.router_lr_ratio = task_ids, router_lr_ratio
        config = {"n_tasks": num_tasks, "n_skills": num_skills, "r": rank, "n_splits": num_splits}
        super().__init__("poly", config, target, layers, adapter_name, always, seed)

    @override
    def make_driver(self, adapter: Injected) -> Driver:
        return PolyDriver(adapter.handle, adapter.adapter_name, self.task_ids, self.router_lr_ratio)
