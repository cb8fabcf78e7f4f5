"""Run by ``test_paca.py`` on two processes: PaCA under DDP, its resume, and strategies that shard."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from lightning_peft import FSDP2Strategy, PaCA
from lightning_peft.errors import UnsupportedStrategy
from tests.contract.harness import trainer, weights
from tests.distributed.ddp_probe import MODEL, Gradients, Quiet, SaveEveryBatch, loader


def fit(out: Path, *callbacks: Any, ckpt: Path | None = None, **settings: Any) -> tuple[dict[str, Any], PaCA]:
    torch.manual_seed(100 if ckpt is None else 7)
    method, module = PaCA(3), Quiet(MODEL)
    run = trainer(out, [method, *callbacks], limit_val_batches=0, use_distributed_sampler=False, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.fit(module, loader(settings.get("devices", 1)), ckpt_path=ckpt)
    return weights(module), method


def main(out: Path) -> None:
    arguments: dict[str, Any] = {"devices": 2, "strategy": "ddp"}
    probe = Gradients()
    trained, method = fit(out, probe, SaveEveryBatch(out), **arguments)
    results: dict[str, Any] = {"weights": trained, "chosen": method.chosen, "reduced": probe.reduced}
    results["resumed"], _ = fit(out, ckpt=out / "004.ckpt", **arguments)
    try:
        fit(out, **{**arguments, "strategy": FSDP2Strategy()})
    except UnsupportedStrategy as error:
        results["refused"] = str(error)
    torch.save(results, out / f"rank{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
