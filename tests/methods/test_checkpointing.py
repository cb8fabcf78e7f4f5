"""Activation checkpointing: every method's gradients are what they are without it, or it is refused before training.

In our own models, frozen blocks at the bottom are neither recomputed nor gone back through.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from lightning_peft import (
    HFT,
    IST,
    LISA,
    AutoRGN,
    BAdam,
    BitFit,
    CausalLM,
    DropBP,
    EmbeddingsAndHead,
    FinetuningSchedule,
    GradualUnfreezing,
    LastLayer,
    RandomTuning,
    RiFT,
    Spectrum,
    Surgical,
    Telly,
)
from lightning_peft.errors import ConfigError
from lightning_peft.methods.base import MethodCallback
from tests.contract.harness import TinyModule, loader, trainer

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


# ---------------------------------------------------------------------------------------------------- every method


class User(TinyModule):
    """A user's module, checkpointed in either way, with or without what transformers puts on the embeddings for it."""

    def __init__(self, use_reentrant: bool | None, hooked: bool = False) -> None:
        super().__init__("gqa_decoder")
        model: Any = self.model
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0
        if use_reentrant is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # newer transformers have another name for it
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
            if not hooked:
                model.disable_input_require_grads()


class Gradients(pl.Callback):
    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: pl.LightningModule, optimizer: Any) -> None:
        self.steps.append({n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None})


def gradients_of(tmp_path: Path, module: User, method: MethodCallback) -> list[dict[str, torch.Tensor]]:
    gradients = Gradients()
    run = trainer(tmp_path, [method, gradients], max_epochs=1, limit_val_batches=0)
    run.fit(module, loader("gqa_decoder"), loader("gqa_decoder", shuffle=False))
    return gradients.steps


ON = ("embeddings", "head", "norms")
THAWING: dict[int, Any] = {0: {"params": ["head"], "max_steps": 2}, 1: {"params": ["*.[23].*"], "lr": 1e-3}}
LASTING: dict[int, Any] = {
    0: {"params": ["head", "embeddings"], "max_steps": 2},
    1: {"params": ["*.[23].*"], "freeze": ["head"], "lr": 1e-3},
}
# Whether the embeddings train all the time: if not, reentrant checkpointing would starve the blocks.
EVERY: dict[str, tuple[Callable[[], MethodCallback], bool]] = {
    "lisa": (lambda: LISA(1, period_steps=2), True),
    "lisa_frozen": (lambda: LISA(1, period_steps=2, always=("head",)), False),
    "hft": (lambda: HFT(redraw=2), True),
    "hft_frozen": (lambda: HFT(redraw=2, always=("head",)), False),
    "ist": (lambda: IST(0.5, score_period_steps=2, scope="blocks", always=ON), True),
    "ist_frozen": (lambda: IST(0.5, score_period_steps=2, scope="blocks"), False),
    "badam": (lambda: BAdam(period_steps=2, always=ON), True),
    "badam_in_turn": (lambda: BAdam("descending", period_steps=1, scope=["blocks", "embeddings"]), False),
    "dropbp": (lambda: DropBP(0.5), True),
    "dropbp_frozen": (lambda: DropBP(0.5, always=("head",)), False),
    "telly": (lambda: Telly(2), False),
    "spectrum": (lambda: Spectrum(0.5), True),
    "surgical": (lambda: Surgical(1, 2), False),
    "random_tuning": (lambda: RandomTuning(0.3, scope="blocks", redraw=2, always=("embeddings",)), True),
    "bitfit": (lambda: BitFit(scope=["norms"]), False),
    "embeddings_and_head": (lambda: EmbeddingsAndHead(), True),
    "last_layer": (lambda: LastLayer(2), False),
    "gradual_unfreezing": (lambda: GradualUnfreezing(period_steps=1), False),
    "schedule": (lambda: FinetuningSchedule(THAWING), False),
    "schedule_lasting": (lambda: FinetuningSchedule(LASTING), True),
    "auto_rgn": (lambda: AutoRGN(num_batches=1), True),
    "rift": (lambda: RiFT(epochs=1, num_batches=1, interpolation_steps=0, score_on="train"), False),
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("row", EVERY)
def test_gradients_are_those_without_checkpointing(row: str, tmp_path: Path) -> None:
    make, lasting = EVERY[row]
    expected = gradients_of(tmp_path, User(None), make())
    assert len(expected) == 6
    for use_reentrant, hooked in ((False, False), (False, True), (True, True), (True, False)):
        if use_reentrant and not hooked and not lasting:
            with pytest.raises(ConfigError, match="reentrant activation checkpointing while the embeddings are frozen"):
                gradients_of(tmp_path, User(use_reentrant), make())
            continue
        found = gradients_of(tmp_path, User(use_reentrant, hooked), make())
        assert [step.keys() for step in found] == [step.keys() for step in expected], (use_reentrant, hooked)
        for ours, theirs in zip(found, expected, strict=True):
            for name in theirs:
                torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(("use_reentrant", "hooked", "told"), [(False, True, True), (False, False, False)])
def test_a_needless_full_backward_pass_is_told(
    use_reentrant: bool, hooked: bool, told: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        gradients_of(tmp_path, User(use_reentrant, hooked), Telly(2))
    assert ("call disable_input_require_grads() on the model" in caplog.text) == told
    caplog.clear()
    gradients_of(tmp_path, User(use_reentrant, hooked), LISA(1, period_steps=2))  # goes back to the embeddings anyway
    assert "disable_input_require_grads" not in caplog.text


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_head_alone_needs_no_blocks(tmp_path: Path) -> None:
    """Nothing in the blocks trains, so that nothing is starved."""
    steps = gradients_of(tmp_path, User(use_reentrant=True), EmbeddingsAndHead(scope=["head"]))
    assert all(step.keys() == {"model.lm_head.weight"} for step in steps)
