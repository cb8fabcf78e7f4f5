from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from lightning_peft import MoSA
from lightning_peft.adapters.native import MoSAConfig
from lightning_peft.adapters.native.mosa import deal_out, symmetric_divergence
from lightning_peft.errors import ConfigError
from tests.adapters.native.life import live, resume
from tests.adapters.native.models import batch, build, output
from tests.adapters.native.test_in_training import Module, fit, loader
from tests.adapters.native.test_three_factor import layers, shake

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # peft
    pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*GPU available"),
]


def test_life(tmp_path: Path) -> None:
    config = MoSAConfig(r=8, target_modules=["mlp"], scaling=1.0)
    live(build("llama"), batch("llama"), config, 2 * (2 * 32 * 8 + 8 + 32), tmp_path, merges=False)


def test_shares_are_disjoint_equal_and_random() -> None:
    dealt = deal_out((7, 5), 4, torch.Generator().manual_seed(0))
    counts = torch.bincount(dealt.flatten().long())
    assert counts.sort(descending=True).values.tolist() == [9, 9, 9, 8]
    assert not torch.equal(dealt, deal_out((7, 5), 4, torch.Generator().manual_seed(1)))
    handle = get_peft_model(build("llama"), MoSAConfig(r=8, target_modules=["mlp"]))
    first, second = (layer.experts("default") for layer in layers(handle).values())
    assert not torch.equal(first, second)
    again = get_peft_model(build("llama"), MoSAConfig(r=8, target_modules=["mlp"]))
    assert torch.equal(first, next(iter(layers(again).values())).experts("default")), (
        "a saved adapter goes on as it was"
    )


@pytest.mark.parametrize("form", ["series", "parallel"])
def test_values_and_gradients_are_those_of_the_formula(form: Any) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = nn.Sequential(nn.Linear(4, 4)).double()
        x, C = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    config = MoSAConfig(r=6, form=form, experts=3, scaling=0.7, activation="none", target_modules=["0"])
    handle = get_peft_model(model, config)
    layer: Any = layers(handle)["base_model.model.0"]
    shake(handle, 0.5)
    down, up, b, c = (layer.tensor(role, "default").detach() for role in ("down", "up", "down_bias", "up_bias"))
    belongs = layer.experts("default")
    y = layer.base_layer(x)
    h = (y if form == "series" else x) @ down.T + b
    outputs = []
    handle.train()
    for expert in range(3):
        layer.chosen["default"] = expert
        W = up.clone().requires_grad_()
        masked = torch.zeros_like(W)
        for i in range(4):
            for j in range(6):
                if belongs[i, j] == expert:
                    masked[i, j] = W[i, j]
        expected = y + 0.7 * (h @ masked.T + c)
        out = handle(x)
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
        handle.zero_grad()
        (out * C).sum().backward()
        (expected * C).sum().backward()
        gradient = layer.tensor("up", "default").grad
        torch.testing.assert_close(gradient, W.grad, rtol=1e-9, atol=1e-10)
        assert (gradient != 0).equal(belongs == expert)
        outputs.append(out.detach())
    handle.eval()
    torch.testing.assert_close(handle(x), torch.stack(outputs).mean(0), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(handle(x), y + 0.7 * (h @ (up / 3).T + c), rtol=1e-10, atol=1e-10)


def test_divergence() -> None:
    p, q = torch.tensor([[0.2, 0.8], [0.5, 0.5]]), torch.tensor([[0.6, 0.4], [0.5, 0.5]])
    expected = 0.5 * ((p * (p / q).log()).sum() + (q * (q / p).log()).sum()) / 2
    assert symmetric_divergence(p.log(), q.log()).item() == pytest.approx(expected.item(), rel=1e-5)
    assert symmetric_divergence(p, p).item() == pytest.approx(0, abs=1e-7)
    first = p.log().requires_grad_()
    symmetric_divergence(first, q.log()).backward()
    torch.testing.assert_close(first.grad, (p - q) / 4, rtol=1e-5, atol=1e-7)  # of KL(q || p) alone, q held fixed


class Watch(Module):
    """Keeps which experts and predictions each call of the model saw, and the whole losses."""

    def configure_model(self) -> None:
        fresh = self.model is None
        super().configure_model()
        if fresh:
            self.calls: list[tuple[list[int], Tensor]] = []
            self.model.register_forward_hook(self.note)

    def note(self, model: Any, args: Any, out: Tensor) -> None:
        if model.training:
            chosen = [layer.chosen["default"] for layer in layers(model).values()]
            self.calls.append((chosen, out.detach().clone()))


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_two_draws_per_batch(weight: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    callback = MoSA(rank=8, layers="blocks", experts=3, consistency=weight, scaling=1.0)
    monkeypatch.setattr("tests.adapters.native.test_in_training.Module", Watch)
    module: Any
    module, _ = fit([callback], tmp_path, 6)
    draws = [tuple(chosen) for chosen, _ in module.calls]
    assert len(draws) == (12 if weight else 6)
    assert len(set(draws)) > 3
    assert callback._driver.state_dict() == {"batches": 6}  # type: ignore[union-attr]
    module.model.train()
    if weight:
        callback._driver.started()  # type: ignore[union-attr]
        x = next(iter(loader()))[0]
        for _ in range(10):  # until the two draws differ
            callback._driver.batch(None)  # type: ignore[union-attr]
            module.calls.clear()
            module.model(x)
            (chosen, first), (others, second) = module.calls
            assert [layer.chosen["default"] for layer in layers(module.model).values()] == chosen, "the first goes on"
            if chosen != others:
                break
        penalty = callback._driver.loss()  # type: ignore[union-attr]
        torch.testing.assert_close(penalty, weight * symmetric_divergence(first, second))
        assert penalty > 0
        with torch.no_grad():
            assert callback._driver.loss() is None, "scores of other methods are those of the module's own loss"  # type: ignore[union-attr]
        with pytest.raises(ConfigError, match="there were 0"):
            callback._driver.loss()  # type: ignore[union-attr]
        callback._driver.finished()  # type: ignore[union-attr]


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_fit_and_resume(weight: float, tmp_path: Path) -> None:
    def make() -> list[Any]:
        return [MoSA(rank=4, layers="blocks", experts=2, consistency=weight, scaling=1.0, seed=5)]

    module, trainer = resume(make, tmp_path)
    callback: Any = trainer.callbacks[0]
    sizes = {n: p.numel() for n, p in module.named_parameters() if n in callback.trainable_names and "blocks" in n}
    assert sum(sizes.values()) == 2 * (2 * 16 * 4 + 4 + 16)


def test_without_the_callback_draws_are_random() -> None:
    handle = get_peft_model(build("vit"), MoSAConfig(r=8, form="series", target_modules=["fc2"], scaling=1.0))
    shake(handle)
    x = batch("vit")
    handle.train()
    assert len({output(handle, x).sum().item() for _ in range(8)}) > 1
    handle.eval()
    assert torch.equal(output(handle, x), output(copy.deepcopy(handle), x))


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="experts=1"):
        MoSA(experts=1)
    with pytest.raises(ConfigError, match="consistency=-1"):
        MoSA(consistency=-1.0)
    callback = MoSA(rank=2, layers="blocks")
    fit([callback], tmp_path, 1)
    driver: Any = callback._driver
    driver._model.blocks[0].gradient_checkpointing = True
    with pytest.raises(ConfigError, match=r"blocks\.0 recomputes activations"):
        driver.started()
