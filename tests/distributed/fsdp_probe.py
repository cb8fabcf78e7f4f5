"""Run by ``test_fsdp.py`` on two processes: fits tiny models under a sharding strategy and writes down what happened.

Arguments: the output folder and the strategy, ``fsdp1``, ``model_parallel`` (Lightning's own, with the user's
``configure_model``) or ``fsdp2`` (ours, on the very module that one device trains).
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
from lightning.pytorch.strategies import ModelParallelStrategy
from peft import LoraConfig, inject_adapter_in_model
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lightning_peft import IST, LISA, EmbeddingsAndHead, FinetuningSchedule, RandomTuning
from lightning_peft.core.names import clean_name
from lightning_peft.errors import LightningPeftError
from lightning_peft.methods.base import MethodCallback
from tests.contract.harness import REPLACING_PHASES, ROWS, TinyModule, trainer
from tests.distributed import ddp_probe
from tests.distributed.ddp_probe import MODEL, Quiet, SaveEveryBatch, loader
from tests.distributed.fsdp1_on_cpu import FSDPOnCPU
from tests.distributed.launch import share_meshes

STRATEGIES = ("fsdp1", "model_parallel", "fsdp2")
UNSUPPORTED = {
    "all": {"green_trainer", "green_trainer_epoch", "rift", "auto_rgn", "lisa_outliers", "cofitune"},
    "fsdp1": {"lisa_offload", "schedule_replacing"},
}
RESUMED = ("lisa", "lisa_keep", "hft_redraw", "schedule", "schedule_replacing", "badam", "ist_slow")
POSITIONS = {"sharded": (5,), "full": (3,)}


def is_supported(row: str, strategy: str) -> bool:
    return row not in UNSUPPORTED["all"] | UNSUPPORTED.get(strategy, set())


class ShardedByUser(Quiet):
    """Shards in ``configure_model``, as Lightning's ModelParallelStrategy asks its users to."""

    mixed = False

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        policy = {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)} if self.mixed else {}
        for block in self.model.model.layers:
            fully_shard(block, mesh=mesh, **policy)
        fully_shard(self.model, mesh=mesh, **policy)


class LeavesOut(Quiet):
    """Shards its blocks and forgets the rest."""

    def configure_model(self) -> None:
        for block in self.model.model.layers:
            fully_shard(block, mesh=self.device_mesh["data_parallel"])


class LooksBetween(ShardedByUser):
    """Asks its model without gradients between the backward pass and the optimizer step."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        with torch.no_grad():
            self.model(input_ids=torch.arange(4)[None], use_cache=False)


class ShardedByUserMixed(ShardedByUser):
    mixed = True


class WithDropout(ShardedByUser):
    on_train_start = TinyModule.on_train_start


def with_adapters(kind: type[TinyModule]) -> type[TinyModule]:
    """The same module with LoRA adapters on its attention, injected by peft before any strategy sees it."""

    class WithAdapters(kind):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            torch.manual_seed(5)
            config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
            inject_adapter_in_model(config, self.model)

    return WithAdapters


ADAPTER_ROWS: dict[str, Callable[[], list[MethodCallback]]] = {
    "ist_over_lora": lambda: [IST(0.5, score_period_steps=2, scope="adapters")],
    "lora_and_lisa": lambda: [
        LISA(1, period_steps=2, scope="*.mlp.*", always=("*norm.weight",), state="keep"),
        EmbeddingsAndHead(scope=["*.lm_head.weight"]),
        RandomTuning(1.0, scope="adapters"),
    ],
}


class Gradients(pl.Callback):
    """Whole gradients of every optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        model = trainer.strategy.model
        if isinstance(model, FullyShardedDataParallel):
            mine = [clean_name(n) for n, p in pl_module.named_parameters() if p.grad is not None]
            parts: list[Any] = [None, None]
            torch.distributed.all_gather_object(parts, mine)  # a rank may hold nothing of a tensor
            with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
                whole = _whole_gradients(pl_module)
            self.steps.append({name: value for name, value in whole.items() if name in {*parts[0], *parts[1]}})
        else:
            self.steps.append(_whole_gradients(pl_module))


def _whole_gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {clean_name(n): p.grad for n, p in module.named_parameters() if p.grad is not None}
    return {n: (g.full_tensor() if hasattr(g, "full_tensor") else g).detach().clone() for n, g in found.items()}


class WholeWeights(pl.Callback):
    """The whole weights at the end of a fit."""

    def __init__(self) -> None:
        self.values: dict[str, torch.Tensor] = {}

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        model = trainer.strategy.model
        if isinstance(model, FullyShardedDataParallel):
            with FullyShardedDataParallel.summon_full_params(model, writeback=False):
                self.values = {clean_name(n): p.detach().clone() for n, p in pl_module.named_parameters()}
        else:
            for block in pl_module.modules():
                if hasattr(block, "reshard"):
                    block.reshard()
            self.values = {
                n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
                for n, p in pl_module.named_parameters()
            }


def make_strategy(name: str, full: bool = False, world_size: int = 2) -> Any:
    if name == "fsdp1":
        return FSDPOnCPU(auto_wrap_policy={LlamaDecoderLayer}, state_dict_type="full" if full else "sharded")
    if name == "model_parallel":
        return ModelParallelStrategy(world_size, 1, save_distributed_checkpoint=not full)
    from lightning_peft import FSDP2Strategy

    return FSDP2Strategy(save_distributed_checkpoint=not full)


def fit(
    out: Path,
    strategy: str,
    methods: list[MethodCallback],
    *callbacks: pl.Callback,
    ckpt: Path | None = None,
    full: bool = False,
    dropout: bool = False,
    adapters: bool = False,
    module: type[TinyModule] | None = None,
    **kw: Any,
) -> dict[str, Any]:
    """As ``ddp_probe.fit``, on two processes under ``strategy``."""
    mixed = kw.get("precision") == "bf16-mixed"
    if module is not None:
        pass
    elif strategy == "model_parallel":
        module = WithDropout if dropout else ShardedByUserMixed if mixed else ShardedByUser
        if mixed:
            kw.pop("precision")
    else:
        module = TinyModule if dropout else Quiet
    gradients, whole = Gradients(), WholeWeights()
    torch.manual_seed(100 if ckpt is None else 7)
    model = (with_adapters(module) if adapters else module)(MODEL)
    run = trainer(
        out,
        [*methods, *callbacks, gradients, whole],
        limit_val_batches=0,
        use_distributed_sampler=False,
        devices=2,
        strategy=make_strategy(strategy, full),
        gradient_clip_val=None,
        **kw,
    )
    torch.manual_seed(100 + run.global_rank if ckpt is None else 7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.fit(model, loader(2), ckpt_path=ckpt)
    return {
        "gradients": gradients.steps,
        "weights": whole.values,
        "histories": [[(step, sorted(names)) for step, names in m.history] for m in methods],
        "steps": run.global_step,
    }


def single(out: Path, methods: list[MethodCallback], *callbacks: pl.Callback, **kw: Any) -> dict[str, Any]:
    """The same on one process with the joined batch."""
    module = with_adapters(Quiet) if kw.pop("adapters", False) else Quiet
    return ddp_probe.fit(out, methods, *callbacks, module=module, gradient_clip_val=None, **kw)


def refused(out: Path, strategy: str, methods: list[MethodCallback], **kw: Any) -> str:
    try:
        fit(out, strategy, methods, **kw)
    except LightningPeftError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def replacing() -> list[MethodCallback]:
    """As the row of that name, with the optimizer state kept."""
    return [FinetuningSchedule(REPLACING_PHASES)]


def second_fit(out: Path) -> str:
    """Fit a module that a strategy has wrapped in an earlier fit."""
    module = Quiet(MODEL)
    for _ in range(2):
        run = trainer(
            out, ROWS["lisa"].make(), devices=2, strategy=make_strategy("fsdp1"), gradient_clip_val=None, max_epochs=1
        )
        try:
            run.fit(module, loader(2))
        except LightningPeftError as error:
            return f"{type(error).__name__}: {error}"
    return "no error"


def main(out: Path, strategy: str) -> None:
    results: dict[str, Any] = {}
    for row in ROWS:
        if is_supported(row, strategy):
            results[row] = fit(out, strategy, ROWS[row].make())
        else:
            results[f"refused/{row}"] = refused(out, strategy, ROWS[row].make())
    for row in ("lisa", "hft", "schedule", "badam"):
        results[f"mixed/{row}"] = fit(out, strategy, ROWS[row].make(), precision="bf16-mixed")
    for row in ("lisa", "hft_redraw", "schedule", "badam"):
        directory = out / "mixed" / row
        saver, mixed = SaveEveryBatch(directory), {"precision": "bf16-mixed", "dropout": False}
        results[f"resume/mixed/{row}/expected"] = fit(out, strategy, ROWS[row].make(), saver, **mixed)
        results[f"resume/mixed/{row}/5"] = fit(out, strategy, ROWS[row].make(), ckpt=directory / "005.ckpt", **mixed)
    if strategy == "model_parallel":
        results["looks_between"] = fit(out, strategy, ROWS["lisa"].make(), module=LooksBetween)
        results["refused/left_out"] = refused(out, strategy, ROWS["lisa"].make(), module=LeavesOut)
    if strategy == "fsdp1":
        row, saver = "schedule_replacing_keep", SaveEveryBatch(out / "replacing")
        results[row] = fit(out, strategy, replacing(), saver)
        for position in POSITIONS["sharded"]:
            path = saver.directory / f"{position:03d}.ckpt"
            results[f"resume/sharded/{row}/{position}"] = fit(out, strategy, replacing(), ckpt=path)
        results["refused/second_fit"] = second_fit(out)
    for row, make in ADAPTER_ROWS.items():
        results[f"adapters/{row}"] = fit(out, strategy, make(), adapters=True)
    for full in (False, True):
        for row in (row for row in RESUMED if is_supported(row, strategy)):
            form = "full" if full else "sharded"
            directory = out / form / row
            arguments: dict[str, Any] = {"full": full, "dropout": True}
            results[f"resume/{form}/{row}/expected"] = fit(
                out, strategy, ROWS[row].make(), SaveEveryBatch(directory), **arguments
            )
            for position in POSITIONS[form]:
                path = directory / f"{position:03d}.ckpt"
                results[f"resume/{form}/{row}/{position}"] = fit(
                    out, strategy, ROWS[row].make(), ckpt=path, **arguments
                )
    torch.save(results, out / f"rank{os.environ['RANK']}.pt")


if __name__ == "__main__":
    share_meshes()
    main(Path(sys.argv[1]), sys.argv[2])
