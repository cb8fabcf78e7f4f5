"""One label per text: a Hugging Face encoder or decoder with a classification head.

Shapes: B rows, T tokens, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from lightning_peft.errors import ConfigError
from lightning_peft.models.base import NOT_SAVED, PretrainedModule
from lightning_peft.models.metrics import mean_loss

__all__ = ["SequenceClassification"]


class SequenceClassification(PretrainedModule):
    """Text classification: cross-entropy, accuracy and macro F1.

    A batch is a dict of ``input_ids``, ``attention_mask`` (B, T) and ``labels`` (B,), class numbers from 0. Logged:
    ``train/loss``; ``val/loss``, ``val/accuracy``, ``val/f1_macro`` and the same under ``test/``, each over all rows of
    the split. ``predict`` returns ``labels`` (B,) and ``probabilities`` (B, C).

    The number of classes is ``num_labels``; where that is None, the datamodule's attribute ``num_labels``, read when a
    Trainer run begins (after the datamodule's ``setup``), so the model then exists only from ``configure_model`` on.
    It is saved with the hyperparameters: ``load_from_checkpoint`` needs no data.

    Args:
        model_name_or_path: Hugging Face id, folder, or ``package:NAME/SUBFOLDER`` inside an installed Python package.
        config: Architecture without weights, in place of ``model_name_or_path``: values with ``model_type``, a file,
            a folder or an id. Weights start at random.
        num_labels: Number of classes, 2 or more; None: the datamodule's.
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
        ConfigError: A value that cannot work, a model that cannot be found, or a number of classes that nothing says
            or that differs from the data's.
        BaseMismatch: The weights file does not have the expected sha256.

    Example:
        >>> tiny = {"model_type": "bert", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
        ...         "num_attention_heads": 2, "vocab_size": 32}
        >>> module = SequenceClassification(config=tiny, num_labels=3)
        >>> tuple(module(torch.tensor([[1, 2, 3]])).shape)
        (1, 3)
    """

    auto_class_name = "AutoModelForSequenceClassification"
    main_metric = "accuracy"
    has_new_head = True

    def __init__(
        self,
        model_name_or_path: str | None = None,
        config: dict[str, Any] | str | None = None,
        num_labels: int | None = None,
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
        self.num_labels = num_labels
        if num_labels is not None:
            self._build(num_labels)

    def _build(self, num_labels: int) -> None:
        if num_labels < 2:
            raise ConfigError(f"SequenceClassification: num_labels={num_labels}, but 2 classes or more are needed.")
        self.num_labels = num_labels
        self.hparams["num_labels"] = num_labels
        self.build_model(num_labels=num_labels)
        config = self.model.config
        if config.pad_token_id is None and not config.is_encoder_decoder and self._has_tokenizer:
            config.pad_token_id = self.tokenizer.pad_token_id  # a decoder reads its last token before the padding

    @property
    def _has_tokenizer(self) -> bool:
        return bool(self._tokenizer_name or self._name or isinstance(self._config, str))

    def setup(self, stage: str) -> None:
        """Compare the number of classes with the data's."""
        in_data = self._num_labels_of_data()
        if self.num_labels is not None and in_data is not None and in_data != self.num_labels:
            raise ConfigError(f"The model has num_labels={self.num_labels}, but the data has {in_data} classes.")

    def configure_model(self) -> None:
        """Build the model if it had to wait for the data's number of classes."""
        if self.is_built or self._trainer is None:
            return
        in_data = self._num_labels_of_data()
        if in_data is None:
            raise ConfigError(
                "SequenceClassification: the number of classes is unknown. Give num_labels, or use a datamodule with "
                "an attribute num_labels."
            )
        self._build(in_data)

    def _num_labels_of_data(self) -> int | None:
        return getattr(getattr(self.trainer, "datamodule", None), "num_labels", None)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Return the logits (B, C)."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs).logits

    def _logits(self, batch: dict[str, Tensor]) -> Tensor:
        return self(**{key: value for key, value in batch.items() if key != "labels"}).float()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the mean cross-entropy of a batch."""
        loss = torch.nn.functional.cross_entropy(self._logits(batch), batch["labels"])
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch["labels"]))
        return loss

    def make_metrics(self) -> dict[str, Metric]:
        """Return loss, accuracy and macro F1."""
        num_classes = self.num_labels
        assert num_classes is not None
        return {
            "loss": mean_loss(),
            "accuracy": MulticlassAccuracy(num_classes, average="micro"),
            "f1_macro": MulticlassF1Score(num_classes, average="macro"),
        }

    def evaluate(self, batch: dict[str, Tensor], metrics: dict[str, Metric], is_real: Tensor) -> None:
        """Update the metrics with the real rows of a batch."""
        logits, labels = self._logits(batch)[is_real], batch["labels"][is_real]
        if len(labels) == 0:
            return
        metrics["loss"].update(torch.nn.functional.cross_entropy(logits, labels), weight=len(labels))
        metrics["accuracy"].update(logits, labels)
        metrics["f1_macro"].update(logits, labels)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Return ``labels`` (B,) and ``probabilities`` (B, C)."""
        probabilities = self._logits(batch).softmax(-1)
        return {"labels": probabilities.argmax(-1), "probabilities": probabilities}
