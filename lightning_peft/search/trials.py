"""What a search has tried and found: trials, the front of the best, a table, and the method to train with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from rich import box
from rich.table import Table

from lightning_peft.errors import ConfigError, suggest
from lightning_peft.methods.layers.searched_subset import SearchedSubset
from lightning_peft.report.console import format_count, render

__all__ = ["Direction", "SearchResult", "Trial", "non_dominated"]

Direction = Literal["min", "max"]
"""Whether a metric is better when it is lower or higher."""


@dataclass(frozen=True)
class Trial:
    """One fit of a search.

    Args:
        number: Counted from 0.
        label: What was tried, in words.
        scope: Scope entries that stand for exactly what trained.
        metrics: Name -> value; ``num_trainable_parameters`` is among them.
        settings: Arguments of the method, if the search was over these.
        hyperparameters: What the user's factory was given.
        parent: Number of the trial that this one refines, in a tree.
    """

    number: int
    label: str
    scope: tuple[str, ...]
    metrics: Mapping[str, float]
    settings: Mapping[str, Any] = field(default_factory=dict)
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    parent: int | None = None


def non_dominated(points: Sequence[Sequence[float]]) -> list[int]:
    """Return the indices of the points that no other point beats: nowhere worse and somewhere better, lower is better.

    Points with a value that is no number are beaten by all others, and never returned.

    Example:
        >>> non_dominated([(1.0, 3.0), (2.0, 2.0), (3.0, 3.0)])
        [0, 1]
    """
    sound = [index for index, point in enumerate(points) if not any(map(math.isnan, point))]

    def beats(one: Sequence[float], other: Sequence[float]) -> bool:
        return all(a <= b for a, b in zip(one, other, strict=True)) and tuple(one) != tuple(other)

    return [index for index in sound if not any(beats(points[rival], points[index]) for rival in sound)]


class SearchResult:
    """All trials of a search.

    Args:
        trials: In the order in which they were made.
        metrics: Metric -> whether lower (``"min"``) or higher (``"max"``) is better; the first is the main one.
        always: What trained beside the subset in each trial.
    """

    def __init__(self, trials: Sequence[Trial], metrics: Mapping[str, Direction], always: Sequence[str] = ()) -> None:
        self.trials = tuple(trials)
        self.metrics = dict(metrics)
        self.always = tuple(always)

    def costs(self, trial: Trial) -> tuple[float, ...]:
        """The metrics of a trial in order, turned so that lower is better."""
        return tuple(_cost(trial.metrics[name], direction) for name, direction in self.metrics.items())

    @property
    def front(self) -> tuple[Trial, ...]:
        """The trials that no other trial beats in all metrics, best in the main metric first."""
        chosen = [self.trials[index] for index in non_dominated([self.costs(trial) for trial in self.trials])]
        return tuple(sorted(chosen, key=self.costs))

    def best(self, metric: str | None = None, limits: Mapping[str, float] | None = None) -> Trial:
        """Return the best trial in one metric among those within limits; the earliest of equals.

        Args:
            metric: Which; default the main one.
            limits: Metric -> the worst value allowed: a most where lower is better, a least where higher is.

        Raises:
            ConfigError: If there is no such metric, or no trial is within the limits.
        """
        metric = next(iter(self.metrics)) if metric is None else metric
        for name in (metric, *(limits or {})):
            if name not in self.metrics:
                raise ConfigError(f"{name!r} is no metric of this search. {suggest(name, self.metrics)}")
        bounds = {name: _cost(limit, self.metrics[name]) for name, limit in (limits or {}).items()}

        def cost(trial: Trial, name: str) -> float:
            return _cost(trial.metrics[name], self.metrics[name])

        within = [
            trial
            for trial in self.trials
            if not math.isnan(trial.metrics[metric]) and all(cost(trial, name) <= b for name, b in bounds.items())
        ]
        if not within:
            raise ConfigError(f"None of the {len(self.trials)} trial(s) is within limits={dict(limits or {})}.")
        return min(within, key=lambda trial: cost(trial, metric))

    def method(self, trial: Trial | None = None) -> SearchedSubset:
        """Return the callback that trains what a trial trained; default :meth:`best`."""
        trial = self.best() if trial is None else trial
        return SearchedSubset(scope=list(trial.scope), always=self.always)

    def save(self, path: str | Path, trial: Trial | None = None) -> None:
        """Write an overlay for ``lightning-peft fit --config`` that trains what a trial trained; default the best."""
        trial = self.best() if trial is None else trial
        values = ", ".join(f"{name} {trial.metrics[name]:.6g}" for name in self.metrics)
        extra = "".join(f", {name}={value!r}" for name, value in trial.hyperparameters.items())
        arguments = {"scope": list(trial.scope), "always": list(self.always)}
        overlay = {"trainer": {"callbacks+": [{"class_path": "SearchedSubset", "init_args": arguments}]}}
        head = f"# SearchedSubset: trial {trial.number} of {len(self.trials)}, {trial.label}{extra}: {values}\n\n"
        Path(path).write_text(head + yaml.safe_dump(overlay, sort_keys=False), encoding="utf-8")

    def table(self) -> Table:
        """A table of all trials; those of the front are marked with a star."""
        best = {trial.number for trial in self.front}
        options = list(dict.fromkeys(name for trial in self.trials for name in trial.hyperparameters))
        table = Table(box=box.SIMPLE_HEAD)
        columns = ("trial", "trains", "parameters", *options, *self.metrics, "best")
        for name in columns:
            table.add_column(name, justify="left" if name in ("trains", "best") else "right")
        for trial in self.trials:
            size = format_count(int(trial.metrics["num_trainable_parameters"]))
            given = [_shown(trial.hyperparameters.get(name, "")) for name in options]
            values = [f"{trial.metrics[name]:.6g}" for name in self.metrics]
            star = "*" if trial.number in best else ""
            table.add_row(str(trial.number), trial.label, size, *given, *values, star)
        return table

    def __str__(self) -> str:
        return render(self.table())


def _cost(value: float, direction: Direction) -> float:
    return value if direction == "min" else -value


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
