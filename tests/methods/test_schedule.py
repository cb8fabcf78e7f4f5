"""FinetuningSchedule: what a schedule may say, what its phases train at which rate, when they end, and exact resume."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import Strategy

from lightning_peft import FinetuningSchedule
from lightning_peft.cli import main
from lightning_peft.core.blocks import find_structure
from lightning_peft.errors import ConfigError, LightningPeftError, ResumeMismatch, ScopeError
from lightning_peft.methods.phase_draft import draft_schedule
from lightning_peft.methods.phase_names import resolve_entry, resolve_phases
from lightning_peft.methods.phases import parse_schedule
from tests.contract.harness import TinyModule, assert_same_weights, loader, trainer, weights
from tests.models.test_examples import run as run_example

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no:UserWarning")
BASE = {0: {"params": ["head"], "max_steps": 2}, 1: {"params": ["blocks"]}}


class Logged(TinyModule):
    """Logs given numbers as ``val_loss``, one per validation, and a training metric."""

    losses: tuple[float, ...] = (1.0,)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", torch.tensor(self.losses[min(self.current_epoch, len(self.losses) - 1)]), on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", torch.tensor(self.losses[min(self.current_epoch, len(self.losses) - 1)]))


def fit(
    tmp_path: Path,
    schedule: Any,
    *callbacks: pl.Callback,
    losses: tuple[float, ...] = (1.0,),
    val: bool = True,
    **kw: Any,
) -> tuple[FinetuningSchedule, Logged, pl.Trainer]:
    method = schedule if isinstance(schedule, FinetuningSchedule) else FinetuningSchedule(schedule)
    module = Logged("gqa_decoder")
    module.losses = losses
    run = trainer(tmp_path, [method, *callbacks], **kw)
    data = loader("gqa_decoder", shuffle=False) if val else None
    run.fit(module, loader("gqa_decoder"), data)
    return method, module, run


def steps_of(method: FinetuningSchedule) -> list[int]:
    return [step for step, _ in method.history]


# ---------------------------------------------------------------------------------------------------- mistakes

WRONG: dict[str, tuple[Any, list[str]]] = {
    "not a mapping": ({0: ["head"]}, ["phase 0 must be a mapping with 'params'"]),
    "no phase": ({}, ["there is no phase"]),
    "no number": ({"first": {"params": ["head"]}}, ["'first' is not a phase"]),
    "gap": ({0: {"params": ["head"]}, 2: {"params": ["blocks"]}}, [r"0 to 1 without gaps, not \[0, 2\]"]),
    "from one": ({1: {"params": ["head"]}}, ["numbered 0 to 0"]),
    "twice": ({0: {"params": ["head"]}, "0": {"params": ["blocks"]}}, ["phase 0 is there twice"]),
    "unknown key": ({0: {"params": ["head"], "max_transition_step": 3}}, ["Did you mean 'max_transition_epoch'"]),
    "no params": ({0: {"lr": 1e-3}}, ["phase 0 needs 'params' or 'only'", "and neither is there"]),
    "empty change": ({0: {"params": ["head"]}, 1: {"max_steps": 2}}, ["phase 1 changes nothing"]),
    "only with params": ({0: {"only": ["head"], "params": ["norms"]}}, ["cannot be combined"]),
    "numbers": (
        {0: {"params": ["head"], "lr": "fast", "max_steps": 0, "patience": 1.5, "min_delta": -1, "mode": "up"}},
        ["'lr' must be a number", "'max_steps' must be a whole", "'patience' must", "'min_delta' must", "'mode' must"],
    ),
    "lr of groups": ({0: {"params": ["head"], "optimizer_options": {"lr": 1.0}}}, ["use the key lr"]),
    "scheduler class": (
        {
            0: {
                "params": ["head"],
                "new_lr_scheduler": {"lr_scheduler_init": {"class_path": "torch.optim.lr_scheduler.StepL"}},
            }
        },
        ["has no class 'StepL'. Did you mean 'StepLR'"],
    ),
    "scheduler options": (
        {
            0: {
                "params": ["head"],
                "new_lr_scheduler": {
                    "lr_scheduler_init": {
                        "class_path": "torch.optim.lr_scheduler.StepLR",
                        "init_args": {"step_siz": 3},
                    },
                    "pl_lrs_cfg": {"intervall": "step"},
                    "init_pg_lr": [1.0],
                },
            }
        },
        ["Did you mean 'step_size'", "Did you mean 'interval'", "Did you mean 'init_pg_lrs'"],
    ),
    "plateau scheduler": (
        {
            0: {
                "params": ["head"],
                "new_lr_scheduler": {"lr_scheduler_init": {"class_path": "torch.optim.lr_scheduler.ReduceLROnPlateau"}},
            }
        },
        ["ReduceLROnPlateau needs new_lr_scheduler.pl_lrs_cfg.monitor"],
    ),
    "optimizer": (
        {0: {"params": ["head"], "new_optimizer": {"optimizer_init": {"init_args": {"lr": 1.0}}}}},
        ["needs 'class_path'"],
    ),
    "optimizer options": (
        {
            0: {
                "params": ["head"],
                "new_optimizer": {"optimizer_init": {"class_path": "torch.optim.SGD", "init_args": {"momentun": 1}}},
            }
        },
        ["Did you mean 'momentum'"],
    ),
    "several": (
        {0: {"parms": ["head"]}, 1: {"params": ["blocks"], "lr": -1.0}, 3: {"params": 7}},
        ["mistakes:", "without gaps", "Did you mean 'params'", "phase 1: 'lr'", "phase 3: 'params' must be a list"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_are_named_together(case: str) -> None:
    schedule, messages = WRONG[case]
    with pytest.raises(ConfigError) as caught:
        FinetuningSchedule(schedule)
    for message in messages:
        assert caught.match(message)


def test_arguments_out_of_range_are_named_together() -> None:
    with pytest.raises(ConfigError, match=r"patience=0 .*\n.*min_delta=-1.0.*\n.*mode='up'.*\n.*base_max_lr=-1.0"):
        FinetuningSchedule(BASE, patience=0, min_delta=-1, mode="up", base_max_lr=-1)  # pyright: ignore


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0: {params: [head]\n1: x", "not a YAML file of phases: .*line 2"),
        ("0:\n  params: [head]\n0:\n  params: [norms]\n", "key 0 is there twice, again in line 3"),
        ("- params: [head]\n", "this is list"),
        ("", "this is NoneType"),
        ("0:\n  params: [head]\n  frieze: [norms]\n", "s.yaml.*Did you mean 'freeze'"),
    ],
)
def test_bad_files_are_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        FinetuningSchedule(str(path))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.yaml' cannot be read: No such file"):
        FinetuningSchedule(str(tmp_path / "none.yaml"))


def test_a_file_is_read_as_its_mapping(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("'0': {params: head, lr: 1e-3}\n1: {params: [blocks], lr: 2.0e-05, min_delta: 1e-4}\n")
    found = FinetuningSchedule(str(path))
    assert found.schedule[0] == {"params": ["head"], "lr": 1e-3, "monitor": "val_loss", "patience": 3, "mode": "min",
                                 "min_delta": 0.0}  # fmt: skip
    assert found.schedule[1]["lr"] == 2e-5
    again = FinetuningSchedule(found.schedule)
    assert again.schedule == found.schedule
    assert again.settings() == found.settings()


def test_names_that_do_not_fit_are_named_together_before_training(tmp_path: Path) -> None:
    schedule = {
        0: {"params": ["model.lm_haed.weight", "head"]},
        1: {"params": ["model.model.layers.9.*"], "freeze": ["class:LlamaMLPP"]},
        2: {"freeze": ["embeddings"]},
    }
    with pytest.raises(ScopeError) as caught:
        fit(tmp_path, schedule)
    for message in [
        "3 mistakes|4 mistakes",
        "phase 0: 'model.lm_haed.weight' matches no parameter.*'model.lm_head.weight'",
        "phase 1: 'model.model.layers.9.*' matches no parameter",
        "phase 1, freeze: .*LlamaMLPP.*'LlamaMLP'",
        r"phase 2: nothing of freeze=\['embeddings'\] trains at that time",
    ]:
        assert caught.match(message)


def test_a_phase_in_which_nothing_would_train_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ScopeError, match="phase 1: nothing would train"):
        fit(tmp_path, {0: {"params": ["head"]}, 1: {"freeze": ["head"]}})


def test_what_the_optimizer_cannot_do_is_named_before_training(tmp_path: Path) -> None:
    scheduler = {"class_path": "torch.optim.lr_scheduler.ReduceLROnPlateau", "init_args": {"min_lr": [0.1, 0.1, 0.1]}}
    schedule = {
        0: {"params": ["head"], "optimizer_options": {"weight_decai": 0.0}},
        1: {
            "params": ["blocks"],
            "new_lr_scheduler": {"lr_scheduler_init": scheduler, "pl_lrs_cfg": {"monitor": "val_loss"}},
        },
    }
    with pytest.raises(ConfigError) as caught:
        fit(tmp_path, schedule)
    assert caught.match("AdamW has no option 'weight_decai'. Did you mean 'weight_decay'")
    assert caught.match(r"min_lr has 3 entries, but 2 parameter group\(s\)")


def test_limits_of_the_last_phase_are_not_silently_ignored(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="max_steps of the last phase have no effect"):
        fit(tmp_path, {0: {"params": ["head"], "max_steps": 1}, 1: {"params": ["norms"], "max_steps": 3}})


# ---------------------------------------------------------------------------------------------------- names


def names_of(entry: str, module: torch.nn.Module) -> set[str]:
    return set(resolve_entry(entry, find_structure(module))[0])


class Many(torch.nn.Module):
    """Twelve layers, so that ``layers.1`` is the beginning of several names."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2)) for _ in range(12)
        )
        self.norm = torch.nn.LayerNorm(2)
        self.norm_out = torch.nn.LayerNorm(2)
        self.head = torch.nn.Linear(2, 2)


def test_kinds_of_entries() -> None:
    model = Many()
    every = [name for name, _ in model.named_parameters()]
    below = lambda *paths: {name for name in every if name.startswith(tuple(f"{path}." for path in paths))}  # noqa: E731
    assert names_of("layers.3.0.weight", model) == {"layers.3.0.weight"}
    assert names_of("layers.3", model) == below("layers.3")
    assert names_of("layers.11.*", model) == below("layers.11")
    assert names_of("*.[34].*", model) == below("layers.3", "layers.4")
    assert names_of("layers.(3|11).1", model) == below("layers.3.1", "layers.11.1")
    assert names_of(r"layers.\d{2}.0.bias", model) == {"layers.10.0.bias", "layers.11.0.bias"}
    assert names_of("re:.*norm.*", model) == below("norm", "norm_out")
    norms = below("norm", "norm_out", *(f"layers.{index}.1" for index in range(12)))
    assert names_of("class:LayerNorm", model) == norms
    assert names_of("head", model) >= below("head")


@pytest.mark.parametrize("entry", ["layers.1", "layers.1.*", "norm", "layers.[23]*"])
def test_an_entry_with_two_meanings_is_refused(entry: str) -> None:
    model = Many()
    with pytest.raises(ScopeError, match=r"as a path or glob, but .* as a regular expression") as caught:
        names_of(entry, model)
    first, second = (part for part in str(caught.value).split("'") if part.startswith("re:"))
    first, second = first.replace("\\\\", "\\"), second.replace("\\\\", "\\")
    assert names_of(first, model) < names_of(second, model)  # both ways out work


def test_negation_and_refreezing() -> None:
    phases = parse_schedule(
        {
            0: {"params": ["layers.3", "!layers.3.1"]},
            1: {"params": ["head", "norm_out"]},
            2: {"freeze": ["*.weight"]},
            3: {"only": ["head", "layers.4"]},
        }
    )
    first, second, third, fourth = (phase.trains for phase in resolve_phases(phases, find_structure(Many())))
    assert first == {"layers.3.0.weight", "layers.3.0.bias"}
    assert first < second
    assert third == {name for name in second if name.endswith("bias")}
    assert fourth >= {"head.weight", "head.bias", "layers.4.1.bias"}
    assert not fourth & first


def test_a_role_does_not_thaw_what_the_user_froze_but_a_name_does(tmp_path: Path) -> None:
    for entry, thawed in [("blocks", False), ("model.model.layers", True)]:
        module = TinyModule("gqa_decoder")
        module.model.model.layers[0].requires_grad_(False)
        method = FinetuningSchedule({0: {"params": [entry]}})
        trainer(tmp_path, [method], max_epochs=1).fit(module, loader("gqa_decoder"))
        assert any(".layers.0." in name for name in method.history[0][1]) is thawed


# ---------------------------------------------------------------------------------------------------- transitions


def test_steps_count_from_the_start_of_each_phase_in_optimizer_steps(tmp_path: Path) -> None:
    schedule = {
        0: {"params": ["head"], "max_steps": 2},
        1: {"params": ["norms"], "max_steps": 3},
        2: {"params": ["blocks"], "max_steps": 4},
        3: {"params": ["embeddings"]},
    }
    method, *_ = fit(tmp_path, schedule, accumulate_grad_batches=3)  # 4 steps an epoch
    assert steps_of(method) == [0, 2, 5]
    assert method.draw_index == 2
    method, *_ = fit(tmp_path, schedule, accumulate_grad_batches=1)
    assert steps_of(method) == [0, 2, 5, 9]


def test_epochs_and_the_earliest_of_several_ends(tmp_path: Path) -> None:
    schedule = {
        0: {"params": ["head"], "max_transition_epoch": 1, "max_steps": 9},
        1: {"params": ["norms"], "max_transition_epoch": 3, "max_steps": 2},
        2: {"params": ["blocks"], "max_transition_epoch": 2},
        3: {"params": ["embeddings"], "max_transition_epoch": 2},  # over before it starts: lasts one epoch
        4: {"params": ["all"]},
    }
    method, *_ = fit(tmp_path, schedule, max_epochs=4)  # 6 steps an epoch
    assert steps_of(method) == [0, 6, 8, 12, 18]


def test_a_first_phase_that_is_over_at_once_is_left_out(tmp_path: Path) -> None:
    method, *_ = fit(
        tmp_path, {0: {"params": ["head"], "max_transition_epoch": 0}, 1: {"params": ["norms"]}}, max_epochs=1
    )
    assert method.draw_index == 1
    assert len(method.history) == 1
    assert any(name.endswith("norm.weight") for name in method.trainable_names)


@pytest.mark.parametrize(
    ("settings", "losses", "expected"),
    [
        ({"patience": 1}, (3.0, 2.0, 2.0, 1.0, 1.5, 1.4), [0, 18, 30]),
        ({"patience": 2}, (3.0, 2.0, 2.0, 2.5, 1.5, 1.6, 1.7), [0, 24, 42]),
        ({"patience": 1, "min_delta": 0.5}, (3.0, 2.6, 1.0, 0.9), [0, 12, 24]),
        ({"patience": 1, "mode": "max"}, (1.0, 2.0, 1.5, 2.5, 2.0), [0, 18, 30]),
        ({"patience": 1}, (1.0, float("nan"), 0.5, 0.7), [0, 12, 24]),
    ],
)
@pytest.mark.parametrize("monitor", ["val_loss", "train_loss"])
def test_plateaus(settings: Any, losses: tuple[float, ...], expected: list[int], monitor: str, tmp_path: Path) -> None:
    schedule = {0: {"params": ["head"]}, 1: {"params": ["norms"]}, 2: {"params": ["blocks"]}}
    method = FinetuningSchedule(schedule, monitor, **settings)
    fit(tmp_path, method, losses=losses, val=monitor == "val_loss", max_epochs=8)
    assert steps_of(method) == expected


def test_plateaus_of_several_validations_in_an_epoch_switch_at_optimizer_steps(tmp_path: Path) -> None:
    schedule = {
        0: {"params": ["head"], "patience": 2},
        1: {"params": ["norms"], "patience": 1},
        2: {"params": ["blocks"]},
    }
    method, *_ = fit(tmp_path, schedule, val_check_interval=3, max_epochs=1)
    # Looks after batches 3 (improves), 6, 9 (stalled): the window of batches 9 and 10 ends at step 5.
    assert steps_of(method) == [0, 5]


def test_the_last_phase_stops_the_training_at_its_own_plateau_only(tmp_path: Path) -> None:
    _, _, run = fit(tmp_path, FinetuningSchedule({0: {"params": ["head"]}}, "val_loss", patience=1), max_epochs=5)
    assert run.current_epoch == 5
    _, _, run = fit(tmp_path, {0: {"params": ["head"], "monitor": "val_loss", "patience": 2}}, max_epochs=5)
    assert run.current_epoch == 3


BASE_PLATEAU: dict[int, Any] = {0: {"params": ["head"]}, 1: {"params": ["blocks"]}}


class ByStep(Logged):
    """Logs a training metric as ``self.log`` does by default, and one by step and epoch."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = TinyModule.training_step(self, batch, batch_idx)
        value = self.losses[min(self.global_step, len(self.losses) - 1)]
        self.log("loss", value if not self.trainer.fit_loop._should_accumulate() else 100.0)
        self.log("both", value, on_step=True, on_epoch=True)
        return loss


@pytest.mark.parametrize("monitor", ["loss", "both_step"])
def test_a_metric_logged_by_step_is_looked_at_after_every_optimizer_step(monitor: str, tmp_path: Path) -> None:
    """At steps 0 and 1 it improves, at 2 and 3 it does not; then at 4 and 5; saved and resumed in between."""
    phases = {0: {"params": ["head"]}, 1: {"params": ["norms"]}, 2: {"params": ["blocks"]}}

    def once(*callbacks: pl.Callback, ckpt: Path | None = None) -> Any:
        method, module = FinetuningSchedule(phases, monitor, patience=2), ByStep("gqa_decoder")
        module.losses = (3.0, 2.0, 2.5, 2.0, 2.1, 2.2, 1.0)
        run = trainer(tmp_path, [method, *callbacks], limit_val_batches=0, max_epochs=2)
        run.fit(module, loader("gqa_decoder"), loader("gqa_decoder", shuffle=False), ckpt_path=ckpt)
        return steps_of(method), weights(module)

    saver = SaveEveryBatch(tmp_path)
    steps, after = once(saver)
    assert steps == [0, 4, 6]
    for path in saver.paths[:12:2]:
        again, resumed = once(ckpt=path)
        assert again == steps
        assert_same_weights(resumed, after)


def test_a_metric_logged_by_step_and_epoch_is_looked_at_by_epoch(tmp_path: Path) -> None:
    method, module = FinetuningSchedule(BASE_PLATEAU, "both", patience=1), ByStep("gqa_decoder")
    run = trainer(tmp_path, [method], limit_val_batches=0, max_epochs=4)
    run.fit(module, loader("gqa_decoder"), loader("gqa_decoder", shuffle=False))
    assert steps_of(method) == [0, 12]


def test_no_validation_loop_is_needed(tmp_path: Path) -> None:
    method, *_ = fit(tmp_path, BASE, val=False)
    assert steps_of(method) == [0, 2]


def test_a_metric_that_is_never_logged_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"plateau of 'val_los', which is not logged. Did you mean 'val_loss'"):
        fit(tmp_path, {0: {"params": ["head"], "monitor": "val_los"}, 1: {"params": ["blocks"]}}, max_epochs=4)
    with pytest.raises(
        ConfigError, match=r"'val_loss', which is not logged.*Or end the phase with max_transition_epoch"
    ):
        fit(tmp_path, {0: {"params": ["head"]}, 1: {"params": ["blocks"]}}, val=False, max_epochs=4)


# ---------------------------------------------------------------------------------------------------- rates


class Rates(pl.Callback):
    def __init__(self) -> None:
        self.steps: list[dict[str, tuple[float, float]]] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        names = {id(p): name for name, p in pl_module.named_parameters()}
        self.steps.append(
            {
                names[id(p)]: (group["lr"], group["weight_decay"])
                for group in optimizer.param_groups
                for p in group["params"]
                if p.requires_grad
            }
        )


def test_rates_and_options_by_phase(tmp_path: Path) -> None:
    schedule = {
        0: {"params": ["head"], "lr": 0.5, "max_steps": 2},
        1: {"params": ["norms"], "optimizer_options": {"weight_decay": 0.25}, "max_steps": 2},
        2: {"params": ["*.3.*"], "lr": 0.125, "max_steps": 2},
        3: {"params": ["head"], "lr": 0.25, "max_steps": 2, "optimizer_options": {"weight_decay": 0.0}},
        4: {"freeze": ["head"]},
    }
    rates = Rates()
    fit(tmp_path, FinetuningSchedule(schedule, base_max_lr=0.01), rates)
    head, norm, block = "model.lm_head.weight", "model.model.norm.weight", "model.model.layers.3.mlp.up_proj.weight"

    def decayed(start: float, first: int) -> list[float]:
        """The module's schedule is 1 / (1 + step / 10): the first phase joins it, others start at their rates."""
        factors = [1 / (1 + 0.1 * step) for step in range(12)]
        return [start if first and step == first else start * factors[step] for step in range(first, 12)]

    def column(name: str, item: int) -> dict[int, float]:
        return {step: rates.steps[step][name][item] for step in range(12) if name in rates.steps[step]}

    assert column(norm, 0) == pytest.approx(dict(enumerate(decayed(0.01, 2), 2)))
    assert column(block, 0) == pytest.approx(dict(enumerate(decayed(0.125, 4), 4)))
    expected = dict(enumerate(decayed(0.5, 0)[:6])) | dict(enumerate(decayed(0.25, 6)[:2], 6))
    assert column(head, 0) == pytest.approx(expected)
    assert set(column(norm, 1).values()) == {0.25}
    assert set(column(block, 1).values()) == {0.1}
    assert column(head, 1) == {**dict.fromkeys(range(6), 0.1), 6: 0.0, 7: 0.0}


def test_without_base_max_lr_the_users_rates_hold(tmp_path: Path) -> None:
    rates = Rates()
    fit(tmp_path, FinetuningSchedule(BASE, base_max_lr=None), rates)
    for step, found in enumerate(rates.steps):
        assert [lr for lr, _ in found.values()] == pytest.approx([1e-2 / (1 + 0.1 * step)] * len(found))


def test_groups_are_cut_once_and_no_group_is_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []

    class Count(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            counts.append([len(group["params"]) for group in trainer.optimizers[0].param_groups])

    def fail(*_: Any) -> None:
        raise AssertionError("a group was added during training")

    class Forbid(pl.Callback):
        def on_train_start(self, *_: Any) -> None:
            monkeypatch.setattr(torch.optim.Optimizer, "add_param_group", fail)

    schedule = {
        0: {"params": ["head"], "max_steps": 1},
        1: {"params": ["norms"], "max_steps": 1},
        2: {"params": ["all"]},
    }
    fit(tmp_path, schedule, Forbid(), Count())
    assert len(set(map(tuple, counts))) == 1
    assert len(counts[0]) == 3


def test_learning_rate_monitor_goes_along(tmp_path: Path) -> None:
    fit(tmp_path, BASE, LearningRateMonitor("step"), logger=CSVLogger(tmp_path), log_every_n_steps=1)
    header = next(tmp_path.rglob("metrics.csv")).read_text().splitlines()[0]
    assert "lr-AdamW/pg1" in header
    assert "lr-AdamW/pg2" in header


def test_several_optimizers_keep_their_schedulers_but_cannot_be_replaced(tmp_path: Path) -> None:
    class Two(Logged):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:  # pyright: ignore
            loss = self.loss(batch)
            for optimizer in self.optimizers():  # pyright: ignore
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():  # pyright: ignore
                optimizer.step()

        def configure_optimizers(self) -> Any:
            named = dict(self.named_parameters())
            head = [p for name, p in named.items() if "lm_head" in name]
            rest = [p for name, p in named.items() if "lm_head" not in name]
            return [torch.optim.SGD(head, lr=0.5), torch.optim.Adam(rest, lr=0.01)]

    arguments: dict[str, Any] = {"accumulate_grad_batches": 1, "gradient_clip_val": None, "max_epochs": 1}
    method = FinetuningSchedule({0: {"params": ["head"], "max_steps": 3}, 1: {"params": ["blocks"], "lr": 0.1}})
    run = trainer(tmp_path, [method], **arguments)
    run.fit(Two("gqa_decoder"), loader("gqa_decoder"))
    assert steps_of(method) == [0, 6]  # three steps of the head's optimizer; Lightning counts those of both
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in run.optimizers]
    assert rates == [[0.5], [0.1, 0.01]]
    replacing = {0: {"params": ["head"], "new_optimizer": {"optimizer_init": {"class_path": "torch.optim.SGD"}}}}
    with pytest.raises(ConfigError, match=r"phase 0 replaces the optimizer.*2 optimizers"):
        trainer(tmp_path, [FinetuningSchedule(replacing)], **arguments).fit(Two("gqa_decoder"), loader("gqa_decoder"))


# ---------------------------------------------------------------------------------------------------- promises


class SaveEveryBatch(pl.Callback):
    def __init__(self, directory: Path) -> None:
        self.directory, self.paths = directory, []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.paths.append(self.directory / f"{len(self.paths):03d}.ckpt")
        trainer.save_checkpoint(self.paths[-1])

    def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.on_train_batch_end(trainer)


PLATEAUS = {
    0: {"params": ["head"], "monitor": "val_loss", "patience": 1, "min_delta": 10.0, "lr": 0.02},
    1: {"params": ["*.3.*"], "monitor": "val_loss", "patience": 2, "min_delta": 10.0, "lr": 0.03},
    2: {"params": ["blocks", "norms"], "freeze": ["head"], "lr": 0.01},
}


@pytest.mark.parametrize("val_check_interval", [1.0, 3])
def test_resume_from_every_moment_with_plateau_counters(val_check_interval: float, tmp_path: Path) -> None:
    """Also from the end of the batch that a validation follows, which Lightning leaves out on resume."""

    def once(ckpt: Path | None, *callbacks: pl.Callback) -> tuple[Any, ...]:
        torch.manual_seed(5 if ckpt is None else 77)
        method, module = FinetuningSchedule(PLATEAUS), TinyModule("conv_net")
        run = trainer(
            tmp_path,
            [method, *callbacks],
            max_epochs=5,
            limit_train_batches=5,
            limit_val_batches=1,
            val_check_interval=val_check_interval,
        )
        run.fit(module, loader("conv_net"), loader("conv_net", shuffle=False), ckpt_path=ckpt)
        lrs = [group["lr"] for group in run.optimizers[0].param_groups]
        return weights(module), method.history, lrs, method.method_state()["best"]

    saver = SaveEveryBatch(tmp_path)
    expected = once(None, saver)
    assert len(expected[1]) == 3
    assert len(saver.paths) == 30
    for path in saver.paths:
        found = once(path)
        assert_same_weights(found[0], expected[0])
        assert found[1:] == expected[1:], path.name


@pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:Checkpoint directory")
def test_resume_on_the_command_line(tmp_path: Path) -> None:
    """``--ckpt_path`` in the middle of a schedule that replaces the scheduler, from the middle of an epoch too."""
    step = {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 1, "gamma": 0.5}}
    schedule = {
        0: {"params": ["head"], "max_steps": 2, "lr": 0.02},
        1: {
            "params": ["*.3.*"],
            "lr": 0.03,
            "max_transition_epoch": 1,
            "new_lr_scheduler": {"lr_scheduler_init": step},
        },
        2: {"params": ["blocks"], "freeze": ["head"], "lr": 0.01},
    }
    (tmp_path / "schedule.yaml").write_text(yaml.safe_dump(schedule))

    def run(name: str, *args: str) -> dict[str, Any]:
        saving = {"dirpath": str(tmp_path / name), "every_n_train_steps": 1, "save_top_k": -1, "filename": "{step}"}
        callbacks = [
            {"class_path": "FinetuningSchedule", "init_args": {"schedule": str(tmp_path / "schedule.yaml")}},
            {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": saving},
        ]
        config = {
            "model": {"class_path": "tests.contract.harness.TinyModule", "init_args": {"model": "gqa_decoder"}},
            "data": {"class_path": "tests.methods.tiny_data.TinyData"},
            "trainer": {
                "accelerator": "cpu",
                "max_epochs": 3,
                "logger": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "accumulate_grad_batches": 2,
                "callbacks": callbacks,
            },
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        assert main(["fit", "--config", str(path), *args]) == 0
        return torch.load(tmp_path / name / "step=18.ckpt", weights_only=True)

    expected = run("whole")
    for step_done in (1, 2, 4, 6, 7, 11, 12):
        found = run(f"from{step_done}", f"--ckpt_path={tmp_path / 'whole' / f'step={step_done}.ckpt'}")
        assert_same_weights(found["state_dict"], expected["state_dict"])
        rates = [[group["lr"] for group in each["optimizer_states"][0]["param_groups"]] for each in (found, expected)]
        assert rates[0] == rates[1]


def test_a_checkpoint_of_another_schedule_or_of_none_is_refused(tmp_path: Path) -> None:
    saver = SaveEveryBatch(tmp_path)
    fit(tmp_path, BASE, saver, max_epochs=1)
    plain = SaveEveryBatch(tmp_path / "plain")
    run = trainer(tmp_path, [plain], max_epochs=1)
    run.fit(TinyModule("gqa_decoder"), loader("gqa_decoder"))
    changed = copy.deepcopy(BASE)
    changed[0]["max_steps"] = 3
    for path, schedule, message in [
        (saver.paths[-1], changed, r"phase 0: .*'max_steps': 2.* -> .*'max_steps': 3"),
        (plain.paths[-1], BASE, r"written without FinetuningSchedule\(2 phases\)"),
    ]:
        with pytest.raises(ResumeMismatch, match=message):
            trainer(tmp_path, [FinetuningSchedule(schedule)]).fit(
                TinyModule("gqa_decoder"), loader("gqa_decoder"), ckpt_path=path
            )


def test_second_fit_follows_the_schedule_and_test_leaves_flags_alone(tmp_path: Path) -> None:
    method = FinetuningSchedule(PLATEAUS)
    histories = []
    for _ in range(2):
        module = TinyModule("gqa_decoder")
        flags = {name: p.requires_grad for name, p in module.named_parameters()}
        run = trainer(tmp_path, [method], max_epochs=5)
        run.fit(module, loader("gqa_decoder"), loader("gqa_decoder", shuffle=False))
        histories.append(method.history)
        run.test(module, loader("gqa_decoder", shuffle=False), verbose=False)
        assert {name: p.requires_grad for name, p in module.named_parameters()} == flags
    assert [len(history) for history in histories] == [3, 3]
    assert [step for step, _ in histories[0]] == [step for step, _ in histories[1]]


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_the_users_callbacks_are_their_own(tmp_path: Path) -> None:
    stopping = EarlyStopping("val_loss", patience=3, check_on_train_epoch_end=True)
    saving = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=4, save_top_k=-1, monitor=None)
    second = ModelCheckpoint(tmp_path / "more", monitor="val_loss")
    _, _, run = fit(tmp_path, BASE, stopping, saving, second, enable_checkpointing=True, max_epochs=9)
    assert {stopping, saving, second} <= set(run.callbacks)
    assert run.current_epoch == 4  # one best look, three without improvement
    assert len(list((tmp_path / "ckpt").iterdir())) == 6  # 24 steps
    assert Path(second.best_model_path).is_file()
    assert not any(path.suffix == ".yaml" for path in tmp_path.rglob("*"))


def test_nothing_global_is_patched(tmp_path: Path) -> None:
    def snapshot() -> dict[str, dict[str, Any]]:
        classes = [Strategy, pl.Trainer, pl.LightningModule, torch.optim.Optimizer, torch.optim.AdamW,
                   torch.optim.lr_scheduler.LRScheduler, ModelCheckpoint, EarlyStopping]  # fmt: skip
        return {str(kind): dict(vars(kind)) for kind in classes}

    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])  # torch wraps `step` of a class once, at the first object
    before = snapshot()
    fit(tmp_path, PLATEAUS, max_epochs=3)
    assert snapshot() == before


def test_frozen_batch_norm_statistics_are_constant(tmp_path: Path) -> None:
    module = TinyModule("conv_net")
    before = weights(module)
    schedule = {
        0: {"params": ["model.blocks.3"], "max_steps": 4},
        1: {"params": ["model.blocks.2"], "freeze": ["model.blocks.3"]},
    }
    trainer(tmp_path, [FinetuningSchedule(schedule)]).fit(module, loader("conv_net"))
    moved = {name for name, value in weights(module).items() if not torch.equal(value, before[name])}
    assert {name.split(".")[2] for name in moved if "running" in name} == {"2", "3"}
    assert {name.split(".")[2] for name in moved} == {"2", "3"}


# ---------------------------------------------------------------------------------------------------- drafts


def test_pairs_are_the_peers_implicit_schedule(tmp_path: Path) -> None:
    peer = pytest.importorskip("finetuning_scheduler")
    from finetuning_scheduler.fts_supporters import ScheduleImplMixin

    assert peer is not None
    for model in ("tied_decoder", "gqa_decoder", "conv_net"):
        module = TinyModule(model)
        path = ScheduleImplMixin._gen_ft_schedule_impl(module, tmp_path)
        assert yaml.safe_load(draft_schedule(module, "pairs")) == yaml.safe_load(Path(str(path)).read_text())


@pytest.mark.parametrize("model", ["tied_decoder", "gqa_decoder", "conv_net"])
@pytest.mark.parametrize("form", ["blocks", "pairs"])
def test_a_draft_thaws_everything_from_the_head_down(form: Any, model: str, tmp_path: Path) -> None:
    module = TinyModule(model)
    path = tmp_path / "draft.yaml"
    path.write_text(draft_schedule(module, form))
    phases = resolve_phases(FinetuningSchedule(str(path)).phases, find_structure(module))
    assert phases[-1].trains == {name for name, _ in module.named_parameters()}
    listed = [name for phase in phases for name in phase.listed]
    assert len(listed) == len(set(listed))
    if form == "blocks":
        order = [next((n for n in name.split(".") if n.isdigit()), "") for phase in phases for name in phase.listed[:1]]
        assert [number for number in order if number] == ["3", "2", "1", "0"]
        assert any("head" in name or "wte" in name for name in phases[0].listed)


def test_a_draft_of_many_layers_has_no_entry_with_two_meanings() -> None:
    model = Many()
    phases = resolve_phases(parse_schedule(yaml.safe_load(draft_schedule(model))), find_structure(model))
    assert phases[-1].trains == {name for name, _ in model.named_parameters()}
    assert [len(phase.listed) for phase in phases[1:13]] == [4] * 12


TINY = (
    "{model_type: llama, hidden_size: 8, intermediate_size: 16, num_hidden_layers: 2, num_attention_heads: 2, "
    "vocab_size: 32}"
)


def test_generate_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "schedule.yaml"
    overlays = [
        f"--config={Path(__file__).parents[2] / 'configs' / name}.yaml" for name in ("models/causal_lm", "methods/lisa")
    ]
    model = ["--model.model_name_or_path=null", f"--model.config={TINY}"]
    assert main(["schedule", "--generate", *overlays, *model, f"--output={output}"]) == 0
    assert len(FinetuningSchedule(str(output)).phases) == 4
    assert main(["schedule", "--generate", "--model=CausalLM", f"--model.config={TINY}", "--form=pairs"]) == 0
    assert len(yaml.safe_load(capsys.readouterr().out)) == 11
    for args, message in [
        (["--generate", *overlays, *model, f"--output={output}"], "exists already"),
        (["--model=CausalLM", f"--model.config={TINY}"], "needs --generate"),
        (["--generate", "--model=CausalLM", "--form=pars"], "Did you mean 'pairs'"),
        (["--generate"], "--model must be given"),
    ]:
        assert main(["schedule", *args]) in (1, 2)
        assert message in capsys.readouterr().err
    assert main(["schedule"]) == 2
    assert main(["schedule", "--help"]) == 0
    with pytest.raises(LightningPeftError, match="Did you mean 'pairs'"):
        draft_schedule(Many(), "pair")  # pyright: ignore


@pytest.mark.parametrize("mode", ["loss", "accuracy"])
def test_a_draft_for_a_model_with_a_main_metric_runs_as_it_is(mode: str, tmp_path: Path) -> None:
    """A phase waits for the metric that the model logs; a value that never improves ends it after three more looks."""

    class Measured(TinyModule):
        main_metric = mode

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log(f"val/{mode}", 1.0)

    path = tmp_path / "schedule.yaml"
    path.write_text(draft_schedule(Measured("gqa_decoder")))
    method = FinetuningSchedule(str(path))
    plateaus = [phase.plateau for phase in method.phases[:-1]]
    assert {(p.monitor, p.mode) for p in plateaus if p} == {(f"val/{mode}", "min" if mode == "loss" else "max")}
    assert method.phases[-1].plateau is None
    run = trainer(tmp_path, [method], max_epochs=6)
    run.fit(Measured("gqa_decoder"), loader("gqa_decoder"), loader("gqa_decoder", shuffle=False))
    assert steps_of(method) == [0, 24]


def test_example_learns_the_digits_phase_by_phase(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    out = run_example("schedule.py", cwd=tmp_path)
    assert re.findall(r"phase (\d) from step \d+: \d+ tensors in (.*)", out) == [
        ("0", "head"),
        ("1", "blocks, head"),
        ("2", "blocks, stem"),
    ]
    assert float(re.findall(r"val accuracy: ([\d.]+)", out)[0]) > 0.93


def test_a_generated_schedule_is_edited_and_fitted_on_the_command_line(tmp_path: Path) -> None:
    path, model = tmp_path / "schedule.yaml", ["--model=tests.contract.harness.TinyModule", "--model.model=gqa_decoder"]
    assert main(["schedule", "--generate", *model, f"--output={path}"]) == 0
    phases = yaml.safe_load(path.read_text())
    assert len(phases) == 6  # head, four blocks, embeddings
    for number in range(5):
        phases[number]["max_steps"] = 1
    phases[3]["freeze"] = ["head"]
    path.write_text(yaml.safe_dump(phases))
    callbacks = [
        {"class_path": "FinetuningSchedule", "init_args": {"schedule": str(path)}},
        {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {"dirpath": str(tmp_path / "new"), "filename": "end"},
        },
    ]
    config = tmp_path / "config.yaml"
    trainer_values = {"accelerator": "cpu", "max_steps": 8, "logger": False, "enable_progress_bar": False}
    config.write_text(yaml.safe_dump({"trainer": {**trainer_values, "callbacks": callbacks}}))
    assert main(["fit", f"--config={config}", *model, "--data=tests.methods.tiny_data.TinyData"]) == 0
    saved = torch.load(tmp_path / "new" / "end.ckpt", weights_only=True)
    (state,) = (value for key, value in saved["callbacks"].items() if "FinetuningSchedule" in key)
    assert state["draw_index"] == 5
    assert [step for step, _ in state["ledger"]["rows"]] == [0, 1, 2, 3, 4, 5]
