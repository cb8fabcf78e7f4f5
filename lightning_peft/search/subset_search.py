"""Search which parameters should train: CoFiTune's tree, and MemControl's outer loop over on/off masks with optuna."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info

from lightning_peft.core.blocks import Structure
from lightning_peft.core.draw import draw_generator
from lightning_peft.core.plan import fingerprint_names
from lightning_peft.core.scope import resolve_scope
from lightning_peft.errors import ConfigError, ResumeMismatch, suggest
from lightning_peft.methods.arguments import is_number, is_whole
from lightning_peft.methods.base import MethodCallback
from lightning_peft.methods.layers.cofitune import CoFiTune
from lightning_peft.methods.layers.searched_subset import SearchedSubset
from lightning_peft.search.runner import Evaluate, TrialRunner
from lightning_peft.search.space import Level, block_modules, coarse_levels, compact_names
from lightning_peft.search.trials import Direction, SearchResult, Trial

__all__ = ["Node", "SubsetSearch", "descend"]


@dataclass(frozen=True)
class Node:
    """A branch of a tree that was looked at.

    Args:
        label: The labels on the way to it.
        settings: All settings on the way to it.
        cost: Lower is better.
        parent: Number of the branch above it, None on the first level.
    """

    label: str
    settings: Mapping[str, Any]
    cost: float
    parent: int | None


def descend(levels: Sequence[Level], cost: Callable[[Node], float], beam: int = 1) -> list[Node]:
    """Go down a tree level by level, only below the best branches.

    On each level all branches below those that were kept are looked at; the ``beam`` best that are better than the
    branch above them are kept. Where no branch is better than the one above, the search ends there.

    Args:
        levels: What branches there are on each level, given the settings above.
        cost: Cost of a branch (whose own ``cost`` is NaN yet); NaN counts as worst.
        beam: Branches kept on each level, at least 1.

    Returns:
        All branches looked at, in order. Settings that were looked at before are not looked at again.

    Example:
        >>> levels = [lambda _: {"a": {"x": 2}, "b": {"x": 1}}, lambda _: {"c": {"y": 1}, "d": {"y": -1}}]
        >>> found = descend(levels, lambda node: node.settings["x"] + node.settings.get("y", 0))
        >>> [(node.label, node.cost, node.parent) for node in found]
        [('a', 2, None), ('b', 1, None), ('b, c', 2, 1), ('b, d', 0, 1)]
    """
    nodes: list[Node] = []
    kept: list[int | None] = [None]
    for level in levels:
        better: list[int] = []
        for parent in kept:
            above = None if parent is None else nodes[parent]
            for label, settings in level({} if above is None else above.settings).items():
                merged = {**({} if above is None else above.settings), **settings}
                if any(node.settings == merged for node in nodes):
                    continue
                path = label if above is None else f"{above.label}, {label}"
                node = Node(path, merged, math.nan, parent)
                value = cost(node)
                nodes.append(Node(path, merged, math.inf if math.isnan(value) else value, parent))
                if above is None or nodes[-1].cost < above.cost:
                    better.append(len(nodes) - 1)
        kept = list(sorted(better, key=lambda index: nodes[index].cost)[:beam])
    return nodes


class SubsetSearch:
    """Search which parameters to train, by short fits that all start from the same weights.

    Each trial is a fit of your unchanged LightningModule with a method that trains one subset; nothing is left of it
    but its metrics. All trials start from the same weights, random state and order of data. A search costs its trials;
    keep them short with ``trainer={"max_steps": ...}``.

    Args:
        module: A LightningModule, which stays as it is, each trial gets a copy; or a function that makes one, with
            hyper-parameters as keyword arguments. Called without any, it makes the one whose weights all trials start
            from; tensors that a hyper-parameter adds or reshapes are as the function made them, under the same seed.
        data: Keyword arguments of ``Trainer.fit``: ``{"train_dataloaders": ..., "val_dataloaders": ...}`` or
            ``{"datamodule": ...}``; or a function that returns them for each trial.
        trainer: Keyword arguments of ``Trainer``. Callbacks are copied for each trial; logger, checkpoints, progress
            bar and summary are off unless switched on here.
        metrics: Metric -> ``"min"`` or ``"max"``; the first is the main one. A metric is what your module logs, what
            ``evaluate`` returns, or ``num_trainable_parameters``.
        evaluate: Called with Trainer and module after each fit, returns further metrics by name.
        seed: Of each trial's random state, and of the search.

    Raises:
        ConfigError: If an argument is out of range. From a search, if a metric is missing.
        UnsupportedStrategy: From a search, if the Trainer runs several processes.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> search = SubsetSearch(BoringModel(), {}, {"max_steps": 1}, {"valid_loss": "min"})
        >>> search.metrics
        {'valid_loss': 'min'}
    """

    def __init__(
        self,
        module: LightningModule | Callable[..., LightningModule],
        data: Mapping[str, Any] | Callable[[], Mapping[str, Any]],
        trainer: Mapping[str, Any],
        metrics: Mapping[str, Direction],
        evaluate: Evaluate | None = None,
        seed: int = 0,
    ) -> None:
        problems = []
        if not isinstance(module, LightningModule) and not callable(module):
            problems.append(f"module={type(module).__name__}: a LightningModule, or a function that makes one")
        if not isinstance(data, Mapping) and not callable(data):
            problems.append(
                f"data={type(data).__name__}: keyword arguments of Trainer.fit, such as {{'train_dataloaders': loader}}"
            )
        if not isinstance(metrics, Mapping) or not metrics:
            problems.append(f"metrics={metrics!r}: at least one metric, such as {{'val_loss': 'min'}}")
        else:
            wrong = {name: way for name, way in metrics.items() if way not in get_args(Direction)}
            problems += [f"metrics[{n!r}]={w!r}: {suggest(str(w), get_args(Direction))}" for n, w in wrong.items()]
        if not is_whole(seed, 0):
            problems.append(f"seed={seed!r}: a whole number from 0 on")
        if problems:
            raise ConfigError(f"SubsetSearch: {'; '.join(problems)}.")
        self.metrics: dict[str, Direction] = dict(metrics)
        self.seed = int(seed)
        self._runner = TrialRunner(module, data, trainer, list(metrics), evaluate, self.seed)

    # ------------------------------------------------------------------ CoFiTune's tree

    def tree(
        self,
        levels: Sequence[Level] | None = None,
        method: Callable[..., MethodCallback] | None = None,
        beam: int = 1,
    ) -> SearchResult:
        """Search level by level: first the range of layers, then the modules in it, then their projections.

        Each level is tried below the best branch of the level above, and ends the search if nothing on it is better
        than that branch. With the default levels that is at most 12 trials.

        Args:
            levels: What to try on each level; default :func:`~lightning_peft.search.coarse_levels` of the model.
            method: Makes the method that trains a branch from its settings; default CoFiTune without its soft mask,
                for which a branch that trains the same as an earlier one is not fitted again.
            beam: Branches kept on each level.

        Returns:
            All trials; ``result.best()`` has the settings, as ``CoFiTune(**result.best().settings)`` takes them.

        Raises:
            ConfigError: If there is more than one metric (let ``evaluate`` return one that unites them), or nothing to
                try.
        """
        if len(self.metrics) > 1:
            raise ConfigError(
                f"A tree is searched by one metric, not {len(self.metrics)}. Let evaluate return one that unites "
                f"{' and '.join(self.metrics)} (the paper takes the mean of its scores), or use bilevel()."
            )
        if not is_whole(beam, 1):
            raise ConfigError(f"SubsetSearch.tree(beam={beam!r}): a whole number from 1 on.")
        structure = self._runner.structure
        make = partial(CoFiTune, soft_mask="none") if method is None else method
        trials: list[Trial] = []
        numbers: list[int] = []  # of the trial of each branch
        tried: dict[frozenset[str], int] = {}

        def cost(node: Node) -> float:
            names = _would_train(make(**node.settings), structure)
            number = tried.get(names) if method is None else None
            if number is None:
                number = tried[names] = len(trials)
                values = self._runner.run([make(**node.settings)])
                parent = None if node.parent is None else numbers[node.parent]
                scope = tuple(compact_names(structure, names))
                trials.append(Trial(number, node.label, scope, values, dict(node.settings), {}, parent))
                _tell(trials[-1], self.metrics)
            numbers.append(number)
            return SearchResult(trials, self.metrics).costs(trials[number])[0]

        descend(coarse_levels(structure) if levels is None else levels, cost, int(beam))
        if not trials:
            raise ConfigError(
                "SubsetSearch.tree: the first level has no branch"
                + (
                    ". Give levels of your own: the model has no blocks with attention or feed-forward."
                    if levels is None
                    else "."
                )
            )
        return SearchResult(trials, self.metrics)

    # ------------------------------------------------------------------ MemControl's masks

    def bilevel(
        self,
        num_trials: int = 50,
        units: Mapping[str, str | Sequence[str]] | None = None,
        hyperparameters: Mapping[str, Any] | None = None,
        always: Sequence[str] = (),
        sampler: Callable[[int], Any] | None = None,
        storage: Any = None,
        name: str = "lightning_peft",
    ) -> SearchResult:
        """Search over masks: each unit trains or does not, and an outer loop learns from the metrics of inner fits.

        With several metrics (quality against memorisation, or against ``num_trainable_parameters``) the result is the
        front of trials that no other beats. Needs optuna: ``pip install "lightning_peft[search]"``.

        Args:
            num_trials: Trials in all, those of a resumed search included.
            units: Label -> scope entry or entries that are on or off together; default attention and feed-forward of
                each block.
            hyperparameters: Name -> ``(low, high)`` or ``(low, high, "log")`` for a range, of whole numbers if both
                are; or a list of choices. Handed to the function that makes the module.
            always: What trains beside the mask in each trial.
            sampler: Makes an optuna sampler from a seed; default optuna's multi-objective TPE. It is made anew for each
                trial, so that a resumed search makes the trials that an uninterrupted one would.
            storage: optuna storage, such as ``"sqlite:///search.db"``: the search can be resumed by calling it again.
            name: Name of the study in the storage.

        Raises:
            ConfigError: If optuna is not installed or an argument is out of range.
            ResumeMismatch: If the storage has a study of that name over other units or metrics.
        """
        optuna = _import_optuna()
        problems = [] if is_whole(num_trials, 1) else [f"num_trials={num_trials!r}: a whole number from 1 on"]
        space = dict(hyperparameters or {})
        problems += [f"hyperparameters[{k!r}]={v!r}: {_RANGE}" for k, v in space.items() if not _is_range(v)]
        if space and not self._runner.takes_hyperparameters:
            problems.append("hyperparameters need a function that makes the module with them; the search has a module")
        structure = self._runner.structure
        found = block_modules(structure) if units is None else units
        names = {label: resolve_scope(entry, structure, argument="units").names for label, entry in found.items()}
        if not names:
            problems.append("units: nothing to choose from; the model has no blocks, so name some")
        if taken := set(names) & set(space):
            problems.append(f"{min(taken)!r} is a unit and a hyper-parameter: rename one")
        if problems:
            raise ConfigError(f"SubsetSearch.bilevel: {'; '.join(problems)}.")
        make_sampler = sampler or (lambda seed: optuna.samplers.TPESampler(seed=seed))
        directions = ["minimize" if way == "min" else "maximize" for way in self.metrics.values()]
        study = optuna.create_study(
            study_name=name, storage=storage, directions=directions, sampler=make_sampler(0), load_if_exists=True
        )
        about = {
            "units": {label: fingerprint_names(members) for label, members in names.items()},
            "metrics": list(self.metrics.items()),
            "hyperparameters": space,
            "always": list(always),
            "seed": self.seed,
        }
        _check_study(study, json.loads(json.dumps(about)))
        while (index := len(_ended(study))) < num_trials:
            study.sampler = make_sampler(_seed(self.seed, index))
            trial = study.ask()
            try:
                values = self._inner_fit(trial, names, space, always)
            except BaseException:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
                raise
            if any(math.isnan(value) for value in values):
                trial.set_user_attr(_WITHOUT_RESULT, True)
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
                continue
            _tell(self._trial(study.tell(trial, values), index, names), self.metrics)
        trials = [
            self._trial(trial, number, names)
            for number, trial in enumerate(_ended(study))
            if not trial.user_attrs.get(_WITHOUT_RESULT)
        ]
        return SearchResult(trials, self.metrics, always)

    def _inner_fit(
        self, trial: Any, names: Mapping[str, tuple[str, ...]], space: Mapping[str, Any], always: Sequence[str]
    ) -> list[float]:
        """Fit what optuna suggests; metrics in order, NaN for a mask without units."""
        on = [label for label in names if trial.suggest_categorical(label, [True, False])]
        chosen = {key: _suggest(trial, key, value) for key, value in space.items()}
        trained = {name for label in on for name in names[label]}
        if not trained:
            return [math.nan] * len(self.metrics)
        method = SearchedSubset(scope=compact_names(self._runner.structure, trained), always=always)
        values = self._runner.run([method], chosen)
        trial.set_user_attr("metrics", {key: value for key, value in values.items() if math.isfinite(value)})
        return [values[metric] for metric in self.metrics]

    def _trial(self, trial: Any, number: int, names: Mapping[str, tuple[str, ...]]) -> Trial:
        on = [label for label in names if trial.params[label]]
        trained = {name for label in on for name in names[label]}
        metrics = {**trial.user_attrs["metrics"], **dict(zip(self.metrics, trial.values, strict=True))}
        scope = tuple(compact_names(self._runner.structure, trained))
        given = {key: value for key, value in trial.params.items() if key not in names}
        label = ", ".join(on) if len(on) <= 4 else f"{', '.join(on[:3])} and {len(on) - 3} more"
        return Trial(number, label, scope, metrics, {}, given)


_WITHOUT_RESULT = "without result"
_RANGE = 'a range (low, high) or (low, high, "log"), or a list of choices'


def _import_optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise ConfigError(
            "SubsetSearch.bilevel searches with optuna, which is not installed. Install the extra with "
            '`pip install "lightning_peft[search]"`, or use tree(), which needs nothing.'
        ) from None
    return optuna


def _would_train(method: MethodCallback, structure: Structure) -> frozenset[str]:
    method.bind(structure, {name: parameter.requires_grad for name, parameter in structure.parameters.items()})
    return method.before_wrap()


def _seed(seed: int, index: int) -> int:
    return draw_generator(seed, index, "trial").initial_seed() % 2**32


def _is_range(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(choice, (str, int, float, bool, type(None))) for choice in value)
    if not isinstance(value, tuple) or len(value) < 2 or value[2:] not in ((), ("log",)):
        return False
    return all(map(is_number, value[:2])) and value[0] < value[1] and (len(value) == 2 or value[0] > 0)


def _suggest(trial: Any, name: str, space: Any) -> Any:
    if isinstance(space, list):
        return trial.suggest_categorical(name, space)
    whole = all(isinstance(end, int) for end in space[:2])
    return (trial.suggest_int if whole else trial.suggest_float)(name, *space[:2], log=len(space) == 3)


def _ended(study: Any) -> list[Any]:
    """Trials that count: finished, or found to have no result; not those that an exception or a kill ended."""
    trials = study.get_trials(deepcopy=False)
    return [trial for trial in trials if trial.state.name == "COMPLETE" or trial.user_attrs.get(_WITHOUT_RESULT)]


def _check_study(study: Any, about: dict[str, Any]) -> None:
    """Note what a new study is about; a study from the storage must be about the same."""
    saved = study.user_attrs.get("lightning_peft")
    if saved is None and not study.get_trials(deepcopy=False):
        study.set_user_attr("lightning_peft", about)
        return
    different = [key for key in about if (saved or {}).get(key) != about[key]]
    if different:
        raise ResumeMismatch(
            f"The storage has a study {study.study_name!r} over other {' and '.join(different)}: its trials do not "
            "fit this search. Give the search another name, or the arguments it was begun with."
        )


def _tell(trial: Trial, metrics: Mapping[str, Direction]) -> None:
    values = ", ".join(f"{name} {trial.metrics[name]:.6g}" for name in metrics)
    extra = "".join(f", {name}={value!r}" for name, value in trial.hyperparameters.items())
    rank_zero_info(f"Trial {trial.number}: {trial.label}{extra}: {values}")
