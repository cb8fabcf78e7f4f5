"""Spectrum: where noise ends, what is ranked against what, ties, bad weights, and that the choice is made once."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from torch import nn

from lightning_peft import Spectrum
from lightning_peft.core.blocks import find_structure
from lightning_peft.errors import ConfigError, ScopeError
from lightning_peft.methods.layers.spectrum import (
    marchenko_pastur_median,
    noise_threshold,
    signal_to_noise,
    top_per_kind,
)
from tests.contract.harness import NUM_LAYERS, ConvNet, TinyModule, gqa_decoder, loader, tied_decoder, trainer

SHAPES = [(512, 512), (512, 2048), (2048, 512), (64, 1024), (300, 250)]


def noise(shape: Sequence[int], seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bound(method: Spectrum, model: nn.Module) -> Spectrum:
    structure = find_structure(model)
    method.bind(structure, dict.fromkeys(structure.parameters, True))
    method.begin(0, 0, 0, continues=False)
    return method


# ---------------------------------------------------------------------------------------------------- noise


@pytest.mark.parametrize("aspect", [1.0, 0.9, 0.5, 0.1, 0.01, 1e-4])
def test_median_halves_the_law(aspect: float) -> None:
    low, high = (1 - math.sqrt(aspect)) ** 2, (1 + math.sqrt(aspect)) ** 2

    def density(t: float) -> float:
        return math.sqrt(max(0.0, (high - t) * (t - low))) / (2 * math.pi * aspect * t)

    below, _ = quad(density, low, marchenko_pastur_median(aspect), limit=200)
    assert below == pytest.approx(0.5, abs=1e-6)


def test_median_gives_the_published_constant() -> None:
    """Gavish and Donoho 2014: the optimal threshold of a square matrix is 2.858 times its median singular value."""
    assert 4 / math.sqrt(3) / math.sqrt(marchenko_pastur_median(1.0)) == pytest.approx(2.858, abs=5e-4)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_noise_is_noise_at_the_real_edge(shape: tuple[int, int], scale: float) -> None:
    values = torch.linalg.svdvals(noise(shape, scale=scale)).double()
    edge = noise_threshold(values, shape, "marchenko_pastur")
    assert edge == pytest.approx(scale * (math.sqrt(shape[0]) + math.sqrt(shape[1])), rel=0.03)
    assert int((values > edge).sum()) <= 1  # the largest one fluctuates around the edge
    assert signal_to_noise(noise(shape, scale=scale), "marchenko_pastur") < 0.05


def test_reference_threshold_calls_noise_signal() -> None:
    square = torch.linalg.svdvals(noise((512, 512))).double()
    share = (square > noise_threshold(square, (512, 512), "reference")).double().mean()
    assert float(share) == pytest.approx(0.24, abs=0.02)
    wide = torch.linalg.svdvals(noise((512, 2048))).double()
    assert bool((wide > noise_threshold(wide, (512, 2048), "reference")).all())
    assert signal_to_noise(noise((512, 2048)), "reference") == math.inf


@pytest.mark.parametrize("rank", [0, 1, 5, 20])
@pytest.mark.parametrize("shape", [(256, 256), (128, 512)])
def test_planted_signal_is_counted(shape: tuple[int, int], rank: int) -> None:
    left, right = (torch.linalg.qr(noise((size, max(rank, 1)), seed=2))[0][:, :rank] for size in shape)
    matrix = noise(shape) + 4 * (math.sqrt(shape[0]) + math.sqrt(shape[1])) * left @ right.T
    values = torch.linalg.svdvals(matrix).double()
    above = int((values > noise_threshold(values, shape, "marchenko_pastur")).sum())
    assert rank <= above <= rank + 2  # a small matrix's largest values fluctuate around the edge


def test_scale_changes_the_reference_score_only() -> None:
    matrix = noise((64, 64)) + 3 * noise((64, 1), 1) @ noise((1, 64), 2)
    for kind, factor in (("reference", 0.1), ("marchenko_pastur", 1.0)):
        score = signal_to_noise(matrix, kind)  # pyright: ignore[reportArgumentType]
        assert score > 0
        assert signal_to_noise(10 * matrix, kind) == pytest.approx(factor * score, rel=1e-4)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (16, 16), (1, 9), (9, 1), (2, 2)])
def test_score_against_numpy(shape: tuple[int, int]) -> None:
    matrix = noise(shape, 3) + 2 * noise((shape[0], 1), 4) @ noise((1, shape[1]), 5)
    values = np.linalg.svd(matrix.numpy().astype(np.float64), compute_uv=False)
    beta = min(shape) / max(shape)
    spread = (np.percentile(values, 75) - np.percentile(values, 25)) / 1.349 * (1 + beta**0.5)
    big, small = values[values > spread].sum(), values[values <= spread].sum()
    expected = math.inf if small == 0 else big / small / values.max()
    assert signal_to_noise(matrix, "reference") == pytest.approx(expected, rel=1e-4)
    edge = np.sort(values)[(len(values) - 1) // 2] / (max(shape) * marchenko_pastur_median(beta)) ** 0.5
    edge *= shape[0] ** 0.5 + shape[1] ** 0.5
    expected = values[values > edge].sum() / values[values <= edge].sum()
    assert signal_to_noise(matrix, "marchenko_pastur") == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["reference", "marchenko_pastur"])
def test_degenerate_matrices(kind: Any) -> None:
    assert signal_to_noise(torch.zeros(8, 8), kind) == 0
    assert signal_to_noise(noise((40, 1), 1) @ noise((1, 40), 2), kind) > 1e3  # one value, the rest rounding
    assert not math.isnan(signal_to_noise(torch.eye(8), kind))
    assert signal_to_noise(noise((1, 8)), kind) in (0.0, math.inf)


# ---------------------------------------------------------------------------------------------------- ranking


@given(
    scores=st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.0, 2.0, math.inf]), min_size=1, max_size=20),
    groups=st.integers(1, 4),
    fraction=st.sampled_from([0.1, 0.25, 0.3, 0.5, 0.7, 1.0]),
)
def test_top_of_each_kind(scores: list[float], groups: int, fraction: float) -> None:
    table = {f"m{index}": score for index, score in enumerate(scores)}
    kinds = {unit: str(index % groups) for index, unit in enumerate(table)}
    chosen = top_per_kind(table, kinds, fraction)
    assert chosen == [unit for unit in table if unit in chosen]
    for kind in set(kinds.values()):
        members = [unit for unit in table if kinds[unit] == kind]
        taken = [unit for unit in members if unit in chosen]
        assert len(taken) == int(round(fraction * 100) * len(members) // 100)
        for unit in taken:
            for other in set(members) - set(taken):
                better = table[unit] > table[other]
                assert better or (table[unit] == table[other] and members.index(unit) < members.index(other))


def llama(num_layers: int = 6, **sizes: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=19, num_hidden_layers=num_layers, **{**config, **sizes}))


KINDS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
KINDS += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


@pytest.mark.parametrize("threshold", ["marchenko_pastur", "reference"])
@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.9, 1.0])
@pytest.mark.filterwarnings("ignore:Spectrum. more matrices")
def test_llama(fraction: float, threshold: Any) -> None:
    model = llama()
    for index in range(6):  # signal grows with depth in q, falls with it in the others
        for kind in KINDS:
            weight = model.get_submodule(f"model.layers.{index}.{kind}").weight  # pyright: ignore[reportAttributeAccessIssue]
            strength = 3.0 ** (index if kind.endswith("q_proj") else 5 - index)
            with torch.no_grad():
                weight.copy_(noise(weight.shape, index) + strength * torch.ones_like(weight))
    method = bound(Spectrum(fraction, threshold), model)
    chosen = defaultdict(list)
    for name in method.trainable_names - {"model.embed_tokens.weight", "lm_head.weight"}:
        _, _, layer, rest = name.split(".", 3)
        chosen[rest.removesuffix(".weight")].append(int(layer))
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= method.trainable_names
    assert set(chosen) == set(KINDS)
    count = math.floor(6 * fraction)
    assert {kind: len(layers) for kind, layers in chosen.items()} == dict.fromkeys(KINDS, count)
    if threshold == "marchenko_pastur":
        assert sorted(chosen["self_attn.q_proj"]) == list(range(6 - count, 6))
        assert all(sorted(chosen[kind]) == list(range(count)) for kind in KINDS[1:])
    for kind in KINDS:
        scores = [method.scores[f"model.layers.{index}.{kind}"] for index in range(6)]
        weights = [model.get_submodule(f"model.layers.{i}.{kind}").weight for i in range(6)]
        assert scores == [signal_to_noise(weight, threshold) for weight in weights]  # pyright: ignore[reportArgumentType]
        ranked = sorted(range(6), key=lambda i: (-scores[i], i))
        assert sorted(chosen[kind]) == sorted(ranked[:count])
    assert method.before_wrap() == method.trainable_names  # nothing else enters the optimizer
    assert method.describe()["scores"] == method.scores


def test_equal_weights_take_the_first_of_a_kind() -> None:
    model = llama(4)
    layers = model.get_submodule("model.layers")
    for layer in layers.children():
        layer.load_state_dict(layers[0].state_dict())  # pyright: ignore[reportIndexIssue]
    names = bound(Spectrum(), model).trainable_names
    assert {name.split(".")[2] for name in names if ".layers." in name} == {"0", "1"}


def test_infinite_scores_of_the_reference_are_told() -> None:
    model = llama(4, hidden_size=32, intermediate_size=256)
    with pytest.warns(UserWarning, match=r"infinite score.*mlp\.gate_proj.*marchenko_pastur"):
        method = bound(Spectrum(threshold="reference"), model)
    assert all(math.isinf(method.scores[f"model.layers.{index}.mlp.up_proj"]) for index in range(4))
    assert sum(unit.endswith("up_proj") for unit in method.active_units()) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bound(Spectrum(), model)


def test_norms_stay_frozen_unless_named() -> None:
    model = llama(2)
    assert not [name for name in bound(Spectrum(), model).selectable if "norm" in name]
    method = bound(Spectrum(always=("embeddings", "head", "norms")), model)
    assert [name for name in method.trainable_names if "norm" in name] == ["model.norm.weight"]
    with pytest.raises(ScopeError, match="no matrix"):
        bound(Spectrum(scope="norms"), model)


def test_matrices_with_bias_and_tied_head() -> None:
    method = bound(Spectrum(), tied_decoder())
    assert {"transformer.wte.weight", "transformer.wpe.weight"} <= method.trainable_names
    assert all(len(names) == 2 for names in method.active_units().values())
    assert len(method.active_units()) == 4 * NUM_LAYERS // 2


def test_convolutions_are_flattened() -> None:
    model = ConvNet()
    method = bound(Spectrum(), model)
    assert len(method.active_units()) == NUM_LAYERS // 2
    weight = model.blocks[2].conv.weight  # pyright: ignore[reportAttributeAccessIssue]
    assert method.scores["blocks.2.conv"] == signal_to_noise(weight.reshape(4, 36), "marchenko_pastur")


def test_fused_experts_are_scored_one_by_one() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=19,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=3,
        )
    )
    method = bound(Spectrum(), model)
    name, parameter = next((n, p) for n, p in model.named_parameters() if p.ndim == 3 and ".1." in n)
    expected = sum(signal_to_noise(parameter[i], "marchenko_pastur") for i in range(3)) / 3
    assert method.scores[name] == pytest.approx(expected)
    assert sum(unit.endswith(name.rpartition(".")[2]) for unit in method.active_units()) == 2


def test_encoder_and_decoder_are_ranked_apart() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(vocab_size=19, d_model=8, d_ff=12, d_kv=4, num_layers=2, num_heads=2))
    units = bound(Spectrum(), model).active_units()
    for stack in ("encoder", "decoder"):
        for part in ("layer.0.SelfAttention.q", "layer.0.SelfAttention.o"):
            assert sum(unit.startswith(f"{stack}.") and unit.endswith(part) for unit in units) == 1
    assert not [unit for unit in units if "relative" in unit]  # one table per stack: half of one, rounded down


def test_low_precision_weights_are_ranked_as_the_numbers_they_are() -> None:
    model = llama(4).to(torch.bfloat16)
    low = bound(Spectrum(), model)
    assert all(score >= 0 for score in low.scores.values())
    high = bound(Spectrum(), model.float())
    assert low.scores == high.scores
    assert low.trainable_names == high.trainable_names


# ---------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(bad: float) -> None:
    model = gqa_decoder()
    with torch.no_grad():
        model.get_parameter("model.layers.2.mlp.up_proj.weight")[0, 0] = bad
    with pytest.raises(ConfigError, match=r"model\.layers\.2\.mlp\.up_proj\.weight has values that are not finite"):
        bound(Spectrum(), model)


def test_weights_without_values() -> None:
    with torch.device("meta"):
        model = llama(2)
    with pytest.raises(ConfigError, match=r"meta device.* and 11 more"):
        bound(Spectrum(), model)


@pytest.mark.parametrize("fraction", [0, -1, 1.01, float("nan"), True, "half", None])
def test_fraction_out_of_range(fraction: Any) -> None:
    with pytest.raises(ConfigError, match=r"Spectrum\(top_fraction="):
        Spectrum(fraction)


def test_unknown_threshold_and_a_fraction_that_is_nothing() -> None:
    with pytest.raises(ConfigError, match="'marchenko_pastur'"):
        Spectrum(threshold="marchenko-pastur")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match=rf"largest kind has {NUM_LAYERS} member.*Take 0\.25 or more"):
        bound(Spectrum(0.2), gqa_decoder())


# ---------------------------------------------------------------------------------------------------- once


def test_choice_is_the_fits_and_not_the_objects(tmp_path: Path) -> None:
    """A new fit ranks the weights it starts from; going on with the same Trainer keeps the choice."""
    method = Spectrum()
    choices = []
    for scale in (0.0, 1.0):
        module = TinyModule("gqa_decoder")
        with torch.no_grad():  # signal in the last, then in the first layer
            for index, layer in enumerate(module.model.model.layers):
                for part in layer.modules():
                    if isinstance(part, nn.Linear):
                        part.weight += (index if scale else NUM_LAYERS - 1 - index) * 3.0
        run = trainer(tmp_path, [method], max_epochs=1)
        run.fit(module, loader("gqa_decoder"), loader("gqa_decoder", shuffle=False))
        choices.append(method.trainable_names)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.randn_like(parameter))
        run.fit_loop.max_epochs = 2
        run.fit(module, loader("gqa_decoder"), loader("gqa_decoder", shuffle=False))
        assert method.trainable_names == choices[-1]
    assert choices[0] != choices[1]


def test_scoring_does_not_touch_weights_or_random_state() -> None:
    model = gqa_decoder()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    bound(Spectrum(), model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
