"""Metrics of the ready modules: sums over a whole split, exact over processes.

Shapes: B rows of a batch, T tokens, V vocabulary entries, N pairs of a split, D embedding dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.aggregation import MeanMetric
from torchmetrics.utilities import dim_zero_cat

__all__ = ["LanguageModelMetrics", "RetrievalMetrics", "mean_loss", "retrieval_ranks", "token_losses"]

IGNORE = -100


def token_losses(logits_BTV: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the summed negative log-likelihood of the next tokens, their number, and how many are the argmax.

    Token ``t`` is predicted from the logits at ``t - 1``; labels of -100 and each row's first label count for nothing.

    Args:
        logits_BTV: Scores of the vocabulary after each token.
        labels_BT: Token ids aligned with the input, -100 where nothing is to be predicted.
    """
    targets = labels_BT[:, 1:].reshape(-1)
    logits = logits_BTV[:, :-1].reshape(-1, logits_BTV.shape[-1]).float()
    nll = torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
    counted = targets != IGNORE
    correct = ((logits.detach().argmax(-1) == targets) & counted).sum()
    return nll, counted.sum(), correct


def retrieval_ranks(query_ND: Tensor, answer_ND: Tensor, chunk: int = 1024) -> Tensor:
    """Return the rank of each query's own answer among all answers by inner product; 1 is best.

    An answer that ties with the right one counts as half a place, the mean over random orders of the tie, so a model
    that maps everything to one point gets the rank of chance.

    Args:
        query_ND: Embeddings of the queries.
        answer_ND: Embeddings of the answers; row ``i`` answers query ``i``.
        chunk: Queries scored at a time; N * ``chunk`` scores are in memory.
    """
    ranks = []
    for start in range(0, query_ND.shape[0], chunk):
        scores = query_ND[start : start + chunk] @ answer_ND.T
        own = scores.diagonal(offset=start)[:, None]
        better, tied = (scores > own).sum(1), (scores == own).sum(1) - 1
        ranks.append(1 + better + tied / 2)
    return torch.cat(ranks) if ranks else query_ND.new_zeros(0)


def mean_loss() -> MeanMetric:
    """Return a weighted mean that a NaN turns into NaN.

    torchmetrics' default leaves NaN values out, and its ``disable`` leaves out the weights too (1.9).
    """
    return MeanMetric(nan_strategy=float("nan"))


class LanguageModelMetrics(Metric):
    """Mean loss per token in nats, its exponential (perplexity), and the share of tokens predicted exactly."""

    full_state_update = False
    higher_is_better = False
    nll: Tensor
    tokens: Tensor
    correct: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("nll", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("tokens", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("correct", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, nll: Tensor, tokens: Tensor, correct: Tensor) -> None:
        """Add the sums of one batch, as :func:`token_losses` returns them."""
        self.nll += nll.detach()
        self.tokens += tokens
        self.correct += correct

    def compute(self) -> dict[str, Tensor]:
        """Return ``loss``, ``perplexity`` and ``token_accuracy``; NaN if no token was predicted."""
        loss = self.nll / self.tokens
        return {"loss": loss, "perplexity": loss.exp(), "token_accuracy": self.correct / self.tokens}


class RetrievalMetrics(Metric):
    """Mean reciprocal rank and recall among all answers of the split, from embeddings gathered over processes.

    Memory: two N x D float32 matrices and N x 1024 scores.
    """

    full_state_update = False
    higher_is_better = True
    query: list[Tensor]
    answer: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("query", [], dist_reduce_fx="cat")
        self.add_state("answer", [], dist_reduce_fx="cat")

    def update(self, query_BD: Tensor, answer_BD: Tensor) -> None:
        """Add a batch of pairs; row ``i`` of the answers answers row ``i`` of the queries."""
        self.query.append(query_BD.detach().float())
        self.answer.append(answer_BD.detach().float())

    def compute(self) -> dict[str, Tensor]:
        """Return ``mrr``, ``recall_at_1``, ``recall_at_10`` and ``num_candidates``, the number of answers ranked."""
        ranks = retrieval_ranks(dim_zero_cat(self.query), dim_zero_cat(self.answer))
        return {
            "mrr": (1 / ranks).mean(),
            "recall_at_1": (ranks <= 1).float().mean(),
            "recall_at_10": (ranks <= 10).float().mean(),
            "num_candidates": torch.tensor(float(ranks.numel()), device=ranks.device),
        }
