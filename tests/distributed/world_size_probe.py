"""Run by ``test_world_size.py``, on two processes, on one, and on two again: the same run goes on.

Arguments: the output folder and the stage, ``start``, ``middle`` or ``end``.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_peft.methods.base import MethodCallback
from tests.contract.harness import ROWS, trainer
from tests.distributed.ddp_probe import MODEL, Quiet, loader
from tests.distributed.fsdp_probe import WholeWeights, make_strategy

ROW_NAMES = ("lisa", "lisa_keep", "hft_redraw", "schedule")
FORMS = ("ddp", "fsdp1/full", "fsdp2/full", "fsdp2/sharded")
LEAVES_OFF = {"start": 4, "middle": 8}
"""Optimizer steps after which the first and the second part of a run save and end; the third goes on to 12."""


def strategy_of(form: str, world_size: int) -> Any:
    name, _, saving = form.partition("/")
    if name == "ddp" or (world_size == 1 and saving == "full"):
        return "ddp" if world_size > 1 else "auto"  # a full checkpoint goes to one device as it is
    return make_strategy(name, saving == "full", world_size)


class SaveAt(pl.Callback):
    def __init__(self, step: int | None, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def fit(out: Path, form: str, make: Callable[[], list[MethodCallback]], stage: str, world_size: int) -> dict[str, Any]:
    row = out.name
    paths = {name: out / f"{form.replace('/', '_')}_{name}.ckpt" for name in LEAVES_OFF}
    resumed = {"middle": paths["start"], "end": paths["middle"]}.get(stage)
    methods, whole = make(), WholeWeights()
    torch.manual_seed(100 if resumed is None else 7)
    run = trainer(
        out,
        [*methods, whole, SaveAt(LEAVES_OFF.get(stage), paths.get(stage, out))],
        limit_val_batches=0,
        use_distributed_sampler=False,
        devices=world_size,
        strategy=strategy_of(form, world_size),
        gradient_clip_val=None,
        accumulate_grad_batches=1,
        max_steps=LEAVES_OFF["middle"] if stage == "middle" else -1,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.fit(Quiet(MODEL), loader(world_size), ckpt_path=resumed)
    return {
        "row": row,
        "histories": [[(step, sorted(names)) for step, names in m.history] for m in methods],
        "states": sorted(
            len(state) for optimizer in run.optimizers for state in optimizer.state.values() if isinstance(state, dict)
        ),
        "weights": whole.values,
        "steps": run.global_step,
    }


def main(out: Path, stage: str) -> None:
    world_size = int(os.environ["WORLD_SIZE"])
    results = {}
    for row in ROW_NAMES:
        (out / row).mkdir(exist_ok=True)
        for form in FORMS:
            results[f"{row}/{form}"] = fit(out / row, form, ROWS[row].make, stage, world_size)
    torch.save(results, out / f"{stage}{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
