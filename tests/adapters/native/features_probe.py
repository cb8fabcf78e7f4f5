"""Run by ``test_features_parallel.py`` on two processes: adapters that change features, under DDP and FSDP2."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from lightning_peft import SSF, Compacter, FSDP2Strategy, ParallelAdapter
from lightning_peft.errors import LightningPeftError
from tests.adapters.parallel_probe import fit

METHODS: dict[str, Any] = {
    "ssf": lambda: [SSF()],
    "parallel": lambda: [ParallelAdapter(4)],
    "compacter": lambda: [Compacter(4, n=2)],
}


def main(out: Path) -> None:
    results: dict[str, Any] = {}
    for name, make in METHODS.items():
        results[f"{name}/ddp"] = fit(out, make(), world_size=2, strategy="ddp")
        try:
            results[f"{name}/fsdp2"] = fit(out, make(), world_size=2, strategy=FSDP2Strategy())
        except LightningPeftError as error:
            results[f"{name}/fsdp2"] = f"{type(error).__name__}: {error}"
    torch.save(results, out / f"rank{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
