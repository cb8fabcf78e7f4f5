"""Run by ``test_cofitune_ddp.py`` on two processes: importance from data and dropout of each rank's own."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from lightning_peft import CoFiTune
from tests.contract.harness import TinyModule
from tests.distributed import ddp_probe
from tests.methods.test_cofitune import half, told


class QuietSGD(ddp_probe.Quiet):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def masked(out: Path, **kw: Any) -> dict[str, Any]:
    """Gradients under a mask that is given, after the reduction."""
    method = told(half(), modules=["ffn"], soft_mask="gradient")
    return ddp_probe.fit(out, [method], module=QuietSGD, accumulate_grad_batches=2, **kw)


def measured(out: Path, saver: Any = None, ckpt: Any = None) -> dict[str, Any]:
    method = CoFiTune(modules=["ffn", "attention"], num_batches=2)
    callbacks = [saver] if saver else []
    result = ddp_probe.fit(out, [method], *callbacks, module=TinyModule, ckpt=ckpt, devices=2, strategy="ddp")
    return {**result, "importance": method.importance}


def main(out: Path) -> None:
    results = {"masked": masked(out, devices=2, strategy="ddp")}
    saver = ddp_probe.SaveEveryBatch(out / "checkpoints")
    results["measured"] = measured(out, saver)
    for position in (0, 3, 8):
        results[f"resume/{position}"] = measured(out, ckpt=out / "checkpoints" / f"{position:03d}.ckpt")
    torch.save(results, out / f"rank{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
