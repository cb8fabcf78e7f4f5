"""Intruder dimensions against peft's own function, and where that does not go: convolutions and transposed weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.intruders import reduce_intruder_dimension
from torch import nn

from lightning_peft import IA3, DoRA, LoRA, PiSSA
from lightning_peft.adapters.intruders import find_intruders, reduce_intruders, without_intruders
from lightning_peft.errors import ConfigError
from tests.adapters.test_adapter import fit, pytestmark  # noqa: F401
from tests.contract.harness import _pretrained, weights


def strong(model: nn.Module, config: LoraConfig, size: float = 0.03) -> Any:
    """A LoRA over the model whose update is about as large as the weights."""
    torch.manual_seed(0)
    handle = get_peft_model(copy.deepcopy(model), config)
    for name, parameter in handle.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, size)
    return handle


def test_equals_peft_on_linear_layers() -> None:
    config = LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "up_proj", "down_proj"])
    handle, theirs = strong(_pretrained("gqa_decoder"), config), strong(_pretrained("gqa_decoder"), config)
    counts = reduce_intruders(handle, "default", top=4, threshold=0.6, scale=0.6)
    lines: list[str] = []
    reduce_intruder_dimension(theirs, top_k=4, threshold_epsilon=0.6, mitigation_lambda=0.6, logging_sink=lines.append)
    reported = [line.partition(": ")[2] for line in lines if ": " in line]
    assert [f"Intruders: {n}" if n else "No intruders" for n in counts.values()] == reported
    assert len(counts) == 12
    assert len(set(counts.values())) >= 3
    assert 0 in counts.values()
    ours, expected = dict(handle.named_modules()), dict(theirs.named_modules())
    for path in counts:
        module = f"base_model.model.{path}"
        torch.testing.assert_close(
            ours[module].get_delta_weight("default"), expected[module].get_delta_weight("intruder_reduced")
        )


def test_a_planted_direction_is_found_and_scaled() -> None:
    base = torch.diag(torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]))
    known = torch.zeros(5, 5)
    known[4, 0] = 20.0  # on top of the spectrum, along a left singular vector that the base has
    assert find_intruders(base, base + known, 5, 0.5) == []
    direction = torch.ones(5) / 5**0.5  # its cosine with each of the base's is 0.45
    new = 100 * torch.outer(direction, torch.eye(5)[0])
    found = find_intruders(base, base + new, 1, 0.5)
    assert found == [0]
    before = torch.linalg.svdvals(base + new)
    after = torch.linalg.svdvals(base + without_intruders(base, new, found, 0.5))
    torch.testing.assert_close(after, torch.cat([0.5 * before[:1], before[1:]]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("model", "target"), [("conv_net", "conv"), ("tied_decoder", "c_attn")])
def test_convolutions_and_transposed_weights(model: str, target: str) -> None:
    options: dict[str, Any] = {"fan_in_fan_out": True} if target == "c_attn" else {}
    handle = strong(_pretrained(model), LoraConfig(r=2, lora_alpha=2, target_modules=[target], **options), 0.5)
    layers = {p: m for p, m in handle.get_base_model().named_modules() if hasattr(m, "lora_A") and len(m.lora_A)}
    before = {path: (m.get_base_layer().weight.clone(), m.get_delta_weight("default")) for path, m in layers.items()}
    counts = reduce_intruders(handle, "default", top=3, threshold=0.9, scale=0.0)
    assert sum(counts.values()) > 0
    for path, (base, update) in before.items():
        base, update = (w.T if options else w.flatten(1) for w in (base, update))
        expected = update
        if counts[path]:
            u, s, v = torch.linalg.svd(base + update, full_matrices=False)
            cosines = (u[:, :3].T @ torch.linalg.svd(base, full_matrices=False)[0]).abs().amax(1)
            for i in torch.where(cosines < 0.9)[0]:
                expected = expected - s[i] * torch.outer(u[:, i], v[i])
            u, s, v = torch.linalg.svd(expected, full_matrices=False)
            expected = (u[:, :2] * s[:2]) @ v[:2]  # the rank stays
        after = layers[path].get_delta_weight("default")
        torch.testing.assert_close(after.T if options else after.flatten(1), expected, rtol=1e-4, atol=1e-5)


def test_after_a_fit(tmp_path: Path) -> None:
    adapter = LoRA(2)
    module, _ = fit(tmp_path, adapter)
    before = weights(module)
    counts = adapter.reduce_intruders(threshold=0.99)
    assert len(counts) == 28
    assert sum(counts.values()) > 0
    changed = {name for name, value in weights(module).items() if not torch.equal(value, before[name])}
    assert {name.split(".lora_")[0].removeprefix("model.") for name in changed} == {p for p, n in counts.items() if n}
    assert all("lora_" in name for name in changed)
    adapter.export(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (DoRA(2), "use_dora"),
        (PiSSA(2), "init_lora_weights='pissa'"),
        (IA3(target_modules=["k_proj"], feedforward_modules=[]), "no linear layer"),
    ],
)
def test_other_adapters_are_refused(adapter: Any, message: str, tmp_path: Path) -> None:
    fit(tmp_path, adapter)
    with pytest.raises(ConfigError, match=message):
        adapter.reduce_intruders()
    with pytest.raises(ConfigError, match=r"threshold=1\.5"):
        adapter.reduce_intruders(threshold=1.5)
