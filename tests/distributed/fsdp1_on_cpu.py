"""``FSDPStrategy`` on the CPU, which Lightning does not allow: a double for tests, the same code paths otherwise.

A subclass passes Lightning's check for a GPU. FSDP then wants a device instead of an index, and a full state dict must
not be moved "to the CPU": on the CPU that frees the storage which it shares.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch.strategies.fsdp as module
import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType
from torch.distributed.fsdp.api import FullOptimStateDictConfig


class FSDPOnCPU(FSDPStrategy):
    def _setup_model(self, model: torch.nn.Module) -> torch.nn.Module:
        model = FullyShardedDataParallel(
            module=model,
            cpu_offload=self.cpu_offload,
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            device_id=self.root_device,
            **self.kwargs,
        )
        module._setup_activation_checkpointing(model, self._activation_checkpointing_kwargs)
        return model

    @contextmanager
    def _without_offload(self) -> Iterator[None]:
        def context(model: Any, world_size: int, rank0_only: bool = True) -> Any:
            return FullyShardedDataParallel.state_dict_type(
                model,
                StateDictType.FULL_STATE_DICT,
                FullStateDictConfig(offload_to_cpu=False, rank0_only=rank0_only),
                FullOptimStateDictConfig(offload_to_cpu=False, rank0_only=rank0_only),
            )

        original = module._get_full_state_dict_context
        module._get_full_state_dict_context = context
        try:
            yield
        finally:
            module._get_full_state_dict_context = original

    def lightning_module_state_dict(self) -> dict[str, Any]:
        with self._without_offload():
            return super().lightning_module_state_dict()

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        with self._without_offload():
            return super().optimizer_state(optimizer)

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        with self._without_offload():
            return super().load_checkpoint(*args, **kwargs)
