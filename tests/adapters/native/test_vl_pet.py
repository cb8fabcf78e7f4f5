from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from lightning_peft import VLPET
from lightning_peft.adapters.files import merge_adapters
from lightning_peft.adapters.native import VLPETConfig
from lightning_peft.errors import ConfigError
from tests.adapters.native.life import live, resume
from tests.adapters.native.models import batch, build, output
from tests.adapters.native.test_three_factor import layers, shake

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # peft
    pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*GPU available"),
]

R, G, D = 6, 5, 32
ADAPTER = 2 * D * R + R + D
GATES = {"large": G * (2 * D + 1) + D, "middle_x": D + 1, "middle_y": D, "small": 2 * D + 1}
ALL = pytest.mark.parametrize("granularity", GATES)


def test_life_of_a_gate_per_feature(tmp_path: Path) -> None:
    """It alone starts as its base."""
    config = VLPETConfig(r=R, granularity="middle_y", target_modules=["self_attn", "mlp"])
    handle = live(build("llama"), batch("llama"), config, 4 * (ADAPTER + GATES["middle_y"]), tmp_path, merges=False)
    with pytest.raises(ConfigError, match="VL_PET cannot be merged"):
        merge_adapters(handle)


@ALL
def test_start_and_number_of_parameters(granularity: Any) -> None:
    base, x = build("llama"), batch("llama")
    config = VLPETConfig(r=R, granularity=granularity, gate_rank=G, target_modules=["self_attn", "mlp"])
    handle: Any = get_peft_model(copy.deepcopy(base), config)
    assert sum(p.numel() for p in handle.parameters() if p.requires_grad) == 4 * (ADAPTER + GATES[granularity])
    factor = 1.0 if granularity == "middle_y" else 0.5
    for block in base.model.layers:  # sublayers whose outputs are halved
        for weight in (block.self_attn.o_proj.weight, block.mlp.down_proj.weight):
            weight.data.mul_(factor)
    torch.testing.assert_close(output(handle, x), output(base, x), rtol=1e-5, atol=1e-5)
    handle.train()
    output(handle, x).square().mean().backward()
    first = next(iter(layers(handle).values()))
    assert first.tensor("gate", "default").grad.abs().max() > 0


def gated(granularity: str, now: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """The paper's formulas, token by token."""
    rows = []
    for y_t in y:
        h = now["down"] @ y_t + now["down_bias"]
        rows.append(y_t + now["up"] @ h.clamp(min=0) + now["up_bias"])
    adapted = torch.stack(rows)
    if granularity == "middle_y":
        return adapted * (1 + now["gate"])
    gates = []
    for x_t, a_t in zip(x, adapted, strict=True):
        if granularity == "large":
            u = now["gate_down"] @ x_t + now["gate_down_bias"]
            score = now["gate"] @ (u * (1 + (u / math.sqrt(2)).erf()) / 2) + now["gate_bias"]
        elif granularity == "middle_x":
            score = now["gate"][0] @ (x_t + a_t) + now["gate_bias"]
        else:
            score = now["gate"][0] @ torch.cat([x_t, a_t]) + now["gate_bias"]
        gates.append(1 / (1 + (-score).exp()))
    gate = torch.stack(gates)
    return adapted * (gate.mean(0) if granularity == "small" else gate)


@ALL
def test_values_and_gradients_are_those_of_the_formula(granularity: Any) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = nn.Sequential(nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 4))).double()
        x, C = torch.randn(2, 5, 4, dtype=torch.float64), torch.randn(2, 5, 4, dtype=torch.float64)
    config = VLPETConfig(r=3, granularity=granularity, gate_rank=2, activation="relu", target_modules="0")
    handle = get_peft_model(model, config)
    shake(handle, 0.5)
    layer: Any = layers(handle)["base_model.model.0"]
    roles = [role for role in layer.trained if len(getattr(layer, layer.prefix + role))]
    now = {role: layer.tensor(role, "default").detach().clone().requires_grad_() for role in roles}
    base = layer.base_layer(x)
    expected = torch.stack([gated(granularity, now, x[i], base[i]) for i in range(2)])
    y = handle(x)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    (y * C).sum().backward()
    (expected * C).sum().backward()
    for role in roles:
        assert now[role].grad.abs().max() > 1e-3, role  # type: ignore[union-attr]
        torch.testing.assert_close(layer.tensor(role, "default").grad, now[role].grad, rtol=1e-9, atol=1e-10, msg=role)


@pytest.mark.parametrize("granularity", ["large", "small"])
def test_fit_and_resume(granularity: Any, tmp_path: Path) -> None:
    def make() -> list[Any]:
        return [VLPET(rank=4, granularity=granularity, gate_rank=3, layers="blocks", seed=5)]

    module, trainer = resume(make, tmp_path)
    callback: Any = trainer.callbacks[0]
    sizes = {n: p.numel() for n, p in module.named_parameters() if n in callback.trainable_names and "blocks" in n}
    gate = {"large": 3 * 33 + 16, "small": 33}[granularity]
    assert sum(sizes.values()) == 2 * (2 * 16 * 4 + 4 + 16 + gate)


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match=r"granularity='middle'.*'middle_"):
        VLPET(granularity="middle")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="gate_rank=0"):
        VLPET(gate_rank=0)
    with pytest.raises(ConfigError, match="form is 'series'"):
        VLPETConfig(form="parallel")
    with pytest.raises(ConfigError, match=r"takes 48 features and returns 32.*Name a whole sublayer"):
        get_peft_model(build("llama"), VLPETConfig(r=2, granularity="small", target_modules=["down_proj"]))
    with pytest.raises(ConfigError, match="patches has convolutions"):
        get_peft_model(build("vit"), VLPETConfig(r=2, target_modules=["patches"]))
