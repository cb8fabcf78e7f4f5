"""Conversations, rendered by the tokenizer's chat template, with the loss on the assistant's turns only."""

from __future__ import annotations

import itertools
import os.path
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_peft.data.base import IGNORED, SourceDataModule
from lightning_peft.data.sources import Record
from lightning_peft.errors import ConfigError, suggest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ChatMessages", "assistant_spans", "marked_spans", "tokenise_chat"]

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def assistant_spans(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], template: str
) -> tuple[str, list[tuple[int, int]]]:
    """Return the rendered conversation and which of its characters the assistant writes, from prefixes alone.

    A turn begins where the rendering of all that came before it, with the prompt for an answer, stops being the
    beginning of the conversation; it ends with the rendering of everything up to it. So what the template adds after
    the answer, the end-of-turn token above all, belongs to the turn.

    Raises:
        ConfigError: If the template renders earlier turns differently once others follow, so that no prefix fits.
    """

    def render(count: int, prompt: bool) -> str:
        text = tokenizer.apply_chat_template(
            list(messages[:count]), chat_template=template, tokenize=False, add_generation_prompt=prompt
        )
        return str(text)

    whole = render(len(messages), False)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(index, False) if index else ""
        until = render(index + 1, False)
        if not whole.startswith(before) or not whole.startswith(until):
            raise ConfigError(
                f"the chat template renders message {index + 1} differently when later messages follow, so its tokens "
                "cannot be found; give a chat_template that marks them with {% generation %} ... {% endgeneration %}"
            )
        prompted = render(index, True) if index else ""
        shared = next((i for i, (a, b) in enumerate(zip(prompted, whole, strict=False)) if a != b), len(prompted))
        spans.append((max(len(before), shared), len(until)))
    return whole, spans


def marked_spans(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], template: str
) -> tuple[str, list[tuple[int, int]]]:
    """Return the rendered conversation and which of its characters lie between ``{% generation %}`` marks.

    The renderer behind ``apply_chat_template(return_assistant_tokens_mask=True)``, without its last step: that marks
    all tokens to the end if marked text ends in white space of which the tokenizer makes no token.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, spans = render_jinja_template(
        conversations=[list(messages)],  # pyright: ignore[reportArgumentType]
        chat_template=template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,  # pyright: ignore[reportArgumentType]
    )
    return rendered[0], spans[0]  # pyright: ignore[reportReturnType, reportArgumentType]


def tokenise_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], template: str
) -> tuple[list[int], list[bool]]:
    """Return the tokens of a conversation and which of them the assistant writes.

    A template with ``{% generation %}`` marks says so itself; otherwise see :func:`assistant_spans`.
    """
    find_spans = marked_spans if GENERATION_MARK.search(template) else assistant_spans
    whole, spans = find_spans(tokenizer, messages, template)
    if tokenizer.is_fast:
        encoded: Any = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        marks = [
            any(start < span_end and end > span_start for span_start, span_end in spans)
            for start, end in encoded["offset_mapping"]
        ]
        return list(encoded["input_ids"]), marks
    ids: list[int] = []
    marks = []
    edges = [0, *(edge for span in spans for edge in span), len(whole)]
    for index, (start, end) in enumerate(itertools.pairwise(edges)):
        piece: Any = tokenizer(whole[start:end], add_special_tokens=False, verbose=False)["input_ids"]
        ids += piece
        marks += [index % 2 == 1] * len(piece)
    return ids, marks


class ChatMessages(SourceDataModule):
    """JSONL of conversations, ``{"messages": [{"role": ..., "content": ...}, ...]}``; the assistant is trained.

    Batches hold ``input_ids``, ``attention_mask`` and ``labels`` ``(batch, longest)``; labels are -100 everywhere but
    on the turns of the assistant, all of them, each with its end-of-turn token. The conversation is rendered by the
    tokenizer's chat template, so training sees what ``apply_chat_template`` gives when the model is used.

    Args:
        train_path: File, folder or glob of .jsonl or .json, or several.
        val_path: The same for validation; None splits off ``val_fraction`` of the training conversations.
        test_path: The same for ``test`` and ``predict``.
        val_fraction: Share of the training conversations to validate on, in [0, 1).
        messages_column: Name of the list of messages.
        chat_template: Jinja template in place of the tokenizer's own, or the path of a file with one.
        max_length: Tokens per conversation at most; longer ones lose their end.
        batch_size: Conversations per batch and process.
        tokenizer_name_or_path: Hugging Face id or folder; None takes ``tokenizer`` of the LightningModule.
        dataset: Hugging Face data set in place of paths: hub name or folder.
        dataset_config: Its configuration, if it has several.
        train_split: Its split to train on.
        val_split: Its split to validate on; None splits off ``val_fraction``.
        test_split: Its split for ``test`` and ``predict``.
        num_workers: Worker processes per loader; 0 loads in the training process, enough for tokenised text.
        seed: Of the order of the batches, and of what is split off for validation.

    Raises:
        ConfigError: If a path, column, tokenizer or chat template is missing, a message is malformed, or no
            conversation has an assistant's turn within ``max_length``.
    """

    def __init__(
        self,
        train_path: str | list[str] | None = None,
        val_path: str | list[str] | None = None,
        test_path: str | list[str] | None = None,
        val_fraction: float = 0.05,
        messages_column: str = "messages",
        chat_template: str | None = None,
        max_length: int = 2048,
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
        if max_length < 2:
            raise ConfigError(f"ChatMessages: max_length is {max_length}, at least 2 is needed")
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
        self.messages_column = messages_column
        self.chat_template = chat_template
        self.max_length = max_length

    def template(self) -> str:
        """Return the Jinja template: the one given, otherwise the tokenizer's.

        Raises:
            ConfigError: If there is neither.
        """
        if self.chat_template is not None:
            if "{" in self.chat_template:
                return self.chat_template
            if not os.path.isfile(self.chat_template):
                raise ConfigError(
                    f"ChatMessages: chat_template {self.chat_template!r} is neither a Jinja template (it has no '{{') "
                    "nor a file"
                )
            with open(self.chat_template, encoding="utf-8") as file:
                return file.read()
        if self.tokenizer.chat_template is None:
            raise ConfigError(
                "ChatMessages: the tokenizer has no chat template, so roles cannot be written as text. Give "
                "chat_template, or use the tokenizer of an instruction-tuned model"
            )
        return self.tokenizer.get_chat_template()

    def messages(self, record: Record) -> list[dict[str, Any]]:
        """Return the checked messages of a record."""
        messages = record[self.messages_column]
        if not isinstance(messages, list) or not messages:
            raise ConfigError(f"{record.place}: {self.messages_column!r} must be a list of messages with one or more")
        for number, message in enumerate(messages, start=1):
            if not isinstance(message, dict):
                raise ConfigError(f"{record.place}: message {number} is no object with 'role' and 'content'")
            for key in ("role", "content"):
                if key not in message:
                    raise ConfigError(f"{record.place}: message {number} has no {key!r}. {suggest(key, message)}")
        return messages

    def tokenise(self, records: Sequence[Record]) -> Sequence[Any]:
        """Return token ids and labels of each conversation that has something to learn from."""
        from jinja2.exceptions import TemplateError

        if not records:
            return []
        template = self.template()
        examples = []
        num_cut = 0
        for record in records:
            messages = self.messages(record)
            try:
                ids, marks = tokenise_chat(self.tokenizer, messages, template)
            except (ConfigError, TemplateError, ValueError) as error:
                raise ConfigError(f"{record.place}: {error}") from error
            num_cut += len(ids) > self.max_length
            labels = [token if mark else IGNORED for token, mark in zip(ids, marks, strict=True)]
            if any(label != IGNORED for label in labels[: self.max_length]):
                examples.append({"input_ids": ids[: self.max_length], "labels": labels[: self.max_length]})
        if not examples:
            raise ConfigError(
                f"ChatMessages: none of {len(records)} conversations has an assistant's turn within "
                f"max_length={self.max_length} tokens"
            )
        if num_cut or len(examples) < len(records):
            rank_zero_warn(
                f"ChatMessages: of {len(records)} conversations {num_cut} were cut at max_length={self.max_length} "
                f"tokens, and {len(records) - len(examples)} left out because no assistant's turn is in them",
                category=UserWarning,
            )
        return examples
