from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from lightning_peft import LoRAMoE, MTLoRA, ResumableDataLoader, set_tasks
from lightning_peft.adapters.native import IncreLoRAConfig, LoRAMoEConfig, MTLoRAConfig, TriAdaptLoRAConfig
from lightning_peft.adapters.native.loramoe import balancing_loss
from lightning_peft.errors import ConfigError
from tests.adapters.native.life import live, resume
from tests.adapters.native.models import TARGETS, batch, build, matrix_shape, output
from tests.adapters.native.test_in_training import Module
from tests.adapters.native.test_in_training import fit as fit_plain
from tests.adapters.native.test_rank_growth import run
from tests.adapters.native.test_three_factor import layers, shake

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*GPU available"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]
LINEAR = {**TARGETS, "vit": ["qkv", "fc2"]}


def loader(seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(24, 3, 8, 8, generator=generator)
    types = torch.randint(0, 2, (24,), generator=generator)
    data = [{"x": x[i], "y": torch.tensor(i % 5), "kind": types[i]} for i in range(24)]
    return ResumableDataLoader(data, batch_size=4)  # type: ignore[arg-type]


class Typed(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.kinds = batch["kind"]
        loss = nn.functional.cross_entropy(self.model(batch["x"]), batch["y"])
        self.losses.append(float(loss.detach()))
        return loss


def small(config: Any) -> tuple[Any, Any, Any]:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = nn.Sequential(nn.Linear(7, 5)).double()
    handle: Any = get_peft_model(copy.deepcopy(model), config)
    layer = layers(handle)["base_model.model.0"]
    shake(handle, std=0.5)
    return model, handle, layer


def numbers(layer: Any, *roles: str) -> list[np.ndarray]:
    return [layer.tensor(role, "default").detach().numpy() for role in roles]


def agree(layer: Any, y: torch.Tensor, formula: Any, *roles: str) -> None:
    """Output and gradients against a formula in NumPy, by differences."""
    values = numbers(layer, *roles)
    np.testing.assert_allclose(y.detach().numpy(), formula(*values), rtol=1e-9, atol=1e-11)
    C = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(2))
    (y * C).sum().backward()
    step = 1e-6
    for number, role in enumerate(roles):
        gradient = layer.tensor(role, "default").grad.numpy()
        assert np.abs(gradient).max() > 1e-3
        for index in list(np.ndindex(gradient.shape))[::3]:
            ends = []
            for sign in (step, -step):
                moved = [v.copy() for v in values]
                moved[number][index] += sign
                ends.append(np.sum(C.numpy() * formula(*moved)))
            assert gradient[index] == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5, abs=1e-6)


# ---------------------------------------------------------------- LoRAMoE


def test_loramoe_is_the_formula() -> None:
    model, handle, layer = small(LoRAMoEConfig(r=2, num_experts=4, alpha=6.0, target_modules=["0"]))
    x = torch.randn(3, 4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def formula(A: np.ndarray, B: np.ndarray, G: np.ndarray) -> np.ndarray:
        out = model(x).detach().numpy().copy()
        for row in range(3):
            for token in range(4):
                h = x[row, token].numpy()
                e = np.exp(G @ h)
                for expert, weight in enumerate(e / e.sum()):
                    out[row, token] += 3.0 * weight * B[expert] @ (A[expert] @ h)
        return out

    values = numbers(layer, "A", "B", "router")
    # routers' softmax is in float32, as in the authors' code
    np.testing.assert_allclose(handle(x).detach().numpy(), formula(*values), rtol=1e-5, atol=1e-6)
    C = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (handle(x) * C).sum().backward()
    for number, role in enumerate(("A", "B", "router")):
        gradient = layer.tensor(role, "default").grad.numpy()
        assert np.abs(gradient).max() > 1e-2
        for index in np.ndindex(gradient.shape):
            ends = []
            for sign in (1e-5, -1e-5):
                moved = [v.copy() for v in values]
                moved[number][index] += sign
                ends.append(np.sum(C.numpy() * formula(*moved)))
            assert gradient[index] == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-3, abs=1e-4)


def test_balancing_loss_is_the_papers() -> None:
    routed = torch.rand(5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    types = torch.tensor([0, 1, 2, 1, 0])
    entries = []
    for row, kind in zip(routed.tolist(), types.tolist(), strict=True):
        for expert, weight in enumerate(row):
            entries.append(weight * (1.3 if expert in (2 * kind, 2 * kind + 1) else 0.7))
    expected = np.var(entries, ddof=1) / np.mean(entries) ** 2
    assert float(balancing_loss(routed, types, 3, 0.3)) == pytest.approx(expected, rel=1e-9)
    # zero where each row's own experts get as much less as the shift gives them more
    even = torch.where(torch.arange(6) // 2 == types[:, None], 1 / 1.3, 1 / 0.7).double()
    assert float(balancing_loss(even, types, 3, 0.3)) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("name", LINEAR)
def test_loramoe_lives(name: str, tmp_path: Path) -> None:
    base = build(name)
    config = LoRAMoEConfig(r=2, num_experts=4, target_modules=LINEAR[name])
    probe = get_peft_model(copy.deepcopy(base), copy.deepcopy(config))
    sizes = [matrix_shape(layer.base_layer) for layer in layers(probe).values()]
    handle = live(base, batch(name), config, sum(4 * 2 * (o + i) + 4 * i for o, i in sizes), tmp_path, merges=False)
    with pytest.raises(ConfigError, match="cannot be merged"):
        handle.merge_adapter()


def test_loramoe_adds_its_loss_and_resumes(tmp_path: Path) -> None:
    """The loss of a step by hand, from routers applied to inputs that hooks have seen."""
    seen: list[float] = []

    def make(steps: int, ckpt: Path | None = None, **options: Any) -> tuple[Any, Any, Any]:
        callback = LoRAMoE(rank=2, num_experts=4, task_types="kind", layers="*.fc1", **options)
        module = Typed()
        trainer_options: dict[str, Any] = {"module": module}
        _, trainer = run([callback], tmp_path, steps, ckpt, data=loader(), **trainer_options)
        return callback, module, trainer

    first, whole, _ = make(6)
    _, _, half = make(3)
    half.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed, _ = make(6, tmp_path / "half.ckpt")
    assert resumed.losses == whole.losses[3:]
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )
    other = make(6, balance_weight=0.0)[1]
    assert other.losses[0] == whole.losses[0]
    assert other.losses[-1] != whole.losses[-1]

    driver: Any = first._driver
    driver.started()
    rows = next(iter(loader()))
    inputs: list[torch.Tensor] = []
    hooks = [m.register_forward_pre_hook(lambda _, a: inputs.append(a[0].detach())) for m in layers(whole).values()]
    driver.batch(rows)
    whole.model.train()
    whole.model(rows["x"])
    for hook in hooks:
        hook.remove()
    for layer, x in zip(layers(whole).values(), inputs, strict=True):
        G = layer.tensor("router", "default").detach()
        Q = torch.stack([torch.stack([torch.softmax(G @ token, 0) for token in row]).sum(0) for row in x])
        shifted = [
            float(q) * (1.1 if expert // 2 == kind else 0.9)
            for row, kind in zip(Q, rows["kind"].tolist(), strict=True)
            for expert, q in enumerate(row)
        ]
        seen.append(float(np.var(shifted, ddof=1) / np.mean(shifted) ** 2))
    assert float(driver.loss().detach()) == pytest.approx(0.1 * sum(seen), rel=1e-4)
    driver.finished()


def test_loramoe_mistakes(tmp_path: Path) -> None:
    for options, text in (
        ({"num_experts": 5}, "multiple"),
        ({"balance_shift": 1.0}, "balance_shift"),
        ({"num_experts": 1}, "num_experts=1"),
        ({"r": 0}, "r=0"),
        ({"num_expert": 4}, "'num_experts'"),
    ):
        with pytest.raises(ConfigError, match=text):
            LoRAMoEConfig(**options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="linear layers"):
        get_peft_model(build("vit"), LoRAMoEConfig(target_modules=["patches"]))
    for task_types, text in (("kinds", "'kind'"), ("y", "types from")):
        callback = LoRAMoE(num_experts=4, task_types=task_types, layers="*.fc1")
        with pytest.raises(ConfigError, match=text):
            run([callback], tmp_path, 2, data=loader(), module=Typed())
    with pytest.raises(ConfigError, match="task_types"):  # the batch of the other module is a list
        fit_plain([LoRAMoE()], tmp_path, 1)


# ---------------------------------------------------------------- MTLoRA


def test_mtlora_is_the_formula() -> None:
    model, handle, layer = small(
        MTLoRAConfig(r=3, task_r=2, num_tasks=3, scale=2.0, task_scale=0.5, target_modules=["0"])
    )
    x = torch.randn(4, 6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tasks = [2, 0, 0, 2]
    set_tasks(handle, torch.tensor(tasks))

    def formula(A: np.ndarray, B: np.ndarray, tA: np.ndarray, tB: np.ndarray) -> np.ndarray:
        rows = [x[i].numpy() @ (2.0 * B @ A + 0.5 * tB[t] @ tA[t]).T for i, t in enumerate(tasks)]
        return model(x).detach().numpy() + np.stack(rows)

    agree(layer, handle(x), formula, "A", "B", "taskA", "taskB")
    assert layer.tensor("taskB", "default").grad[1].abs().max() == 0, "task 1 has no row here"
    with pytest.raises(ConfigError, match="merges one task"):
        handle.merge_adapter()
    for task in range(3):
        set_tasks(handle, task)
        one = handle(x)
        merged: Any = copy.deepcopy(handle).merge_and_unload()
        torch.testing.assert_close(merged(x), one, rtol=1e-10, atol=1e-12)
        set_tasks(handle, torch.full((4,), task))
        torch.testing.assert_close(handle(x), one, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(handle(x[:, 0]), one[:, 0], rtol=1e-10, atol=1e-12)
    set_tasks(handle, None)
    with pytest.raises(ConfigError, match="which task"):
        handle(x)


@pytest.mark.parametrize("name", LINEAR)
def test_mtlora_files_and_counts(name: str, tmp_path: Path) -> None:
    base, x = build(name).eval(), batch(name)
    kinds = LINEAR[name]
    config = MTLoRAConfig(r=3, task_r=2, num_tasks=3, target_modules=kinds, task_modules=[kinds[1]])
    handle: Any = get_peft_model(copy.deepcopy(base), config).eval()
    count = 0
    for path, layer in layers(handle).items():
        out, inside = matrix_shape(layer.base_layer)
        count += (3 + (3 * 2 if path.endswith(kinds[1]) else 0)) * (out + inside)
    assert sum(p.numel() for p in handle.parameters() if p.requires_grad) == count
    set_tasks(handle, 1)
    assert torch.equal(output(handle, x), output(base, x))
    shake(handle)
    trained = output(handle, x)
    set_tasks(handle, 2)
    assert not torch.allclose(output(handle, x), trained)
    handle.save_pretrained(tmp_path)
    for options in ({}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, **options).eval()  # type: ignore[arg-type]
        set_tasks(loaded, 1)
        assert torch.equal(output(loaded, x), trained)
    set_tasks(handle, 1)
    merged: Any = handle.merge_and_unload()
    torch.testing.assert_close(output(merged, x), trained, rtol=1e-4, atol=1e-4)


def test_mtlora_takes_tasks_from_the_batch_and_resumes(tmp_path: Path) -> None:
    seen: list[Any] = []

    class Look(Typed):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            layer = next(iter(layers(self).values()))
            seen.append(torch.equal(layer.tasks["default"], batch["kind"]))
            return super().training_step(batch, batch_idx)

    def make(steps: int, ckpt: Path | None = None) -> tuple[Any, Any, Any]:
        callback = MTLoRA(num_tasks=2, rank=2, task_rank=2, task_ids="kind")
        module = Look()
        _, trainer = run([callback], tmp_path, steps, ckpt, data=loader(), module=module)
        return callback, module, trainer

    callback, whole, _ = make(6)
    assert seen == [True] * 6
    assert not next(iter(layers(whole).values())).tasks, "no task is left behind"
    _, _, half = make(3)
    half.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed, _ = make(6, tmp_path / "half.ckpt")
    assert resumed.losses == whole.losses[3:]
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]
    assert saved
    assert all(".mtlora_" in name for name in saved)
    callback.export(tmp_path / "peft")
    loaded = PeftModel.from_pretrained(build("vit"), tmp_path / "peft").eval()
    for model in (loaded, whole.model.eval()):
        set_tasks(model, 1)
    x = batch("vit")
    assert torch.equal(output(loaded, x), output(whole.model, x))


def test_mtlora_mistakes(tmp_path: Path) -> None:
    for options, text in (({"num_tasks": 0}, "num_tasks=0"), ({"task_r": 1.5}, "task_r"), ({"scale": 0.0}, "scale")):
        with pytest.raises(ConfigError, match=text):
            MTLoRAConfig(**options)  # type: ignore[arg-type]
    model = get_peft_model(build("vit"), MTLoRAConfig(r=2, task_r=2, target_modules=["fc1"]))
    with pytest.raises(ConfigError, match="from 0 to 1"):
        set_tasks(model, 2)
    with pytest.raises(ConfigError, match="no MTLoRA adapter 'other'"):
        set_tasks(model, 0, adapter_name="other")
    set_tasks(model, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ConfigError, match="4 rows and the batch has 3"):
        output(model, batch("vit"))
    with pytest.raises(ConfigError, match="'kind'"):
        run([MTLoRA(num_tasks=2, task_ids="kinds")], tmp_path, 1, data=loader(), module=Typed())


def test_loramoe_without_balance_needs_no_types(tmp_path: Path) -> None:
    resume(lambda: [LoRAMoE(balance_weight=0.0)], tmp_path)


@pytest.mark.parametrize("kind", [IncreLoRAConfig, TriAdaptLoRAConfig, LoRAMoEConfig, MTLoRAConfig])
def test_a_quantised_base_stays_quantised(kind: Any) -> None:
    from lightning_peft.precision import merge_adapter, quantize

    model, x = build("llama"), batch("llama")
    quantize(model, "nf4")
    expected = output(model, x)
    handle: Any = get_peft_model(model, kind(r=2, target_modules=["q_proj", "down_proj"]))
    if kind is MTLoRAConfig:
        set_tasks(handle, 1)
    assert torch.equal(output(handle, x), expected)
    codes = {n: p.clone() for n, p in model.named_parameters() if "base_layer.weight" in n}
    assert len(codes) == 4
    shake(handle)
    trained = output(handle, x)
    trained.sum().backward()
    assert all(torch.equal(p, codes[n]) for n, p in model.named_parameters() if n in codes)
    assert sum(p.grad is not None for p in handle.parameters()) >= 4 * 3
    if kind is LoRAMoEConfig:
        return
    merge_adapter(model, dequantize=True)
    torch.testing.assert_close(output(model, x), trained, rtol=1e-3, atol=1e-3)
