"""Batches to score on, taken beside the loaders: their order and position stay what they are."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data import DataLoader, IterableDataset

from lightning_peft.errors import ConfigError

__all__ = ["sample_batches"]


def sample_batches(trainer: Trainer, loaders: Any, num_batches: int, generator: torch.Generator) -> list[Any]:
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

    Raises:
        ConfigError: If there are no loaders, or a loader is not over a data set with a length.
    """
    if isinstance(loaders, CombinedLoader):
        loaders = loaders.iterables
    leaves, spec = tree_flatten(loaders)
    drawn = [_sample(loader, num_batches, trainer.global_rank, trainer.world_size, generator) for loader in leaves]
    together = [tree_unflatten(list(parts), spec) for parts in zip(*drawn, strict=False)]
    return [_to_device(trainer, batch) for batch in together]


def _sample(loader: Any, num_batches: int, rank: int, world_size: int, generator: torch.Generator) -> list[Any]:
    dataset = getattr(loader, "dataset", None)
    if not isinstance(loader, DataLoader) or isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise ConfigError(
            f"Scoring draws samples by index; it needs a DataLoader over a data set with a length, not a "
            f"{type(loader).__name__} over a {type(dataset).__name__}."
        )
    data: Any = dataset
    batched = loader.batch_size is not None or loader.batch_sampler is not None
    size = (loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 1) if batched else 1
    order = torch.randperm(len(data), generator=generator).tolist()
    batches = []
    for index in range(min(num_batches, -(-len(order) // (size * world_size)))):
        first = (index * world_size + rank) * size
        last = first + size if world_size > 1 else min(first + size, len(order))
        samples = [data[order[position % len(order)]] for position in range(first, last)]
        batches.append(loader.collate_fn(samples if batched else samples[0]))
    return batches


def _to_device(trainer: Trainer, batch: Any) -> Any:
    """What Lightning's loops do to a batch before ``training_step`` sees it."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)
