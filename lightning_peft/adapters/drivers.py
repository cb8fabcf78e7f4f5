"""What some ``peft`` methods need from the training loop beside gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_peft.core.names import clean_name
from lightning_peft.core.param_groups import scale_learning_rate, split_param_groups
from lightning_peft.errors import ConfigError, suggest

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = [
    "AdaLoRADriver",
    "Driver",
    "FrozenDriver",
    "LossDriver",
    "WholeDriver",
    "check_undriven",
    "driver_for",
    "entry_of",
    "lora_layers",
    "scale_rates",
]


class Driver:
    """Nothing to do beside the optimizer's steps.

    Args:
        handle: ``peft``'s model.
        adapter_name: The adapter that is driven.
    """

    adds_loss = False
    """Whether :meth:`loss` adds anything."""

    sees_whole_parameters = False
    """Whether the driver reads whole weights and gradients."""

    scores = False
    """Whether the driver needs a gradient of all that it trains in every step."""

    def __init__(self, handle: PeftModel, adapter_name: str) -> None:
        self.handle: Any = handle
        self.adapter_name = adapter_name

    allocates = False
    """Whether parts of the adapter stop training during the run."""

    allocations = 0
    """How often parts were dropped; all state of it goes into :meth:`state_dict`."""

    dropped: frozenset[str] = frozenset()
    """Names of the units of :meth:`cut` that train no more."""

    def cut(self, names: tuple[str, ...]) -> dict[str, tuple[str, ...]] | None:
        """Return the units that may be dropped, unit -> names; None: the adapter is one unit."""
        return None

    def trains(self, names: frozenset[str]) -> frozenset[str]:
        """Return which of the adapter's parameters may train; the rest stays as it was initialised."""
        return names

    def prepare_optimizers(self, trainer: Trainer) -> None:
        """Regroup the optimizers, which exist since a moment; before any state is restored."""

    def batch(self, batch: Any) -> None:
        """Called with each batch of every stage, before the module sees it."""

    def started(self) -> None:
        """Called when training starts, after a checkpoint has been restored, and after each allocation."""

    def finished(self) -> None:
        """Undo what :meth:`started` did; called when a fit ends, and maybe more than once."""

    def loss(self) -> Tensor | None:
        """Return what is added to the training loss of each micro-batch."""
        return None

    def stepping(self, optimizer: torch.optim.Optimizer) -> None:
        """Called before each step of each optimizer, when gradients are whole and unscaled, before they are clipped."""

    def stepped(self, step: int) -> None:
        """Called after optimizer step number ``step``, counted from 0, while gradients are there."""

    def state_dict(self) -> dict[str, Any]:
        """Plain state for the checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""


class FrozenDriver(Driver):
    """Drives an adapter that does not train: it sees the batches, and nothing else happens.

    Args:
        driver: What would drive it.
    """

    def __init__(self, driver: Driver) -> None:
        super().__init__(driver.handle, driver.adapter_name)
        self._driver = driver

    def trains(self, names: frozenset[str]) -> frozenset[str]:
        """Return nothing."""
        return frozenset()

    def batch(self, batch: Any) -> None:
        """Let the driver see it: the forward pass may need to know."""
        self._driver.batch(batch)


class LossDriver(Driver):
    """Methods whose regulariser ``peft`` computes and leaves to the loop to add (KaSA)."""

    adds_loss = True
    sees_whole_parameters = True

    def __init__(self, handle: PeftModel, adapter_name: str, function: str) -> None:
        super().__init__(handle, adapter_name)
        self._function = function

    def loss(self) -> Tensor | None:
        """Return ``peft``'s own value."""
        return getattr(self.handle.base_model, self._function)()


class WholeDriver(Driver):
    """Methods that work on whole gradients or modules in hooks of ``peft``'s own (OSF, Shadow)."""

    sees_whole_parameters = True


class AdaLoRADriver(Driver):
    """Allocate AdaLoRA's ranks after each optimizer step, and keep its factors near orthogonal.

    Q. Zhang et al.: AdaLoRA, ICLR 2023, arXiv:2303.10512, Algorithm 1 and equation 4. ``peft`` adds the regulariser
    where its own ``forward`` is called and returns an output with a ``loss``; here it is added to any module's loss.
    """

    sees_whole_parameters = True
    scores = True
    _FIELDS = ("ipt", "exp_avg_ipt", "exp_avg_unc")

    @property
    def _config(self) -> Any:
        return self.handle.peft_config[self.adapter_name]

    @property
    def adds_loss(self) -> bool:  # type: ignore[override]
        """Whether the regulariser has a weight and is not added by ``peft`` already."""
        return self._config.orth_reg_weight > 0

    def loss(self) -> Tensor | None:
        """Mean over all factors of the Frobenius norm of ``P P^T - 1``, times ``orth_reg_weight``."""
        terms = []
        for name, factor in self.handle.get_base_model().named_parameters():
            if self.adapter_name in name and ("lora_A" in name or "lora_B" in name):
                product = factor @ factor.T if "lora_A" in name else factor.T @ factor
                unit = torch.eye(len(product), dtype=product.dtype, device=product.device)
                terms.append(torch.linalg.norm(product - unit))
        return self._config.orth_reg_weight * torch.stack(terms).mean()

    def stepped(self, step: int) -> None:
        """Update importances and masks."""
        self.handle.base_model.update_and_allocate(step)

    def state_dict(self) -> dict[str, Any]:
        """Importances, and which ranks are left."""
        allocator = self.handle.base_model.rankallocator
        moments = {
            field: {n: t.detach().clone() for n, t in getattr(allocator, field).items()} for field in self._FIELDS
        }
        return {**moments, "rank_pattern": self._config.rank_pattern}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them on the devices of the parameters."""
        allocator = self.handle.base_model.rankallocator
        parameters = dict(self.handle.base_model.model.named_parameters())
        for field in self._FIELDS:
            setattr(allocator, field, {n: t.to(parameters[n].device, copy=True) for n, t in state[field].items()})
        self._config.rank_pattern = state["rank_pattern"]


def entry_of(batch: Any, key: str | int, argument: str) -> Any:
    """Return an entry of a batch: of a mapping by its key, of a sequence by its position.

    Args:
        batch: The batch.
        key: Key or position.
        argument: How the user's argument is called that says it.

    Raises:
        ConfigError: If there is none, with the nearest key.
    """
    names: list[str] = []
    if isinstance(batch, Mapping):
        if key in batch:
            return batch[key]
        names = [str(name) for name in batch]
        held = f"a mapping of {', '.join(names)}"
    elif isinstance(batch, Sequence):
        if isinstance(key, int) and -len(batch) <= key < len(batch):
            return batch[key]
        held = f"a sequence of {len(batch)}"
    else:
        held = f"a {type(batch).__name__}"
    hint = suggest(str(key), names) or "Give its position in a sequence, or its key in a mapping."
    raise ConfigError(f"{argument}={key!r}: the batch is {held} and has no such entry. {hint}")


def lora_layers(handle: PeftModel, adapter_name: str) -> dict[str, Any]:
    """Return the linear and convolution layers that a LoRA was put into: path below the target -> ``peft``'s layer."""
    from peft.tuners.lora import LoraLayer

    return {
        clean_name(path): layer
        for path, layer in handle.get_base_model().named_modules()
        if isinstance(layer, LoraLayer) and adapter_name in layer.lora_A
    }


def scale_rates(trainer: Trainer, parameters: Iterable[Tensor], ratio: float) -> None:
    """Multiply the learning rate of some parameters, in whatever group of whatever optimizer, with its schedule."""
    chosen = {id(parameter) for parameter in parameters}

    def is_chosen(parameter: Tensor) -> bool:
        return id(parameter) in chosen

    schedulers = [config.scheduler for config in trainer.strategy.lr_scheduler_configs]
    for optimizer in trainer.strategy.optimizers:
        split_param_groups(optimizer, schedulers, is_chosen)
        for index, group in enumerate(optimizer.param_groups):
            if group["params"] and is_chosen(group["params"][0]):
                scale_learning_rate(optimizer, schedulers, index, ratio)


def check_undriven(handle: PeftModel, adapter_name: str, label: str) -> None:
    """Check that an adapter needs no driver of its own, in whose place another one is about to come.

    Raises:
        ConfigError: If it does.
    """
    driver = driver_for(handle, adapter_name)
    if type(driver) is not Driver:
        raise ConfigError(
            f"{label} drives its adapter, and so does {type(driver).__name__}, which this configuration needs too: "
            "one of the two would not happen."
        )


def driver_for(handle: PeftModel, adapter_name: str, seed: int = 0) -> Driver:
    """Return what drives an adapter; ``seed`` is of what it draws."""
    config: Any = handle.peft_config[adapter_name]
    if hasattr(config, "make_driver"):  # of this package's own methods
        return config.make_driver(handle, adapter_name)
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind == "ADALORA":
        return AdaLoRADriver(handle, adapter_name)
    if kind in ("OSF", "SHADOW"):
        return WholeDriver(handle, adapter_name)
    if kind == "POLY":
        from lightning_peft.adapters.poly import PolyDriver

        return PolyDriver(handle, adapter_name)
    if getattr(config, "use_asa", False):
        from lightning_peft.adapters.adamss import AdaMSSDriver

        return AdaMSSDriver(handle, adapter_name)
    if getattr(config, "kasa_config", None):
        return LossDriver(handle, adapter_name, "_get_kasa_loss")
    if getattr(config, "monteclora_config", None):
        from lightning_peft.adapters.monteclora import MonteCLoRADriver

        return MonteCLoRADriver(handle, adapter_name, seed)
    return Driver(handle, adapter_name)
