"""One vector per text, trained on pairs so that each query lies nearest to its own answer.

Shapes: B pairs, T tokens, D embedding dimensions.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torchmetrics import Metric

from lightning_peft.errors import ConfigError, suggest
from lightning_peft.models.base import NOT_SAVED, PretrainedModule
from lightning_peft.models.metrics import RetrievalMetrics, mean_loss

__all__ = ["TextEmbedding", "contrastive_loss", "pool"]

POOLINGS = ("mean", "cls", "last")


def pool(hidden_BTD: Tensor, mask_BT: Tensor, pooling: str) -> Tensor:
    """Return one vector per row (B, D): the mean over real tokens, the first real token, or the last.

    Args:
        hidden_BTD: The encoder's last hidden states.
        mask_BT: 1 for real tokens, 0 for padding on either side.
        pooling: ``mean``, ``cls`` (first) or ``last``.

    Example:
        >>> hidden = torch.tensor([[[1.0], [3.0], [9.0]]])
        >>> [pool(hidden, torch.tensor([[1, 1, 0]]), how).item() for how in ("mean", "cls", "last")]
        [2.0, 1.0, 3.0]
    """
    if pooling == "mean":
        weight_BT1 = mask_BT[..., None].to(hidden_BTD.dtype)
        return (hidden_BTD * weight_BT1).sum(1) / weight_BT1.sum(1).clamp(min=1)
    first_B, past_last_B = mask_BT.long().argmax(1), mask_BT.flip(1).long().argmax(1)
    index_B = first_B if pooling == "cls" else mask_BT.shape[1] - 1 - past_last_B
    return hidden_BTD[torch.arange(len(hidden_BTD), device=hidden_BTD.device), index_B]


def contrastive_loss(query_BD: Tensor, answer_BD: Tensor, temperature: float) -> Tensor:
    """Return the symmetric InfoNCE loss of normalised embeddings.

    With scores ``s = query answer^T / temperature``: the mean of the cross-entropy of each row and of each column of
    ``s`` against its diagonal, so every other pair of the batch is a negative in both directions.
    """
    scores_BB = query_BD.float() @ answer_BD.float().T / temperature
    own_B = torch.arange(len(scores_BB), device=scores_BB.device)
    cross_entropy = torch.nn.functional.cross_entropy
    return (cross_entropy(scores_BB, own_B) + cross_entropy(scores_BB.T, own_B)) / 2


class TextEmbedding(PretrainedModule):
    """Text embedding model for retrieval: encoder, pooling, unit length, in-batch contrastive loss.

    A batch is a dict of ``query`` and ``answer``, each a dict of ``input_ids`` and ``attention_mask`` (B, T). The
    larger the batch, the harder the task; with several processes the negatives come from all of them, so the loss is
    that of one process on the joined batch (all must have the same number of pairs, as distributed samplers see to).

    Logged: ``train/loss``; under ``val/`` and ``test/`` the mean ``loss`` of the batches as loaded, and retrieval among
    all N answers of the split: ``mrr`` (mean reciprocal rank), ``recall_at_1``, ``recall_at_10``, ``num_candidates``
    (N). Several sets are told apart by the datamodule's names: ``test_names = ["code_search", "identifiers"]`` gives
    ``test/code_search/mrr`` and ``test/identifiers/mrr``; without names they are ``test/set0/mrr``, ... A single set
    without a name is ``test/mrr``.

    ``predict`` returns the embeddings (B, D) of a batch, or a dict of them for a batch of pairs.

    Args:
        model_name_or_path: Hugging Face id, folder, or ``package:NAME/SUBFOLDER`` inside an installed Python package.
        config: Architecture without weights, in place of ``model_name_or_path``: values with ``model_type``, a file,
            a folder or an id. Weights start at random.
        pooling: From token vectors to one: ``mean``, ``cls`` (first token) or ``last`` (decoders). Take the one that
            the pretrained model was trained with.
        temperature: Divides the cosine similarities in the loss, above 0; lower makes near misses weigh more.
        tokenizer_name_or_path: Where the tokenizer is; None: where the model is.
        dtype: Dtype of the weights in memory. ``float32`` trains best with ``trainer.precision=bf16-mixed``;
            ``bfloat16`` halves memory and rounds small updates away; ``auto`` is the checkpoint's own.
        attn_implementation: ``sdpa``, ``eager``, ``flash_attention_2``, ...; None lets transformers choose.
        gradient_checkpointing: Recompute blocks in the backward pass, from the lowest that trains on: less memory,
            about a third more compute.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Run model code from the hub.
        expected_sha256: sha256 of ``model.safetensors``, checked before loading.
        optimizer: Optimizer class (from Python: anything that takes parameter groups and returns an optimizer).
        lr_scheduler: Schedule class, such as :class:`~lightning_peft.WarmupSchedule`; None keeps the rate constant.
        lr_scheduler_interval: Advance a schedule every optimizer ``step`` or every ``epoch``.
        weight_decay: Decay of weight matrices; None leaves it to the optimizer's own argument. Biases, norms and
            vectors have none.
        no_decay: Globs of further parameter names without decay.

    Raises:
        ConfigError: A value that cannot work, or a model that cannot be found.
        BaseMismatch: The weights file does not have the expected sha256.

    Example:
        >>> tiny = {"model_type": "bert", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
        ...         "num_attention_heads": 2, "vocab_size": 32}
        >>> module = TextEmbedding(config=tiny)
        >>> embedding = module(torch.tensor([[1, 2, 3]]), torch.tensor([[1, 1, 0]]))
        >>> tuple(embedding.shape), round(embedding.norm().item(), 4)
        ((1, 8), 1.0)
    """

    auto_class_name = "AutoModel"
    main_metric = "mrr"

    def __init__(
        self,
        model_name_or_path: str | None = None,
        config: dict[str, Any] | str | None = None,
        pooling: Literal["mean", "cls", "last"] = "mean",
        temperature: float = 0.05,
        tokenizer_name_or_path: str | None = None,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32",
        attn_implementation: str | None = None,
        gradient_checkpointing: bool = False,
        revision: str | None = None,
        trust_remote_code: bool = False,
        expected_sha256: str | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=2e-5),
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_scheduler_interval: Literal["step", "epoch"] = "step",
        weight_decay: float | None = None,
        no_decay: Sequence[str] = (),
    ) -> None:
        super().__init__(
            model_name_or_path=model_name_or_path,
            config=config,
            tokenizer_name_or_path=tokenizer_name_or_path,
            dtype=dtype,
            attn_implementation=attn_implementation,
            gradient_checkpointing=gradient_checkpointing,
            revision=revision,
            trust_remote_code=trust_remote_code,
            expected_sha256=expected_sha256,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            lr_scheduler_interval=lr_scheduler_interval,
            weight_decay=weight_decay,
            no_decay=no_decay,
        )
        self.save_hyperparameters(ignore=NOT_SAVED)
        if pooling not in POOLINGS:
            raise ConfigError(f"TextEmbedding: pooling={pooling!r}. {suggest(str(pooling), POOLINGS)}")
        if not temperature > 0:
            raise ConfigError(f"TextEmbedding: temperature={temperature} must be above 0.")
        self.pooling = pooling
        self.temperature = temperature
        self.build_model()

    def auto_class(self, config: Any) -> str:
        """Return ``AutoModel``, or of an encoder-decoder the encoder alone."""
        return "AutoModelForTextEncoding" if config.is_encoder_decoder else self.auto_class_name

    def model_kwargs(self, auto_class: Any, config: Any) -> dict[str, Any]:
        """Leave out BERT's pooler: nothing here uses it, so its weights would never get a gradient."""
        architecture = auto_class._model_mapping.get(type(config), None)
        if isinstance(architecture, type) and "add_pooling_layer" in inspect.signature(architecture).parameters:
            return {"add_pooling_layer": False}
        return {}

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Return embeddings of unit length (B, D)."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        hidden_BTD = self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs).last_hidden_state
        return torch.nn.functional.normalize(pool(hidden_BTD, attention_mask, self.pooling).float(), dim=-1)

    @torch.no_grad()
    def encode(self, texts: Sequence[str], batch_size: int = 32, max_length: int | None = None) -> Tensor:
        """Return the embeddings of texts (N, D).

        Args:
            texts: What to encode.
            batch_size: Texts per forward pass.
            max_length: Tokens per text, cut beyond; None: the tokenizer's own limit.
        """
        was_training = self.model.training
        self.model.eval()
        parts = []
        for start in range(0, len(texts), batch_size):
            inputs = self.tokenizer(
                list(texts[start : start + batch_size]),
                padding=True,
                truncation=True,
                max_length=max_length,
                return_tensors="pt",
            ).to(self.model.device)
            parts.append(self(inputs["input_ids"], inputs["attention_mask"]))
        self.model.train(was_training)
        return torch.cat(parts)

    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        """Return the contrastive loss of a batch of pairs, with the pairs of all processes."""
        query_BD, answer_BD = self(**batch["query"]), self(**batch["answer"])
        if self.trainer.world_size > 1:
            query_BD, answer_BD = (
                _join_processes(self.all_gather(part, sync_grads=True)) for part in (query_BD, answer_BD)
            )
        loss = contrastive_loss(query_BD, answer_BD, self.temperature)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(query_BD))
        return loss

    def make_metrics(self) -> dict[str, Metric]:
        """Return the mean loss and the retrieval metrics."""
        return {"loss": mean_loss(), "retrieval": RetrievalMetrics()}

    def evaluate(self, batch: dict[str, dict[str, Tensor]], metrics: dict[str, Metric], is_real: Tensor) -> None:
        """Update the metrics with the real pairs of a batch."""
        query_BD, answer_BD = self(**batch["query"])[is_real], self(**batch["answer"])[is_real]
        if len(query_BD) == 0:
            return
        metrics["loss"].update(contrastive_loss(query_BD, answer_BD, self.temperature), weight=len(query_BD))
        metrics["retrieval"].update(query_BD, answer_BD)

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Return the embeddings (B, D) of a batch, or a dict of them for a batch of pairs."""
        if "input_ids" in batch:
            return self(**batch)
        return {name: self(**inputs) for name, inputs in batch.items()}


def _join_processes(part: Any) -> Tensor:
    """Return embeddings (W * B, D) from those gathered over W processes (W, B, D)."""
    return part.reshape(-1, part.shape[-1])
