"""One SGD step and one validation of each module, by one process or by several on the same data together."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_peft import CausalLM, ResumableDataLoader, SequenceClassification, TextEmbedding
from tests.models.tiny_models import BERT, LLAMA, padded

NUM_TRAIN = 6
NUM_VAL = 7  # odd: two processes repeat a row, which no metric may count
SGD = partial(torch.optim.SGD, lr=0.05)


def text(index: int, salt: int) -> list[int]:
    return [3 + (index * 7 + salt * 5 + t * t) % 24 for t in range(2 + (index + salt) % 5)]


def side(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    return {"input_ids": padded(rows), "attention_mask": padded([[1] * len(row) for row in rows])}


def embedding_batch(items: list[int]) -> dict[str, Any]:
    return {"query": side([text(i, 1) for i in items]), "answer": side([text(i, 2) for i in items])}


def language_batch(items: list[int]) -> dict[str, Any]:
    rows = [text(i, 1) for i in items]
    labels = padded([[-100] * (i % 2) + row[i % 2 :] for i, row in zip(items, rows, strict=True)], -100)
    return {**side(rows), "labels": labels}


def class_batch(items: list[int]) -> dict[str, Any]:
    return {**side([text(i, 1) for i in items]), "labels": torch.tensor([i % 3 for i in items])}


CASES = {
    "causal_lm": (lambda: CausalLM(config=LLAMA, optimizer=SGD), language_batch),
    "sequence_classification": (lambda: SequenceClassification(config=BERT, num_labels=3, optimizer=SGD), class_batch),
    "text_embedding": (lambda: TextEmbedding(config=BERT, optimizer=SGD), embedding_batch),
}


def step_and_validate(name: str, folder: Path, num_processes: int) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    build, collate = CASES[name]
    torch.manual_seed(0)
    module: LightningModule = build()
    trainer = Trainer(
        accelerator="cpu",
        devices=num_processes,
        strategy="ddp" if num_processes > 1 else "auto",
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )
    train = ResumableDataLoader(
        range(NUM_TRAIN), batch_size=NUM_TRAIN // num_processes, shuffle=False, collate_fn=collate
    )
    val = ResumableDataLoader(range(NUM_VAL), batch_size=2, shuffle=False, collate_fn=collate)
    before = trainer.validate(module, val, verbose=False)[0]
    trainer.fit(module, train, val)
    after = {key: value.item() for key, value in trainer.callback_metrics.items() if key.startswith("val/")}
    state = {key: value.clone() for key, value in module.state_dict().items()}
    return state, {f"before {key}": float(value) for key, value in before.items()} | after


if __name__ == "__main__":
    folder, num_processes = Path(sys.argv[1]), int(sys.argv[2])
    results = {name: step_and_validate(name, folder, num_processes) for name in CASES}
    rank = torch.distributed.get_rank()
    torch.save(results, folder / f"rank{rank}.pt")
