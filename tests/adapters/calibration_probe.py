"""Run by ``test_calibration.py`` on two processes: starts from data under DDP and FSDP2, and resumes without data."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_peft import EVA, FSDP2Strategy, ResumableDataLoader
from lightning_peft.adapters import calibration
from lightning_peft.errors import LightningPeftError
from tests.adapters import test_calibration as cases
from tests.contract.harness import TinyModule
from tests.distributed.launch import share_meshes


class WholeState(pl.Callback):
    """The whole state dict when training starts and when it ends, and a checkpoint after the second batch."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.start: dict[str, Tensor] = {}
        self.end: dict[str, Tensor] = {}

    def whole(self, module: pl.LightningModule) -> dict[str, Tensor]:
        for block in module.modules():
            if hasattr(block, "reshard"):
                block.reshard()  # type: ignore[operator]
        return {
            name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()  # type: ignore[operator]
            for name, value in torch.nn.Module.state_dict(module).items()
        }

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.start = self.whole(pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.fit_loop.batch_idx == 1:
            trainer.save_checkpoint(self.path)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.end = self.whole(pl_module)


def run(out: Path, name: str, strategy: Any, ckpt: Path | None = None, module: Any = None) -> WholeState:
    watch = WholeState(out / f"{name}.ckpt")
    loader = ResumableDataLoader(cases.data(24), batch_size=4)
    options: dict[str, Any] = {"devices": 2, "strategy": strategy, "gradient_clip_val": None}
    options["use_distributed_sampler"] = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases.fit(out, cases.STARTS[name](), watch, module=module, loader=loader, ckpt=ckpt, **options)
    return watch


def main(out: Path) -> None:
    share_meshes()
    results: dict[str, Any] = {}
    calibrate = calibration.FromBatches.put_in
    for name in cases.STARTS:
        calibration.FromBatches.put_in = calibrate
        results[f"{name}/ddp"] = run(out / "ddp", name, "ddp").start
        watch = run(out / "fsdp2", name, FSDP2Strategy())
        results[f"{name}/fsdp2"], results[f"{name}/trained"] = watch.start, watch.end
        calibration.FromBatches.put_in = None  # type: ignore[assignment]
        results[f"{name}/resumed"] = run(out / "again", name, FSDP2Strategy(), watch.path).end
    calibration.FromBatches.put_in = calibrate
    with torch.device("meta"):
        module = TinyModule("gqa_decoder").to_empty(device="meta")
    try:
        cases.fit(out, EVA(2), module=module, devices=2, strategy=FSDP2Strategy())
        results["meta"] = "no error"
    except LightningPeftError as error:
        results["meta"] = str(error)
    torch.save(results, out / f"rank{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
