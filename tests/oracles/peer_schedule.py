"""What finetuning-scheduler, an independent package, does with a schedule: per epoch, who trains at which rate.

Run on one device, without restoring best checkpoints: what it is known to do right.
"""

from __future__ import annotations

import copy
import importlib.metadata
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

SHIPPED = [
    "fts_examples/config/RteBoolqModule_ft_schedule_deberta_base.yaml",
    "fts_examples/config/RteBoolqModule_ft_schedule_deberta_base_fsdp.yaml",
    "fts_examples/config/advanced/reinit_lr/explicit_reinit_lr.yaml",
    "fts_examples/config/advanced/reinit_optim_lr/explicit_reinit_optim_lr.yaml",
    "fts_examples/model_parallel/config/defaults/llama_ft_schedule.yaml",
]
"""The schedules in its wheel."""


def shipped_file(path: str) -> Path:
    """Return where a file of the installed wheel lies."""
    for entry in importlib.metadata.files("finetuning-scheduler") or ():
        if str(entry) == path:
            return Path(str(entry.locate()))
    raise FileNotFoundError(path)


# ---------------------------------------------------------------------------------------------------- models


def deberta() -> nn.Module:
    """Twelve tiny layers with the names that four of the shipped schedules expect."""
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    config = DebertaV2Config(
        vocab_size=11,
        hidden_size=4,
        num_hidden_layers=12,
        num_attention_heads=2,
        intermediate_size=4,
        max_position_embeddings=8,
        position_buckets=4,
        relative_attention=True,
        position_biased_input=False,
        pos_att_type=["p2c", "c2p"],
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        type_vocab_size=0,
        pooler_hidden_size=4,
    )
    return DebertaV2ForSequenceClassification(config)


class LlamaLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in ("wq", "wk", "wv", "wo")})
        self.feed_forward = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in ("w1", "w2", "w3")})
        self.attention_norm = nn.LayerNorm(2)
        self.ffn_norm = nn.LayerNorm(2)


class Llama(nn.Module):
    """The names of torchtitan's Llama, which the fifth schedule expects."""

    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(3, 2)
        self.layers = nn.ModuleDict({str(index): LlamaLayer() for index in range(4)})
        self.norm = nn.LayerNorm(2)
        self.output = nn.Linear(2, 3, bias=False)


class Module(pl.LightningModule):
    """Pulls every trainable parameter towards 1; ``val_loss`` is a given number per epoch.

    Args:
        model: Its parameters train.
        optimizer: Parameters -> optimizer.
        scheduler: Optimizer -> what Lightning takes as ``lr_scheduler``; None for none.
        val_losses: ``val_loss`` of each epoch; the last goes on.
        filtered: Give the optimizer only what requires gradients.
        no_decay: Parts of names without weight decay.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[[Any], torch.optim.Optimizer],
        scheduler: Callable[[Any], Any] | None = None,
        val_losses: Sequence[float] = (1.0,),
        filtered: bool = False,
        no_decay: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        self.make_optimizer, self.make_scheduler = optimizer, scheduler
        self.val_losses, self.filtered = val_losses, filtered
        if no_decay is not None:
            self.no_decay = list(no_decay)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        terms = [(p - 1).square().sum() for p in self.model.parameters() if p.requires_grad]
        return batch[0].mean() * torch.stack(terms).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.val_losses[min(self.current_epoch, len(self.val_losses) - 1)])

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer([p for p in self.model.parameters() if p.requires_grad or not self.filtered])
        if self.make_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.make_scheduler(optimizer)}


class Rates(pl.Callback):
    """Per epoch: the learning rate of every parameter that trains, by name."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        if index > 0:
            return
        rates = {
            id(p): float(group["lr"]) for o in trainer.optimizers for group in o.param_groups for p in group["params"]
        }
        self.epochs.append({name: rates[id(p)] for name, p in pl_module.named_parameters() if p.requires_grad})


def run(tmp_path: Path, module: Module, callbacks: Sequence[pl.Callback], max_epochs: int) -> list[dict[str, float]]:
    """Fit and return what trained at which rate in each epoch."""
    rates = Rates()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=max_epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
        callbacks=[*callbacks, rates],
    )
    data = DataLoader(TensorDataset(torch.ones(2, 1)))
    trainer.fit(module, data, DataLoader(TensorDataset(torch.ones(1, 1))))
    return rates.epochs


# ---------------------------------------------------------------------------------------------------- the peer


def peer_run(
    tmp_path: Path,
    module: Module,
    schedule: Path | dict[int, Any] | None,
    max_epochs: int,
    patience: int = 3,
    **kw: Any,
) -> tuple[list[dict[str, float]], dict[int, Any]]:
    """Fit under finetuning-scheduler; return rates per epoch and its schedule with all names expanded."""
    import finetuning_scheduler as peer

    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = peer.FinetuningScheduler(
            ft_schedule=copy.deepcopy(schedule) if isinstance(schedule, dict) else schedule and str(schedule),
            restore_best=False,
            log_dir=str(tmp_path),
            **kw,
        )
        stopping = [] if kw.get("epoch_transitions_only") else [peer.FTSEarlyStopping("val_loss", patience=patience)]
        try:
            epochs = run(tmp_path, module, [scheduler, *stopping], max_epochs)
        finally:
            logger.setLevel(level)
    assert isinstance(scheduler.ft_schedule, dict)
    return epochs, scheduler.ft_schedule
