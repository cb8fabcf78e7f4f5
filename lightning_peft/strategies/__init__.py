"""What a strategy needs when the trainable set changes under it, and FSDP2 for any model.

``Trainer(strategy="fsdp2")`` works once this package is imported, which every method does.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import Strategy, StrategyRegistry


def _fsdp2(**settings: Any) -> Strategy:
    from lightning_peft.strategies.fsdp2 import FSDP2Strategy

    return FSDP2Strategy(**settings)


if "fsdp2" not in StrategyRegistry:
    StrategyRegistry.register("fsdp2", _fsdp2, description="FSDP2 for any LightningModule, sharded by its blocks")
