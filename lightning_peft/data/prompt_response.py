"""Pairs of prompt and response for instruction tuning, with the loss on the response only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_peft.data.base import IGNORED, SourceDataModule
from lightning_peft.data.sources import Record
from lightning_peft.errors import ConfigError

__all__ = ["PromptResponse", "join_prompt_response"]


def join_prompt_response(
    prompt: list[int], response: list[int], max_length: int, bos: Sequence[int] = ()
) -> dict[str, list[int]]:
    """Return ``input_ids`` and ``labels`` of at most ``max_length`` tokens, labels -100 on the prompt.

    What is too long loses the beginning of the prompt first, then the end of the response. The begin token ``bos``
    stays before what is left of the prompt, unless the response alone fills ``max_length``.

    Example:
        >>> join_prompt_response([1, 2, 3], [4, 5], max_length=4)
        {'input_ids': [2, 3, 4, 5], 'labels': [-100, -100, 4, 5]}
    """
    response = response[:max_length]
    bos = list(bos)[: max_length - len(response)]
    room = max_length - len(response) - len(bos)
    prompt = bos + (prompt[len(prompt) - room :] if len(prompt) > room else prompt)
    return {"input_ids": prompt + response, "labels": [IGNORED] * len(prompt) + response}


class PromptResponse(SourceDataModule):
    """JSONL or CSV of prompts and responses; the model is trained to write the response and then to stop.

    Batches hold ``input_ids``, ``attention_mask`` and ``labels`` ``(batch, longest)``; labels are -100 on prompt and
    padding. Prompt and response are tokenised apart, as they are when the model is used, and the end token is appended.

    Args:
        train_path: File, folder or glob of .jsonl, .json, .csv or .tsv, or several.
        val_path: The same for validation; None splits off ``val_fraction`` of the training records.
        test_path: The same for ``test`` and ``predict``.
        val_fraction: Share of the training records to validate on, in [0, 1).
        prompt_column: Name of the prompt.
        response_column: Name of the response.
        template: Text around the prompt; ``{prompt}`` stands for it.
        max_length: Tokens per example at most; what is too long loses the beginning of its prompt first.
        batch_size: Records per batch and process.
        tokenizer_name_or_path: Hugging Face id or folder; None takes ``tokenizer`` of the LightningModule.
        dataset: Hugging Face data set in place of paths: hub name or folder.
        dataset_config: Its configuration, if it has several.
        train_split: Its split to train on.
        val_split: Its split to validate on; None splits off ``val_fraction``.
        test_split: Its split for ``test`` and ``predict``.
        num_workers: Worker processes per loader; 0 loads in the training process, enough for tokenised text.
        seed: Of the order of the batches, and of what is split off for validation.

    Raises:
        ConfigError: If a path, column, tokenizer or end token is missing, or the template has no ``{prompt}``.
    """

    def __init__(
        self,
        train_path: str | list[str] | None = None,
        val_path: str | list[str] | None = None,
        test_path: str | list[str] | None = None,
        val_fraction: float = 0.05,
        prompt_column: str = "prompt",
        response_column: str = "response",
        template: str = "{prompt}",
        max_length: int = 1024,
        batch_size: int = 8,
        tokenizer_name_or_path: str | None = None,
        dataset: str | None = None,
        dataset_config: str | None = None,
        train_split: str = "train",
        val_split: str | None = None,
        test_split: str | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        if "{prompt}" not in template:
            raise ConfigError(f"PromptResponse: template {template!r} does not say where the prompt goes: '{{prompt}}'")
        if max_length < 2:
            raise ConfigError(f"PromptResponse: max_length is {max_length}, at least 2 is needed")
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
        self.prompt_column = prompt_column
        self.response_column = response_column
        self.template = template
        self.max_length = max_length

    def tokenise(self, records: Sequence[Record]) -> Sequence[Any]:
        """Return token ids and labels of each record."""
        if not records:
            return []
        tokenizer = self.tokenizer
        eos: Any = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        if eos is None:
            raise ConfigError("PromptResponse ends a response with the tokenizer's end token, and it has none")
        prompts = [self.template.replace("{prompt}", record.text(self.prompt_column)) for record in records]
        responses = [record.text(self.response_column) for record in records]
        prompt_ids: Any = tokenizer(prompts, add_special_tokens=False, verbose=False)["input_ids"]
        response_ids: Any = tokenizer(responses, add_special_tokens=False, verbose=False)["input_ids"]
        first: Any = tokenizer("")["input_ids"]
        bos: list[Any] = [tokenizer.bos_token_id] if tokenizer.bos_token_id in first else []
        too_long = sum(
            len(bos) + len(prompt) + len(response) + 1 > self.max_length
            for prompt, response in zip(prompt_ids, response_ids, strict=True)
        )
        if too_long:
            rank_zero_warn(
                f"PromptResponse: {too_long} of {len(records)} records are longer than max_length={self.max_length} "
                "tokens and were cut",
                category=UserWarning,
            )
        return [
            join_prompt_response(prompt, [*response, eos], self.max_length, bos)
            for prompt, response in zip(prompt_ids, response_ids, strict=True)
        ]
