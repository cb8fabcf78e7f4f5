"""Two processes: quantised bases with adapters under DDP, stock FSDP2 and FSDP2Strategy. Launched by torchrun."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import PEQA, FSDP2Strategy, LowBitAdapters, QLoRA, QuantizedPrecision, RandomTuning
from lightning_peft.errors import ConfigError, UnsupportedStrategy
from lightning_peft.precision import quantized_layers
from lightning_peft.strategies.sharding import shards_integers
from tests.distributed.launch import share_meshes
from tests.precision.tiny import LoRAModule, rows, trainer

STEPS = 5


class Recorded(LoRAModule):
    """Keeps the adapters' gradients of every step, whole."""

    def __init__(self, *args: Any, shard: bool = False, lr: float = 0.02, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.shard, self.lr = shard, lr
        self.grads: list[dict[str, torch.Tensor]] = []

    def configure_model(self) -> None:
        if any(hasattr(p, "_local_tensor") for p in self.parameters()):
            return
        super().configure_model()
        if self.shard:
            mesh = self.device_mesh["data_parallel"]
            whole = None if shards_integers() else {p for p in self.parameters() if not p.is_floating_point()}
            for layer in self.model.model.layers:
                fully_shard(layer, mesh=mesh, ignored_params=whole)
            fully_shard(self.model, mesh=mesh, ignored_params=whole)

    def loss(self, batch: Any) -> torch.Tensor:
        ids = batch[0][self.global_rank :: self.trainer.world_size]  # each process its part of the same batch
        return super().loss([ids])

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.grads.append({n: whole(p.grad) for n, p in self.named_parameters() if p.grad is not None})

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr, momentum=0.9)


def whole(tensor: Any) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def data() -> DataLoader:
    return DataLoader(TensorDataset(rows(4 * STEPS)), batch_size=4)


def result(module: Recorded) -> dict[str, Any]:
    return {
        "grads": module.grads,
        "adapters": {n: whole(p) for n, p in module.named_parameters() if p.requires_grad},
        "layers": [path for path, _ in quantized_layers(module)],
        "codes": sum(
            getattr(layer.weight, "_local_tensor", layer.weight).numel() for _, layer in quantized_layers(module)
        ),
    }


def run(
    module: Recorded, mode: Any, strategy: Any, devices: int = 2, steps: int = STEPS, ckpt: Any = None, **kwargs: Any
) -> pl.Trainer:
    settings: dict[str, Any] = {"strategy": strategy, "devices": devices, "limit_val_batches": 2, **kwargs}
    fit = trainer(None if mode is None else QuantizedPrecision(mode), steps, use_distributed_sampler=False, **settings)
    fit.fit(module, data(), data(), ckpt_path=ckpt)
    return fit


def stock(save_distributed_checkpoint: bool = True) -> ModelParallelStrategy:
    return ModelParallelStrategy(2, 1, save_distributed_checkpoint=save_distributed_checkpoint)


def qlora() -> dict[str, Any]:
    """Epochs of two steps, so that a run resumes at the beginning of one, with a plain loader."""
    return {"callbacks": [QLoRA(rank=4, alpha=8, dropout=0.0)], "limit_train_batches": 2}


def all_adapters() -> dict[str, Any]:
    """Adapters that the user put in, chosen by a method that does not know of quantised weights."""
    return {"callbacks": [RandomTuning(1.0, scope="adapters")], "limit_train_batches": 2}


METHODS: dict[str, Any] = {
    "peqa": lambda: [PEQA(bits=4, group_size=16)],
    "low_bit": lambda: [LowBitAdapters(bits=2)],
}


def make(method: str) -> Recorded:
    """Scales are small: at a high rate they leap, and rounding with them."""
    return Recorded("init") if method == "low_bit" else Recorded("bare", lr=5e-4)


def main(out: Path) -> None:
    results: dict[str, Any] = {}
    for name, mode, where, strategy, shard in (
        ("ddp", "nf4", "init", lambda: "ddp", False),
        ("ddp int8", "int8", "configure", lambda: "ddp", False),
        ("stock", "nf4", "quantize_first", stock, True),
        ("fsdp2 init", "nf4", "init", FSDP2Strategy, False),
        ("fsdp2 configure", "nf4-dq", "configure", FSDP2Strategy, False),
    ):
        module = Recorded(where, shard=shard)
        run(module, mode, strategy())
        results[name] = result(module)
    for name in ("ddp", "fsdp2"):
        for method in METHODS:
            module = make(method)
            run(module, None, "ddp" if name == "ddp" else FSDP2Strategy(), callbacks=METHODS[method]())
            results[f"{method} {name}"] = result(module)
    for files in (True, False):
        for name, kind, make_module, make_callbacks in (
            ("fsdp2", FSDP2Strategy, lambda: Recorded("bare"), qlora),
            ("stock", stock, lambda: Recorded("quantize_first", shard=True), all_adapters),
        ):
            half = make_module()
            strategy = kind(save_distributed_checkpoint=files)
            first = run(half, "nf4", strategy, steps=2, **make_callbacks())
            path = out / f"half-{name}-{files}.ckpt"
            first.save_checkpoint(path)
            resumed = make_module()
            strategy = kind(save_distributed_checkpoint=files)
            run(resumed, "nf4", strategy, steps=4, ckpt=path, **make_callbacks())
            results[f"resumed {name} {files}"] = {"half": result(half), **result(resumed)}
    for name, mode, strategy, where in (
        ("late", "nf4", stock(), "configure"),
        ("int8", "int8", FSDP2Strategy(), "init"),
    ):
        try:
            run(Recorded(where, shard=name == "late"), mode, strategy)
        except (ConfigError, UnsupportedStrategy) as error:
            results[name] = f"{type(error).__name__}: {error}"
    gathered: list[Any] = [None, None]
    dist.all_gather_object(gathered, results)
    if dist.get_rank() == 0:
        torch.save(gathered, out / "results.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    share_meshes()
    main(Path(sys.argv[1]))
