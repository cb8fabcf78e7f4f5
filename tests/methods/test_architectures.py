"""Every method on eight architectures: what it selects is held against names, and it trains exactly that.

What a model's blocks, embeddings, head and norms are is told by hand, in the table of ``tests/core/test_blocks.py``.
"""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_peft import (
    HFT,
    IST,
    LISA,
    AutoRGN,
    BAdam,
    BitFit,
    CoFiTune,
    DropBP,
    EmbeddingsAndHead,
    FinetuningSchedule,
    GradualUnfreezing,
    GreenTrainer,
    LastLayer,
    RandomTuning,
    RiFT,
    SearchedSubset,
    Spectrum,
    Surgical,
    Telly,
)
from lightning_peft.cli.methods import method_classes
from lightning_peft.core.draw import Draw
from lightning_peft.methods.base import MethodCallback
from tests.contract.harness import Probe, TinyModule, trainer
from tests.core.test_blocks import CASES, expand, model_of, structure_of

ARCHITECTURES = ["llama", "gpt2", "mixtral", "bert", "t5", "vit", "whisper", "mamba"]
ALWAYS = ("embeddings", "head", "norms")


@dataclass(frozen=True)
class World:
    """A model as the table has it."""

    numels: dict[str, int]
    ndims: dict[str, int]
    blocks: tuple[frozenset[str], ...]
    embeddings: frozenset[str]
    head: frozenset[str]
    norms: frozenset[str]

    @property
    def inside(self) -> frozenset[str]:
        return frozenset().union(*self.blocks)

    @property
    def always(self) -> frozenset[str]:
        return self.embeddings | self.head | self.norms

    def size(self, names: Any) -> int:
        return sum(self.numels[name] for name in names)

    def touched(self, names: frozenset[str]) -> list[int]:
        return [index for index, block in enumerate(self.blocks) if block & names]


@cache
def world(name: str) -> World:
    case, model = CASES[name], model_of(name)
    named = dict(model.named_parameters())
    prefixes = [f"{stack}.{index}." for stack, count in case.blocks.items() for index in range(count)]
    blocks = tuple(frozenset(n for n in named if n.startswith(prefix)) for prefix in prefixes)
    assert all(blocks)
    embeddings, head, norms = (frozenset(expand(model, paths)) for paths in (case.embeddings, case.head, case.norms))
    return World(
        {n: p.numel() for n, p in named.items()},
        {n: p.ndim for n, p in named.items()},
        blocks,
        embeddings,
        head,
        norms - embeddings,
    )


# ---------------------------------------------------------------------------------------------------- what is selected

Check = Callable[[World, list[frozenset[str]]], None]


def whole_blocks(count: Callable[[int], int], beside: str = "always") -> Check:
    """So many blocks, each of them whole, and nothing else but what always trains."""

    def check(w: World, draws: list[frozenset[str]]) -> None:
        extra = {"always": w.always, "head": w.head, "none": frozenset()}[beside]
        for names in draws:
            touched = w.touched(names - extra)
            assert len(touched) == count(len(w.blocks))
            assert names == extra.union(*(w.blocks[index] for index in touched))
        if 0 < count(len(w.blocks)) < len(w.blocks):
            assert len({frozenset(names) for names in draws}) > 1

    return check


def exactly(expected: Callable[[World, int], Any]) -> Check:
    """These names in the draw of this number."""

    def check(w: World, draws: list[frozenset[str]]) -> None:
        for index, names in enumerate(draws):
            assert names == frozenset(expected(w, index))

    return check


def half_of_every_block(w: World, draws: list[frozenset[str]]) -> None:
    for names in draws:
        assert w.always <= names
        assert names - w.inside == w.always
        for block in w.blocks:
            assert block & names
            assert block - names
        assert 0.3 < w.size(names & w.inside) / w.size(w.inside) < 0.7
    assert len(set(draws)) > 1


def half_of_the_layers(w: World, draws: list[frozenset[str]]) -> None:
    for names in draws:
        touched = w.touched(names)
        assert len(touched) in (len(w.blocks) // 2, -(-len(w.blocks) // 2))
        assert names == w.always.union(*(w.blocks[index] for index in touched))


def within_the_budget(w: World, draws: list[frozenset[str]]) -> None:
    for names in draws:
        assert 0.2 * sum(w.numels.values()) < w.size(names) <= 0.4 * sum(w.numels.values())
    assert len(set(draws)) > 1


def thawed(w: World, index: int) -> frozenset[str]:
    lowest = w.embeddings - w.head
    top = frozenset(w.numels) - w.inside - lowest
    groups = [top, *reversed(w.blocks), lowest]
    return frozenset().union(*groups[: index + 1])


def biases_and_norms(w: World, _: int) -> set[str]:
    norm = re.compile(r"norm|ln_|LayerNorm", re.IGNORECASE)
    found = {n for n in w.numels if n.endswith(".bias") or norm.search(n.split(".")[-2])}
    return {n for n in found if w.ndims[n] == 1} | w.head


def kind(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name, count=1)


def best_of_each_kind(w: World, draws: list[frozenset[str]]) -> None:
    """Half of the matrices of each kind, rounded down; weights alone; embeddings and head."""
    matrices = Counter(kind(n) for n in w.inside if w.ndims[n] >= 2)
    for names in draws:
        chosen = names & w.inside
        outside = names - w.inside
        assert w.embeddings | w.head <= outside
        found = Counter(kind(n) for n in chosen if w.ndims[n] >= 2)
        for each, count in matrices.items():
            assert found[each] <= -(-count // 2)
        assert sum(found.values()) >= sum(matrices.values()) // 4
        assert all(len(w.touched(frozenset([n]))) == 1 for n in chosen)


def some_blocks_dropped(w: World, draws: list[frozenset[str]]) -> None:
    count = len(w.blocks)
    for names in draws:
        touched = w.touched(names)
        assert math.floor(0.6 * count) <= len(touched) <= math.ceil(0.6 * count)
        assert names == w.always.union(*(w.blocks[index] for index in touched))


def upper_half(w: World, _: int) -> frozenset[str]:
    return frozenset().union(*w.blocks[-(-len(w.blocks) // 2) :])


METHODS: dict[str, tuple[Callable[[], MethodCallback], Check]] = {
    "lisa": (lambda: LISA(2), whole_blocks(lambda n: min(2, n))),
    "lisa_one_head": (lambda: LISA(1, always=["head"]), whole_blocks(lambda n: 1, "head")),
    "lisa_increasing": (lambda: LISA(1, sampling="increasing"), whole_blocks(lambda n: 1)),
    "hft": (lambda: HFT(redraw=1), half_of_every_block),
    "hft_layer": (lambda: HFT(granularity="layer", redraw=1), half_of_the_layers),
    "ist": (lambda: IST(0.5, scope="blocks"), whole_blocks(lambda n: n // 2, "none")),
    "badam": (lambda: BAdam(), whole_blocks(lambda n: 1, "none")),
    "badam_descending": (lambda: BAdam("descending"), exactly(lambda w, i: w.blocks[-1 - i % len(w.blocks)])),
    "telly": (
        lambda: Telly(1),
        exactly(lambda w, i: frozenset(w.numels) - w.embeddings - w.blocks[0]),
    ),
    "bitfit": (lambda: BitFit(scope=["biases", "norms"]), exactly(biases_and_norms)),
    "embeddings_and_head": (lambda: EmbeddingsAndHead(), exactly(lambda w, i: w.embeddings | w.head)),
    "last_layer": (lambda: LastLayer(always=["head"]), exactly(lambda w, i: w.blocks[-1] | w.head)),
    "random_tuning": (lambda: RandomTuning(0.4, redraw=1), within_the_budget),
    "gradual_unfreezing": (lambda: GradualUnfreezing(), exactly(thawed)),
    "schedule": (
        lambda: FinetuningSchedule({0: {"params": ["head"], "max_steps": 1}, 1: {"params": ["blocks"], "lr": 1e-3}}),
        exactly(lambda w, i: w.head | (w.inside if i else frozenset())),
    ),
    "spectrum": (lambda: Spectrum(0.5), best_of_each_kind),
    "surgical": (lambda: Surgical(1, 2), exactly(upper_half)),
    "dropbp": (lambda: DropBP(0.4), some_blocks_dropped),
    "cofitune": (
        lambda: CoFiTune((0.0, 1.0), ["all"], soft_mask="none", always=["head"]),
        exactly(lambda w, i: w.inside | w.head),
    ),
    "searched_subset": (
        lambda: SearchedSubset(["blocks", "!biases"], always=["head"]),
        exactly(lambda w, i: {n for n in w.inside if not n.endswith("bias")} | w.head),
    ),
}
STATIC = {
    "telly",
    "bitfit",
    "embeddings_and_head",
    "last_layer",
    "spectrum",
    "surgical",
    "cofitune",
    "searched_subset",
}
TWO_DRAWS = {"schedule"}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("row", METHODS)
def test_what_is_selected(row: str, name: str) -> None:
    make, check = METHODS[row]
    structure, w = structure_of(name), world(name)
    method = make()
    claim = method.bind(structure, dict.fromkeys(structure.parameters, True))
    assert claim.selectable <= method.selectable <= frozenset(structure.parameters)
    count = 1 if row in STATIC else 2 if row in TWO_DRAWS else 8 if row != "gradual_unfreezing" else len(w.blocks) + 2
    count -= row == "gradual_unfreezing" and w.embeddings <= w.head
    draws = []
    for index in range(count):
        chosen = method._select(Draw(index, index, index, method.seed))
        assert chosen == method._select(Draw(index, index, index, method.seed)), "a draw is a pure function"
        draws.append(method._names(chosen))
        assert draws[-1] <= method.selectable
    check(w, draws)


# ---------------------------------------------------------------------------------------------------- what trains


class AnyArchitecture(TinyModule):
    """One of the eight, on batches of keyword arguments."""

    def __init__(self, name: str) -> None:
        super().__init__("conv_net")
        self.model = copy.deepcopy(model_of(name))
        if name == "t5":
            self.model.config.decoder_start_token_id = 0

    def loss(self, batch: Any) -> torch.Tensor:
        return self.model(**batch).loss


def rows_of(name: str) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 17, (8, 7), generator=generator)
    if name == "vit":
        image = model_of(name).config.image_size  # type: ignore[union-attr]
        pixels = torch.randn(8, 3, image, image, generator=generator)
        return [{"pixel_values": x, "labels": torch.tensor(i % 2)} for i, x in enumerate(pixels)]
    if name == "whisper":
        features = torch.randn(8, 4, 16, generator=generator)
        return [{"input_features": x, "labels": y} for x, y in zip(features, ids, strict=True)]
    if name == "bert":
        return [{"input_ids": x, "labels": torch.tensor(i % 2)} for i, x in enumerate(ids)]
    return [{"input_ids": x, "labels": x} for x in ids]


# Those whose choice, or whose hooks, depend on what happens in a forward pass, and one that does not.
TRAINED: dict[str, Callable[[], MethodCallback]] = {
    "lisa_outliers": lambda: LISA(1, period_steps=1, sampling="outliers", outlier_factor=1.5),
    "ist": lambda: IST(0.5, score_period_steps=1, scope="blocks", always=["head"]),
    "green_trainer": lambda: GreenTrainer(0.6, redraw=2),
    "rift": lambda: RiFT(epochs=1, num_batches=1, interpolation_steps=0, score_on="train"),
    "auto_rgn": lambda: AutoRGN(num_batches=1),
    "dropbp": lambda: DropBP(0.5),
    "badam": lambda: BAdam(period_steps=1),
    "cofitune": lambda: CoFiTune((0.0, 1.0), ["ffn"], num_batches=1, dropout=0.1),
}


@pytest.mark.filterwarnings("ignore:.*are planned to train but got no gradient", "ignore:.*had a gradient but did not")
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("row", TRAINED)
def test_what_is_planned_trains(row: str, name: str, tmp_path: Path) -> None:
    w, method = world(name), TRAINED[row]()
    module = AnyArchitecture(name)
    probe = Probe([method])
    torch.manual_seed(0)
    data: Any = DataLoader(rows_of(name), batch_size=2)  # type: ignore[arg-type]
    run = trainer(tmp_path, [method, probe], max_epochs=1, accumulate_grad_batches=1, limit_val_batches=0)
    run.fit(module, data, data)
    assert len(probe.steps) == 4
    planned = [frozenset(name.removeprefix("model.") for name in step.planned) for step in probe.steps]
    for step in probe.steps:
        assert step.planned == step.requires_grad
        assert step.with_gradient <= step.planned
        assert step.moved == step.with_gradient or (
            row == "auto_rgn" and step.moved <= step.with_gradient
        )  # tiny rates
    frozen_by_transformers = {n for n, p in model_of(name).named_parameters() if not p.requires_grad}
    assert not frozen_by_transformers.intersection(*planned)
    if row in ("lisa_outliers", "badam", "ist"):
        counts = {len(w.touched(names)) for names in planned}
        assert counts == {len(w.blocks) // 2 if row == "ist" else 1}
    if row == "rift":
        (matrix,) = {n for n in planned[0] if w.ndims[n] >= 2}
        assert planned[0] <= {matrix, matrix.replace("weight", "bias")}
        assert matrix in w.inside
        assert set(method.describe()["criticality"])
    if row == "auto_rgn":
        factors = method.describe()["factors"]
        assert max(factors.values()) == 1.0
        assert len(factors) == len(planned[0])
    if row == "green_trainer":
        assert isinstance(method, GreenTrainer)
        for report in method.describe()["draws"]:
            assert report["measured_flops"] <= 0.6 * report["full_flops"]
    if row == "cofitune":
        assert isinstance(method, CoFiTune)
        assert all(bool(values.any()) for values in method.importance.values())
        assert len(planned[0]) >= len(method.importance) == 2 * len(w.blocks) + (3 if name == "llama" else 0)
    if row == "ist":
        assert isinstance(method, IST)
        assert bool(method.importance.any())


def test_no_method_is_left_out() -> None:
    made = {type(make()).__name__ for make, _ in METHODS.values()} | {
        type(make()).__name__ for make in TRAINED.values()
    }
    layers = {n for n, cls in method_classes().items() if cls.__module__.startswith("lightning_peft.methods.layers.")}
    assert layers <= made
