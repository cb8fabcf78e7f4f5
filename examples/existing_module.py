"""LISA on a LightningModule that you already have: a small CNN on scikit-learn's 8 x 8 digits.

    python examples/existing_module.py

The module knows nothing of lightning_peft. One line is added: ``callbacks=[LISA(...)]``.
"""

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_peft import LISA


class ResidualBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x):
        return x + torch.relu(self.norm(self.conv(x)))


class DigitsCNN(pl.LightningModule):
    def __init__(self, width=24, depth=6, lr=1e-2):
        super().__init__()
        self.lr = lr
        self.stem = nn.Conv2d(1, width, kernel_size=3, padding=1)
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(depth))
        self.head = nn.Linear(width * 16, 10)
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def forward(self, images):
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        return self.head(nn.functional.avg_pool2d(x, 2).flatten(1))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = nn.functional.cross_entropy(self(images), labels)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def test_step(self, batch, batch_idx):
        images, labels = batch
        self.accuracy(self(images), labels)
        self.log("test/accuracy", self.accuracy)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main():
    torch.set_num_threads(1)  # for so small a model, more threads cost more than they give
    pl.seed_everything(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    data = TensorDataset(images, torch.tensor(digits.target))
    train, test = torch.utils.data.random_split(data, [1400, 397], torch.Generator().manual_seed(0))

    trainer = pl.Trainer(
        max_epochs=10,
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        callbacks=[LISA(num_layers=2, period_steps=20)],  # the one line
    )
    module = DigitsCNN()
    trainer.fit(module, DataLoader(train, batch_size=64, shuffle=True))
    (result,) = trainer.test(module, DataLoader(test, batch_size=256), verbose=False)
    print(f"test accuracy: {result['test/accuracy']:.3f}")


if __name__ == "__main__":
    main()
