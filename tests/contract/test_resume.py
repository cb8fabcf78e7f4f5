"""Kill at any moment, resume with ``fit(ckpt_path=...)``: weights, optimizer state and draws are as without it.

Checkpoints are written after every micro-batch, so at optimizer steps, in the middle of accumulation windows, in the
middle and at the end of epochs. The models have dropout.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint

from lightning_peft import HFT, LISA
from lightning_peft.errors import ResumeMismatch
from lightning_peft.methods.base import MethodCallback
from tests.contract.harness import MODELS, ROWS, TinyModule, assert_same_weights, loader, trainer, weights


class SaveEveryBatch(pl.Callback):
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.paths: list[Path] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        path = self.directory / f"{len(self.paths):03d}.ckpt"
        trainer.save_checkpoint(path)
        self.paths.append(path)


def fit(
    tmp_path: Path,
    model: str,
    methods: list[MethodCallback],
    *callbacks: pl.Callback,
    ckpt: Path | None = None,
    **kw: Any,
) -> tuple[dict[str, torch.Tensor], list[Any], dict[int, Any]]:
    torch.manual_seed(5 if ckpt is None else 77)  # a new process starts with any random state
    module = TinyModule(model)
    run = trainer(tmp_path, [*methods, *callbacks], **kw)
    run.fit(module, loader(model), loader(model, shuffle=False), ckpt_path=ckpt)
    state = run.optimizers[0].state_dict()["state"]
    return weights(module), [method.history for method in methods], state


def assert_same_state(left: dict[int, Any], right: dict[int, Any]) -> None:
    assert left.keys() == right.keys()
    for index in left:
        assert left[index].keys() == right[index].keys()
        for key, value in left[index].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(right[index][key])), (index, key)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("row", ROWS)
def test_resume_from_every_micro_batch(row: str, model: str, tmp_path: Path) -> None:
    saver = SaveEveryBatch(tmp_path)
    expected = fit(tmp_path, model, ROWS[row].make(), saver)
    assert len(saver.paths) == 22
    # All positions for one model, every third for the others.
    for path in saver.paths if model == "gqa_decoder" else saver.paths[1::3]:
        result = fit(tmp_path, model, ROWS[row].make(), ckpt=path)
        assert_same_weights(result[0], expected[0])
        assert result[1] == expected[1]
        assert_same_state(result[2], expected[2])


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("row", ["lisa", "lisa_offload", "hft_redraw"])
def test_resume_from_model_checkpoint_with_validation_inside_epochs(row: str, tmp_path: Path) -> None:
    """The user's own ModelCheckpoint, written while validation interrupts an accumulation window, and ``max_steps``."""
    arguments: dict[str, Any] = {
        "enable_checkpointing": True,
        "max_epochs": -1,
        "max_steps": 14,
        "val_check_interval": 3,
    }

    def checkpoint(directory: str) -> ModelCheckpoint:
        return ModelCheckpoint(
            tmp_path / directory,
            "{step}-{val_loss:.6f}",
            monitor="val_loss",
            save_top_k=-1,
            save_on_train_epoch_end=False,
        )

    expected = fit(tmp_path, "tied_decoder", ROWS[row].make(), checkpoint("a"), **arguments)
    paths = sorted((tmp_path / "a").glob("*.ckpt"))
    assert len(paths) >= 5
    for path in paths:
        result = fit(tmp_path, "tied_decoder", ROWS[row].make(), checkpoint(path.stem), ckpt=path, **arguments)
        assert_same_weights(result[0], expected[0])
        assert result[1] == expected[1]
        assert_same_state(result[2], expected[2])


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("row", ["lisa", "hft_redraw"])
@pytest.mark.parametrize("steps", [4, 6, 8])
def test_a_run_that_max_steps_ended_goes_on_with_more(row: str, steps: int, tmp_path: Path) -> None:
    """Ended inside an epoch, at its end (6 steps each) and inside the next, with the user's ModelCheckpoint."""
    arguments: dict[str, Any] = {"max_epochs": -1, "enable_checkpointing": True, "limit_val_batches": 0}
    expected = fit(tmp_path / "a", "tied_decoder", ROWS[row].make(), max_steps=15, **arguments)
    keep = ModelCheckpoint(tmp_path / "kept")
    fit(tmp_path / "b", "tied_decoder", ROWS[row].make(), keep, max_steps=steps, **arguments)
    path = Path(keep.best_model_path)
    result = fit(tmp_path / "c", "tied_decoder", ROWS[row].make(), ckpt=path, max_steps=15, **arguments)
    assert_same_weights(result[0], expected[0])
    assert result[1] == expected[1]


class PowerCut(pl.Callback):
    """Fails in the forward pass of one micro-batch."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.fit_loop.total_batch_idx + 1 == self.batch:
            raise RuntimeError("power cut")


@pytest.mark.filterwarnings("ignore:.*was called without a model", "ignore:.*no last checkpoint available")
@pytest.mark.parametrize("batch", [2, 5, 12, 16])
@pytest.mark.parametrize("row", ["lisa", "lisa_offload", "hft_redraw"])
def test_resume_from_what_is_saved_on_an_exception(row: str, batch: int, tmp_path: Path) -> None:
    """Whatever the order of the callbacks; also from the middle of an accumulation window."""
    expected = fit(tmp_path, "tied_decoder", ROWS[row].make())
    keep = OnExceptionCheckpoint(tmp_path, "cut")
    with pytest.raises(RuntimeError, match="power cut"):
        fit(tmp_path, "tied_decoder", ROWS[row].make(), PowerCut(batch), keep, enable_checkpointing=True)
    result = fit(tmp_path, "tied_decoder", ROWS[row].make(), ckpt=tmp_path / "cut.ckpt")
    assert_same_weights(result[0], expected[0])
    assert result[1] == expected[1]


@pytest.mark.parametrize("row", ["lisa", "lisa_offload"])
def test_resume_from_what_the_user_saves_after_the_fit(row: str, tmp_path: Path) -> None:
    expected = fit(tmp_path, "tied_decoder", ROWS[row].make(), max_epochs=3)
    torch.manual_seed(5)
    module = TinyModule("tied_decoder")
    run = trainer(tmp_path, ROWS[row].make(), max_epochs=2)
    run.fit(module, loader("tied_decoder"), loader("tied_decoder", shuffle=False))
    run.save_checkpoint(tmp_path / "after.ckpt")
    result = fit(tmp_path, "tied_decoder", ROWS[row].make(), ckpt=tmp_path / "after.ckpt", max_epochs=3)
    assert_same_weights(result[0], expected[0])
    assert result[1] == expected[1]


def test_a_checkpoint_without_its_clock_is_refused(tmp_path: Path) -> None:
    saver = SaveEveryBatch(tmp_path)
    fit(tmp_path, "gqa_decoder", ROWS["lisa"].make(), saver, max_epochs=1)
    checkpoint = torch.load(saver.paths[-1], weights_only=True)
    del checkpoint["lightning_peft"]
    torch.save(checkpoint, tmp_path / "torn.ckpt")
    with pytest.raises(ResumeMismatch, match="not the clock"):
        fit(tmp_path, "gqa_decoder", ROWS["lisa"].make(), ckpt=tmp_path / "torn.ckpt")


def test_checkpoint_loads_without_pickled_code(tmp_path: Path) -> None:
    saver = SaveEveryBatch(tmp_path)
    fit(tmp_path, "gqa_decoder", ROWS["lisa_offload"].make(), saver)
    checkpoint = torch.load(saver.paths[-1], weights_only=True)
    assert checkpoint["lightning_peft"]["clock"] == [12]
    assert checkpoint["lightning_peft"]["offloaded"]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_resume_under_changed_settings_is_refused(tmp_path: Path) -> None:
    saver = SaveEveryBatch(tmp_path)
    fit(tmp_path, "gqa_decoder", [LISA(2, period_steps=3)], saver, max_epochs=1)
    for changed, message in [
        ([LISA(1, period_steps=3, seed=4)], r"num_layers: 2 -> 1; .*seed: 0 -> 4"),
        ([HFT()], r"written with LISA.*this run has HFT"),
        ([LISA(2, period_steps=3, scope="model.model.layers")], "written with LISA"),
    ]:
        with pytest.raises(ResumeMismatch, match=message):
            fit(tmp_path, "gqa_decoder", changed, ckpt=saver.paths[2])


def test_method_may_join_a_run_that_had_none(tmp_path: Path) -> None:
    saver = SaveEveryBatch(tmp_path)
    fit(tmp_path, "gqa_decoder", [], saver, max_epochs=1)
    method = LISA(2, period_steps=3)
    fit(tmp_path, "gqa_decoder", [method], ckpt=saver.paths[-1])
    assert [step for step, _ in method.history] == [6, 9]
