"""LISA's weighted draws: exact shares, outliers against a slow count, no trace of the scoring."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_peft import LISA
from lightning_peft.core.blocks import find_structure
from lightning_peft.core.draw import draw_generator
from lightning_peft.core.weighted import inclusion_probabilities, sample_weighted
from lightning_peft.errors import ConfigError
from lightning_peft.methods.outliers import outlier_fraction
from tests.contract.harness import (
    MODELS,
    NUM_LAYERS,
    NUM_SAMPLES,
    TinyModule,
    assert_same_weights,
    dataset,
    gqa_decoder,
    loader,
    trainer,
    weights,
)

NUM_DRAWS = 10_000


def bound(method: LISA, model: nn.Module) -> LISA:
    structure = find_structure(model)
    method.bind(structure, dict.fromkeys(structure.parameters, True))
    method.begin(0, 0, 0, continues=False)
    return method


# ---------------------------------------------------------------------------------------------------- the draw


@given(data=st.data())
def test_inclusion_is_proportional_up_to_certainty(data: st.DataObject) -> None:
    """Against bisection for the factor ``c`` with ``sum(min(1, c * weight)) = num_active``."""
    odds = data.draw(st.lists(st.floats(0.01, 100) | st.just(0.0), min_size=1, max_size=12).filter(any))
    num_active = data.draw(st.integers(1, sum(weight > 0 for weight in odds)))
    low, high = 0.0, num_active / min(weight for weight in odds if weight) + 1
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(min(1, middle * w) for w in odds) < num_active else (low, middle)
    found = inclusion_probabilities(odds, num_active)
    assert found.tolist() == pytest.approx([min(1, high * weight) for weight in odds], abs=1e-6)
    assert float(found.sum()) == pytest.approx(num_active, abs=1e-9)
    drawn = sample_weighted(found, torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    assert len(set(drawn)) == num_active
    assert drawn == sorted(drawn)
    assert all(odds[index] > 0 for index in drawn)


def frequencies(draw: Any, size: int) -> list[float]:
    counts = [0] * size
    for index in range(NUM_DRAWS):
        for chosen in draw(draw_generator(0, index, "blocks")):
            counts[chosen] += 1
    return [count / NUM_DRAWS for count in counts]


@pytest.mark.parametrize(
    ("odds", "num_active"),
    [([1, 2, 3, 4], 1), ([1, 2, 3, 4], 2), ([1, 1, 1, 9], 2), ([0, 5, 1, 1, 1], 3), ([1] * 6, 4), ([2.5, 0.5], 2)],
)
def test_each_block_trains_in_exactly_its_share(odds: list[float], num_active: int) -> None:
    expected = inclusion_probabilities(odds, num_active)
    found = frequencies(lambda generator: sample_weighted(expected, generator), len(odds))
    for share, frequency in zip(expected.tolist(), found, strict=True):
        assert abs(frequency - share) <= 4 * math.sqrt(share * (1 - share) / NUM_DRAWS)


def test_successive_draws_would_distort_what_is_exact_here() -> None:
    """OwLore's setting: 5 of 32 layers, two of which hold 26 % of the weight: 0.534 of the draws instead of 0.675."""
    odds = [0.135, 0.125] + [0.74 / 30] * 30
    probabilities = torch.tensor(odds, dtype=torch.float64)
    successive = frequencies(lambda generator: torch.multinomial(probabilities, 5, generator=generator).tolist(), 32)
    assert successive[0] == pytest.approx(0.534, abs=0.02)
    ours = frequencies(lambda generator: sample_weighted(inclusion_probabilities(odds, 5), generator), 32)
    assert ours[0] == pytest.approx(5 * 0.135, abs=0.02)


def test_any_two_blocks_meet() -> None:
    probabilities = inclusion_probabilities([1, 2, 3, 4, 5], 2)
    pairs = {tuple(sample_weighted(probabilities, draw_generator(0, index))) for index in range(500)}
    assert len(pairs) == 10


def test_uniform_is_the_default_and_its_draws_are_a_permutations_head() -> None:
    method = bound(LISA(2, period_steps=1), gqa_decoder())
    assert method.sampling == "uniform"
    for step in range(20):
        method.advance(step, 0, step)
        order = torch.randperm(NUM_LAYERS, generator=draw_generator(0, step, "blocks"))
        assert list(method.active_units()) == [f"model.layers.{index}" for index in sorted(order[:2].tolist())]


@pytest.mark.parametrize(
    ("sampling", "odds"),
    [("increasing", [1, 2, 3, 4]), ("decreasing", [4, 3, 2, 1]), ([1.0, 0.0, 2.0, 1.0], [1, 0, 2, 1])],
)
def test_weights_by_depth_or_given(sampling: Any, odds: list[float]) -> None:
    method = bound(LISA(1, period_steps=1, sampling=sampling), gqa_decoder())
    share = [weight / sum(odds) for weight in odds]
    assert list(method.describe()["inclusion"].values()) == pytest.approx(share)
    counts = dict.fromkeys(method.units, 0)
    for step in range(2000):
        method.advance(step, 0, step)
        (block,) = method.active_units()
        counts[block] += 1
    assert [count / 2000 for count in counts.values()] == pytest.approx(share, abs=0.04)


# ---------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sampling": "outlier"}, "'outliers'"),
        ({"sampling": [1.0, -1.0]}, "finite weights from 0 on"),
        ({"sampling": [1.0, float("nan")]}, "finite weights from 0 on"),
        ({"sampling": 3}, "one per block"),
        ({"outlier_factor": 0}, "outlier_factor=0"),
        ({"outlier_factor": float("inf")}, "outlier_factor"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LISA(**arguments)


def test_weights_must_fit_the_blocks() -> None:
    with pytest.raises(ConfigError, match=f"3 weights; its scope has {NUM_LAYERS} blocks"):
        bound(LISA(sampling=[1.0, 2.0, 3.0]), gqa_decoder())
    with pytest.raises(ConfigError, match=f"only 1 of {NUM_LAYERS} blocks have a weight above 0"):
        bound(LISA(2, sampling=[1.0, 0.0, 0.0, 0.0]), gqa_decoder())


def test_no_outliers_is_an_error(tmp_path: Path) -> None:
    run = trainer(tmp_path, [LISA(1, sampling="outliers", outlier_factor=1e6)])
    with pytest.raises(ConfigError, match=r"only 0 of 4 blocks have outliers.*smaller outlier_factor"):
        run.fit(TinyModule("gqa_decoder"), loader("gqa_decoder"), loader("gqa_decoder", shuffle=False))


def test_blocks_without_matrices_are_an_error(tmp_path: Path) -> None:
    method = LISA(1, sampling="outliers", scope=["norms", "!*ln_f*"], always=("head",))
    run = trainer(tmp_path, [method])
    with pytest.raises(ConfigError, match=r"model\.transformer\.h\.0 has no linear or convolution layer"):
        run.fit(TinyModule("tied_decoder"), loader("tied_decoder"), loader("tied_decoder", shuffle=False))


# ---------------------------------------------------------------------------------------------------- outliers


def slow_fractions(module: TinyModule, model: str, factor: float) -> list[float]:
    """By loops over single weights and the inputs that their modules saw on the whole data set."""
    kinds = (nn.Linear, nn.Conv2d)
    stack = {"tied_decoder": "transformer.h", "gqa_decoder": "model.layers", "conv_net": "blocks"}[model]
    blocks = list(module.model.get_submodule(stack))
    seen: dict[nn.Module, torch.Tensor] = {}
    for part in module.modules():
        if isinstance(part, kinds) or type(part).__name__ == "Conv1D":
            part.register_forward_hook(lambda m, args, _: seen.__setitem__(m, args[0].detach().double()))
    module.eval()
    with torch.no_grad():
        module.loss(dataset(model).tensors)
    fractions = []
    for block in blocks:
        values = []
        for part in block.modules():
            if part not in seen:
                continue
            x, weight = seen[part], part.weight.detach().double()
            if isinstance(part, nn.Conv2d):
                for o in range(weight.shape[0]):
                    for i in range(weight.shape[1]):
                        norm = float((x[:, i] ** 2).sum()) ** 0.5
                        values += [abs(float(w)) * norm for w in weight[o, i].flatten()]
            else:
                weight = weight.T if type(part).__name__ == "Conv1D" else weight
                norms = [float((x[..., i] ** 2).sum()) ** 0.5 for i in range(weight.shape[1])]
                values += [abs(float(row[i])) * norms[i] for row in weight for i in range(len(norms))]
        mean = sum(values) / len(values)
        fractions.append(sum(value > factor * mean for value in values) / len(values))
    return fractions


def spread(module: TinyModule) -> TinyModule:
    """Make blocks differ: more heavy weights in later ones."""
    for name, parameter in module.named_parameters():
        for index in range(NUM_LAYERS):
            if f".{index}." in name and parameter.ndim >= 2:
                with torch.no_grad():
                    parameter.view(-1)[: 3 * index] *= 20
    return module


@pytest.mark.parametrize("model", MODELS)
def test_outliers_against_a_slow_count(model: str, tmp_path: Path) -> None:
    from lightning_peft.data.loader import ResumableDataLoader

    factor = 4.0
    expected = slow_fractions(spread(TinyModule(model)), model, factor)
    assert len(set(expected)) > 1
    method = LISA(1, sampling="outliers", outlier_factor=factor)
    whole = ResumableDataLoader(dataset(model), batch_size=NUM_SAMPLES, seed=3)
    run = trainer(tmp_path, [method], max_epochs=1, accumulate_grad_batches=1)
    run.fit(spread(TinyModule(model)), whole, loader(model, shuffle=False))
    found = list(method.describe()["inclusion"].values())
    assert found == pytest.approx([value / sum(expected) for value in expected], rel=1e-5)


def test_outlier_fraction_is_strict_and_over_all_parts() -> None:
    parts = [torch.tensor([1.0, 1.0, 2.0]), torch.tensor([[8.0], [3.0]])]  # mean 3
    assert outlier_fraction(parts, 1.0) == 1 / 5
    assert outlier_fraction(parts, 0.5) == 3 / 5
    assert outlier_fraction(parts, 3.0) == 0


def test_grouped_convolutions() -> None:
    from lightning_peft.methods.outliers import _magnitudes

    layer = nn.Conv2d(6, 4, (1, 3), groups=2)
    norms = torch.arange(1.0, 7.0)
    found = _magnitudes(layer, norms).reshape(4, 3, 3)
    for out in range(4):
        for inside in range(3):
            feature = inside if out < 2 else 3 + inside
            expected = layer.weight[out, inside].flatten().abs() * norms[feature]
            assert torch.allclose(found[out, inside], expected)


@pytest.mark.parametrize("model", MODELS)
def test_looking_for_outliers_leaves_no_trace(model: str, tmp_path: Path) -> None:
    """A run on the weights that were found, given by hand, is the same run bit for bit (models have dropout)."""

    def fit(method: LISA) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        module = spread(TinyModule(model))
        trainer(tmp_path, [method]).fit(module, loader(model), loader(model, shuffle=False))
        return weights(module)

    scored = LISA(2, period_steps=2, sampling="outliers", outlier_factor=3.0)
    found = fit(scored)
    shares = list(scored.describe()["inclusion"].values())
    given_weights = LISA(2, period_steps=2, sampling=shares)
    assert_same_weights(fit(given_weights), found)
    assert given_weights.history == scored.history
