"""Tiny data for command-line runs of the contract models."""

from __future__ import annotations

import lightning.pytorch as pl

from lightning_peft.data.loader import ResumableDataLoader
from tests.contract.harness import loader


class TinyData(pl.LightningDataModule):
    def train_dataloader(self) -> ResumableDataLoader:
        return loader("gqa_decoder")

    def val_dataloader(self) -> ResumableDataLoader:
        return loader("gqa_decoder", shuffle=False)
