"""A tokenizer and chat templates small enough to check by eye."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = [
    *(f"w{number}" for number in range(60)),
    *("be", "kind", "hi", "who", "are", "you", "i", "am", "five", "two", "plus", "user", "assistant", "system"),
]

PLAIN_CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
MARKED_CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|> {% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }} <|end|> {% endgeneration %}{% else %}{{ m['content'] }} <|end|> {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def build_tokenizer(*, bos: bool = False, **special: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, built here: nothing is downloaded."""
    names = ["<pad>", "<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
    vocabulary = {word: number for number, word in enumerate([*names, *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    if bos:
        core.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
            single="<s> $A", pair="<s> $A $B:1", special_tokens=[("<s>", vocabulary["<s>"])]
        )
    options: dict[str, Any] = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    options["additional_special_tokens"] = names[4:]
    return PreTrainedTokenizerFast(tokenizer_object=core, **options | special)
