"""The methods with a fixed rule: Telly, LastLayer, BitFit, EmbeddingsAndHead, RandomTuning."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_peft import BitFit, EmbeddingsAndHead, LastLayer, RandomTuning, Telly
from lightning_peft.core.blocks import find_structure
from lightning_peft.core.draw import draw_generator
from lightning_peft.errors import ConfigError, ScopeError
from lightning_peft.methods.base import MethodCallback
from lightning_peft.methods.layers.random_tuning import sample_to_budget
from tests.contract.harness import NUM_LAYERS, TinyModule, gqa_decoder, loader, tied_decoder, trainer
from tests.oracles.llama_flops import MATRICES, Llama


def bound(method: MethodCallback, model: nn.Module, frozen: Sequence[str] = ()) -> MethodCallback:
    """``method`` with its first draw on ``model``, without a Trainer."""
    structure = find_structure(model)
    method.bind(structure, {name: name not in frozen for name in structure.parameters})
    method.begin(0, 0, 0, continues=False)
    return method


def names_of(model: nn.Module, *prefixes: str) -> set[str]:
    return {n for n, _ in model.named_parameters() if n.startswith(prefixes)}


def all_names(model: nn.Module) -> set[str]:
    return {n for n, _ in model.named_parameters()}


def encoder(num_layers: int = 4) -> nn.Module:
    from transformers import RobertaConfig, RobertaModel

    return RobertaModel(
        RobertaConfig(
            vocab_size=23,
            hidden_size=8,
            num_hidden_layers=num_layers,
            num_attention_heads=2,
            intermediate_size=12,
            max_position_embeddings=12,
        )
    )


def encoder_decoder(tied: bool = True) -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=19, d_model=8, d_ff=12, d_kv=4, num_layers=2, num_heads=2)
    config.tie_word_embeddings = tied
    return T5ForConditionalGeneration(config)


class Untied(TinyModule):
    """Llama and what the first forward pass of each block looked like to autograd."""

    def __init__(self) -> None:
        super().__init__("gqa_decoder")
        self.inputs: list[bool] = []
        self.outputs: list[bool] = []
        for layer in self.model.model.layers:
            layer.register_forward_hook(self.look, with_kwargs=True)

    def look(self, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if torch.is_grad_enabled():
            self.inputs.append(hidden.grad_fn is not None)
            self.outputs.append((output[0] if isinstance(output, tuple) else output).grad_fn is not None)


def fit(method: MethodCallback, tmp_path: Path) -> Untied:
    module = Untied()
    run = trainer(tmp_path, [method], max_steps=1, max_epochs=None, accumulate_grad_batches=1, limit_val_batches=0)
    run.fit(module, loader("gqa_decoder"), loader("gqa_decoder", shuffle=False))
    return module


# ---------------------------------------------------------------------------------------------------- Telly


@pytest.mark.parametrize("frozen", range(-1, 4))
def test_telly_freezes_embeddings_and_the_bottom(frozen: int) -> None:
    model = encoder()
    method = bound(Telly(frozen), model)
    below = [f"encoder.layer.{index}." for index in range(max(frozen, 0))]
    expected = all_names(model) - names_of(model, *below, *(["embeddings."] if frozen >= 0 else []))
    assert method.trainable_names == expected


def test_telly_counts_parameters_as_the_paper_does() -> None:
    """Base minus embeddings minus K layers: the parameter counts of the authors' notebook, on a smaller encoder."""
    model = encoder()
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    layer = sum(size for name, size in sizes.items() if name.startswith("encoder.layer.0."))
    embeddings = sum(size for name, size in sizes.items() if name.startswith("embeddings."))
    assert layer > 0 < embeddings
    for frozen in range(4):
        counted = bound(Telly(frozen), model).describe()["num_trainable_parameters"]
        assert counted == sum(sizes.values()) - embeddings - frozen * layer
    assert bound(Telly(-1), model).describe()["num_trainable_parameters"] == sum(sizes.values())


@pytest.mark.parametrize("frozen", range(NUM_LAYERS))
def test_telly_truncates_the_backward_pass_at_the_cut(frozen: int, tmp_path: Path) -> None:
    module = fit(Telly(frozen), tmp_path)
    assert module.inputs == [layer > frozen for layer in range(NUM_LAYERS)]  # block K's input has no grad_fn
    assert module.outputs == [layer >= frozen for layer in range(NUM_LAYERS)]


def test_frozen_prefix_may_run_without_autograd() -> None:
    """Nothing below the cut is needed by the backward pass: the same loss and gradients without a graph there."""
    results = []
    for without in (False, True):
        torch.manual_seed(0)
        model: Any = gqa_decoder().eval()
        active = bound(Telly(2), model).trainable_names
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in active)
        if without:
            for part in (model.model.embed_tokens, *model.model.layers[:2]):
                part.forward = torch.no_grad()(part.forward)
        ids = torch.arange(10).view(2, 5)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (loss, grads), (other, others) = results
    assert torch.equal(loss, other)
    assert grads.keys() == others.keys() > set()
    assert all(torch.equal(grads[name], others[name]) for name in grads)


def test_telly_freezes_a_tied_head_with_the_embedding() -> None:
    model = tied_decoder()
    names = bound(Telly(0), model).trainable_names
    assert names == all_names(model) - {"transformer.wte.weight", "transformer.wpe.weight"}


def test_telly_freezes_the_encoder_of_an_encoder_decoder_first() -> None:
    model = encoder_decoder()
    names = bound(Telly(2), model).trainable_names
    assert names == names_of(model, "encoder.final_layer_norm", "decoder.")
    names = bound(Telly(3), model).trainable_names
    assert names == names_of(model, "encoder.final_layer_norm", "decoder.") - names_of(model, "decoder.block.0.")
    with pytest.raises(ConfigError, match=r"4 block\(s\).*At most 3"):
        bound(Telly(4), model)


@pytest.mark.parametrize("number", [-2, 1.5, True, "two", None, float("inf"), float("nan")])
def test_telly_refuses_what_is_no_number_of_blocks(number: Any) -> None:
    with pytest.raises(ConfigError, match="Telly"):
        Telly(number)


def test_telly_leaves_alone_what_the_user_froze() -> None:
    model = encoder()
    frozen = sorted(names_of(model, "encoder.layer.3."))
    assert not bound(Telly(1), model, frozen).trainable_names & set(frozen)


# ---------------------------------------------------------------------------------------------------- LastLayer


@pytest.mark.parametrize("num_layers", range(1, NUM_LAYERS + 1))
def test_last_layers_and_nothing_else(num_layers: int, tmp_path: Path) -> None:
    model = gqa_decoder()
    last = [f"model.layers.{index}." for index in range(NUM_LAYERS - num_layers, NUM_LAYERS)]
    assert bound(LastLayer(num_layers), model).trainable_names == names_of(model, *last)
    with_head = bound(LastLayer(num_layers, always=("head", "norms")), model)
    assert with_head.trainable_names == names_of(model, *last, "lm_head", "model.norm")
    module = fit(LastLayer(num_layers), tmp_path)
    first = NUM_LAYERS - num_layers
    assert module.inputs == [layer > first for layer in range(NUM_LAYERS)]
    assert module.outputs == [layer >= first for layer in range(NUM_LAYERS)]


def test_last_layer_of_an_encoder_decoder_is_the_decoders() -> None:
    model = encoder_decoder()
    assert bound(LastLayer(), model).trainable_names == names_of(model, "decoder.block.1.")
    encoder_only = bound(LastLayer(scope="encoder.block"), model)
    assert encoder_only.trainable_names == names_of(model, "encoder.block.1.")


@pytest.mark.parametrize("number", [0, -1, 1.5, True, "two", None, float("inf")])
def test_last_layer_refuses_what_is_no_number_of_blocks(number: Any) -> None:
    with pytest.raises(ConfigError, match="LastLayer"):
        LastLayer(number)


def test_more_last_layers_than_there_are() -> None:
    with pytest.raises(ConfigError, match=rf"num_layers=9.*{NUM_LAYERS} block"):
        bound(LastLayer(9), gqa_decoder())


# ---------------------------------------------------------------------------------------------------- BitFit


def classifier() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=19,
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=12,
            max_position_embeddings=12,
        )
    )


def test_bitfit_trains_biases_and_the_head() -> None:
    model = classifier()
    biases = {name for name in all_names(model) if name.endswith(".bias")}
    assert len(biases) == 2 * 8 + 3  # per layer 6 linear and 2 norms; embeddings' norm, pooler, classifier
    method = bound(BitFit(), model)
    assert biases | {"classifier.weight"} <= method.trainable_names
    extra = method.trainable_names - biases
    assert all(name.startswith(("classifier", "bert.pooler")) for name in extra), extra
    only = bound(BitFit(always=()), model)
    assert only.trainable_names == biases


def test_bitfit_on_some_biases() -> None:
    method = bound(BitFit(scope="*.query.bias", always=()), classifier())
    assert method.trainable_names == {f"bert.encoder.layer.{i}.attention.self.query.bias" for i in range(2)}


@pytest.mark.parametrize("make", [gqa_decoder, encoder_decoder])
def test_bitfit_on_a_model_without_biases_is_an_error(make: Any) -> None:
    with pytest.raises(ScopeError, match="'biases' matches no parameter"):
        bound(BitFit(), make())


def test_bitfit_moves_exactly_the_biases_and_computes_no_weight_gradient(tmp_path: Path) -> None:
    module = TinyModule("tied_decoder")
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    run = trainer(tmp_path, [BitFit(always=())], max_epochs=1, limit_val_batches=0)
    run.fit(module, loader("tied_decoder"), loader("tied_decoder", shuffle=False))
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if name.endswith(".bias")}


def test_bitfit_costs_two_thirds() -> None:
    """Forward and input gradients, no weight gradients."""

    def flops(train_weights: bool) -> int:
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Linear(32, 32) for _ in range(8)])
        structure = find_structure(model)
        method = BitFit(always=())
        method.bind(structure, dict.fromkeys(structure.parameters, True))
        active = method.before_wrap()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(train_weights or name in active)
        with FlopCounterMode(display=False) as counter:
            model(torch.ones(4, 32, requires_grad=True)).sum().backward()
        return counter.get_total_flops()

    assert flops(False) / flops(True) == pytest.approx(2 / 3)


# ---------------------------------------------------------------------------------------------------- EmbeddingsAndHead


def test_embeddings_and_head() -> None:
    model = gqa_decoder()
    names = bound(EmbeddingsAndHead(), model).trainable_names
    assert names == {"model.embed_tokens.weight", "lm_head.weight"}
    model = tied_decoder()
    names = bound(EmbeddingsAndHead(), model).trainable_names
    assert names == {"transformer.wte.weight", "transformer.wpe.weight"}


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_and_head_of_an_encoder_decoder(tied: bool) -> None:
    names = bound(EmbeddingsAndHead(), encoder_decoder(tied)).trainable_names
    untied = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"}
    assert names == {"shared.weight"} | (set() if tied else untied)


def test_part_of_embeddings_and_head() -> None:
    names = bound(EmbeddingsAndHead(scope=["embeddings", "!*wpe*"]), tied_decoder()).trainable_names
    assert names == {"transformer.wte.weight"}


# ---------------------------------------------------------------------------------------------------- FLOPs

SIZES = Llama(num_layers=16, width=64, hidden=172, vocabulary=256, batch=1, length=64)


def measured_flops(method: MethodCallback | None, num_layers: int) -> int:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=SIZES.vocabulary,
        hidden_size=SIZES.width,
        intermediate_size=SIZES.hidden,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        max_position_embeddings=SIZES.length,
    )
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config)
    if method is not None:
        active = bound(method, model).trainable_names
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in active)
    ids = torch.zeros(SIZES.batch, SIZES.length, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("method", "num_layers", "first", "card"),
    [(Telly(8), 16, 8, 0.672), (LastLayer(2, always=("head",)), 8, 6, 0.52)],
    ids=["telly", "last_layer"],
)
def test_flops_of_a_step(method: MethodCallback, num_layers: int, first: int, card: float) -> None:
    """Against arithmetic, and against the figures of the reference and of the method's card."""
    sizes = Llama(num_layers, SIZES.width, SIZES.hidden, SIZES.vocabulary, SIZES.batch, SIZES.length)
    trained = [(layer, matrix) for layer in range(first, num_layers) for matrix in MATRICES]
    expected = sizes.forward() + sizes.backward(trained, embeddings=False, norms_in=range(first, num_layers))
    measured = measured_flops(method, num_layers)
    assert measured == pytest.approx(expected, rel=1e-3)
    assert measured / measured_flops(None, num_layers) == pytest.approx(card, abs=0.01)


# ---------------------------------------------------------------------------------------------------- RandomTuning


@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=30), budget=st.integers(0, 300), seed=st.integers(0, 1000)
)
def test_budget_is_kept_and_filled(sizes: list[int], budget: int, seed: int) -> None:
    chosen = sample_to_budget(sizes, budget, torch.Generator().manual_seed(seed))
    assert chosen == sorted(set(chosen))
    left = budget - sum(sizes[index] for index in chosen)
    assert left >= 0
    assert all(size > left for index, size in enumerate(sizes) if index not in chosen)


def test_equal_tensors_are_equally_likely() -> None:
    counts = [0] * 7
    for index in range(3000):
        for chosen in sample_to_budget([4] * 7, 13, draw_generator(0, index, "tensors")):
            counts[chosen] += 1
    assert sum(counts) == 3000 * 3
    assert chisquare(counts).pvalue > 0.001


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("make", [gqa_decoder, tied_decoder, classifier, encoder_decoder])
def test_random_tensors_within_the_budget(make: Any, fraction: float) -> None:
    model = make()
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}  # a tied tensor counts once
    chosen = set()
    for seed in range(5):
        names = bound(RandomTuning(fraction, seed=seed), model).trainable_names
        left = fraction * sum(sizes.values()) - sum(sizes[name] for name in names)
        assert left >= -1e-9
        assert all(size > left - 1 for name, size in sizes.items() if name not in names)
        chosen.add(names)
    assert len(chosen) == (1 if fraction == 1 else 5)


def test_what_trains_always_is_outside_the_budget() -> None:
    model = gqa_decoder()
    method = bound(RandomTuning(0.2, scope="blocks", always=("head",)), model)
    inside = method.trainable_names - {"lm_head.weight"}
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert "lm_head.weight" in method.trainable_names
    assert inside <= names_of(model, "model.layers.")
    budget = sum(size for name, size in sizes.items() if ".layers." in name) * 0.2
    assert 0.5 * budget < sum(sizes[name] for name in inside) <= budget


def test_redraws_differ_and_depend_on_seed_and_index_alone() -> None:
    def draws(model_seed: int) -> list[frozenset[str]]:
        torch.manual_seed(model_seed)
        method = bound(RandomTuning(0.2, redraw=2), gqa_decoder())
        for step in range(8):
            method.advance(step, 0, step)
        assert [step for step, _ in method.history] == [0, 2, 4, 6]
        return [names for _, names in method.history]

    assert draws(0) == draws(1)
    assert len(set(draws(0))) == 4


def test_a_budget_that_holds_no_tensor() -> None:
    with pytest.raises(ConfigError, match=r"smallest tensor of the scope \(8\)"):
        bound(RandomTuning(1e-4), gqa_decoder())


@pytest.mark.parametrize("fraction", [0, -0.1, 1.1, float("nan"), True, "half", None])
def test_fraction_out_of_range(fraction: Any) -> None:
    with pytest.raises(ConfigError, match="RandomTuning"):
        RandomTuning(fraction)
