from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_peft import ChatMessages, LabelledText, PromptResponse, TextFiles, TextPairs
from lightning_peft.data import base
from lightning_peft.data.base import PadBatch, split_off
from lightning_peft.data.chat_messages import tokenise_chat
from lightning_peft.data.prompt_response import join_prompt_response
from lightning_peft.errors import ConfigError
from tests.data.resume_probe import Checkpoints, Recorder, fit
from tests.data.tiny_text import MARKED_CHAT, PLAIN_CHAT, build_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")

Write = Callable[..., str]


def rows(batch: dict[str, torch.Tensor], name: str = "input_ids") -> list[list[int]]:
    """The rows of a batch without padding."""
    return [row[mask.bool()].tolist() for row, mask in zip(batch[name], batch["attention_mask"], strict=True)]


def every(loader: Any) -> list[Any]:
    return [row for batch in loader for row in rows(batch)]


# ---------------------------------------------------------------- text files


def test_text_files_are_joined_and_packed(tmp_path: Path, tokenizer_folder: str, tokenizer: Any) -> None:
    texts = {"a.txt": "w1 w2 w3", "b.md": "w4 w5", "sub/c.py": "w6 w7 w8 w9", "d.bin": "w50"}
    (tmp_path / "sub").mkdir()
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    data = TextFiles(
        train_path=str(tmp_path), block_size=4, batch_size=2, val_fraction=0, tokenizer_name_or_path=tokenizer_folder
    )
    data.setup("fit")
    stream = ["w1", "w2", "w3", "</s>", "w4", "w5", "</s>", "w6", "w7", "w8", "w9", "</s>"]
    blocks = [tokenizer.convert_tokens_to_ids(stream[start : start + 4]) for start in (0, 4, 8)]
    assert sorted(every(data.train_dataloader())) == sorted(blocks)
    batch = next(iter(data.train_dataloader()))
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["input_ids"].shape == (2, 4)
    assert torch.equal(batch["labels"], batch["input_ids"])
    assert batch["attention_mask"].all()
    assert data.val_dataloader() == []


def test_text_files_with_too_little_text(tmp_path: Path, tokenizer_folder: str) -> None:
    (tmp_path / "a.txt").write_text("w1 w2 w3")
    data = TextFiles(train_path=str(tmp_path), block_size=5, tokenizer_name_or_path=tokenizer_folder)
    with pytest.raises(ConfigError, match="1 texts have 4 tokens, less than one block; block_size is 5"):
        data.setup("fit")


# ---------------------------------------------------------------- prompt and response


def records(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"w{n} w1", "response": f"w{n} w2 w3"[: 4 + 3 * (n % 2)]} for n in range(10, 10 + count)]


def test_prompt_response_trains_the_response(jsonl: Write, tokenizer_folder: str, tokenizer: Any) -> None:
    path = jsonl([{"q": "w1 w2", "a": "w3"}, {"q": "w4", "a": "w5 w6 w7"}])
    data = PromptResponse(
        train_path=path,
        val_path=path,
        prompt_column="q",
        response_column="a",
        template="<|user|> {prompt} <|assistant|>",
        tokenizer_name_or_path=tokenizer_folder,
    )
    data.setup("fit")
    batch = next(iter(data.val_dataloader()))
    ids = tokenizer.convert_tokens_to_ids
    first = ids(["<|user|>", "w1", "w2", "<|assistant|>", "w3", "</s>"])
    second = ids(["<|user|>", "w4", "<|assistant|>", "w5", "w6", "w7", "</s>"])
    pad = tokenizer.pad_token_id
    assert batch["input_ids"].tolist() == [[*first, pad], second]
    assert batch["labels"].tolist() == [[-100] * 4 + first[4:] + [-100], [-100] * 3 + second[3:]]
    assert batch["attention_mask"].tolist() == [[1] * 6 + [0], [1] * 7]


def test_prompt_response_keeps_the_begin_token(jsonl: Write, tmp_path: Path) -> None:
    tokenizer = build_tokenizer(bos=True)
    tokenizer.save_pretrained(str(tmp_path / "bos"))
    path = jsonl([{"prompt": "w1 w2 w3 w4", "response": "w5"}])
    data = PromptResponse(train_path=path, val_path=path, max_length=5, tokenizer_name_or_path=str(tmp_path / "bos"))
    with pytest.warns(UserWarning, match="1 of 1 records are longer than max_length=5"):
        data.setup("validate")
    (row,) = every(data.val_dataloader())
    assert tokenizer.convert_ids_to_tokens(row) == ["<s>", "w3", "w4", "w5", "</s>"]


@pytest.mark.parametrize("max_length", range(2, 9))
@pytest.mark.parametrize("bos", [[], [7]])
def test_cutting_keeps_the_response_longest(max_length: int, bos: list[int]) -> None:
    joined = join_prompt_response([1, 2, 3], [4, 5, 6], max_length, bos)
    ids, labels = joined["input_ids"], joined["labels"]
    assert len(ids) == len(labels) == min(max_length, 6 + len(bos))
    kept = [label for label in labels if label != -100]
    assert kept == [4, 5, 6][:max_length]
    prompt = ids[: len(ids) - len(kept)]
    assert prompt[: len(bos)] == bos[: len(prompt)]
    assert [1, 2, 3][3 - len(prompt[len(bos) :]) :] == prompt[len(bos) :]


# ---------------------------------------------------------------- chat

CONVERSATION = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "who are you"},
    {"role": "assistant", "content": "i am w5"},
    {"role": "user", "content": "two plus two"},
    {"role": "assistant", "content": "five"},
]
TRAINED = ["i", "am", "w5", "<|end|>", "five", "<|end|>"]


@pytest.mark.parametrize("template", [PLAIN_CHAT, MARKED_CHAT], ids=["prefixes", "marks"])
def test_chat_trains_every_turn_of_the_assistant(
    jsonl: Write, tokenizer_folder: str, tokenizer: Any, template: str, tmp_path: Path
) -> None:
    path = jsonl([{"messages": CONVERSATION}, {"messages": CONVERSATION[1:3]}])
    (tmp_path / "chat.jinja").write_text(template)
    for given in (template, str(tmp_path / "chat.jinja")):
        data = ChatMessages(
            train_path=path, val_path=path, chat_template=given, tokenizer_name_or_path=tokenizer_folder
        )
        data.setup("validate")
        batch = next(iter(data.val_dataloader()))
        rendered = "<|system|> be kind <|end|> <|user|> who are you <|end|> <|assistant|> i am w5 <|end|> "
        rendered += "<|user|> two plus two <|end|> <|assistant|> five <|end|>"
        assert tokenizer.convert_ids_to_tokens(rows(batch)[0]) == rendered.split()
        trained = [[label for label in row if label != -100] for row in batch["labels"].tolist()]
        assert [tokenizer.convert_ids_to_tokens(row) for row in trained] == [TRAINED, TRAINED[:4]]
        at_label = batch["labels"] != -100
        assert torch.equal(batch["labels"][at_label], batch["input_ids"][at_label])


class SlowTokenizer:
    """A tokenizer without offsets, as those written in Python are."""

    is_fast = False

    def __init__(self, fast: Any) -> None:
        self.fast = fast
        self.apply_chat_template = fast.apply_chat_template
        self.special_tokens_map = fast.special_tokens_map

    def __call__(self, text: str, **options: Any) -> Any:
        assert "return_offsets_mapping" not in options
        return self.fast(text, **options)


@pytest.mark.parametrize("template", [PLAIN_CHAT, MARKED_CHAT], ids=["prefixes", "marks"])
def test_chat_without_offsets(tokenizer: Any, template: str) -> None:
    slow: Any = SlowTokenizer(tokenizer)
    assert tokenise_chat(slow, CONVERSATION, template) == tokenise_chat(tokenizer, CONVERSATION, template)


def test_chat_marks_agree_with_transformers(tokenizer: Any) -> None:
    template = MARKED_CHAT.replace("<|end|> {% endgen", "<|end|>{% endgen").replace(
        "endgeneration %}", "endgeneration %} "
    )
    theirs = tokenizer.apply_chat_template(
        CONVERSATION, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, marks = tokenise_chat(tokenizer, CONVERSATION, template)
    assert ids == theirs["input_ids"]
    assert [int(mark) for mark in marks] == theirs["assistant_masks"]
    assert tokenizer.convert_ids_to_tokens([token for token, mark in zip(ids, marks, strict=True) if mark]) == TRAINED


def test_chat_prompt_that_is_not_in_the_history(tokenizer: Any) -> None:
    """A template may ask for an answer with more than it later writes before one."""
    template = PLAIN_CHAT.replace("<|assistant|> {% endif %}", "<|assistant|> w9 {% endif %}")
    assert template != PLAIN_CHAT
    assert tokenise_chat(tokenizer, CONVERSATION, template) == tokenise_chat(tokenizer, CONVERSATION, PLAIN_CHAT)


def test_chat_template_that_rewrites_the_history(jsonl: Write, tokenizer_folder: str) -> None:
    rewriting = PLAIN_CHAT.replace("{{ m['content'] }}", "{{ m['content'] if loop.last else 'w1' }}")
    data = ChatMessages(
        train_path=jsonl([{"messages": CONVERSATION}]),
        chat_template=rewriting,
        tokenizer_name_or_path=tokenizer_folder,
    )
    with pytest.raises(ConfigError, match=r"train\.jsonl:1: the chat template renders message 3 differently.*{% gen"):
        data.setup("fit")


def test_chat_cut_short(jsonl: Write, tokenizer_folder: str) -> None:
    path = jsonl([{"messages": CONVERSATION}, {"messages": CONVERSATION[1:3]}])
    options: dict[str, Any] = {"chat_template": PLAIN_CHAT, "tokenizer_name_or_path": tokenizer_folder}
    data = ChatMessages(train_path=path, val_path=path, max_length=8, **options)
    with pytest.warns(UserWarning, match="of 2 conversations 2 were cut at max_length=8 tokens, and 1 left out"):
        data.setup("validate")
    data = ChatMessages(train_path=path, max_length=3, **options)
    with pytest.raises(ConfigError, match="none of 2 conversations has an assistant's turn within max_length=3"):
        data.setup("fit")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": []}, "must be a list of messages"),
        ({"messages": [{"role": "user", "contents": "hi"}]}, r"message 1 has no 'content'\. Did you mean 'contents'"),
        ({"messages": ["hi"]}, "message 1 is no object"),
        ({"message": []}, r"no column 'messages'\. Did you mean 'message'"),
    ],
)
def test_malformed_messages(jsonl: Write, tokenizer_folder: str, record: Any, message: str) -> None:
    data = ChatMessages(train_path=jsonl([record]), chat_template=PLAIN_CHAT, tokenizer_name_or_path=tokenizer_folder)
    with pytest.raises(ConfigError, match=rf"train\.jsonl:1: .*{message}"):
        data.setup("fit")


def test_no_chat_template(jsonl: Write, tokenizer_folder: str) -> None:
    path = jsonl([{"messages": CONVERSATION}])
    with pytest.raises(ConfigError, match="the tokenizer has no chat template"):
        ChatMessages(train_path=path, tokenizer_name_or_path=tokenizer_folder).setup("fit")
    with pytest.raises(ConfigError, match=r"neither a Jinja template .* nor a file"):
        ChatMessages(train_path=path, chat_template="no.jinja", tokenizer_name_or_path=tokenizer_folder).setup("fit")


# ---------------------------------------------------------------- labels and pairs


def test_labelled_text(tmp_path: Path, jsonl: Write, tokenizer_folder: str, tokenizer: Any) -> None:
    (tmp_path / "train.csv").write_text("text,label\nw1 w2,10\nw3,9\nw4 w5 w6,9\n")
    data = LabelledText(
        train_path=str(tmp_path / "train.csv"),
        val_path=jsonl([{"text": "w7", "label": 10}], "val.jsonl"),
        max_length=2,
        tokenizer_name_or_path=tokenizer_folder,
    )
    assert data.label_names == ["9", "10"]  # known before any tokenizer is
    assert data.num_labels == 2
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    ids = tokenizer.convert_tokens_to_ids
    got = sorted(zip(rows(batch), batch["labels"].tolist(), strict=True))
    assert got == sorted([(ids(["w1", "w2"]), 1), (ids(["w3"]), 0), (ids(["w4", "w5"]), 0)])
    assert next(iter(data.val_dataloader()))["labels"].tolist() == [1]


def test_labelled_text_pairs_have_token_types(jsonl: Write, tmp_path: Path, tokenizer: Any) -> None:
    path = jsonl([{"text": "w1", "other": "w2 w3", "label": label} for label in (False, True)])
    typed = build_tokenizer(bos=True, model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    typed.save_pretrained(str(tmp_path / "typed"))
    data = LabelledText(
        train_path=path,
        val_path=path,
        text_pair_column="other",
        tokenizer_name_or_path=str(tmp_path / "typed"),
    )
    data.setup("fit")
    batch = next(iter(data.val_dataloader()))
    assert data.label_names == ["False", "True"]
    assert tokenizer.convert_ids_to_tokens(rows(batch)[0]) == ["<s>", "w1", "w2", "w3"]
    assert batch["token_type_ids"].tolist() == [[0, 0, 1, 1]] * 2


def test_labels_that_cannot_work(jsonl: Write, tokenizer_folder: str) -> None:
    train = jsonl([{"text": "w1", "label": "good"}, {"text": "w2", "label": "bad"}])
    val = jsonl([{"text": "w1", "label": "god"}], "val.jsonl")
    with pytest.raises(ConfigError, match=r"val\.jsonl:1: label 'god' is not in the training.*Did you mean 'good'"):
        LabelledText(train_path=train, val_path=val, tokenizer_name_or_path=tokenizer_folder).setup("fit")
    with pytest.raises(ConfigError, match="has 1 labels, 2 are needed"):
        LabelledText(train_path=val).num_labels  # noqa: B018
    with pytest.raises(ConfigError, match="reads the names of the labels from the training data"):
        LabelledText(test_path=val)


def test_text_pairs(jsonl: Write, tokenizer_folder: str, tokenizer: Any) -> None:
    path = jsonl([{"title": f"w{n}", "body": f"w{n} w2 w3 w4"} for n in range(10, 17)])
    data = TextPairs(
        train_path=path,
        test_path=path,
        val_fraction=0.3,
        query_column="title",
        answer_column="body",
        max_length=3,
        batch_size=2,
        tokenizer_name_or_path=tokenizer_folder,
    )
    data.setup("fit")
    data.setup("test")
    assert data.test_names == ("pairs",)
    batches = list(data.test_dataloader())
    assert [len(batch["query"]["input_ids"]) for batch in batches] == [2, 2, 2, 1]
    for batch in batches:
        fields = {"input_ids", "attention_mask"}
        assert {name: set(side) for name, side in batch.items()} == {"query": fields, "answer": fields}
        for query, answer in zip(rows(batch["query"]), rows(batch["answer"]), strict=True):
            assert answer == query + tokenizer.convert_tokens_to_ids(["w2", "w3"])
    train = [query for batch in data.train_dataloader() for query in rows(batch["query"])]
    assert len(train) == 4  # five pairs; a batch of one pair has no wrong answers
    val = [query for batch in data.val_dataloader() for query in rows(batch["query"])]
    assert len(val) == 2
    assert not any(query in train for query in val)


# ---------------------------------------------------------------- what all share


def test_the_split_is_a_partition_and_depends_on_the_seed_only() -> None:
    for count in range(1, 30):
        for fraction in (0.0, 0.01, 0.2, 0.99):
            keep, off = split_off(count, fraction, seed=3)
            assert sorted(keep + off) == list(range(count))
            assert keep == sorted(keep)
            assert len(keep) >= 1
            assert (len(off) >= 1) == (fraction > 0 and count > 1)
    assert split_off(40, 0.2, 0) == split_off(40, 0.2, 0) != split_off(40, 0.2, 1)


def test_each_text_is_tokenised_once(jsonl: Write, tokenizer: Any) -> None:
    class Counting:
        pad_token_id, eos_token_id, bos_token_id, sep_token_id = 0, 3, 2, None
        texts: list[str] = []  # noqa: RUF012

        def __call__(self, texts: Any, **options: Any) -> Any:
            self.texts.extend([texts] if isinstance(texts, str) else texts)
            return tokenizer(texts, **options)

    module = Recorder()
    module.tokenizer = Counting()  # pyright: ignore[reportAttributeAccessIssue]
    path = jsonl(records(8))
    data = PromptResponse(train_path=path, test_path=path, val_fraction=0.25, batch_size=2)
    trainer = pl.Trainer(accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, barebones=False)
    trainer.progress_bar_callback.disable()  # pyright: ignore[reportOptionalMemberAccess]
    trainer.fit(module, datamodule=data)
    trainer.validate(module, datamodule=data, verbose=False)
    assert len([text for text in Counting.texts if text]) == 16
    assert len(module.seen) == 6


def test_tokenizer_of_the_model_or_a_clear_error(jsonl: Write, tokenizer_folder: str) -> None:
    path = jsonl(records(3))
    with pytest.raises(ConfigError, match=r"PromptResponse has no tokenizer.*there is no model to take it from"):
        PromptResponse(train_path=path).setup("fit")
    with pytest.raises(ConfigError, match=r"Recorder has none.*attribute 'tokenizer'"):
        fit({"max_steps": 1}, data=PromptResponse(train_path=path))
    with pytest.raises(ConfigError, match="No tokenizer could be loaded"):
        PromptResponse(train_path=path, tokenizer_name_or_path=str(Path(path).parent / "none")).setup("fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "has no data: give train_path"),
        ({"train_path": "a", "dataset": "b"}, "either dataset or train_path, not both"),
        ({"train_path": "a", "val_fraction": 1.0}, r"val_fraction is 1\.0"),
        ({"train_path": "a", "batch_size": 0}, "batch_size is 0"),
        ({"train_path": "a", "num_workers": -1}, "num_workers is -1"),
        ({"train_path": "a", "template": "x"}, "does not say where the prompt goes"),
    ],
)
def test_settings_that_cannot_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PromptResponse(**options)


def test_what_a_stage_lacks(jsonl: Write, tokenizer_folder: str) -> None:
    data = PromptResponse(train_path=jsonl(records(3)), val_fraction=0, tokenizer_name_or_path=tokenizer_folder)
    data.setup("fit")
    with pytest.raises(ConfigError, match="no test data; set test_path"):
        data.setup("test")
    with pytest.raises(ConfigError, match="nothing to validate on; set val_path"):
        data.setup("validate")
    with pytest.raises(ConfigError, match="the train set is empty"):
        PromptResponse(train_path=jsonl([]), tokenizer_name_or_path=tokenizer_folder).setup("fit")


def test_hugging_face_data_set(tmp_path: Path, tokenizer_folder: str) -> None:
    datasets = pytest.importorskip("datasets")
    rows_ = datasets.Dataset.from_list(records(10))
    datasets.DatasetDict({"learn": rows_, "check": rows_.select([0, 1])}).save_to_disk(str(tmp_path / "saved"))
    data = PromptResponse(
        dataset=str(tmp_path / "saved"),
        train_split="learn",
        test_split="check",
        val_fraction=0.2,
        tokenizer_name_or_path=tokenizer_folder,
    )
    data.setup("fit")
    data.setup("test")
    counts = [len(every(loader)) for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())]
    assert counts == [8, 2, 2]


def test_evaluation_is_in_order_and_leaves_the_global_generator_alone(jsonl: Write, tokenizer_folder: str) -> None:
    path = jsonl(records(5))
    data = PromptResponse(train_path=path, test_path=path, batch_size=2, tokenizer_name_or_path=tokenizer_folder)
    data.setup("fit")
    data.setup("test")
    before = torch.get_rng_state()
    assert every(data.train_dataloader()) == every(data.train_dataloader())
    in_order = every(data.test_dataloader())
    assert in_order == [example["input_ids"] for example in data.examples("test")]
    assert every(data.predict_dataloader()) == in_order
    assert torch.equal(torch.get_rng_state(), before)


def test_padding() -> None:
    collate = PadBatch(pad_token_id=9)
    batch = collate(
        [{"input_ids": [1, 2], "labels": [-100, 2], "kind": 4}, {"input_ids": [3], "labels": [3], "kind": 5}]
    )
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[1, 2], [3, 9]],
        "attention_mask": [[1, 1], [1, 0]],
        "labels": [[-100, 2], [3, -100]],
        "kind": [4, 5],
    }
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert torch.nn.CrossEntropyLoss().ignore_index == base.IGNORED


@pytest.mark.filterwarnings("ignore:.*lr_scheduler:UserWarning")
@pytest.mark.parametrize("options", [{"max_epochs": 2}, {"max_steps": 5, "max_epochs": -1}], ids=["epochs", "steps"])
def test_a_run_on_a_datamodule_resumes_exactly(
    tmp_path: Path, jsonl: Write, tokenizer_folder: str, options: dict[str, Any]
) -> None:
    path = jsonl(records(9))
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    checkpoints = Checkpoints(folder)

    def data() -> PromptResponse:
        return PromptResponse(train_path=path, batch_size=3, seed=2, tokenizer_name_or_path=tokenizer_folder)

    whole = fit(options, data=data(), checkpoints=checkpoints, count_steps=True)
    points = [point for point in checkpoints.points if point[0] in ("before_step", "batch_end", "epoch_end")]
    assert len(points) >= 12
    for hook, done, ckpt_path in points:
        assert fit(options, data=data(), ckpt_path=ckpt_path, count_steps=True) == whole[done:], (hook, done)
