"""LAE: learning, accumulation, ensemble, for tasks that come one after the other.

*Learning*: an online adapter is tuned on each task; at the start of every task but the first it waits, frozen, until
the new head has settled. *Accumulation*: after each optimizer step an offline copy follows it,
``offline <- decay * offline + (1 - decay) * online``; in the first task the two are one. *Ensemble*: in evaluation the
model runs with each, and a class has the larger of its two probabilities. Q. Gao et al., arXiv:2303.10070.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.adapters.adapter import Adapter
from lightning_peft.adapters.drivers import Driver, check_undriven
from lightning_peft.adapters.injection import Injected, activate, inject, injected
from lightning_peft.core.draw import Draw
from lightning_peft.core.names import named_parameters
from lightning_peft.core.trainable import set_flags
from lightning_peft.errors import ConfigError
from lightning_peft.methods.arguments import is_whole
from lightning_peft.methods.build import when_built

__all__ = ["LAE", "LAEDriver", "ensemble"]


def ensemble(online: Tensor, offline: Tensor) -> Tensor:
    """Return logits of the larger of the two experts' probabilities, class by class; they need not sum to 1."""
    return torch.maximum(torch.log_softmax(online, -1), torch.log_softmax(offline, -1))


class LAEDriver(Driver):
    """Let the offline adapter follow the online one, and ask both in evaluation.

    Args:
        root: The LightningModule.
        online: The adapter that trains.
        offline: Its copy.
        decay: What the copy keeps of itself per step.
    """

    sees_whole_parameters = True

    def __init__(self, root: LightningModule, online: Injected, offline: Injected, decay: float) -> None:
        super().__init__(online.handle, online.adapter_name)
        self.decay, self.in_first_task = decay, False
        self._root, self._online, self._offline = root, online, offline
        self._in_step = False
        online.handle.get_base_model().register_forward_hook(self._after_forward, with_kwargs=True)

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """The online adapter's parameters, each with its copy."""
        parameters = named_parameters(self._root)
        return [(parameters[name], parameters[self._copy_of(name)]) for name in sorted(self._online.names)]

    def _copy_of(self, name: str) -> str:
        parts = name.split(".")
        last = max(at for at, part in enumerate(parts) if part == self._online.adapter_name)
        parts[last] = self._offline.adapter_name
        return ".".join(parts)

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """Move the copy."""
        for online, offline in self.pairs():
            offline.lerp_(online, 1 - decay)

    @override
    def stepped(self, step: int) -> None:
        self.follow(0.0 if self.in_first_task else self.decay)

    @override
    def batch(self, batch: Any) -> None:
        self._in_step = True

    @override
    def finished(self) -> None:
        self._in_step = self.in_first_task = False

    def _after_forward(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if not self._in_step or self.in_first_task or model.training:
            return None
        self._in_step = False
        try:
            with self._offline_in_force():
                other = _logits(model(*args, **kwargs))
        finally:
            self._in_step = True
        both = ensemble(_logits(output), other)
        if isinstance(output, Tensor):
            return both
        output["logits"] = both
        return output

    @contextmanager
    def _offline_in_force(self) -> Iterator[None]:
        try:
            self._online.is_active, self._offline.is_active = False, True
            activate(self._root, self._online.target)
            yield
        finally:
            self._online.is_active, self._offline.is_active = True, False
            activate(self._root, self._online.target)


def _logits(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping) and isinstance(output.get("logits"), Tensor):
        return output["logits"]
    raise ConfigError(
        f"LAE takes the larger probability of each class, for which the target must return logits, or a mapping of "
        f"them; it returns a {type(output).__name__}. Let target name the module that holds backbone and head, and "
        "layers where adapters go."
    )


class LAE(Adapter):
    """Train one adapter on task after task, and keep a slow copy of it that remembers the earlier ones.

    One more set of the adapter's parameters, without gradient or optimizer state; evaluation takes two forward passes.
    Each call of ``fit`` without a checkpoint is a task, with the same callback; the first is ordinary training.

    Use it where tasks or classes come one after the other and earlier data are gone.

    Args:
        method: Name of a ``peft`` method whose layers sit in the model (``"lora"``, ``"ia3"``, ...).
        config: Options of the method, as ``peft`` calls them.
        decay: What the copy keeps of itself per optimizer step, in ``[0, 1]``.
        freeze_epochs: Epochs at the start of each task but the first in which the adapter waits while the rest trains,
            such as a new head.
        target: Path of the submodule that gets the adapters. Its output is logits.
        layers: Which layers get one, as a scope; None leaves it to ``target_modules`` in ``config``.
        adapter_name: Name of the adapter; the copy is called so too, with ``_offline`` behind it.
        always: What trains beside it although it lies inside the target, such as ``"head"``.
        seed: Of the initial values.

    Raises:
        ConfigError: If an argument is out of its range. From the fit, if nothing else trains while the adapter waits;
            or the method needs the loop too (AdaLoRA, Poly); from evaluation, if the target returns no logits.
        UnsupportedStrategy: From the fit, if the strategy shards parameters.

    Example:
        >>> from lightning_peft import LAE
        >>> LAE("lora", {"r": 4}, always=["head"]).offline_name
        'default_offline'

    Paper:
        Q. Gao et al.: A Unified Continual Learning Framework with General Parameter-Efficient Tuning, ICCV 2023,
        arXiv:2303.10070.

    Differs from the paper:
        Evaluation gives logarithms of the larger probabilities in place of logits. Speeds of different methods are not
        calibrated; that of this one is its learning rate.
    """

    def __init__(
        self,
        method: str = "lora",
        config: dict[str, Any] | None = None,
        decay: float = 0.9999,
        freeze_epochs: int = 3,
        target: str = "model",
        layers: str | list[str] | None = "blocks",
        adapter_name: str = "default",
        always: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        if not 0 <= decay <= 1 or not is_whole(freeze_epochs, 0):
            raise ConfigError(
                f"LAE: decay={decay!r} lies in [0, 1], freeze_epochs={freeze_epochs!r} is a whole number from 0 on."
            )
        super().__init__(method, config, target, layers, adapter_name, always, seed)
        if getattr(self._made, "is_prompt_learning", False):
            raise ConfigError(f"LAE: {self.method!r} has no layers in the model, of which a copy could be kept.")
        self.decay, self.freeze_epochs = decay, freeze_epochs
        self._task, self._first_epoch = -1, 0

    @property
    def offline_name(self) -> str:
        """``peft``'s name of the copy, to export it by :attr:`handle`."""
        return f"{self.adapter_name}_offline"

    @property
    def task(self) -> int:
        """Number of the present task, from 0; -1 before the first fit."""
        return self._task

    # ------------------------------------------------------------------ injection

    @override
    def make_driver(self, adapter: Injected) -> Driver:
        check_undriven(adapter.handle, adapter.adapter_name, "LAE")
        is_new = (self.target, self.offline_name) not in injected(self._module)
        offline = inject(
            self._module,
            self._made,
            target=self.target,
            adapter_name=self.offline_name,
            layers=self.layers,
            seed=self.seed,
        )
        offline.is_active = False
        driver = LAEDriver(self._module, adapter, offline, self.decay)
        if is_new:
            driver.follow(0.0)
        return driver

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)

        def freeze() -> None:
            offline = injected(pl_module)[self.target, self.offline_name]
            set_flags(named_parameters(pl_module), dict.fromkeys(offline.names, False))

        when_built(pl_module, freeze)

    # ------------------------------------------------------------------ the method

    @property
    @override
    def is_static(self) -> bool:
        return False

    @override
    def draw_due(self, step: int, epoch: int) -> int:
        return 0 if self._task > 0 and epoch - self._first_epoch < self.freeze_epochs else 1

    @override
    def select(self, draw: Draw) -> list[str]:
        """All of it, or at first what lies beside the adapter."""
        return [unit for unit in self.units if draw.index or unit != self.adapter_name]

    @override
    def begin(self, step: int, epoch: int, global_step: int, continues: bool) -> None:
        if self._loaded is None:
            self._task, self._first_epoch = self._task + 1, epoch
            waits = self.draw_due(step, epoch) == 0
            if waits and not self._always_units and not self.select(Draw(0, step, epoch, self.seed)):
                raise ConfigError(
                    f"{self.label}: in the first {self.freeze_epochs} epochs of a new task only what lies beside the "
                    "adapter trains, and there is nothing. Name the head in always, or say freeze_epochs=0."
                )
        super().begin(step, epoch, global_step, continues)
        assert isinstance(self._driver, LAEDriver)
        self._driver.in_first_task = self._task == 0

    @override
    def method_state(self) -> dict[str, Any]:
        return {"task": self._task, "first_epoch": self._first_epoch}

    @override
    def load_method_state(self, state: dict[str, Any]) -> None:
        self._task, self._first_epoch = state["task"], state["first_epoch"]
