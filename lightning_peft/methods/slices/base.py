"""What methods share that train columns or rows of weights: a method says which, see :meth:`SliceMethod.choose`."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from typing_extensions import override

from lightning_peft.core.blocks import Structure, find_structure
from lightning_peft.core.draw import Draw
from lightning_peft.core.plan import Claim
from lightning_peft.core.scope import Scope, resolve_scope
from lightning_peft.core.sharded import is_sharded
from lightning_peft.errors import ConfigError, PlanConflict, ScopeError, UnsupportedStrategy
from lightning_peft.methods.base import MethodCallback
from lightning_peft.methods.build import when_built
from lightning_peft.methods.slices.layer import Slice, SlicedLayer, can_slice, slice_layer, unslice

__all__ = ["SliceMethod"]


class SliceMethod(MethodCallback):
    """Base of methods that train slices of weights, chosen once.

    While a fit lasts, the layers in scope are sliced ones. Before a checkpoint is written, and when the fit ends, what
    was trained lies in their weights, under the names and in the shapes that the model came with.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(redraw="never", state="keep", **settings)
        self._layers: dict[str, SlicedLayer] = {}
        self._explicit: frozenset[str] = frozenset()
        self._chosen: dict[str, torch.Tensor] = {}

    @abstractmethod
    def choose(self, layers: Mapping[str, nn.Module]) -> Mapping[str, Slice]:
        """Say what of each layer trains: a pure function, with the same answer on all ranks.

        Args:
            layers: Clean path -> plain layer, in model order.

        Returns:
            Path -> slice; layers that are left out do not train.
        """

    @property
    def chosen(self) -> dict[str, torch.Tensor]:
        """Path of each layer -> the numbers of its columns or rows that train, from the start of the fit on."""
        return dict(self._chosen)

    def convert(self, root: nn.Module) -> list[str]:
        """Slice the layers in scope below ``root``; the fit does it by itself.

        Returns:
            Their paths.

        Raises:
            ScopeError: If the scope holds no layer that can be sliced and may train.
            PlanConflict: If another method has sliced one of them.
            ConfigError: If a layer has no weights yet.
            UnsupportedStrategy: If a layer is sharded already.
        """
        structure = find_structure(root)
        scope = resolve_scope(self.scope, structure)
        owners = Counter(id(p) for module in structure.modules.values() for p in module.parameters(recurse=False))
        inside = {path: m for path, m in structure.modules.items() if f"{path}.weight" in scope.names}
        for path, module in inside.items():
            if isinstance(module, SlicedLayer):
                raise PlanConflict(f"{self.label}: another method trains a part of {path}.weight already.")
        layers = {path: m for path, m in inside.items() if can_slice(m) and owners[id(m.weight)] == 1}
        if not layers:
            raise ScopeError(
                f"{self.label}: of the {len(inside)} layer(s) with a weight in scope, none is a torch.nn.Linear or "
                "Conv1D with a floating-point weight of its own (not tied to another layer)."
            )
        layers = {path: m for path, m in layers.items() if m.weight.requires_grad or f"{path}.weight" in scope.explicit}
        if not layers:
            raise ScopeError(
                f"{self.label}: all linear layers of the scope have requires_grad=False. A role does not thaw what you "
                "froze; unfreeze them, or name them in scope with a path or pattern."
            )
        for path in layers:
            weight = structure.parameters[f"{path}.weight"]
            if is_sharded(weight):
                raise UnsupportedStrategy(f"{self.label}: {path}.weight is sharded already, before it was sliced.")
            if weight.is_meta:
                raise ConfigError(f"{self.label}: {path} has no weights yet (meta device): load them before the fit.")
        parts = self.choose(layers)
        self._layers = {path: slice_layer(layers[path], parts[path]) for path in layers if path in parts}
        self._explicit = frozenset(path for path in self._layers if f"{path}.weight" in scope.explicit)
        self._chosen = {path: layer.slice_index.cpu() for path, layer in self._layers.items()}
        return list(self._layers)

    @override
    def select(self, draw: Draw) -> list[str]:
        """All slices."""
        return list(self.units)

    @override
    def resolve(self, structure: Structure) -> Scope:
        """The slices of all layers."""
        present = {id(module): path for path, module in structure.modules.items()}
        names = {path: f"{present[id(layer)]}.weight_slice" for path, layer in self._layers.items()}
        return Scope(tuple(names.values()), frozenset(names[path] for path in self._explicit))

    @override
    def bind(self, structure: Structure, user_flags: dict[str, bool]) -> Claim:
        claim = super().bind(structure, user_flags)
        dense = frozenset(name.removesuffix("_slice") for name in self.resolve(structure).names)
        doubled = sorted(dense & self.selectable)
        if doubled:
            raise PlanConflict(
                f"{self.label}: always={list(self.always)} would train the whole of {len(doubled)} weight(s), "
                f"{doubled[0]} for one, of which scope trains a part. Leave them out of one of the two."
            )
        return Claim(claim.owner, claim.selectable | dense)

    @property
    @override
    def needs_whole_parameters(self) -> bool:
        """Slices are written into whole weights before each product."""
        return True

    @override
    def stepped(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the weights follow at once, for whoever reads them without running the layer."""
        for layer in self._layers.values():
            layer.write()

    @override
    def finished(self) -> None:
        """Give the plain layers back."""
        for layer in self._layers.values():
            unslice(layer)
        self._layers = {}

    @override
    def method_state(self) -> dict[str, Any]:
        """Which columns and rows the optimizer's state belongs to."""
        return {"chosen": self._chosen}

    @override
    def load_method_state(self, state: dict[str, Any]) -> None:
        """Go on with the columns and rows of the checkpoint."""
        for path, index in state["chosen"].items():
            if not torch.equal(index, self._chosen[path]):
                self._layers[path].choose(index)
                self._chosen[path] = index

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.finished()
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        averaging = (WeightAveraging, StochasticWeightAveraging)
        callbacks: list[Any] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
        early = [each for each in callbacks[: callbacks.index(self)] if isinstance(each, averaging)]
        if early:
            raise ConfigError(
                f"{type(early[0]).__name__} copies the model before {self.label} slices its layers, so that the two "
                f"could not be averaged. Put {type(self).__name__} before it in callbacks."
            )
        if is_overridden("configure_model", pl_module):
            when_built(pl_module, lambda: self.convert(pl_module))
        else:
            self.convert(pl_module)  # callbacks that copy the model do it as soon

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self.finished()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self.finished()
