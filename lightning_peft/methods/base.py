"""The callback that every method derives from.

A method answers one question, "which units train from this draw on?", in :meth:`MethodCallback.select`. Everything
else (freezing at the right moment, the optimizer-step clock, optimizer state, resume, DDP, checks, the ledger) is done
once for all methods of a run by :class:`~lightning_peft.methods.engine.Engine`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_peft.core.blocks import Structure
from lightning_peft.core.draw import Draw
from lightning_peft.core.ledger import Ledger
from lightning_peft.core.plan import Claim
from lightning_peft.core.scope import Scope, resolve_scope
from lightning_peft.core.trainable import StatePolicy, check_state_policy
from lightning_peft.errors import ConfigError, ScopeError, suggest
from lightning_peft.methods.arguments import is_whole
from lightning_peft.methods.engine import Engine
from lightning_peft.methods.moment import Moment

__all__ = ["MethodCallback", "Redraw", "units_by_block"]

Redraw = int | Literal["never", "epoch"]
"""When a method draws again: after so many optimizer steps, at each epoch, or never."""


class MethodCallback(Callback):
    """Base of all methods that choose which parameters train.

    Args:
        scope: What the method may choose from, see :mod:`lightning_peft.core.scope`.
        always: What trains all the time beside it. A role here means its tensors outside the blocks; ``"adapters"``,
            names and patterns reach everywhere. Parameters that the scope names are never "always".
        redraw: When to draw again: an ``int`` counts optimizer steps.
        state: What becomes of the optimizer state of a parameter that freezes: ``"keep"``, ``"drop"``, ``"offload"``.
        seed: Seed of the method's private draws; the same on all ranks.

    Every parameter that no method of the run plans to train is frozen while the run lasts. The flags that the model
    came with are put back when it ends.
    """

    yields = False
    """Whether the method leaves what is in its scope to other methods of the run that have it in theirs."""

    taken: frozenset[str] = frozenset()
    """For a method that yields: names that the others may train."""

    def __init__(
        self,
        *,
        scope: str | Sequence[str],
        always: str | Sequence[str],
        redraw: Redraw,
        state: StatePolicy,
        seed: int,
    ) -> None:
        super().__init__()
        self.scope = scope if isinstance(scope, str) else _check_names(scope, "scope")
        self.always = tuple(_check_names(always, "always"))
        self.state: StatePolicy = check_state_policy(state)
        if not is_whole(seed, 0):
            raise ConfigError(f"seed={seed!r}: a whole number from 0 on.")
        self.seed = int(seed)
        self._redraw = _check_redraw(redraw)
        self._draw_index = -1
        self._units: dict[str, tuple[str, ...]] = {}
        self._always_units: dict[str, tuple[str, ...]] = {}
        self._ledger = Ledger({})
        self._active: frozenset[str] = frozenset()
        self._loaded: dict[str, Any] | None = None

    # ------------------------------------------------------------------ what a method answers

    def resolve(self, structure: Structure) -> Scope:
        """Turn the scope into names; a method with a syntax of its own does it here."""
        return resolve_scope(self.scope, structure)

    def make_units(self, structure: Structure, names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
        """Cut the scope into the units that :meth:`select` chooses from; by default one unit per block.

        Args:
            structure: The model.
            names: Canonical names in the scope that may train, in model order.

        Returns:
            Unit name -> parameter names, disjoint, in model order.
        """
        return units_by_block(structure, names)

    def select(self, draw: Draw) -> Iterable[str]:
        """Return the names of the units that train from this draw on: a pure function of the draw and saved state."""
        raise NotImplementedError

    def observe(self, moment: Moment) -> None:
        """Look at the run before each optimizer step, ahead of a draw: scores, phases. Must leave no trace.

        Called once per optimizer step, at the first micro-batch, on every rank, from the first batch on.
        """

    def prepare_optimizers(self, trainer: Trainer) -> None:
        """Look at or regroup the optimizers, which exist since a moment; before any state is restored.

        A method that replaces an optimizer of ``trainer.strategy`` does it here, or in :meth:`advance`.
        """

    def restoring(self, state: dict[str, Any]) -> None:
        """Called with :meth:`state_dict` of the checkpoint where a strategy restores optimizers before callbacks.

        A method that replaces optimizers puts those of the checkpoint in place, as :meth:`prepare_optimizers` does
        where the state is known by then.
        """

    def switched(self, trainer: Trainer) -> None:
        """Called when the plan of this draw is in force: at the start, after a resume, and after each new draw."""

    def stepped(self, optimizer: torch.optim.Optimizer) -> None:
        """Called after each step of each optimizer, when the engine has looked at gradients and weights."""

    def finished(self) -> None:
        """Undo what :meth:`switched` did; called when a fit ends, also by an exception, and maybe more than once."""

    def method_state(self) -> dict[str, Any]:
        """State of the method beyond draws and ledger (scores, phases), for the checkpoint."""
        return {}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Restore :meth:`method_state`."""

    # ------------------------------------------------------------------ what a user reads

    @property
    def trainable_names(self) -> frozenset[str]:
        """Canonical names of the parameters this method trains now; set from ``on_train_start`` on."""
        return self._active

    @property
    def draw_index(self) -> int:
        """Number of the present draw, from 0; -1 before training."""
        return self._draw_index

    @property
    def ledger(self) -> Ledger:
        """Which units were active from which optimizer step on."""
        return self._ledger

    @property
    def history(self) -> list[tuple[int, frozenset[str]]]:
        """Each draw as ``(optimizer step, names that train from then on)``."""
        return self._ledger.history()

    @property
    def units(self) -> dict[str, tuple[str, ...]]:
        """Unit name -> parameter names, what :meth:`select` chooses from."""
        return dict(self._units)

    @property
    def is_static(self) -> bool:
        """Whether the method draws once only."""
        return self._redraw == "never"

    @property
    def needs_batch(self) -> bool:
        """Whether a draw needs a batch to look at.

        The first draw then comes with the first batch: until then everything that may ever train is trainable, and
        nothing is in the history. :meth:`observe` is called ahead of every draw.
        """
        return False

    @property
    def needs_whole_parameters(self) -> bool:
        """Whether the method reads weights or gradients during the run, of which sharding leaves pieces."""
        return False

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments as plain values."""
        names = [name for name in inspect.signature(type(self).__init__).parameters if name != "self"]
        return {name: _plain(getattr(self, name)) for name in names}

    def describe(self) -> dict[str, Any]:
        """What the method is set to and what it does now, as plain values."""
        numels = {name: p.numel() for name, p in self._structure.parameters.items()} if self._draw_index >= 0 else {}
        return {
            "method": type(self).__name__,
            "settings": self.settings(),
            "draw_index": self._draw_index,
            "num_units": len(self._units),
            "active_units": list(self.active_units()),
            "always_units": list(self._always_units),
            "num_selectable_parameters": sum(numels.get(name, 0) for name in self.selectable),
            "num_trainable_parameters": sum(numels.get(name, 0) for name in self._active),
        }

    @property
    def label(self) -> str:
        """How messages call this method."""
        return f"{type(self).__name__}(scope={self.scope!r})"

    # ------------------------------------------------------------------ for the engine

    @property
    def scope_names(self) -> frozenset[str]:
        """All names that the draws choose from."""
        return frozenset(name for unit in self._units.values() for name in unit)

    @property
    def selectable(self) -> frozenset[str]:
        """All names that may train at some time of the run."""
        return self.scope_names.union(*self._always_units.values())

    def bind(self, structure: Structure, user_flags: dict[str, bool]) -> Claim:
        """Resolve the scope on a model.

        Args:
            structure: The model.
            user_flags: ``requires_grad`` of each parameter as the user left it.

        Returns:
            What this method claims: all it may ever train.

        Raises:
            ScopeError: If nothing is left to choose from, or ``always`` names adapters that the scope has.
        """
        self._structure = structure
        scope = self.resolve(structure)
        names = tuple(name for name in scope.names if user_flags[name] or name in scope.explicit)
        if not names:
            raise ScopeError(
                f"{self.label}: all {len(scope.names)} parameters of the scope have requires_grad=False. A role does "
                "not thaw what you froze; unfreeze them, or name them in scope with a path or pattern."
            )
        self._units = self.make_units(structure, names)
        outside = structure.outside_blocks()
        present = [entry for entry in self.always if outside.roles.get(entry, (entry,))]
        extra = resolve_scope(present, outside, argument="always")
        taken = set(scope.names)
        self._always_units = {}
        for entry in present:
            members = None if entry.startswith("!") else resolve_scope(entry, outside, argument="always")
            fresh = tuple(
                name
                for name in (members.names if members else ())
                if name in extra.names and name not in taken and (user_flags[name] or name in extra.explicit)
            )
            if entry == "adapters" and members and taken.issuperset(members.names):
                raise ScopeError(
                    f"{self.label}: always='adapters' has no effect, because the scope has them too. Take them out of "
                    "it with '!adapters'."
                )
            taken.update(fresh)
            if fresh:
                self._always_units[entry if entry not in self._units else f"always {entry}"] = fresh
        ledger = Ledger({**self._always_units, **self._units})
        if list(ledger.units) == list(self._ledger.units):
            ledger.load_state_dict(self._ledger.state_dict())
        self._ledger = ledger
        return Claim(self.label, self.before_wrap())

    def before_wrap(self) -> frozenset[str]:
        """Names that must be trainable when the optimizer is built and the model is wrapped.

        All that may ever train; for a method that draws once, and can do so without a batch, just its draw.
        """
        if not self.is_static or self.needs_batch:
            return self.selectable
        return self._names(self._select(Draw(0, 0, 0, self.seed)))

    def lasting(self) -> frozenset[str]:
        """Names that train in every draw of the run, as far as is known before it."""
        if self.is_static and not self.needs_batch:
            return self.before_wrap()
        return frozenset().union(*self._always_units.values())

    def draw_due(self, step: int, epoch: int) -> int:
        """Number of the draw that should be in force at this time."""
        if self._redraw == "never":
            return 0
        return epoch if isinstance(self._redraw, str) else step // self._redraw

    def begin(self, step: int, epoch: int, global_step: int, continues: bool) -> None:
        """Start, go on or resume.

        A new run starts at the first draw. A second ``fit`` of the same Trainer goes on where the first stopped. A
        resumed run puts the saved draw back in force, even if a new one is due at the next batch.
        """
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            self._ledger.load_state_dict(loaded["ledger"])
            self.load_method_state(loaded["method_state"])
            self._draw_index = loaded["draw_index"]
            self._active = self._ledger.history()[-1][1]
            return
        if not continues:
            self._ledger = Ledger(self._ledger.units)
            self._draw_index = -1
        if not self.needs_batch:
            self.advance(step, epoch, global_step)
        elif self._draw_index < 0:
            self._active = self.selectable

    def active_units(self) -> dict[str, tuple[str, ...]]:
        """The chosen units that train now, without what trains always."""
        return {unit: names for unit, names in self._units.items() if names[0] in self._active}

    def advance(self, step: int, epoch: int, global_step: int) -> bool:
        """Draw if a new draw is due; return whether one was made."""
        due = self.draw_due(step, epoch)
        if due == self._draw_index:
            return False
        chosen = self._select(Draw(due, step, epoch, self.seed))
        self._draw_index = due
        self._active = self._names(chosen)
        self._ledger.record(global_step, (*self._always_units, *chosen))
        return True

    def _select(self, draw: Draw) -> tuple[str, ...]:
        chosen = tuple(dict.fromkeys(self.select(draw)))
        unknown = [unit for unit in chosen if unit not in self._units]
        assert not unknown, f"{self.label} chose units that do not exist: {unknown[:3]}"
        return chosen

    def _names(self, chosen: Iterable[str]) -> frozenset[str]:
        units = (*self._always_units.values(), *(self._units[unit] for unit in chosen))
        return frozenset(name for unit in units for name in unit)

    # ------------------------------------------------------------------ Lightning hooks: all go to the engine

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(scope=self.scope)

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._draw_index < 0:
            return {}
        return {
            "settings": self.settings(),
            "draw_index": self._draw_index,
            "ledger": self._ledger.state_dict(),
            "method_state": self.method_state(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._loaded = None
        Engine.of(trainer).setup(self, stage)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        Engine.of(trainer).load_checkpoint(self, checkpoint)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        Engine.of(trainer).save_checkpoint(self, checkpoint)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        Engine.of(trainer).train_start(self)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        Engine.of(trainer).batch_start(self, batch, batch_idx)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        Engine.of(trainer).finish()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        Engine.of(trainer).finish()


def units_by_block(structure: Structure, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Group names by the block they lie in; a name outside all blocks is grouped with its module."""
    block_of = structure.block_of()
    units: dict[str, list[str]] = {}
    for name in names:
        unit = block_of[name].name if name in block_of else name.rpartition(".")[0] or name
        units.setdefault(unit, []).append(name)
    return {unit: tuple(members) for unit, members in units.items()}


def _check_redraw(redraw: Any) -> Redraw:
    if redraw in ("never", "epoch"):
        return redraw
    if isinstance(redraw, str):
        raise ConfigError(f"redraw={redraw!r} is no schedule. {suggest(redraw, ('never', 'epoch'))} Or give steps.")
    if not is_whole(redraw, 1):
        raise ConfigError(f"A method draws again after a whole number of optimizer steps, at least 1; got {redraw!r}.")
    return int(redraw)


def _check_names(value: Any, argument: str) -> list[str]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, (list, tuple, set, frozenset)) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{argument}={value!r}: a role, path or pattern, or a list of them.")
    return list(names)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple, set, frozenset)) else value
