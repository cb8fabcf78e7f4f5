"""NTK-Attention: attention with a prefix of unbounded length, which needs no tokens.

``out = (exp(q K^T / sqrt(d)) V + phi(q) Z) / (exp(q K^T / sqrt(d)) 1 + phi(q) |k|)`` with
``phi(q) = elu(q / d^(1/4)) + 1``: what a prefix of m trained tokens adds to numerator and denominator depends on the
query alone, and is approximated by a matrix Z (d, d) and a vector k (d) per head, whatever m is. Y. Liang, Z. Shi,
Z. Song and C. Yang, EMNLP 2025, arXiv:2406.14036.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lightning_peft.adapters.adapter import Adapter
from lightning_peft.adapters.native.bottleneck import PLACES
from lightning_peft.adapters.native.features import FeatureLayer
from lightning_peft.adapters.native.tuner import NativeConfig, NativeTuner, register
from lightning_peft.errors import ConfigError

__all__ = ["NTKAttention", "NTKAttentionConfig", "ntk_attention"]

_NAME = "lightning_peft_ntk"
_LINK = "_lightning_peft_ntk_layer"


@dataclass
class NTKAttentionConfig(NativeConfig):
    """NTK-Attention: a trained matrix and vector per attention head. Targets are attention modules of transformers.

    Args:
        init_std: Standard deviation of Z and k at the start. Above 0: at k = 0 the absolute value has no gradient.

    Paper: Y. Liang et al. 2024, arXiv:2406.14036, algorithm 2.
    """

    init_std: float = field(default=1e-4)

    method: ClassVar[str] = "ntk_attention"
    places: ClassVar[dict[str, str]] = {"attention": PLACES["parallel"]["attention"]}

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_number("init_std", 0.0, float("inf"), low_included=False)
        if self.dropout:
            raise ConfigError("NTKAttentionConfig: dropout has no meaning here, the adapter has no input of its own.")


def ntk_attention(scores: Tensor, query: Tensor, value: Tensor, Z: Tensor, k: Tensor, dropout: float = 0.0) -> Tensor:
    """Return attention with what Z and k add, (rows, heads, queries, d).

    Args:
        scores: Scaled and masked, (rows, heads, queries, keys); the lowest number of their dtype, or less, is masked.
        query: (rows, heads, queries, d).
        value: (rows, heads, keys, d).
        Z: (heads, d, d).
        k: (heads, d), used by its absolute value.
        dropout: On the weights of tokens.
    """
    scores, query = scores.float(), query.float()
    largest = scores.amax(-1, keepdim=True)
    nothing = largest <= torch.finfo(scores.dtype).min / 2  # a query that sees no token, such as padding
    beside = torch.where(nothing, 0.0, torch.exp(-largest.clamp(min=-80.0)))
    phi = functional.elu(query / query.shape[-1] ** 0.25) + 1.0
    weights = torch.exp(scores - largest)
    total = weights.sum(-1, keepdim=True) + beside * (phi @ k.float().abs()[..., None])
    weights = functional.dropout(weights / total, dropout)
    return (weights.to(value.dtype) @ value + (beside * (phi @ Z.float()) / total).to(value.dtype)).contiguous()


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers' attention modules call while an adapter of theirs is active."""
    (layer,) = module.__dict__[_LINK]
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is not None:
        attention_mask = attention_mask[..., : key.shape[2]]
    elif layer.implementation == "sdpa" and query.shape[2] > 1 and causal:  # which sdpa is told by a flag
        attention_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.float().masked_fill(~attention_mask, torch.finfo(torch.float32).min)
    elif attention_mask is not None:
        scores = scores.float() + attention_mask.float()
    names = [name for name in layer.active_adapters if name in layer.settings]
    Z = torch.stack([layer.tensor("Z", name) for name in names]).sum(0)
    k = torch.stack([layer.tensor("k", name).abs() for name in names]).sum(0)
    if query.shape[1] != Z.shape[0] or query.shape[-1] != Z.shape[-1]:
        raise ConfigError(
            f"{type(module).__name__} attends with {query.shape[1]} heads of {query.shape[-1]} features; its "
            f"configuration says {Z.shape[0]} of {Z.shape[-1]}. NTK-Attention does not fit it."
        )
    return ntk_attention(scores, query, value, Z, k, dropout).transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(_NAME, _attend)


class NTKAttentionLayer(FeatureLayer):
    """A frozen attention module whose attention function is exchanged while it runs."""

    prefix = "ntk_attention_"
    trained = ("Z", "k")

    def measure(self, path: str) -> tuple[str, int, int]:
        """Return the number of heads and the features of one."""
        base: Any = self.get_base_layer()
        source = sys.modules[type(base).__module__]
        inside = (m for m in base.modules() if hasattr(getattr(m, "config", None), "_attn_implementation"))
        self._attending: tuple[Any, ...] = tuple(inside)
        if not self._attending or not hasattr(source, "ALL_ATTENTION_FUNCTIONS"):
            raise ConfigError(
                f"{path} is a {type(base).__name__}; NTK-Attention needs an attention module of transformers, one that "
                "looks its attention function up (ALL_ATTENTION_FUNCTIONS)."
            )
        config = self._attending[-1].config
        heads = config.num_attention_heads
        size = getattr(self._attending[-1], "head_dim", None) or getattr(config, "head_dim", None)
        return "attention", heads, size or config.hidden_size // heads

    @property
    def implementation(self) -> str:
        """What computes attention without the adapter."""
        return self._attending[-1].config._attn_implementation if self._original is None else self._original

    _original: str | None = None

    def shapes(self, config: Any) -> dict[str, tuple[int, ...]]:
        """Return a matrix and a vector per head."""
        heads, size = self.out_features, self.in_features
        return {"Z": (heads, size, size), "k": (heads, size)}

    def initial(self, config: Any, weight_OI: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Return small normal values."""
        return {
            role: torch.randn(shape, generator=generator, dtype=torch.float64) * config.init_std
            for role, shape in self.shapes(config).items()
        }

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the attention module with the other attention function.

        Raises:
            ConfigError: If the model computes attention by a kernel whose masks are of a kind of its own.
        """
        if self.disable_adapters or not any(name in self.settings for name in self.active_adapters):
            return self.base_layer(*args, **kwargs)
        if self.implementation not in ("eager", "sdpa"):
            raise ConfigError(
                f"attn_implementation={self.implementation!r}: NTK-Attention computes attention itself, with masks as "
                "they are made for 'sdpa' and 'eager'. Load the model with one of these."
            )
        with self._exchanged():
            return self.base_layer(*args, **kwargs)

    @contextmanager
    def _exchanged(self) -> Iterator[None]:
        configs = [module.config for module in self._attending]
        self._original = configs[-1]._attn_implementation
        try:
            for module, config in zip(self._attending, configs, strict=True):
                module.config = copy.copy(config)
                module.config._attn_implementation_internal = _NAME
                module.__dict__[_LINK] = (self,)
            yield
        finally:
            self._original = None
            for module, config in zip(self._attending, configs, strict=True):
                module.config = config
                module.__dict__.pop(_LINK, None)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse.

        Raises:
            ConfigError: Always: it is another attention function.
        """
        raise ConfigError("NTK-Attention cannot be merged: it is another attention function, not part of any weight.")


class NTKAttentionTuner(NativeTuner):
    """Puts NTK-Attention into a model."""

    prefix = "ntk_attention_"
    tuner_layer_cls = NTKAttentionLayer


register("ntk_attention", NTKAttentionConfig, NTKAttentionTuner)


class NTKAttention(Adapter):
    """Train a matrix and a vector per attention head that stand for a prefix of unbounded length.

    ``heads * (d² + d)`` parameters per attention with heads of d features. The sequence stays as long as it is, but
    attention is computed in plain steps, without fused kernels: memory for its weights is quadratic in the length. It
    starts next to the base, not at it, and cannot be merged.

    Use it instead of prefix tuning where long prefixes would help and cannot be paid.

    Args:
        init_std: Standard deviation of both at the start, above 0.
        layers: Attention modules of a transformers model: ``"attention"``, or a scope of modules.
        target: Path of the submodule that gets the adapters.
        adapter_name: Name of the adapter.
        always: What trains beside it although it lies inside the target.
        seed: Of the initial values.

    Raises:
        ConfigError: If a module is no attention of transformers, or the model does not compute attention by ``"sdpa"``
            or ``"eager"``.

    Example:
        >>> from lightning_peft import NTKAttention
        >>> NTKAttention().method
        'ntk_attention'

    Paper:
        Y. Liang, Z. Shi, Z. Song, C. Yang: Towards Infinite-Long Prefix in Transformer, EMNLP 2025, arXiv:2406.14036,
        algorithm 2.

    Differs from the paper:
        The matrix is always whole, not a product of two of low rank.
    """

    def __init__(
        self,
        init_std: float = 1e-4,
        layers: str | list[str] = "attention",
        target: str = "model",
        adapter_name: str = "default",
        always: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        self.init_std = init_std
        config: dict[str, Any] = {"init_std": init_std, "seed": seed}
        super().__init__("ntk_attention", config, target, layers, adapter_name, always, seed)
