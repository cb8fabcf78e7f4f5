"""HFT against its paper: which half of each layer trains, how halves are rounded, and when they are drawn again."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import nn

from lightning_peft import HFT
from lightning_peft.core.blocks import find_structure
from lightning_peft.core.draw import draw_generator
from lightning_peft.errors import ConfigError, ScopeError
from lightning_peft.methods.layers.hft import sample_half, spread_counts, unit_of
from tests.contract.harness import NUM_LAYERS, TinyModule, loader, tied_decoder, trainer

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")


def llama(num_layers: int = 4, num_key_value_heads: int = 4, family: str = "Llama", **extra: Any) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{family}Config")(
        vocab_size=19,
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=num_key_value_heads,
        max_position_embeddings=8,
        bos_token_id=1,
        eos_token_id=2,
        **extra,
    )
    return getattr(transformers, f"{family}ForCausalLM")(config)


def bound(method: HFT, model: nn.Module) -> HFT:
    """``method`` with its first draw on ``model``, without a Trainer."""
    structure = find_structure(model)
    method.bind(structure, dict.fromkeys(structure.parameters, True))
    method.begin(0, 0, 0, continues=False)
    return method


def per_layer(names: frozenset[str], modules: tuple[str, ...], stack: str = "layers") -> dict[int, list[str]]:
    """Layer -> those of the modules that train in it; found in the names alone."""
    found: dict[int, list[str]] = defaultdict(list)
    for name in sorted(names):
        match = re.search(rf"\.{stack}\.(\d+)\.(.*)\.(weight|bias)$", name)
        if match and match[2].rpartition(".")[2] in modules and match[3] == "weight":
            found[int(match[1])].append(match[2].rpartition(".")[2])
    return found


# ---------------------------------------------------------------------------------------------------- the rule


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("num_layers", [1, 2, 5, 6])
@pytest.mark.parametrize("seed", range(3))
def test_half_of_each_layer(family: str, kv_heads: int, num_layers: int, seed: int) -> None:
    model = llama(num_layers, kv_heads, family)
    method = bound(HFT(seed=seed), model)
    names = method.trainable_names
    attention = per_layer(names, ATTENTION)
    assert {layer: len(chosen) for layer, chosen in attention.items()} == dict.fromkeys(range(num_layers), 2)
    feed_forward = per_layer(names, FEED_FORWARD)
    assert sorted(len(feed_forward[layer]) for layer in range(num_layers)) == sorted(
        [2] * math.ceil(num_layers / 2) + [1] * (num_layers // 2)
    )
    norms = per_layer(names, NORMS)
    assert {layer: len(chosen) for layer, chosen in norms.items()} == dict.fromkeys(range(num_layers), 1)
    always = {n for n, _ in model.named_parameters() if ".layers." not in n}
    assert always == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert always <= names
    # A matrix trains with its bias or not at all.
    for name, _ in model.named_parameters():
        if name.endswith(".bias"):
            assert (name in names) == (name.replace(".bias", ".weight") in names)


@pytest.mark.parametrize(("kv_heads", "num_layers"), [(4, 4), (2, 5), (1, 5)])
def test_parameter_fraction_is_reported(kv_heads: int, num_layers: int) -> None:
    """By count the rule is a half; by parameters it is not, with grouped queries or an odd depth."""
    model = llama(num_layers, kv_heads)
    sizes = {n: p.numel() for n, p in model.named_parameters() if ".layers." in n}
    for seed in range(10):
        method = bound(HFT(seed=seed), model)
        description = method.describe()
        trained = sum(size for name, size in sizes.items() if name in method.trainable_names)
        assert description["parameter_fraction"] == trained / sum(sizes.values())
        assert description["units_per_category"] == {
            "attention": 4 * num_layers,
            "ffn": 3 * num_layers,
            "norms": 2 * num_layers,
        }
        if kv_heads == 4 and num_layers % 2 == 0:
            assert description["parameter_fraction"] == 0.5
        assert 0.3 < description["parameter_fraction"] < 0.7
    assert method.describe()["num_trainable_parameters"] == sum(
        p.numel() for n, p in model.named_parameters() if n in method.trainable_names
    )


def test_every_half_is_equally_likely() -> None:
    """Each pair of attention matrices, each feed-forward matrix, each norm, over many seeds."""
    model = llama(2)
    structure = find_structure(model)
    pairs: Counter[tuple[str, ...]] = Counter()
    singles: Counter[str] = Counter()
    both = Counter()
    draws = 600
    for seed in range(draws):
        method = HFT(seed=seed)
        method.bind(structure, dict.fromkeys(structure.parameters, True))
        names = method.before_wrap()
        attention, feed_forward, norms = (per_layer(names, part) for part in (ATTENTION, FEED_FORWARD, NORMS))
        pairs[tuple(sorted(attention[1]))] += 1
        singles.update(feed_forward[0])
        singles.update(norms[0])
        both[len(feed_forward[0])] += 1
    assert len(pairs) == 6
    assert chisquare(list(pairs.values())).pvalue > 0.001
    assert chisquare([singles[name] for name in FEED_FORWARD]).pvalue > 0.001
    assert chisquare([singles[name] for name in NORMS]).pvalue > 0.001
    assert set(both) == {1, 2}
    assert chisquare(list(both.values())).pvalue > 0.001


@pytest.mark.parametrize("fraction", [0.4, 0.5, 0.6])
@pytest.mark.parametrize("num_layers", [4, 5])
def test_other_fractions(fraction: float, num_layers: int) -> None:
    names = bound(HFT(fraction=fraction), llama(num_layers)).trainable_names
    for part in (ATTENTION, FEED_FORWARD, NORMS):
        counts = [len(per_layer(names, part)[layer]) for layer in range(num_layers)]
        assert sum(counts) == math.floor(fraction * len(part) * num_layers + 0.5 + 1e-9)
        assert all(abs(count - fraction * len(part)) < 1 for count in counts)


def test_everything_at_fraction_one() -> None:
    for granularity in ("category", "layer", "model"):
        model = llama()
        method = bound(HFT(fraction=1, granularity=granularity), model)
        assert method.trainable_names == {name for name, _ in model.named_parameters()}
        assert method.describe()["parameter_fraction"] == 1.0


# ---------------------------------------------------------------------------------------------------- other models


def categories(method: HFT) -> dict[str, int]:
    return method.describe()["units_per_category"]


def test_fused_projections() -> None:
    """GPT-2 has one fused query-key-value matrix: one of (qkv, out) and one of (up, down) per layer."""
    method = bound(HFT(), tied_decoder())
    assert categories(method) == {"norms": 2 * NUM_LAYERS, "attention": 2 * NUM_LAYERS, "ffn": 2 * NUM_LAYERS}
    for layer in range(NUM_LAYERS):
        chosen = [unit for unit in method.active_units() if f".h.{layer}." in unit]
        assert sum(".attn." in unit for unit in chosen) == 1
        assert sum(".mlp." in unit for unit in chosen) == 1
        assert sum(".ln_" in unit for unit in chosen) == 1
    assert all(len(names) == 2 for names in method.active_units().values())  # weight and bias


def test_fused_experts_are_one_unit_each_and_the_router_is_apart() -> None:
    method = bound(HFT(), llama(4, family="Mixtral", num_local_experts=3))
    assert categories(method) == {"attention": 16, "ffn": 8, "router": 4, "norms": 8}
    counts = Counter(unit.split(".")[2] for unit in method.active_units() if ".experts." in unit)
    assert counts == dict.fromkeys("0123", 1)
    assert sum("gate." in f"{unit}." for unit in method.active_units()) == 2


def test_a_router_inside_a_module_of_its_own() -> None:
    class TopKRouter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

    parts = [nn.ModuleDict({"choose": TopKRouter(), "experts": nn.Linear(4, 4)}) for _ in range(4)]
    assert categories(bound(HFT(), nn.ModuleDict({"layers": nn.ModuleList(parts)}))) == {"router": 4, "ffn": 4}


def test_experts_in_a_list_count_each() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(4, 4, bias=False)
            self.experts = nn.ModuleList(
                [nn.ModuleDict({"w1": nn.Linear(4, 6), "w2": nn.Linear(6, 4)}) for _ in range(4)]
            )

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self_attn = nn.MultiheadAttention(4, 2)
            self.moe = Experts()
            self.norm = nn.LayerNorm(4)

    method = bound(HFT(), nn.ModuleDict({"layers": nn.ModuleList([Layer() for _ in range(4)])}))
    assert categories(method) == {"attention": 8, "router": 4, "ffn": 32, "norms": 4}
    for layer in range(4):
        units = [unit for unit in method.active_units() if unit.startswith(f"layers.{layer}.")]
        assert sum(".experts." in unit for unit in units) == 4
        assert sum(".self_attn." in unit for unit in units) == 1
    assert sum(unit.endswith(".gate") for unit in method.active_units()) == 2
    assert sum(unit.endswith(".norm") for unit in method.active_units()) == 2


def test_four_norms_train_two() -> None:
    model = llama(3, family="Olmo2")
    method = bound(HFT(), model)
    assert categories(method)["norms"] == 12
    for layer in range(3):
        assert sum(u.startswith(f"model.layers.{layer}.") and "norm" in u for u in method.active_units()) == 2


def test_cross_attention_is_halved_by_itself() -> None:
    import transformers

    config = transformers.T5Config(vocab_size=17, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2)
    method = bound(HFT(), transformers.T5ForConditionalGeneration(config))
    # Encoder: 2 norms, decoder: 3; the first layer of each holds a table of relative positions.
    assert categories(method) == {"attention": 16, "cross_attention": 8, "ffn": 8, "norms": 10, "other": 2}
    for layer in range(2):
        chosen = [unit for unit in method.active_units() if unit.startswith(f"decoder.block.{layer}.")]
        assert sum(".EncDecAttention." in unit for unit in chosen) == 2
        assert sum(".SelfAttention." in unit and "relative" not in unit for unit in chosen) == 2
        assert sum(".DenseReluDense." in unit for unit in chosen) == 1


def test_encoders_and_vision_models_have_the_same_categories() -> None:
    import transformers

    sizes: dict[str, Any] = {
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    bert = bound(HFT(), transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=9, **sizes)))
    vit = bound(
        HFT(), transformers.ViTForImageClassification(transformers.ViTConfig(image_size=8, patch_size=4, **sizes))
    )
    for method in (bert, vit):
        assert categories(method) == {"attention": 8, "ffn": 4, "norms": 4}
    assert {name.split(".")[0] for name in bert.trainable_names} == {"bert", "classifier"}


def test_models_that_are_no_transformer() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    method = bound(HFT(), model)
    assert categories(method) == {"ffn": 2, "norms": 2}
    assert {"4.weight", "4.bias"} <= method.trainable_names
    recurrent = nn.ModuleDict({"embed": nn.Embedding(3, 4), "rnn": nn.LSTM(4, 4, 2), "out": nn.Linear(4, 2)})
    assert categories(bound(HFT(), recurrent)) == {"ffn": 4}  # input and hidden matrix of two layers


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("layers.0.attn.q_proj.weight", "layers.0.attn.q_proj"),
        ("layers.0.attn.q_proj.bias", "layers.0.attn.q_proj"),
        ("attn.in_proj_weight", "attn.in_proj"),
        ("attn.in_proj_bias", "attn.in_proj"),
        ("rnn.weight_hh_l1", "rnn.hh_l1"),
        ("rnn.bias_hh_l1", "rnn.hh_l1"),
        ("mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj"),
        ("weight", "weight"),
        ("scale", "scale"),
    ],
)
def test_a_unit_is_a_matrix_with_its_bias(name: str, unit: str) -> None:
    assert unit_of(name) == unit


# ---------------------------------------------------------------------------------------------------- granularity


def test_layers_as_a_whole() -> None:
    model = llama(5)
    method = bound(HFT(granularity="layer"), model)
    assert categories(method) == {"layer": 5}
    assert len(method.active_units()) == 3  # floor(2.5 + 1/2)
    for layer in range(5):
        inside = {n for n, _ in model.named_parameters() if n.startswith(f"model.layers.{layer}.")}
        assert inside & method.trainable_names in (set(), inside)


def test_any_matrices_of_the_model() -> None:
    model = llama(4)
    counts = set()
    for seed in range(20):
        method = bound(HFT(granularity="model", seed=seed), model)
        assert categories(method) == {"model": 36}
        assert len(method.active_units()) == 18
        counts.add(tuple(len(c) for c in per_layer(method.trainable_names, ATTENTION).values()))
    assert any(set(count) != {2} for count in counts)  # unlike by category


# ---------------------------------------------------------------------------------------------------- when it draws


def test_a_half_is_a_function_of_seed_and_stage() -> None:
    model = llama()
    assert bound(HFT(), model).trainable_names == bound(HFT(), llama()).trainable_names
    halves = {bound(HFT(seed=seed), model).trainable_names for seed in range(8)}
    assert len(halves) == 8
    torch.manual_seed(9)
    assert bound(HFT(), model).trainable_names in halves


@pytest.mark.parametrize("redraw", ["never", "epoch", 3])
def test_redraw(redraw: Any) -> None:
    method = bound(HFT(redraw=redraw), llama())
    assert method.is_static == (redraw == "never")
    for step in range(1, 12):
        method.advance(step, epoch=step // 6, global_step=step)
    expected = {"never": [0], "epoch": [0, 6], 3: [0, 3, 6, 9]}[redraw]
    assert [step for step, _ in method.history] == expected
    assert len({names for _, names in method.history}) == len(expected)
    for _, names in method.history:
        assert all(len(chosen) == 2 for chosen in per_layer(names, ATTENTION).values())
    if redraw == "never":
        assert method.before_wrap() == method.trainable_names  # only the half enters the optimizer
    else:
        assert method.before_wrap() == method.selectable


def test_stages_are_fresh_draws_not_complements() -> None:
    method = bound(HFT(redraw=1), llama(6))
    overlaps = []
    for step in range(1, 40):
        before = set(method.active_units())
        method.advance(step, 0, step)
        overlaps.append(len(before & set(method.active_units())) / len(before))
    assert 0.4 < sum(overlaps) / len(overlaps) < 0.6


def test_frozen_half_is_not_in_an_optimizer_built_over_what_trains(tmp_path: Path) -> None:
    method = HFT()
    module = TinyModule("gqa_decoder", filtered=True)
    run = trainer(tmp_path, [method], max_epochs=1)
    run.fit(module, loader("gqa_decoder"), loader("gqa_decoder", shuffle=False))
    held = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert {n for n, p in module.named_parameters() if id(p) in held} == method.trainable_names


# ---------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("fraction", [0, -0.5, 1.01, float("nan"), "half", None])
def test_fraction_out_of_range(fraction: Any) -> None:
    with pytest.raises(ConfigError, match=r"HFT\(fraction=.*in \(0, 1\]"):
        HFT(fraction=fraction)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"granularity": "categories"}, "Did you mean 'category'"),
        ({"granularity": None}, "'layer'"),
        ({"redraw": "epochs"}, "Did you mean 'epoch'"),
        ({"redraw": 0}, "at least 1"),
        ({"state": "dropp"}, "'drop'"),
    ],
)
def test_other_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HFT(**arguments)


def test_unknown_modules_raise_instead_of_training_everything() -> None:
    with pytest.raises(ScopeError, match=r"'model\.layerz'.*Did you mean 'model\.layers"):
        bound(HFT(scope="model.layerz"), llama())


def test_a_fraction_that_rounds_to_nothing_says_what_would_do() -> None:
    model = llama(2)
    with pytest.raises(ConfigError, match=r"rounds to no unit at all among .*8 of attention.*Take (0\.\d+)") as error:
        bound(HFT(fraction=0.01), model)
    match = re.search(r"Take (\S+) or more", str(error.value))
    assert match
    assert len(bound(HFT(fraction=float(match[1])), model).active_units()) >= 1


# ---------------------------------------------------------------------------------------------------- rounding


sizes = st.lists(st.integers(1, 9), min_size=1, max_size=12)
fractions = st.one_of(st.sampled_from([0.25, 1 / 3, 0.4, 0.5, 0.6, 0.75, 1.0]), st.floats(0.01, 1.0))


@settings(max_examples=300, deadline=None)
@given(sizes=sizes, fraction=fractions, seed=st.integers(0, 1000))
def test_counts_are_spread(sizes: list[int], fraction: float, seed: int) -> None:
    counts = spread_counts(sizes, fraction, draw_generator(seed, 0))
    assert sum(counts) == math.floor(fraction * sum(sizes) + 0.5 + 1e-9)
    for count, size in zip(counts, sizes, strict=True):
        assert abs(count - fraction * size) < 1
        assert 0 <= count <= size
    assert counts == spread_counts(sizes, fraction, draw_generator(seed, 0))


@settings(max_examples=100, deadline=None)
@given(sizes=sizes, fraction=fractions, seed=st.integers(0, 1000))
def test_samples_take_the_counts(sizes: list[int], fraction: float, seed: int) -> None:
    groups = [[f"{group}.{member}" for member in range(size)] for group, size in enumerate(sizes)]
    chosen = sample_half(groups, fraction, draw_generator(seed, 0))
    assert len(chosen) == len(set(chosen)) == math.floor(fraction * sum(sizes) + 0.5 + 1e-9)
    assert set(chosen) <= {member for group in groups for member in group}
    taken = Counter(name.split(".")[0] for name in chosen)
    assert all(abs(taken[str(group)] - fraction * size) < 1 for group, size in enumerate(sizes))


@pytest.mark.parametrize(
    ("sizes", "fraction"),
    [
        ([3] * 6, 0.5),
        ([3] * 10, 0.4),
        ([4] * 8, 0.375),
        ([5] * 5, 0.2),
        ([3, 2, 5], 0.3),  # what is rounded down differs from group to group
        ([1, 9, 1, 4, 3], 0.5),
        ([1, 1, 6], 0.125),
    ],
)
def test_no_group_and_no_member_is_preferred(sizes: list[int], fraction: float) -> None:
    """Each member trains with the probability ``fraction`` (exactly, where the fraction of all members is whole)."""
    assert fraction * sum(sizes) == pytest.approx(round(fraction * sum(sizes)))
    groups = [[f"{group}.{member}" for member in range(size)] for group, size in enumerate(sizes)]
    draws = 3000
    drawn = Counter(name for seed in range(draws) for name in sample_half(groups, fraction, draw_generator(seed, 0)))
    tolerance = 4.5 * math.sqrt(draws * fraction * (1 - fraction))
    for group in groups:
        for member in group:
            assert abs(drawn[member] - draws * fraction) < tolerance
