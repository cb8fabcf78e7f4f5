from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule

from lightning_peft import TextEmbedding
from lightning_peft.errors import ConfigError
from lightning_peft.models.metrics import RetrievalMetrics, mean_loss, retrieval_ranks
from lightning_peft.models.text_embedding import contrastive_loss, pool
from tests.models.tiny_models import ADAM, BERT, LLAMA, loader, padded

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")


def texts(seed: int, count: int = 12) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, 27) for _ in range(draw.randrange(2, 7))] for _ in range(count)]


QUERIES, ANSWERS = texts(1), texts(2)


def side(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    return {"input_ids": padded(rows), "attention_mask": padded([[1] * len(row) for row in rows])}


def batch(start: int = 0, stop: int = 12) -> dict[str, dict[str, torch.Tensor]]:
    return {"query": side(QUERIES[start:stop]), "answer": side(ANSWERS[start:stop])}


def slow_ranks(query: list[list[float]], answer: list[list[float]]) -> list[float]:
    """Sort all answers of each query; the right one stands in the middle of those with its score."""
    ranks = []
    for i, q in enumerate(query):
        scores = [sum(a * b for a, b in zip(q, row, strict=True)) for row in answer]
        places = [place for place, s in enumerate(sorted(scores, reverse=True), start=1) if s == scores[i]]
        ranks.append(sum(places) / len(places))
    return ranks


@pytest.mark.parametrize("chunk", [3, 1024])
def test_ranks_against_sorting_with_ties(chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randint(-2, 3, (20, 3), generator=generator).double()
    answer = torch.randint(-2, 3, (20, 3), generator=generator).double()
    expected = slow_ranks(query.tolist(), answer.tolist())
    assert len(set(expected)) > 5
    assert any(rank % 1 for rank in expected)
    assert retrieval_ranks(query, answer, chunk=chunk).tolist() == expected


def test_a_collapsed_model_gets_the_rank_of_chance() -> None:
    same = torch.ones(9, 4)
    assert retrieval_ranks(same, same).tolist() == [5.0] * 9


def test_retrieval_metrics_do_not_depend_on_the_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    query, answer = torch.randn(30, 4, generator=generator), torch.randn(30, 4, generator=generator)
    metric = RetrievalMetrics()
    for part in (slice(0, 7), slice(7, 8), slice(8, 30)):
        metric.update(query[part], answer[part])
    ranks = slow_ranks(query.tolist(), answer.tolist())
    result = {name: value.item() for name, value in metric.compute().items()}
    assert result == pytest.approx(
        {
            "mrr": sum(1 / r for r in ranks) / 30,
            "recall_at_1": sum(r <= 1 for r in ranks) / 30,
            "recall_at_10": sum(r <= 10 for r in ranks) / 30,
            "num_candidates": 30,
        }
    )


def test_mean_loss_is_weighted_and_shows_a_nan() -> None:
    metric = mean_loss()
    metric.update(torch.tensor(1.0), weight=3)
    metric.update(torch.tensor(5.0), weight=1)
    assert metric.compute() == 2.0
    metric.update(torch.tensor(float("nan")), weight=1)
    assert metric.compute().isnan()


def test_contrastive_loss_by_hand() -> None:
    query, answer = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.6, 0.8], [0.0, 1.0]])
    s = [[1.2, 0.0], [1.6, 2.0]]  # divided by a temperature of 0.5
    rows = [-math.log(math.exp(s[i][i]) / sum(math.exp(s[i][j]) for j in range(2))) for i in range(2)]
    columns = [-math.log(math.exp(s[i][i]) / sum(math.exp(s[j][i]) for j in range(2))) for i in range(2)]
    assert contrastive_loss(query, answer, 0.5).item() == pytest.approx(sum(rows + columns) / 4)


@pytest.mark.parametrize("how", ["mean", "cls", "last"])
def test_pooling_ignores_padding_on_either_side(how: str) -> None:
    hidden = torch.randn(1, 5, 3)
    real = hidden[:, 1:4]
    expected = {"mean": real.mean(1), "cls": real[:, 0], "last": real[:, -1]}[how]
    assert torch.allclose(pool(hidden, torch.tensor([[0, 1, 1, 1, 0]]), how), expected)


@pytest.mark.parametrize(("values", "pooling"), [(BERT, "mean"), (BERT, "cls"), (LLAMA, "last")])
def test_embeddings_have_unit_length_and_ignore_padding(values: dict, pooling: Any) -> None:
    module = TextEmbedding(config=values, pooling=pooling).eval()
    with torch.no_grad():
        together = module(**side(QUERIES))
        alone = torch.cat([module(torch.tensor([row])) for row in QUERIES])
    assert torch.allclose(together.norm(dim=-1), torch.ones(12), atol=1e-5)
    assert torch.allclose(together, alone, atol=1e-5)


def test_training_raises_mrr_over_the_whole_split(bert_folder, trainer, tmp_path) -> None:
    module = TextEmbedding(bert_folder, optimizer=ADAM)
    parts = loader([batch(0, 5), batch(5, 12)])
    (before,) = trainer().validate(module, parts, verbose=False)
    module.eval()
    with torch.no_grad():
        embeddings = [[module(torch.tensor([row]))[0].double().tolist() for row in rows] for rows in (QUERIES, ANSWERS)]
    expected = sum(1 / rank for rank in slow_ranks(*embeddings)) / 12
    assert before["val/mrr"] == pytest.approx(expected, rel=1e-4)
    assert before["val/num_candidates"] == 12
    module.train()
    run = trainer(max_steps=60)
    run.fit(module, loader([batch()] * 60))
    (after,) = run.validate(module, parts, verbose=False)
    assert after["val/mrr"] > 0.95 > before["val/mrr"]
    assert after["val/loss"] < 0.3 * before["val/loss"]

    run.save_checkpoint(tmp_path / "model.ckpt")
    again = TextEmbedding.load_from_checkpoint(tmp_path / "model.ckpt")
    for name, value in module.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_every_parameter_gets_a_gradient(bert_folder) -> None:
    for module in (TextEmbedding(bert_folder), TextEmbedding(config=LLAMA, pooling="last")):
        contrastive_loss(module(**side(QUERIES)), module(**side(ANSWERS)), 0.1).backward()
        assert not [name for name, p in module.named_parameters() if p.grad is None]


def test_encoder_decoder_uses_its_encoder_alone() -> None:
    tiny = {"model_type": "t5", "d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 27}
    module = TextEmbedding(config=tiny)
    contrastive_loss(module(**side(QUERIES)), module(**side(ANSWERS)), 0.1).backward()
    assert not [name for name, p in module.named_parameters() if p.grad is None]


def test_named_test_sets(bert_folder, trainer) -> None:
    class Data(LightningDataModule):
        test_names = ("code_search", "identifiers")

        def test_dataloader(self):
            return [loader([batch(0, 8)]), loader([batch(8, 12)])]

    parts = trainer().test(TextEmbedding(bert_folder), datamodule=Data(), verbose=False)
    logged = {key: value for part in parts for key, value in part.items()}
    assert logged["test/code_search/num_candidates"] == 8
    assert logged["test/identifiers/num_candidates"] == 4
    assert {"test/code_search/mrr", "test/identifiers/mrr"} < set(logged)


def test_encode_and_predict_agree(bert_folder, trainer) -> None:
    module = TextEmbedding(bert_folder)
    words = [" ".join(f"w{i - 3}" for i in row) for row in QUERIES]
    encoded = module.encode(words, batch_size=5)
    assert module.model.training
    (plain,) = trainer().predict(module, loader([side(QUERIES)]))
    (pairs,) = trainer().predict(module, loader([batch()]))
    assert torch.allclose(encoded, plain, atol=1e-5)
    assert torch.equal(pairs["query"], plain)


def test_values_out_of_range() -> None:
    with pytest.raises(ConfigError, match=r"pooling='means'.*'mean'"):
        TextEmbedding(config=BERT, pooling="means")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="temperature=0"):
        TextEmbedding(config=BERT, temperature=0)
