"""BAdam against a plain loop that makes a new AdamW for each block, and the promises of its card."""

from __future__ import annotations

import gc
import itertools
import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from scipy.stats import chisquare
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_peft import BAdam, TrainableTable
from lightning_peft.core.blocks import find_structure
from lightning_peft.core.masters import MasterWeights, original
from lightning_peft.core.trainable import state_bytes
from lightning_peft.errors import ConfigError, EffectError
from lightning_peft.methods.layers.badam import Order, block_at
from tests.contract.harness import (
    NUM_LAYERS,
    TinyModule,
    assert_same_weights,
    loader,
    trainer,
    weights,
)
from tests.distributed.launch import launch
from tests.methods import badam_ddp_probe
from tests.methods.test_lisa import SIZES, step_flops
from tests.models.test_examples import run as run_example
from tests.models.tiny_models import LLAMA, save_tokenizer

LLAMA_BLOCKS = [f"model.model.layers.{index}" for index in range(NUM_LAYERS)]


class Grouped(TinyModule):
    """Matrices decay, vectors do not and have another learning rate; the schedule changes both in every step."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(groups_of(dict(self.named_parameters())), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def groups_of(named: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"params": [p for p in named.values() if p.ndim > 1], "weight_decay": 0.3},
        {"params": [p for p in named.values() if p.ndim < 2], "weight_decay": 0.0, "lr": 3e-2},
    ]


def rate(step: int) -> float:
    return 1 / (1 + 0.1 * step)


# ---------------------------------------------------------------------------------------------------- order of blocks


@given(
    num_blocks=st.integers(1, 12),
    cycle=st.integers(0, 50),
    order=st.sampled_from(["random", "ascending", "descending"]),
    seed=st.integers(0, 2**31),
    start=st.integers(0, 11),
)
def test_each_cycle_visits_each_block_once(num_blocks: int, cycle: int, order: Order, seed: int, start: int) -> None:
    start_block = None if order == "random" or start >= num_blocks else start
    visits = range(cycle * num_blocks, (cycle + 1) * num_blocks)
    assert sorted(block_at(visit, num_blocks, order, start_block, seed) for visit in visits) == list(range(num_blocks))


@given(num_blocks=st.integers(1, 9), visit=st.integers(0, 1000), start=st.integers(0, 8))
def test_ordered_visits_step_by_one_and_wrap_around(num_blocks: int, visit: int, start: int) -> None:
    for order, step in (("ascending", 1), ("descending", -1)):
        here, there = (block_at(v, num_blocks, order, start % num_blocks) for v in (visit, visit + 1))
        assert (here + step) % num_blocks == there
        assert block_at(0, num_blocks, order, start % num_blocks) == start % num_blocks
    assert block_at(0, num_blocks, "ascending") == 0
    assert block_at(0, num_blocks, "descending") == num_blocks - 1
    assert block_at(visit, num_blocks, "fixed", start % num_blocks) == start % num_blocks


def test_shuffles_are_uniform_independent_and_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    cycles = [tuple(block_at(3 * cycle + place, 3, "random") for place in range(3)) for cycle in range(6000)]
    assert torch.equal(torch.get_rng_state(), before)
    permutations = list(itertools.permutations(range(3)))
    counts = Counter(cycles)
    assert chisquare([counts[p] for p in permutations]).pvalue > 0.001
    pairs = Counter(itertools.pairwise(cycles))
    assert chisquare([pairs[a, b] for a in permutations for b in permutations]).pvalue > 0.001
    other = [tuple(block_at(3 * cycle + place, 3, "random", seed=1) for place in range(3)) for cycle in range(6000)]
    assert abs(sum(a == b for a, b in zip(cycles, other, strict=True)) / 6000 - 1 / 6) < 0.02


class Visits(pl.Callback):
    """Which blocks moved in each optimizer step, told from the weights alone."""

    def __init__(self) -> None:
        self.moved: list[set[str]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.before = weights(pl_module)
        structure = find_structure(pl_module)
        self.block_of = {name: block.name for name, block in structure.block_of().items()}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.fit_loop._should_accumulate():
            return
        after = weights(pl_module)
        changed = [name for name in after if not torch.equal(after[name], self.before[name])]
        self.moved.append({self.block_of.get(name, name) for name in changed})
        self.before = after


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_visit_has_exactly_period_steps(accumulate: int, precision: str, tmp_path: Path) -> None:
    """The first one included, and counted in optimizer steps."""
    probe, method = Visits(), BAdam("ascending", period_steps=3)
    steps = 22 // accumulate
    run = trainer(tmp_path, [method, probe], accumulate_grad_batches=accumulate, precision=precision, max_steps=steps)
    run.fit(TinyModule("gqa_decoder"), loader("gqa_decoder"), loader("gqa_decoder", shuffle=False))
    expected = [{LLAMA_BLOCKS[step // 3 % NUM_LAYERS]} for step in range(len(probe.moved))]
    assert len(probe.moved) >= 11
    assert probe.moved == expected
    assert [step for step, _ in method.history] == list(range(0, len(expected), 3))


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (BAdam("descending", period_steps=1), [3, 2, 1, 0, 3]),
        (BAdam("descending", period_steps=1, start_block=1), [1, 0, 3, 2, 1]),
        (BAdam("ascending", period_steps=2, start_block=3), [3, 3, 0, 0, 1]),
        (BAdam("fixed", period_steps=1, start_block=2), [2, 2, 2, 2, 2]),
        (BAdam("random", period_steps=1, seed=3), [block_at(visit, 4, "random", seed=3) for visit in range(5)]),
    ],
    ids=lambda value: value.order if isinstance(value, BAdam) else "",
)
def test_orders_on_a_model(method: BAdam, expected: list[int], tmp_path: Path) -> None:
    probe = Visits()
    run = trainer(tmp_path, [method, probe], accumulate_grad_batches=1, max_steps=5)
    run.fit(TinyModule("tied_decoder"), loader("tied_decoder"), loader("tied_decoder", shuffle=False))
    assert probe.moved == [{f"model.transformer.h.{block}"} for block in expected]


def test_what_lies_outside_the_blocks_joins_as_blocks_of_its_own(tmp_path: Path) -> None:
    probe, method = Visits(), BAdam("ascending", period_steps=1, scope=["embeddings", "blocks", "head", "norms"])
    trainer(tmp_path, [method, probe], accumulate_grad_batches=1, max_epochs=1).fit(
        TinyModule("gqa_decoder"), loader("gqa_decoder"), loader("gqa_decoder", shuffle=False)
    )
    units = ["model.model.embed_tokens", *LLAMA_BLOCKS, "model.model.norm", "model.lm_head"]
    assert list(method.units) == units
    named = [{unit if unit in LLAMA_BLOCKS else f"{unit}.weight"} for unit in units]
    assert probe.moved == [named[step % 7] for step in range(11)]


# ---------------------------------------------------------------------------------------------------- a plain loop


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


def plain_loop(model: str, visits: Sequence[int], period: int, accumulate: int, dtype: torch.dtype) -> dict[str, Any]:
    """BAdam without a Trainer: for each visit, a new AdamW over float32 copies of one block's weights."""
    torch.manual_seed(0)
    module = Grouped(model).to(dtype)
    blocks = [block.parameters for block in find_structure(module).blocks]
    named = dict(module.named_parameters())
    batches = list(loader(model, shuffle=False))
    windows = [batches[at : at + accumulate] for at in range(0, len(batches), accumulate)] * 2  # two epochs
    copies: dict[str, Any] = {}
    for step, window in enumerate(windows):
        if step % period == 0:
            block = blocks[visits[step // period]]
            for name, parameter in named.items():
                parameter.requires_grad_(name in block)
            copies = {name: named[name].detach().float().clone().requires_grad_() for name in block}
            optimizer = torch.optim.AdamW(groups_of(copies), lr=1e-2)
            base = [group["lr"] for group in optimizer.param_groups]
        for batch in window:
            with default_dtype(dtype):
                (module.loss(batch) / accumulate).backward()
        for name, copy in copies.items():
            grad = named[name].grad
            copy.grad = None if grad is None else grad.float()
            named[name].grad = None
        torch.nn.utils.clip_grad_norm_(copies.values(), 0.5)
        for group, lr in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = lr * rate(step)
        optimizer.step()
        with torch.no_grad():
            for name, copy in copies.items():
                named[name].copy_(copy.to(dtype))
    return {"weights": weights(module), "steps": len(windows)}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("model", ["gqa_decoder", "tied_decoder"])
def test_equals_a_plain_loop(model: str, precision: str, accumulate: int, tmp_path: Path) -> None:
    """Clipping, groups with weight decay of their own, a schedule, dropout; bit for bit."""
    torch.manual_seed(0)
    module = Grouped(model)
    run = trainer(tmp_path, [BAdam(period_steps=3, seed=1)], accumulate_grad_batches=accumulate, precision=precision)
    run.fit(module, loader(model, shuffle=False), loader(model, shuffle=False))
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    visits = [block_at(visit, NUM_LAYERS, "random", seed=1) for visit in range(8)]
    expected = plain_loop(model, visits, 3, accumulate, dtype)
    assert expected["steps"] == run.global_step
    assert_same_weights(weights(module), expected["weights"])
    untouched = weights(Grouped(model).to(dtype))
    assert sum(not torch.equal(value, untouched[name]) for name, value in weights(module).items()) > 20


# ---------------------------------------------------------------------------------------------------- low precision


class Watch(pl.Callback):
    """Look at masters, optimizer state and gradients in each step, from outside the method."""

    def __init__(self, method: BAdam) -> None:
        self.method = method
        self.steps: list[dict[str, Any]] = []
        self.held: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.places = [[id(original(p)) for p in group["params"]] for group in trainer.optimizers[0].param_groups]

    def standing(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, torch.Tensor]:
        """Name -> what the optimizer holds in its place."""
        names = {id(p): name for name, p in pl_module.named_parameters()}
        groups = trainer.optimizers[0].param_groups
        assert [[id(original(p)) for p in group["params"]] for group in groups] == self.places
        return {names[id(original(p))]: p for group in groups for p in group["params"]}

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches:
            return
        state, standing = trainer.optimizers[0].state, self.standing(trainer, pl_module)
        self.now: dict[str, Any] = {
            "draw": self.method.draw_index,
            "masters": {name for name, p in standing.items() if original(p) is not p},
            "counts": {int(state[p]["step"]) for p in state},
            "fresh": all(
                torch.equal(standing[name].to(p.dtype), p) and p not in state and standing[name] not in state
                for name, p in pl_module.named_parameters()
                if name in self.method.trainable_names
            ),
            "active": self.method.trainable_names,
        }

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        standing = self.standing(trainer, pl_module)
        self.now["with_grad"] = {name for name, p in standing.items() if p.grad is not None}
        self.now["dtypes"] = {p.grad.dtype for p in standing.values() if p.grad is not None}
        self.now["shared"] = all(p.grad is standing[n].grad for n, p in pl_module.named_parameters())
        masters = [p for p in standing.values() if original(p) is not p]
        self.now["bytes"] = sum(p.nbytes + (p.grad.nbytes if p.grad is not None else 0) for p in masters)
        self.now["state_bytes"] = state_bytes([optimizer])

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.fit_loop._should_accumulate():
            return
        standing = self.standing(trainer, pl_module)
        self.now["rounded"] = all(torch.equal(p, standing[n].to(p.dtype)) for n, p in pl_module.named_parameters())
        self.now["off_grid"] = any(not torch.equal(p.float(), standing[n]) for n, p in pl_module.named_parameters())
        self.now["no_grads"] = all(p.grad is None for p in [*pl_module.parameters(), *standing.values()])
        self.steps.append(self.now)
        self.held.update({id(p): weakref.ref(p) for p in standing.values() if original(p) is not p})


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_masters_of_the_active_block_only(precision: str, tmp_path: Path) -> None:
    method = BAdam("ascending", period_steps=3)
    watch, visits = Watch(method), Visits()
    module = TinyModule("gqa_decoder", filtered=False)
    run = trainer(tmp_path, [method, watch, visits], precision=precision, gradient_clip_val=1e-3)
    run.fit(module, loader("gqa_decoder"), loader("gqa_decoder", shuffle=False))
    block = sum(p.numel() for n, p in module.named_parameters() if n.startswith(LLAMA_BLOCKS[0]))
    assert len(watch.steps) == 12
    for step, now in enumerate(watch.steps):
        assert now["masters"] == now["active"] == now["with_grad"]
        assert now["dtypes"] == {torch.float32}
        assert now["shared"]
        assert now["counts"] == ({step % 3} if step % 3 else set())  # bias correction begins anew in each visit
        assert now["fresh"] == (step % 3 == 0)
        assert now["rounded"]
        assert now["off_grid"]
        assert now["no_grads"]
        assert visits.moved[step] == {LLAMA_BLOCKS[step // 3]}
        # 4 bytes of master, 4 of gradient; 8 of moments, and a step count per tensor.
        assert now["bytes"] == 8 * block
        scalars = 4 * len(now["active"])
        assert now["state_bytes"] == (8 * block + scalars if step % 3 else 0)
    # All given back: the parameters are in their places, no master and no state is left.
    groups = run.optimizers[0].param_groups
    assert [[id(p) for p in group["params"]] for group in groups] == watch.places
    assert not run.optimizers[0].state
    gc.collect()
    assert len(watch.held) >= 4
    assert not any(reference() for reference in watch.held.values())


def test_memory_formula() -> None:
    """2 M + 16 M / D: weights; float32 master, gradient and two moments of one of D equal blocks."""
    net = nn.Sequential(*[nn.Linear(8, 8, bias=False) for _ in range(6)]).to(torch.bfloat16)
    m, d = 6 * 64, 6
    optimizer = torch.optim.AdamW(net.parameters())
    masters = MasterWeights(dict(net.named_parameters()), [optimizer])
    for parameter in net.parameters():
        parameter.requires_grad_(parameter is net[2].weight)
    masters.hold(["2.weight"])
    for _ in range(2):
        net(torch.ones(1, 8, dtype=torch.bfloat16)).sum().backward()
        masters.take_gradients(optimizer)
        grads = {g.data_ptr(): g.nbytes for p in [*net.parameters(), masters["2.weight"]] if (g := p.grad) is not None}
        moments = sum(v.nbytes for v in optimizer.state[masters["2.weight"]].values() if v.ndim)
        total = sum(p.nbytes for p in net.parameters()) + masters.num_bytes() + sum(grads.values()) + moments
        optimizer.step()
        masters.write_back(optimizer)
    assert total == 2 * m + 16 * m // d


def test_always_on_weights_keep_master_and_state_over_switches(tmp_path: Path) -> None:
    method = BAdam("ascending", period_steps=2, always=("norms",))
    watch = Watch(method)
    module = TinyModule("gqa_decoder", filtered=False)
    trainer(tmp_path, [method, watch], precision="bf16-true").fit(
        module, loader("gqa_decoder"), loader("gqa_decoder", shuffle=False)
    )
    for step, now in enumerate(watch.steps):
        assert "model.model.norm.weight" in now["masters"] == now["active"]
        assert now["counts"] == {count for count in (step, step % 2) if count}


class TrackState(pl.Callback):
    def __init__(self) -> None:
        self.counts: list[set[int]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        state = trainer.optimizers[0].state
        self.counts.append({int(state[p]["step"]) for p in state})


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_block_visited_twice_in_a_row_starts_anew(precision: str, tmp_path: Path) -> None:
    method, track = BAdam(period_steps=3, scope=LLAMA_BLOCKS[1], always=("head",)), TrackState()
    run = trainer(tmp_path, [method, track], precision=precision, accumulate_grad_batches=1, max_epochs=1)
    run.fit(TinyModule("gqa_decoder"), loader("gqa_decoder"), loader("gqa_decoder", shuffle=False))
    assert track.counts == [{step + 1, step % 3 + 1} for step in range(11)]
    track.counts.clear()
    method = BAdam("fixed", scope=LLAMA_BLOCKS[1], start_block=0, period_steps=3)
    run = trainer(tmp_path, [method, track], precision=precision, accumulate_grad_batches=1, max_epochs=1)
    run.fit(TinyModule("gqa_decoder"), loader("gqa_decoder"), loader("gqa_decoder", shuffle=False))
    assert track.counts == [{step + 1} for step in range(11)]  # one visit as long as the run


class SaveEveryBatch(pl.Callback):
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.paths: list[Path] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        path = self.directory / f"{len(self.paths):03d}.ckpt"
        trainer.save_checkpoint(path)
        self.paths.append(path)


def make_ascending() -> BAdam:
    return BAdam("ascending", period_steps=3)


def make_random() -> BAdam:
    return BAdam(period_steps=2, scope=["blocks", "head"], always=("norms",), seed=2)


def make_fixed() -> BAdam:
    return BAdam("fixed", start_block=1, always=("head",))


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
@pytest.mark.parametrize("make", [make_ascending, make_random, make_fixed])
def test_resume_from_every_micro_batch(make: Callable[[], BAdam], precision: str, tmp_path: Path) -> None:
    """Weights, masters and moments are those of the uninterrupted run, also from the middle of a visit."""

    def fit(*callbacks: pl.Callback, ckpt: Path | None = None) -> tuple[Any, Any, Any]:
        torch.manual_seed(5 if ckpt is None else 77)
        module, method = Grouped("gqa_decoder"), make()
        last = Last(method)
        run = trainer(tmp_path, [method, last, *callbacks], precision=precision)
        run.fit(module, loader("gqa_decoder"), loader("gqa_decoder", shuffle=False), ckpt_path=ckpt)
        return weights(module), last.masters, method.history

    saver = SaveEveryBatch(tmp_path)
    expected = fit(saver)
    assert len(saver.paths) == 22
    assert expected[1]
    for path in saver.paths if make is make_ascending and precision == "bf16-true" else saver.paths[::4]:
        result = fit(ckpt=path)
        assert_same_weights(result[0], expected[0])
        assert result[1].keys() == expected[1].keys()
        for name, ours in result[1].items():
            theirs = expected[1][name]
            assert torch.equal(ours["master"], theirs["master"])
            assert ours["master"].dtype == torch.float32
            assert ours["state"].keys() == theirs["state"].keys() == {"step", "exp_avg", "exp_avg_sq"}
            assert all(torch.equal(ours["state"][key], theirs["state"][key]) for key in theirs["state"])
        assert result[2] == expected[2]


class Last(pl.Callback):
    """Masters and their moments at the end of the run."""

    def __init__(self, method: BAdam) -> None:
        self.method = method

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.masters = self.method.method_state()["masters"]


def test_checkpoint_loads_without_pickled_code_and_saves_moments_once(tmp_path: Path) -> None:
    saver = SaveEveryBatch(tmp_path)
    run = trainer(tmp_path, [make_ascending(), saver], precision="bf16-true", max_epochs=1)
    run.fit(TinyModule("gqa_decoder"), loader("gqa_decoder"), loader("gqa_decoder", shuffle=False))
    checkpoint = torch.load(saver.paths[-2], weights_only=True)
    (callback,) = (value for key, value in checkpoint["callbacks"].items() if key.startswith("BAdam"))
    masters = callback["method_state"]["masters"]
    assert all(name.startswith(LLAMA_BLOCKS[1]) for name in masters)
    assert len(masters) == 9
    moments = {v["exp_avg"].untyped_storage().data_ptr() for v in checkpoint["optimizer_states"][0]["state"].values()}
    assert {v["state"]["exp_avg"].untyped_storage().data_ptr() for v in masters.values()} == moments


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_an_exception_gives_everything_back(precision: str, tmp_path: Path) -> None:
    class Breaks(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            if trainer.global_step == 2:
                raise RuntimeError("stop here")

    module = TinyModule("gqa_decoder", filtered=False)
    run = trainer(tmp_path, [BAdam("ascending", period_steps=5), Breaks()], precision=precision)
    with pytest.raises(RuntimeError, match="stop here"):
        run.fit(module, loader("gqa_decoder"), loader("gqa_decoder", shuffle=False))
    held = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in module.parameters()}
    assert all(p.requires_grad for p in module.parameters())


def test_the_fit_goes_on_when_the_trainer_is_given_more_epochs(tmp_path: Path) -> None:
    method, visits = BAdam("ascending", period_steps=4), Visits()
    module = TinyModule("gqa_decoder")
    run = trainer(tmp_path, [method, visits], max_epochs=1, precision="bf16-true")
    run.fit(module, loader("gqa_decoder"), loader("gqa_decoder", shuffle=False))
    run.validate(module, loader("gqa_decoder", shuffle=False), verbose=False)
    run.fit_loop.max_epochs = 2
    run.fit(module, loader("gqa_decoder"), loader("gqa_decoder", shuffle=False))
    assert visits.moved == [{LLAMA_BLOCKS[step // 4]} for step in range(12)]


def test_user_clipping_of_values_reaches_the_masters(tmp_path: Path) -> None:
    class Clips(TinyModule):
        def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
            torch.nn.utils.clip_grad_value_(self.parameters(), 0.0)  # over the model, not over the optimizer's groups

    module = Clips("gqa_decoder", "sgd")
    before = weights(TinyModule("gqa_decoder").to(torch.bfloat16))
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    module.configure_optimizers = lambda: optimizer
    run = trainer(tmp_path, [BAdam()], precision="bf16-true", gradient_clip_val=None)
    with pytest.raises(EffectError, match="None of the 9 parameters planned to train moved"):  # all clipped to zero
        run.fit(module, loader("gqa_decoder"), loader("gqa_decoder", shuffle=False))
    assert_same_weights(weights(module), before)


def test_table_counts_masters_in_the_place_of_their_weights(tmp_path: Path) -> None:
    from lightning_peft.report.table import trainable_rows

    rows = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            rows.append({row.part: row for row in trainable_rows(pl_module, trainer.optimizers)}["total"])

    module = TinyModule("gqa_decoder", filtered=False)
    trainer(tmp_path, [BAdam("ascending"), Look(), TrainableTable()], precision="bf16-true", max_epochs=1).fit(
        module, loader("gqa_decoder"), loader("gqa_decoder", shuffle=False)
    )
    block = sum(p.numel() for n, p in module.named_parameters() if n.startswith(LLAMA_BLOCKS[0]))
    assert rows[-1].optimizer_count == sum(p.numel() for p in module.parameters())
    assert rows[-1].state_bytes == 8 * block + 4 * 9


# ---------------------------------------------------------------------------------------------------- what else runs


class Experts(nn.Module):
    """A block with an expert that nothing is routed to."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.experts = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.experts[0](self.norm(x))


class MoE(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.blocks = nn.ModuleList([Experts() for _ in range(3)])
        self.head = nn.Linear(6, 1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x = self.stem(batch[0])
        for block in self.blocks:
            x = block(x)
        return self.head(x).float().square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.5)


def rows(num: int = 12) -> DataLoader:
    data = torch.randn(num, 6, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(data), batch_size=2)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_an_expert_without_gradient_is_left_alone(precision: str, tmp_path: Path) -> None:
    module, visits = MoE(), Visits()
    start = {name: value.clone() for name, value in module.blocks[0].experts[1].state_dict().items()}
    run = trainer(tmp_path, [BAdam("ascending", period_steps=2), visits], precision=precision, max_epochs=1)
    with pytest.warns(UserWarning, match=r"2 parameter\(s\) are planned to train but got no gradient"):
        run.fit(module, rows())
    assert [sorted(moved) for moved in visits.moved] == [["blocks.0"], ["blocks.0"], ["blocks.1"]]
    for name, value in module.blocks[0].experts[1].state_dict().items():
        assert torch.equal(value, start[name].to(value.dtype))


class Manual(MoE):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        self.clip_gradients(optimizer, 0.1)
        optimizer.step()


@pytest.mark.filterwarnings("ignore:.*got no gradient")
def test_manual_optimisation(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"gradient_clip_val": None, "accumulate_grad_batches": 1, "max_epochs": 1}
    visits = Visits()
    trainer(tmp_path, [BAdam("ascending", period_steps=2), visits], **arguments).fit(Manual(), rows())
    assert visits.moved == [{f"blocks.{step // 2}"} for step in range(6)]
    with pytest.raises(ConfigError, match=r"manual optimisation.*blocks\.0\..* is torch.bfloat16"):
        trainer(tmp_path, [BAdam()], precision="bf16-true", **arguments).fit(Manual(), rows())


def test_a_gradient_scaler_is_refused(tmp_path: Path) -> None:
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(ConfigError, match="gradient scaler"):
        trainer(tmp_path, [BAdam()], plugins=[plugin]).fit(MoE().to(torch.bfloat16), rows())


def test_mistakes_are_told_together_with_the_nearest_choice() -> None:
    with pytest.raises(ConfigError, match=r"order='asending' is no order.*'ascending'.*period_steps=0.*start_block=-1"):
        BAdam("asending", period_steps=0, start_block=-1)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="say which with start_block"):
        BAdam("fixed")
    with pytest.raises(ConfigError, match="leave start_block out"):
        BAdam(start_block=1)
    for bad in (2.5, True, "epoch", None):
        with pytest.raises(ConfigError, match="period_steps="):
            BAdam(period_steps=bad)  # pyright: ignore[reportArgumentType]


def test_a_start_block_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"3 block\(s\), numbered 0 to 2.*start_block=4"):
        trainer(tmp_path, [BAdam("ascending", start_block=4)]).fit(MoE(), rows())


# ---------------------------------------------------------------------------------------------------- cost, processes


def test_flops_of_a_cycle_against_arithmetic(tmp_path: Path) -> None:
    """Back-propagation ends at the active block; nothing else gets a weight gradient."""
    from tests.oracles.llama_flops import MATRICES

    ratios = []
    for block in (0, 8, 15):
        measured, in_graph = step_flops([BAdam("fixed", start_block=block)], tmp_path)
        trained = [(block, matrix) for matrix in MATRICES]
        expected = SIZES.forward() + SIZES.backward(trained, False, [block]) - SIZES.head()  # the head is frozen
        assert measured == pytest.approx(expected, rel=1e-3)
        assert in_graph == [layer >= block for layer in range(SIZES.num_layers)]
        ratios.append(measured / SIZES.full())
    assert ratios == pytest.approx([0.730, 0.543, 0.380], abs=0.012)  # measured elsewhere, another small Llama


def save_llama(folder: Path) -> None:
    """A tiny model and tokenizer, as a user has them."""
    values = dict(LLAMA)
    torch.manual_seed(0)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    save_tokenizer(folder)


@pytest.mark.parametrize("order", ["random", "descending"])
def test_example_learns_to_count(order: str, tmp_path: Path) -> None:
    out = run_example("badam.py", "--order", order, cwd=tmp_path)
    (loss,) = re.findall(r"^loss: ([\d.]+)$", out, flags=re.MULTILINE)
    assert float(loss) < 0.3  # log(32) = 3.5 at the start
    held, full = map(int, re.findall(r"(\d+) bytes", out))
    assert held < 0.15 * full
    assert (tmp_path / "finetuned" / "model.safetensors").exists()


def test_example_on_a_given_model(tmp_path: Path) -> None:
    save_llama(tmp_path / "model")
    (tmp_path / "my.txt").write_text(" ".join(f"w{i % 24}" for i in range(2000)))
    arguments = ["--model=model", "--text=my.txt", "--steps=60", "--period-steps=5", "--lr=1e-2"]
    out = run_example("badam.py", *arguments, cwd=tmp_path)
    assert float(re.findall(r"^loss: ([\d.]+)$", out, flags=re.MULTILINE)[0]) < 2.0
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "finetuned")
    assert tuned.dtype == torch.bfloat16


@pytest.mark.distributed
def test_two_processes_in_bfloat16(tmp_path: Path) -> None:
    """Equal weights and masters on both ranks, close to one process on the joined batch, exact resume mid-visit."""
    launch(Path(badam_ddp_probe.__file__), str(tmp_path))
    left, right = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    single = badam_ddp_probe.fit(tmp_path)
    assert_same_weights(left["weights"], right["weights"])
    start = weights(TinyModule(badam_ddp_probe.MODEL).to(torch.bfloat16))
    ours, theirs = (
        torch.cat([(result["weights"][name].float() - start[name].float()).flatten() for name in start])
        for result in (left, single)
    )
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.97  # Adam turns rounding of tiny gradients into steps
    assert left["masters"].keys() == right["masters"].keys() == single["masters"].keys() != set()
    for name, master in left["masters"].items():
        assert torch.equal(master, right["masters"][name])
        assert not torch.equal(master, master.to(torch.bfloat16).float())
    assert left["history"] == right["history"] == single["history"]
    for rank in (left, right):
        for position in badam_ddp_probe.POSITIONS:
            resumed = rank[f"resumed/{position}"]
            assert_same_weights(resumed["weights"], rank["weights"])
            for name, master in rank["masters"].items():
                assert torch.equal(resumed["masters"][name], master)


class PowerCut(pl.Callback):
    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx + 1 == 9:
            raise RuntimeError("power cut")


@pytest.mark.filterwarnings(
    "ignore:.*was called without a model", "ignore:.*no last checkpoint available", "ignore:Checkpoint directory"
)
def test_masters_are_in_what_is_saved_on_an_exception(tmp_path: Path) -> None:
    def fit(*callbacks: pl.Callback, ckpt: Path | None = None) -> dict[str, torch.Tensor]:
        torch.manual_seed(5 if ckpt is None else 77)
        module = Grouped("gqa_decoder")
        run = trainer(tmp_path, [make_ascending(), *callbacks], precision="bf16-true", enable_checkpointing=True)
        run.fit(module, loader("gqa_decoder"), loader("gqa_decoder", shuffle=False), ckpt_path=ckpt)
        return weights(module)

    expected = fit()
    with pytest.raises(RuntimeError, match="power cut"):
        fit(PowerCut(), OnExceptionCheckpoint(tmp_path, "cut"))
    saved = torch.load(tmp_path / "cut.ckpt", weights_only=True)
    assert any(state["method_state"]["masters"] for key, state in saved["callbacks"].items() if "BAdam" in key)
    assert_same_weights(fit(ckpt=tmp_path / "cut.ckpt"), expected)
