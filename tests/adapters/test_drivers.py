"""What needs the loop: allocations, task ids and regularisers, each against its formula written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_peft import AdaMSS, Adapter
from lightning_peft.adapters.adamss import num_kept
from lightning_peft.errors import ConfigError
from tests.adapters.test_adapter import SaveAll, fit, pytestmark  # noqa: F401
from tests.contract.harness import Probe, TinyModule, assert_same_weights, weights

MODEL = "gqa_decoder"


class Watch(pl.Callback):
    """Look at every optimizer step with ``look(pl_module)``, right before the optimizer moves."""

    def __init__(self, look: Any) -> None:
        self.look, self.seen = look, []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.seen.append(self.look(pl_module))


def check_resume(tmp_path: Path, make: Any, expected: TinyModule, **options: Any) -> None:
    points = sorted(tmp_path.glob("*.ckpt"))
    assert len(points) == 11
    for point in (points[2], points[6]):  # in the middle of an accumulation window, and after a step
        module, _ = fit(tmp_path, *make(), ckpt=point, **options)
        assert_same_weights(weights(module), weights(expected))


# ---------------------------------------------------------------------------------------------------- AdaMSS

SCHEDULE = {"target_subspaces": 3, "start_step": 1, "end_step": 4, "period_steps": 2, "exponent": 1.0}


def adamss() -> AdaMSS:
    return AdaMSS(rank=6, num_subspaces=2, layers="*.q_proj", **SCHEDULE)


def test_adamss_drops_the_least_important_subspaces(tmp_path: Path) -> None:
    adapter = adamss()
    probe = Probe([adapter])
    grads = Watch(lambda m: {n: p.grad.clone() for n, p in m.named_parameters() if p.grad is not None})
    after: list[dict[str, torch.Tensor]] = []

    class After(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if not trainer.fit_loop._should_accumulate():
                after.append(weights(pl_module))

    module, run = fit(tmp_path, adapter, probe, grads, After(), SaveAll(tmp_path))
    assert run.global_step == 6
    # planned = requires_grad = with a gradient = moved, in every step, also after each allocation
    for step in probe.steps:
        assert step.planned == step.requires_grad == step.with_gradient
        assert step.moved <= step.planned
    # per subspace one row over 6 singular vectors and one number for each of its rows, which share out the 8 of a layer
    assert sum(p.numel() for n, p in module.named_parameters() if "adamss" in n) == 4 * (2 * 6 + 8)
    # allocations of steps 2 and 4: 3 + (8 - 3)(1 - 1/3) = 6, and 3; each subspace is two factors
    assert [len(step.planned) for step in probe.steps] == [16, 16, 16, 12, 12, 6]
    assert num_kept(2, 8, 3, 1, 4, 1.0) == 6

    # which ones: running means of |w g| and of its variation since the last allocation
    for first, last, kept in ((1, 2, 6), (3, 4, 3)):
        importance: dict[str, float] = {}
        for name in grads.seen[last]:
            mean = variation = torch.zeros_like(after[0][name])
            for step in range(first, last + 1):
                now = (after[step][name] * grads.seen[step][name]).abs()
                variation = 0.85 * variation + 0.15 * (now - mean).abs()
                mean = 0.85 * mean + 0.15 * now
            unit = name.replace("adamss_A", "adamss_B")
            importance[unit] = importance.get(unit, 0.0) + float((mean * variation).mean())
        best = sorted(importance, key=lambda unit: -importance[unit])[:kept]
        assert {n for n in probe.steps[last + 1].planned if "adamss_B" in n} == set(best)

    check_resume(tmp_path, lambda: [adamss()], module)


def test_adamss_is_drawn_in_the_ledger_and_works_by_name(tmp_path: Path) -> None:
    config = {
        "r": 6,
        "num_subspaces": 2,
        "use_asa": True,
        "asa_target_subspaces": 3,
        "init_warmup": 1,
        "final_warmup": 4,
        "mask_interval": 2,
        "asa_schedule_exponent": 1.0,
    }
    adapter = Adapter("adamss", config, layers="*.q_proj")
    module, _ = fit(tmp_path, adapter)
    expected, _ = fit(tmp_path, adamss())
    assert_same_weights(weights(module), weights(expected))
    assert [step for step, _ in adapter.history] == [0, 3, 5]
    assert len(adapter.active_units()) == 3
    still = AdaMSS(rank=6, num_subspaces=2, layers="*.q_proj")
    fit(tmp_path, still)
    assert len(still.history) == 1


def test_adamss_mistakes() -> None:
    with pytest.raises(ConfigError, match="no multiple of period_steps=100 lies"):
        AdaMSS(target_subspaces=3, start_step=10, end_step=90)
    with pytest.raises(ConfigError, match="asa_target_subspaces"):
        AdaMSS(target_subspaces=0)
    with pytest.raises(ConfigError, match="final_warmup"):
        AdaMSS(target_subspaces=3, start_step=200, end_step=200)
