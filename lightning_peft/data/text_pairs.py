"""Pairs of texts that belong together, for contrastive training and retrieval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_peft.data.base import SourceDataModule
from lightning_peft.data.sources import Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TextPairs", "tokenise_pairs"]


def tokenise_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]], max_length: int
) -> list[dict[str, dict[str, list[int]]]]:
    """Return ``{"query": {"input_ids"}, "answer": {"input_ids"}}`` of each pair; longer texts lose their end."""
    if not pairs:
        return []
    queries, answers = zip(*pairs, strict=True)
    sides: Any = [
        tokenizer(list(side), truncation=True, max_length=max_length, return_attention_mask=False)["input_ids"]
        for side in (queries, answers)
    ]
    return [
        {"query": {"input_ids": query}, "answer": {"input_ids": answer}} for query, answer in zip(*sides, strict=True)
    ]


class TextPairs(SourceDataModule):
    """CSV or JSONL of two texts that belong together: question and answer, title and text, sentence and translation.

    Batches are ``{"query": {...}, "answer": {...}}``, each with ``input_ids`` and ``attention_mask``
    ``(batch, longest of its side)``. The other answers of a batch serve as wrong ones, so an incomplete last
    training batch is left out.

    Args:
        train_path: File, folder or glob of .jsonl, .json, .csv or .tsv, or several.
        val_path: The same for validation; None splits off ``val_fraction`` of the training pairs.
        test_path: The same for ``test`` and ``predict``.
        val_fraction: Share of the training pairs to validate on, in [0, 1).
        query_column: Name of the text that searches.
        answer_column: Name of the text to be found.
        max_length: Tokens per text at most; longer texts lose their end.
        batch_size: Pairs per batch and process; more make the training task harder and the gradient better.
        tokenizer_name_or_path: Hugging Face id or folder; None takes ``tokenizer`` of the LightningModule.
        dataset: Hugging Face data set in place of paths: hub name or folder.
        dataset_config: Its configuration, if it has several.
        train_split: Its split to train on.
        val_split: Its split to validate on; None splits off ``val_fraction``.
        test_split: Its split for ``test`` and ``predict``.
        num_workers: Worker processes per loader; 0 loads in the training process, enough for tokenised text.
        seed: Of the order of the batches, and of what is split off for validation.

    Raises:
        ConfigError: If a path, column or tokenizer is missing.
    """

    test_names = ("pairs",)

    def __init__(
        self,
        train_path: str | list[str] | None = None,
        val_path: str | list[str] | None = None,
        test_path: str | list[str] | None = None,
        val_fraction: float = 0.05,
        query_column: str = "query",
        answer_column: str = "answer",
        max_length: int = 128,
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
        self.drop_last = True
        self.query_column = query_column
        self.answer_column = answer_column
        self.max_length = max_length

    def tokenise(self, records: Sequence[Record]) -> Sequence[Any]:
        """Return the token ids of both texts of each record."""
        pairs = [(record.text(self.query_column), record.text(self.answer_column)) for record in records]
        return tokenise_pairs(self.tokenizer, pairs, self.max_length)
