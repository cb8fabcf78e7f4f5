"""Run by ``test_parallel.py`` on two processes: adapters under DDP and FSDP2, with resumes from both kinds of file."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from lightning_peft import IST, FSDP2Strategy, LoRA
from lightning_peft.errors import LightningPeftError
from tests.adapters.test_adapter import make
from tests.contract.harness import TinyModule, trainer
from tests.distributed.ddp_probe import MODEL, Quiet, SaveEveryBatch, loader
from tests.distributed.fsdp_probe import Gradients, WholeWeights

METHODS: dict[str, Any] = {
    "lora": lambda: [LoRA(2)],
    "ist_over_lora": lambda: [LoRA(2), IST(0.5, score_period_steps=2, scope="adapters")],
    "ia3": lambda: [make("ia3")],
}
STRATEGIES: dict[str, Any] = {
    "ddp": lambda: "ddp",
    "fsdp2/sharded": FSDP2Strategy,
    "fsdp2/full": lambda: FSDP2Strategy(save_distributed_checkpoint=False),
}


def fit(
    out: Path,
    methods: list[Any],
    *callbacks: Any,
    world_size: int = 1,
    strategy: Any = "auto",
    ckpt: Any = None,
    module: Any = Quiet,
    **kw: Any,
) -> dict[str, Any]:
    gradients, whole = Gradients(), WholeWeights()
    torch.manual_seed(100 if ckpt is None else 7)
    model = module(MODEL)
    run = trainer(
        out,
        [*methods, *callbacks, gradients, whole],
        limit_val_batches=0,
        use_distributed_sampler=False,
        devices=world_size,
        strategy=strategy,
        gradient_clip_val=None,
        **kw,
    )
    torch.manual_seed(100 + run.global_rank if ckpt is None else 7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.fit(model, loader(world_size), ckpt_path=ckpt)
    return {
        "gradients": gradients.steps,
        "weights": whole.values,
        "trainable": sorted(methods[-1].trainable_names),
        "steps": run.global_step,
    }


def main(out: Path) -> None:
    results: dict[str, Any] = {}
    for name, make_methods in METHODS.items():
        for form, make_strategy in STRATEGIES.items():
            if form != "fsdp2/full":
                results[f"{name}/{form}"] = fit(out, make_methods(), world_size=2, strategy=make_strategy())
            directory = out / name / form
            arguments: dict[str, Any] = {"world_size": 2, "module": TinyModule}
            saver = SaveEveryBatch(directory)
            results[f"resume/{name}/{form}/expected"] = fit(
                out, make_methods(), saver, strategy=make_strategy(), **arguments
            )
            path = directory / "005.ckpt"
            results[f"resume/{name}/{form}"] = fit(
                out, make_methods(), strategy=make_strategy(), ckpt=path, **arguments
            )
    try:
        fit(out, [make("adalora")], world_size=2, strategy=FSDP2Strategy())
        results["adalora"] = "no error"
    except LightningPeftError as error:
        results["adalora"] = f"{type(error).__name__}: {error}"
    torch.save(results, out / f"rank{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
