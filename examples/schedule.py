"""A written schedule: phases that thaw and refreeze, on a small CNN and scikit-learn's 8 x 8 digits.

    python examples/schedule.py [SCHEDULE.yaml]

The network knows 0 to 4 and learns all ten digits in the phases of examples/schedule.yaml. Edit the file and run again.
"""

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics.classification import MulticlassAccuracy

from lightning_peft import FinetuningSchedule


class Block(nn.Module):
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
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width * 16, 10)
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def forward(self, images):
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        return self.head(nn.functional.avg_pool2d(x, 2).flatten(1))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        logits = self(images)
        self.accuracy(logits, labels)
        self.log("val/loss", nn.functional.cross_entropy(logits, labels))
        self.log("val/accuracy", self.accuracy)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def fit(module, data, epochs, *callbacks):
    train, val = random_split(data, [0.8, 0.2], torch.Generator().manual_seed(0))
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        callbacks=list(callbacks),
    )
    trainer.fit(module, DataLoader(train, batch_size=64, shuffle=True), DataLoader(val, batch_size=256))
    return trainer


SCHEDULE = Path(__file__).with_suffix(".yaml")


def main(schedule=SCHEDULE):
    torch.set_num_threads(1)  # for so small a model, more threads cost more than they give
    pl.seed_everything(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    known = labels < 5

    module = DigitsCNN()
    fit(module, TensorDataset(images[known], labels[known]), 4)

    method = FinetuningSchedule(str(schedule))
    trainer = fit(module, TensorDataset(images, labels), 14, method)
    for number, (step, names) in enumerate(method.history):
        parts = sorted({name.split(".")[0] for name in names})
        print(f"phase {number} from step {step}: {len(names)} tensors in {', '.join(parts)}")
    print(f"val accuracy: {float(trainer.callback_metrics['val/accuracy']):.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
