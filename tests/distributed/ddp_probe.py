"""Run by ``test_ddp.py`` on two processes: fits tiny models under DDP and writes down what happened on each rank."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_peft import HFT, LISA
from lightning_peft.core.draw import Draw
from lightning_peft.data.loader import ResumableDataLoader
from lightning_peft.errors import EffectError
from lightning_peft.methods.base import MethodCallback
from tests.contract.harness import ROWS, TinyModule, dataset, trainer, weights

MODEL = "gqa_decoder"
NOISY = ("cofitune",)  # scores with dropout, which differs by process: tests/methods/test_cofitune_ddp.py
CASES = [(row, accumulate) for row in ROWS if row not in NOISY for accumulate in (1, 2)]
NUM_SAMPLES = 24
GLOBAL_BATCH = 4


class Gradients(pl.Callback):
    """Gradients of every optimizer step, and the size of what DDP reduces."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []
        self.reduced: list[int] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        self.steps.append({n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None})
        model = trainer.strategy.model
        if isinstance(model, DistributedDataParallel):
            self.reduced.append(sum(p.numel() for p in model.parameters() if p.requires_grad))


class SaveEveryBatch(pl.Callback):
    def __init__(self, directory: Path) -> None:
        self.directory, self.count = directory, 0

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.directory / f"{self.count:03d}.ckpt")
        self.count += 1


class Quiet(TinyModule):
    """Without dropout, so that one process on the joined batch gives the same gradients."""

    def on_train_start(self) -> None:
        for module in self.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0


def loader(world_size: int) -> ResumableDataLoader:
    return ResumableDataLoader(dataset(MODEL, NUM_SAMPLES), batch_size=GLOBAL_BATCH // world_size, shuffle=True, seed=3)


def fit(
    out: Path, methods: list[MethodCallback], *callbacks: pl.Callback, module: Any = Quiet, ckpt: Any = None, **kw: Any
) -> dict[str, Any]:
    torch.manual_seed(100 if ckpt is None else 7)
    world_size = kw.get("devices", 1)
    model = module(MODEL)
    probe = Gradients()
    run = trainer(out, [*methods, *callbacks, probe], limit_val_batches=0, use_distributed_sampler=False, **kw)
    if run.world_size > 1:
        torch.manual_seed(100 + run.global_rank if ckpt is None else 7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.fit(model, loader(world_size), ckpt_path=ckpt)
    return {
        "gradients": probe.steps,
        "reduced": probe.reduced,
        "weights": weights(model),
        "histories": [[(step, sorted(names)) for step, names in m.history] for m in methods],
        "steps": run.global_step,
    }


class Diverging(LISA):
    """Chooses by rank, as a method with scores of its own rank would."""

    def select(self, draw: Draw) -> list[str]:
        import torch.distributed as dist

        return [list(self.units)[dist.get_rank()]]


def main(out: Path) -> None:
    import os

    rank = int(os.environ["RANK"])
    results: dict[str, Any] = {}
    for row, accumulate in CASES:
        results[f"{row}/{accumulate}"] = fit(
            out, ROWS[row].make(), devices=2, strategy="ddp", accumulate_grad_batches=accumulate
        )
    from tests.distributed.fsdp_probe import ADAPTER_ROWS, with_adapters

    for row, make in ADAPTER_ROWS.items():
        kind = with_adapters(Quiet)
        results[f"adapters/{row}"] = fit(out, make(), module=kind, devices=2, strategy="ddp", gradient_clip_val=None)
    for row in ("lisa", "hft", "schedule", "badam"):
        saver = SaveEveryBatch(out / "mixed" / row)
        arguments: dict[str, Any] = {"devices": 2, "strategy": "ddp", "precision": "bf16-mixed"}
        results[f"mixed/{row}"] = fit(out, ROWS[row].make(), saver, **arguments)
        results[f"mixed/{row}/5"] = fit(out, ROWS[row].make(), ckpt=saver.directory / "005.ckpt", **arguments)
    results["find_unused"] = fit(
        out, ROWS["lisa"].make(), devices=2, strategy="ddp_find_unused_parameters_true", accumulate_grad_batches=1
    )
    results["static_graph"] = fit(
        out, ROWS["lisa"].make(), devices=2, strategy=DDPStrategy(static_graph=True), accumulate_grad_batches=1
    )
    results["bucket_view"] = fit(
        out,
        ROWS["lisa"].make(),
        devices=2,
        strategy=DDPStrategy(gradient_as_bucket_view=True),
        accumulate_grad_batches=2,
    )
    for row in ("lisa", "lisa_offload", "hft_redraw"):
        directory = out / row
        saver = SaveEveryBatch(directory)
        arguments = {"devices": 2, "strategy": "ddp", "module": TinyModule}
        results[f"resume/{row}/expected"] = fit(out, ROWS[row].make(), saver, **arguments)
        for position in (0, 3, 5, 6, 9):
            results[f"resume/{row}/{position}"] = fit(
                out, ROWS[row].make(), ckpt=directory / f"{position:03d}.ckpt", **arguments
            )
    try:
        fit(out, [Diverging(1, period_steps=3)], devices=2, strategy="ddp")
        results["diverging"] = "no error"
    except EffectError as error:
        results["diverging"] = str(error)
    torch.save(results, out / f"rank{rank}.pt")


if __name__ == "__main__":
    assert HFT is not None
    assert nn is not None
    main(Path(sys.argv[1]))
