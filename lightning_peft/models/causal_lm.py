"""A decoder that predicts the next token: pretraining, instruction tuning, text generation.

Shapes: B rows, T tokens, V vocabulary entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.text import SQuAD

from lightning_peft.errors import ConfigError
from lightning_peft.models.base import NOT_SAVED, PretrainedModule
from lightning_peft.models.metrics import IGNORE, LanguageModelMetrics, token_losses

__all__ = ["CausalLM", "prompts_and_responses"]


def prompts_and_responses(batch: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return each row's prompt and response as token ids, without padding.

    The response is the first unbroken run of labels that are not -100, and the prompt all tokens before it. A row
    without any label is all prompt, with an empty response.

    Args:
        batch: ``input_ids`` (B, T), and where present ``attention_mask`` (B, T) and ``labels`` (B, T).
    """
    ids_BT = batch["input_ids"]
    mask_BT = batch.get("attention_mask", torch.ones_like(ids_BT)).bool()
    labels_BT = batch.get("labels", torch.full_like(ids_BT, IGNORE))
    rows = []
    for ids, mask, labels in zip(ids_BT, mask_BT, labels_BT, strict=True):
        ids, labels = ids[mask], labels[mask]
        labelled = (labels != IGNORE).nonzero().flatten()
        start = int(labelled[0]) if len(labelled) else len(ids)
        gaps = (labels[start:] == IGNORE).nonzero().flatten()
        end = start + int(gaps[0]) if len(gaps) else len(ids)
        rows.append((ids[:start], ids[start:end]))
    return rows


class CausalLM(PretrainedModule):
    """Causal language model: next-token loss, perplexity, token accuracy, and generation.

    A batch is a dict of ``input_ids``, ``attention_mask`` and ``labels`` (B, T); labels of -100 carry no loss. The
    training loss is the mean over the tokens of all processes' batches together, so unequal shares of padding weigh
    nothing. Logged: ``train/loss``; ``val/loss``, ``val/perplexity``, ``val/token_accuracy`` and the same under
    ``test/``, each over all tokens of the split; with ``generate_max_new_tokens`` also ``exact_match`` and ``token_f1``
    of the generated responses, after SQuAD's normalisation (case, punctuation, English articles); rows without a prompt
    are left out of these two.

    ``predict`` returns the generated continuation of each prompt.

    Args:
        model_name_or_path: Hugging Face id, folder, or ``package:NAME/SUBFOLDER`` inside an installed Python package.
        config: Architecture without weights, in place of ``model_name_or_path``: values with ``model_type``, a file,
            a folder or an id. Weights start at random.
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
        generate_max_new_tokens: Generate so many tokens per prompt in validation and test to compute generation
            metrics; 0 switches them off.
        predict_max_new_tokens: Longest continuation that ``predict`` generates, in tokens.
        generation: Further arguments of transformers' ``generate``; the default is greedy decoding.

    Raises:
        ConfigError: A value that cannot work, or a model that cannot be found.
        BaseMismatch: The weights file does not have the expected sha256.

    Example:
        >>> tiny = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
        ...         "num_attention_heads": 2, "vocab_size": 32}
        >>> module = CausalLM(config=tiny)
        >>> sum(p.numel() for p in module.parameters())
        1176
    """

    auto_class_name = "AutoModelForCausalLM"

    def __init__(
        self,
        model_name_or_path: str | None = None,
        config: dict[str, Any] | str | None = None,
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
        generate_max_new_tokens: int = 0,
        predict_max_new_tokens: int = 128,
        generation: dict[str, Any] | None = None,
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
        if generate_max_new_tokens < 0 or predict_max_new_tokens < 1:
            raise ConfigError(
                f"CausalLM: generate_max_new_tokens={generate_max_new_tokens} must be 0 or more and "
                f"predict_max_new_tokens={predict_max_new_tokens} 1 or more."
            )
        self.generate_max_new_tokens = generate_max_new_tokens
        self.predict_max_new_tokens = predict_max_new_tokens
        self.generation = {"do_sample": False, **(generation or {})}
        self.build_model()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Return the logits (B, T, V), without those of tokens that a prompt method has put in front."""
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **kwargs).logits
        return logits[:, -input_ids.shape[1] :]

    def _losses(self, batch: dict[str, Tensor], labels_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return token_losses(self(batch["input_ids"], batch.get("attention_mask")), labels_BT)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch, weighted by tokens over all processes."""
        nll, tokens, _ = self._losses(batch, batch["labels"])
        everywhere = tokens.clone()
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(everywhere)
        # Processes average their gradients, so each one's sum is scaled up by their number.
        loss = nll * self.trainer.world_size / everywhere.clamp(min=1)
        self.log("train/loss", (nll / tokens.clamp(min=1)).detach(), prog_bar=True, batch_size=len(batch["labels"]))
        return loss

    def make_metrics(self) -> dict[str, Metric]:
        """Return language-model metrics, and generation metrics if asked for."""
        metrics: dict[str, Metric] = {"language_model": LanguageModelMetrics()}
        if self.generate_max_new_tokens:
            metrics["generation"] = GenerationMetrics()
        return metrics

    def evaluate(self, batch: dict[str, Tensor], metrics: dict[str, Metric], is_real: Tensor) -> None:
        """Update the metrics with the real rows of a batch."""
        labels_BT = batch["labels"].masked_fill(~is_real[:, None], IGNORE)
        metrics["language_model"].update(*self._losses(batch, labels_BT))
        if "generation" in metrics:
            pairs = zip(prompts_and_responses(batch), is_real.tolist(), strict=True)
            rows = [row for row, real in pairs if real and len(row[0]) and len(row[1])]
            texts = self._generate([prompt for prompt, _ in rows], self.generate_max_new_tokens) if rows else []
            metrics["generation"].update(texts, self._decode([response for _, response in rows]))

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> list[str]:
        """Return the generated continuation of each prompt of the batch."""
        prompts = [prompt for prompt, _ in prompts_and_responses(batch)]
        if any(len(prompt) == 0 for prompt in prompts):
            raise ConfigError("predict needs prompts, but a row has labels from its first token on and so no prompt.")
        return self._generate(prompts, self.predict_max_new_tokens)

    def complete(self, prompts: Sequence[str], max_new_tokens: int | None = None) -> list[str]:
        """Return the model's continuation of each text.

        Args:
            prompts: Texts, tokenised as they are.
            max_new_tokens: Longest continuation in tokens; None: ``predict_max_new_tokens``.
        """
        ids = [torch.tensor(self.tokenizer(prompt)["input_ids"], device=self.model.device) for prompt in prompts]
        return self._generate(ids, max_new_tokens or self.predict_max_new_tokens)

    @torch.no_grad()
    def _generate(self, prompts: Sequence[Tensor], max_new_tokens: int) -> list[str]:
        """Return continuations of prompts of any length; they are padded on the left, as generation needs it."""
        pad_id: Any = self.tokenizer.pad_token_id
        length = max(len(prompt) for prompt in prompts)
        ids_BT = torch.stack([torch.nn.functional.pad(p, (length - len(p), 0), value=pad_id) for p in prompts])
        mask_BT = torch.stack([torch.nn.functional.pad(torch.ones_like(p), (length - len(p), 0)) for p in prompts])
        was_training = self.model.training
        self.model.eval()
        try:
            output = self.model.generate(  # pyright: ignore[reportCallIssue]
                input_ids=ids_BT,
                attention_mask=mask_BT,
                max_new_tokens=max_new_tokens,
                pad_token_id=pad_id,
                **self.generation,
            )
        finally:
            self.model.train(was_training)
        return self._decode(output[:, length:])

    def _decode(self, ids: Any) -> list[str]:
        return [str(self.tokenizer.decode(row.tolist(), skip_special_tokens=True)) for row in ids]


class GenerationMetrics(Metric):
    """Exact match and token F1 of generated texts, in [0, 1]: torchmetrics' SQuAD metric on plain strings."""

    full_state_update = False
    higher_is_better = True
    num_texts: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.squad = SQuAD(**kwargs)
        self.add_state("num_texts", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, generated: list[str], expected: list[str]) -> None:
        """Add the texts of one batch."""
        self.num_texts += len(generated)
        self.squad.update(
            [{"prediction_text": text, "id": str(index)} for index, text in enumerate(generated)],
            [
                {"answers": {"text": [text], "answer_start": [0]}, "id": str(index)}
                for index, text in enumerate(expected)
            ],
        )

    def compute(self) -> dict[str, Tensor]:
        """Return ``exact_match`` and ``token_f1``.

        Raises:
            ConfigError: No text was generated, because no row had a prompt and a response.
        """
        if not self.num_texts:
            raise ConfigError(
                "generate_max_new_tokens asks for generated responses, but no row has a prompt (labels of -100) and a "
                "response after it. Use data of prompts and responses, or set generate_max_new_tokens to 0."
            )
        result = self.squad.compute()
        return {"exact_match": result["exact_match"] / 100, "token_f1": result["f1"] / 100}
