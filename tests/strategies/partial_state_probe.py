"""Run by ``test_partial_state.py``: stock ModelParallelStrategy, blocks that freeze and thaw by hand, resumed."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy, SingleDeviceStrategy, Strategy
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate

from lightning_peft.errors import LightningPeftError
from lightning_peft.strategies.partial_state import (
    keep_partial_state,
    lazy_init_all_trainable,
    refresh_dtypes,
    sharded_parameters,
)
from tests.distributed.launch import share_meshes

WIDTH = 5  # rows do not divide by two ranks
NUM_STEPS = 8
ACTIVE = [0, 0, 2, 2, 1, 1, 0, 3]  # the block that trains in each step


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("scale", torch.full((1,), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * torch.tanh(self.linear(self.norm(x)))


class Custom:
    """Something that torch.load refuses by default."""


class Columns(torch.optim.Optimizer):
    """Keeps sums over the rows of a gradient, the same on every rank and not laid out as the weights are."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure is not None else None
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            sums = parameter.grad.square().sum(0)
            if isinstance(sums, DTensor):
                sums = sums.redistribute(placements=[Replicate()] * sums.device_mesh.ndim)
            state = self.state[parameter]
            state["sums"] = state["sums"].lerp(sums, 0.1) if "sums" in state else sums
            parameter.sub_(parameter.grad / (state["sums"].sqrt() + 1), alpha=0.05)
        return loss


class Local(torch.optim.SGD):
    """Keeps something of this rank's piece alone."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            self.state[parameter]["seen"] = parameter.grad.to_local().clone()
        return loss


class Module(pl.LightningModule):
    """Groups of the optimizer are not in the model's order: norms and biases come last."""

    policy: MixedPrecisionPolicy | None = None

    def __init__(self, optimizer: str = "adamw", shard: bool = True) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(4)])
        self.head = nn.Linear(WIDTH, 1)
        self.optimizer, self.shard = optimizer, shard

    def configure_model(self) -> None:
        if not self.shard or any(isinstance(p, DTensor) for p in self.parameters()):
            return
        mesh = self.device_mesh["data_parallel"]
        policy = {"mp_policy": self.policy} if self.policy else {}
        for block in self.blocks:
            fully_shard(block, mesh=mesh, **policy)
        fully_shard(self, mesh=mesh, **policy)
        torch.distributed.fsdp.register_fsdp_forward_method(self, "training_step")
        torch.distributed.fsdp.register_fsdp_forward_method(self, "validation_step")

    def _loss(self, step: int) -> torch.Tensor:
        both = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(step))
        x = both.chunk(self.trainer.world_size)[self.trainer.global_rank]
        for block in self.blocks:
            x = block(x)
        return self.head(x.to(self.head.weight.dtype)).float().square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self._loss(self.trainer.global_step)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._loss(100)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        plain = [p for p in self.parameters() if p.ndim < 2]
        matrices = [p for p in self.parameters() if p.ndim >= 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
        if self.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=0.05)
        if self.optimizer == "columns":
            return Columns(groups, {"lr": 0.05})
        if self.optimizer == "local":
            return Local(groups, lr=0.05)
        return torch.optim.AdamW(groups, lr=0.05)


class Rotate(pl.Callback):
    """Train one block and the head at a time; frozen blocks keep or lose their moments."""

    def __init__(self, keep: bool) -> None:
        self.keep = keep

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        active = f"blocks.{ACTIVE[trainer.global_step]}."
        for name, parameter in sharded_parameters(pl_module).items():
            trains = name.startswith((active, "head"))
            parameter.requires_grad_(trains)
            if not trains:
                parameter.grad = None
                if not self.keep:
                    trainer.optimizers[0].state.pop(parameter, None)
        refresh_dtypes(pl_module)


POSITIONS = (0, 1, 5)  # before any step, one step in, with state of four blocks


class Save(pl.Callback):
    def __init__(self, out: Path) -> None:
        self.out = out

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.on_train_batch_end(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step in POSITIONS:
            trainer.save_checkpoint(self.out / f"{trainer.global_step}.ckpt")


class Loaded(pl.Callback):
    """What is there right after the restore."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.found = snapshot(trainer, pl_module)


class Keep(pl.Callback):
    """What a guard does: after ``strategy.setup``, before anything is restored."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(trainer.strategy, ModelParallelStrategy):
            lazy_init_all_trainable(pl_module)
            keep_partial_state(trainer.strategy)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def snapshot(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
    parameters = sharded_parameters(module)
    states = {
        name: {key: whole(leaf) for key, leaf in trainer.optimizers[0].state[parameter].items()}
        for name, parameter in parameters.items()
        if trainer.optimizers and len(trainer.optimizers[0].state.get(parameter, {}))
    }
    groups = [{k: v for k, v in group.items() if k != "params"} for group in trainer.optimizers[0].param_groups]
    return {"weights": {n: whole(p) for n, p in parameters.items()}, "states": states, "groups": groups}


def fit(
    out: Path,
    strategy: Strategy,
    *callbacks: pl.Callback,
    keep: bool = True,
    ckpt: Path | None = None,
    make: Callable[[], Module] | None = None,
    weights_only: bool | None = None,
    **kw: Any,
) -> dict[str, Any]:
    torch.manual_seed(5 if ckpt is None else 6)
    module = make() if make else Module(shard=isinstance(strategy, ModelParallelStrategy))
    loaded = Loaded()
    trainer = pl.Trainer(
        default_root_dir=out,
        accelerator="cpu",
        devices=1 if isinstance(strategy, SingleDeviceStrategy) else int(os.environ["WORLD_SIZE"]),
        strategy=strategy,
        max_steps=NUM_STEPS,
        callbacks=[Keep(), Rotate(keep), loaded, *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **{"limit_val_batches": 0, **kw},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, range(NUM_STEPS), range(2), ckpt_path=ckpt, weights_only=weights_only)
    return {**snapshot(trainer, module), "loaded": loaded.found}


def stock(full: bool) -> ModelParallelStrategy:
    size = int(os.environ["WORLD_SIZE"])
    return ModelParallelStrategy(size, 1, save_distributed_checkpoint=not full)


def raised(call: Any) -> str:
    try:
        call()
    except LightningPeftError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def two(out: Path) -> dict[str, Any]:
    results: dict[str, Any] = {"plain": fit(out, stock(True))}
    for form in ("sharded", "full"):
        for keep in (True, False):
            case, folder = f"{form}/{'keep' if keep else 'drop'}", out / form / str(keep)
            results[case] = fit(out, stock(form == "full"), Save(folder), keep=keep)
            for position in POSITIONS:
                ckpt = folder / f"{position}.ckpt"
                results[f"{case}/{position}"] = fit(out, stock(form == "full"), keep=keep, ckpt=ckpt)
    results["validation"] = fit(out, stock(True), val_check_interval=2, limit_val_batches=1)
    results["from_one"] = fit(out, stock(True), ckpt=out / "single" / "5.ckpt")
    for form in ("sharded", "full"):
        folder, make = out / f"columns_{form}", lambda: Module("columns")
        results[f"columns/{form}"] = fit(out, stock(form == "full"), Save(folder), make=make)
        results[f"columns/{form}/5"] = fit(out, stock(form == "full"), ckpt=folder / "5.ckpt", make=make)
    results["local"] = raised(lambda: fit(out, stock(False), Save(out / "local"), make=lambda: Module("local")))
    results["sgd"] = fit(out, stock(False), Save(out / "sgd"), make=lambda: Module("sgd"))
    results["sgd/5"] = fit(out, stock(False), ckpt=out / "sgd" / "5.ckpt", make=lambda: Module("sgd"))
    results.update(mistakes(out))
    results.update(mixed(out))
    return results


def mistakes(out: Path) -> dict[str, Any]:
    import torch.distributed as dist

    class Renamed(Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = self.head
            del self.head

    class Regrouped(Module):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=0.05)

    results: dict[str, Any] = {}
    folder = out / "sharded" / "True" / "5.ckpt"
    for form, ckpt in (("sharded", folder), ("full", out / "full" / "True" / "5.ckpt")):
        for name, kind in (("renamed", Renamed), ("regrouped", Regrouped)):
            module = kind()
            results[f"{name}/{form}"] = raised(lambda m=module, c=ckpt: fit(out, stock(True), ckpt=c, make=lambda: m))
            results[f"{name}/{form}/flags"] = all(p.requires_grad for p in module.parameters())
    results["nothing"] = raised(lambda: fit(out, stock(True), ckpt=out / "sharded"))

    broken = out / "broken.ckpt"
    if dist.get_rank() == 0:
        import shutil

        shutil.copytree(folder, broken)
        (broken / "__1_0.distcp").unlink()
    dist.barrier()
    results["missing_file"] = raised(lambda: fit(out, stock(True), ckpt=broken))

    # only what trains is in the file
    for form in ("sharded", "full"):
        ckpt = out / form / "delta.ckpt"
        results[f"delta/{form}"] = fit(out, stock(form == "full"), SaveDelta(ckpt))
        results[f"delta/{form}/strict"] = raised(lambda c=ckpt: fit(out, stock(True), ckpt=c))
        results[f"delta/{form}/loaded"] = fit(out, stock(True), ckpt=ckpt, make=lenient)["loaded"]

    for form in ("sharded", "full"):
        name = out / form / "custom.ckpt"
        fit(out, stock(form == "full"), SaveCustom(name))
        results[f"weights_only/{form}/default"] = raised(lambda f=form, n=name: fit(out, stock(f == "full"), ckpt=n))
        results[f"weights_only/{form}/off"] = raised(
            lambda f=form, n=name: fit(out, stock(f == "full"), ckpt=n, weights_only=False)
        )
    return results


def lenient() -> Module:
    module = Module()
    module.strict_loading = False
    return module


class SaveDelta(pl.Callback):
    """At step 5, save only the head and block 1 (what trains then)."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step != 5:
            return
        strategy = trainer.strategy
        state = strategy.lightning_module_state_dict()
        strategy.lightning_module_state_dict = lambda: {
            key: value for key, value in state.items() if key.startswith(("blocks.1.", "head."))
        }
        trainer.save_checkpoint(self.out)
        del strategy.lightning_module_state_dict


class SaveCustom(pl.Callback):
    def __init__(self, out: Path) -> None:
        self.out = out

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Any) -> None:
        checkpoint["custom"] = Custom()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 3:
            trainer.save_checkpoint(self.out)


def mixed(out: Path) -> dict[str, Any]:
    """Bfloat16 compute, float32 reduction: blocks 1 to 3 are frozen at the first forward and thaw later."""

    class Mixed(Module):
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)

    results = {"mixed": fit(out, stock(True), Save(out / "mixed"), make=Mixed)}
    results["mixed/5"] = fit(out, stock(True), ckpt=out / "mixed" / "5.ckpt", make=Mixed)
    return results


def one(out: Path) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for form in ("sharded", "full"):
        results[form] = fit(out, stock(form == "full"), ckpt=out / form / "True" / "5.ckpt")
    return results


def main(task: str, out: Path) -> None:
    results = {"two": two, "one": one}[task](out)
    torch.save(results, out / f"{task}_rank{os.environ['RANK']}.pt")


if __name__ == "__main__":
    share_meshes()
    main(sys.argv[1], Path(sys.argv[2]))
