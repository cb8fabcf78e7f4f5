"""Activation checkpointing of our own models: frozen blocks at the bottom are neither recomputed nor gone back through.

What checkpointing does to gradients under each method's hooks is looked at in test_engine.py and the methods' files.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from lightning_peft import LISA, BAdam, CausalLM, EmbeddingsAndHead, Telly
from lightning_peft.methods.base import MethodCallback
from tests.contract.harness import trainer

NUM_BLOCKS, BATCH, LENGTH, WIDTH, HIDDEN, VOCABULARY = 4, 2, 8, 16, 24, 32
CONFIG = {
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": NUM_BLOCKS,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
}
TOKENS = BATCH * LENGTH
BLOCK = 2 * TOKENS * (4 * WIDTH * WIDTH + 3 * WIDTH * HIDDEN)  # forward FLOPs of one block's matrices


class Work(pl.Callback):
    """Per optimizer step: how often each block ran forward, and FLOPs of all matrix products."""

    def __init__(self) -> None:
        self.steps: list[tuple[list[int], int]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.forward = [0] * NUM_BLOCKS
        for index, block in enumerate(pl_module.model.model.layers):  # type: ignore

            def ran(*_: Any, index: int = index) -> None:
                self.forward[index] += 1

            block.mlp.down_proj.register_forward_pre_hook(ran)

    def on_train_batch_start(self, trainer: Any, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self.forward[:] = [0] * NUM_BLOCKS
        self.counter = FlopCounterMode(display=False)
        self.counter.__enter__()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.counter.__exit__(None, None, None)
        linear = sum(
            flops
            for op, flops in self.counter.get_flop_counts()["Global"].items()
            if op in (torch.ops.aten.mm, torch.ops.aten.addmm)
        )
        self.steps.append((list(self.forward), linear))


def run(tmp_path: Path, method: MethodCallback, checkpointing: bool, steps: int = 1) -> list[Any]:
    torch.manual_seed(0)
    module = CausalLM(config=CONFIG, attn_implementation="eager", gradient_checkpointing=checkpointing)
    ids = torch.randint(0, VOCABULARY, (steps * BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]
    work = Work()
    fit = trainer(tmp_path, [method, work], max_epochs=1, accumulate_grad_batches=1, limit_val_batches=0)
    data: Any = DataLoader(rows, batch_size=BATCH)  # type: ignore[arg-type]
    fit.fit(module, data, data)
    return work.steps


@pytest.mark.parametrize(
    ("make", "lowest"),
    [
        (lambda: Telly(3), 3),
        (lambda: Telly(0), 0),
        (lambda: BAdam("fixed", start_block=1), 1),
        (lambda: LISA(1, always=("head", "norms"), sampling=[1e-9, 1e-9, 1.0, 1e-9]), 2),
        (lambda: EmbeddingsAndHead(), 0),
        (lambda: EmbeddingsAndHead(scope=["head"]), 4),
    ],
    ids=["telly-3", "telly-0", "badam-1", "lisa-2", "embeddings-and-head", "head"],
)
def test_blocks_below_the_lowest_trainable_one_cost_one_forward_pass(
    make: Callable[[], MethodCallback], lowest: int, tmp_path: Path
) -> None:
    (plain,), (checkpointed,) = run(tmp_path, make(), False), run(tmp_path, make(), True)
    assert plain[0] == [1] * NUM_BLOCKS
    assert checkpointed[0] == [1] * lowest + [2] * (NUM_BLOCKS - lowest)
    recomputed = checkpointed[1] - plain[1]
    reached = NUM_BLOCKS - lowest
    # Recomputation stops before the last product of a block, whose output is not needed.
    last = 2 * TOKENS * WIDTH * HIDDEN
    assert recomputed in (reached * BLOCK, reached * (BLOCK - last))


def test_hidden_states_below_the_cut_are_no_part_of_the_graph() -> None:
    module = CausalLM(config=CONFIG, gradient_checkpointing=True)
    layers: Any = module.model.model.layers
    for parameter in [*module.model.get_input_embeddings().parameters(), *layers[:2].parameters()]:
        parameter.requires_grad_(False)
    seen: list[bool] = []
    for layer in layers:
        layer.register_forward_hook(lambda _, __, out: seen.append(out.requires_grad))
    module(torch.tensor([[3, 4, 5]])).sum().backward()
    assert seen == [False, False, True, True]
    assert all(p.grad is not None for p in layers[2:].parameters())
