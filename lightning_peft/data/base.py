"""What the datamodules share: sources, the split, the tokenizer, padding, and loaders that resume exactly."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from lightning_peft.data.loader import ResumableDataLoader, epoch_order
from lightning_peft.data.sources import RECORD_SUFFIXES, Record, find_files, read_hub, read_records
from lightning_peft.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["IGNORED", "PadBatch", "SourceDataModule", "TokenisedDataModule", "split_off"]

IGNORED = -100  # label of a token that has no loss, as torch and transformers have it

Split = Literal["train", "val", "test"]


def split_off(num_examples: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Return the indices to keep and those to split off, both in their old order; a pure function.

    At least one example is split off if ``fraction`` is above 0, and at least one is kept.

    Example:
        >>> keep, off = split_off(10, 0.2, seed=0)
        >>> len(keep), len(off), sorted(keep + off) == list(range(10))
        (8, 2, True)
    """
    count = min(max(1, round(num_examples * fraction)), num_examples - 1) if fraction > 0 else 0
    off = sorted(epoch_order(num_examples, epoch=0, seed=seed)[:count])
    chosen = set(off)
    return [index for index in range(num_examples) if index not in chosen], off


class PadBatch:
    """Joins token lists to tensors, padded on the right to the longest of the batch.

    Every list becomes an int64 tensor ``(batch, longest)``, every number an entry of an int64 tensor ``(batch,)``;
    ``attention_mask`` is added, 1 on tokens and 0 on padding.

    Args:
        pad_token_id: Fills ``input_ids``; ``labels`` are filled with -100, all else with 0.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the batch of some examples; nested examples become nested batches."""
        first = examples[0]
        if isinstance(next(iter(first.values())), dict):
            return {name: self([example[name] for example in examples]) for name in first}
        lengths = torch.tensor([len(example["input_ids"]) for example in examples])
        longest = int(lengths.max())
        batch: dict[str, Tensor] = {}
        for name, value in first.items():
            if isinstance(value, int):
                batch[name] = torch.tensor([example[name] for example in examples])
                continue
            fill = {"input_ids": self.pad_token_id, "labels": IGNORED}.get(name, 0)
            batch[name] = torch.full((len(examples), longest), fill)
            for row, example in enumerate(examples):
                batch[name][row, : len(example[name])] = torch.as_tensor(example[name])
            if name == "input_ids":
                batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
        return batch


class TokenisedDataModule(LightningDataModule):
    """A LightningDataModule whose examples are tokenised once and then kept in memory.

    A subclass says which examples each split has (:meth:`make_examples`). The training loader resumes in the middle of
    an epoch (:class:`~lightning_peft.ResumableDataLoader`); ``predict`` runs over the test set.

    Args:
        tokenizer_name_or_path: Hugging Face id or folder; None takes ``tokenizer`` of the LightningModule.
        batch_size: Examples per batch and process.
        num_workers: Worker processes per loader; 0 loads in the training process, enough for tokenised text.
        seed: Of the order of the batches, and of what is split off for validation.
    """

    def __init__(self, *, tokenizer_name_or_path: str | None, batch_size: int, num_workers: int, seed: int) -> None:
        super().__init__()
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}, at least 1 is needed")
        if num_workers < 0:
            raise ConfigError(f"num_workers is {num_workers}, at least 0 is needed")
        self.tokenizer_name_or_path = tokenizer_name_or_path
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.drop_last = False
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._examples: dict[str, Sequence[Any]] = {}

    @abstractmethod
    def make_examples(self, split: Split) -> dict[str, Sequence[Any]]:
        """Return the examples of a split by name, and of any other that was made on the way."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer: the one asked for, otherwise the model's.

        Raises:
            ConfigError: If there is neither.
        """
        if self.tokenizer_name_or_path is not None:
            if self._tokenizer is None:
                from lightning_peft.models.pretrained import load_tokenizer

                self._tokenizer = load_tokenizer(self.tokenizer_name_or_path)
            return self._tokenizer
        module = self.trainer.lightning_module if self.trainer is not None else None
        tokenizer = getattr(module, "tokenizer", None)
        if tokenizer is None:
            whose = "there is no model to take it from" if module is None else f"{type(module).__name__} has none"
            raise ConfigError(
                f"{type(self).__name__} has no tokenizer: tokenizer_name_or_path is not given, and {whose}. "
                "Give tokenizer_name_or_path, or a LightningModule with an attribute 'tokenizer'"
            )
        if tokenizer is not self._tokenizer:  # another model: other tokens
            self._examples.clear()
            self._tokenizer = tokenizer
        return tokenizer

    def examples(self, split: str) -> Sequence[Any]:
        """Return the tokenised examples of a split, made on first use."""
        _ = self.tokenizer
        if split not in self._examples:
            self._examples.update(self.make_examples(split))  # pyright: ignore[reportArgumentType]
        return self._examples[split]

    def setup(self, stage: str) -> None:
        """Read and tokenise what a stage needs, unless an earlier stage did."""
        splits = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("test",)}[stage]
        for split in splits:
            examples = self.examples(split)
            if not examples and split != "val":
                raise ConfigError(f"{type(self).__name__}: the {split} set is empty")
            if not examples and stage == "validate":
                raise ConfigError(f"{type(self).__name__}: nothing to validate on; {self._no_validation}")

    _no_validation = "set val_fraction above 0"

    def collator(self) -> Callable[[Sequence[Any]], Any]:
        """Return what joins examples to a batch."""
        tokenizer = self.tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        return PadBatch(pad if isinstance(pad, int) else 0)

    def loader(self, examples: Sequence[Any], *, train: bool = False) -> ResumableDataLoader:
        """Return a new loader over examples: shuffled and resumable for training, in order otherwise."""
        return ResumableDataLoader(
            examples,
            batch_size=self.batch_size,
            shuffle=train,
            seed=self.seed,
            drop_last=train and self.drop_last and len(examples) >= self.batch_size,
            trainer=self.trainer if train else None,
            num_workers=self.num_workers,
            collate_fn=self.collator(),
        )

    def train_dataloader(self) -> ResumableDataLoader:
        """Return a loader over the training examples, in a new order in each epoch."""
        return self.loader(self.examples("train"), train=True)

    def val_dataloader(self) -> Any:
        """Return a loader over the validation examples, or an empty list if there are none."""
        examples = self.examples("val")
        return self.loader(examples) if examples else []

    def test_dataloader(self) -> Any:
        """Return a loader over the test examples."""
        return self.loader(self.examples("test"))

    def predict_dataloader(self) -> Any:
        """Return a loader over the test examples."""
        return self.test_dataloader()


class SourceDataModule(TokenisedDataModule):
    """A datamodule that reads the user's own records, from files or from Hugging Face ``datasets``.

    Args:
        train_path: File, folder or glob of the training data, or several.
        val_path: The same for validation; None splits off ``val_fraction`` of the training data.
        test_path: The same for ``test`` and ``predict``.
        val_fraction: Share of the training data to validate on, in [0, 1).
        dataset: Hugging Face data set in place of paths: hub name or folder.
        dataset_config: Its configuration, if it has several.
        train_split: Its split to train on.
        val_split: Its split to validate on; None splits off ``val_fraction``.
        test_split: Its split for ``test`` and ``predict``.
        **kwargs: As in :class:`TokenisedDataModule`.
    """

    suffixes = RECORD_SUFFIXES

    def __init__(
        self,
        *,
        train_path: str | list[str] | None,
        val_path: str | list[str] | None,
        test_path: str | list[str] | None,
        val_fraction: float,
        dataset: str | None,
        dataset_config: str | None,
        train_split: str,
        val_split: str | None,
        test_split: str | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        paths = {"train": train_path, "val": val_path, "test": test_path}
        name = type(self).__name__
        if not 0 <= val_fraction < 1:
            raise ConfigError(f"{name}: val_fraction is {val_fraction}, it must be in [0, 1)")
        given = [f"{split}_path" for split, path in paths.items() if path is not None]
        if dataset is not None and given:
            raise ConfigError(f"{name}: give either dataset or {' and '.join(given)}, not both")
        if dataset is None and not given:
            raise ConfigError(f"{name} has no data: give train_path (file, folder or glob) or dataset")
        self.paths = paths
        self.dataset = dataset
        self.dataset_config = dataset_config
        self.splits = {"train": train_split, "val": val_split, "test": test_split}
        self.val_fraction = val_fraction

    _no_validation = "set val_path, val_split or val_fraction"

    def has(self, split: str) -> bool:
        """Return whether a split has a source of its own."""
        return (self.splits if self.dataset is not None else self.paths)[split] is not None

    def records(self, split: str) -> Iterator[Record]:
        """Yield the records of a split that has a source of its own.

        Raises:
            ConfigError: If it has none, or the source is missing or broken.
        """
        if not self.has(split):
            what = f"{split}_split" if self.dataset is not None else f"{split}_path"
            raise ConfigError(f"{type(self).__name__}: no {split} data; set {what}")
        if self.dataset is not None:
            yield from read_hub(self.dataset, self.dataset_config, self.splits[split] or "train")
        else:
            yield from self.read(find_files(self.paths[split] or "", self.suffixes, f"{split}_path"))

    def read(self, files: Any) -> Iterator[Record]:
        """Yield the records of files."""
        return read_records(files)

    @abstractmethod
    def tokenise(self, records: Sequence[Record]) -> Sequence[Any]:
        """Return the examples of some records."""

    def make_examples(self, split: Split) -> dict[str, Sequence[Any]]:
        """Tokenise a split; training and validation examples together if one is split off the other."""
        if split == "test" or self.has("val"):
            return {split: self.tokenise(list(self.records(split)))}
        everything = self.tokenise(list(self.records("train")))
        if not everything:
            return {"train": [], "val": []}
        keep, off = split_off(len(everything), self.val_fraction, self.seed)
        return {"train": [everything[index] for index in keep], "val": [everything[index] for index in off]}
