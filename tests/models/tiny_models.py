"""Tiny architectures, a tiny tokenizer and small helpers of the model tests."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

WORDS = [f"w{i}" for i in range(24)]
VOCABULARY = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
VOCAB_SIZE = len(VOCABULARY)

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
BERT = {
    "model_type": "bert",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
ADAM = partial(torch.optim.AdamW, lr=1e-2)


def save_tokenizer(folder: Path, pad: bool = True) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "<eos>", "unk_token": "<unk>"} | ({"pad_token": "<pad>"} if pad else {})
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(str(folder))


def tiny_trainer(tmp_path: Path, **kwargs: Any) -> Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
    }
    return Trainer(**{**settings, **kwargs})


def padded(rows: list[list[int]], fill: int = 0) -> torch.Tensor:
    """Rows of any length as one tensor, padded on the right."""
    length = max(map(len, rows))
    return torch.tensor([row + [fill] * (length - len(row)) for row in rows])


def loader(batches: list[Any]) -> DataLoader:
    """Batches as they are."""
    return DataLoader(batches, batch_size=None)  # pyright: ignore[reportArgumentType]
