"""A tiny module of six layers, its data, and metrics that tell which of them trained."""

from __future__ import annotations

import hashlib
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import SubsetSearch

TRAINER: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "max_steps": 3}
UNITS = {f"layer {index}": f"net.{index}" for index in range(5)}


class Tiny(pl.LightningModule):
    def __init__(self, lr: float = 0.1, width: int = 4) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)], nn.Linear(4, width), nn.Linear(width, 1))
        self.dropout = nn.Dropout(0.2)
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.log_of_losses: list[float] = []

    def loss(self, batch: Any) -> torch.Tensor:
        x, y = batch
        return (self.net(self.dropout(x)) - y).square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.loss(batch)
        self.seen += 1
        self.log_of_losses.append(float(loss.detach()))
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)


def samples(seed: int = 0, count: int = 12) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator)
    return TensorDataset(x, x.sum(1, keepdim=True))


def loaders(**kw: Any) -> dict[str, Any]:
    return {
        "train_dataloaders": DataLoader(samples(), batch_size=2, shuffle=True, **kw),
        "val_dataloaders": DataLoader(samples(1), batch_size=4),
    }


def tiny(seed: int = 0) -> Tiny:
    torch.manual_seed(seed)
    return Tiny()


def layers_moved(module: Any, start: Any) -> set[int]:
    return {i for i in range(6) if not torch.equal(module.net[i].weight, start.net[i].weight)}


def digest(module: nn.Module) -> float:
    """A number that tells any two sets of weights apart."""
    raw = b"".join(p.detach().numpy().tobytes() for p in module.parameters())
    return float(int.from_bytes(hashlib.blake2b(raw, digest_size=6).digest(), "little"))


def search(metrics: Any = None, module: Any = None, data: Any = None, **kw: Any) -> SubsetSearch:
    arguments = {"trainer": TRAINER, "metrics": metrics or {"val_loss": "min"}, **kw}
    return SubsetSearch(module or tiny(), data or loaders(), **arguments)
