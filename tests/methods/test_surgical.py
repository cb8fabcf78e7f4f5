"""Surgical fine-tuning: the group, what stays untouched, and running statistics."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_peft import LISA, Surgical
from lightning_peft.core.blocks import find_structure
from lightning_peft.errors import ConfigError
from lightning_peft.methods.base import MethodCallback
from lightning_peft.methods.layers.surgical import contiguous_groups
from tests.contract.harness import (
    NUM_LAYERS,
    TinyModule,
    assert_same_weights,
    gqa_decoder,
    loader,
    trainer,
    weights,
)


def bound(method: MethodCallback, model: nn.Module) -> MethodCallback:
    structure = find_structure(model)
    method.bind(structure, dict.fromkeys(structure.parameters, True))
    method.begin(0, 0, 0, continues=False)
    return method


def names_of(model: nn.Module, *prefixes: str) -> set[str]:
    return {n for n, _ in model.named_parameters() if n.startswith(prefixes)}


@given(num_blocks=st.integers(1, 40), data=st.data())
def test_groups_cut_the_blocks_up(num_blocks: int, data: st.DataObject) -> None:
    num_groups = data.draw(st.integers(1, num_blocks))
    groups = contiguous_groups(num_blocks, num_groups)
    assert [block for group in groups for block in group] == list(range(num_blocks))
    sizes = [len(group) for group in groups]
    assert len(sizes) == num_groups
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("group", "num_groups", "layers"),
    [(0, 4, [0]), (-1, 4, [3]), (1, 2, [2, 3]), (-2, 2, [0, 1]), (0, 3, [0, 1]), (2, 3, [3]), (0, 1, [0, 1, 2, 3])],
)
def test_only_the_group_trains(group: int, num_groups: int, layers: list[int]) -> None:
    model = gqa_decoder()
    prefixes = [f"model.layers.{index}." for index in layers]
    method = bound(Surgical(group, num_groups), model)
    assert method.trainable_names == names_of(model, *prefixes)
    assert method.before_wrap() == method.trainable_names
    with_ends = bound(Surgical(group, num_groups, always=("embeddings", "head")), model)
    assert with_ends.trainable_names == names_of(model, *prefixes, "model.embed_tokens", "lm_head")


def test_scope_is_what_is_cut() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(vocab_size=19, d_model=8, d_ff=12, d_kv=4, num_layers=2, num_heads=2))
    assert bound(Surgical(1, 4), model).trainable_names == names_of(model, "encoder.block.1.")
    assert bound(Surgical(0, 2, scope="decoder.block"), model).trainable_names == names_of(model, "decoder.block.0.")


class Shifted(TinyModule):
    """A CNN whose running statistics are those of other data, as after pretraining."""

    def __init__(self, calls_train: bool = False) -> None:
        super().__init__("conv_net")
        self.calls_train = calls_train
        generator = torch.Generator().manual_seed(0)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.copy_(torch.randn(4, generator=generator))  # pyright: ignore[reportOptionalMemberAccess]
                module.running_var.copy_(1 + torch.rand(4, generator=generator))  # pyright: ignore[reportOptionalMemberAccess]

    def on_train_epoch_start(self) -> None:
        if self.calls_train:
            self.train()


@pytest.mark.parametrize("calls_train", [False, True])
@pytest.mark.parametrize("group", [0, 1, -1])
def test_running_statistics_are_frozen_also_where_norms_train(group: int, calls_train: bool, tmp_path: Path) -> None:
    module = Shifted(calls_train)
    before = weights(module)
    layers: Any = module.model.blocks
    run = trainer(tmp_path, [Surgical(group)])
    run.fit(module, loader("conv_net"), loader("conv_net", shuffle=False))
    after = weights(module)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == {f"model.blocks.{group % NUM_LAYERS}.{name}" for name, _ in layers[group].named_parameters()}
    assert all(norm.training for norm in module.modules() if isinstance(norm, nn.BatchNorm2d))  # given back


def test_norms_that_train_use_their_running_statistics(tmp_path: Path) -> None:
    """Against a loop in plain torch: evaluation mode of norms, only the group's parameters in the optimizer."""

    class Plain(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.batches: list[Sequence[torch.Tensor]] = []

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self.batches.append(batch)

    module = Shifted()
    module.model.dropout.p = 0.0  # pyright: ignore[reportAttributeAccessIssue]
    seen = Plain()
    run = trainer(tmp_path, [Surgical(2), seen], max_epochs=1, accumulate_grad_batches=1, gradient_clip_val=None)
    run.fit(module, loader("conv_net"), loader("conv_net", shuffle=False))

    other = Shifted().eval()
    group: Any = other.model.blocks[2]  # pyright: ignore[reportIndexIssue]
    optimizer = torch.optim.AdamW(group.parameters(), lr=1e-2, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.1 * step))
    assert len(seen.batches) == 11
    for batch in seen.batches:
        optimizer.zero_grad()
        other.loss(batch).backward()
        optimizer.step()
        schedule.step()
    for name, value in weights(other).items():
        torch.testing.assert_close(weights(module)[name], value, msg=name)


def test_beside_a_method_that_redraws(tmp_path: Path) -> None:
    """The other method's switches do not wake the statistics."""
    module = Shifted()
    before = {name: value.clone() for name, value in module.named_buffers()}
    methods = [Surgical(0, 1, scope="*.blocks.[01].*"), LISA(1, period_steps=1, scope="*.blocks.[23].*")]
    trainer(tmp_path, methods).fit(module, loader("conv_net"), loader("conv_net", shuffle=False))
    assert all(torch.equal(value, before[name]) for name, value in module.named_buffers())


def test_all_groups_as_one_is_full_fine_tuning_of_a_model_without_running_statistics(tmp_path: Path) -> None:
    results = []
    for methods in ([Surgical(0, 1, always=("embeddings", "head", "norms"))], []):
        torch.manual_seed(0)
        module = TinyModule("gqa_decoder")
        trainer(tmp_path, methods).fit(module, loader("gqa_decoder"), loader("gqa_decoder", shuffle=False))
        results.append(weights(module))
    assert_same_weights(*results)


@pytest.mark.parametrize("group", [4, -5, 0.5, True, "first", None])
def test_no_such_group(group: Any) -> None:
    with pytest.raises(ConfigError, match=r"Surgical\(group=.*from -4 to 3"):
        Surgical(group)


@pytest.mark.parametrize("num_groups", [0, -1, 1.5, True, "four"])
def test_no_such_number_of_groups(num_groups: Any) -> None:
    with pytest.raises(ConfigError, match="num_groups="):
        Surgical(0, num_groups)


def test_more_groups_than_blocks() -> None:
    with pytest.raises(ConfigError, match=rf"num_groups=9.*{NUM_LAYERS} block"):
        bound(Surgical(0, 9), gqa_decoder())
