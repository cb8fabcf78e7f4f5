"""Short fits that all start from the same weights, the same random state and the same order of data."""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader

from lightning_peft.core.blocks import Structure, find_structure
from lightning_peft.core.rng import get_rng_state, set_rng_state
from lightning_peft.errors import ConfigError, UnsupportedStrategy, suggest
from lightning_peft.methods.base import MethodCallback

__all__ = ["Evaluate", "TrialRunner"]

Evaluate = Callable[[Trainer, LightningModule], Mapping[str, Any]]
"""What measures a fitted model: returns metrics by name."""

_QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


class TrialRunner:
    """Fit a module again and again from one start.

    Neither the given module nor the global random state is changed by any fit.

    Args:
        module: A LightningModule, of which each fit gets a copy; or a function that makes one, which is called for each
            fit under the same seed. Called without arguments, it makes the one whose weights all fits start from.
        data: Keyword arguments of ``Trainer.fit``: loaders, which are copied without their data sets, or a datamodule;
            or a function that returns them, called for each fit.
        trainer: Keyword arguments of ``Trainer``. Callbacks are copied for each fit. Logger, checkpoints, progress bar
            and summary are off unless switched on here.
        metrics: Names wanted from what the module logs, in a validation of the final weights if there is one, or from
            ``evaluate``.
        evaluate: Called after each fit.
        seed: Of the random state that each fit starts from.
    """

    def __init__(
        self,
        module: LightningModule | Callable[..., LightningModule],
        data: Mapping[str, Any] | Callable[[], Mapping[str, Any]],
        trainer: Mapping[str, Any],
        metrics: Sequence[str],
        evaluate: Evaluate | None = None,
        seed: int = 0,
    ) -> None:
        self._module, self._data, self._trainer = module, data, dict(trainer)
        self._metrics, self._evaluate, self._seed = list(metrics), evaluate, seed
        self._template: LightningModule | None = module if isinstance(module, LightningModule) else None
        self._structure: Structure | None = None

    @property
    def takes_hyperparameters(self) -> bool:
        """Whether modules are made by a function."""
        return not isinstance(self._module, LightningModule)

    @property
    def structure(self) -> Structure:
        """Blocks and parameters of the module at its start; nothing of it may be changed."""
        if self._structure is None:
            with _as_before():
                module = self._start()
                if is_overridden("configure_model", module):
                    module = self._build({})
                    module.configure_model()
                self._structure = find_structure(module)
        return self._structure

    def run(
        self, methods: Sequence[MethodCallback], hyperparameters: Mapping[str, Any] | None = None
    ) -> dict[str, float]:
        """Fit once and return the metrics.

        Args:
            methods: What trains.
            hyperparameters: Keyword arguments for the function that makes the module.

        Raises:
            ConfigError: If a metric is missing, or the function makes no new module.
            UnsupportedStrategy: If the Trainer runs several processes.
        """
        with _as_before():
            module = self._build(hyperparameters or {})
            callbacks = self._trainer.get("callbacks") or []
            own = callbacks if isinstance(callbacks, (list, tuple)) else [callbacks]
            look = _LastLook()
            callbacks = [*methods, *copy.deepcopy(list(own)), look]
            trainer = Trainer(**{**_QUIET, **self._trainer, "callbacks": callbacks})
            if trainer.world_size > 1:
                raise UnsupportedStrategy(
                    f"A search makes its fits in one process each, and this Trainer has {trainer.world_size}. Take "
                    "devices=1, and run the found subset on all of them."
                )
            data = self._data() if callable(self._data) else tree_map(_fresh, dict(self._data))
            _seed_all(self._seed)
            trainer.fit(module, **data)
            if trainer.interrupted:
                raise KeyboardInterrupt
            values = {**trainer.callback_metrics, **_validated(trainer, module, data, look)}
            if self._evaluate is not None:
                values.update(self._evaluate(trainer, module))
            return self._picked(values, methods, module)

    def _picked(
        self, values: Mapping[str, Any], methods: Sequence[MethodCallback], module: LightningModule
    ) -> dict[str, float]:
        trained = frozenset().union(*(names for method in methods for _, names in method.history))
        sizes = {name: p.numel() for name, p in find_structure(module).parameters.items()}
        numbers = {"num_trainable_parameters": float(sum(sizes[name] for name in trained))}
        for name, value in values.items():
            if not isinstance(value, Tensor) or value.numel() == 1:
                numbers[name] = float(value)
        missing = [name for name in self._metrics if name not in numbers]
        if missing:
            raise ConfigError(
                f"The metric {missing[0]!r} was not logged by the module, nor returned by evaluate. "
                f"{suggest(missing[0], sorted(numbers))}"
            )
        return numbers

    def _start(self) -> LightningModule:
        """The module whose weights all fits start from."""
        if self._template is None:
            _seed_all(self._seed)
            self._template = cast(Callable[..., LightningModule], self._module)()
        return self._template

    def _build(self, hyperparameters: Mapping[str, Any]) -> LightningModule:
        if isinstance(self._module, LightningModule):
            assert not hyperparameters, "a module takes none"
            return copy.deepcopy(self._module)
        template = self._start()
        _seed_all(self._seed)
        module = self._module(**hyperparameters)
        if {id(p) for p in template.parameters()} & {id(p) for p in module.parameters()}:
            raise ConfigError(
                "The function that makes the module gave the same weights twice, so that one fit would start where "
                "another ended. Make a new module in each call, or give the search the module itself."
            )
        start = _tensors(template)
        with torch.no_grad():
            for name, tensor in _tensors(module).items():
                if name in start and start[name].shape == tensor.shape:
                    tensor.copy_(start[name])
        return module


class _LastLook(Callback):
    """Notes after how many optimizer steps the last validation of a fit was."""

    step = -1

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.step = trainer.global_step


def _validated(
    trainer: Trainer, module: LightningModule, data: Mapping[str, Any], look: _LastLook
) -> Mapping[str, Any]:
    """Metrics of the final weights: those of the fit's last validation, or of one more if it ended after that."""
    if look.step == trainer.global_step or not trainer.enable_validation:
        return {}
    trainer.validate(module, data.get("val_dataloaders"), datamodule=data.get("datamodule"), verbose=False)
    return trainer.callback_metrics


@contextmanager
def _as_before() -> Iterator[None]:
    """Put the random states back at the end; meanwhile Lightning tells no news of each Trainer."""
    rng, logger = get_rng_state(), logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(max(level, logging.WARNING))
    try:
        yield
    finally:
        logger.setLevel(level)
        set_rng_state(rng)


def _tensors(module: LightningModule) -> dict[str, Tensor]:
    found = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor.detach() for name, tensor in found.items() if not tensor.is_meta}


def _fresh(value: Any) -> Any:
    """A loader as it was given, with sampler and generator of its own; the data set is shared."""
    return copy.deepcopy(value, {id(value.dataset): value.dataset}) if isinstance(value, DataLoader) else value


def _seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
