"""MonteCLoRA's noise and regulariser: the same on all ranks, and the same again after a resume.

``peft`` draws the noise of 150 forward passes at a time from the global random state and keeps it outside the state
dict. Here each such lot is a function of the seed, the layer and the number of the lot.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

import torch

from lightning_peft.adapters.drivers import LossDriver
from lightning_peft.core.instance import replace_on

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["MonteCLoRADriver"]


class MonteCLoRADriver(LossDriver):
    """Add ``peft``'s regulariser to the loss and own the noise of its samplers.

    Args:
        handle: ``peft``'s model.
        adapter_name: The adapter.
        seed: Of the noise.
    """

    def __init__(self, handle: PeftModel, adapter_name: str, seed: int) -> None:
        super().__init__(handle, adapter_name, "_get_monteclora_loss")
        self._lots: dict[str, _Lots] = {}
        for path, module in handle.get_base_model().named_modules():
            samplers: Any = getattr(module, "lora_monteclora_sampler", {})
            if adapter_name in samplers:
                self._lots[path] = _Lots(samplers[adapter_name].sampler, seed + zlib.crc32(path.encode()))

    def state_dict(self) -> dict[str, Any]:
        """Which lot each layer is at, and how much of it is used."""
        return {path: (lots.number, lots.sampler.index) for path, lots in self._lots.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Draw those lots again."""
        for path, (number, index) in state.items():
            lots = self._lots[path]
            lots.number = number - 1
            lots.sampler._refill_buffer()
            lots.sampler.index = index


class _Lots:
    """The noise of one layer, by lots."""

    def __init__(self, sampler: Any, seed: int) -> None:
        self.sampler, self.number = sampler, -1
        draw = sampler._refill_buffer

        def refill() -> None:
            self.number += 1
            with torch.random.fork_rng():
                torch.manual_seed(seed + 0x9E3779B1 * self.number)
                draw()

        replace_on(sampler, _refill_buffer=refill)
        refill()
