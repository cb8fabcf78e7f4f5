"""Texts, or pairs of texts, with a class label."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from lightning_peft.data.base import SourceDataModule
from lightning_peft.data.sources import Record
from lightning_peft.errors import ConfigError, suggest

__all__ = ["LabelledText", "sort_labels"]


def sort_labels(labels: Sequence[Any]) -> list[str]:
    """Return the different labels as text, sorted; by value if all are whole numbers.

    Example:
        >>> sort_labels(["10", "9", "9"]), sort_labels(["neg", "pos", 1])
        (['9', '10'], ['1', 'neg', 'pos'])
    """
    names = {str(label) for label in labels}
    if all(name.removeprefix("-").isdecimal() for name in names):
        return sorted(names, key=int)
    return sorted(names)


class LabelledText(SourceDataModule):
    """CSV or JSONL of texts and labels for classification.

    Batches hold ``input_ids`` and ``attention_mask`` ``(batch, longest)`` and ``labels`` ``(batch,)``, the position of
    the label in ``label_names``: the labels of the training data, sorted. With two texts, ``token_type_ids`` too, if
    the tokenizer has them.

    Args:
        train_path: File, folder or glob of .jsonl, .json, .csv or .tsv, or several.
        val_path: The same for validation; None splits off ``val_fraction`` of the training records.
        test_path: The same for ``test`` and ``predict``.
        val_fraction: Share of the training records to validate on, in [0, 1).
        text_column: Name of the text.
        label_column: Name of the label; text, numbers and booleans will do.
        text_pair_column: Name of a second text, for tasks on two; None: there is one text.
        max_length: Tokens per example at most; longer texts lose their end.
        batch_size: Examples per batch and process.
        tokenizer_name_or_path: Hugging Face id or folder; None takes ``tokenizer`` of the LightningModule.
        dataset: Hugging Face data set in place of paths: hub name or folder.
        dataset_config: Its configuration, if it has several.
        train_split: Its split to train on.
        val_split: Its split to validate on; None splits off ``val_fraction``.
        test_split: Its split for ``test`` and ``predict``.
        num_workers: Worker processes per loader; 0 loads in the training process, enough for tokenised text.
        seed: Of the order of the batches, and of what is split off for validation.

    Raises:
        ConfigError: If a path, column or tokenizer is missing, there are fewer than two labels, or one that the
            training data does not have.
    """

    def __init__(
        self,
        train_path: str | list[str] | None = None,
        val_path: str | list[str] | None = None,
        test_path: str | list[str] | None = None,
        val_fraction: float = 0.1,
        text_column: str = "text",
        label_column: str = "label",
        text_pair_column: str | None = None,
        max_length: int = 256,
        batch_size: int = 32,
        tokenizer_name_or_path: str | None = None,
        dataset: str | None = None,
        dataset_config: str | None = None,
        train_split: str = "train",
        val_split: str | None = None,
        test_split: str | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            train_path=train_path,
            val_path=val_path,
            test_path=test_path,
            val_fraction=val_fraction,
            batch_size=batch_size,
            tokenizer_name_or_path=tokenizer_name_or_path,
            dataset=dataset,
            dataset_config=dataset_config,
            train_split=train_split,
            val_split=val_split,
            test_split=test_split,
            num_workers=num_workers,
            seed=seed,
        )
        if not self.has("train"):
            raise ConfigError("LabelledText reads the names of the labels from the training data: give train_path")
        self.text_column = text_column
        self.label_column = label_column
        self.text_pair_column = text_pair_column
        self.max_length = max_length

    @cached_property
    def label_names(self) -> list[str]:
        """The labels of the training data as text, in the order of their numbers."""
        names = sort_labels([record[self.label_column] for record in self.records("train")])
        if len(names) < 2:
            raise ConfigError(f"LabelledText: column {self.label_column!r} has {len(names)} labels, 2 are needed")
        return names

    @property
    def num_labels(self) -> int:
        """Number of different labels in the training data."""
        return len(self.label_names)

    def tokenise(self, records: Sequence[Record]) -> Sequence[Any]:
        """Return token ids and label number of each record."""
        if not records:
            return []
        numbers = {name: number for number, name in enumerate(self.label_names)}
        labels = []
        for record in records:
            name = str(record[self.label_column])
            if name not in numbers:
                raise ConfigError(
                    f"{record.place}: label {name!r} is not in the training data. {suggest(name, self.label_names)}"
                )
            labels.append(numbers[name])
        texts = [[record.text(self.text_column) for record in records]]
        if self.text_pair_column is not None:
            texts.append([record.text(self.text_pair_column) for record in records])
        tokenizer: Any = self.tokenizer
        encoded = tokenizer(*texts, truncation=True, max_length=self.max_length, return_attention_mask=False)
        names = ["input_ids"]
        if self.text_pair_column is not None and "token_type_ids" in encoded:
            names.append("token_type_ids")
        return [
            {**{name: encoded[name][index] for name in names}, "labels": label} for index, label in enumerate(labels)
        ]
