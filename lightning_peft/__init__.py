"""Fine-tune part of a model, exactly, with PyTorch Lightning.

Public names are imported on first use, so that ``import lightning_peft`` stays fast and pulls in neither
``transformers`` nor ``peft``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

_PUBLIC: dict[str, str] = {
    # layers
    "KaSA": "lightning_peft.adapters.presets",
    "LISA": "lightning_peft.methods.layers.lisa",
    "HFT": "lightning_peft.methods.layers.hft",
    "IST": "lightning_peft.methods.layers.ist",
    "GreenTrainer": "lightning_peft.methods.layers.green_trainer",
    "BAdam": "lightning_peft.methods.layers.badam",
    "Telly": "lightning_peft.methods.layers.telly",
    "BitFit": "lightning_peft.methods.layers.bitfit",
    "EmbeddingsAndHead": "lightning_peft.methods.layers.embeddings_and_head",
    "LastLayer": "lightning_peft.methods.layers.last_layer",
    "RandomTuning": "lightning_peft.methods.layers.random_tuning",
    "GradualUnfreezing": "lightning_peft.methods.layers.gradual_unfreezing",
    "FinetuningSchedule": "lightning_peft.methods.layers.schedule",
    "RiFT": "lightning_peft.methods.layers.rift",
    "Spectrum": "lightning_peft.methods.layers.spectrum",
    "Surgical": "lightning_peft.methods.layers.surgical",
    "AutoRGN": "lightning_peft.methods.layers.auto_rgn",
    "DropBP": "lightning_peft.methods.layers.dropbp",
    "CoFiTune": "lightning_peft.methods.layers.cofitune",
    "SearchedSubset": "lightning_peft.methods.layers.searched_subset",
    # slices: columns and rows of weights
    "PaCA": "lightning_peft.methods.slices.paca",
    # quantised base weights
    "QLoRA": "lightning_peft.methods.quantized.qlora",
    "PEQA": "lightning_peft.methods.quantized.peqa",
    "LowBitAdapters": "lightning_peft.methods.quantized.low_bit_adapters",
    "QuantizedPrecision": "lightning_peft.precision.plugin",
    # strategies
    "FSDP2Strategy": "lightning_peft.strategies.fsdp2",
    "consolidate_checkpoint": "lightning_peft.strategies.consolidate",
    # searches for what should train
    "SubsetSearch": "lightning_peft.search.subset_search",
    # adapters
    "Adapter": "lightning_peft.adapters.adapter",
    "calibrate_lora_sb": "lightning_peft.adapters.native.lora_sb",
    "LoRASBConfig": "lightning_peft.adapters.native.lora_sb",
    "LoRAXS": "lightning_peft.adapters.native.presets",
    "SLoRA": "lightning_peft.adapters.native.presets",
    "NLoRA": "lightning_peft.adapters.native.presets",
    "IntTune": "lightning_peft.adapters.native.presets",
    "LoLDU": "lightning_peft.adapters.native.presets",
    "SSF": "lightning_peft.adapters.native.ssf",
    "IncreLoRA": "lightning_peft.adapters.native.increlora",
    "TriAdaptLoRA": "lightning_peft.adapters.native.triadapt_lora",
    "LoRAMoE": "lightning_peft.adapters.native.loramoe",
    "MTLoRA": "lightning_peft.adapters.native.mtlora",
    "set_tasks": "lightning_peft.adapters.native.mtlora",
    "VPT": "lightning_peft.adapters.native.vpt",
    "NTKAttention": "lightning_peft.adapters.native.ntk_attention",
    "DePT": "lightning_peft.adapters.native.dept",
    "SeriesAdapter": "lightning_peft.adapters.native.bottleneck",
    "ParallelAdapter": "lightning_peft.adapters.native.bottleneck",
    "Compacter": "lightning_peft.adapters.native.compacter",
    "MoSA": "lightning_peft.adapters.native.mosa",
    "VLPET": "lightning_peft.adapters.native.vl_pet",
    "LoFiT": "lightning_peft.adapters.native.lofit",
    "LoFiTSelection": "lightning_peft.adapters.native.lofit",
    "AdaMSS": "lightning_peft.adapters.adamss",
    "BALoRA": "lightning_peft.adapters.ba_lora",
    "AdaLoRA": "lightning_peft.adapters.presets",
    "CorDA": "lightning_peft.adapters.data_driven",
    "CPT": "lightning_peft.adapters.cpt",
    "DoRA": "lightning_peft.adapters.presets",
    "EVA": "lightning_peft.adapters.data_driven",
    "IA3": "lightning_peft.adapters.presets",
    "LoRA": "lightning_peft.adapters.presets",
    "LAE": "lightning_peft.adapters.lae",
    "LoRAFA": "lightning_peft.adapters.lora_fa",
    "LoRAGA": "lightning_peft.adapters.data_driven",
    "LoRAPlus": "lightning_peft.adapters.lora_plus",
    "LoRASB": "lightning_peft.adapters.data_driven",
    "MiSS": "lightning_peft.adapters.presets",
    "OFT": "lightning_peft.adapters.presets",
    "PiSSA": "lightning_peft.adapters.presets",
    "PEGO": "lightning_peft.adapters.pego",
    "Poly": "lightning_peft.adapters.poly",
    "PrefixTuning": "lightning_peft.adapters.presets",
    "PromptTuning": "lightning_peft.adapters.presets",
    "VeRA": "lightning_peft.adapters.presets",
    "load_from_checkpoint": "lightning_peft.adapters.files",
    "merge_adapters": "lightning_peft.adapters.files",
    # reports
    "TrainableTable": "lightning_peft.report.table",
    "TrainingLedger": "lightning_peft.report.ledger_plot",
    # models and data for command-line runs
    "CausalLM": "lightning_peft.models.causal_lm",
    "SequenceClassification": "lightning_peft.models.sequence_classification",
    "TextEmbedding": "lightning_peft.models.text_embedding",
    "WarmupSchedule": "lightning_peft.models.optimizer",
    "TextFiles": "lightning_peft.data.text_files",
    "PromptResponse": "lightning_peft.data.prompt_response",
    "ChatMessages": "lightning_peft.data.chat_messages",
    "LabelledText": "lightning_peft.data.labelled_text",
    "TextPairs": "lightning_peft.data.text_pairs",
    "PythonCodeSearch": "lightning_peft.data.code_search",
    "ResumableDataLoader": "lightning_peft.data.loader",
}

__all__ = ["__version__", "errors", *_PUBLIC]  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from lightning_peft import errors
    from lightning_peft.adapters.adamss import AdaMSS
    from lightning_peft.adapters.adapter import Adapter
    from lightning_peft.adapters.ba_lora import BALoRA
    from lightning_peft.adapters.cpt import CPT
    from lightning_peft.adapters.data_driven import EVA, CorDA, LoRAGA, LoRASB
    from lightning_peft.adapters.files import load_from_checkpoint, merge_adapters
    from lightning_peft.adapters.lae import LAE
    from lightning_peft.adapters.lora_fa import LoRAFA
    from lightning_peft.adapters.lora_plus import LoRAPlus
    from lightning_peft.adapters.native.bottleneck import ParallelAdapter, SeriesAdapter
    from lightning_peft.adapters.native.compacter import Compacter
    from lightning_peft.adapters.native.dept import DePT
    from lightning_peft.adapters.native.increlora import IncreLoRA
    from lightning_peft.adapters.native.lofit import LoFiT, LoFiTSelection
    from lightning_peft.adapters.native.lora_sb import LoRASBConfig, calibrate_lora_sb
    from lightning_peft.adapters.native.loramoe import LoRAMoE
    from lightning_peft.adapters.native.mosa import MoSA
    from lightning_peft.adapters.native.mtlora import MTLoRA, set_tasks
    from lightning_peft.adapters.native.ntk_attention import NTKAttention
    from lightning_peft.adapters.native.presets import IntTune, LoLDU, LoRAXS, NLoRA, SLoRA
    from lightning_peft.adapters.native.ssf import SSF
    from lightning_peft.adapters.native.triadapt_lora import TriAdaptLoRA
    from lightning_peft.adapters.native.vl_pet import VLPET
    from lightning_peft.adapters.native.vpt import VPT
    from lightning_peft.adapters.pego import PEGO
    from lightning_peft.adapters.poly import Poly
    from lightning_peft.adapters.presets import (
        IA3,
        OFT,
        AdaLoRA,
        DoRA,
        KaSA,
        LoRA,
        MiSS,
        PiSSA,
        PrefixTuning,
        PromptTuning,
        VeRA,
    )
    from lightning_peft.data.chat_messages import ChatMessages
    from lightning_peft.data.code_search import PythonCodeSearch
    from lightning_peft.data.labelled_text import LabelledText
    from lightning_peft.data.loader import ResumableDataLoader
    from lightning_peft.data.prompt_response import PromptResponse
    from lightning_peft.data.text_files import TextFiles
    from lightning_peft.data.text_pairs import TextPairs
    from lightning_peft.methods.layers.auto_rgn import AutoRGN
    from lightning_peft.methods.layers.badam import BAdam
    from lightning_peft.methods.layers.bitfit import BitFit
    from lightning_peft.methods.layers.cofitune import CoFiTune
    from lightning_peft.methods.layers.dropbp import DropBP
    from lightning_peft.methods.layers.embeddings_and_head import EmbeddingsAndHead
    from lightning_peft.methods.layers.gradual_unfreezing import GradualUnfreezing
    from lightning_peft.methods.layers.green_trainer import GreenTrainer
    from lightning_peft.methods.layers.hft import HFT
    from lightning_peft.methods.layers.ist import IST
    from lightning_peft.methods.layers.last_layer import LastLayer
    from lightning_peft.methods.layers.lisa import LISA
    from lightning_peft.methods.layers.random_tuning import RandomTuning
    from lightning_peft.methods.layers.rift import RiFT
    from lightning_peft.methods.layers.schedule import FinetuningSchedule
    from lightning_peft.methods.layers.searched_subset import SearchedSubset
    from lightning_peft.methods.layers.spectrum import Spectrum
    from lightning_peft.methods.layers.surgical import Surgical
    from lightning_peft.methods.layers.telly import Telly
    from lightning_peft.methods.quantized.low_bit_adapters import LowBitAdapters
    from lightning_peft.methods.quantized.peqa import PEQA
    from lightning_peft.methods.quantized.qlora import QLoRA
    from lightning_peft.methods.slices.paca import PaCA
    from lightning_peft.models.causal_lm import CausalLM
    from lightning_peft.models.optimizer import WarmupSchedule
    from lightning_peft.models.sequence_classification import SequenceClassification
    from lightning_peft.models.text_embedding import TextEmbedding
    from lightning_peft.precision.plugin import QuantizedPrecision
    from lightning_peft.report.ledger_plot import TrainingLedger
    from lightning_peft.report.table import TrainableTable
    from lightning_peft.search.subset_search import SubsetSearch
    from lightning_peft.strategies.consolidate import consolidate_checkpoint
    from lightning_peft.strategies.fsdp2 import FSDP2Strategy


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    if name == "errors":
        return importlib.import_module("lightning_peft.errors")
    raise AttributeError(f"module 'lightning_peft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
