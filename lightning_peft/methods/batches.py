"""Batches to score on, taken beside the loaders: their order and position stay what they are."""

from __future__ import annotations

import random
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data import DataLoader, IterableDataset

from lightning_peft.errors import ConfigError

__all__ = ["DataSource", "sample_batches", "source_loaders"]

DataSource = Literal["val", "train"]
"""Which of the Trainer's loaders samples come from."""


def source_loaders(trainer: Trainer, source: DataSource, label: str) -> Any:
    """Return the loaders of ``source``, for :func:`sample_batches`; of several validation loaders the first.

    Args:
        trainer: The Trainer, in a fit.
        source: Which loaders.
        label: Who asks, for the error.

    Raises:
        ConfigError: If validation data are asked for and the fit has none.
    """
    if source == "train":
        return trainer.train_dataloader
    if trainer.val_dataloaders is None and trainer.enable_validation:
        # Lightning makes them when the first validation is near, which check_val_every_n_epoch puts off.
        trainer.validating = True
        try:
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
        finally:
            trainer.training = True
    loaders = trainer.val_dataloaders
    if isinstance(loaders, list):
        loaders = loaders[0] if loaders else None
    if loaders is None:
        raise ConfigError(
            f"{label}(score_on='val') needs held-out data, and this fit has no validation loader (or "
            "limit_val_batches=0). Give it one, or take score_on='train'."
        )
    return loaders


def sample_batches(
    trainer: Trainer,
    loaders: Any,
    num_batches: int,
    generator: torch.Generator,
    batch_size: int | None = None,
    same_on_all_ranks: bool = False,
) -> list[Any]:
    """Draw batches at random, without replacement, from the data sets of ``loaders``, and move them to the device.

    Loaders are not iterated: samples are read from their data sets by index and put together by their
    ``collate_fn``. Each rank gets its share of the same draw, so that together they see the samples that one process
    with the joined batch size would see. Call it inside :func:`~lightning_peft.methods.scoring.without_trace`: reading
    a sample may use the global random state.

    Args:
        trainer: The Trainer.
        loaders: ``trainer.train_dataloader`` or ``trainer.val_dataloaders``: one loader or a collection, which gives
            batches of the same form. Of a list of validation loaders pass the one wanted.
        num_batches: Batches wanted; fewer if the data set has fewer.
        generator: Source of the draw, the same on all ranks.
        batch_size: Samples in each batch, over all ranks together, at least 1; None: as many as the loader takes, on
            each rank.
        same_on_all_ranks: Each rank gets what a single process would get, instead of its share.

    Raises:
        ConfigError: If there are no loaders, or a loader is not over a data set with a length.
    """
    if isinstance(loaders, CombinedLoader):
        loaders = loaders.iterables
    leaves, spec = tree_flatten(loaders)
    ranks = (0, 1) if same_on_all_ranks else (trainer.global_rank, trainer.world_size)
    size = None if batch_size is None else -(-batch_size // ranks[1])
    drawn = [_sample(loader, num_batches, size, *ranks, generator) for loader in leaves]
    together = [tree_unflatten(list(parts), spec) for parts in zip(*drawn, strict=False)]
    return [_to_device(trainer, batch) for batch in together]


def _sample(
    loader: Any, num_batches: int, size: int | None, rank: int, world_size: int, generator: torch.Generator
) -> list[Any]:
    dataset = getattr(loader, "dataset", None)
    if not isinstance(loader, DataLoader) or isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise ConfigError(
            f"Scoring draws samples by index; it needs a DataLoader over a data set with a length, not a "
            f"{type(loader).__name__} over a {type(dataset).__name__}."
        )
    data: Any = dataset
    batched = loader.batch_size is not None or loader.batch_sampler is not None
    if not len(data):
        raise ConfigError(f"Scoring draws samples from a {type(dataset).__name__}, which is empty.")
    own = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 1
    each = (size or own) if batched else 1  # without batches, a sample of this data set is one
    seed = int(torch.randint(2**62, (), generator=generator))
    order = random.Random(seed).sample(range(len(data)), min(len(data), num_batches * each * world_size))
    batches = []
    for index in range(min(num_batches, -(-len(order) // (each * world_size)))):
        first = (index * world_size + rank) * each
        last = first + each if world_size > 1 else min(first + each, len(order))
        samples = [data[order[position % len(order)]] for position in range(first, last)]
        batches.append(loader.collate_fn(samples if batched else samples[0]))
    return batches


def _to_device(trainer: Trainer, batch: Any) -> Any:
    """What Lightning's loops do to a batch before ``training_step`` sees it."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)
