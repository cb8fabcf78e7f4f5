"""Bottleneck adapters: two small projections and a nonlinearity after a frozen module, or beside it.

``y + s · W_up f(W_down h)`` where ``h`` is the module's output ``y`` (series; Houlsby et al. 2019, arXiv:1902.00751) or
its input (parallel; He et al. 2022, arXiv:2110.04366, table 1). W_up starts at zero, so that the model starts as its
base. Both forms on language models: LLM-Adapters, Hu et al. 2023, arXiv:2304.01933.

Shapes: W_down (r, in), W_up (out, r).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from lightning_peft.adapters.adapter import Adapter
from lightning_peft.adapters.native.features import FeatureLayer, axes_after_features, is_layer
from lightning_peft.adapters.native.tuner import NativeConfig, NativeTuner, register
from lightning_peft.errors import ConfigError

__all__ = ["ACTIVATIONS", "BottleneckConfig", "BottleneckLayer", "ParallelAdapter", "SeriesAdapter"]

ACTIVATIONS: dict[str, Any] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "tanh": torch.tanh,
    "none": lambda h: h,
}
_ATTENTION = r"(.*\.)?[^.]*(attn|attention)[^.]*"
PLACES: dict[str, dict[str, str]] = {
    "series": {  # the projections that end a sublayer
        "attention": rf"{_ATTENTION}\.(.*\.)?(o_proj|out_proj|c_proj|proj|dense|out_lin|wo|o)",
        "feed_forward": rf"(?!{_ATTENTION}\.)((.*\.)?(down_proj|fc2|c_proj|dense_4h_to_h|fc_out|lin2|linear2|w2|wo)"
        r"|.*\.output\.dense)",
    },
    "parallel": {  # the sublayers themselves
        "attention": r"(.*\.)?(self_|cross_)?(attn|attention|selfattention|encdecattention|encoder_attn)",
        "feed_forward": r"(.*\.)?(mlp|ffn|ff|feed_forward|densereludense)",
    },
}


@dataclass
class BottleneckConfig(NativeConfig):
    """Bottleneck adapters: down-projection, nonlinearity, up-projection, after or beside frozen modules.

    Args:
        r: Width of the bottleneck, at least 1.
        form: ``"series"``: from the module's output; ``"parallel"``: from its input.
        activation: ``"relu"``, ``"gelu"``, ``"silu"``, ``"tanh"`` or ``"none"``.
        scaling: What the up-projection is multiplied by: 1 for series adapters, 4 for scaled parallel ones.
        use_bias: Whether both projections have a bias.
        width: Features that go into and come out of a target that is not a single layer; None: those of the first and
            last linear layer or convolution in it.

    Papers: Houlsby et al. 2019, arXiv:1902.00751; He et al. 2022, arXiv:2110.04366; Hu et al. 2023, arXiv:2304.01933.

    Differs from the papers: W_up starts at zero and W_down uniform as LoRA's A, as He et al. do; Houlsby et al. draw
    both with a standard deviation of 0.01.
    """

    r: int = field(default=64)
    form: Literal["series", "parallel"] = field(default="series")
    activation: str = field(default="relu")
    scaling: float = field(default=1.0)
    use_bias: bool = field(default=True)
    width: int | None = field(default=None)

    method: ClassVar[str] = "bottleneck"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_rank()
        self._check_choice("form", ("series", "parallel"))
        self._check_choice("activation", tuple(ACTIVATIONS))
        self._check_number("scaling", 0.0, float("inf"), low_included=False)
        if self.width is not None and (not isinstance(self.width, int) or self.width < 1):
            raise ConfigError(f"{type(self).__name__}: width={self.width!r} is no number of features.")

    @property
    def places(self) -> dict[str, str]:
        """What ``"attention"`` and ``"feed_forward"`` stand for as targets: patterns of module paths."""
        return PLACES[self.form]


class BottleneckLayer(FeatureLayer):
    """A frozen module with bottleneck adapters after or beside it."""

    prefix = "bottleneck_"
    trained = ("down", "down_bias", "up", "up_bias")

    def measure(self, path: str) -> tuple[str, int, int]:
        """Return how many features come out of the module and go into it, by its first and last layer."""
        base: Any = self.get_base_layer()
        if type(base).__name__ == "NonDynamicallyQuantizableLinear":
            raise ConfigError(
                f"{path} is the output projection of a torch.nn.MultiheadAttention, which reads its weight without "
                f"calling it: an adapter would have no effect. Name {path.rpartition('.')[0]!r}, the whole attention."
            )
        inside = [module for module in base.modules() if is_layer(module)] or [base]
        self._end = (inside[-1],)  # in a tuple, which registers nothing
        kind = "conv" if any(isinstance(module, nn.modules.conv._ConvNd) for module in inside) else "module"
        return kind, _widths(inside[-1], path)[0], _widths(inside[0], path)[1]

    def check_fit(self, config: Any, path: str) -> None:
        """Raise a ``ConfigError`` for a parallel adapter beside a convolution."""
        if config.form == "parallel" and self.kind == "conv":
            raise ConfigError(
                f"{path} has convolutions, which change the size of a picture: no adapter fits beside it. Use "
                "form='series'."
            )

    def sizes(self, config: Any) -> tuple[int, int]:
        """Return how many features go into the adapter and come out of it."""
        if config.width is not None:
            return config.width, config.width
        return (self.out_features if config.form == "series" else self.in_features), self.out_features

    def shapes(self, config: Any) -> dict[str, tuple[int, ...]]:
        """Return the shapes of both projections and their biases."""
        features_in, features_out = self.sizes(config)
        shapes: dict[str, tuple[int, ...]] = {"down": (config.r, features_in), "up": (features_out, config.r)}
        return {**shapes, "down_bias": (config.r,), "up_bias": (features_out,)} if config.use_bias else shapes

    def initial(self, config: Any, weight_OI: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Return a uniform down-projection; the rest is zero."""
        shape = self.shapes(config)["down"]
        return {"down": (torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1) / math.sqrt(shape[1])}

    def projections(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """Return W_down (r, in) and W_up (out, r)."""
        return self.tensor("down", adapter_name), self.tensor("up", adapter_name)

    def change(self, adapter_name: str, x: Tensor, y: Tensor) -> Tensor:
        """Return ``y + s W_up f(W_down h + b_down) + s b_up``, along the axis of the features."""
        config: Any = self.settings[adapter_name]
        axis = -1 - axes_after_features(self._end[0], y.ndim)
        down, up = (matrix.to(y.dtype) for matrix in self.projections(adapter_name))
        h = (y if config.form == "series" else x.to(y.dtype)).movedim(axis, -1)
        if h.shape[-1] != down.shape[1] or y.shape[axis] != len(up):
            raise ConfigError(
                f"A {type(self.get_base_layer()).__name__} takes {x.shape[-1]} features and returns "
                f"{y.shape[axis]}; its adapter was made for {down.shape[1]} and {len(up)}. Say width=."
            )
        h = functional.dropout(h, config.dropout, self.training)
        h = ACTIVATIONS[config.activation](functional.linear(h, down, self._bias("down_bias", adapter_name, y)))
        h = functional.linear(h, up, self._bias("up_bias", adapter_name, y))
        return y + config.scaling * h.movedim(-1, axis).to(y.dtype)

    def _bias(self, role: str, adapter_name: str, y: Tensor) -> Tensor | None:
        biases: nn.ParameterDict = getattr(self, self.prefix + role)
        return biases[adapter_name].to(y.dtype) if adapter_name in biases else None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: what is between the projections is not linear."""
        raise NotImplementedError("a bottleneck with a nonlinearity is not a weight; keep the adapter beside the base")

    def unmerge(self) -> None:
        """Do nothing: nothing was merged."""


def _widths(layer: Any, path: str) -> tuple[int, int]:
    """Return how many features come out of a layer and go into it; a norm or an embedding has one width."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    if isinstance(layer, nn.modules.conv._ConvNd):
        return layer.out_channels, layer.in_channels
    if isinstance(layer, Conv1D):
        return int(layer.weight.shape[1]), int(layer.weight.shape[0])
    weight = getattr(layer, "weight", None)
    if isinstance(weight, Tensor) and weight.ndim in (1, 2):
        return int(weight.shape[-1]), int(weight.shape[-1])
    raise ConfigError(
        f"{path} is a {type(layer).__name__} without linear layers or convolutions: how wide an adapter after or "
        "beside it is cannot be told. Name a module with a layer in it."
    )


class BottleneckTuner(NativeTuner):
    """Puts bottleneck adapters into a model."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer


register("bottleneck", BottleneckConfig, BottleneckTuner)


class SeriesAdapter(Adapter):
    """Train small bottlenecks after the attention and feed-forward sublayers of each block.

    ``2 * rank * width + rank + width`` parameters per adapter. Cannot be merged: each adapter makes the model deeper by
    two small layers, in use as well.

    Use it where LoRA's linear update is too weak, and an extra layer per sublayer in use is no matter.

    Args:
        rank: Width of the bottleneck.
        layers: What gets one behind it: ``"attention"`` and ``"feed_forward"`` are the projections that end these
            sublayers, by the names that models give them (both: Houlsby's placement; the second alone: Pfeiffer's); or
            paths, globs, ``re:`` or ``class:`` patterns of modules, ``!`` before what to leave out.
        activation: ``"relu"``, ``"gelu"``, ``"silu"``, ``"tanh"`` or ``"none"``.
        scaling: What the up-projection is multiplied by.
        bias: Whether both projections have a bias.
        dropout: On the adapters' input, in ``[0, 1)``.
        target: Path of the submodule that gets the adapters.
        adapter_name: Name of the adapter.
        always: What trains beside it although it lies inside the target; ``["*norm*"]`` for Houlsby's trained norms.
        seed: Of the initial values.

    Example:
        >>> from lightning_peft import SeriesAdapter
        >>> SeriesAdapter(rank=16, layers="feed_forward").config["form"]
        'series'

    Paper:
        N. Houlsby et al.: Parameter-Efficient Transfer Learning for NLP, ICML 2019, arXiv:1902.00751; J. Pfeiffer et
        al.: AdapterFusion, EACL 2021, arXiv:2005.00247; Z. Hu et al.: LLM-Adapters, EMNLP 2023, arXiv:2304.01933.

    Differs from the paper:
        The up-projection starts at zero and the down-projection uniform, so that the model starts exactly as its base;
        Houlsby et al. start near it. Norms train only if ``always`` says so.
    """

    def __init__(
        self,
        rank: int = 64,
        layers: str | Sequence[str] = ("attention", "feed_forward"),
        activation: Literal["relu", "gelu", "silu", "tanh", "none"] = "relu",
        scaling: float = 1.0,
        bias: bool = True,
        dropout: float = 0.0,
        target: str = "model",
        adapter_name: str = "default",
        always: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        config: dict[str, Any] = {"r": rank, "form": "series", "activation": activation, "scaling": scaling}
        config = {**config, "use_bias": bias, "dropout": dropout, "seed": seed}
        layers = layers if isinstance(layers, str) else list(layers)
        super().__init__("bottleneck", config, target, layers, adapter_name, always, seed)
        self.rank, self.activation, self.scaling, self.bias, self.dropout = rank, activation, scaling, bias, dropout


class ParallelAdapter(Adapter):
    """Train small bottlenecks beside the feed-forward sublayer of each block.

    ``rank * (in + out) + rank + out`` parameters per adapter. Cannot be merged; in use it is computed beside the
    sublayer and not after it.

    Use it instead of series adapters where ranks are large: beside the feed-forward sublayer a bottleneck learns most
    per parameter. The paper's MAM adapter is this one at rank 512 with prefix tuning of 30 tokens in attention, which
    is not part of it.

    Args:
        rank: Width of the bottleneck.
        layers: What gets one beside it: ``"feed_forward"`` and ``"attention"`` are these sublayers, by the names that
            models give them; or paths, globs, ``re:`` or ``class:`` patterns of modules, ``!`` before what to leave
            out. In BERT the feed-forward sublayer is no module: use ``["*.intermediate.dense"]``, or a series adapter.
        activation: ``"relu"``, ``"gelu"``, ``"silu"``, ``"tanh"`` or ``"none"``.
        scaling: What the up-projection is multiplied by: 4 in the paper (scaled parallel), 1 for plain ones.
        bias: Whether both projections have a bias.
        dropout: On the adapters' input, in ``[0, 1)``.
        target: Path of the submodule that gets the adapters.
        adapter_name: Name of the adapter.
        always: What trains beside it although it lies inside the target.
        seed: Of the initial values.

    Example:
        >>> from lightning_peft import ParallelAdapter
        >>> ParallelAdapter(rank=16, scaling=1.0).config["form"]
        'parallel'

    Paper:
        J. He et al.: Towards a Unified View of Parameter-Efficient Transfer Learning, ICLR 2022, arXiv:2110.04366;
        Z. Hu et al.: LLM-Adapters, EMNLP 2023, arXiv:2304.01933.

    Differs from the paper:
        In models that normalise before a sublayer, the adapter gets the normalised input, as the sublayer does.
    """

    def __init__(
        self,
        rank: int = 64,
        layers: str | list[str] = "feed_forward",
        activation: Literal["relu", "gelu", "silu", "tanh", "none"] = "relu",
        scaling: float = 4.0,
        bias: bool = True,
        dropout: float = 0.0,
        target: str = "model",
        adapter_name: str = "default",
        always: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        config: dict[str, Any] = {"r": rank, "form": "parallel", "activation": activation, "scaling": scaling}
        config = {**config, "use_bias": bias, "dropout": dropout, "seed": seed}
        super().__init__("bottleneck", config, target, layers, adapter_name, always, seed)
        self.rank, self.activation, self.scaling, self.bias, self.dropout = rank, activation, scaling, bias, dropout
