"""VL-PET: bottleneck adapters after a sublayer, and a gate of chosen granularity over what comes out.

``G * (y + W_up f(W_down y))`` with y the sublayer's output, x its input and y' the sum in brackets. The gate is

* ``large``: ``sigmoid(V gelu(U x))``, one number per token and feature;
* ``middle_x``: ``sigmoid(u (x + y'))``, one per token;
* ``middle_y``: ``1 + z``, one per feature;
* ``small``: the mean over tokens of ``sigmoid(u [x, y'])``, one per sequence.

Hu, Li, Lyu and Wang, 2023, arXiv:2308.09804, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from lightning_peft.adapters.adapter import Adapter
from lightning_peft.adapters.native.bottleneck import PLACES, BottleneckConfig, BottleneckLayer
from lightning_peft.adapters.native.tuner import NativeTuner, register
from lightning_peft.errors import ConfigError

__all__ = ["VLPET", "VLPETConfig"]

_GRANULARITIES = ("large", "middle_x", "middle_y", "small")


@dataclass
class VLPETConfig(BottleneckConfig):
    """VL-PET: series adapters whose sum with the sublayer's output is gated.

    Args:
        granularity: Of the gate: ``"large"``, ``"middle_x"``, ``"middle_y"`` or ``"small"``.
        gate_rank: Width of the large gate's bottleneck.

    Paper: Hu et al. 2023, arXiv:2308.09804.

    Differs from the paper: the last layer of a gate starts at zero, an option of the authors' code.
    """

    activation: str = field(default="gelu")
    granularity: Literal["large", "middle_x", "middle_y", "small"] = field(default="large")
    gate_rank: int = field(default=64)

    method: ClassVar[str] = "vl_pet"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_choice("granularity", _GRANULARITIES)
        if self.form != "series":
            raise ConfigError("VLPETConfig: form is 'series', the gate lies over the sublayer and its adapter.")
        if not isinstance(self.gate_rank, int) or isinstance(self.gate_rank, bool) or self.gate_rank < 1:
            raise ConfigError(f"VLPETConfig: gate_rank={self.gate_rank!r} is no integer of at least 1.")

    @property
    def places(self) -> dict[str, str]:
        """What ``"attention"`` and ``"feed_forward"`` stand for: the sublayers, whose input the gate sees."""
        return PLACES["parallel"]


class VLPETLayer(BottleneckLayer):
    """A frozen sublayer with VL-PET adapters."""

    prefix = "vl_pet_"
    trained = (*BottleneckLayer.trained, "gate_down", "gate_down_bias", "gate", "gate_bias")

    def check_fit(self, config: Any, path: str) -> None:
        """Raise a ``ConfigError`` if the gate cannot see input and output as they are."""
        super().check_fit(config, path)
        if self.kind == "conv":
            raise ConfigError(f"{path} has convolutions; VL-PET gates the tokens of a transformer's sublayers.")
        inputs, outputs = self._gate_widths(config)
        if inputs != outputs and config.granularity in ("middle_x", "small"):
            raise ConfigError(
                f"{path} takes {inputs} features and returns {outputs}: granularity={config.granularity!r} needs as "
                "many. Name a whole sublayer, or use 'large' or 'middle_y'."
            )

    def _gate_widths(self, config: Any) -> tuple[int, int]:
        width = config.width
        return (self.in_features, self.out_features) if width is None else (width, width)

    def shapes(self, config: Any) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the adapter and of its gate."""
        inputs, outputs = self._gate_widths(config)
        gates: dict[str, dict[str, tuple[int, ...]]] = {
            "large": {
                "gate_down": (config.gate_rank, inputs),
                "gate_down_bias": (config.gate_rank,),
                "gate": (outputs, config.gate_rank),
                "gate_bias": (outputs,),
            },
            "middle_x": {"gate": (1, outputs), "gate_bias": (1,)},
            "middle_y": {"gate": (outputs,)},
            "small": {"gate": (1, inputs + outputs), "gate_bias": (1,)},
        }
        return {**super().shapes(config), **gates[config.granularity]}

    def initial(self, config: Any, weight_OI: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Return uniform down-projections; the rest is zero, so that sigmoids start at one half."""
        values = super().initial(config, weight_OI, generator)
        shape = self.shapes(config).get("gate_down")
        if shape is not None:
            noise = torch.rand(shape, generator=generator, dtype=torch.float64)
            values["gate_down"] = (noise * 2 - 1) / math.sqrt(shape[1])
        return values

    def change(self, adapter_name: str, x: Tensor, y: Tensor) -> Tensor:
        """Return the adapter's output, gated."""
        config: Any = self.settings[adapter_name]
        adapted = super().change(adapter_name, x, y)
        gate, x = self.tensor("gate", adapter_name).to(y.dtype), x.to(y.dtype)
        if config.granularity == "middle_y":
            return adapted * (1 + gate)
        bias = self._bias("gate_bias", adapter_name, y)
        if config.granularity == "large":
            down = self.tensor("gate_down", adapter_name).to(y.dtype)
            hidden = functional.gelu(functional.linear(x, down, self._bias("gate_down_bias", adapter_name, y)))
            return adapted * torch.sigmoid(functional.linear(hidden, gate, bias))
        if config.granularity == "middle_x":
            return adapted * torch.sigmoid(functional.linear(x + adapted, gate, bias))
        each = torch.sigmoid(functional.linear(torch.cat([x, adapted], dim=-1), gate, bias))
        return adapted * each.mean(dim=-2, keepdim=True)


class VLPETTuner(NativeTuner):
    """Puts VL-PET into a model."""

    prefix = "vl_pet_"
    tuner_layer_cls = VLPETLayer


register("vl_pet", VLPETConfig, VLPETTuner)


class VLPET(Adapter):
    """Train bottlenecks after attention and feed-forward, and a gate over each sublayer with its bottleneck.

    A series adapter's parameters and, for the gate, ``gate_rank * (in + out + 1) + out`` (large), ``out + 1``
    (middle_x), ``out`` (middle_y) or ``in + out + 1`` (small). Cannot be merged.

    Use it in encoders that see pictures and text, with a ``ParallelAdapter(scaling=1.0, layers="*.encoder_attn.v_proj",
    target=...)`` on the decoder, as the paper does. The model does not start as its base: gates start at one half, but
    for middle_y.

    Args:
        rank: Width of the bottleneck.
        granularity: The gate is ``"large"``: one number per token and feature; ``"middle_x"``: per token;
            ``"middle_y"``: per feature; ``"small"``: per sequence.
        gate_rank: Width of the large gate's own bottleneck.
        layers: Which sublayers: ``"attention"`` and ``"feed_forward"`` by the names that models give them; or paths,
            globs, ``re:`` or ``class:`` patterns of modules, ``!`` before what to leave out.
        activation: ``"relu"``, ``"gelu"``, ``"silu"``, ``"tanh"`` or ``"none"``.
        scaling: What the up-projection is multiplied by.
        bias: Whether both projections of the bottleneck have a bias.
        dropout: On the adapters' input, in ``[0, 1)``.
        target: Path of the submodule that gets the adapters.
        adapter_name: Name of the adapter.
        always: What trains beside it although it lies inside the target; ``["*norm*"]`` for the paper's trained norms.
        seed: Of the initial values.

    Example:
        >>> from lightning_peft import VLPET
        >>> VLPET(rank=96, granularity="middle_x").method
        'vl_pet'

    Paper:
        Z. Hu, Y. Li, M. R. Lyu, L. Wang: VL-PET: Vision-and-Language Parameter-Efficient Tuning via Granularity
        Control, ICCV 2023, arXiv:2308.09804.

    Differs from the paper:
        The up-projection and the last layer of a gate start at zero, an option of the authors' code. Its heads of the
        down-projection are side by side in one matrix, which computes the same. In models that normalise before a
        sublayer, the gate sees the normalised input.
    """

    def __init__(
        self,
        rank: int = 64,
        granularity: Literal["large", "middle_x", "middle_y", "small"] = "large",
        gate_rank: int = 64,
        layers: str | Sequence[str] = ("attention", "feed_forward"),
        activation: Literal["relu", "gelu", "silu", "tanh", "none"] = "gelu",
        scaling: float = 1.0,
        bias: bool = True,
        dropout: float = 0.0,
        target: str = "model",
        adapter_name: str = "default",
        always: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        config: dict[str, Any] = {"r": rank, "granularity": granularity, "gate_rank": gate_rank}
        config = {**config, "activation": activation, "scaling": scaling, "use_bias": bias, "dropout": dropout}
        layers = layers if isinstance(layers, str) else list(layers)
        super().__init__("vl_pet", {**config, "seed": seed}, target, layers, adapter_name, always, seed)
        self.rank, self.granularity, self.gate_rank = rank, granularity, gate_rank
        self.activation, self.scaling, self.bias, self.dropout = activation, scaling, bias, dropout
