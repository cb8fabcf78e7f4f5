"""Tiny models, data and probes that the contract tests share.

Three models: a tied decoder with dropout (GPT-2), an untied decoder with grouped-query attention (Llama) and a CNN
with BatchNorm. To put a method under contract, add a row to ``ROWS``.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import TensorDataset

from lightning_peft import (
    HFT,
    IST,
    LISA,
    AutoRGN,
    BAdam,
    BitFit,
    CoFiTune,
    DropBP,
    EmbeddingsAndHead,
    FinetuningSchedule,
    GradualUnfreezing,
    GreenTrainer,
    LastLayer,
    RandomTuning,
    RiFT,
    SearchedSubset,
    Spectrum,
    Surgical,
    Telly,
)
from lightning_peft.data.loader import ResumableDataLoader
from lightning_peft.methods.base import MethodCallback

NUM_LAYERS = 4
NUM_SAMPLES = 22  # not a multiple of the batch size or of the accumulation: last batches are short
BATCH_SIZE = 2


# ---------------------------------------------------------------------------------------------------- models


def tied_decoder() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=19, n_positions=8, n_embd=8, n_layer=NUM_LAYERS, n_head=2)
    return GPT2LMHeadModel(config)


def gqa_decoder() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=19,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8,
        attention_dropout=0.1,
    )
    return LlamaForCausalLM(config)


class ConvBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.relu(self.norm(self.conv(x)))


class ConvNet(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.blocks = nn.ModuleList([ConvBlock(width) for _ in range(NUM_LAYERS)])
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.dropout(x.mean((2, 3))))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "tied_decoder": tied_decoder,
    "gqa_decoder": gqa_decoder,
    "conv_net": ConvNet,
}


@functools.cache
def _pretrained(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return MODELS[name]()


class TinyModule(pl.LightningModule):
    """A LightningModule as a user has it: its own optimizer, nothing of ours."""

    def __init__(self, model: str, optimizer: str = "adamw", filtered: bool = True) -> None:
        super().__init__()
        self.model = copy.deepcopy(_pretrained(model))
        self.is_language_model = model != "conv_net"
        self.optimizer = optimizer
        self.filtered = filtered

    def loss(self, batch: Sequence[torch.Tensor]) -> torch.Tensor:
        x, y = batch
        if self.is_language_model:
            return self.model(input_ids=x, labels=x, use_cache=False).loss
        return nn.functional.cross_entropy(self.model(x), y)

    def training_step(self, batch: Sequence[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Sequence[torch.Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: Sequence[torch.Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: Sequence[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.parameters() if p.requires_grad or not self.filtered]
        if self.optimizer == "sgd":
            optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.1)
        else:
            optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.1 * step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def dataset(model: str, num_samples: int = NUM_SAMPLES) -> TensorDataset:
    generator = torch.Generator().manual_seed(2)
    if model == "conv_net":
        x = torch.randn(num_samples, 1, 6, 6, generator=generator)
    else:
        x = torch.randint(0, 19, (num_samples, 7), generator=generator)
    return TensorDataset(x, torch.randint(0, 5, (num_samples,), generator=generator))


def loader(model: str, shuffle: bool = True) -> ResumableDataLoader:
    return ResumableDataLoader(dataset(model), batch_size=BATCH_SIZE, shuffle=shuffle, seed=3)


# ---------------------------------------------------------------------------------------------------- methods


@dataclass(frozen=True)
class Row:
    """One method under contract.

    Args:
        make: Builds its callbacks, with periods short enough for a run of a dozen steps.
        make_full: Builds them so that everything trains all the time: must equal full fine-tuning. None if the
            method cannot.
        draws: Draws that the method (of several, the busiest) makes in a run of ``steps`` optimizer steps.
    """

    make: Callable[[], list[MethodCallback]]
    make_full: Callable[[], list[MethodCallback]] | None
    draws: Callable[[int], int]


# Thaws, refreezes and overlaps; ends by steps and by epoch; rates, options and a scheduler of phases' own.
PHASES: dict[int, Any] = {
    0: {"params": ["head", "norms"], "max_steps": 2, "lr": 0.002},
    1: {"params": ["*.[23].*"], "freeze": ["norms"], "max_transition_epoch": 1, "lr": 0.003},
    2: {
        "only": ["*.[01].*", "*.3.*"],
        "max_steps": 3,
        "lr": 0.004,
        "optimizer_options": {"weight_decay": 0.2},
        "new_lr_scheduler": {
            "lr_scheduler_init": {
                "class_path": "torch.optim.lr_scheduler.StepLR",
                "init_args": {"step_size": 2, "gamma": 0.7},
            },
            "pl_lrs_cfg": {"interval": "step"},
        },
    },
    3: {"params": ["head", "embeddings", "norms"], "freeze": ["*.1.*"], "lr": 0.002},
}
ALL_PHASES: dict[int, Any] = {0: {"params": ["all"], "max_steps": 4}, 1: {"params": ["all"]}}
REPLACING_PHASES: dict[int, Any] = {
    0: {"params": ["head", "blocks"], "max_steps": 3},
    1: {
        "freeze": ["*.[02].*"],
        "max_steps": 4,
        "new_optimizer": {
            "optimizer_init": {
                "class_path": "torch.optim.SGD",
                "init_args": {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1},
            }
        },
    },
    2: {
        "params": ["*.2.*", "norms"],
        "lr": 2e-3,
        "new_optimizer": {"optimizer_init": {"class_path": "torch.optim.Adamax", "init_args": {"lr": 1e-3}}},
    },
}

ROWS: dict[str, Row] = {
    "lisa": Row(lambda: [LISA(2, period_steps=3)], lambda: [LISA(NUM_LAYERS, period_steps=3)], lambda s: -(-s // 3)),
    "lisa_keep": Row(lambda: [LISA(1, period_steps=2, state="keep")], None, lambda s: -(-s // 2)),
    "lisa_offload": Row(lambda: [LISA(1, period_steps=2, state="offload")], None, lambda s: -(-s // 2)),
    "lisa_head_only": Row(lambda: [LISA(1, period_steps=2, always=("head",))], None, lambda s: -(-s // 2)),
    "lisa_outliers": Row(
        lambda: [LISA(1, period_steps=2, sampling="outliers", outlier_factor=2.0)],
        lambda: [LISA(NUM_LAYERS, period_steps=2, sampling="outliers", outlier_factor=2.0)],
        lambda s: -(-s // 2),
    ),
    "hft": Row(lambda: [HFT()], lambda: [HFT(fraction=1.0)], lambda s: 1),
    "hft_redraw": Row(lambda: [HFT(redraw=4)], lambda: [HFT(fraction=1.0, redraw=4)], lambda s: -(-s // 4)),
    "hft_layer": Row(lambda: [HFT(granularity="layer", redraw=3, state="keep")], None, lambda s: -(-s // 3)),
    "ist": Row(lambda: [IST(0.5, score_period_steps=2, scope="blocks")], None, lambda s: s),
    "ist_slow": Row(
        lambda: [IST(0.25, 3, score_period_steps=2, scope="blocks", always=("embeddings", "head", "norms"))],
        lambda: [IST(1.0, score_period_steps=2, scope="blocks", always=("embeddings", "head", "norms"))],
        lambda s: -(-s // 3),
    ),
    "badam": Row(lambda: [BAdam("ascending", period_steps=2)], None, lambda s: -(-s // 2)),
    "badam_random": Row(
        lambda: [BAdam(period_steps=3, scope=["blocks", "head"], always=("norms",))], None, lambda s: -(-s // 3)
    ),
    "green_trainer": Row(
        lambda: [GreenTrainer(0.6, redraw=3)], lambda: [GreenTrainer(1.0, redraw=3)], lambda s: -(-s // 3)
    ),
    "green_trainer_epoch": Row(
        lambda: [GreenTrainer(0.7, scope="blocks", always=("norms",), state="drop")], None, lambda s: s // 6
    ),
    "telly": Row(lambda: [Telly(2)], lambda: [Telly(-1)], lambda s: 1),
    "bitfit": Row(lambda: [BitFit(scope=["biases", "norms"])], None, lambda s: 1),  # Llama has no biases
    "embeddings_and_head": Row(lambda: [EmbeddingsAndHead()], None, lambda s: 1),
    "last_layer": Row(lambda: [LastLayer(always=("head",))], None, lambda s: 1),
    "random_tuning": Row(lambda: [RandomTuning(0.3)], lambda: [RandomTuning(1.0)], lambda s: 1),
    "random_tuning_redraw": Row(
        lambda: [RandomTuning(0.3, redraw=2)], lambda: [RandomTuning(1.0, redraw=2)], lambda s: -(-s // 2)
    ),
    "gradual_unfreezing": Row(lambda: [GradualUnfreezing()], None, lambda s: -(-s // 6)),
    "gradual_unfreezing_slanted": Row(
        lambda: [GradualUnfreezing(period_steps=3, blocks_per_group=2, slanted_triangular=True)], None, lambda s: 4
    ),
    "schedule": Row(lambda: [FinetuningSchedule(PHASES)], lambda: [FinetuningSchedule(ALL_PHASES)], lambda s: 4),
    "schedule_replacing": Row(lambda: [FinetuningSchedule(REPLACING_PHASES, state="offload")], None, lambda s: 3),
    "rift": Row(lambda: [RiFT(epochs=1, num_batches=2, interpolation_steps=4, score_on="train")], None, lambda s: 1),
    "spectrum": Row(lambda: [Spectrum(0.5)], None, lambda s: 1),
    "surgical": Row(lambda: [Surgical(1, 2)], None, lambda s: 1),
    "auto_rgn": Row(lambda: [AutoRGN(num_batches=2)], None, lambda s: -(-s // 6)),
    "dropbp": Row(lambda: [DropBP(0.4)], lambda: [DropBP(0.0)], lambda s: s),
    "cofitune": Row(lambda: [CoFiTune(modules=["ffn"], num_batches=2)], None, lambda s: 1),
    "cofitune_coarse": Row(
        lambda: [CoFiTune((0.5, 1.0), ["ffn"], soft_mask="none")],
        lambda: [CoFiTune((0.0, 1.0), ["all"], soft_mask="none", always=("embeddings", "head", "norms"))],
        lambda s: 1,
    ),
    "searched_subset": Row(
        lambda: [SearchedSubset(["*.[03].*"], always=("norms",))], lambda: [SearchedSubset("all")], lambda s: 1
    ),
    "two_methods": Row(
        lambda: [
            LISA(1, period_steps=2, scope="*.[01].*", always=()),
            RandomTuning(0.4, scope=["head", "norms", "!*.[01].*"]),
        ],
        None,
        lambda s: -(-s // 2),
    ),
    "hft_model": Row(lambda: [HFT(granularity="model", redraw=3)], None, lambda s: -(-s // 3)),
}


# ---------------------------------------------------------------------------------------------------- runs


def trainer(tmp_path: Path, callbacks: Sequence[pl.Callback], **overrides: Any) -> pl.Trainer:
    arguments: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "default_root_dir": tmp_path,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 2,
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 0.5,
        "limit_val_batches": 2,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**arguments, **overrides})


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def assert_same_weights(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different, different


def buffer_owners(module: nn.Module) -> dict[str, list[str]]:
    """Each running statistic -> the parameters of its layer."""
    owners = {}
    for path, layer in module.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            for name, _ in layer.named_buffers():
                owners[f"{path}.{name}"] = [f"{path}.{parameter}" for parameter, _ in layer.named_parameters()]
    return owners


@dataclass
class StepRecord:
    planned: frozenset[str]
    requires_grad: frozenset[str]
    with_gradient: frozenset[str]
    moved: frozenset[str]
    moved_buffers: frozenset[str]
    state_names: frozenset[str]
    global_step: int


@dataclass
class Probe(pl.Callback):
    """Record, independently of the package, what every optimizer step did to every tensor."""

    methods: Sequence[MethodCallback]
    steps: list[StepRecord] = field(default_factory=list)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.before = weights(pl_module)
        self.buffers = dict(pl_module.named_buffers())

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        named = dict(pl_module.named_parameters())
        held = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert len(held) == len(set(held))
        self.planned = frozenset().union(*(method.trainable_names for method in self.methods))
        self.requires_grad = frozenset(name for name, p in named.items() if p.requires_grad)
        self.with_gradient = frozenset(name for name, p in named.items() if p.grad is not None)
        assert self.planned <= {name for name, p in named.items() if id(p) in held}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.fit_loop._should_accumulate():
            assert {n for n, v in weights(pl_module).items() if not torch.equal(v, self.before[n])} <= set(self.buffers)
            return
        after = weights(pl_module)
        moved = {name for name in after if not torch.equal(after[name], self.before[name])}
        optimizer = trainer.optimizers[0]
        self.steps.append(
            StepRecord(
                self.planned,
                self.requires_grad,
                self.with_gradient,
                frozenset(dict(pl_module.named_parameters()).keys() & moved),
                frozenset(self.buffers.keys() & moved),
                frozenset(name for name, p in pl_module.named_parameters() if p in optimizer.state),
                trainer.global_step,
            )
        )
        self.before = after
