"""DropBP: exact forward pass, gradients against detached branches, FLOPs, rates, composition."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_peft import LISA, DropBP
from lightning_peft.core.blocks import find_structure
from lightning_peft.core.draw import draw_generator
from lightning_peft.core.trainable import set_trainable
from lightning_peft.errors import ConfigError, ScopeError
from lightning_peft.methods.layers.dropbp import sample_dropped
from tests.contract.harness import NUM_LAYERS, TinyModule, gqa_decoder, loader, tied_decoder, trainer
from tests.oracles.llama_flops import MATRICES, Llama

NUM_DRAWS = 4000


def in_force(method: DropBP, model: nn.Module) -> list[int]:
    """``method`` at its first draw on ``model``, without a Trainer; returns the dropped blocks."""
    structure = find_structure(model)
    method.bind(structure, dict.fromkeys(structure.parameters, True))
    method.begin(0, 0, 0, continues=False)
    set_trainable(structure.parameters, method.trainable_names)
    method.switched(None)  # pyright: ignore[reportArgumentType]
    active = method.active_units()
    return [index for index, unit in enumerate(method.units) if unit not in active]


# ---------------------------------------------------------------------------------------------------- the draw


@given(num_blocks=st.integers(2, 40), rate=st.floats(0, 0.999), seed=st.integers(0, 99))
def test_number_dropped(num_blocks: int, rate: float, seed: int) -> None:
    dropped = sample_dropped(num_blocks, rate, torch.Generator().manual_seed(seed))
    assert dropped == sorted(set(dropped))
    low, high = math.floor(rate * num_blocks + 1e-9), math.ceil(rate * num_blocks)
    assert min(low, num_blocks - 1) <= len(dropped) <= min(high, num_blocks - 1)
    assert len(dropped) < num_blocks


def test_mean_rate_and_uniform_blocks() -> None:
    draws = [sample_dropped(6, 0.4, draw_generator(0, index, "blocks")) for index in range(NUM_DRAWS)]
    mean = sum(map(len, draws)) / NUM_DRAWS
    assert mean == pytest.approx(2.4, abs=4 * math.sqrt(0.24 / NUM_DRAWS))
    assert chisquare([sum(block in drawn for drawn in draws) for block in range(6)]).pvalue > 0.001
    assert sample_dropped(6, 0.0, torch.Generator()) == []


# ---------------------------------------------------------------------------------------------------- gradients


def run(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids = torch.arange(14).view(2, 7)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def detach_branches(model: Any, dropped: Sequence[int]) -> None:
    """What the paper does, by hand: detach what attention and feed-forward add to the stream."""
    blocks = model.model.layers if hasattr(model, "model") else model.transformer.h
    for index in dropped:
        for part in (
            (blocks[index].self_attn, blocks[index].mlp)
            if hasattr(model, "model")
            else (
                blocks[index].attn,
                blocks[index].mlp,
            )
        ):

            def hook(module: Any, args: Any, output: Any) -> Any:
                if isinstance(output, torch.Tensor):
                    return output.detach()
                return (output[0].detach(), *output[1:])

            part.register_forward_hook(hook)


@pytest.mark.parametrize("make", [gqa_decoder, tied_decoder])
@pytest.mark.parametrize("seed", range(4))
def test_gradients_are_those_of_detached_branches(make: Any, seed: int) -> None:
    results = []
    for by_hand in (False, True):
        torch.manual_seed(0)
        model = make().eval()
        method = DropBP(0.5, seed=seed)
        dropped = in_force(method, model)
        assert len(dropped) == 2
        if by_hand:
            method.finished()
            detach_branches(model, dropped)
        results.append(run(model))
    (loss, grads), (expected_loss, expected) = results
    assert torch.equal(loss, expected_loss)
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-7, msg=name)


def test_forward_pass_is_exact_and_hooks_go() -> None:
    torch.manual_seed(0)
    model = gqa_decoder().eval()
    plain, full = run(model)
    model.zero_grad()
    method = DropBP(0.5)
    in_force(method, model)
    loss, grads = run(model)
    assert torch.equal(loss, plain)
    assert grads.keys() < full.keys()
    method.finished()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.zero_grad()
    again, restored = run(model)
    assert torch.equal(again, plain)
    assert all(torch.equal(restored[name], full[name]) for name in full)
    assert not any(module._forward_hooks for module in model.modules())


def test_lowest_and_highest_block_dropped_still_reach_the_embeddings() -> None:
    model = gqa_decoder()
    seed = next(s for s in range(100) if sample_dropped(4, 0.5, draw_generator(s, 0, "blocks")) == [0, 3])
    assert in_force(DropBP(0.5, seed=seed), model) == [0, 3]
    _, grads = run(model)
    assert grads["model.embed_tokens.weight"].abs().sum() > 0
    assert {name.split(".")[2] for name in grads if ".layers." in name} == {"1", "2"}


def test_low_precision_stream() -> None:
    """Under autocast a block's output may have another type than its input."""
    model = gqa_decoder()
    in_force(DropBP(0.5), model)
    with torch.autocast("cpu", torch.bfloat16):
        loss, grads = run(model)
    assert torch.isfinite(loss)
    assert all(grad.dtype == torch.float32 and torch.isfinite(grad).all() for grad in grads.values())


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_with_activation_checkpointing() -> None:
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model: Any = gqa_decoder()
        model.config.attention_dropout = 0.0
        model.train()
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        in_force(DropBP(0.5), model)
        results.append(run(model))
    (loss, grads), (other, others) = results
    assert torch.equal(loss, other)
    assert grads.keys() == others.keys()
    for name in grads:
        torch.testing.assert_close(grads[name], others[name], msg=name)


# ---------------------------------------------------------------------------------------------------- cost


def test_flops_of_a_step() -> None:
    """A dropped block has no backward pass at all."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = Llama(num_layers=16, width=64, hidden=172, vocabulary=256, batch=1, length=64)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=16,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config)
    dropped = in_force(DropBP(0.5), model)
    assert len(dropped) == 8
    ids = torch.zeros(1, 64, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    kept = 2 * (sum(sizes.matrix(name) for name in MATRICES) + sizes.attention())
    expected = sizes.forward() + 8 * kept + 2 * sizes.head()
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-3)
    assert counter.get_total_flops() / sizes.full() == pytest.approx(0.68, abs=0.01)


# ---------------------------------------------------------------------------------------------------- in a fit


def fit(tmp_path: Path, *methods: Any, model: str = "gqa_decoder", module: Any = None, **kw: Any) -> Any:
    torch.manual_seed(0)
    module = module or TinyModule(model)
    trainer(tmp_path, methods, **kw).fit(module, loader(model), loader(model, shuffle=False))
    return module


def test_each_step_has_a_draw_and_all_blocks_come(tmp_path: Path) -> None:
    method = DropBP(0.5)
    module = fit(tmp_path, method)
    assert [step for step, _ in method.history] == list(range(12))
    seen = [{name.split(".")[3] for name in names if ".layers." in name} for _, names in method.history]
    assert {len(blocks) for blocks in seen} == {2}
    assert set().union(*seen) == {"0", "1", "2", "3"}
    assert not any(part._forward_hooks for part in module.modules())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # called by peft
def test_over_adapters(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    module = TinyModule("gqa_decoder")
    module.model = get_peft_model(module.model, LoraConfig(target_modules=["q_proj", "down_proj"], r=2))  # pyright: ignore[reportArgumentType]
    method = DropBP(0.5, scope="adapters", always=())
    fit(tmp_path, method, module=module)
    assert all("lora_" in name for name in method.selectable)
    assert len(method.units) == NUM_LAYERS
    assert all(len({n.split(".layers.")[1][0] for n in names}) == 2 for _, names in method.history)


def test_what_another_method_trains_in_its_blocks_is_an_error(tmp_path: Path) -> None:
    methods = [DropBP(0.5, scope="*.mlp.*"), LISA(4, scope="*.self_attn.*", always=())]
    with pytest.raises(ConfigError, match=r"drops the backward pass of .* as a whole, and .*self_attn"):
        fit(tmp_path, *methods)


def test_beside_a_method_on_other_blocks(tmp_path: Path) -> None:
    methods = [DropBP(0.5, scope="*.layers.[01].*"), LISA(1, period_steps=2, scope="*.layers.[23].*", always=())]
    fit(tmp_path, *methods)
    assert len(methods[0].history) == 12
    assert len(methods[1].history) == 6


# ---------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("rate", [1, 1.5, -0.1, True, "half", None, float("nan")])
def test_rate_out_of_range(rate: Any) -> None:
    with pytest.raises(ConfigError, match=r"DropBP\(drop_rate="):
        DropBP(rate)


def test_scopes_without_a_stream() -> None:
    with pytest.raises(ScopeError, match="lm_head lies in no block"):
        in_force(DropBP(scope=["blocks", "lm_head"]), gqa_decoder())
    with pytest.raises(ScopeError, match=r"1 block\(s\)"):
        in_force(DropBP(scope="model.layers.1"), gqa_decoder())
    with pytest.raises(ScopeError, match="bare layer"):
        in_force(DropBP(), nn.Sequential(*[nn.Linear(4, 4) for _ in range(5)]))


class Narrowing(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width - 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def test_blocks_that_change_the_shape(tmp_path: Path) -> None:
    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Narrowing(width) for width in (6, 5, 4)])

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            x = batch[0].flatten(1)[:, :6]
            for block in self.blocks:
                x = block(x)
            return x.square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    run = trainer(tmp_path, [DropBP(0.6)], limit_val_batches=0)
    with pytest.raises(ConfigError, match=r"output of blocks\.\d has the shape \(2, \d\).*no residual stream"):
        run.fit(Module(), loader("conv_net"))
