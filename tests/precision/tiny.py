"""A tiny Llama, a LightningModule that builds and injects in every place, and a Trainer for the tests of precision."""

from __future__ import annotations

from typing import Any, Literal

import lightning.pytorch as pl
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch.utils.data import DataLoader, TensorDataset

VOCAB = 19


def tiny_llama(seed: int = 1, hidden: int = 32, intermediate: int = 48, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).to(dtype)


def add_lora(model: Any, rank: int = 4, **config: Any) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        settings = {"target_modules": "all-linear", "init_lora_weights": "gaussian", **config}
        inject_adapter_in_model(LoraConfig(r=rank, **settings), model)


class LoRAModule(pl.LightningModule):
    """Adapters on a tiny Llama: built and injected where ``where`` says, by code that knows nothing of this package."""

    def __init__(
        self,
        where: Literal["init", "configure", "quantize_first", "bare", "configure_bare"] = "init",
        seed: int = 1,
        dtype: torch.dtype = torch.float32,
        optimizer: Any = torch.optim.AdamW,
    ) -> None:
        super().__init__()
        self.where, self.seed, self.weights_dtype, self.optimizer = where, seed, dtype, optimizer
        self.model: Any = None
        self.losses: list[float] = []
        if where in ("init", "bare"):
            self.model = tiny_llama(seed, dtype=dtype)
        if where == "init":
            add_lora(self.model)

    def configure_model(self) -> None:
        if self.model is None:
            self.model = tiny_llama(self.seed, dtype=self.weights_dtype)
        if self.where == "quantize_first":
            self.trainer.precision_plugin.quantize(self.model)
        if self.where in ("configure", "quantize_first") and not hasattr(self.model, "peft_config"):
            add_lora(self.model)

    def loss(self, batch: Any) -> torch.Tensor:
        return self.model(input_ids=batch[0], labels=batch[0], use_cache=False).loss

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.loss(batch)
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return self.optimizer([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def rows(num: int = 12) -> torch.Tensor:
    return torch.randint(0, VOCAB, (num, 7), generator=torch.Generator().manual_seed(2))


def loader(num: int = 12) -> DataLoader:
    return DataLoader(TensorDataset(rows(num)), batch_size=4)


def trainer(plugin: Any, max_steps: int = 6, **settings: Any) -> pl.Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": max_steps,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    plugins = [] if plugin is None else [plugin]
    return pl.Trainer(plugins=plugins, **{**quiet, **settings})
