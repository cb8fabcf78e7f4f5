"""Any method of Hugging Face ``peft``, as one callback."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from typing_extensions import override

from lightning_peft.adapters.calibration import find_start
from lightning_peft.adapters.config import make_config, plain_config
from lightning_peft.adapters.drivers import Driver, FrozenDriver, driver_for
from lightning_peft.adapters.frozen_base import attach_frozen_base, fingerprints
from lightning_peft.adapters.injection import Injected, activate, inject, injected
from lightning_peft.adapters.starts import convert_all
from lightning_peft.core.blocks import Structure
from lightning_peft.core.draw import Draw
from lightning_peft.core.instance import replace_on
from lightning_peft.core.names import named_parameters
from lightning_peft.core.plan import Claim
from lightning_peft.core.scope import Scope
from lightning_peft.core.trainable import set_flags
from lightning_peft.errors import ConfigError, PlanConflict
from lightning_peft.methods.base import MethodCallback
from lightning_peft.methods.build import when_built
from lightning_peft.methods.engine import Engine

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

__all__ = ["Adapter"]


_FLAGS = "_lightning_peft_flags"
"""Where a LightningModule keeps what could train before adapters were put in."""


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
        method: Name of a ``peft`` method (``"lora"``, ``"ia3"``, ``"vera"``, ...), a ``PeftConfig``, or the folder or
            hub id of a saved adapter, to start from its values.
        config: Options of the method, as ``peft`` calls them; over those of a saved adapter.
        target: Path of the submodule that gets the adapters.
        layers: Which layers get one: a scope (``"blocks"``, ``"*.q_proj"``, ``"class:Linear"``). None leaves it to
            ``target_modules`` in ``config``, or to what ``peft`` knows of the architecture.
        adapter_name: Name of the adapter; callbacks with different names put several into one target.
        always: What trains beside the adapters although it lies inside the target.
        seed: Of the initial values; the same on all ranks, whatever the global seed.
        calibration_batches: Batches of the training data, at most, that a start from data is computed from (``"lora"``
            with ``init_lora_weights`` ``"eva"``, ``"corda"`` or ``"lora_ga"``; ``"lora_sb"``). They are drawn at
            random, each of the training loader's own batch size, the same on all ranks. 0: LoRA-SB waits for
            :func:`~lightning_peft.calibrate_lora_sb`.
        train: Whether it trains. False: it takes part in the forward pass as it is, and the checkpoint holds it.
        active: Whether it takes part in the forward pass; one that does not cannot train.

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
        calibration_batches: int = 8,
        train: bool = True,
        active: bool = True,
    ) -> None:
        super().__init__(scope="adapters", always=always, redraw="never", state="keep", seed=seed)
        from lightning_peft.adapters.files import is_place, read_adapter_config

        self._place = str(method) if is_place(method) else None
        if self._place is not None:
            method = read_adapter_config(self._place)
        self._made = make_config(method, config)
        self.method = str(getattr(self._made.peft_type, "value", self._made.peft_type)).lower()
        self.config = dict(config or {}) if isinstance(method, str) else plain_config(self._made)
        if not target:
            raise ConfigError("Adapter(target=''): name a submodule of the LightningModule, such as 'model'.")
        if layers is not None and (self._place is not None or "target_modules" in (config or {})):
            said = "config['target_modules']" if self._place is None else f"the adapter saved in {self._place!r}"
            raise ConfigError(f"Adapter: layers and {said} both say which layers get an adapter.")
        if train and not active:
            raise ConfigError(
                "Adapter(active=False): what takes no part in the forward pass gets no gradient. Say train=False too."
            )
        self.target = target
        self.layers = layers if layers is None or isinstance(layers, str) else list(layers)
        self.adapter_name = adapter_name
        self.calibration_batches = calibration_batches
        self.train, self.active = train, active
        self._injected: Injected | None = None
        self._driver: Driver | None = None
        self._own: frozenset[str] = frozenset()
        self._undo_masters: Callable[[], None] = _nothing
        self._unwrap_steps: Callable[[], None] = _nothing
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

    @classmethod
    def from_pretrained(cls, place: str | Path, **options: Any) -> Adapter:
        """Start from a saved adapter: ``Adapter(place, **options)``.

        Args:
            place: Folder with ``adapter_config.json`` and ``adapter_model.safetensors``, or a hub id.
            options: As of :class:`Adapter`.

        Raises:
            ConfigError: If there is no adapter, with the nearest folder that is one.
        """
        return Adapter(str(place), **options)

    def export(self, folder: str | Path) -> Path:
        """Write ``adapter_model.safetensors`` and ``adapter_config.json``, as ``PeftModel.from_pretrained`` reads them.

        A method that changed the base when it started (PiSSA, OLoRA, CorDA, LoRA-GA, KaSA) is written as an ordinary
        LoRA of twice the rank over the original base, equal up to rounding.

        Raises:
            ConfigError: If it changed the base in a way that no LoRA can express (LoftQ, or together with DoRA).
        """
        from lightning_peft.adapters.files import export_adapter

        assert self.handle is not None
        assert self._injected is not None
        return export_adapter(self._injected, folder)

    def reduce_intruders(self, top: int = 10, threshold: float = 0.5, scale: float = 0.75) -> dict[str, int]:
        """Scale down, in place, what a trained LoRA has put on top of the weights' spectrum and pretraining lacks.

        Brings back what fine-tuning made the model forget, at some cost for the task; call it after the fit, before
        :meth:`export` or a merge. R. Shuttleworth et al., arXiv:2410.21228.

        Args:
            top: Leading singular vectors of each tuned weight that are looked at, 1 or more.
            threshold: Largest absolute cosine with those of the base at which one is an intruder, in ``(0, 1)``.
            scale: Factor on an intruder's singular value, in ``[0, 1]``; 1 leaves it, 0 removes it.

        Returns:
            Path of each layer below the target -> number of its intruders.

        Raises:
            ConfigError: If the adapter is not a plain LoRA, or the base is quantised or sharded.
        """
        from lightning_peft.adapters.intruders import reduce_intruders

        return reduce_intruders(self.handle, self.adapter_name, top=top, threshold=threshold, scale=scale)

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
        own = {name for name in self._own if name in structure.parameters}
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
        units = self._driver.cut(own) if self._driver is not None else None
        units = {self.adapter_name: own} if units is None else units
        return {unit: members for unit, members in (*units.items(), ("beside", rest)) if members}

    @override
    def bind(self, structure: Structure, user_flags: dict[str, bool]) -> Claim:
        if self._driver is not None and (self._driver.scores or self._driver.allocates) and self._own & self.taken:
            raise PlanConflict(
                f"{self.label} decides about its parameters by scores of all of them in every step, and another method "
                f"of the run has {min(self._own & self.taken)} in its scope. Leave them to one of the two."
            )
        if not self.resolve(structure).names:  # other methods of the run decide about all of it
            self._structure, self._units, self._always_units = structure, {}, {}
            return Claim(self.label, frozenset())
        # peft has frozen what lies inside the targets: for "always" counts what the user had frozen before
        before = self._module.__dict__.get(_FLAGS, {})
        inside = {name for name in user_flags for target, _ in self._everything if name.startswith(f"{target}.")}
        theirs = {name: before.get(name.replace(".base_layer.", "."), True) for name in inside}
        return super().bind(structure, {**user_flags, **theirs})

    @property
    @override
    def is_static(self) -> bool:
        return self._driver is None or not self._driver.allocates

    @override
    def draw_due(self, step: int, epoch: int) -> int:
        return 0 if self._driver is None else self._driver.allocations

    def select(self, draw: Draw) -> list[str]:
        """All of it, or what the method has allocated."""
        dropped = frozenset() if self._driver is None else self._driver.dropped
        return [unit for unit in self.units if unit not in dropped]

    # ------------------------------------------------------------------ injection

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._undo_masters()
        adapters = [method for method in Engine.of(trainer).methods if isinstance(method, Adapter)]
        self._unwrap_steps()
        self._is_first = adapters[0] is self
        self._engine, self._module = Engine.of(trainer), pl_module
        self._base = None
        if self._is_first:
            from lightning_peft.adapters.master_weights import keep_masters

            self._undo_masters = keep_masters(trainer, pl_module)

        def build() -> None:
            from lightning_peft.adapters.files import load_adapter_weights

            prepare = getattr(trainer.precision_plugin, "prepare", None)
            if prepare is not None:  # quantise first
                prepare(pl_module)
            convert_all(trainer, pl_module)  # what a checkpoint's fingerprints are of
            if not injected(pl_module):
                pl_module.__dict__[_FLAGS] = {n: p.requires_grad for n, p in named_parameters(pl_module).items()}
            start, waits = find_start(
                trainer,
                pl_module,
                self._made,
                target=self.target,
                adapter_name=self.adapter_name,
                layers=self.layers,
                num_batches=self.calibration_batches,
                seed=self.seed,
                label=self.label,
            )
            if self._is_first:
                self._wrap_steps()
            if waits:
                return
            is_new = (self.target, self.adapter_name) not in injected(pl_module)
            adapter = inject(
                pl_module,
                self._made,
                target=self.target,
                adapter_name=self.adapter_name,
                layers=self.layers,
                seed=self.seed,
                start=start,
            )
            if is_new and self._place is not None:
                load_adapter_weights(adapter, self._place)
            switched = isinstance(self._driver, FrozenDriver) == self.train
            if self._driver is None or switched or adapter is not self._injected:
                driver = self.make_driver(adapter)
                self._injected, self._driver = adapter, driver if self.train else FrozenDriver(driver)
            adapter.is_active = self.active
            activate(pl_module, self.target)
            self._own = self._driver.trains(adapter.names)
            parameters = named_parameters(pl_module)
            for each in adapters:  # peft has made all adapters of the target trainable
                if each._injected is not None and each._injected.is_in(pl_module):
                    set_flags(parameters, {name: name in each._own for name in each._injected.names})

        when_built(pl_module, build)
        if self._is_first:
            attach_frozen_base(trainer.strategy, self._frozen_base, _record)

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

    def make_driver(self, adapter: Injected) -> Driver:
        """Return what drives the adapter; a method of this package's own says it here."""
        return driver_for(adapter.handle, adapter.adapter_name, adapter.seed)

    @override
    def prepare_optimizers(self, trainer: Trainer) -> None:
        if self._driver is not None:
            self._driver.prepare_optimizers(trainer)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._driver is not None and self._driver.adds_loss and not pl_module.automatic_optimization:
            raise ConfigError(
                f"{self.label} adds a term to the loss, which with manual optimisation never leaves training_step. "
                "Use automatic optimisation."
            )

    def _wrap_steps(self) -> None:
        """Let all adapters of the run see each batch, and add to the training loss; by the first of them, once."""
        module = self._module
        names = ("training_step", "validation_step", "test_step", "predict_step")
        steps = {name: getattr(module, name) for name in names if is_overridden(name, module)}
        wrapped = {name: self._wrapped(step, name == "training_step") for name, step in steps.items()}
        self._unwrap_steps = replace_on(module, **wrapped)

    def _wrapped(self, original: Callable[..., Any], adds_loss: bool) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:  # not functools.wraps: Lightning follows __wrapped__
            drivers = [each._driver for each in self._engine.methods if isinstance(each, Adapter)]
            drivers = [driver for driver in drivers if driver is not None]
            for driver in drivers:
                driver.batch(args[0] if args else next(iter(kwargs.values()), None))
            output = original(*args, **kwargs)
            for driver in drivers:
                if adds_loss and driver.adds_loss and torch.is_grad_enabled():  # a method may score without
                    output = _add_loss(output, driver.loss())
            return output

        return step

    @override
    def switched(self, trainer: Trainer) -> None:
        if self._driver is not None:
            self._driver.started()

    @override
    def finished(self) -> None:
        self._unwrap_steps()
        if self._driver is not None:
            self._driver.finished()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        Adapter.finished(self)
        self._undo_masters()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        Adapter.finished(self)  # also where the fit was not set up yet

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self._driver is not None:
            self._driver.stepping(optimizer)

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


def _nothing() -> None:
    pass


def _add_loss(output: Any, extra: torch.Tensor | None) -> Any:
    if output is None or extra is None:
        return output
    if isinstance(output, Mapping):
        return {**output, "loss": output["loss"] + extra}
    return output + extra


def _record(root: nn.Module) -> dict[str, Any]:
    return {"adapters": [each.record() for each in injected(root).values()]}
