"""What the ready modules share: the model, its tokenizer, the optimizer, and evaluation over named sets.

The model is built in ``__init__``, not in ``configure_model``: what was constructed can be looked at, callbacks that
freeze or inject in ``Callback.setup`` find its parameters, and the weights are there before a strategy wraps them. Only
what ``__init__`` cannot know yet (the number of labels, where the data says it) waits for ``configure_model``, which
builds a model once and does nothing the second time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data.distributed import DistributedSampler
from torchmetrics import Metric

from lightning_peft.errors import ConfigError
from lightning_peft.models.optimizer import WarmupSchedule, build_optimizer
from lightning_peft.models.pretrained import (
    PINNED_SHA256,
    Dtype,
    check_sha256,
    load_model,
    load_tokenizer,
    model_config,
    resolve_name,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["PretrainedModule"]

# Functions cannot be saved in a checkpoint; `load_from_checkpoint(..., optimizer=...)` takes them anew.
NOT_SAVED = ("optimizer", "lr_scheduler")


class PretrainedModule(LightningModule):
    """Base of the ready modules; a subclass names its transformers class, its loss and its metrics.

    Raises:
        ConfigError: Both or none of ``model_name_or_path`` and ``config``, or an option that could have no effect.
        BaseMismatch: The weights file does not have the expected sha256.
    """

    model: PreTrainedModel
    auto_class_name: str  # the name of the class in transformers that builds the model
    main_metric: str = "loss"  # shown in the progress bar during validation
    has_new_head: bool = False  # whether weights missing from the checkpoint are expected

    def __init__(
        self,
        *,
        model_name_or_path: str | None,
        config: dict[str, Any] | str | None,
        tokenizer_name_or_path: str | None,
        dtype: Dtype,
        attn_implementation: str | None,
        gradient_checkpointing: bool,
        revision: str | None,
        trust_remote_code: bool,
        expected_sha256: str | None,
        optimizer: Callable[[Any], Optimizer],
        lr_scheduler: Callable[[Optimizer], Any] | None,
        lr_scheduler_interval: str,
        weight_decay: float | None,
        no_decay: Sequence[str],
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if (model_name_or_path is None) == (config is None):
            given = "both" if config is not None else "none"
            raise ConfigError(
                f"{name}: give either model_name_or_path (pretrained weights) or config (random weights); "
                f"{given} of them given."
            )
        if config is not None and expected_sha256 is not None:
            raise ConfigError(f"{name}: expected_sha256 has no effect with config, which reads no weights.")
        if isinstance(config, dict) and revision is not None and tokenizer_name_or_path is None:
            raise ConfigError(f"{name}: revision={revision!r} has no effect with a config given as values.")
        self._name = model_name_or_path
        self._config = config
        self._tokenizer_name = tokenizer_name_or_path
        self._source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        self._load: dict[str, Any] = {
            "dtype": dtype,
            "attn_implementation": attn_implementation,
            "gradient_checkpointing": gradient_checkpointing,
        }
        self._expected_sha256 = expected_sha256
        self._optimizer = optimizer
        self._lr_scheduler = lr_scheduler
        self._lr_scheduler_interval = lr_scheduler_interval
        self._weight_decay = weight_decay
        self._no_decay = tuple(no_decay)
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._sets: list[tuple[str, dict[str, Metric]]] = []

    # ---------------------------------------------------------------- model and tokenizer

    @property
    def is_built(self) -> bool:
        """Whether the model exists yet."""
        return "model" in self._modules

    def build_model(self, **config_overrides: Any) -> None:
        """Check the weights, load them (or draw them at random), and set ``self.model``."""
        import transformers

        name = None
        if self._name is not None:
            name = resolve_name(self._name)
            expected = self._expected_sha256 or PINNED_SHA256.get(self._name.rstrip("/"))
            if expected is not None:
                check_sha256(name, expected, self._source["revision"])
        config = model_config(name, self._config, overrides=config_overrides, **self._source)
        auto_class = getattr(transformers, self.auto_class(config))
        self.model = load_model(
            auto_class,
            name,
            config,
            new_head=self.has_new_head,
            model_kwargs=self.model_kwargs(auto_class, config),
            **self._load,
            **self._source,
        )

    def auto_class(self, config: Any) -> str:
        """Return the name of the transformers class that builds this architecture."""
        return self.auto_class_name

    def model_kwargs(self, auto_class: Any, config: Any) -> dict[str, Any]:
        """Return further keyword arguments for the architecture's class."""
        return {}

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, loaded on first use; it always has a pad token.

        Raises:
            ConfigError: There is none, or it has more tokens than the model has embeddings.
        """
        if self._tokenizer is None:
            place = self._tokenizer_name or self._name or (self._config if isinstance(self._config, str) else None)
            if place is None:
                raise ConfigError(
                    f"{type(self).__name__}: a config given as values has no tokenizer; give tokenizer_name_or_path."
                )
            tokenizer = load_tokenizer(place, **self._source)
            rows = getattr(self.model.get_input_embeddings(), "num_embeddings", None) if self.is_built else None
            if rows is not None and len(tokenizer) > rows:
                raise ConfigError(
                    f"The tokenizer at {place!r} has {len(tokenizer)} tokens and the model only {rows} embeddings; "
                    f"set vocab_size={len(tokenizer)} in the config, or give the tokenizer that belongs to the model."
                )
            self._tokenizer = tokenizer
        return self._tokenizer

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model and tokenizer as a Hugging Face folder, which ``model_name_or_path`` takes again."""
        self.model.save_pretrained(str(folder))
        self.tokenizer.save_pretrained(str(folder))

    # ---------------------------------------------------------------- optimizer

    def configure_optimizers(self) -> Any:
        """Return the optimizer over every parameter with ``requires_grad``, and its schedule."""
        optimizer = build_optimizer(self, self._optimizer, weight_decay=self._weight_decay, no_decay=self._no_decay)
        if self._lr_scheduler is None:
            return optimizer
        scheduler = self._lr_scheduler(optimizer)
        if isinstance(scheduler, WarmupSchedule) and scheduler.needs_total_steps:
            steps = self.trainer.estimated_stepping_batches
            if steps == float("inf"):
                raise ConfigError(
                    "WarmupSchedule needs to know how many steps the run has: set trainer.max_steps or "
                    "trainer.max_epochs, or total_steps of the schedule."
                )
            scheduler.set_total_steps(int(steps))
        chosen: dict[str, Any] = {"scheduler": scheduler, "interval": self._lr_scheduler_interval}
        monitor = getattr(scheduler, "monitor", None)
        if monitor is not None:
            chosen |= {"monitor": monitor, "interval": "epoch"}
        return {"optimizer": optimizer, "lr_scheduler": chosen}

    # ---------------------------------------------------------------- evaluation over named sets

    def make_metrics(self) -> dict[str, Metric]:
        """Return new metrics for one evaluation set."""
        raise NotImplementedError

    def evaluate(self, batch: Any, metrics: dict[str, Metric], is_real: Tensor) -> None:
        """Update ``metrics`` with the rows of ``batch`` for which ``is_real`` (B, bool) holds."""
        raise NotImplementedError

    def on_validation_epoch_start(self) -> None:
        """Begin with new metrics for each validation set."""
        self._start_evaluation("val")

    def on_test_epoch_start(self) -> None:
        """Begin with new metrics for each test set."""
        self._start_evaluation("test")

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to its validation set's metrics."""
        self._evaluate("val", batch, batch_idx, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to its test set's metrics."""
        self._evaluate("test", batch, batch_idx, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of each validation set."""
        self._end_evaluation()

    def on_test_epoch_end(self) -> None:
        """Log the metrics of each test set."""
        self._end_evaluation()

    def _start_evaluation(self, stage: str) -> None:
        num_sets = len(self._loaders(stage))
        names = getattr(getattr(self.trainer, "datamodule", None), f"{stage}_names", None)
        if names is None:
            prefixes = [stage] if num_sets == 1 else [f"{stage}/set{index}" for index in range(num_sets)]
        elif len(names) != num_sets:
            raise ConfigError(f"The data names {len(names)} {stage} sets ({', '.join(names)}) but loads {num_sets}.")
        else:
            prefixes = [f"{stage}/{name}" for name in names]
        self._sets = [
            (prefix, {name: metric.to(self.device) for name, metric in self.make_metrics().items()})
            for prefix in prefixes
        ]

    def _evaluate(self, stage: str, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        loader = self._loaders(stage)[dataloader_idx]
        num_rows = _num_rows(batch)
        is_real = _is_real(loader, batch_idx, num_rows).to(self.device)
        self.evaluate(batch, self._sets[dataloader_idx][1], is_real)

    def _end_evaluation(self) -> None:
        for prefix, metrics in self._sets:
            values: dict[str, Tensor] = {}
            for name, metric in metrics.items():
                result = metric.compute()  # gathers over processes
                values |= result if isinstance(result, dict) else {name: result}
            for name, value in values.items():
                self.log(
                    f"{prefix}/{name}", value.float(), prog_bar=name == self.main_metric, batch_size=1, sync_dist=True
                )
        self._sets = []

    def _loaders(self, stage: str) -> list[Any]:
        loaders = self.trainer.val_dataloaders if stage == "val" else self.trainer.test_dataloaders
        return CombinedLoader(loaders, "sequential").flattened


def _num_rows(batch: Any) -> int:
    """Return the number of rows of a batch: the length of the first tensor in it."""
    while isinstance(batch, dict):
        batch = next(iter(batch.values()))
    return len(batch)


def _is_real(loader: Any, batch_idx: int, num_rows: int) -> Tensor:
    """Return which rows of a batch are no repeats (B, bool): a distributed sampler fills its last round with repeats.

    Of rank ``r`` of ``n``, sample ``p`` is the ``p * n + r``-th of the epoch's order, and repeats start after the last.
    """
    sampler: Any = getattr(getattr(loader, "batch_sampler", None), "sampler", None) or getattr(loader, "sampler", None)
    real = torch.ones(num_rows, dtype=torch.bool)
    if not isinstance(sampler, DistributedSampler) or not getattr(loader, "batch_size", None):
        return real
    shard = getattr(sampler, "shard", None)
    rank, num_replicas = shard() if shard is not None else (sampler.rank, sampler.num_replicas)
    position = torch.arange(num_rows) + batch_idx * loader.batch_size
    return position * num_replicas + rank < len(sampler.dataset)  # pyright: ignore[reportArgumentType]
