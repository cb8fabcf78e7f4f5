"""Methods that need the loop beside one that scores without gradients and freezes part of the adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lightning_peft
from lightning_peft import IST
from lightning_peft.errors import PlanConflict
from tests.adapters.test_adapter import SaveAll, fit, pytestmark  # noqa: F401  (peft's warnings)
from tests.contract.harness import assert_same_weights, weights

WITH_LOSSES: dict[str, dict[str, Any]] = {
    "BALoRA": {"rank": 2, "labels": 0},
    "PEGO": {"rank": 2, "group_size": 2},
    "LAE": {"config": {"r": 2}, "freeze_epochs": 0},
}


@pytest.mark.parametrize("name", WITH_LOSSES)
def test_scoring_adds_no_term_and_a_resume_is_exact(name: str, tmp_path: Path) -> None:
    def methods() -> list[Any]:
        return [
            getattr(lightning_peft, name)(**WITH_LOSSES[name]),
            IST(0.5, score_period_steps=2, scope="adapters"),
        ]

    ran = methods()
    module, _ = fit(tmp_path, *ran, SaveAll(tmp_path))
    assert 0 < len(ran[1].trainable_names) < len(ran[1].selectable)
    resumed, _ = fit(tmp_path, *methods(), ckpt=sorted(tmp_path.glob("*.ckpt"))[4])
    assert_same_weights(weights(resumed), weights(module))


@pytest.mark.parametrize(
    "method",
    [
        lambda: lightning_peft.AdaLoRA(6, initial_rank=4, target_rank=2),
        lambda: lightning_peft.IncreLoRA(target_rank=2, period_steps=1),
    ],
)
def test_methods_that_score_all_of_their_parameters_share_none(method: Any, tmp_path: Path) -> None:
    with pytest.raises(PlanConflict, match="by scores of all of them in every step"):
        fit(tmp_path, method(), IST(0.5, scope="adapters"))
