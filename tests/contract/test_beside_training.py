"""What a method must leave alone: random states, data order, the user's schedule and parameter groups."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from lightning_peft import AutoRGN, FinetuningSchedule, GradualUnfreezing
from tests.contract.harness import ROWS, TinyModule, loader, trainer

# What these are for is to change rates; their own tests look at them.
CHANGE_RATES = (AutoRGN, FinetuningSchedule, GradualUnfreezing)
DATA_DEPENDENT = ("green_trainer", "rift", "ist", "searched", "cofitune")


class Beside(pl.Callback):
    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.rates: list[list[float]] = []
        self.modes: list[bool] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch[0].tolist())

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.rates.append([group["lr"] for group in optimizer.param_groups])
        self.modes.append(all(module.training for module in pl_module.modules()))


def fit(tmp_path: Path, methods: list[Any], seed: int = 0) -> tuple[Beside, Any]:
    for seeded in (torch.manual_seed, random.seed, np.random.seed):
        seeded(seed)
    beside = Beside()
    run = trainer(tmp_path, [*methods, beside])
    run.fit(TinyModule("gqa_decoder", filtered=False), loader("gqa_decoder"), loader("gqa_decoder", shuffle=False))
    return beside, (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())  # type: ignore


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Beside, Any]:
    return fit(tmp_path_factory.mktemp("plain"), [])


@pytest.mark.parametrize("row", ROWS)
def test_randomness_data_and_schedule_go_on_as_without_it(row: str, plain: tuple[Beside, Any], tmp_path: Path) -> None:
    """Dropout, shuffling and the learning rate are those of a run without the method, over all its draws."""
    methods = ROWS[row].make()
    beside, states = fit(tmp_path, methods)
    expected, untouched = plain
    assert states == untouched
    assert beside.batches == expected.batches
    assert len(beside.batches) == 22
    assert all(beside.modes)
    assert len(beside.rates) == len(expected.rates) == 12
    if not isinstance(methods[0], CHANGE_RATES):
        assert beside.rates == expected.rates
        assert len(set(map(tuple, beside.rates))) == 12  # the schedule moves in every step


@pytest.mark.parametrize("row", [row for row in ROWS if not row.startswith(DATA_DEPENDENT)])
def test_draws_do_not_depend_on_the_global_random_state(row: str, tmp_path: Path) -> None:
    first, second = ROWS[row].make(), ROWS[row].make()
    fit(tmp_path, first, seed=1)
    fit(tmp_path, second, seed=2)
    assert [method.history for method in first] == [method.history for method in second]
