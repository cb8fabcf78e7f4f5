"""Schedules of finetuning-scheduler, unchanged: the same names, the same trainable set and rates in every epoch.

The other package is the oracle, on one device and without restoring checkpoints. Nothing of it is in this repository:
its files are read from the installed wheel.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from lightning_peft import FinetuningSchedule
from lightning_peft.core.blocks import find_structure
from lightning_peft.methods.phase_names import resolve_phases
from tests.oracles.peer_schedule import SHIPPED, Llama, Module, deberta, peer_run, run, shipped_file

pytest.importorskip("finetuning_scheduler", reason="needs finetuning-scheduler, which the test extra installs")

NO_DECAY = ["bias", "LayerNorm.weight"]
lr = torch.optim.lr_scheduler


@functools.cache
def model_for(schedule: str) -> nn.Module:
    torch.manual_seed(0)
    return Llama() if "llama" in schedule else deberta()


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.1)


SCHEDULERS: dict[str, Any] = {
    "none": None,
    "restarts": lambda o: lr.CosineAnnealingWarmRestarts(o, T_0=1, T_mult=2, eta_min=1e-7),
    "linear": lambda o: lr.LinearLR(o, start_factor=0.1, total_iters=4),
    "step": lambda o: lr.StepLR(o, step_size=1, gamma=0.7),
    "lambda": lambda o: lr.LambdaLR(o, lambda epoch: 0.9**epoch),
    "multi_step": lambda o: lr.MultiStepLR(o, milestones=[2, 4]),
    "exponential": lambda o: lr.ExponentialLR(o, 0.8),
    "plateau": lambda o: {"scheduler": lr.ReduceLROnPlateau(o, patience=0, factor=0.5), "monitor": "val_loss"},
}


def compare(tmp_path: Path, schedule: Any, max_epochs: int, patience: int = 3, **module: Any) -> list[dict[str, float]]:
    """Run both packages and compare; return what the peer did."""
    theirs = Module(**module)
    expected, _ = peer_run(tmp_path / "peer", theirs, schedule, max_epochs, patience)
    ours = Module(**module)
    method = FinetuningSchedule(schedule if isinstance(schedule, dict) else str(schedule), "val_loss", patience)
    found = run(tmp_path / "ours", ours, [method], max_epochs)[: len(expected)]  # the peer stops in its last phase
    assert [set(epoch) for epoch in found] == [set(epoch) for epoch in expected]
    for epoch, (ours_now, theirs_now) in enumerate(zip(found, expected, strict=True)):
        assert ours_now == pytest.approx(theirs_now, rel=1e-12), epoch
    if len(expected) == max_epochs:
        for (name, left), (_, right) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
            torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-7, msg=name)
    return expected


@pytest.mark.parametrize("schedule", SHIPPED, ids=lambda path: Path(path).stem)
def test_shipped_schedules_have_the_same_phases_and_names(schedule: str, tmp_path: Path) -> None:
    path = shipped_file(schedule)
    _, peers = peer_run(tmp_path, Module(model_for(schedule), adamw, SCHEDULERS["step"]), path, max_epochs=1)
    method = FinetuningSchedule(str(path))
    resolved = resolve_phases(method.phases, find_structure(Module(model_for(schedule), adamw)))
    assert len(resolved) == len(peers) >= 3
    for number, phase in enumerate(resolved):
        assert set(phase.listed) == set(peers[number]["params"])
        assert len(phase.listed) > 0
        assert method.phases[number].max_transition_epoch == peers[number]["max_transition_epoch"]


@pytest.mark.parametrize("no_decay", [None, NO_DECAY], ids=["decay", "no_decay"])
@pytest.mark.parametrize("scheduler", ["none", "linear", "restarts"])
@pytest.mark.parametrize("schedule", SHIPPED, ids=lambda path: Path(path).stem)
def test_shipped_schedules_train_the_same_at_the_same_rates(
    schedule: str, scheduler: str, no_decay: list[str] | None, tmp_path: Path
) -> None:
    path = shipped_file(schedule)
    if scheduler == "none" and "new_lr_scheduler" in path.read_text():
        scheduler = "step"  # the peer replaces a scheduler only where there is one
    module = {"model": model_for(schedule), "optimizer": adamw, "scheduler": SCHEDULERS[scheduler]}
    epochs = compare(tmp_path, path, 9, patience=2, **module, no_decay=no_decay)
    sizes = [len(epoch) for epoch in epochs]
    assert len(set(sizes)) == len(yaml.safe_load(path.read_text()))  # every phase was reached
    assert sizes == sorted(sizes)


OWN: dict[str, dict[int, Any]] = {
    "rates": {
        0: {"params": ["model.output.*", "model.norm.weight"], "max_transition_epoch": 2},
        1: {"params": ["model.layers.3.*"], "lr": 2e-3, "max_transition_epoch": 3},
        2: {"params": ["model.layers.[0-2].(attention|feed_forward)"], "lr": "5e-4", "max_transition_epoch": 3},
        3: {"params": ["model.tok_embeddings.weight"]},
    },
    "plateaus": {
        0: {"params": ["model.output"]},
        1: {"params": ["model.layers.3.*"], "lr": 1e-3},
        2: {"params": ["model.norm"]},
    },
    "current_rates": {
        0: {"params": ["model.output"], "max_transition_epoch": 2},
        1: {
            "params": ["model.norm"],
            "lr": 1e-3,
            "new_lr_scheduler": {
                "lr_scheduler_init": {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 1}},
                "use_current_optimizer_pg_lrs": True,
            },
        },
    },
    "new_optimizers": {
        0: {"params": ["model.output"], "max_transition_epoch": 2},
        1: {
            "params": ["model.norm"],
            "lr": 1e-3,
            "max_transition_epoch": 4,
            "new_optimizer": {
                "optimizer_init": {"class_path": "torch.optim.SGD", "init_args": {"lr": 1e-2, "momentum": 0.9}}
            },
        },
        2: {
            "params": ["model.tok_embeddings"],
            "new_optimizer": {"optimizer_init": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 2e-3}}},
        },
    },
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("schedule", OWN)
def test_other_schedules_under_other_schedulers(schedule: str, scheduler: str, tmp_path: Path) -> None:
    if scheduler == "none" and schedule == "current_rates":
        pytest.skip("the peer replaces a scheduler only where there is one")
    losses = [3.0, 2.0, 2.0, 2.5, 1.0, 1.1, 1.2, 0.9]
    module = {"model": Llama(), "optimizer": adamw, "scheduler": SCHEDULERS[scheduler], "val_losses": losses}
    epochs = compare(tmp_path, OWN[schedule], 8, patience=2, **module)
    assert len({len(epoch) for epoch in epochs}) == len(OWN[schedule])


def test_an_optimizer_over_the_trainable_parameters_only(tmp_path: Path) -> None:
    module = {"model": Llama(), "optimizer": adamw, "scheduler": SCHEDULERS["lambda"], "filtered": True}
    compare(tmp_path, OWN["rates"], 6, **module)


def test_base_max_lr(tmp_path: Path) -> None:
    schedule = {0: {"params": ["model.output"], "max_transition_epoch": 1}, 1: {"params": ["model.norm"]}}
    expected, _ = peer_run(tmp_path, Module(Llama(), adamw), schedule, 2, base_max_lr=4e-4)
    found = run(tmp_path, Module(Llama(), adamw), [FinetuningSchedule(schedule, base_max_lr=4e-4)], 2)
    assert found == expected
    assert expected[1]["model.norm.weight"] == 4e-4
