"""LISA against its paper: the draw, what is always on, what back-propagation skips, and what a step costs."""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from scipy.stats import chi2, chisquare
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from lightning_peft import HFT, LISA
from lightning_peft.core.blocks import find_structure
from lightning_peft.core.draw import draw_generator
from lightning_peft.errors import ConfigError, ScopeError
from lightning_peft.methods.base import MethodCallback
from lightning_peft.methods.layers.lisa import sample_blocks
from tests.contract.harness import NUM_LAYERS, gqa_decoder, tied_decoder, trainer
from tests.oracles.llama_flops import MATRICES, Llama

NUM_DRAWS = 10_000


def bound(method: MethodCallback, model: nn.Module, frozen: Sequence[str] = ()) -> MethodCallback:
    """``method`` with its first draw on ``model``, without a Trainer."""
    structure = find_structure(model)
    method.bind(structure, {name: name not in frozen for name in structure.parameters})
    method.begin(0, 0, 0, continues=False)
    return method


def names_of(model: nn.Module, *prefixes: str) -> set[str]:
    return {n for n, _ in model.named_parameters() if n.startswith(prefixes)}


# ---------------------------------------------------------------------------------------------------- the draw


@pytest.mark.parametrize(("num_blocks", "num_active"), [(8, 2), (5, 1), (6, 4)])
def test_draws_are_uniform_over_all_subsets(num_blocks: int, num_active: int) -> None:
    drawn = Counter(
        tuple(sample_blocks(num_blocks, num_active, draw_generator(0, index, "blocks"))) for index in range(NUM_DRAWS)
    )
    subsets = list(itertools.combinations(range(num_blocks), num_active))
    assert set(drawn) == set(subsets)
    assert chisquare([drawn[subset] for subset in subsets]).pvalue > 0.001
    # Marginals. Without replacement they are negatively correlated, which shrinks the statistic's scale.
    marginals = [sum(count for subset, count in drawn.items() if block in subset) for block in range(num_blocks)]
    assert sum(marginals) == NUM_DRAWS * num_active
    share = num_active / num_blocks
    scale = NUM_DRAWS * share * (1 - share) * num_blocks / (num_blocks - 1)
    statistic = sum((count - NUM_DRAWS * share) ** 2 for count in marginals) / scale
    assert chi2.sf(statistic, num_blocks - 1) > 0.001


def test_successive_draws_are_independent() -> None:
    """Also of each other: the pair of two draws in a row is uniform, and seeds 0 and 1 are not shifted copies."""
    draws = [sample_blocks(4, 1, draw_generator(0, index, "blocks"))[0] for index in range(NUM_DRAWS)]
    pairs = Counter(itertools.pairwise(draws))
    assert chisquare([pairs[a, b] for a in range(4) for b in range(4)]).pvalue > 0.001
    other = [sample_blocks(4, 1, draw_generator(1, index, "blocks"))[0] for index in range(NUM_DRAWS)]
    for shift in range(3):
        same = sum(a == b for a, b in zip(draws[shift:], other, strict=False)) / (NUM_DRAWS - shift)
        assert abs(same - 0.25) < 0.02


@pytest.mark.parametrize("num_layers", range(1, NUM_LAYERS + 1))
def test_every_window_has_exactly_gamma_blocks(num_layers: int) -> None:
    model = gqa_decoder()
    method = bound(LISA(num_layers, period_steps=5), model)
    always = names_of(model, "model.embed_tokens", "lm_head", "model.norm")
    seen = set()
    for step in range(100):
        changed = method.advance(step, epoch=0, global_step=step)
        assert changed == (step % 5 == 0 and step > 0)
        active = method.active_units()
        assert len(active) == num_layers
        assert method.draw_index == step // 5
        expected = names_of(model, *(f"{block}." for block in active)) | always
        assert method.trainable_names == expected
        seen |= set(active)
    assert len(seen) == NUM_LAYERS
    assert [step for step, _ in method.history] == list(range(0, 100, 5))


def test_draws_depend_on_seed_and_index_alone() -> None:
    def blocks(seed: int, model_seed: int) -> list[tuple[str, ...]]:
        torch.manual_seed(model_seed)
        method = bound(LISA(1, period_steps=1, seed=seed), gqa_decoder())
        draws = []
        for step in range(12):
            method.advance(step, 0, step)
            torch.rand(3)
            draws.append(tuple(method.active_units()))
        return draws

    assert blocks(0, 1) == blocks(0, 2)
    assert blocks(0, 1) != blocks(1, 1)
    # A run that resumes at draw 7 asks for draw 7 only.
    late = bound(LISA(1, period_steps=1), gqa_decoder())
    late.advance(7, 0, 7)
    assert tuple(late.active_units()) == blocks(0, 1)[7]


def test_more_layers_than_blocks_warns_and_trains_all() -> None:
    model = gqa_decoder()
    with pytest.warns(UserWarning, match=rf"LISA\(num_layers=9\) on {NUM_LAYERS} block"):
        method = bound(LISA(9, period_steps=1), model)
    assert method.trainable_names == {name for name, _ in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        method.advance(1, 0, 1)
        bound(LISA(NUM_LAYERS), model)


# ---------------------------------------------------------------------------------------------------- always


PARTS = {"embeddings": ("model.embed_tokens",), "head": ("lm_head",), "norms": ("model.norm",)}


@pytest.mark.parametrize("always", [c for n in range(4) for c in itertools.combinations(PARTS, n)])
def test_each_part_of_always_can_be_switched_off(always: tuple[str, ...]) -> None:
    model = gqa_decoder()
    method = bound(LISA(1, always=always), model)
    prefixes = tuple(prefix for part in always for prefix in PARTS[part])
    expected = names_of(model, *prefixes) if prefixes else set()
    (block,) = method.active_units()
    assert method.trainable_names == expected | names_of(model, f"{block}.")
    assert method.describe()["always_units"] == list(always)


def test_norms_of_resting_blocks_rest() -> None:
    method = bound(LISA(1, always=("norms",)), gqa_decoder())
    (block,) = method.active_units()
    norms = {name for name in method.trainable_names if "norm" in name and not name.startswith(f"{block}.")}
    assert norms == {"model.norm.weight"}


@pytest.mark.parametrize("always", [("embeddings",), ("head",), ("lm_head.weight",), ("head", "embeddings")])
def test_tied_embeddings_train_if_either_name_does(always: tuple[str, ...]) -> None:
    model = tied_decoder()
    method = bound(LISA(1, always=always), model)
    outside = {name for name in method.trainable_names if ".h." not in name}
    positions = {"transformer.wpe.weight"} if "embeddings" in always else set()
    assert outside == {"transformer.wte.weight"} | positions


def test_tied_embeddings_rest_if_neither_name_trains() -> None:
    method = bound(LISA(1, always=("norms",)), tied_decoder())
    assert "transformer.wte.weight" not in method.selectable


def test_scope_limits_the_draw() -> None:
    model = gqa_decoder()
    method = bound(LISA(1, period_steps=1, scope=["model.layers.1", "model.layers.3"]), model)
    drawn = set()
    for step in range(20):
        method.advance(step, 0, step)
        drawn |= set(method.active_units())
    assert drawn == {"model.layers.1", "model.layers.3"}
    part = bound(LISA(1, scope=["blocks", "!*.mlp.*"], always=()), model)
    assert all(".mlp." not in name for name in part.selectable)
    assert len(part.units) == NUM_LAYERS


def test_what_the_user_froze_stays_frozen_unless_named() -> None:
    model = gqa_decoder()
    frozen = sorted(names_of(model, "model.layers.0.", "lm_head"))
    method = bound(LISA(NUM_LAYERS - 1), model, frozen)
    assert method.trainable_names == {name for name, _ in model.named_parameters()} - set(frozen)
    named = bound(LISA(NUM_LAYERS, scope="model.layers.*", always=("lm_head",)), model, frozen)
    assert set(frozen) <= named.trainable_names


# ---------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("number", [0, -1, 1.5, True, "two", None, float("inf"), float("nan")])
@pytest.mark.parametrize("argument", ["num_layers", "period_steps"])
def test_numbers_out_of_range(argument: str, number: Any) -> None:
    with pytest.raises(ConfigError, match=rf"LISA\({argument}=.*whole numbers, at least 1"):
        LISA(**{argument: number})


def test_a_schedule_word_is_no_number_of_steps() -> None:
    with pytest.raises(ConfigError, match=r"period_steps='epoch'"):
        LISA(period_steps="epoch")  # pyright: ignore[reportArgumentType]


def test_both_mistakes_are_told_together() -> None:
    with pytest.raises(ConfigError, match=r"LISA\(num_layers=0, period_steps=-3\)"):
        LISA(0, -3)


def test_whole_floats_are_taken_as_numbers() -> None:
    method = LISA(2.0, 5.0)  # pyright: ignore[reportArgumentType]
    assert (method.num_layers, method.period_steps) == (2, 5)
    assert all(isinstance(value, int) for value in (method.num_layers, method.period_steps))


def test_unknown_policy_and_scope() -> None:
    with pytest.raises(ConfigError, match="'drop'"):
        LISA(state="dropp")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ScopeError, match=r"Did you mean 'model\.layers"):
        bound(LISA(scope="model.layer"), gqa_decoder())
    with pytest.raises(ScopeError, match=r"always='embedings'.*'embeddings'"):
        bound(LISA(always=("embedings",)), gqa_decoder())
    with pytest.raises(ScopeError, match="matches no parameter"):
        bound(LISA(), nn.Linear(2, 2))  # a model without blocks


# ---------------------------------------------------------------------------------------------------- cost of a step


SIZES = Llama(num_layers=16, width=64, hidden=172, vocabulary=256, batch=1, length=64)


class Counted(pl.LightningModule):
    """A 16-layer Llama that notes which blocks' outputs are part of the autograd graph."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=SIZES.vocabulary,
            hidden_size=SIZES.width,
            intermediate_size=SIZES.hidden,
            num_hidden_layers=SIZES.num_layers,
            num_attention_heads=4,
            max_position_embeddings=SIZES.length,
        )
        config._attn_implementation = "eager"  # its products are counted one by one
        self.net = LlamaForCausalLM(config)
        self.in_graph: list[bool] = []
        for layer in self.net.model.layers:
            layer.register_forward_hook(self.look)

    def look(self, layer: nn.Module, inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        self.in_graph.append(hidden.grad_fn is not None)

    def training_step(self, batch: Sequence[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.net(input_ids=batch[0], labels=batch[0], use_cache=False).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def step_flops(methods: Sequence[MethodCallback], tmp_path: Path) -> tuple[int, list[bool]]:
    """FLOPs of one optimizer step under a Trainer, and which blocks were in the graph."""
    module = Counted()
    ids = torch.randint(0, SIZES.vocabulary, (SIZES.batch, SIZES.length), generator=torch.Generator().manual_seed(0))
    run = trainer(tmp_path, methods, max_epochs=1, accumulate_grad_batches=1, limit_val_batches=0)
    with FlopCounterMode(display=False) as counter:
        run.fit(module, DataLoader(TensorDataset(ids), batch_size=SIZES.batch))
    assert run.global_step == 1
    return counter.get_total_flops(), module.in_graph


def trained_matrices(method: MethodCallback) -> set[tuple[int, str]]:
    _, names = method.history[-1]
    return {
        (layer, matrix)
        for layer in range(SIZES.num_layers)
        for matrix in MATRICES
        if any(f".layers.{layer}." in name and f".{matrix}_proj." in name for name in names)
    }


def layers(*indices: int) -> list[str]:
    return [f"net.model.layers.{index}" for index in indices]


# Method, whether embeddings train, and the ratio to full fine-tuning that was measured for it on another 16-layer Llama
# with about the same shares of head and attention.
COSTS: dict[str, tuple[MethodCallback, bool, float]] = {
    "lisa": (LISA(2), True, 0.754),
    "lisa_top": (LISA(2, scope=layers(14, 15), always=("head", "norms")), False, 0.427),
    "lisa_middle": (LISA(2, scope=layers(3, 9), always=("head", "norms")), False, 0.684),
    "lisa_bottom": (LISA(2, scope=layers(0, 1), always=("head", "norms")), False, 0.754),
    "hft": (HFT(), True, 0.859),
}


@pytest.mark.parametrize("case", COSTS)
def test_flops_of_a_step(case: str, tmp_path: Path) -> None:
    method, embeddings, published = COSTS[case]
    full = SIZES.full()
    share = (SIZES.head() + SIZES.num_layers * SIZES.attention()) / SIZES.forward()
    assert share == pytest.approx(0.155, abs=0.003)  # so that the published ratios apply

    measured, in_graph = step_flops([method], tmp_path)
    trained = trained_matrices(method)
    active = {layer for layer, _ in trained}
    norms_in = active if case != "hft" else set(range(SIZES.num_layers))
    expected = SIZES.forward() + SIZES.backward(trained, embeddings, norms_in)
    assert measured == pytest.approx(expected, rel=1e-3)
    assert measured / full == pytest.approx(published, abs=0.01)

    # The graph begins at the lowest block that trains, or at the embeddings.
    lowest = 0 if embeddings else min(active)
    assert in_graph == [layer >= lowest for layer in range(SIZES.num_layers)]


def test_flops_of_full_fine_tuning(tmp_path: Path) -> None:
    measured, _ = step_flops([], tmp_path)
    assert measured == pytest.approx(SIZES.full(), rel=1e-3)
