"""KaSA: what it drops, what it adds to the loss, and a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_peft import KaSA
from tests.adapters.test_adapter import MODEL, SaveAll, fit, pytestmark  # noqa: F401  (peft's warnings)
from tests.contract.harness import TinyModule, assert_same_weights, weights

pytest.importorskip("peft", minversion="0.21")


def test_start_loss_and_resume(tmp_path: Path) -> None:
    pretrained = weights(TinyModule(MODEL))
    adapter = KaSA(rank=2, beta=0.1, gamma=0.2, layers="*.q_proj")
    module, _ = fit(tmp_path, adapter, SaveAll(tmp_path))
    for name, weight in weights(module).items():
        if name.endswith("q_proj.base_layer.weight"):
            left, values, right = torch.linalg.svd(pretrained[name.replace(".base_layer", "")])
            values[-2:] = 0
            torch.testing.assert_close(weight, left @ torch.diag(values) @ right, rtol=0, atol=1e-6)
    resumed, _ = fit(
        tmp_path, KaSA(rank=2, beta=0.1, gamma=0.2, layers="*.q_proj"), ckpt=sorted(tmp_path.glob("*.ckpt"))[4]
    )
    assert_same_weights(weights(resumed), weights(module))


def test_both_regularisers_are_in_the_gradient(tmp_path: Path) -> None:
    found: list[dict[str, torch.Tensor]] = []

    class First(TinyModule):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.trainer.should_stop = True
            found.append({n: p.grad.clone() for n, p in self.named_parameters() if p.grad is not None})
            started.update({n: p.detach().clone() for n, p in self.named_parameters()})

        def on_train_start(self) -> None:
            self.eval()  # no dropout

    started: dict[str, torch.Tensor] = {}
    for beta, gamma in ((0.1, 0.2), (0.0, 0.0)):
        fit(tmp_path, KaSA(rank=2, beta=beta, gamma=gamma, layers="*.q_proj", seed=3), module=First(MODEL))
    with_terms, without = found[0], found[len(found) // 2]
    leaves = {n: started[n].clone().requires_grad_() for n in with_terms}
    total = torch.zeros(())
    for name, leaf in leaves.items():
        if "lora_diag" in name:
            total = total + 0.1 * leaf.square().sum()
        else:
            product = leaf @ leaf.T if "lora_A" in name else leaf.T @ leaf
            total = total + 0.2 * torch.linalg.norm(product - torch.eye(2))
    total.backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(with_terms[name] - without[name], leaf.grad, rtol=1e-4, atol=1e-5)
