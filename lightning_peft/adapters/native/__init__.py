"""Adapters that ``peft`` lacks, as ordinary ``peft`` tuners; importing this registers them.

After ``import lightning_peft.adapters.native``, ``peft.get_peft_model`` takes their configurations and
``peft.PeftModel.from_pretrained`` loads what they saved.
"""

from __future__ import annotations

from lightning_peft.adapters.native.bottleneck import BottleneckConfig
from lightning_peft.adapters.native.compacter import CompacterConfig
from lightning_peft.adapters.native.dept import DePTConfig
from lightning_peft.adapters.native.increlora import IncreLoRAConfig
from lightning_peft.adapters.native.lofit import LoFiTConfig
from lightning_peft.adapters.native.loldu import LoLDUConfig
from lightning_peft.adapters.native.lora_sb import LoRASBConfig, calibrate_lora_sb
from lightning_peft.adapters.native.lora_xs import LoRAXSConfig
from lightning_peft.adapters.native.loramoe import LoRAMoEConfig
from lightning_peft.adapters.native.mosa import MoSAConfig
from lightning_peft.adapters.native.mtlora import MTLoRAConfig, set_tasks
from lightning_peft.adapters.native.nlora import IntTuneConfig, NLoRAConfig, SLoRAConfig
from lightning_peft.adapters.native.ntk_attention import NTKAttentionConfig
from lightning_peft.adapters.native.ssf import SSFConfig
from lightning_peft.adapters.native.triadapt_lora import TriAdaptLoRAConfig
from lightning_peft.adapters.native.vl_pet import VLPETConfig
from lightning_peft.adapters.native.vpt import VPTConfig

__all__ = [
    "BottleneckConfig",
    "CompacterConfig",
    "DePTConfig",
    "IncreLoRAConfig",
    "IntTuneConfig",
    "LoFiTConfig",
    "LoLDUConfig",
    "LoRAMoEConfig",
    "LoRASBConfig",
    "LoRAXSConfig",
    "MTLoRAConfig",
    "MoSAConfig",
    "NLoRAConfig",
    "NTKAttentionConfig",
    "SLoRAConfig",
    "SSFConfig",
    "TriAdaptLoRAConfig",
    "VLPETConfig",
    "VPTConfig",
    "calibrate_lora_sb",
    "set_tasks",
]
