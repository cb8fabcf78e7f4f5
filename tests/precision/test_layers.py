"""Quantised layers against slow re-implementations; loading, order with adapters, merging."""

from __future__ import annotations

import copy
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_peft.core.blocks import find_structure
from lightning_peft.core.quantized import is_quantized
from lightning_peft.core.scope import resolve_scope
from lightning_peft.errors import BaseMismatch, ConfigError, ScopeError
from lightning_peft.precision import (
    dequantize,
    dequantize_layers,
    merge_adapter,
    quantize,
    quantized_bytes,
    quantized_layers,
)
from lightning_peft.precision.layers import base_fingerprint
from tests.oracles.block_quantization import FP4_LEVELS, NF4_LEVELS, int8_rows, nearest_level
from tests.precision.tiny import add_lora, rows, tiny_llama

MODES = ["nf4", "fp4", "nf4-dq", "fp4-dq", "int8"]


def holder(in_features: int = 48, out_features: int = 64, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(in_features, out_features, bias))


@pytest.mark.parametrize("shape", [(48, 64), (24, 40), (33, 7)])
@pytest.mark.parametrize("mode", MODES)
def test_weight_is_that_of_the_papers_formula(mode: str, shape: tuple[int, int]) -> None:
    module = holder(*shape)
    weight = module[0].weight.detach().numpy().copy()
    assert quantize(module, mode, skip=()) == ["0"]
    got = dequantize(module[0]).numpy()
    if mode == "int8":
        expected = int8_rows(weight.astype(np.float16).astype(np.float32))  # LLM.int8() starts from float16
        step = np.abs(weight).max(axis=1, keepdims=True) / 127
        apart = np.abs(got - expected) / step
        assert apart.max() < 1.01
        assert (apart > 0.01).mean() < 1e-3  # a product in float16 may lie on the other side of a half
    else:
        expected = nearest_level(weight, NF4_LEVELS if mode.startswith("nf4") else FP4_LEVELS, block=64)
        # quantised scales are off by up to half an 8-bit step of the largest deviation from their mean
        np.testing.assert_allclose(got, expected, atol=2e-7 if "-dq" not in mode else 0.05 * np.abs(weight).max())
        if "-dq" in mode:
            assert np.abs(got - expected).max() > 0


@pytest.mark.parametrize("mode", MODES)
def test_forward_and_input_gradient_are_those_of_the_dequantised_weight(mode: str) -> None:
    module = holder()
    quantize(module, mode, skip=())
    weight = dequantize(module[0])
    x = torch.randn(2, 5, 48, requires_grad=True)
    reference = torch.nn.functional.linear(x, weight, module[0].bias)
    (expected,) = torch.autograd.grad(reference.square().sum(), x)
    result = module(x)
    (got,) = torch.autograd.grad(result.square().sum(), x)
    torch.testing.assert_close(result, reference, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_evaluation_computes_the_same_and_training_goes_on(mode: str) -> None:
    """bitsandbytes repacks weights in place in evaluation on CPUs with avx512_bf16, and breaks the next step."""
    module = holder(33, 7)
    quantize(module, mode, skip=())
    x = torch.randn(4, 33)
    codes = module[0].weight.detach().clone()
    training = module(x)
    module.eval()
    with torch.no_grad():
        evaluation = module(x)
    module.train()
    x.requires_grad_(True)
    module(x).sum().backward()
    assert torch.equal(training, evaluation)
    assert torch.equal(codes, module[0].weight)
    assert x.grad is not None


def test_bias_keeps_its_dtype_and_gets_a_gradient() -> None:
    for mode in MODES:
        module = holder()
        bias = module[0].bias
        quantize(module, mode, skip=(), compute_dtype=torch.bfloat16)
        module(torch.randn(3, 48)).sum().backward()
        assert module[0].bias is bias
        assert bias.dtype == torch.float32
        assert torch.equal(bias.grad, torch.full((64,), 3.0))
        assert not module[0].weight.requires_grad


def test_quantising_again_is_bit_equal_and_a_flipped_weight_is_seen() -> None:
    for mode in MODES:
        first, second, third = holder(), holder(), holder()
        with torch.no_grad():
            third[0].weight[3, 5] += 0.05
        for module in (first, second, third):
            quantize(module, mode, skip=())
        assert base_fingerprint(first) == base_fingerprint(second) != base_fingerprint(third)
        assert quantize(first, mode, skip=()) == []


def test_bytes() -> None:
    plain = 48 * 64
    expected = {"nf4": plain / 2 + plain / 64 * 4, "int8": plain + 64 * 4}
    for mode, size in expected.items():
        module = holder()
        quantize(module, mode, skip=())
        assert quantized_bytes(module) == size
    module = nn.Sequential(nn.Linear(256, 256))
    quantize(module, "nf4-dq", skip=())
    assert quantized_bytes(module) == 256 * 256 * (0.5 + 1 / 64) + 4 + 4 * 4


def test_state_dicts_load_in_floating_point_in_codes_and_without_the_weight() -> None:
    for mode in MODES:
        source, target = holder(), holder()
        with torch.no_grad():
            target[0].weight.normal_()
        plain = copy.deepcopy(source.state_dict())
        for module in (source, target):
            quantize(module, mode, skip=())
        other = dequantize(target[0]).clone()
        target.load_state_dict({"0.bias": plain["0.bias"]})
        assert torch.equal(dequantize(target[0]), other)
        target.load_state_dict(plain)
        assert torch.equal(dequantize(target[0]), dequantize(source[0]))
        with torch.no_grad():
            target.load_state_dict({**plain, "0.weight": torch.randn(64, 48)})
        assert not torch.equal(dequantize(target[0]), dequantize(source[0]))
        target.load_state_dict(source.state_dict())
        assert torch.equal(dequantize(target[0]), dequantize(source[0]))
        x = torch.randn(3, 48)
        assert torch.equal(target(x), source(x))
        with pytest.raises(RuntimeError, match=r"Missing key.*0\.bias"):
            target.load_state_dict({})


def test_codes_of_another_kind_are_refused() -> None:
    source, target = holder(), holder()
    quantize(source, "fp4", skip=())
    quantize(target, "nf4", skip=())
    with pytest.raises(RuntimeError, match="stored weight is fp4, this layer is nf4"):
        target.load_state_dict(source.state_dict())
    assert issubclass(BaseMismatch, RuntimeError)


# ------------------------------------------------------------------------------------------------ what is quantised


def paths(model: nn.Module) -> set[str]:
    return {path for path, _ in quantized_layers(model)}


def test_embeddings_head_norms_biases_and_adapters_stay_in_floating_point() -> None:
    model = tiny_llama()
    add_lora(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    quantize(model)
    assert len(paths(model)) == 14
    assert all(path.endswith("_proj.base_layer") for path in paths(model))
    for name, parameter in model.named_parameters():
        if "base_layer.weight" in name:
            assert is_quantized(parameter)
        else:
            assert torch.equal(parameter, before[name]), name
            assert parameter.requires_grad == ("lora_" in name)


def test_scope_and_skip_choose_layers() -> None:
    model = tiny_llama()
    quantize(model, scope=["model.layers.1", "*.q_proj"], skip=["*.down_proj", "re:.*layers\\.1\\.mlp\\.up.*"])
    inside = {"model.layers.0.self_attn.q_proj"}
    inside |= {f"model.layers.1.self_attn.{name}_proj" for name in "qkvo"} | {"model.layers.1.mlp.gate_proj"}
    assert paths(model) == inside
    quantize(model, scope="all", skip=())
    assert "lm_head" in paths(model)
    assert len(paths(model)) == 15


def test_tied_weights_are_never_quantised() -> None:
    model = tiny_llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    first, second = model.model.layers[0].mlp, model.model.layers[1].mlp
    second.up_proj.weight = first.up_proj.weight
    quantize(model, skip=())
    assert "lm_head" not in paths(model)
    assert not [path for path in paths(model) if path.endswith("up_proj")]
    assert first.up_proj.weight is second.up_proj.weight
    assert len(paths(model)) == 12


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"skip": ["model.layers.0.self_attn.q_prj"]}, "q_proj"),
        ({"scope": "model.layer.0"}, "model.layers.0"),
        ({"scope": "class:LlamaAttn"}, "LlamaAttention"),
        ({"scope": "norms"}, "holds no torch.nn.Linear"),
        ({"mode": "nf5"}, "nf4"),
        ({"backend": "bitsandbites"}, "bitsandbytes"),
        ({"backend": "torchao", "mode": "fp4"}, "not a mode of torchao"),
    ],
)
def test_mistakes_name_the_nearest_choice(settings: dict[str, Any], message: str) -> None:
    model = tiny_llama()
    with pytest.raises((ScopeError, ConfigError), match=re.escape(message)):
        quantize(model, **{"mode": "nf4", **settings})
    assert not paths(model)


def test_meta_weights_and_a_bare_linear_are_refused() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with pytest.raises(ConfigError, match="load the weights before"):
        quantize(model, skip=())
    with pytest.raises(ConfigError, match="the module around it"):
        quantize(nn.Linear(64, 64), skip=())


def test_quantised_tensors_are_outside_every_scope() -> None:
    model = tiny_llama()
    quantize(model)
    structure = find_structure(model)
    names = set(resolve_scope("blocks", structure).names)
    assert names == {n for n, p in model.named_parameters() if "layers." in n and "norm" in n}
    with pytest.raises(ScopeError, match="Quantised weights cannot be trained"):
        resolve_scope("*.q_proj.weight", structure)


def test_transformers_models_loaded_quantised_stay_as_they_are(tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_llama().save_pretrained(tmp_path)
    for dq in (False, True):
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=dq,
            bnb_4bit_compute_dtype=torch.float32,
        )
        model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
        model.eval()
        ids = rows(2)
        codes = {path: layer.weight.detach().clone() for path, layer in quantized_layers(model)}
        assert len(codes) == 14
        assert quantize(model, "int8") == []
        ours = tiny_llama()
        quantize(ours, "nf4-dq" if dq else "nf4")
        assert base_fingerprint(model) == base_fingerprint(ours)
        with torch.no_grad():
            logits = model(input_ids=ids).logits  # would repack the weights on some CPUs
        for path, layer in quantized_layers(model):
            assert torch.equal(layer.weight, codes[path])
        torch.testing.assert_close(logits, ours.eval()(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------ adapters


@pytest.mark.parametrize("mode", MODES)
def test_injecting_before_or_after_quantising_is_the_same(mode: str) -> None:
    from peft.tuners.lora import bnb as peft_bnb

    ids = rows(3)
    results = []
    for first in ("quantise", "inject"):
        model = tiny_llama()
        if first == "quantise":
            quantize(model, mode)
        add_lora(model)
        quantize(model, mode)
        layer = model.model.layers[0].self_attn.q_proj
        assert type(layer) is (peft_bnb.Linear8bitLt if mode == "int8" else peft_bnb.Linear4bit)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (loss, grads), (other_loss, other_grads) = results
    assert torch.equal(loss, other_loss)
    assert len(grads) == 28
    assert grads.keys() == other_grads.keys()
    assert all(torch.equal(grads[name], other_grads[name]) for name in grads)


@pytest.mark.parametrize("mode", MODES)
def test_peft_puts_its_quantised_layers_over_a_quantised_base(mode: str) -> None:
    from peft.tuners.lora import bnb as peft_bnb

    model = tiny_llama()
    quantize(model, mode)
    add_lora(model)
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    assert len(layers) == 14
    assert {type(layer) for layer in layers} == {peft_bnb.Linear8bitLt if mode == "int8" else peft_bnb.Linear4bit}


def test_dora_and_ia3_over_a_quantised_base() -> None:
    from peft import IA3Config, inject_adapter_in_model

    ids = rows(3)
    for config in ("dora", "ia3"):
        losses = []
        for first in ("quantise", "inject"):
            model = tiny_llama(hidden=64, intermediate=128)  # peft dequantises with the kernel that needs whole blocks
            if first == "quantise":
                quantize(model, "nf4")
            if config == "dora":
                add_lora(model, use_dora=True)
            else:
                targets = ["k_proj", "v_proj", "down_proj"]
                ia3 = IA3Config(target_modules=targets, feedforward_modules=["down_proj"])
                inject_adapter_in_model(ia3, model)
            quantize(model, "nf4")
            losses.append(model(input_ids=ids, labels=ids).loss)
            losses[-1].backward()
            assert any(p.grad is not None for p in model.parameters())
        # DoRA takes the column norms of the weight it meets: exact or rounded
        torch.testing.assert_close(losses[0], losses[1], rtol=0.02 if config == "dora" else 0, atol=0)


def train_a_little(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)))


@pytest.mark.parametrize("mode", MODES)
def test_merging_is_refused_by_default_and_exact_after_dequantising(mode: str) -> None:
    ids = rows(3)
    model = tiny_llama()
    quantize(model, mode)
    add_lora(model)
    train_a_little(model)
    model.eval()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    with pytest.raises(ConfigError, match=r"14 base layer.*quantised"):
        merge_adapter(model)
    merged = merge_adapter(model, dequantize=True)
    assert len(merged) == 14
    assert not paths(model)
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in tiny_llama().named_parameters()}
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_requantising_a_merge_loses_the_adapter() -> None:
    """The reason for the refusal: how much of the adapter's effect a 4-bit merge loses."""
    model = tiny_llama()
    quantize(model, "nf4")
    base = {path: dequantize(layer) for path, layer in quantized_layers(model)}
    add_lora(model)
    train_a_little(model)
    merge_adapter(model, dequantize=True)
    delta = {path: model.get_submodule(path).weight.detach() - weight for path, weight in base.items()}
    quantize(model, "nf4")
    lost = [
        (dequantize(layer) - base[path] - delta[path]).norm() / delta[path].norm()
        for path, layer in quantized_layers(model)
    ]
    assert max(lost) > 0.5


def test_merging_plain_adapters_and_nothing() -> None:
    ids = rows(3)
    model = tiny_llama()
    add_lora(model)
    train_a_little(model)
    expected = model(input_ids=ids).logits
    assert len(merge_adapter(model)) == 14
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="no adapter layers"):
        merge_adapter(model)


def test_dequantised_model_computes_the_same() -> None:
    ids = rows(3)
    model = tiny_llama(dtype=torch.float32)
    quantize(model, "nf4")
    expected = model(input_ids=ids).logits
    assert len(dequantize_layers(model)) == 14
    assert not any(getattr(module, "is_loaded_in_4bit", False) for module in model.modules())
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match="no quantised weight"):
        dequantize(model.lm_head)
