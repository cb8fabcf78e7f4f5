"""Counts of the recorded graph against PyTorch's own counter on real backward passes, and against arithmetic."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lightning_peft.core.flops import StepCost, count_step_flops, measure_step
from lightning_peft.errors import ConfigError
from tests.contract.harness import ConvNet
from tests.oracles.llama_flops import MATRICES, Llama

TOKENS = torch.randint(0, 19, (2, 7), generator=torch.Generator().manual_seed(0))
SIZES: dict[str, Any] = {
    "vocab_size": 19,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Scores and weighted values."""
    batch, heads, length, width = query
    return 2 * (2 * batch * heads * length * key[2] * width)


def attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Scores again, and two products for each of the two of the forward pass."""
    return attention(query, key, value) // 2 * 5


CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
}


def counted(loss_of: Callable[[], Tensor]) -> int:
    """FLOPs of one real step, by PyTorch's counter."""
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        loss_of().backward()
    return counter.get_total_flops()


def llama(**overrides: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(**{**SIZES, "num_key_value_heads": 1, "max_position_embeddings": 8, **overrides})
    )


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes: dict[str, Any] = {"vocab_size": 19, "n_positions": 8, "n_embd": 8, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()


def bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**SIZES))


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(vocab_size=19, d_model=8, d_ff=12, d_kv=4, num_heads=2, num_layers=2, decoder_start_token_id=0)
    )


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**SIZES, num_key_value_heads=1, num_local_experts=3))


def parallel_branches() -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    model = GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, use_parallel_residual=True, bos_token_id=0, eos_token_id=0))
    return checkpointed(model)


def checkpointed(model: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer transformers have another name for it
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.disable_input_require_grads()
    return model.train()


LANGUAGE_MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "llama_eager_attention": lambda: llama(attn_implementation="eager"),
    "llama_checkpointed": lambda: checkpointed(llama()),
    "tied_gpt2": gpt2,
    "bert": bert,
    "t5": t5,
    "mixtral": mixtral,
}


def language_loss(model: nn.Module) -> Callable[[], Tensor]:
    return lambda: model(input_ids=TOKENS, labels=TOKENS).loss


def convolutions() -> tuple[nn.Module, Callable[[], Tensor]]:
    model = nn.Sequential(
        ConvNet(), nn.Unflatten(1, (5, 1)), nn.Conv1d(5, 10, 1, groups=5), nn.ConvTranspose1d(10, 3, 3), nn.Flatten()
    )
    x = torch.randn(2, 1, 6, 6)
    return model, lambda: model(x).square().mean()


def vision_transformer() -> tuple[nn.Module, Callable[[], Tensor]]:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {key: value for key, value in SIZES.items() if key != "vocab_size"}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, num_channels=1))
    x = torch.randn(2, 1, 8, 8)
    return model, lambda: model(pixel_values=x, labels=torch.tensor([0, 1])).loss


def autocast() -> tuple[nn.Module, Callable[[], Tensor]]:
    model = llama()

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return language_loss(model)()

    return model, loss


CASES: dict[str, Callable[[], tuple[nn.Module, Callable[[], Tensor]]]] = {
    **{
        name: lambda make=make: (model := make(), language_loss(model))  # type: ignore[misc]
        for name, make in LANGUAGE_MODELS.items()
    },
    "convolutions": convolutions,
    "vision_transformer": vision_transformer,
    "autocast": autocast,
}


def train_only(model: nn.Module, names: Iterable[str]) -> None:
    names = set(names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
        parameter.grad = None


@pytest.mark.parametrize("case", CASES)
def test_cost_of_any_selection_is_that_of_a_real_step(case: str) -> None:
    torch.manual_seed(0)
    model, loss_of = CASES[case]()
    names = [name for name, _ in model.named_parameters()]
    cost, _, _ = measure_step(loss_of, dict(model.named_parameters()))
    assert cost.step_flops() == cost.step_flops(names) == counted(loss_of) > 0
    choice = random.Random(1)
    distinct = set()
    for _ in range(12):
        selection = choice.sample(cost.names, choice.randint(1, 4))
        train_only(model, selection)
        assert cost.step_flops(selection) == counted(loss_of) == count_step_flops(loss_of), selection
        distinct.add(cost.step_flops(selection))
    assert len(distinct) > 4


def test_recomputation_is_never_underrated() -> None:
    """Of two parallel branches in a checkpointed block, one may be recomputed for the other's sake, in part."""
    model = parallel_branches()
    loss_of = language_loss(model)
    cost, _, _ = measure_step(loss_of, dict(model.named_parameters()))
    assert cost.step_flops() == counted(loss_of)
    exact = 0
    for name in cost.names:
        train_only(model, [name])
        assert cost.step_flops([name]) >= count_step_flops(loss_of) == counted(loss_of), name
        exact += cost.step_flops([name]) == count_step_flops(loss_of)
    assert exact >= len(cost.names) // 2


@pytest.mark.parametrize("case", CASES)
def test_a_chain_never_costs_less_than_the_graph(case: str) -> None:
    model, loss_of = CASES[case]()
    cost, _, _ = measure_step(loss_of, dict(model.named_parameters()))
    choice = random.Random(2)
    for _ in range(30):
        candidates = choice.sample(cost.names, min(8, len(cost.names)))
        paid = choice.sample(cost.names, choice.randint(0, 2))
        chain = cost.linear(candidates, paid)
        assert sorted(chain.order) == sorted(candidates)
        assert list(chain.reach_flops) == sorted(chain.reach_flops)
        for deepest in range(len(chain.order)):
            chosen = [i for i in range(deepest) if choice.random() < 0.5] + [deepest]
            bound = sum(chain.weight_flops[i] for i in chosen) + chain.reach_flops[deepest]
            exact = cost.backward_flops([*paid, *(chain.order[i] for i in chosen)]) - cost.backward_flops(paid)
            assert exact <= bound
            if chosen == list(range(len(chain.order))):
                assert exact == bound


def test_a_perceptron_is_a_chain_of_textbook_costs() -> None:
    """Batch 5, widths 3-7-11-2: each matrix costs 2 b m n for its weight and as much for its input."""
    model = nn.Sequential(nn.Linear(3, 7), nn.ReLU(), nn.Linear(7, 11), nn.ReLU(), nn.Linear(11, 2))
    x = torch.randn(5, 3)
    cost, _, _ = measure_step(lambda: model(x).sum(), dict(model.named_parameters()))
    top, middle, bottom = 2 * 5 * 11 * 2, 2 * 5 * 7 * 11, 2 * 5 * 3 * 7
    chain = cost.linear(cost.names)
    assert cost.forward_flops == top + middle + bottom
    assert dict(zip(chain.order, chain.weight_flops, strict=True)) == {
        "4.weight": top,
        "4.bias": 0,
        "2.weight": middle,
        "2.bias": 0,
        "0.weight": bottom,
        "0.bias": 0,
    }
    reach = dict(zip(chain.order, chain.reach_flops, strict=True))
    assert [reach[f"{layer}.weight"] for layer in (4, 2, 0)] == [0, top, top + middle]
    assert cost.backward_flops(["2.weight"]) == top + middle


def test_llama_agrees_with_arithmetic() -> None:
    sizes = Llama(num_layers=3, width=8, hidden=12, vocabulary=19, batch=2, length=7)
    model = llama(num_hidden_layers=3, num_key_value_heads=2, attn_implementation="eager")
    cost, _, _ = measure_step(language_loss(model), dict(model.named_parameters()))
    rotary_angles = 2 * 7 * 2  # counted with some versions of transformers: two frequencies at seven positions
    assert cost.forward_flops - sizes.forward() in (0, rotary_angles)
    assert cost.backward_flops() == sizes.full() - sizes.forward()
    parts = [("q", "k", "v"), *((matrix,) for matrix in ("o", "gate", "up", "down"))]
    path = {matrix: f"{'self_attn' if matrix in 'qkvo' else 'mlp'}.{matrix}_proj.weight" for matrix in MATRICES}
    choice = random.Random(3)
    for _ in range(30):
        drawn = [(choice.randrange(3), choice.choice(parts)) for _ in range(choice.randint(1, 6))]
        trained = {(layer, matrix) for layer, part in drawn for matrix in part}
        selection = ["lm_head.weight", *(f"model.layers.{layer}.{path[matrix]}" for layer, matrix in trained)]
        assert cost.backward_flops(selection) == sizes.backward(trained, embeddings=False), sorted(trained)


def test_gradients_are_those_of_backward_and_nothing_is_left_behind() -> None:
    model = ConvNet().eval()
    x = torch.randn(2, 1, 6, 6)
    parameters = dict(model.named_parameters())
    fired = []
    for parameter in parameters.values():
        parameter.register_post_accumulate_grad_hook(fired.append)
    cost, loss, gradients = measure_step(lambda: model(x).square().mean(), parameters)
    assert cost.names == tuple(parameters)
    assert not fired
    assert all(parameter.grad is None for parameter in parameters.values())
    expected = model(x).square().mean()
    torch.testing.assert_close(loss, expected.detach(), rtol=0, atol=0)
    expected.backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=0, atol=0)


def test_a_tensor_that_the_loss_does_not_depend_on() -> None:
    model = nn.ModuleDict({"unused": nn.Linear(3, 3), "used": nn.Linear(3, 2)})
    x = torch.randn(4, 3)
    cost, _, gradients = measure_step(lambda: model["used"](x).sum(), dict(model.named_parameters()))
    assert cost.names == ("used.weight", "used.bias")
    assert gradients["unused.weight"] is None
    assert cost.backward_flops(["unused.weight"]) == 0
    assert cost.linear(["unused.weight"]).order == ()


def test_a_loss_without_parameters_is_an_error() -> None:
    with pytest.raises(ConfigError, match="depends on no parameter"):
        measure_step(lambda: torch.ones(()), {})


def test_an_input_that_requires_a_gradient_is_paid_whatever_trains() -> None:
    model = nn.Sequential(nn.Linear(3, 7), nn.Linear(7, 2))
    x = torch.randn(5, 3)

    def loss_of() -> Tensor:
        return model(x.clone().requires_grad_()).sum()

    cost, _, _ = measure_step(loss_of, dict(model.named_parameters()))
    assert cost.fixed_flops == 2 * 5 * (7 * 2 + 3 * 7)
    for selection in (["1.bias"], ["0.weight"], ["1.weight", "0.bias"]):
        train_only(model, selection)
        assert cost.step_flops(selection) == counted(loss_of) == count_step_flops(loss_of)


class TwoProducts(torch.autograd.Function):
    """A user's function that computes all gradients at once, wanted or not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight = ctx.saved_tensors
        return grads[0] @ weight.T, x.T @ grads[0]


def test_a_custom_function_is_paid_in_full() -> None:
    below, weight = nn.Linear(3, 3, bias=False), nn.Parameter(torch.randn(3, 2))
    parameters = {"below": below.weight, "weight": weight}
    x = torch.randn(5, 3)

    def loss_of() -> Tensor:
        return TwoProducts.apply(below(x), weight).sum()  # type: ignore[union-attr]

    cost, _, _ = measure_step(loss_of, parameters)
    for selection in (["below"], ["weight"], ["below", "weight"]):
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in selection)
        assert cost.step_flops(selection) == counted(loss_of)


def test_gradients_that_pass_through_views_and_factors_find_their_weight() -> None:
    """``baddbmm`` scales its products after computing them: they must not count as shared."""
    bias, left, right = (nn.Parameter(torch.randn(2, 3, 3)) for _ in range(3))

    def loss_of() -> Tensor:
        return torch.baddbmm(bias, left, right, beta=0.5, alpha=2.0).sum()

    parameters = {"bias": bias, "left": left, "right": right}
    cost, _, _ = measure_step(loss_of, parameters)
    product = 2 * 2 * 3 * 3 * 3
    assert {name: cost.backward_flops([name]) for name in parameters} == {"bias": 0, "left": product, "right": product}


def test_reentrant_checkpointing_is_an_error() -> None:
    model = nn.Linear(3, 3)
    x = torch.randn(2, 3, requires_grad=True)
    with pytest.raises(ConfigError, match="use_reentrant"):
        measure_step(lambda: checkpoint(model, x, use_reentrant=True).sum(), dict(model.named_parameters()))  # type: ignore


def test_step_cost_of_an_empty_selection_is_the_forward_pass() -> None:
    cost = StepCost(("a", "b"), 10, ((frozenset({0}), 3), (frozenset({0, 1}), 4)))
    assert cost.step_flops([]) == 10
    assert cost.step_flops(["b"]) == 14
    assert cost.step_flops() == 17
