"""Phases of a schedule that a user writes: what a phase may say, which names it means, when it ends.

A schedule is a mapping of phase numbers ``0, 1, 2, ...`` to mappings with these keys, all optional:

==========================  ==========================================================================================
``params``                  what thaws, beside what trained in the phase before
``freeze``                  what of it all freezes again
``only``                    exactly what trains, in place of the two above
``max_transition_epoch``    the phase ends at the start of this epoch (counted from 0); -1: no limit
``max_steps``               the phase ends after so many optimizer steps of its own
``monitor``                 the phase ends when this logged metric has stopped improving, ...
``patience``                ... that is, after so many looks in a row without improvement,
``min_delta``, ``mode``     ... by more than this, towards ``min`` or ``max``
``lr``                      learning rate of what ``params`` or ``only`` names here
``optimizer_options``       options of its parameter groups, such as ``weight_decay``
``new_lr_scheduler``        a learning-rate scheduler from here on: ``lr_scheduler_init`` (``class_path``,
                            ``init_args``), ``pl_lrs_cfg``, ``init_pg_lrs``, ``use_current_optimizer_pg_lrs``
``new_optimizer``           another optimizer from here on: ``optimizer_init`` (``class_path``, ``init_args``)
==========================  ==========================================================================================

What the entries of ``params``, ``freeze`` and ``only`` may be is said in :mod:`lightning_peft.methods.phase_names`.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from lightning.pytorch.utilities.types import LRSchedulerConfig

from lightning_peft.errors import ConfigError, suggest

__all__ = ["Phase", "Plateau", "import_class", "list_mistakes", "parse_schedule", "plain_phase", "read_schedule"]

Mode = Literal["min", "max"]

_KEYS = (
    "params",
    "freeze",
    "only",
    "max_transition_epoch",
    "max_steps",
    "monitor",
    "patience",
    "min_delta",
    "mode",
    "lr",
    "optimizer_options",
    "new_lr_scheduler",
    "new_optimizer",
)
_SCHEDULER_KEYS = ("lr_scheduler_init", "pl_lrs_cfg", "init_pg_lrs", "use_current_optimizer_pg_lrs")
_LIGHTNING_KEYS = tuple(entry.name for entry in fields(LRSchedulerConfig) if entry.name != "scheduler")


# ---------------------------------------------------------------------------------------------------- plateaus


@dataclass(frozen=True)
class Plateau:
    """When a metric counts as no longer improving.

    Args:
        monitor: Name of the logged metric.
        patience: Looks in a row without improvement, at least 1.
        min_delta: An improvement is a change by more than this, at least 0.
        mode: Whether the metric should fall or rise.
    """

    monitor: str
    patience: int = 3
    min_delta: float = 0.0
    mode: Mode = "min"

    def improves(self, value: float, best: float | None) -> bool:
        """Whether ``value`` is better than ``best``; the first number is, what is not a number never."""
        if math.isnan(value):
            return False
        if best is None:
            return True
        return value < best - self.min_delta if self.mode == "min" else value > best + self.min_delta


# ---------------------------------------------------------------------------------------------------- phases


@dataclass(frozen=True)
class Phase:
    """One phase as the user wrote it; see the module's documentation for each field."""

    params: tuple[str, ...] = ()
    freeze: tuple[str, ...] = ()
    only: tuple[str, ...] | None = None
    max_transition_epoch: int = -1
    max_steps: int | None = None
    plateau: Plateau | None = None
    lr: float | None = None
    optimizer_options: dict[str, Any] = field(default_factory=dict)
    new_lr_scheduler: dict[str, Any] | None = None
    new_optimizer: dict[str, Any] | None = None


def plain_phase(phase: Phase) -> dict[str, Any]:
    """Return the phase as the mapping that it was read from, without what it leaves open."""
    values = {key: _plain(getattr(phase, key)) for key in _KEYS if hasattr(phase, key)}
    if phase.plateau is not None:
        values |= vars(phase.plateau)
    defaults = Phase()
    return {key: values[key] for key in _KEYS if key in values and values[key] != _plain(getattr(defaults, key, None))}


class _Loader(yaml.SafeLoader):
    """Refuses a key that is written twice, and reads ``1e-5`` as the number that it is."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for position, key in enumerate(keys):
            if key in keys[:position]:
                line = node.value[position][0].start_mark.line + 1
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is there twice, again in line {line}")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_schedule(schedule: str | PathLike[str] | Mapping[Any, Any]) -> dict[Any, Any]:
    """Return the mapping of a schedule that is given as a YAML file or as a mapping.

    Raises:
        ConfigError: If the file cannot be read, is no YAML, or holds no mapping.
    """
    if isinstance(schedule, Mapping):
        return dict(schedule)
    path = Path(schedule)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise ConfigError(f"The schedule {str(path)!r} cannot be read: {error.strerror or error}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a YAML file of phases: {' '.join(str(error).split())}.") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a schedule is a mapping of phases 0, 1, 2, ...; this is {type(content).__name__}.")
    return content


def parse_schedule(
    schedule: str | PathLike[str] | Mapping[Any, Any],
    default: Plateau | None = None,
    fallback: Plateau | None = None,
) -> list[Phase]:
    """Read a schedule and check all of it that can be checked without a model.

    Args:
        schedule: YAML file, or mapping of phase numbers to mappings.
        default: Plateau that ends every phase but the last, beside what the phase says.
        fallback: Without a default: what a phase but the last waits for if it says nothing about its end.

    Raises:
        ConfigError: With all mistakes.
    """
    content = read_schedule(schedule)
    mistakes: list[str] = []
    numbered: dict[int, Any] = {}
    for key, value in content.items():
        number = _whole(key)
        if number is None:
            mistakes.append(f"{key!r} is not a phase: phases are numbered 0, 1, 2, ...")
        elif number in numbered:
            mistakes.append(f"phase {number} is there twice")
        else:
            numbered[number] = value
    if not numbered:
        mistakes.append("there is no phase")
    elif sorted(numbered) != list(range(len(numbered))):
        mistakes.append(f"phases must be numbered 0 to {len(numbered) - 1} without gaps, not {sorted(numbered)}")
    phases = []
    for number in sorted(numbered):
        parser = _PhaseParser(
            number, numbered[number], number == max(numbered), default, fallback or Plateau("val_loss")
        )
        phases.append(parser.phase)
        mistakes += parser.mistakes
    if mistakes:
        place = "" if isinstance(schedule, Mapping) else f" {str(schedule)!r}"
        raise ConfigError(list_mistakes(f"The schedule{place}", mistakes))
    return phases


def list_mistakes(what: str, mistakes: Sequence[str]) -> str:
    """Return one message about ``what`` with all its mistakes."""
    sentences = [mistake if mistake.endswith((".", "?")) else f"{mistake}." for mistake in mistakes]
    if len(sentences) == 1:
        return f"{what}: {sentences[0]}"
    return f"{what} has {len(sentences)} mistakes:" + "".join(f"\n  {sentence}" for sentence in sentences)


def _whole(value: Any) -> int | None:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        return None
    try:
        return int(value)
    except ValueError:
        return None


class _PhaseParser:
    """Reads one phase and collects what is wrong with it."""

    def __init__(self, number: int, content: Any, last: bool, default: Plateau | None, fallback: Plateau) -> None:
        self.number = number
        self._fallback = fallback
        self.mistakes: list[str] = []
        self.phase = Phase()
        if not isinstance(content, Mapping):
            self._wrong(f"must be a mapping with 'params', not {content!r}")
            return
        for key in content:
            if key not in _KEYS:
                self._wrong(f"{key!r} is not a key of a phase. {suggest(str(key), _KEYS)}")
        self._content = content
        only = self._names("only") if "only" in content else None
        params, freeze = self._names("params"), self._names("freeze")
        if only is not None and (params or freeze):
            self._wrong("'only' says exactly what trains; it cannot be combined with 'params' or 'freeze'")
        if only == ():
            self._wrong("'only' is empty: nothing would train")
        if number == 0 and not params and not only:
            self._wrong("needs 'params' or 'only': nothing would train")
        epoch = self._number("max_transition_epoch", int, minimum=-1)
        steps = self._number("max_steps", int, minimum=1)
        lr = self._number("lr", float, minimum=0.0)
        options = self._mapping("optimizer_options")
        for key in ("params", "lr", "param_names", "initial_lr"):
            if key in options:
                self._wrong(f"optimizer_options cannot set {key!r}{'; use the key lr' if 'lr' in key else ''}")
        if (lr is not None or options) and not params and not only:
            self._wrong("'lr' and 'optimizer_options' are for what 'params' or 'only' names, and neither is there")
        scheduler, optimizer = self._scheduler(), self._optimizer()
        if not any((params, freeze, only, scheduler, optimizer)) and number > 0:
            self._wrong("changes nothing: give 'params', 'freeze', 'only', 'new_lr_scheduler' or 'new_optimizer'")
        self.phase = Phase(
            params=params,
            freeze=freeze,
            only=only,
            max_transition_epoch=-1 if epoch is None else int(epoch),
            max_steps=None if steps is None else int(steps),
            plateau=self._plateau(last, default, ends=(epoch is not None and epoch >= 0) or steps is not None),
            lr=lr,
            optimizer_options=options,
            new_lr_scheduler=scheduler,
            new_optimizer=optimizer,
        )

    def _wrong(self, text: str) -> None:
        self.mistakes.append(
            f"phase {self.number} {text}"
            if text.startswith(("must", "needs", "changes"))
            else f"phase {self.number}: {text}"
        )

    def _names(self, key: str) -> tuple[str, ...]:
        value = self._content.get(key)
        if value is None:
            return ()
        entries = [value] if isinstance(value, str) else value
        if not isinstance(entries, Sequence) or not all(isinstance(entry, str) and entry for entry in entries):
            self._wrong(f"{key!r} must be a list of names and patterns, not {value!r}")
            return ()
        return tuple(entries)

    def _number(self, key: str, kind: type, minimum: float) -> Any:
        value = self._content.get(key)
        if value is None:
            return None
        try:
            number = float(value) if not isinstance(value, bool) else math.nan
        except (TypeError, ValueError):
            number = math.nan
        if not number >= minimum or math.isinf(number) or (kind is int and number != int(number)):
            what = "a whole number" if kind is int else "a number"
            self._wrong(f"{key!r} must be {what}, at least {minimum:g}, not {value!r}")
            return None
        return kind(number)

    def _mapping(self, key: str, content: Mapping[str, Any] | None = None) -> dict[str, Any]:
        value = (self._content if content is None else content).get(key)
        if value is None:
            return {}
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            self._wrong(f"{key!r} must be a mapping, not {value!r}")
            return {}
        return {name: _plain(entry) for name, entry in value.items()}

    def _plateau(self, last: bool, default: Plateau | None, ends: bool) -> Plateau | None:
        own = {key: self._content[key] for key in ("monitor", "patience", "min_delta", "mode") if key in self._content}
        if not own and (last or (default is None and ends)):
            return None
        base = default or self._fallback
        monitor, mode = own.get("monitor", base.monitor), own.get("mode", base.mode)
        if not isinstance(monitor, str) or not monitor:
            self._wrong(f"'monitor' must be the name of a logged metric, not {monitor!r}")
        if mode not in ("min", "max"):
            self._wrong(f"'mode' must be 'min' or 'max', not {mode!r}")
        patience = self._number("patience", int, minimum=1) if "patience" in own else base.patience
        delta = self._number("min_delta", float, minimum=0.0) if "min_delta" in own else base.min_delta
        if patience is None or delta is None:
            return None
        return Plateau(monitor, patience, delta, mode)

    def _scheduler(self) -> dict[str, Any] | None:
        given = self._mapping("new_lr_scheduler")
        if not given:
            return None
        for key in given:
            if key not in _SCHEDULER_KEYS:
                self._wrong(f"new_lr_scheduler.{key} is not an option. {suggest(key, _SCHEDULER_KEYS)}")
        dummy = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
        given["lr_scheduler_init"] = self._init(given, "new_lr_scheduler", "lr_scheduler_init", dummy)
        lightning = self._mapping("pl_lrs_cfg", given)
        for key in lightning:
            if key not in _LIGHTNING_KEYS:
                self._wrong(f"new_lr_scheduler.pl_lrs_cfg.{key} is not an option. {suggest(key, _LIGHTNING_KEYS)}")
        if lightning.get("interval", "epoch") not in ("epoch", "step"):
            self._wrong(
                f"new_lr_scheduler.pl_lrs_cfg.interval must be 'epoch' or 'step', not {lightning['interval']!r}"
            )
        if given["lr_scheduler_init"].get("class_path", "").endswith("ReduceLROnPlateau"):
            lightning.setdefault("reduce_on_plateau", True)
            if not lightning.get("monitor"):
                self._wrong("ReduceLROnPlateau needs new_lr_scheduler.pl_lrs_cfg.monitor, the metric it looks at")
        given["pl_lrs_cfg"] = lightning
        rates = given.get("init_pg_lrs")
        if rates is not None:
            try:
                given["init_pg_lrs"] = [float(rate) for rate in rates]
            except (TypeError, ValueError):
                self._wrong(f"new_lr_scheduler.init_pg_lrs must be a list of learning rates, not {rates!r}")
        return given

    def _optimizer(self) -> dict[str, Any] | None:
        given = self._mapping("new_optimizer")
        if not given:
            return None
        for key in given:
            if key != "optimizer_init":
                self._wrong(f"new_optimizer.{key} is not an option. {suggest(key, ('optimizer_init',))}")
        parameters = [torch.nn.Parameter(torch.zeros(1))]
        given["optimizer_init"] = self._init(given, "new_optimizer", "optimizer_init", parameters)
        return given

    def _init(self, given: dict[str, Any], key: str, inner: str, subject: Any) -> dict[str, Any]:
        """Check ``class_path`` and ``init_args`` by building the object once, over a stand-in for ``subject``."""
        init = self._mapping(inner, given)
        path = init.get("class_path")
        where = f"{key}.{inner}"
        if not isinstance(path, str):
            self._wrong(f"{where} needs 'class_path', such as torch.optim.lr_scheduler.StepLR or torch.optim.SGD")
            return {}
        for name in init:
            if name not in ("class_path", "init_args"):
                self._wrong(f"{where}.{name} is not an option. {suggest(name, ('class_path', 'init_args'))}")
        init["init_args"] = arguments = self._mapping("init_args", init)
        arguments.pop("optimizer", None)
        try:
            kind = import_class(path)
        except (ImportError, AttributeError, ValueError) as error:
            self._wrong(f"{where}.class_path: {error}")
            return init
        try:
            inspect.signature(kind).bind(subject, **arguments)
            if not any(isinstance(value, list) for value in arguments.values()):  # one entry per group: not known yet
                kind(subject, **arguments)
        except Exception as error:
            known = list(inspect.signature(kind).parameters)[1:]
            strange = [name for name in arguments if name not in known]
            hint = f" {suggest(strange[0], known)}" if strange else ""
            self._wrong(f"{where}: {kind.__name__} refuses {arguments}: {error}.{hint}")
        return init


def import_class(path: str) -> Any:
    """Import ``package.module.Class``.

    Raises:
        ImportError: If there is no such module.
        AttributeError: If the module has no such class; names the nearest.
        ValueError: If the path has no module.
    """
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise ValueError(f"{path!r} is not a full path such as torch.optim.{path}")
    module = importlib.import_module(module_name)
    if not inspect.isclass(getattr(module, name, None)):
        classes = [key for key, value in vars(module).items() if inspect.isclass(value)]
        raise AttributeError(f"{module_name} has no class {name!r}. {suggest(name, classes)}")
    return getattr(module, name)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value
