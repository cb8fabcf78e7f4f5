"""GradualUnfreezing: from the head down, monotone, rates in the ratio 2.6, the paper's slanted triangle."""

from __future__ import annotations

import itertools
from fractions import Fraction
from math import floor
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_peft import GradualUnfreezing
from lightning_peft.core.blocks import find_structure
from lightning_peft.errors import ConfigError
from lightning_peft.methods.layers.gradual_unfreezing import layer_groups, slanted_triangular_factor
from tests.contract.harness import MODELS, TinyModule, loader, trainer

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no:UserWarning")


class Rates(pl.Callback):
    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        held = [p for group in optimizer.param_groups for p in group["params"]]
        assert len(held) == len({id(p) for p in held})
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        self.steps.append({name: rates[id(p)] for name, p in pl_module.named_parameters() if id(p) in rates})


def fit(tmp_path: Path, method: GradualUnfreezing, model: str = "gqa_decoder", **kw: Any) -> Rates:
    rates = Rates()
    trainer(tmp_path, [method, rates], **kw).fit(TinyModule(model), loader(model), loader(model, shuffle=False))
    return rates


LAYERS = {
    "gqa_decoder": [
        ["lm_head", "model.norm"],
        ["layers.3"],
        ["layers.2"],
        ["layers.1"],
        ["layers.0"],
        ["embed_tokens"],
    ],
    "tied_decoder": [["wte", "ln_f"], ["h.3"], ["h.2"], ["h.1"], ["h.0"], ["wpe"]],
    "conv_net": [["head"], ["blocks.3"], ["blocks.2"], ["blocks.1"], ["blocks.0"], ["stem"]],
}


@pytest.mark.parametrize("model", MODELS)
def test_one_layer_more_per_epoch_from_the_head_down(model: str, tmp_path: Path) -> None:
    method = GradualUnfreezing()
    fit(tmp_path, method, model, max_epochs=7)
    history = method.history
    assert [step for step, _ in history] == [0, 6, 12, 18, 24, 30]
    before: frozenset[str] = frozenset()
    for (_, now), parts in zip(history, LAYERS[model], strict=True):
        assert before < now
        assert {part for part in parts for name in now - before if f".{part}." in f".{name}"} == set(parts)
        assert all(any(f".{part}." in f".{name}" for part in parts) for name in now - before)
        before = now
    assert before == {name for name, _ in TinyModule(model).named_parameters()}


def test_period_steps_and_groups_of_blocks(tmp_path: Path) -> None:
    method = GradualUnfreezing(period_steps=2, blocks_per_group=3)
    fit(tmp_path, method)
    assert [step for step, _ in method.history] == [0, 2, 4, 6]
    assert list(method.units) == [
        "embeddings",
        "model.model.layers.0",
        "model.model.layers.1 to model.model.layers.3",
        "head",
    ]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_rate_of_each_layer_is_that_of_the_layer_above_over_decay(optimizer: str, tmp_path: Path) -> None:
    method = GradualUnfreezing(period_steps=1)
    rates = Rates()
    run = trainer(tmp_path, [method, rates])
    run.fit(TinyModule("gqa_decoder", optimizer), loader("gqa_decoder"))
    layers = list(reversed(list(method.units.values())))
    assert len(layers) == 6
    top = {"adamw": 1e-2, "sgd": 0.05}[optimizer]
    for step, found in enumerate(rates.steps):
        of_layer = [{found[name] for name in names} for names in layers]
        assert [len(each) for each in of_layer] == [1] * 6
        flat = [each.pop() for each in of_layer]
        assert flat[0] == pytest.approx(top / (1 + 0.1 * step))  # the module's own schedule goes on
        for above, below in itertools.pairwise(flat):
            assert above / below == pytest.approx(2.6)
    assert [len(group["params"]) for group in run.optimizers[0].param_groups] == [len(names) for names in layers]
    assert list(method.describe()["lr_factors"].values()) == pytest.approx([2.6**-depth for depth in range(6)])


def test_decay_of_one_keeps_the_users_rates(tmp_path: Path) -> None:
    for found in fit(tmp_path, GradualUnfreezing(lr_decay=1.0)).steps:
        assert len(set(found.values())) == 1


def test_groups_are_whole_after_a_resume(tmp_path: Path) -> None:
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.fit_loop.epoch_loop.total_batch_idx}.ckpt")

    method, rates = GradualUnfreezing(period_steps=2), Rates()
    trainer(tmp_path, [method, Save(), rates]).fit(TinyModule("gqa_decoder"), loader("gqa_decoder"))
    for batch, done in [(4, 2), (11, 6)]:
        again, more = GradualUnfreezing(period_steps=2), Rates()
        run = trainer(tmp_path, [again, more])
        run.fit(TinyModule("gqa_decoder"), loader("gqa_decoder"), ckpt_path=tmp_path / f"{batch}.ckpt")
        assert more.steps == rates.steps[-len(more.steps) :]
        assert len(more.steps) == 12 - done
        assert again.history == method.history
        held = [p for group in run.optimizers[0].param_groups for p in group["params"]]
        assert len(held) == len({id(p) for p in held}) == len(list(TinyModule("gqa_decoder").parameters()))


def paper_factor(t: int, total: int, cut_frac: Fraction, ratio: int) -> Fraction:
    """Equation 3 of the paper, exactly."""
    cut = floor(total * cut_frac)
    p = Fraction(t, cut) if t < cut else 1 - Fraction(t - cut) / (cut * (1 / cut_frac - 1))
    return (1 + p * (ratio - 1)) / ratio


@pytest.mark.parametrize(
    ("total", "cut", "ratio"), [(100, Fraction(1, 10), 32), (70, Fraction(1, 5), 8), (10, Fraction(1, 2), 32)]
)
def test_slanted_triangle_is_the_papers(total: int, cut: Fraction, ratio: int) -> None:
    found = [slanted_triangular_factor(t, total, float(cut), ratio) for t in range(total + 1)]
    assert found == pytest.approx([float(paper_factor(t, total, cut, ratio)) for t in range(total + 1)])
    assert max(found) == found[floor(total * cut)] == 1.0


@pytest.mark.parametrize("total", [1, 2, 5, 9])
def test_slanted_triangle_of_a_short_run_stays_between_its_ends(total: int) -> None:
    found = [slanted_triangular_factor(t, total) for t in range(total + 1)]
    assert all(1 / 32 <= factor <= 1 for factor in found)


def test_slanted_schedule_replaces_the_modules_own(tmp_path: Path) -> None:
    rates = fit(tmp_path, GradualUnfreezing(slanted_triangular=True, cut_fraction=0.25, ratio=16, lr_decay=2.0))
    for step, found in enumerate(rates.steps):
        factor = float(paper_factor(step, 12, Fraction(1, 4), 16))
        assert found["model.lm_head.weight"] == pytest.approx(1e-2 * factor)
        assert found["model.model.layers.2.mlp.up_proj.weight"] == pytest.approx(1e-2 * factor / 4)


def test_slanted_schedule_needs_the_number_of_steps(tmp_path: Path) -> None:
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            raise AssertionError

    with pytest.raises(ConfigError, match=r"set trainer\.max_steps or trainer\.max_epochs"):
        fit(tmp_path, GradualUnfreezing(slanted_triangular=True), max_epochs=-1)


def test_scope_limits_what_thaws(tmp_path: Path) -> None:
    method = GradualUnfreezing(period_steps=1, scope=["*.[23].*", "head"])
    fit(tmp_path, method)
    assert [len(names) for _, names in method.history] == [1, 10, 19]


def test_layers_of_an_encoder_decoder_thaw_from_the_last_registered_block() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=9, d_model=4, d_kv=2, d_ff=4, num_layers=2, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config)
    names = [name for name, _ in model.named_parameters()]
    groups = layer_groups(find_structure(model), names)
    assert [label for label in groups if "block" in label] == [
        f"{stack}.block.{index}" for stack in ("encoder", "decoder") for index in range(2)
    ]
    assert sorted(name for members in groups.values() for name in members) == sorted(names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"period_steps": 0, "lr_decay": 0.5}, r"period_steps=0 must.*lr_decay=0.5 must"),
        ({"blocks_per_group": 0}, "blocks_per_group=0"),
        ({"cut_fraction": 1.0}, r"cut_fraction=1.0 must be in \(0, 1\)"),
        ({"ratio": 0.0}, "ratio=0.0"),
    ],
)
def test_mistakes_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GradualUnfreezing(**arguments)


def test_batch_norm_of_resting_layers_keeps_its_statistics(tmp_path: Path) -> None:
    module = TinyModule("conv_net")
    before = {name: value.clone() for name, value in module.named_buffers()}
    trainer(tmp_path, [GradualUnfreezing(period_steps=6)]).fit(module, loader("conv_net"))
    moved = {name for name, value in module.named_buffers() if not torch.equal(value, before[name])}
    assert {name.split(".")[2] for name in moved} == {"3"}
