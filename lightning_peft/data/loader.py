"""A training data loader that resumes in the middle of an epoch with exactly the batches that were still to come.

The order of an epoch is a pure function of (seed, epoch), drawn with a generator of its own; the position is the number
of batches handed to the training loop, whatever the workers have prefetched. Together they say which batch comes next.

What Lightning's loops ask for, and what follows here:

* ``Trainer.fit`` calls ``iter(loader)`` while it sets up, before it says which epoch comes (``set_epoch``) and, if a
  hook asked for ``trainer.estimated_stepping_batches``, before it has read the checkpoint. So ``iter`` starts nothing:
  workers and order come with the first batch.
* A state is loaded only into a loop that Lightning calls *restarting*, and it may be the state of an epoch that was
  just finished. So a state counts for the epoch it names, and any other epoch starts at its first batch.
* A run with ``max_steps`` that resumes from a checkpoint of ``on_train_epoch_end`` goes through the finished epoch once
  more: without a batch if there is validation, with one batch too many if there is none. The loader refuses that batch
  and goes by the order the batches are due in: after epoch ``k`` comes ``k + 1``, whatever Lightning's number is.
* A run that ``max_steps`` ended inside an epoch, resumed with a larger ``max_steps``, goes on inside that epoch,
  although Lightning announces the next one.
* ``iter`` of a plain ``DataLoader`` draws from torch's global generator, hence one more validation run changes the
  dropout masks of the training that follows. A loader of this file never touches the global generator.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from lightning_peft.errors import ConfigError, ResumeMismatch

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = ["EpochSampler", "ResumableDataLoader", "attach_trainer", "epoch_order"]


def epoch_order(num_samples: int, epoch: int, seed: int) -> list[int]:
    """Return the shuffled indices ``0 .. num_samples - 1`` of one epoch, a pure function of its arguments.

    Example:
        >>> epoch_order(5, epoch=0, seed=0) == epoch_order(5, epoch=0, seed=0)
        True
        >>> sorted(epoch_order(5, epoch=1, seed=0))
        [0, 1, 2, 3, 4]
    """
    generator = torch.Generator().manual_seed(_mix(seed, epoch))
    return torch.randperm(num_samples, generator=generator).tolist()


def _mix(seed: int, epoch: int) -> int:
    """Spread (seed, epoch) over 63 bits, so that seed 1, epoch 0 is not seed 0, epoch 1."""
    mixed = (seed * 0x9E3779B97F4A7C15 + epoch * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    mixed = ((mixed ^ (mixed >> 31)) * 0xD6E8FEB86659FD93) & 0xFFFFFFFFFFFFFFFF
    return (mixed ^ (mixed >> 32)) >> 1


class EpochSampler(DistributedSampler):
    """Indices of one rank for one epoch, from any position on.

    Every rank computes the same order and takes each ``num_replicas``-th index of it. All ranks get the same number:
    the order wraps around to fill the last round, or is cut there with ``drop_last``. It is a
    ``DistributedSampler``, so Lightning does not put one of its own in its place.

    Args:
        dataset: A dataset with a length.
        shuffle: Draw a new order in each epoch; otherwise the order of the dataset.
        seed: Seed of the order; the same on all ranks.
        drop_last: Leave out up to ``num_replicas - 1`` samples at the end instead of repeating some.
        num_replicas: Number of ranks; ``None`` asks ``torch.distributed`` when the sampler is used.
        rank: This process; ``None`` asks ``torch.distributed`` when the sampler is used.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        # The base class would ask torch.distributed now, which may be too early; `shard` asks when it is needed.
        super().__init__(dataset, num_replicas=1, rank=0, shuffle=shuffle, seed=seed, drop_last=drop_last)
        self._num_replicas = num_replicas
        self._rank = rank
        self._start: tuple[int, int] | None = None

    def shard(self) -> tuple[int, int]:
        """Return this process' rank and the number of ranks."""
        running = dist.is_available() and dist.is_initialized()
        num_replicas = self._num_replicas or (dist.get_world_size() if running else 1)
        rank = self._rank if self._rank is not None else (dist.get_rank() if running else 0)
        return rank, num_replicas

    def start_at(self, epoch: int, first_sample: int) -> None:
        """Let the next ``iter``, and only that one, give this epoch from this sample of the rank on."""
        self._start = epoch, first_sample

    def __iter__(self) -> Iterator[int]:
        (epoch, first), self._start = self._start or (self.epoch, 0), None
        num_samples = len(self.dataset)  # pyright: ignore[reportArgumentType]
        order = epoch_order(num_samples, epoch, self.seed) if self.shuffle else list(range(num_samples))
        rank, num_replicas = self.shard()
        total = len(self) * num_replicas
        shard = [order[position % num_samples] for position in range(rank, total, num_replicas)]
        return iter(shard[first:])

    def __len__(self) -> int:
        num_samples = len(self.dataset)  # pyright: ignore[reportArgumentType]
        _, num_replicas = self.shard()
        return num_samples // num_replicas if self.drop_last else -(-num_samples // num_replicas)


class ResumableDataLoader(DataLoader):
    """A ``DataLoader`` whose state is its position: epoch and number of batches handed out.

    ``Trainer.fit(ckpt_path=...)`` then trains on exactly the batches that an uninterrupted run would have seen, with
    workers, accumulation and several processes. Skipping to the position costs no data loading. What workers draw at
    random inside ``dataset[i]`` is seeded by (seed, epoch) and not replayed inside an epoch: derive it from ``i``.

    A loader that knows its ``trainer`` is exact wherever the checkpoint was written. Without it, three kinds of
    checkpoints are not met: those written between the hand-over of a batch and its optimizer step (after an exception,
    say) skip that batch; those of ``on_train_epoch_end`` in a run with ``max_steps`` and no validation; and any, if
    ``trainer.estimated_stepping_batches`` is read before the fit, because Lightning then never loads a loader's state.
    The datamodules and the method callbacks of this package make the trainer known (:func:`attach_trainer`).

    A loader follows one iteration at a time. To look at training data aside from training, ask the datamodule for
    another ``train_dataloader()``.

    The number of processes may change on resume if ``batch_size`` changes so that the global batch has as many samples:
    each step then sees the same ones (but for the samples repeated to fill an epoch's last round).

    Each process loads ``batch_size`` samples of its own shard. With a ``sampler`` or ``batch_sampler`` of your own,
    this class keeps the position only: the order is as reproducible as theirs, and resuming reads and drops the
    batches that were already seen.

    Args:
        dataset: A map-style dataset.
        batch_size: Samples per batch and process, 1 or more.
        shuffle: Draw a new order in each epoch.
        seed: Seed of the order and of the workers.
        drop_last: Leave out an incomplete last batch.
        trainer: The Trainer that will train on it, if it is at hand; see below.
        **kwargs: Everything else a ``torch.utils.data.DataLoader`` takes.

    Raises:
        ConfigError: If the dataset has no length or is empty.
        ResumeMismatch: From ``load_state_dict``, if the state was saved under another seed, batch size, number of
            samples or number of processes.

    Example:
        >>> loader = ResumableDataLoader(range(6), batch_size=2, seed=1)
        >>> batches = iter(loader)
        >>> first, second = next(batches).tolist(), next(batches).tolist()
        >>> again = ResumableDataLoader(range(6), batch_size=2, seed=1)
        >>> again.load_state_dict(loader.state_dict())
        >>> sorted(first + second + [i for batch in again for i in batch.tolist()])
        [0, 1, 2, 3, 4, 5]
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int | None = 1,
        shuffle: bool = True,
        *,
        seed: int = 0,
        drop_last: bool = False,
        trainer: Trainer | None = None,
        **kwargs: Any,
    ) -> None:
        if not hasattr(dataset, "__len__"):
            raise ConfigError(
                f"ResumableDataLoader needs a dataset with a length, and {type(dataset).__name__} has none; "
                "a stream has no position to return to"
            )
        if len(dataset) == 0:
            raise ConfigError("ResumableDataLoader was given an empty dataset")
        own_order = kwargs.get("sampler") is None and kwargs.get("batch_sampler") is None
        if own_order:
            kwargs["sampler"] = EpochSampler(dataset, shuffle=shuffle, seed=seed, drop_last=drop_last)
        kwargs.setdefault("generator", torch.Generator())
        self.seed = seed
        self.trainer = trainer
        self._pending: dict[str, int] | None = None
        self._epoch = 0  # of the batches handed out last
        self._announced = 0  # what `set_epoch` had said by then
        self._batches = 0  # handed out in that epoch
        super().__init__(dataset, batch_size=batch_size, shuffle=False, drop_last=drop_last, **kwargs)

    @property
    def epoch(self) -> int:
        """Epoch of the next order: what ``set_epoch`` said last."""
        source = self.sampler if self.batch_sampler is None else getattr(self.batch_sampler, "sampler", self.sampler)
        return int(getattr(source, "epoch", 0))

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next ``iter``; Lightning does so by itself."""
        for source in (self.sampler, self.batch_sampler, getattr(self.batch_sampler, "sampler", None)):
            if hasattr(source, "set_epoch"):
                source.set_epoch(epoch)  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]

    def __iter__(self) -> Any:
        return _Batches(self)

    def _training_loop(self) -> Any:
        """Return the fit loop that trains on this loader, or None."""
        loop = self.trainer.fit_loop if self.trainer is not None else None
        combined = loop._combined_loader if loop is not None else None
        return loop if combined is not None and any(loader is self for loader in combined.flattened) else None

    def _start(self) -> Iterator[Any]:
        """Begin the epoch that is due where it is due and return the batches that remain."""
        announced = self.epoch
        inside = False
        if (loop := self._training_loop()) is not None:
            inside = loop.epoch_loop.batch_progress.current.ready > 0  # of an epoch, whatever its number is called
            if loop.epoch_loop.batch_progress.current.ready >= loop.max_batches:
                raise StopIteration  # the loop is still in an epoch that was finished before the checkpoint
            loop._load_combined_loader_states()  # does nothing unless Lightning forgot it
            for loader in loop._combined_loader.flattened:
                if isinstance(loader, ResumableDataLoader):
                    loader.set_epoch(announced)
        if self._pending is None:
            self._epoch, self._batches = announced - self._announced + self._epoch, 0
        else:
            pending, self._pending = self._pending, None
            self._epoch, self._batches = pending["epoch"], pending["batches"]
            if self._batches > 0 and announced != pending["announced"] and not inside:
                self._epoch, self._batches = self._epoch + 1, 0
            if not isinstance(self.sampler, EpochSampler) and self._batches >= len(self):
                self._batches = 0  # a foreign sampler may not know its epoch; the saved one was over
        self._announced = announced
        if isinstance(self.generator, torch.Generator):
            self.generator.manual_seed(_mix(self.seed, self._epoch))  # seeds the workers
        if isinstance(self.sampler, EpochSampler):
            self.sampler.start_at(self._epoch, self._batches * (self.batch_size or 1))
            return super().__iter__()
        batches = super().__iter__()
        for _ in range(self._batches):
            next(batches, None)
        return batches

    def _fingerprint(self) -> dict[str, int]:
        num_replicas = self.sampler.shard()[1] if isinstance(self.sampler, EpochSampler) else 1
        return {
            "seed": self.seed,
            "shuffle": int(getattr(self.sampler, "shuffle", False)),
            "num_samples": len(self.dataset),  # pyright: ignore[reportArgumentType]
            "batch_size": self.batch_size or 1,
            "num_replicas": num_replicas,
        }

    def state_dict(self) -> dict[str, int]:
        """Return epoch, number of batches of it that are done, and what the order depends on."""
        if self._pending is not None:
            position = self._pending
        elif self.epoch != self._announced:  # the next epoch was announced, and none of its batches was asked for
            position = {"epoch": self._epoch + self.epoch - self._announced, "batches": 0, "announced": self.epoch}
        else:
            batches = self._batches
            if (loop := self._training_loop()) is not None:
                progress = loop.epoch_loop.batch_progress.current
                batches -= progress.ready - progress.processed  # handed out, not yet trained on
            position = {"epoch": self._epoch, "batches": max(0, batches), "announced": self._announced}
        return {**position, **self._fingerprint()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go to a saved position with the next ``iter``, or with the first batch if ``iter`` was already called."""
        fingerprint = self._fingerprint()
        then = {name: state_dict.get(name, value) for name, value in fingerprint.items()}
        sizes = ("batch_size", "num_replicas")
        together = fingerprint["batch_size"] * fingerprint["num_replicas"]
        if isinstance(self.sampler, EpochSampler) and then["batch_size"] * then["num_replicas"] == together:
            then.update({name: fingerprint[name] for name in sizes})  # the same samples in each global batch
        changed = [
            f"{name} was {then[name]} and is {value}" for name, value in fingerprint.items() if then[name] != value
        ]
        if changed:
            raise ResumeMismatch(
                "the checkpoint's position in the training data belongs to another order of batches: "
                + ", ".join(changed)
                + ". Resume with the settings of the first run (another number of processes needs a batch_size that "
                "gives as many samples in all), or start a new run from the checkpoint's weights"
            )
        self._pending = {name: int(state_dict[name]) for name in ("epoch", "batches", "announced")}
        self.set_epoch(self._pending["announced"])


class _Batches(Iterator[Any]):
    """The batches of one epoch, begun with the first ``next``; counts what it hands out."""

    def __init__(self, loader: ResumableDataLoader) -> None:
        self.loader = loader
        self._batches: Iterator[Any] | None = None

    def __next__(self) -> Any:
        if self._batches is None:
            self._batches = self.loader._start()
        batch = next(self._batches)
        self.loader._batches += 1
        return batch


def attach_trainer(trainer: Trainer) -> None:
    """Make the trainer known to its training loaders; to be called by a callback, not later than ``on_train_start``."""
    combined = trainer.fit_loop._combined_loader
    for loader in combined.flattened if combined is not None else ():
        if isinstance(loader, ResumableDataLoader):
            loader.trainer = trainer
