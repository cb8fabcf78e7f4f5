from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from lightning_peft.adapters.native import LoRASBConfig, calibrate_lora_sb
from lightning_peft.errors import ConfigError
from tests.adapters.native.models import TARGETS, batch, build, loss, matrix_shape, output
from tests.adapters.native.test_three_factor import layers, shake
from tests.distributed.launch import launch
from tests.oracles import three_factor as oracle

# peft asks transformers 5.23 for this by its old name
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
RANK = 3


def make(name: str, **options: Any) -> tuple[Any, Any]:
    base = build(name)
    config = LoRASBConfig(r=RANK, target_modules=TARGETS[name], learning_rate=1e-2, **options)
    return base, get_peft_model(copy.deepcopy(base), config)


def full_gradients(base: Any, name: str, seeds: list[int]) -> dict[str, np.ndarray]:
    """Gradients of the base's own weights, by ordinary full fine-tuning, as matrices (out, in)."""
    base = copy.deepcopy(base).requires_grad_(True)
    for seed in seeds:
        (loss(base, batch(name, seed)) / len(seeds)).backward()
    found = {}
    for path, module in base.named_modules():
        if path.split(".")[-1] in TARGETS[name]:
            gradient = module.weight.grad.double()
            gradient = gradient.T if type(module).__name__ == "Conv1D" else gradient.reshape(matrix_shape(module))
            found[path] = gradient.numpy()
    return found


@pytest.mark.parametrize("first_step", ["adamw", "sgd"])
@pytest.mark.parametrize("name", TARGETS)
def test_starts_at_the_best_approximation_of_the_first_full_step(name: str, first_step: Any, tmp_path: Path) -> None:
    base, handle = make(name, first_step=first_step)
    x = batch(name)
    handle.eval()
    assert torch.equal(output(handle, x), output(base, x)), "before calibration the model is its base"
    model = handle.get_base_model()
    held = calibrate_lora_sb(model, (batch(name, s) for s in range(9)), lambda b: loss(model, b), max_batches=3)

    found = layers(model)
    gradients = full_gradients(base, name, [0, 1, 2])
    assert set(held) == set(found) == set(gradients)
    assert len(found) == {"llama": 4, "gpt2": 6, "vit": 5}[name]
    for path, layer in found.items():
        delta = oracle.lora_sb_delta(gradients[path], RANK, 1e-2, sign=first_step == "adamw")
        scale = np.abs(delta).max()
        if first_step == "sgd" or np.abs(gradients[path]).min() > 1e-7:  # elsewhere a sign may be rounding's
            np.testing.assert_allclose(layer.delta_matrix("default").detach().numpy(), delta, atol=2e-3 * scale)
        step = 1e-2 * (np.sign(gradients[path]) if first_step == "adamw" else gradients[path])
        assert held[path] == pytest.approx(np.sum(delta**2) / np.sum(step**2), abs=1e-2)
        for role, gram in (("A", lambda t: t @ t.T), ("B", lambda t: t.T @ t)):
            torch.testing.assert_close(gram(layer.tensor(role, "default")), torch.eye(RANK), rtol=0, atol=1e-5)
    assert sum(p.numel() for p in handle.parameters() if p.requires_grad) == len(found) * RANK**2

    # one step ahead of the base in the direction of full fine-tuning
    assert sum(loss(handle, batch(name, s)) for s in range(3)) < sum(loss(base, batch(name, s)) for s in range(3))

    # trains, and is loaded with zero difference; merged too
    handle.train()
    start = {n: p.detach().clone() for n, p in handle.named_parameters()}
    optimizer = torch.optim.SGD([p for p in handle.parameters() if p.requires_grad], lr=0.5)
    loss(handle, x).backward()
    optimizer.step()
    assert all(torch.equal(p, start[n]) != p.requires_grad for n, p in handle.named_parameters())
    handle.eval()
    trained = output(handle, x)
    handle.save_pretrained(tmp_path)
    for options in ({"is_trainable": True}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, **options)  # type: ignore[arg-type]
        assert torch.equal(output(loaded.eval(), x), trained)
        output(loaded.train(), x)  # counts as calibrated
    torch.testing.assert_close(output(handle.merge_and_unload(), x), trained, rtol=1e-4, atol=1e-4)


def test_leaves_no_trace() -> None:
    base = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4), nn.Linear(4, 4))
    base[2].eval()
    handle = get_peft_model(base, LoRASBConfig(r=2, target_modules=["0", "3"], modules_to_save=["4"]))
    x = torch.randn(8, 6)
    for parameter in handle.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, 3.0)
    before = {n: t.clone() for n, t in handle.state_dict().items()}
    flags = {n: m.training for n, m in handle.named_modules()}
    rng = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # type: ignore[index]

    def noisy(b: torch.Tensor) -> torch.Tensor:
        handle.train()
        return handle(b + torch.randn_like(b)).square().mean() + np.random.rand() + random.random()

    calibrate_lora_sb(handle, [x], noisy)
    changed = {n for n, t in handle.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {f"base_model.model.{i}.lora_sb_{role}.default" for i in (0, 3) for role in "ABR"}
    assert {n: m.training for n, m in handle.named_modules()} == flags
    assert all(bool((p.grad == 3).all()) for p in handle.parameters() if p.requires_grad)
    assert torch.equal(torch.get_rng_state(), rng[0])
    assert (np.random.get_state()[1] == rng[1]).all()  # type: ignore[index]
    assert random.getstate() == rng[2]
    assert not any(m._forward_hooks for m in handle.modules())

    # a second calibration starts from the base again, and a failing one changes nothing
    start = {n: t.clone() for n, t in handle.state_dict().items()}
    quiet = lambda b: handle(b).square().mean()  # noqa: E731
    handle.eval()
    calibrate_lora_sb(handle, [x], quiet)
    once = {n: t.clone() for n, t in handle.state_dict().items()}
    calibrate_lora_sb(handle, [x], quiet)
    assert all(torch.equal(t, once[n]) for n, t in handle.state_dict().items())
    assert any(not torch.equal(t, start[n]) for n, t in handle.state_dict().items())
    with pytest.raises(RuntimeError, match="stop"):
        calibrate_lora_sb(handle, [x, None], lambda b: quiet(b) if b is not None else _stop())
    assert all(torch.equal(t, once[n]) for n, t in handle.state_dict().items())
    assert torch.is_tensor(handle.train()(x)), "still calibrated"


def _stop() -> torch.Tensor:
    raise RuntimeError("stop")


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_gradients_of_a_quantised_base_and_under_checkpointing() -> None:
    from lightning_peft.precision import dequantize_layers, quantize

    model = build("llama")
    quantize(model, "int8")
    plain = copy.deepcopy(model)
    dequantize_layers(plain)
    config = LoRASBConfig(r=RANK, target_modules=["q_proj", "down_proj"], first_step="sgd", learning_rate=1.0)
    found = {}
    for kind, base in (("quantised", model), ("plain", plain), ("checkpointed", copy.deepcopy(plain))):
        handle = get_peft_model(base, copy.deepcopy(config))
        if kind == "checkpointed":
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            base.train()
        calibrate_lora_sb(handle, [batch("llama")], lambda b, h=handle: h(input_ids=b, labels=b, use_cache=False).loss)
        found[kind] = [layer.delta_matrix("default").detach() for layer in layers(handle).values()]
    assert len(found["plain"]) == 4
    for a, b, c in zip(*found.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.02 * b.abs().max().item())
        torch.testing.assert_close(c, b, rtol=1e-4, atol=1e-6)


def test_mistakes_are_named() -> None:
    _, handle = make("vit")
    with pytest.raises(ConfigError, match="calibrate_lora_sb"):
        output(handle.train(), batch("vit"))
    run = lambda b: loss(handle, b)  # noqa: E731
    with pytest.raises(ConfigError, match="no batch"):
        calibrate_lora_sb(handle, [], run)
    with pytest.raises(ConfigError, match=r"'defualt'.*'default'"):
        calibrate_lora_sb(handle, [batch("vit")], run, adapter_name="defualt")
    with pytest.raises(ConfigError, match="no LoRA-SB adapter at all"):
        calibrate_lora_sb(build("vit"), [batch("vit")], run)
    with pytest.raises(ConfigError, match="does not depend on 1 adapted layer"):
        calibrate_lora_sb(handle, [batch("vit")], lambda b: handle.get_base_model().blocks[0].fc2(
            handle.get_base_model().blocks[0].fc1(torch.ones(2, 16))).sum()
            + handle.get_base_model().blocks[1].fc2(torch.ones(2, 32)).sum()
            + handle.get_base_model().blocks[0].qkv(torch.ones(2, 16)).sum()
            + handle.get_base_model().patches(b).sum())  # fmt: skip
    with pytest.raises(ConfigError, match="before training"):
        output(handle.train(), batch("vit"))
    handle.requires_grad_(False)
    with pytest.raises(ConfigError, match="does not train"):
        calibrate_lora_sb(handle, [batch("vit")], run)
    with pytest.raises(ConfigError, match="save_frozen"):
        LoRASBConfig(save_frozen=False)
    with pytest.raises(ConfigError, match=r"first_step='adam'.*'adamw'"):
        LoRASBConfig(first_step="adam")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="learning_rate"):
        LoRASBConfig(learning_rate=0.0)


def test_a_new_adapter_of_an_old_name_is_not_calibrated() -> None:
    _, handle = make("vit")
    calibrate_lora_sb(handle, [batch("vit")], lambda b: loss(handle, b))
    handle.add_adapter("other", LoRASBConfig(r=2, target_modules=["qkv"]))
    handle.set_adapter("other")
    with pytest.raises(ConfigError, match="'other'"):
        output(handle.train(), batch("vit"))
    calibrate_lora_sb(handle, [batch("vit")], lambda b: loss(handle, b), adapter_name="other")
    shake(handle)
    output(handle.train(), batch("vit"))
    handle.delete_adapter("default")
    handle.add_adapter("default", LoRASBConfig(r=2, target_modules=["qkv"]))
    handle.set_adapter("default")
    with pytest.raises(ConfigError, match="'default'"):
        output(handle.train(), batch("vit"))


@pytest.mark.distributed
def test_two_processes_get_the_factors_of_one(tmp_path: Path) -> None:
    launch(Path(__file__).parent / "lora_sb_probe.py", str(tmp_path))
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    _, handle = make("vit", first_step="sgd")
    calibrate_lora_sb(handle, [batch("vit", 0), batch("vit", 1)], lambda b: loss(handle, b))
    expected = {path: layer.delta_matrix("default").detach() for path, layer in layers(handle).items()}
    assert len(expected) == 5
    for path, delta in expected.items():
        assert torch.equal(ranks[0][path], ranks[1][path])
        torch.testing.assert_close(ranks[0][path], delta, rtol=1e-3, atol=1e-3 * delta.abs().max().item())
