"""Plain text files, joined and packed into blocks of equal length for causal language modelling."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from lightning_peft.data.base import SourceDataModule
from lightning_peft.data.sources import TEXT_SUFFIXES, Record, read_texts
from lightning_peft.errors import ConfigError

__all__ = ["TextFiles", "pack"]


def pack(documents: Sequence[Sequence[int]], block_size: int, eos_token_id: int) -> torch.Tensor:
    """Join documents, each followed by the end token, and cut them into blocks; an incomplete last block is left out.

    Returns:
        Tokens, int64 ``(blocks, block_size)``.

    Example:
        >>> pack([[1, 2], [3]], block_size=2, eos_token_id=9).tolist()
        [[1, 2], [9, 3]]
    """
    stream = torch.tensor([token for document in documents for token in (*document, eos_token_id)], dtype=torch.int64)
    blocks = len(stream) // block_size
    return stream[: blocks * block_size].view(blocks, block_size)


class TextFiles(SourceDataModule):
    """Plain text for causal language modelling: joined with the end token and packed into blocks without padding.

    Batches hold ``input_ids``, ``attention_mask`` and ``labels``, each ``(batch, block_size)``; the model shifts the
    labels. All tokens are kept in memory (8 bytes each). Validation blocks are drawn from all files, so a
    block's neighbour may be in training: give ``val_path`` for a held-out document.

    Args:
        train_path: File, folder or glob, or several; a folder gives its .txt, .md, .rst, .py and .tex files.
        val_path: The same for validation; None splits off ``val_fraction`` of the training blocks.
        test_path: The same for ``test`` and ``predict``.
        val_fraction: Share of the training blocks to validate on, in [0, 1).
        block_size: Tokens per example, 2 or more; memory and time per batch grow with it.
        batch_size: Blocks per batch and process.
        tokenizer_name_or_path: Hugging Face id or folder; None takes ``tokenizer`` of the LightningModule.
        dataset: Hugging Face data set in place of paths: hub name or folder.
        dataset_config: Its configuration, if it has several.
        train_split: Its split to train on.
        val_split: Its split to validate on; None splits off ``val_fraction``.
        test_split: Its split for ``test`` and ``predict``.
        text_column: Its column with the text.
        num_workers: Worker processes per loader; 0 loads in the training process, enough for tokenised text.
        seed: Of the order of the batches, and of what is split off for validation.

    Raises:
        ConfigError: If a path, column, tokenizer or end token is missing, or there is less text than one block.
    """

    suffixes = TEXT_SUFFIXES

    def __init__(
        self,
        train_path: str | list[str] | None = None,
        val_path: str | list[str] | None = None,
        test_path: str | list[str] | None = None,
        val_fraction: float = 0.05,
        block_size: int = 512,
        batch_size: int = 8,
        tokenizer_name_or_path: str | None = None,
        dataset: str | None = None,
        dataset_config: str | None = None,
        train_split: str = "train",
        val_split: str | None = None,
        test_split: str | None = None,
        text_column: str = "text",
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        if block_size < 2:
            raise ConfigError(f"TextFiles: block_size is {block_size}, at least 2 is needed")
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
        self.block_size = block_size
        self.text_column = text_column if dataset is not None else "text"

    def read(self, files: Any) -> Iterator[Record]:
        """Yield each file's text as one record."""
        return read_texts(files)

    def tokenise(self, records: Sequence[Record]) -> Sequence[Any]:
        """Return the blocks of the joined records."""
        tokenizer = self.tokenizer
        eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        if eos is None:
            raise ConfigError("TextFiles joins texts with the tokenizer's end token (eos or sep), and it has neither")
        texts = [record.text(self.text_column) for record in records]
        documents = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        blocks = pack(documents, self.block_size, int(eos))  # pyright: ignore[reportArgumentType]
        if not len(blocks):
            tokens = sum(map(len, documents)) + len(documents)
            raise ConfigError(
                f"TextFiles: {len(texts)} texts have {tokens} tokens, less than one block; "
                f"block_size is {self.block_size}"
            )
        return [{"input_ids": block, "labels": block} for block in blocks]
