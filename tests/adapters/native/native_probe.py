"""Run by ``test_native_parallel.py`` on two processes.

Adapters that grow under DDP, with a resume, and their refusal by FSDP2; mixtures and prompts under DDP and FSDP2.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from lightning_peft import DePT, FSDP2Strategy, IncreLoRA, LoRAMoE, MTLoRA, NTKAttention, TriAdaptLoRA
from lightning_peft.errors import LightningPeftError
from tests.adapters.parallel_probe import fit
from tests.contract.harness import TinyModule
from tests.distributed.ddp_probe import SaveEveryBatch

OPTIONS: dict[str, Any] = {"target_rank": 2, "period_steps": 1, "layers": ["*.q_proj", "*.down_proj"]}
METHODS: dict[str, Any] = {
    "increlora": lambda: IncreLoRA(layers_per_growth=1, **OPTIONS),
    "triadapt_lora": lambda: TriAdaptLoRA(total_steps=8, **OPTIONS),
}
OTHERS: dict[str, Any] = {
    "loramoe": lambda: LoRAMoE(num_experts=4, rank=2, balance_weight=0.0),
    "mtlora": lambda: MTLoRA(num_tasks=5, rank=2, task_rank=2, task_ids=1),
    "ntk_attention": NTKAttention,
    "dept": lambda: DePT(num_prompts=3, rank=2, max_length=8, init_std=0.1),
}
STRATEGIES: dict[str, Any] = {"ddp": lambda: "ddp", "fsdp2": FSDP2Strategy}


def run(out: Path, name: str, *callbacks: Any, **options: Any) -> dict[str, Any]:
    method = METHODS[name]()
    result = fit(out, [method], *callbacks, **options)
    history = [(step, sorted(names)) for step, names in method.history]
    return {**result, "ranks": method.ranks, "history": history}


def main(out: Path) -> None:
    results = {name: run(out, name, world_size=2, strategy="ddp") for name in METHODS}
    arguments: dict[str, Any] = {"world_size": 2, "module": TinyModule, "strategy": "ddp"}
    results["whole"] = run(out, "increlora", SaveEveryBatch(out), **arguments)
    results["resumed"] = run(out, "increlora", ckpt=out / "005.ckpt", **arguments)
    try:
        run(out, "increlora", world_size=2, strategy=FSDP2Strategy())
    except LightningPeftError as error:
        results["fsdp2"] = {"error": f"{type(error).__name__}: {error}"}
    for name, make in OTHERS.items():
        for strategy, make_strategy in STRATEGIES.items():
            results[f"{name}/{strategy}"] = fit(out, [make()], world_size=2, strategy=make_strategy())
    torch.save(results, out / f"rank{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
