"""A fine-tuning schedule that the user writes: phases that thaw and refreeze, each with its own learning rate and end.

What a phase can say is listed in :mod:`lightning_peft.methods.phases`, how its patterns are read in
:mod:`lightning_peft.methods.phase_names`. Files of finetuning-scheduler are read unchanged.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import nn
from typing_extensions import override

from lightning_peft.core.blocks import Structure
from lightning_peft.core.draw import Draw
from lightning_peft.core.names import named_parameters
from lightning_peft.core.param_groups import schedulers_of, set_learning_rate, split_param_groups
from lightning_peft.core.scope import Scope
from lightning_peft.core.trainable import StatePolicy
from lightning_peft.errors import ConfigError, ResumeMismatch, ScopeError, suggest
from lightning_peft.methods.base import MethodCallback
from lightning_peft.methods.engine import CHECKPOINT_KEY
from lightning_peft.methods.moment import Moment
from lightning_peft.methods.phase_names import PhaseNames, resolve_phases
from lightning_peft.methods.phases import Mode, Phase, Plateau, import_class, list_mistakes, parse_schedule, plain_phase

__all__ = ["FinetuningSchedule"]

_Part = tuple[tuple[int, ...], bool]
"""Phases that list a parameter, and whether weight decay spares it."""
_OTHERS: _Part = ((), False)


class FinetuningSchedule(MethodCallback):
    """Follow a written schedule: phases that thaw and refreeze parameters, each with its own learning rate and end.

    Memory and compute of a step are those of what trains in the phase; with ``state="drop"`` optimizer state of what
    freezes is freed. A phase ends at an epoch, after a number of optimizer steps, or when a logged metric stops
    improving, whichever comes first; the next one starts at the following optimizer step. The parameter groups of the
    user's optimizer are cut once, by phase, before training; none is added while the run lasts.

    Use it to fine-tune in stages: head first, then the upper blocks, with smaller rates further down.

    ``lightning-peft schedule --generate`` writes a schedule to edit. A minimal one::

        0: {params: [head], max_steps: 200}
        1: {params: [blocks], lr: 1.0e-5}

    The keys of a phase: ``params`` (thaws, beside what trained before), ``freeze`` (of that), ``only`` (exactly what
    trains); ``max_transition_epoch`` (the phase ends at the start of this epoch), ``max_steps`` (its own optimizer
    steps), ``monitor``, ``patience``, ``min_delta``, ``mode`` (a plateau); ``lr`` and ``optimizer_options`` (such as
    ``weight_decay``) of what the phase names; ``new_lr_scheduler`` and ``new_optimizer`` from this phase on. Names,
    globs, ``re:``, roles and regular expressions matched at the beginning of names can be mixed. If the LightningModule
    has a list ``no_decay`` of parts of names, these get no weight decay.

    A plateau is looked for whenever the metric is logged: at the end of validation, or of the training epoch; all ranks
    use the mean of their values. A metric that is logged by step only (as ``self.log`` does in ``training_step``; also
    the ``_step`` half of one logged by both) is looked at after every optimizer step, which ``patience`` then counts.
    Values of whole training epochs make a resume in mid-epoch inexact, because Lightning forgets those of an unfinished
    one. The last phase lasts until the Trainer stops, unless it has a ``monitor`` of its own, whose plateau stops the
    training.

    Args:
        schedule: YAML file, or the mapping of phases ``0, 1, ...``.
        monitor: Logged metric whose plateau ends every phase but the last, beside what the phase itself says. None:
            only a phase that says nothing about its end waits for a plateau, of ``val_loss``.
        patience: Looks in a row without improvement that make a plateau, at least 1: validations, epochs or optimizer
            steps, as the metric is logged.
        min_delta: Least change that is an improvement, at least 0. The best value is kept over phases.
        mode: ``"min"``, the metric should fall, or ``"max"``.
        base_max_lr: Learning rate of what thaws after the first phase, where its phase gives no ``lr``. None: what the
            user's optimizer and its schedule give it.
        state: What becomes of the optimizer state of what freezes.

    Raises:
        ConfigError: With all mistakes of the schedule that show without a model; before training.
        ScopeError: With all its names and patterns that do not fit the model; before training.

    Example:
        >>> from lightning_peft import FinetuningSchedule
        >>> schedule = FinetuningSchedule({0: {"params": ["head"], "max_steps": 200}, 1: {"params": ["blocks"]}})
        >>> schedule.describe()["settings"]["phase 0"]
        {'params': ['head'], 'max_steps': 200}

    Paper:
        The format and its meaning are those of D. Dale's finetuning-scheduler (doi:10.5281/zenodo.7537830); thawing
        from the head down: J. Howard, S. Ruder: Universal Language Model Fine-tuning for Text Classification, ACL
        2018, arXiv:1801.06146.

    Differs from the paper:
        From finetuning-scheduler: phases may overlap and refreeze and end after steps; ``lr`` of the first phase
        counts; a plateau is acted on at the next optimizer step; the best checkpoint is not loaded at transitions;
        the user's EarlyStopping and ModelCheckpoint are left alone, and ``max_epochs`` is not raised.
    """

    def __init__(
        self,
        schedule: str | dict[int, Any],
        monitor: str | None = None,
        patience: int = 3,
        min_delta: float = 0.0,
        mode: Mode = "min",
        base_max_lr: float | None = 1e-5,
        state: StatePolicy = "drop",
    ) -> None:
        self.monitor, self.patience, self.min_delta, self.mode = monitor, patience, float(min_delta), mode
        self.base_max_lr = None if base_max_lr is None else float(base_max_lr)
        self._check_plateau()
        default = None if monitor is None else Plateau(monitor, patience, self.min_delta, mode)
        self.phases = parse_schedule(schedule, default, Plateau("val_loss", patience, self.min_delta, mode))
        self.schedule = {number: plain_phase(phase) for number, phase in enumerate(self.phases)}
        entries = [entry for phase in self.phases for entry in (*(phase.only or phase.params), *phase.freeze)]
        super().__init__(scope=list(dict.fromkeys(entries)), always=(), redraw="epoch", state=state, seed=0)
        self._trainer: Any = None
        self._resolved: list[PhaseNames] = []
        self._patterns: dict[str, tuple[int, ...]] = {}
        self._parts: dict[int, _Part] = {}
        self._restart(-1)

    def _check_plateau(self) -> None:
        wrong = []
        if isinstance(self.patience, bool) or not isinstance(self.patience, int) or self.patience < 1:
            wrong.append(f"patience={self.patience!r} must be a whole number, at least 1")
        if not self.min_delta >= 0:
            wrong.append(f"min_delta={self.min_delta!r} must be at least 0")
        if self.mode not in ("min", "max"):
            wrong.append(f"mode={self.mode!r} must be 'min' or 'max'")
        if self.base_max_lr is not None and not self.base_max_lr >= 0:
            wrong.append(f"base_max_lr={self.base_max_lr!r} must be at least 0, or None")
        if wrong:
            raise ConfigError(list_mistakes("FinetuningSchedule", wrong))

    @property
    @override
    def label(self) -> str:
        return f"{type(self).__name__}({len(self.phases)} phases)"

    @override
    def settings(self) -> dict[str, Any]:
        phases = {f"phase {number}": phase for number, phase in self.schedule.items()}
        return {**phases, **super().settings(), "schedule": list(phases)}

    # ------------------------------------------------------------------ names

    @override
    def resolve(self, structure: Structure) -> Scope:
        self._resolved = resolve_phases(self.phases, structure)
        names = {name for phase in self._resolved for name in phase.listed}
        explicit = frozenset(name for phase in self._resolved for name in phase.explicit)
        return Scope(tuple(name for name in structure.parameters if name in names), explicit)

    @override
    def make_units(self, structure: Structure, names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
        """One unit per set of parameters that all phases treat alike.

        Raises:
            ScopeError: If all that a phase would train is frozen by the user and named by role only.
        """
        empty = [str(number) for number, phase in enumerate(self._resolved) if phase.trains.isdisjoint(names)]
        if empty:
            raise ScopeError(
                f"{self.label}: all that phase {', '.join(empty)} would train has requires_grad=False. A role does not "
                "thaw what you froze; name it with a path or pattern."
            )
        members: dict[str, list[str]] = {}
        self._patterns = {}
        for name in names:
            listing = self._listing(name)
            pattern = tuple(number for number, phase in enumerate(self._resolved) if name in phase.trains)
            unit = _unit_name(listing, pattern, len(self.phases))
            members.setdefault(unit, []).append(name)
            self._patterns[unit] = pattern
        ordered = sorted(members, key=lambda unit: (self._listing(members[unit][0]), self._patterns[unit]))
        return {unit: tuple(members[unit]) for unit in ordered}

    def _listing(self, name: str) -> tuple[int, ...]:
        return tuple(number for number, phase in enumerate(self._resolved) if name in phase.listed)

    def select(self, draw: Draw) -> list[str]:
        """Return the units that train in this phase; the draw's index is the phase."""
        return [unit for unit, pattern in self._patterns.items() if draw.index in pattern]

    @override
    def lasting(self) -> frozenset[str]:
        every = tuple(range(len(self.phases)))
        return frozenset(n for unit, pattern in self._patterns.items() if pattern == every for n in self._units[unit])

    # ------------------------------------------------------------------ transitions

    def _restart(self, epoch: int) -> None:
        self._due = 0
        self._phase_step, self._phase_epoch = 0, epoch
        self._best: dict[str, float] = {}
        self._waited = self._unseen = 0
        self._stalled = self._owes_validation = False
        self._saved_epoch = 0

    @override
    def begin(self, step: int, epoch: int, global_step: int, continues: bool) -> None:
        if self._loaded is None and continues:  # the optimizer is new, the schedule goes on
            for number in range(self._draw_index + 1):
                self._enter(number)
        elif self._loaded is None:
            self._restart(epoch - 1)
            self._due = next((n for n, p in enumerate(self.phases) if not self._has_passed(p, epoch)), 0)
            self._due = min(self._due, len(self.phases) - 1)
        super().begin(step, epoch, global_step, continues)

    @override
    def draw_due(self, step: int, epoch: int) -> int:
        return self._due

    @override
    def observe(self, moment: Moment) -> None:
        """End the phase if it is over; called at optimizer-step boundaries only."""
        phase = self.phases[self._due]
        is_last = self._due == len(self.phases) - 1
        if is_last or self._due != self._draw_index:
            return
        by_steps = phase.max_steps is not None and moment.step - self._phase_step >= phase.max_steps
        by_epoch = self._has_passed(phase, moment.epoch) and moment.epoch > self._phase_epoch
        if by_steps or by_epoch or self._stalled:
            self._due += 1

    @staticmethod
    def _has_passed(phase: Phase, epoch: int) -> bool:
        return 0 <= phase.max_transition_epoch <= epoch

    @override
    def advance(self, step: int, epoch: int, global_step: int) -> bool:
        before = self._draw_index
        if not super().advance(step, epoch, global_step):
            return False
        self._phase_step, self._phase_epoch = step, epoch
        self._waited = self._unseen = 0
        self._stalled = False
        for number in range(before + 1, self._draw_index + 1):
            self._enter(number)
        return True

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self._owes_validation:
            self._make_up_validation(trainer)

    @override
    def on_train_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        loop = trainer.fit_loop
        fetcher = loop._data_fetcher
        self._owes_validation = fetcher is not None and loop.epoch_loop._should_check_val_fx(fetcher)
        if not loop._should_accumulate():
            self._look(trainer, by_step=True)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._owes_validation = False
        if not trainer.sanity_checking:
            self._look(trainer)

    def _make_up_validation(self, trainer: Trainer) -> None:
        """Run the validation that followed the batch at whose end the checkpoint was written: Lightning leaves it out.

        It belongs to the epoch of that batch, which Lightning counts as over.
        """
        plateau = self.phases[self._draw_index].plateau
        self._owes_validation = False
        if plateau is None or self._stalled:
            return
        progress: Any = trainer.fit_loop.epoch_progress.current
        loop = trainer.fit_loop.epoch_loop.val_loop
        processed = progress.processed
        progress.processed = self._saved_epoch
        trainer.validating = True
        loop.restarting = False
        try:
            loop.run()
        finally:
            trainer.training = True
            progress.processed = processed

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look(trainer)
        self._check_monitor(trainer)

    def _look(self, trainer: Trainer, by_step: bool = False) -> None:
        """Look whether the metric of this phase's plateau improves, if it was logged just now."""
        if trainer.state.fn != TrainerFn.FITTING or self._draw_index < 0:
            return
        plateau = self.phases[self._draw_index].plateau
        if plateau is None or self._stalled:
            return
        logged = trainer._logger_connector.metrics["callback"]  # of the loop that ends, nothing older
        if plateau.monitor not in logged or (by_step and not _is_logged_by_step_only(trainer, plateau.monitor)):
            return
        local = torch.as_tensor(logged[plateau.monitor], dtype=torch.float32, device=trainer.strategy.root_device)
        value = float(trainer.strategy.reduce(local, reduce_op="mean"))  # ranks must not decide differently
        self._unseen = -1
        key = f"{plateau.mode} {plateau.monitor}"
        if plateau.improves(value, self._best.get(key)):
            self._best[key] = value
            self._waited = 0
            return
        self._waited += 1
        if self._waited < plateau.patience:
            return
        self._stalled = True
        if self._draw_index == len(self.phases) - 1:
            rank_zero_info(f"{self.label}: {plateau.monitor!r} has stopped improving in the last phase; training ends.")
            trainer.should_stop = True

    def _check_monitor(self, trainer: Trainer) -> None:
        """Complain about a metric that is never logged.

        Raises:
            ConfigError: After two epochs without it, or two validations if those are rarer.
        """
        plateau = self.phases[self._draw_index].plateau if self._draw_index >= 0 else None
        if plateau is None or self._unseen < 0:
            return
        self._unseen += 1
        rarely = int(trainer.check_val_every_n_epoch or 1) if trainer.enable_validation else 1
        if self._unseen < 2 * rarely:
            return
        late = plateau.monitor in trainer.callback_metrics
        logged = ", ".join(sorted(trainer.callback_metrics)) or "nothing"
        raise ConfigError(
            f"{self.label}: phase {self._draw_index} waits for a plateau of {plateau.monitor!r}, which is "
            + (
                "logged after the callbacks have looked; log it in training_step, or in validation. "
                if late
                else "not "
            )
            + ("" if late else f"logged. {suggest(plateau.monitor, trainer.callback_metrics)} Logged: {logged}. ")
            + "Or end the phase with max_transition_epoch or max_steps, which need no metric."
        )

    # ------------------------------------------------------------------ optimizers

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._trainer = None
        super().setup(trainer, pl_module, stage)

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        if trainer.state.fn == TrainerFn.FITTING and CHECKPOINT_KEY not in checkpoint:
            raise ResumeMismatch(
                f"The checkpoint was written without {self.label}: its optimizer state does not know the phases' "
                "parameter groups. Start a new fit from its weights (load_state_dict), without ckpt_path."
            )

    @override
    def restoring(self, state: dict[str, Any]) -> None:
        self._loaded = state
        self._rebuild()

    @override
    def prepare_optimizers(self, trainer: Trainer) -> None:
        """Cut the parameter groups by phase.

        Raises:
            ConfigError: If the schedule replaces an optimizer or scheduler of a run with several optimizers.
        """
        self._trainer = trainer
        replacing = [str(n) for n, p in enumerate(self.phases) if p.new_optimizer or p.new_lr_scheduler]
        if replacing and len(trainer.strategy.optimizers) != 1:
            raise ConfigError(
                f"{self.label}: phase {', '.join(replacing)} replaces the optimizer or its scheduler, but the "
                f"LightningModule has {len(trainer.strategy.optimizers)} optimizers: which one is not said."
            )
        spared = tuple(getattr(trainer.lightning_module, "no_decay", None) or ())
        members = self.scope_names
        self._parts = {
            id(parameter): (self._listing(name), any(piece in name for piece in spared))
            for name, parameter in named_parameters(trainer.lightning_module).items()
            if name in members
        }
        for optimizer in trainer.strategy.optimizers:
            split_param_groups(optimizer, self._schedulers(), self._part_of, order=_by_first_phase)
            for group in optimizer.param_groups:
                if self._group_part(group)[1] and "weight_decay" in group:
                    group["weight_decay"] = 0.0
        silent = [str(n) for n, p in enumerate(self.phases) if n and p.lr is None and self._newly_listed(n)]
        if silent and self.base_max_lr is not None:
            rank_zero_info(f"{self.label}: what phase {', '.join(silent)} thaws starts at lr={self.base_max_lr:g}.")
        last = self.phases[-1]
        if last.max_transition_epoch >= 0 or last.max_steps is not None:
            rank_zero_warn(
                f"{self.label}: max_transition_epoch and max_steps of the last phase have no effect; it lasts until "
                "the Trainer stops (max_epochs, max_steps, EarlyStopping)."
            )
        self._check_options(trainer.strategy.optimizers)
        self._rebuild()

    def _check_options(self, optimizers: list[torch.optim.Optimizer]) -> None:
        """Check what only the real optimizers can tell, for all phases, before training.

        Raises:
            ConfigError: With all mistakes.
        """
        mistakes = []
        known = [(type(optimizer).__name__, list(optimizer.defaults)) for optimizer in optimizers]
        for number, phase in enumerate(self.phases):
            if phase.new_optimizer is not None:
                kind = import_class(phase.new_optimizer["optimizer_init"]["class_path"])
                known = [(kind.__name__, list(inspect.signature(kind).parameters)[1:])]
            mistakes += [
                f"phase {number}: {name} has no option {key!r}. {suggest(key, options)}"
                for name, options in known
                for key in phase.optimizer_options
                if key not in options
            ]
            arguments = phase.new_lr_scheduler["lr_scheduler_init"]["init_args"] if phase.new_lr_scheduler else {}
            groups = len(self._born(optimizers[0], number))
            mistakes += [
                f"phase {number}: new_lr_scheduler: {key} has {len(arguments[key])} entries, but {groups} parameter "
                "group(s) train in this phase or have trained before"
                for key in ("lr_lambda", "min_lr", "max_lr", "base_lr")
                if isinstance(arguments.get(key), list) and len(arguments[key]) != groups
            ]
        if mistakes:
            raise ConfigError(list_mistakes(f"{self.label} does not fit the optimizer and", mistakes))

    def _newly_listed(self, number: int) -> bool:
        return any(listing[:1] == (number,) for listing, _ in self._parts.values())

    def _schedulers(self) -> list[Any]:
        return [config.scheduler for config in self._trainer.strategy.lr_scheduler_configs]

    def _part_of(self, parameter: nn.Parameter) -> _Part:
        return self._parts.get(id(parameter), _OTHERS)

    def _group_part(self, group: dict[str, Any]) -> _Part:
        return self._part_of(group["params"][0]) if group["params"] else _OTHERS

    def _rebuild(self) -> None:
        """Put the optimizer and scheduler of the saved phase in place, for their saved states."""
        if self._loaded is None or not self._loaded:
            return
        for number in range(self._loaded["draw_index"] + 1):
            self._enter(number)

    def _enter(self, number: int) -> None:
        """Give what the phase names its learning rate and options; replace optimizer and scheduler if it says so."""
        phase, strategy = self.phases[number], self._trainer.strategy
        if phase.new_optimizer is not None:
            strategy.optimizers = [self._new_optimizer(number, strategy.optimizers[0])]
        for optimizer in strategy.optimizers:
            for index, group in enumerate(optimizer.param_groups):
                listing, _ = self._group_part(group)
                if number not in listing:
                    continue
                lr = self._rate(number, listing)
                if lr is not None:
                    set_learning_rate(optimizer, self._schedulers(), index, lr, joins=number == 0)
                group.update(phase.optimizer_options)
        if phase.new_lr_scheduler is not None:
            self._new_scheduler(number, strategy.optimizers[0], phase.new_lr_scheduler)

    def _rate(self, number: int, listing: tuple[int, ...]) -> float | None:
        """Learning rate that phase ``number`` gives a group; None: the group keeps its own."""
        phase = self.phases[number]
        if phase.lr is not None:
            return phase.lr
        return self.base_max_lr if number > 0 and listing[0] == number else None

    def _born(self, optimizer: torch.optim.Optimizer, number: int) -> list[dict[str, Any]]:
        """Groups that have trained or train in phase ``number``, in the order of their first phases."""
        parts = [(self._group_part(group)[0], group) for group in optimizer.param_groups]
        return [group for listing, group in parts if listing and listing[0] <= number]

    def _new_optimizer(self, number: int, old: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Build the optimizer of a phase over the same groups; those that train already go on at their rates."""
        init = (self.phases[number].new_optimizer or {})["optimizer_init"]
        arguments, kind = init["init_args"], import_class(init["class_path"])
        groups: list[dict[str, Any]] = []
        for group in old.param_groups:
            listing, spared = self._group_part(group)
            kept = {} if listing else {key: group[key] for key in ("lr", "weight_decay") if key in group}
            decay = {"weight_decay": 0.0} if spared and "weight_decay" in group else {}
            groups.append({key: group[key] for key in ("params", "param_names") if key in group} | kept | decay)
        new = kind(groups, **arguments)
        torch.optim.lr_scheduler.LambdaLR(new, lambda _: 1.0)  # marks `step`, as schedulers expect of their optimizer
        setattr(new, "_opt_called", getattr(old, "_opt_called", False))  # noqa: B010
        for earlier in range(1, number):
            for group in new.param_groups:
                listing, _ = self._group_part(group)
                rate = self._rate(earlier, listing) if earlier in listing else None
                if rate is not None:
                    group["initial_lr"] = rate
            for group, rate in zip(self._born(new, earlier), self._given_rates(earlier), strict=False):
                group["initial_lr"] = rate
        for before, after in zip(old.param_groups, new.param_groups, strict=True):
            listing, _ = self._group_part(after)
            if listing and listing[0] < number:
                after["lr"] = before["lr"]
            for key in before.keys() - old.defaults.keys() - after.keys():  # what a scheduler keeps there
                after[key] = before[key]
        for scheduler in list(schedulers_of(old, self._schedulers())):
            scheduler.optimizer = new
        return new

    def _given_rates(self, number: int) -> list[float]:
        return (self.phases[number].new_lr_scheduler or {}).get("init_pg_lrs") or []

    def _new_scheduler(self, number: int, optimizer: torch.optim.Optimizer, given: dict[str, Any]) -> None:
        """Start another scheduler, from the rates that it gives, or the groups' initial ones, or their present ones."""
        born, rates = self._born(optimizer, number), self._given_rates(number)
        if rates:
            for group, rate in zip(born, rates, strict=False):
                group["lr"] = group["initial_lr"] = rate
        elif not given.get("use_current_optimizer_pg_lrs"):
            for group in born:
                group["lr"] = group.get("initial_lr", group["lr"])
        init = given["lr_scheduler_init"]
        arguments = {
            key: value + value[-1:] * (len(optimizer.param_groups) - len(value))
            if isinstance(value, list) and len(value) == len(born)  # one entry per group so far
            else value
            for key, value in init["init_args"].items()
        }
        scheduler = import_class(init["class_path"])(optimizer, **arguments)
        config = LRSchedulerConfig(scheduler=scheduler, **given["pl_lrs_cfg"])
        self._trainer.strategy.lr_scheduler_configs = [config]

    # ------------------------------------------------------------------ checkpoints

    @override
    def method_state(self) -> dict[str, Any]:
        return {
            "due": self._due,
            "phase_step": self._phase_step,
            "phase_epoch": self._phase_epoch,
            "best": dict(self._best),
            "waited": self._waited,
            "unseen": self._unseen,
            "stalled": self._stalled,
            "owes_validation": self._owes_validation,
            "saved_epoch": self._trainer.current_epoch,
        }

    @override
    def load_method_state(self, state: dict[str, Any]) -> None:
        for key, value in state.items():
            setattr(self, f"_{key}", dict(value) if key == "best" else value)


def _by_first_phase(part: _Part) -> tuple[bool, tuple[int, ...], bool]:
    listing, spared = part
    return not listing, listing, spared


def _unit_name(listing: Iterable[int], pattern: tuple[int, ...], num_phases: int) -> str:
    """How a set of parameters is called: the phases that name it, and those between in which it rests."""
    listing = tuple(listing)
    rests = [str(number) for number in range(listing[0], num_phases) if number not in pattern]
    name = f"phase {', '.join(map(str, listing))}"
    return f"{name} (rests in {', '.join(rests)})" if rests else name


def _is_logged_by_step_only(trainer: Trainer, monitor: str) -> bool:
    """Whether ``monitor``, logged in this batch, has no value at the end of the epoch to wait for."""
    results: Any = trainer._results
    metas = [metric.meta for _, metric in results.valid_items() if metric.meta.on_step]
    return any(monitor == (f"{meta.name}_step" if meta.on_epoch else meta.name) for meta in metas)
