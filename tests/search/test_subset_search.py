"""Searches: every trial starts alike and leaves nothing, trees and masks are reproducible, masks go on from storage."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import EarlyStopping

from lightning_peft import CoFiTune, SearchedSubset, SubsetSearch
from lightning_peft.data.loader import ResumableDataLoader
from lightning_peft.errors import ConfigError, ResumeMismatch, ScopeError, UnsupportedStrategy
from lightning_peft.search.runner import TrialRunner
from lightning_peft.search.subset_search import descend
from tests.contract.harness import TinyModule, assert_same_weights, weights
from tests.contract.harness import loader as contract_loader
from tests.search.tiny_search import (
    TRAINER,
    UNITS,
    Tiny,
    digest,
    layers_moved,
    loaders,
    samples,
    search,
    tiny,
)


@pytest.fixture(autouse=True)
def quiet() -> None:
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def runner(module: Any = None, data: Any = None, **kw: Any) -> TrialRunner:
    arguments = {"trainer": TRAINER, "metrics": ["val_loss"], **kw}
    return TrialRunner(module or tiny(), data or loaders(), **arguments)


def subset(index: int) -> SearchedSubset:
    return SearchedSubset(f"net.{index}")


# ---------------------------------------------------------------------------------------------------- trials


def test_a_trial_is_an_ordinary_fit(tmp_path: Path) -> None:
    """Bit for bit what the same Trainer gives from the same weights and seed."""
    kept: dict[str, Any] = {}

    def evaluate(trainer: pl.Trainer, module: Any) -> Mapping[str, float]:
        kept["weights"], kept["losses"] = weights(module), list(module.log_of_losses)
        return {"digest": digest(module)}

    metrics = runner(evaluate=evaluate, seed=7).run([subset(2)])
    module = tiny()
    data = loaders()
    torch.manual_seed(7)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    run = pl.Trainer(**TRAINER, **quiet, num_sanity_val_steps=0, callbacks=[subset(2)], default_root_dir=tmp_path)
    run.fit(module, **data)
    assert_same_weights(weights(module), kept["weights"])
    assert kept["losses"] == module.log_of_losses
    assert len(kept["losses"]) == 3
    (validated,) = run.validate(module, data["val_dataloaders"], verbose=False)
    assert metrics["val_loss"] == validated["val_loss"]
    assert metrics["digest"] == digest(module)
    assert metrics["num_trainable_parameters"] == 4 * 4 + 4
    assert metrics["train_loss"] == pytest.approx(kept["losses"][-1])


def own_generator() -> dict[str, Any]:
    return loaders(generator=torch.Generator().manual_seed(1))


def resumable() -> dict[str, Any]:
    return {**loaders(), "train_dataloaders": ResumableDataLoader(samples(), batch_size=2, seed=1)}


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return loaders()["train_dataloaders"]

    def val_dataloader(self) -> Any:
        return loaders()["val_dataloaders"]


@pytest.mark.parametrize("data", [loaders, own_generator, resumable, lambda: {"datamodule": Data()}, lambda: loaders])
def test_trials_do_not_know_of_each_other(data: Any) -> None:
    """Other trials before it change nothing, whatever their length; nor do they change module, flags or randomness."""
    module = tiny()
    module.net[5].requires_grad_(False)
    start, flags = copy.deepcopy(module), {n: p.requires_grad for n, p in module.named_parameters()}
    states = (torch.get_rng_state(), np.random.get_state(legacy=False), random.getstate())

    def evaluate(trainer: pl.Trainer, fitted: Any) -> Mapping[str, float]:
        return {"digest": digest(fitted), "seen": float(fitted.seen), "losses": sum(fitted.log_of_losses)}

    first = runner(module, data(), evaluate=evaluate)
    alone = [first.run([subset(index)]) for index in (1, 3)]
    assert alone[0]["digest"] != alone[1]["digest"]
    assert alone[0]["seen"] == 3
    again = runner(module, data(), evaluate=evaluate)
    mixed = [again.run([subset(index)]) for index in (3, 0, 1, 1, 3)]
    assert [mixed[2], mixed[3]] == [alone[0], alone[0]]
    assert [mixed[0], mixed[4]] == [alone[1], alone[1]]
    assert_same_weights(weights(module), weights(start))
    assert float(module.seen) == 0
    assert module.log_of_losses == []
    assert {n: p.requires_grad for n, p in module.named_parameters()} == flags
    assert torch.equal(torch.get_rng_state(), states[0])
    assert str(np.random.get_state(legacy=False)) == str(states[1])
    assert random.getstate() == states[2]


def test_callbacks_of_the_user_start_anew(tmp_path: Path) -> None:
    stopper = EarlyStopping("val_loss", patience=0, min_delta=1e6)  # stops at the second look
    trainer = {**TRAINER, "max_steps": -1, "max_epochs": 5, "callbacks": stopper, "default_root_dir": tmp_path}
    found = runner(trainer=trainer, evaluate=lambda t, m: {"steps": t.global_step}, metrics=["steps"])
    assert [found.run([subset(1)])["steps"] for _ in range(3)] == [12, 12, 12]
    assert stopper.stopped_epoch == 0


def test_a_factory_gives_all_trials_the_same_start() -> None:
    """Although it draws random weights, and although a hyper-parameter makes it draw others."""

    def factory(draws: int = 0, **given: Any) -> Tiny:
        torch.rand(draws)
        return Tiny(**given)

    torch.manual_seed(11)
    found = runner(
        factory, trainer={**TRAINER, "max_steps": 1}, evaluate=lambda t, m: {"frozen": digest(m.net[3]), "lr": m.lr}
    )
    results = [found.run([subset(1)], given) for given in ({}, {"lr": 0.5, "draws": 3}, {"width": 7})]
    assert len({values["frozen"] for values in results}) == 1
    assert [values["lr"] for values in results] == [0.1, 0.5, 0.1]
    assert results[0]["val_loss"] != results[1]["val_loss"]
    assert results[2]["num_trainable_parameters"] == 20


def test_a_factory_that_makes_nothing_new() -> None:
    module = tiny()
    with pytest.raises(ConfigError, match="same weights twice"):
        runner(lambda: module).run([subset(1)])


class Late(Tiny):
    """Builds its model in ``configure_model``, as large models do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = None  # pyright: ignore[reportAttributeAccessIssue]

    def configure_model(self) -> None:
        if self.net is None:
            self.net = Tiny().net


@pytest.mark.parametrize("module", [Late(), Late])
def test_a_module_that_builds_its_model_late(module: Any) -> None:
    found = runner(module, evaluate=lambda t, m: {"digest": digest(m)})
    assert len(found.structure.blocks) == 5
    first, second, again = (found.run([subset(index)]) for index in (1, 2, 1))
    assert first == again
    assert first["digest"] != second["digest"]
    assert first["num_trainable_parameters"] == 20


def test_metrics_are_of_the_final_weights() -> None:
    """The fit's own validation was two steps before its end."""
    calls: list[int] = []

    class Counted(Tiny):
        def on_validation_epoch_start(self) -> None:
            calls.append(self.trainer.global_step)

    torch.manual_seed(0)
    module = Counted()
    data = loaders()
    kept: list[Any] = []
    values = runner(
        module,
        data,
        trainer={**TRAINER, "val_check_interval": 3, "max_steps": 5},
        evaluate=lambda t, m: {"kept": float(kept.append(copy.deepcopy(m)) is None)},
    ).run([subset(1)])
    assert calls == [3, 5]
    with torch.no_grad():
        kept[0].eval()
        parts = [kept[0].loss(batch) for batch in data["val_dataloaders"]]
    assert values["val_loss"] == pytest.approx(float(torch.stack(parts).mean()))
    calls.clear()
    runner(module, data, trainer={**TRAINER, "max_steps": 6}).run([subset(1)])
    assert calls == [6]  # once: the epoch ends with the fit


def test_a_metric_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"'val_los' was not logged.*'val_loss'"):
        runner(metrics=["val_los"]).run([subset(1)])


def test_several_processes_are_refused() -> None:
    with pytest.raises(UnsupportedStrategy, match="this Trainer has 2"):
        runner(trainer={**TRAINER, "devices": 2, "strategy": "ddp"}).run([subset(1)])


# ---------------------------------------------------------------------------------------------------- trees


@given(seed=st.integers(0, 10**6), beam=st.integers(1, 3))
def test_descend_against_a_plain_loop(seed: int, beam: int) -> None:
    """The best branches of each level that improve on their parents, by a table of random costs."""
    levels = [lambda _, level=level: {str(i): {f"at {level}": i} for i in range(3)} for level in range(3)]

    def value(settings: Mapping[str, int]) -> float:
        return random.Random(f"{seed} {sorted(settings.items())}").random()

    found = descend(levels, lambda node: value(node.settings), beam)
    expected: list[dict[str, int]] = []
    parents: list[dict[str, int]] = [{}]
    for level in range(3):
        children = [(parent, {**parent, f"at {level}": i}) for parent in parents for i in range(3)]
        expected += [child for _, child in children]
        better = [child for parent, child in children if not parent or value(child) < value(parent)]
        parents = sorted(better, key=value)[:beam]
        if not parents:
            break
    assert [dict(node.settings) for node in found] == expected
    for node in found:
        above = {} if node.parent is None else found[node.parent].settings
        assert {**above, **node.settings} == node.settings
        assert len(node.settings) == len(above) + 1


def test_descend_counts_nan_as_worst() -> None:
    costs = {"a": float("nan"), "b": 1.0}
    nodes = descend(
        [lambda _: {"a": {"x": "a"}, "b": {"x": "b"}}, lambda s: {s["x"]: {"y": 1}}], lambda n: costs[n.label[0]]
    )
    assert [(node.label, node.parent) for node in nodes] == [("a", None), ("b", None), ("b, b", 1)]


def planted(wanted: tuple[float, float], module: str) -> Any:
    """A metric that is best if exactly this module of the layers of this range has moved."""
    start = TinyModule("gqa_decoder")
    layers = range(int(4 * wanted[0]), int(4 * wanted[1]))

    def evaluate(trainer: pl.Trainer, fitted: Any) -> Mapping[str, float]:
        before = weights(start)
        moved = {n for n, v in weights(fitted).items() if not torch.equal(v, before[n])}
        target = {n for n in before if module in n and any(f".layers.{i}." in n for i in layers)}
        return {"miss": float(len(moved ^ target))}

    return evaluate


def test_tree_finds_the_planted_modules(tmp_path: Path) -> None:
    model = TinyModule("gqa_decoder")
    data = {f"{split}_dataloaders": contract_loader("gqa_decoder") for split in ("train", "val")}
    trainer = {**TRAINER, "max_steps": 1, "limit_val_batches": 0, "default_root_dir": tmp_path}
    found = SubsetSearch(
        model, data, trainer, {"miss": "min"}, evaluate=planted((0.75, 1.0), "down_proj"), seed=1
    ).tree()
    best = found.best()
    assert best.metrics["miss"] == 0
    assert best.label == "top, ffn, down"
    assert best.settings == {"layer_range": (0.75, 1.0), "modules": ("down",)}
    assert best.scope == ("model.model.layers.3.mlp.down_proj",)
    assert len(found.trials) == 7 + 2 + 3
    assert [trial.parent for trial in found.trials] == [None] * 7 + [5] * 2 + [8] * 3
    assert found.trials[5].label == "top"
    method = CoFiTune(**best.settings)
    assert method.modules == ("down",)
    kept = found.method()
    assert kept.scope == list(best.scope)


class Plain(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.only = torch.nn.Linear(4, 1)


def test_tree_does_not_fit_the_same_subset_twice() -> None:
    """Six plain layers have no attention: 'ffn' is the whole range, and its parts are 'down' alone."""
    calls: list[int] = []
    found = search(evaluate=lambda t, m: {"n": float(calls.append(1) is None)}).tree()
    assert len(calls) == len(found.trials)
    assert len({trial.scope for trial in found.trials}) == len(found.trials)
    with pytest.raises(ConfigError, match=r"by one metric, not 2.*val_loss and train_loss.*bilevel"):
        search({"val_loss": "min", "train_loss": "min"}).tree()
    with pytest.raises(ConfigError, match="no blocks with attention or feed-forward"):
        search(module=Plain()).tree()
    with pytest.raises(ConfigError, match="first level has no branch"):
        search().tree([lambda _: {}])
    with pytest.raises(ConfigError, match="beam=0"):
        search().tree(beam=0)


def test_tree_over_another_method(tmp_path: Path) -> None:
    levels = [
        lambda _: {f"layer {i}": {"scope": f"net.{i}"} for i in (1, 2)},
        lambda _: {"with the head": {"always": ("head",)}},
    ]
    found = search({"n": "max"}, evaluate=lambda t, m: {"n": float(len(layers_moved(m, tiny())))}).tree(
        levels, method=SearchedSubset
    )
    assert [trial.label for trial in found.trials] == ["layer 1", "layer 2", "layer 1, with the head"]
    assert [trial.metrics["n"] for trial in found.trials] == [1, 1, 2]
    assert found.best().scope == ("net.1", "net.5")


# ---------------------------------------------------------------------------------------------------- masks


def count_moved(trainer: pl.Trainer, module: Any) -> Mapping[str, float]:
    moved = layers_moved(module, tiny())
    return {"wanted": float(len(moved & {1, 3})), "others": float(len(moved - {1, 3}))}


TRADE: dict[str, Any] = {"wanted": "max", "others": "min"}


def masks(num_trials: int = 12, module: Any = None, evaluate: Any = count_moved, seed: int = 0, **kw: Any) -> Any:
    trainer = {**TRAINER, "max_steps": 1, "limit_val_batches": 0}
    return search(TRADE, module, trainer=trainer, evaluate=evaluate, seed=seed).bilevel(num_trials, UNITS, **kw)


def test_masks_train_exactly_their_units() -> None:
    found = masks(8)
    assert len(found.trials) == 8
    for trial in found.trials:
        on = {int(entry.split(".")[1]) for entry in trial.scope}
        assert trial.metrics["wanted"] == len(on & {1, 3})
        assert trial.metrics["others"] == len(on - {1, 3})
        assert trial.metrics["num_trainable_parameters"] == 20 * len(on)
    assert len({trial.scope for trial in found.trials}) > 3


def test_masks_learn_a_trade_off() -> None:
    """Better than chance: the two layers that help, and none beside them, is one mask in 32."""
    found = masks(40)
    best = found.best("wanted", {"others": 0.0})
    assert best.scope == ("net.1", "net.3")
    assert found.front[0].scope == best.scope
    late = [t.metrics["wanted"] - t.metrics["others"] for t in found.trials[20:]]
    early = [t.metrics["wanted"] - t.metrics["others"] for t in found.trials[:10]]
    assert sum(late) / len(late) > sum(early) / len(early)


def test_masks_are_a_function_of_the_seed() -> None:
    one, same, other = masks(6), masks(6), masks(6, seed=1)
    assert one.trials == same.trials
    assert one.trials != other.trials
    torch.manual_seed(1234)
    assert masks(6).trials == one.trials


def test_masks_go_on_from_storage(tmp_path: Path) -> None:
    """The trials of an interrupted search and of the one that goes on are those of one that was not interrupted."""
    expected = masks(10)
    storage = f"sqlite:///{tmp_path / 'search.db'}"
    first = masks(4, storage=storage)
    assert first.trials == expected.trials[:4]
    countdown = iter(range(3))

    def failing(trainer: pl.Trainer, module: Any) -> Mapping[str, float]:
        if next(countdown, None) is None:
            raise RuntimeError("power cut")
        return count_moved(trainer, module)

    with pytest.raises(RuntimeError, match="power cut"):
        masks(10, storage=storage, evaluate=failing)
    assert masks(7, storage=storage).trials == expected.trials[:7]
    assert masks(10, storage=storage).trials == expected.trials
    with pytest.raises(ResumeMismatch, match="over other seed"):
        masks(10, storage=storage, seed=3)
    with pytest.raises(ResumeMismatch, match="over other metrics"):
        search(dict(reversed(TRADE.items()))).bilevel(10, UNITS, storage=storage)
    with pytest.raises(ResumeMismatch, match="over other units and always"):
        search(TRADE).bilevel(10, {**UNITS, "layer 0": "net.5"}, always=("head",), storage=storage)
    assert len(masks(2, storage=storage, name="another").trials) == 2


def test_masks_without_a_unit_are_not_fitted() -> None:
    calls: list[int] = []

    def evaluate(trainer: pl.Trainer, module: Any) -> Mapping[str, float]:
        calls.append(1)
        return count_moved(trainer, module)

    trainer = {**TRAINER, "max_steps": 1, "limit_val_batches": 0}
    found = search(TRADE, trainer=trainer, evaluate=evaluate).bilevel(12, {"layer 1": "net.1", "layer 2": "net.2"})
    assert 0 < len(found.trials) == len(calls) < 12
    assert [trial.number for trial in found.trials] == sorted({trial.number for trial in found.trials})


def test_a_metric_that_is_no_number_is_left_out() -> None:
    def evaluate(trainer: pl.Trainer, module: Any) -> Mapping[str, float]:
        values = dict(count_moved(trainer, module))
        return values if values["others"] < 2 else {**values, "wanted": float("nan")}

    found = masks(12, evaluate=evaluate)
    assert 0 < len(found.trials) < 12
    assert all(trial.metrics["others"] < 2 for trial in found.trials)


def test_hyperparameters_reach_the_factory() -> None:
    space: dict[str, Any] = {"lr": (1e-3, 1.0, "log"), "width": [4, 6]}
    trainer = {**TRAINER, "max_steps": 1, "limit_val_batches": 0}
    found = search({"lr_seen": "max"}, Tiny, trainer=trainer, evaluate=lambda t, m: {"lr_seen": m.lr}).bilevel(
        8, UNITS, hyperparameters=space
    )
    for trial in found.trials:
        assert trial.metrics["lr_seen"] == trial.hyperparameters["lr"]
        assert 1e-3 <= trial.hyperparameters["lr"] <= 1
        assert trial.hyperparameters["width"] in (4, 6)
    assert {t.hyperparameters["width"] for t in found.trials} == {4, 6}
    assert "lr" in str(found)


def test_always_trains_in_each_trial_and_in_the_result() -> None:
    found = masks(3, always=("head",))
    assert found.method().always == ("head",)
    for trial in found.trials:
        assert trial.metrics["num_trainable_parameters"] == 20 * len(trial.scope) + 5
        assert trial.metrics["others"] >= 1


def test_own_sampler() -> None:
    optuna = pytest.importorskip("optuna")
    seeds: list[int] = []

    def sampler(seed: int) -> Any:
        seeds.append(seed)
        return optuna.samplers.RandomSampler(seed=seed)

    assert masks(4, sampler=sampler).trials == masks(4, sampler=sampler).trials
    assert len(set(seeds)) == 5


def test_default_units_are_modules_of_blocks() -> None:
    trainer = {**TRAINER, "max_steps": 1, "limit_val_batches": 0}
    found = search(TRADE, trainer=trainer, evaluate=count_moved).bilevel(3)
    labels = {part for trial in found.trials for part in trial.label.split(", ")}
    assert labels <= {f"net.{i} ffn" for i in range(5)} | {label for label in labels if " and " in label}


def test_what_was_found_trains_like_its_trial(tmp_path: Path) -> None:
    found = masks(6)
    for trial in found.trials[:3]:
        module = tiny()
        run = pl.Trainer(**TRAINER, logger=False, enable_checkpointing=False, callbacks=[found.method(trial)])
        run.fit(module, **loaders())
        assert {f"net.{i}" for i in layers_moved(module, tiny())} == set(trial.scope)


# ---------------------------------------------------------------------------------------------------- mistakes


def test_without_optuna_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"lightning_peft\[search\]"):
        masks(1)


def test_mistakes_of_a_search_are_told_together() -> None:
    wrong: Any = {"module": 3, "data": [1], "trainer": {}, "metrics": {"val_loss": "minimum"}, "seed": -1}
    with pytest.raises(ConfigError, match=r"module=int.*data=list.*'min'.*seed=-1"):
        SubsetSearch(**wrong)
    with pytest.raises(ConfigError, match="at least one metric"):
        SubsetSearch(tiny(), {}, {}, {})


def test_mistakes_of_masks_are_told_together() -> None:
    with pytest.raises(ConfigError, match=r"num_trials=0.*hyperparameters\['lr'\].*a function that makes the module"):
        masks(0, hyperparameters={"lr": (1.0, 0.1)})
    for bad in ((1, 2, 3), (0.0, 1.0, "log"), [], (1,), "0.1", ("a", "b"), [object()]):
        with pytest.raises(ConfigError, match=r"hyperparameters\['lr'\]"):
            masks(2, Tiny, hyperparameters={"lr": bad})
    with pytest.raises(ConfigError, match="'layer 1' is a unit and a hyper-parameter"):
        masks(2, Tiny, hyperparameters={"layer 1": [1, 2]})
    with pytest.raises(ScopeError, match=r"units='net\.77'"):
        search().bilevel(2, {"x": "net.77"})
    with pytest.raises(ConfigError, match="nothing to choose from"):
        search().bilevel(2, {})
