"""BA-LoRA: PiSSA with three regularisers of the model's outputs, against what it inherits from pretraining.

With the logits of all tokens that carry a loss as the rows of ``Z`` (N x V), those of the model as it started in ``Y``,
the loss gains

    consistency * T^2 mean_n KL(softmax(Y_n / T) || softmax(Z_n / T))    knowledge is kept
  - diversity * mean_n entropy(softmax(Z_n))                             predictions do not collapse
  - spectrum * (s_1 + ... + s_k) / |Z|_F                                 singular values of Z: noise is not fitted

Y. Chang, Y. Chang, Y. Wu, arXiv:2408.04556.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from lightning_peft.adapters.adapter import Adapter
from lightning_peft.adapters.drivers import Driver, entry_of, lora_layers
from lightning_peft.adapters.injection import Injected
from lightning_peft.adapters.presets import lora_config
from lightning_peft.errors import ConfigError
from lightning_peft.methods.arguments import is_number, is_whole

__all__ = ["BALoRA", "BALoRADriver", "consistency_loss", "diversity_loss", "spectrum_loss"]

_IGNORE = -100


def consistency_loss(logits_NV: Tensor, reference_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """Return ``T^2`` times the mean divergence of the predictions from those of the reference."""
    ours = functional.log_softmax(logits_NV / temperature, -1)
    theirs = functional.log_softmax(reference_NV / temperature, -1)
    return temperature**2 * functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def diversity_loss(logits_NV: Tensor, top_tokens: int | None = None) -> Tensor:
    """Return minus the mean entropy of the predictions, among the ``top_tokens`` likeliest tokens of each if given."""
    if top_tokens is not None:
        logits_NV = logits_NV.topk(min(top_tokens, logits_NV.shape[-1]), -1).values
    logs = functional.log_softmax(logits_NV, -1)
    return (logs.exp() * logs).sum(-1).mean()


def spectrum_loss(logits_NV: Tensor, top_singular: int) -> Tensor:
    """Return minus the sum of the largest singular values over the Frobenius norm.

    The values are roots of eigenvalues of the smaller Gram matrix: no decomposition of the size of the vocabulary.
    """
    gram = logits_NV @ logits_NV.T if logits_NV.shape[0] <= logits_NV.shape[1] else logits_NV.T @ logits_NV
    largest = torch.linalg.eigvalsh(gram)[-top_singular:].clamp_min(torch.finfo(gram.dtype).tiny)
    return -largest.sqrt().sum() / torch.linalg.matrix_norm(logits_NV).clamp_min(1e-8)


class BALoRADriver(Driver):
    """Look at the model's outputs in training, run it a second time as it started, and add the regularisers.

    The reference run is in evaluation mode, without gradients and with the adapter's factors at their start, whatever
    initialisation changed the base for them.

    Args:
        adapter: A LoRA.
        labels: Key or position in the batch of the labels; -100 carries no loss.
        consistency: Weight.
        diversity: Weight.
        spectrum: Weight.
        temperature: Of the divergence.
        top_tokens: Of the entropy.
        top_singular: Singular values that are favoured.
    """

    adds_loss = True
    sees_whole_parameters = True

    def __init__(
        self,
        adapter: Injected,
        labels: str | int,
        consistency: float,
        diversity: float,
        spectrum: float,
        temperature: float,
        top_tokens: int | None,
        top_singular: int,
    ) -> None:
        super().__init__(adapter.handle, adapter.adapter_name)
        self.labels = labels
        self.consistency, self.diversity, self.spectrum = consistency, diversity, spectrum
        self.temperature, self.top_tokens, self.top_singular = temperature, top_tokens, top_singular
        self._model: nn.Module = self.handle.get_base_model()
        layers = lora_layers(self.handle, self.adapter_name)
        parts = [(path, (layer.lora_A, layer.lora_B)) for path, layer in layers.items()]
        self._factors: list[nn.Parameter] = [part[self.adapter_name].weight for _, pair in parts for part in pair]
        self._starts: list[Tensor] = [factor for path, _ in parts for factor in adapter.initial_factors[path]]
        self._batch: Any = None
        self._seen: list[tuple[Tensor, Tensor | None]] | None = None
        self._model.register_forward_hook(self._after_forward, with_kwargs=True)

    @override
    def batch(self, batch: Any) -> None:
        self._batch, self._seen = batch, []

    @override
    def finished(self) -> None:
        self._batch, self._seen = None, None

    def _after_forward(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if self._seen is None or not model.training or not torch.is_grad_enabled():
            return
        seen, self._seen = self._seen, None
        reference = None
        if self.consistency > 0:
            with torch.no_grad(), self._as_it_started():
                reference = _logits(model(*args, **{key: v for key, v in kwargs.items() if key != "labels"}))
        seen.append((_logits(output), reference))
        self._seen = seen

    @contextmanager
    def _as_it_started(self) -> Iterator[None]:
        training = [module for module in self._model.modules() if module.training]
        present = [factor.data for factor in self._factors]
        self._starts[:] = [start.to(now) for start, now in zip(self._starts, present, strict=True)]
        try:
            self._model.eval()
            for factor, start in zip(self._factors, self._starts, strict=True):
                factor.data = start
            yield
        finally:
            for factor, now in zip(self._factors, present, strict=True):
                factor.data = now
            for module in training:
                module.training = True

    @override
    def loss(self) -> Tensor:
        """The weighted sum, in float32."""
        seen, self._seen = self._seen or [], None
        if len(seen) != 1:
            raise ConfigError(
                f"BALoRA looks at the logits of one call of the target per training step, and there were {len(seen)}."
            )
        (logits, reference), labels = seen[0], torch.as_tensor(entry_of(self._batch, self.labels, "labels"))
        if logits.ndim != 3 or labels.shape != logits.shape[:2]:
            raise ConfigError(
                f"BALoRA needs logits (rows, tokens, vocabulary) and labels (rows, tokens) of a language model; these "
                f"are {tuple(logits.shape)} and {tuple(labels.shape)}."
            )
        if not getattr(getattr(self._model, "config", None), "is_encoder_decoder", False):
            labels = functional.pad(labels[:, 1:], (0, 1), value=_IGNORE)  # logits are of the next token
        chosen = labels != _IGNORE
        with torch.autocast(logits.device.type, enabled=False):
            z_NV = logits[chosen].float()
            if len(z_NV) == 0:
                return z_NV.sum()
            terms = []
            if reference is not None:
                terms.append(self.consistency * consistency_loss(z_NV, reference[chosen].float(), self.temperature))
            if self.diversity > 0:
                terms.append(self.diversity * diversity_loss(z_NV, self.top_tokens))
            if self.spectrum > 0:
                terms.append(self.spectrum * spectrum_loss(z_NV, self.top_singular))
            return torch.stack(terms).sum() if terms else z_NV.new_zeros(())


def _logits(output: Any) -> Tensor:
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if logits is None:
        raise ConfigError(f"BALoRA: the target gives a {type(output).__name__} without logits.")
    return logits


class BALoRA(Adapter):
    """Train PiSSA, and keep the model's predictions near those it started with, diverse, and of low rank.

    A second forward pass per micro-batch, without gradients, and logits of it; parameters and optimizer state are
    LoRA's. The adapter alone does not fit the original base: export converts it, or merge it.

    Use it where a language model has inherited noise or imbalance from pretraining, and fine-tuning makes it worse.

    Args:
        rank: Of the update.
        consistency: Weight of the divergence from the model at its start, 0 or more; 0 saves the second pass.
        diversity: Weight of the entropy, 0 or more.
        spectrum: Weight of the share of the largest singular values, 0 or more.
        temperature: Of the divergence, above 0.
        top_tokens: The entropy is over so many likeliest tokens; None: over all.
        top_singular: Singular values that are favoured, 1 or more.
        labels: Where in the batch the labels are: key of a mapping, or position in a sequence. -100 carries no loss.
        iterations: Of PiSSA's fast randomised decomposition; None takes the exact one.
        layers: Which layers get one, as a scope.
        target: Path of the submodule that gets the adapters: a language model whose output has logits.
        adapter_name: Name of the adapter.
        always: What trains beside it although it lies inside the target.
        seed: Of the randomised decomposition.

    Raises:
        ConfigError: If an argument is out of its range. From a step, if the target is called more than once or gives
            no logits of tokens.
        UnsupportedStrategy: From the fit, if the strategy shards parameters.

    Example:
        >>> from lightning_peft import BALoRA
        >>> BALoRA(rank=4).config["init_lora_weights"]
        'pissa'

    Paper:
        Y. Chang, Y. Chang, Y. Wu: BA-LoRA: Bias-Alleviating Low-Rank Adaptation to Mitigate Catastrophic Inheritance in
        Large Language Models, ICLR 2026, arXiv:2408.04556.

    Differs from the paper:
        For generation only, not for classification. Weights stay as they are, where the authors' script lets them rise
        and fall. Logits count that predict a label; the authors' code takes those one token later. Each process
        regularises its own micro-batch.
    """

    def __init__(
        self,
        rank: int = 8,
        consistency: float = 0.025,
        diversity: float = 0.005,
        spectrum: float = 0.005,
        temperature: float = 2.0,
        top_tokens: int | None = 20,
        top_singular: int = 10,
        labels: str | int = "labels",
        iterations: int | None = None,
        layers: str | list[str] = "blocks",
        target: str = "model",
        adapter_name: str = "default",
        always: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        weights = {"consistency": consistency, "diversity": diversity, "spectrum": spectrum}
        wrong = [f"{name}={value!r} is no number from 0 on" for name, value in weights.items() if not _is_weight(value)]
        if not is_number(temperature) or temperature <= 0:
            wrong.append(f"temperature={temperature!r} is not above 0")
        counts = {"top_tokens": top_tokens, "top_singular": top_singular}
        wrong += [
            f"{name}={value!r} is no whole number from 1 on"
            for name, value in counts.items()
            if not (is_whole(value, 1) or (value is None and name == "top_tokens"))
        ]
        if wrong:
            raise ConfigError(f"BALoRA: {'; '.join(wrong)}.")
        self.rank, self.consistency, self.diversity, self.spectrum = rank, consistency, diversity, spectrum
        self.temperature, self.top_tokens, self.top_singular = temperature, top_tokens, top_singular
        self.labels, self.iterations = labels, iterations
        init = "pissa" if iterations is None else f"pissa_niter_{iterations}"
        super().__init__("lora", lora_config(rank, rank, 0.0, init), target, layers, adapter_name, always, seed)

    @override
    def make_driver(self, adapter: Injected) -> Driver:
        return BALoRADriver(
            adapter,
            self.labels,
            self.consistency,
            self.diversity,
            self.spectrum,
            self.temperature,
            self.top_tokens,
            self.top_singular,
        )


def _is_weight(value: Any) -> bool:
    return is_number(value) and value >= 0
