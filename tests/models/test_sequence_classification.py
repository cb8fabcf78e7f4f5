from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningDataModule

from lightning_peft import LISA, SequenceClassification
from lightning_peft.errors import ConfigError
from tests.models.tiny_models import ADAM, BERT, LLAMA, loader, padded

ROWS = [[3, 4, 5], [6, 7], [8, 9, 10, 11], [3, 9], [12, 13, 14]]
LABELS = [0, 1, 2, 0, 1]


def batch(rows=ROWS, labels=LABELS) -> dict[str, torch.Tensor]:
    return {
        "input_ids": padded(rows),
        "attention_mask": padded([[1] * len(row) for row in rows]),
        "labels": torch.tensor(labels),
    }


class Data(LightningDataModule):
    num_labels = 3

    def train_dataloader(self):
        return loader([batch()] * 40)

    def val_dataloader(self):
        return loader([batch(ROWS[:1], LABELS[:1]), batch(ROWS[1:], LABELS[1:])])

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader


def slow_f1_macro(predicted: list[int], labels: list[int]) -> float:
    scores = []
    for c in sorted({*predicted, *labels}):
        hits = sum(p == c and t == c for p, t in zip(predicted, labels, strict=True))
        scores.append(2 * hits / (predicted.count(c) + labels.count(c)))
    return sum(scores) / len(scores)


def test_metrics_against_an_obvious_computation(bert_folder, trainer) -> None:
    module = SequenceClassification(bert_folder, num_labels=3)
    (logged,) = trainer().validate(module, datamodule=Data(), verbose=False)
    module.eval()
    with torch.no_grad():
        logits = torch.cat([module(torch.tensor([row])) for row in ROWS])
    predicted = logits.argmax(-1).tolist()
    losses = [-torch.log_softmax(row, -1)[label].item() for row, label in zip(logits, LABELS, strict=True)]
    assert logged["val/loss"] == pytest.approx(sum(losses) / 5, rel=1e-5)
    assert logged["val/accuracy"] == pytest.approx(sum(map(int.__eq__, predicted, LABELS)) / 5)
    assert logged["val/f1_macro"] == pytest.approx(slow_f1_macro(predicted, LABELS))


def test_number_of_labels_from_the_data_training_and_reload(bert_folder, trainer, tmp_path) -> None:
    module = SequenceClassification(bert_folder, optimizer=ADAM)
    assert not module.is_built
    run = trainer(max_steps=40)
    run.fit(module, datamodule=Data())
    built = module.model
    assert built.config.num_labels == 3
    (logged,) = run.test(module, datamodule=Data(), verbose=False)
    assert module.model is built  # configure_model ran again and built nothing
    assert logged["test/accuracy"] == 1
    assert logged["test/f1_macro"] == 1
    predictions = trainer().predict(module, datamodule=Data())
    assert torch.cat([part["labels"] for part in predictions]).tolist() == LABELS
    run.save_checkpoint(tmp_path / "model.ckpt")
    again = SequenceClassification.load_from_checkpoint(tmp_path / "model.ckpt")
    for name, value in module.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_number_of_labels_that_nobody_knows_or_that_differs(bert_folder, trainer) -> None:
    with pytest.raises(ConfigError, match="Give num_labels"):
        trainer().validate(SequenceClassification(bert_folder), loader([batch()]), verbose=False)
    with pytest.raises(ConfigError, match="num_labels=4, but the data has 3"):
        trainer().validate(SequenceClassification(bert_folder, num_labels=4), datamodule=Data(), verbose=False)
    with pytest.raises(ConfigError, match="2 classes or more"):
        SequenceClassification(config=BERT, num_labels=1)


def test_decoder_reads_the_last_token_before_the_padding(llama_folder) -> None:
    module = SequenceClassification(llama_folder, num_labels=3).eval()
    data = batch()
    with torch.no_grad():
        together = module(data["input_ids"], data["attention_mask"])
        alone = torch.cat([module(torch.tensor([row])) for row in ROWS])
    assert torch.allclose(together, alone, atol=1e-5)


def test_decoder_without_pad_token_gets_the_tokenizers(llama_folder) -> None:
    values = {**LLAMA, "pad_token_id": None}
    module = SequenceClassification(config=values, num_labels=3, tokenizer_name_or_path=llama_folder)
    assert module.model.config.pad_token_id == module.tokenizer.pad_token_id == 1


def test_only_the_head_starts_at_random(bert_folder) -> None:
    first, second = (SequenceClassification(bert_folder, num_labels=3).state_dict() for _ in range(2))
    assert {n for n in first if not torch.equal(first[n], second[n])} == {"model.classifier.weight"}


def test_method_on_a_model_that_waited_for_its_number_of_labels(bert_folder, trainer) -> None:
    module = SequenceClassification(bert_folder, optimizer=ADAM)
    method = LISA(num_layers=1, period_steps=2)
    trainer(max_steps=6, callbacks=[method]).fit(module, datamodule=Data())
    assert method.draw_index == 2
    blocks = {name.split(".")[4] for name in method.trainable_names if ".layer." in name}
    assert len(blocks) == 1
    assert "model.classifier.weight" in method.trainable_names
