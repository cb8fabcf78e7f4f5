"""Any method of Hugging Face ``peft``, as one callback."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from typing_extensions import override

from lightning_peft.adapters.config import make_config, plain_config
from lightning_peft.adapters.drivers import Driver, driver_for
from lightning_peft.adapters.frozen_base import attach_frozen_base, fingerprints
from lightning_peft.adapters.injection import Injected, inject, injected
from lightning_peft.core.blocks import Structure
from lightning_peft.core.draw import Draw
from lightning_peft.core.plan import Claim
from lightning_peft.core.scope import Scope
from lightning_peft.errors import ConfigError
from lightning_peft.methods.base import MethodCallback
from lightning_peft.methods.build import when_built
from lightning_peft.methods.engine import Engine

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

__all__ = ["Adapter"]


class Adapter(MethodCallback):
    """Put adapters of any ``peft`` method into a submodule, and train them.

    The user's LightningModule does not change: adapters are put in once, after the model has been built (in
    ``__init__`` or in ``configure_model``), after it has been quantised, before anything is restored, wrapped or
    sharded, and before ``configure_optimizers``. ``fit``, ``validate``, ``test`` and ``predict`` find them there.

    Gradients and optimizer states exist for the adapters alone; a step goes forward and backward through the whole
    base.

    Use it when those of the whole model do not fit, or when many tasks share one base.

    What trains: the adapters, ``modules_to_save``, and what lies outside ``target`` as the user left it. Another method
    of the run takes from that what is in its scope: ``[Adapter("lora"), IST(scope="adapters")]`` lets IST choose among
    the adapters.

    A checkpoint holds what may train, the configuration and a fingerprint of each base parameter in its place:
    ``fit(ckpt_path=)`` is exact, on another base it is refused. :func:`lightning_peft.load_from_checkpoint` builds the
    module again; :meth:`export` writes ``peft``'s own files.

    Args:
        method: Name of a ``peft`` method (``"lora"``, ``"ia3"``, ``"vera"``, ...), or a ``PeftConfig``.
        config: Options of the method, as ``peft`` calls them.
        target: Path of the submodule that gets the adapters.
        layers: Which layers get one: a scope (``"blocks"``, ``"*.q_proj"``, ``"class:Linear"``). None leaves it to
            ``target_modules`` in ``config``, or to what ``peft`` knows of the architecture.
        adapter_name: Name of the adapter; callbacks with different names put several into one target.
        always: What trains beside the adapters although it lies inside the target.
        seed: Of the initial values; the same on all ranks, whatever the global seed.

    Raises:
        ConfigError: If the method or an option is unknown, with the nearest. From the fit, if ``peft`` refuses.
        ScopeError: From the fit, if ``target`` or ``layers`` names nothing.

    Example:
        >>> from lightning_peft import Adapter
        >>> Adapter("lora", {"r": 4, "target_modules": ["q_proj", "v_proj"]}).method
        'lora'

    Paper:
        S. Mangrulkar et al.: PEFT: State-of-the-art Parameter-Efficient Fine-Tuning methods, 2022; each method's own
        paper is named in ``peft``'s documentation of its configuration.
    """

    yields = True

    def __init__(
        self,
        method: str | PeftConfig = "lora",
        config: dict[str, Any] | None = None,
        target: str = "model",
        layers: str | list[str] | None = None,
        adapter_name: str = "default",
        always: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        super().__init__(scope="adapters", always=always, redraw="never", state="keep", seed=seed)
        self._made = make_config(method, config)
        self.method = str(getattr(self._made.peft_type, "value", self._made.peft_type)).lower()
        self.config = dict(config or {}) if isinstance(method, str) else plain_config(self._made)
        if not target:
            raise ConfigError("Adapter(target=''): name a submodule of the LightningModule, such as 'model'.")
        if layers is not None and "target_modules" in (config or {}):
            raise ConfigError("Adapter: layers and config['target_modules'] both say which layers get an adapter.")
        self.target = target
        self.layers = layers if layers is None or isinstance(layers, str) else list(layers)
        self.adapter_name = adapter_name
        self._injected: Injected | None = None
        self._driver: Driver | None = None
        self._undo_loss: tuple[LightningModule, Any] | None = None
        self._base: dict[str, int] | None = None

    # ------------------------------------------------------------------ what a user reads

    @property
    def handle(self) -> PeftModel:
        """``peft``'s own object over the target, for everything that ``peft`` can do with it.

        Raises:
            ConfigError: If no fit, validation or test has put the adapter in yet.
        """
        if self._injected is None:
            raise ConfigError("The adapter is put in by fit, validate, test or predict, and none has run yet.")
        return self._injected.handle

    def export(self, folder: str | Path) -> Path:
        """Write ``adapter_model.safetensors`` and ``adapter_config.json``, as ``PeftModel.from_pretrained`` reads them.

        Raises:
            ConfigError: If the method changed the base when it started (PiSSA, OLoRA), so that the adapter alone does
                not fit the original base.
        """
        from lightning_peft.adapters.files import export_adapter

        assert self.handle is not None
        assert self._injected is not None
        return export_adapter(self._injected, folder)

    # ------------------------------------------------------------------ the method

    @property
    @override
    def label(self) -> str:
        return f"{type(self).__name__}({self.method!r}, target={self.target!r}, adapter_name={self.adapter_name!r})"

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(target=self.target, adapter_name=self.adapter_name)

    @override
    def resolve(self, structure: Structure) -> Scope:
        """The adapter's parameters, and what lies outside every target."""
        assert self._injected is not None
        own = {name for name in self._injected.names if name in structure.parameters}
        targets = {target for target, _ in self._everything}
        outside = {
            name
            for name in structure.parameters
            if not any(name == target or name.startswith(f"{target}.") for target in targets)
        }
        names = (own | (outside if self._is_first else set())) - self.taken
        return Scope(tuple(name for name in structure.parameters if name in names), frozenset(own & names))

    @override
    def make_units(self, structure: Structure, names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
        """The adapter is one unit, what lies outside the target another."""
        assert self._injected is not None
        own = tuple(name for name in names if name in self._injected.names)
        rest = tuple(name for name in names if name not in self._injected.names)
        return {unit: members for unit, members in ((self.adapter_name, own), ("beside", rest)) if members}

    @override
    def bind(self, structure: Structure, user_flags: dict[str, bool]) -> Claim:
        if not self.resolve(structure).names:  # other methods of the run decide about all of it
            self._structure, self._units, self._always_units = structure, {}, {}
            return Claim(self.label, frozenset())
        return super().bind(structure, user_flags)

    def select(self, draw: Draw) -> list[str]:
        """All of it."""
        return list(self.units)

    # ------------------------------------------------------------------ injection

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        adapters = [method for method in Engine.of(trainer).methods if isinstance(method, Adapter)]
        self._is_first = adapters[0] is self
        self._base = None

        def build() -> None:
            prepare = getattr(trainer.precision_plugin, "prepare", None)
            if prepare is not None:  # quantise first
                prepare(pl_module)
            self._injected = inject(
                pl_module,
                self._made,
                target=self.target,
                adapter_name=self.adapter_name,
                layers=self.layers,
                seed=self.seed,
            )
            self._driver = driver_for(self._injected.handle, self.adapter_name)

        when_built(pl_module, build)
        if self._is_first:
            attach_frozen_base(trainer.strategy, self._frozen_base, _record)
        self._engine = Engine.of(trainer)
        self._module = pl_module

    @property
    def _everything(self) -> dict[tuple[str, str], Injected]:
        return injected(self._module)

    def _frozen_base(self, root: nn.Module) -> dict[str, int] | None:
        """Names and fingerprints of what cannot train in this run; None where that is not known."""
        registered = self._engine.registered
        if registered is None:
            return None
        if self._base is None:
            adapters = frozenset().union(*(adapter.names for adapter in injected(root).values()))
            structure = self._engine.structure
            assert structure is not None
            kept = registered | adapters | frozenset(structure.roles["adapters"])
            self._base = fingerprints(root, [name for name in structure.parameters if name not in kept])
        return self._base

    # ------------------------------------------------------------------ what some methods need from the loop

    @property
    @override
    def needs_whole_parameters(self) -> bool:
        return self._driver is not None and self._driver.sees_whole_parameters

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        driver = self._driver
        if driver is None or not driver.adds_loss:
            return
        if not pl_module.automatic_optimization:
            raise ConfigError(
                f"{self.label} adds a term to the loss, which with manual optimisation never leaves training_step. "
                "Use automatic optimisation."
            )
        original = pl_module.training_step
        self._undo_loss = (pl_module, pl_module.__dict__.get("training_step"))

        def training_step(*args: Any, **kwargs: Any) -> Any:  # not functools.wraps: Lightning follows __wrapped__
            return _add_loss(original(*args, **kwargs), driver.loss())

        pl_module.training_step = training_step

    @override
    def finished(self) -> None:
        if self._undo_loss is not None:
            (module, previous), self._undo_loss = self._undo_loss, None
            if previous is None:
                module.__dict__.pop("training_step", None)
            else:
                module.training_step = previous

    @override
    def stepped(self, optimizer: torch.optim.Optimizer) -> None:
        if self._driver is not None:
            self._driver.stepped(self._engine.steps - 1)

    @override
    def method_state(self) -> dict[str, Any]:
        return {} if self._driver is None else self._driver.state_dict()

    @override
    def load_method_state(self, state: dict[str, Any]) -> None:
        if self._driver is not None and state:
            self._driver.load_state_dict(state)


def _add_loss(output: Any, extra: torch.Tensor | None) -> Any:
    if output is None or extra is None:
        return output
    if isinstance(output, Mapping):
        return {**output, "loss": output["loss"] + extra}
    return output + extra


def _record(root: nn.Module) -> dict[str, Any]:
    return {
        "adapters": [
            {"target": each.target, "adapter_name": each.adapter_name, "config": each.config, "seed": each.seed}
            for each in injected(root).values()
        ]
    }
