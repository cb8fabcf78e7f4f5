"""Adapters that ``peft`` lacks, as ordinary ``peft`` tuners; importing this registers them.

After ``import lightning_peft.adapters.native``, ``peft.get_peft_model`` takes their configurations and
``peft.PeftModel.from_pretrained`` loads what they saved.
"""

from __future__ import annotations

from lightning_peft.adapters.native.loldu import LoLDUConfig
from lightning_peft.adapters.native.lora_sb import LoRASBConfig, calibrate_lora_sb
from lightning_peft.adapters.native.lora_xs import LoRAXSConfig
from lightning_peft.adapters.native.nlora import IntTuneConfig, NLoRAConfig, SLoRAConfig
from lightning_peft.adapters.native.ssf import SSFConfig

__all__ = [
    "IntTuneConfig",
    "LoLDUConfig",
    "LoRASBConfig",
    "LoRAXSConfig",
    "NLoRAConfig",
    "SLoRAConfig",
    "SSFConfig",
    "calibrate_lora_sb",
]
