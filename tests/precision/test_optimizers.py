"""8-bit and paged optimizers of bitsandbytes with methods: class path, state policies, resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from lightning_peft import LISA
from lightning_peft.cli import main
from lightning_peft.core.trainable import state_bytes
from lightning_peft.data.loader import ResumableDataLoader

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")
OPTIMIZERS = {"AdamW8bit": bnb.optim.AdamW8bit, "PagedAdamW8bit": bnb.optim.PagedAdamW8bit}
WIDTH = 72  # 5184 weights per matrix: above the 4096 from which moments have 8 bits


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.linear(self.norm(x)))


class Stack(pl.LightningModule):
    def __init__(self, optimizer: Any) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(Block() for _ in range(4))
            self.head = nn.Linear(WIDTH, 1)
        self.optimizer = optimizer
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x = batch[0]
        for block in self.blocks:
            x = block(x)
        loss = (self.head(x) - batch[0].sum(1, keepdim=True)).square().mean()
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters(), lr=1e-2, weight_decay=0.1)


def fit(module: Stack, steps: int, state: str, ckpt: Path | None = None) -> pl.Trainer:
    x = torch.randn(48, WIDTH, generator=torch.Generator().manual_seed(1))
    method = LISA(1, period_steps=3, always=["head"], state=state)  # pyright: ignore[reportArgumentType]
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[method],
    )
    trainer.fit(module, ResumableDataLoader(TensorDataset(x), batch_size=4, shuffle=True, seed=3), ckpt_path=ckpt)
    return trainer


@pytest.mark.parametrize("state", ["drop", "keep", "offload"])
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_state_follows_the_policy_and_resume_is_exact(name: str, state: str, tmp_path: Path) -> None:
    whole = Stack(OPTIMIZERS[name])
    trainer = fit(whole, 12, state)
    method = trainer.callbacks[0]
    assert isinstance(method, LISA)
    visited = {n for _, names in method.history for n in names}
    active = method.trainable_names
    assert active < visited
    names = {id(p): n for n, p in whole.named_parameters()}
    (optimizer,) = trainer.optimizers
    held = {names[id(p)] for p, s in optimizer.state.items() if s}
    assert held == (active if state in ("drop", "offload") else visited)
    matrices = [s for p, s in optimizer.state.items() if p.numel() >= 4096]
    assert {s["state1"].dtype for s in matrices} == {torch.uint8}
    per_block = 2 * WIDTH * WIDTH
    assert per_block < state_bytes(trainer.optimizers) < (5 if state == "keep" else 2) * per_block
    for stop in (4, 7):  # inside a period, and after the first re-draw
        half = Stack(OPTIMIZERS[name])
        fit(half, stop, state).save_checkpoint(tmp_path / "half.ckpt")
        resumed = Stack(OPTIMIZERS[name])
        fit(resumed, 12, state, tmp_path / "half.ckpt")
        assert resumed.losses == whole.losses[stop:]
        for (key, old), (_, new) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
            assert torch.equal(old, new), key


def test_offloaded_moments_come_back_as_if_kept() -> None:
    kept, offloaded, dropped = (Stack(bnb.optim.AdamW8bit) for _ in range(3))
    for module, state in ((kept, "keep"), (offloaded, "offload"), (dropped, "drop")):
        fit(module, 24, state)
    assert kept.losses == offloaded.losses
    assert kept.losses != dropped.losses


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_by_class_path_on_the_command_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["fit", "--model=tests.precision.test_optimizers.Automatic", f"--optimizer=bitsandbytes.optim.{name}"]
    args += ["--optimizer.lr=0.01", "--optimizer.min_8bit_size=1024", "--trainer.accelerator=cpu"]
    args += ["--trainer.max_steps=3", "--trainer.logger=false", "--trainer.enable_checkpointing=false"]
    args += ["--trainer.enable_progress_bar=false", "--method=LISA", "--method.num_layers=1"]
    assert main(args) == 0
    assert Automatic.seen[-1] is OPTIMIZERS[name]


class Automatic(Stack):
    """Leaves the optimizer to the command line."""

    seen: list[type] = []  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__(None)

    configure_optimizers = pl.LightningModule.configure_optimizers

    def train_dataloader(self) -> Any:
        return ResumableDataLoader(TensorDataset(torch.randn(16, WIDTH)), batch_size=4)

    def on_train_end(self) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert not isinstance(optimizer, list)
        self.seen.append(type(optimizer))
        assert optimizer.defaults["lr"] == 0.01
