"""Run by ``test_drivers_parallel.py`` on two processes: methods that need the loop, under DDP and FSDP2."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from lightning_peft import LAE, PEGO, AdaMSS, BALoRA, FSDP2Strategy, LoRAFA, LoRAPlus, Poly
from lightning_peft.errors import LightningPeftError
from tests.adapters.parallel_probe import fit
from tests.contract.harness import TinyModule, trainer, weights
from tests.distributed.ddp_probe import MODEL, Quiet, SaveEveryBatch, loader

LAYERS = "*.up_proj"
METHODS: dict[str, Any] = {
    "lora_plus": lambda: [LoRAPlus(2, layers=LAYERS)],
    "lora_fa": lambda: [LoRAFA(2, layers=LAYERS)],
    "pego": lambda: [PEGO(2, 2, weight=1.0, layers=LAYERS)],
    # means over tokens, of which all processes have as many
    "ba_lora": lambda: [BALoRA(2, consistency=10.0, diversity=1.0, spectrum=0.0, labels=0, layers=LAYERS)],
    "adamss": lambda: [
        AdaMSS(6, 2, target_subspaces=3, start_step=1, end_step=4, period_steps=2, exponent=1.0, layers=LAYERS)
    ],
    "poly": lambda: [Poly(5, task_ids=1, layers=LAYERS)],  # draws, so that one process is no oracle
}
SHARDED = ("lora_plus", "lora_fa")
RESUMED = {"adamss": "ddp", "poly": "ddp", "lora_fa": "fsdp2"}


def strategy(name: str) -> Any:
    return FSDP2Strategy() if name == "fsdp2" else name


def two_tasks(out: Path, world_size: int = 1, **kw: Any) -> dict[str, torch.Tensor]:
    """LAE on the same data twice; the second time the head trains alone in the first epoch."""
    torch.manual_seed(100)
    module = Quiet(MODEL)
    adapter = LAE("lora", {"r": 2}, decay=0.5, freeze_epochs=1, layers=LAYERS, always=["head"])
    for _ in range(2):
        options = {"limit_val_batches": 0, "use_distributed_sampler": False, "gradient_clip_val": None}
        run = trainer(out, [adapter], devices=world_size, **{**options, **kw})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run.fit(module, loader(world_size))
    assert adapter.task == 1
    return weights(module)


def main(out: Path) -> None:
    results: dict[str, Any] = {}
    for name, make in METHODS.items():
        results[f"{name}/ddp"] = fit(out, make(), world_size=2, strategy="ddp")
        try:
            results[f"{name}/fsdp2"] = fit(out, make(), world_size=2, strategy=strategy("fsdp2"))
        except LightningPeftError as error:
            results[f"{name}/fsdp2"] = f"{type(error).__name__}: {error}"
    for name, form in RESUMED.items():
        directory = out / name
        options: dict[str, Any] = {"world_size": 2, "module": TinyModule}
        saver = SaveEveryBatch(directory)
        results[f"{name}/expected"] = fit(out, METHODS[name](), saver, strategy=strategy(form), **options)
        path = directory / "006.ckpt"
        results[f"{name}/resumed"] = fit(out, METHODS[name](), strategy=strategy(form), ckpt=path, **options)
    results["lae"] = two_tasks(out, world_size=2, strategy="ddp")
    torch.save(results, out / f"rank{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
