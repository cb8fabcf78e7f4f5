"""What all methods of one Trainer share: one plan, one clock, one place that changes the model.

The first method among the Trainer's callbacks leads: its hooks drive the engine, the others' do nothing. Within a fit:

``setup``
    the strategy's ``setup`` is wrapped, to be present after ``configure_model`` and right before the model is wrapped
    and ``configure_optimizers`` runs;
before wrapping
    structure, scopes, conflicts; everything that may ever train is left trainable, the rest is frozen, so that an
    optimizer built over trainable parameters holds each of them and DDP's buckets hold no other;
after wrapping
    each of these is in exactly one optimizer;
``on_train_start``
    (all state is restored by now) the first draw, or the saved one, comes into force;
``on_train_batch_start``
    a new draw, when the clock says so. The clock moves in optimizer steps, so that this is always the first
    micro-batch of an accumulation window;
``teardown`` or ``on_exception``
    the model gets back the flags it came with.
"""

from __future__ import annotations

import operator
import weakref
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_peft.core.blocks import Structure, find_structure
from lightning_peft.core.clock import OptimizerStepClock
from lightning_peft.core.instance import replace_on
from lightning_peft.core.names import named_parameters
from lightning_peft.core.plan import Claim, check_disjoint, fingerprint_names
from lightning_peft.core.rng import get_rng_state, set_rng_state
from lightning_peft.core.trainable import (
    FrozenNormStatistics,
    OffloadedStates,
    StatePolicy,
    optimizer_members,
    set_flags,
    set_trainable,
)
from lightning_peft.data.loader import attach_trainer
from lightning_peft.errors import ResumeMismatch, ScopeError, UnsupportedStrategy
from lightning_peft.methods.checks import (
    GradientWatch,
    MovementCheck,
    check_checkpointing,
    check_flags,
    check_optimizers,
)
from lightning_peft.methods.compiled import CompiledSelections
from lightning_peft.methods.moment import Moment
from lightning_peft.strategies.guards import StrategyGuard, all_ranks_agree, guard_for

if TYPE_CHECKING:
    from lightning_peft.methods.base import MethodCallback

__all__ = ["CHECKPOINT_KEY", "Engine"]

CHECKPOINT_KEY = "lightning_peft"
"""Where the engine's state lies in a Lightning checkpoint."""

_engines: weakref.WeakKeyDictionary[Trainer, Engine] = weakref.WeakKeyDictionary()


class Engine:
    """Drive all methods of one Trainer. Get it with :meth:`of`."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = weakref.proxy(trainer)
        self._clock = OptimizerStepClock(self._before_step, self._after_step)
        self._structure: Structure | None = None
        self._resume: dict[str, Any] | None = None
        self._undo_setup: Any = None
        self._in_force = False

    @classmethod
    def of(cls, trainer: Trainer) -> Engine:
        """Return the engine of ``trainer``."""
        if trainer not in _engines:
            _engines[trainer] = cls(trainer)
        return _engines[trainer]

    @property
    def methods(self) -> list[MethodCallback]:
        """The Trainer's methods, the leader first."""
        from lightning_peft.methods.base import MethodCallback

        return [callback for callback in self._trainer.callbacks if isinstance(callback, MethodCallback)]

    def _leads(self, method: MethodCallback) -> bool:
        return self.methods[0] is method

    # ------------------------------------------------------------------ before training

    def setup(self, method: MethodCallback, stage: str) -> None:
        """Get ready to take part in the strategy's setup of a fit; other stages are left alone."""
        if stage != "fit" or not self._leads(method):
            return
        self.finish()
        self._resume = None
        strategy = self._trainer.strategy
        self._guard: StrategyGuard = guard_for(strategy)
        self._guard.attach()
        original = strategy.setup

        def setup(trainer: Trainer) -> None:
            undo()
            self._before_wrap()
            original(trainer)
            self._after_wrap()

        undo = self._undo_setup = replace_on(strategy, setup=setup)

    def _before_wrap(self) -> None:
        with self._guard.whole_parameters():
            structure = find_structure(self._trainer.lightning_module)
            self._user_flags = {name: p.requires_grad for name, p in structure.parameters.items()}
            check_disjoint(self._bind(structure))
        for method in self.methods:
            self._check_can_shard(method)
        self._structure, self._in_force = structure, True
        self._registered = frozenset().union(*(method.before_wrap() for method in self.methods))
        if not self._registered:
            raise ScopeError(
                f"{', '.join(method.label for method in self.methods)}: nothing of the model trains in this run."
            )
        lasting = frozenset().union(*(method.lasting() for method in self.methods))
        check_checkpointing(structure, self._registered, lasting)
        set_flags(structure.parameters, {name: name in self._registered for name in structure.parameters})

    def _bind(self, structure: Structure) -> list[Claim]:
        """Resolve all scopes; a method that yields is asked after the others, and told what they have taken."""
        claims, taken = [], frozenset()
        for method in sorted(self.methods, key=lambda method: method.yields):
            method.taken = taken if method.yields else frozenset()
            claims.append(method.bind(structure, self._user_flags))
            taken |= method.selectable
        return claims

    @property
    def structure(self) -> Structure | None:
        """The model of the present or last fit."""
        return self._structure

    @property
    def registered(self) -> frozenset[str] | None:
        """Names that may train at some time of the present or last fit; None before the first."""
        return getattr(self, "_registered", None)

    @property
    def steps(self) -> int:
        """Optimizer steps done, of the optimizer that has done most."""
        return max(self._clock.counts, default=0)

    def _check_can_shard(self, method: MethodCallback) -> None:
        strategy = type(self._trainer.strategy).__name__
        if method.needs_whole_parameters and self._guard.shards:
            raise UnsupportedStrategy(
                f"{method.label} reads whole weights or gradients during the run, of which {strategy} gives each "
                "process a piece. Use one device or strategy='ddp'."
            )
        if method.state == "offload" and not self._guard.can_offload_state:
            raise UnsupportedStrategy(
                f"{method.label}: state='offload' is not supported under {strategy}. Use state='keep' or 'drop', or "
                "strategy='fsdp2'."
            )

    def _after_wrap(self) -> None:
        assert self._structure is not None
        present = named_parameters(self._trainer.lightning_module)  # sharding and materialising make others
        assert present.keys() == self._structure.parameters.keys()
        self._structure.parameters.update(present)
        self._guard.wrapped(present, self._registered)
        check_optimizers(self._structure.parameters, self._registered, self._trainer.strategy.optimizers)
        for method in self.methods:
            method.prepare_optimizers(self._trainer)
        self._guard.on_restore(self._restoring)

    def _restoring(self, checkpoint: dict[str, Any]) -> None:
        """Let the methods put the optimizers in place whose states a checkpoint is about to fill."""
        states = checkpoint.get("callbacks", {})
        for method in self.methods:
            if states.get(method.state_key):
                method.restoring(states[method.state_key])

    # ------------------------------------------------------------------ training

    def train_start(self, method: MethodCallback) -> None:
        """Bring the first draw, or the saved one, into force."""
        if not self._leads(method):
            return
        assert self._structure is not None
        trainer = self._trainer
        self._policies: dict[str, StatePolicy] = {name: m.state for m in self.methods for name in m.selectable}
        self._offloaded = OffloadedStates()
        self._planned: frozenset[str] = self._registered
        self._norms = FrozenNormStatistics(self._structure.modules, _names_below(self._structure))
        self._compiled = CompiledSelections(trainer.lightning_module)
        resume, self._resume = self._resume, None
        if resume is not None:
            self._clock.counts = list(resume["clock"])
            self._offloaded.load_state_dict(resume["offloaded"])
        elif trainer.global_step == 0:
            self._clock.counts = []
        continues = any(self._clock.counts)
        self._observed: list[int] | None = None if resume is None else resume["observed"]
        self._watch_optimizers()
        for each, indices in self._times:
            each.begin(self._clock.time(indices), trainer.current_epoch, trainer.global_step, continues)
        self._apply()
        attach_trainer(cast(Trainer, trainer))
        if resume is not None:
            self._restore_process(resume)

    def _watch_optimizers(self) -> None:
        """Count the steps of the Trainer's present optimizers and check what they do."""
        assert self._structure is not None
        parameters = self._structure.parameters
        self._optimizers: list[torch.optim.Optimizer] = list(self._trainer.strategy.optimizers)
        self._movement = MovementCheck(parameters, self._optimizers, self._guard.merge)
        self._gradients = GradientWatch(parameters, self._optimizers, self._guard.merge)
        self._clock.attach(self._optimizers)
        members = optimizer_members(parameters, self._optimizers)
        self._times = [(m, sorted({i for name in m.scope_names for i in members[name]})) for m in self.methods]

    def _follow_optimizers(self) -> None:
        """Go on with the optimizers that a method put in the place of others; state that waits on the CPU is void."""
        assert self._structure is not None
        optimizers = self._trainer.strategy.optimizers
        if len(optimizers) == len(self._optimizers) and all(map(operator.is_, optimizers, self._optimizers)):
            return
        check_optimizers(self._structure.parameters, self._registered, optimizers)
        self._offloaded = OffloadedStates()
        self._watch_optimizers()

    def batch_start(self, method: MethodCallback, batch: Any, batch_idx: int) -> None:
        """Let the methods look at the run, and draw again where a new draw is due."""
        if not self._leads(method):
            return
        self._clock.settle()
        trainer, changed = self._trainer, False
        new_step = self._clock.counts != self._observed
        for each, indices in self._times:
            step = self._clock.time(indices)
            due = each.needs_batch and each.draw_due(step, trainer.current_epoch) != each.draw_index
            if new_step or due:
                each.observe(Moment(trainer, trainer.lightning_module, batch, batch_idx, step, trainer.current_epoch))
            changed |= each.advance(step, trainer.current_epoch, trainer.global_step)
        self._observed = list(self._clock.counts)
        if changed:
            self._apply()
        self._norms.hold()

    def _apply(self) -> None:
        """Make the union of all methods' plans the trainable set."""
        assert self._structure is not None
        parameters = self._structure.parameters
        self._follow_optimizers()
        check_flags(parameters, self._planned)
        planned = frozenset().union(*(method.trainable_names for method in self.methods))
        all_ranks_agree(
            fingerprint_names(planned), "The set of parameters to train", self._trainer.strategy.root_device
        )
        self._guard.before_switch()
        switch = set_trainable(
            parameters,
            planned,
            optimizers=self._optimizers,
            policy=lambda name: self._policies.get(name, "keep"),
            offloaded=self._offloaded,
        )
        self._planned = planned
        if switch:
            self._guard.after_switch()
        self._norms.apply(planned)
        self._compiled.note()
        for method in self.methods:
            method.switched(self._trainer)
        self._gradients.expect({unit: names for m in self.methods for unit, names in m.active_units().items()})

    def _before_step(self, index: int, optimizer: torch.optim.Optimizer) -> None:
        if self._movement.is_pending:
            self._movement.before_step(index, optimizer)

    def _after_step(self, index: int, optimizer: torch.optim.Optimizer) -> None:
        self._gradients.after_step(index)
        if self._movement.is_pending:
            self._movement.after_step(index, optimizer, self._planned)
        for method in self.methods:
            method.stepped(optimizer)
        self._guard.after_step()

    def finish(self) -> None:
        """Give the model back as it came; safe to call at any time and more than once."""
        if self._undo_setup is not None:
            self._undo_setup()
        self._clock.detach()
        if not self._in_force:
            return
        self._in_force = False
        assert self._structure is not None
        if hasattr(self, "_norms"):
            self._norms.release()
        for method in self.methods:
            method.finished()
        set_flags(self._structure.parameters, self._user_flags)

    # ------------------------------------------------------------------ checkpoints

    def save_checkpoint(self, method: MethodCallback, checkpoint: dict[str, Any]) -> None:
        """Add clock, random states, offloaded optimizer states and unfinished gradients. Called on every rank.

        Also after the fit has ended, or while it ends by an exception: those checkpoints go on as well.
        """
        if not self._leads(method) or self._structure is None or method.draw_index < 0:
            return
        checkpoint[CHECKPOINT_KEY] = {
            "version": 1,
            "methods": [{"method": each.label, "settings": each.settings()} for each in self.methods],
            "clock": list(self._clock.counts),
            "observed": self._observed,
            "offloaded": self._offloaded.state_dict(),
            "rng": _gather(get_rng_state()),
            "partial_gradients": _gather(self._partial_gradients()),
        }

    def load_checkpoint(self, method: MethodCallback, checkpoint: dict[str, Any]) -> None:
        """Take the engine's state from a checkpoint that a fit resumes from.

        Raises:
            ResumeMismatch: If the checkpoint was written under other methods or settings.
        """
        if not self._leads(method) or self._trainer.state.fn != TrainerFn.FITTING:
            return
        saved = checkpoint.get(CHECKPOINT_KEY)
        if saved is None and method.state_key in checkpoint.get("callbacks", {}):
            raise ResumeMismatch(
                f"The checkpoint holds the draws of {method.label} but not the clock and random states they go with "
                f"(no {CHECKPOINT_KEY!r} in it): something has taken them out, and the run cannot go on from it."
            )
        if saved is None:
            rank_zero_info(f"The checkpoint knows nothing of {method.label}: its schedule starts at the first draw.")
            return
        _check_settings(saved["methods"], self.methods)
        self._resume = saved

    def _partial_gradients(self) -> dict[str, torch.Tensor]:
        """Gradients of an accumulation window that is not finished; Lightning itself forgets them."""
        assert self._structure is not None
        trainer = self._trainer
        progress = trainer.fit_loop.epoch_loop.batch_progress
        done = progress.current.processed  # not the batch that an exception interrupted
        ended = done >= trainer.num_training_batches or (progress.is_last_batch and done == progress.current.ready)
        automatic = trainer.lightning_module.automatic_optimization
        if not automatic or ended or done % trainer.accumulate_grad_batches == 0:
            return {}
        return self._guard.take_gradients(self._structure.parameters)

    def _restore_process(self, resume: dict[str, Any]) -> None:
        """Restore what belongs to one process: random states and unfinished gradients."""
        assert self._structure is not None
        rank, world_size = self._trainer.global_rank, self._trainer.world_size
        if len(resume["rng"]) != world_size:
            rank_zero_warn(
                f"The checkpoint was written by {len(resume['rng'])} process(es) and is resumed by {world_size}: the "
                "schedule goes on exactly, random states (dropout) cannot."
            )
            if any(resume["partial_gradients"]):
                raise ResumeMismatch(
                    "The checkpoint was written in the middle of an accumulation window by "
                    f"{len(resume['rng'])} process(es), and their unfinished gradients do not fit {world_size}. "
                    "Resume with as many processes, or from a checkpoint written at an optimizer step."
                )
            return
        self._guard.put_gradients(self._structure.parameters, resume["partial_gradients"][rank])
        set_rng_state(resume["rng"][rank])


def _names_below(structure: Structure) -> dict[str, tuple[str, ...]]:
    table: dict[str, list[str]] = {}
    for alias, canonical in structure.aliases.items():
        parts = alias.split(".")
        for depth in range(len(parts)):
            table.setdefault(".".join(parts[:depth]), []).append(canonical)
    return {path: tuple(dict.fromkeys(names)) for path, names in table.items()}


def _gather(value: Any) -> list[Any]:
    """Collect ``value`` of every rank, in order."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _check_settings(saved: list[dict[str, Any]], methods: list[MethodCallback]) -> None:
    now = [(method.label, method.settings()) for method in methods]
    then = [(entry["method"], entry["settings"]) for entry in saved]
    if [label for label, _ in now] != [label for label, _ in then]:
        raise ResumeMismatch(
            f"The checkpoint was written with {', '.join(label for label, _ in then)}; "
            f"this run has {', '.join(label for label, _ in now)}. Resume with the same methods, or start a new run "
            "from the weights alone."
        )
    differences = [
        f"{label}.{key}: {old.get(key)!r} -> {new.get(key)!r}"
        for (label, new), (_, old) in zip(now, then, strict=True)
        for key in sorted({*new, *old})
        if new.get(key) != old.get(key)
    ]
    if differences:
        raise ResumeMismatch(
            "The checkpoint was written under other settings, so that its schedule cannot go on: "
            + "; ".join(differences)
        )
