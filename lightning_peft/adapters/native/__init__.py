"""Adapters that ``peft`` lacks, as ordinary ``peft`` tuners; importing this registers them.

After ``import lightning_peft.adapters.native``, ``peft.get_peft_model`` takes their configurations and
``peft.PeftModel.from_pretrained`` loads what they saved.
"""

from __future__ import annotations

from lightning_peft.adapters.native.bottleneck import BottleneckConfig
from lightning_peft.adapters.native.compacter import CompacterConfig
from lightning_peft.adapters.native.increlora import IncreLoRAConfig
from lightning_peft.adapters.native.loldu import LoLDUConfig
from lightning_peft.adapters.native.lora_sb import LoRASBConfig, calibrate_lora_sb
from lightning_peft.adapters.native.lora_xs import LoRAXSConfig
from lightning_peft.adapters.native.nlora import IntTuneConfig, NLoRAConfig, SLoRAConfig
from lightning_peft.adapters.native.ssf import SSFConfig
from lightning_peft.adapters.native.triadapt_lora import TriAdaptLoRAConfig

__all__ = [
    "BottleneckConfig",
    "CompacterConfig",
    "IncreLoRAConfig",
    "IntTuneConfig",
    "LoLDUConfig",
    "LoRASBConfig",
    "LoRAXSConfig",
    "NLoRAConfig",
    "SLoRAConfig",
    "SSFConfig",
    "TriAdaptLoRAConfig",
    "calibrate_lora_sb",
]
