"""SSF: scale and shift the features that come out of frozen layers.

``y = scale * base(x) + shift`` after linear layers, convolutions and norms, with one number each per output feature
(equation 4); after training ``W' = scale * W`` and ``b' = scale * b + shift`` (equation 5), so that nothing is added in
use. Lian, Zhou, Feng and Wang, 2022, arXiv:2210.08823.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_peft.adapters.adapter import Adapter
from lightning_peft.adapters.native.features import FeatureLayer, add_bias, axes_after_features, is_layer
from lightning_peft.adapters.native.tuner import NativeConfig, NativeTuner, register
from lightning_peft.core.blocks import is_norm
from lightning_peft.core.quantized import is_quantized
from lightning_peft.errors import ConfigError

__all__ = ["SSF", "SSFConfig"]


@dataclass
class SSFConfig(NativeConfig):
    """SSF: a scale and a shift per output feature of frozen layers and norms.

    Args:
        init_std: Scales start normal around 1, shifts around 0, with this standard deviation; 0 starts exactly at the
            base.
        shift: Where a shift is trained beside the scale: ``"mergeable"``, wherever the module has a bias or can get
            one, that is everywhere but in RMS norms; ``"existing"``, where it has one, so that the merged model has
            the very parameters of its base; ``"all"``, also in RMS norms, which then cannot be merged.

    Paper: Lian et al. 2022, arXiv:2210.08823, equations 4 and 5.

    Differs from the paper: by default RMS norms, which it has none of, get a scale only.
    """

    init_std: float = field(default=0.02)
    shift: Literal["mergeable", "existing", "all"] = field(default="mergeable")

    method: ClassVar[str] = "ssf"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_number("init_std", 0.0, float("inf"))
        self._check_choice("shift", ("mergeable", "existing", "all"))
        if self.dropout:
            raise ConfigError("SSFConfig: dropout has no meaning here, the adapter has no input of its own.")

    @staticmethod
    def takes(module: nn.Module) -> bool:
        """Whether a module can be scaled: a linear layer, a convolution, a norm with a weight."""
        return is_layer(module) or (_is_norm(module) and getattr(module, "weight", None) is not None)


class SSFLayer(FeatureLayer):
    """A frozen layer or norm with SSF adapters."""

    prefix = "ssf_"
    trained = ("scale", "shift")
    ssf_shift: nn.ParameterDict
    _added_bias = False

    def measure(self, path: str) -> tuple[str, int, int]:
        """Return how many features come out."""
        base: Any = self.get_base_layer()
        if not SSFConfig.takes(base):
            raise ConfigError(
                f"{path} is a {type(base).__name__}; SSF needs a linear layer, a convolution or a norm with a weight."
            )
        if type(base).__name__ == "NonDynamicallyQuantizableLinear":
            raise ConfigError(
                f"{path} is the output projection of a torch.nn.MultiheadAttention, which reads its weight without "
                "calling it: an adapter would have no effect. Leave it out by exclude_modules."
            )
        if isinstance(base, nn.Linear):  # a packed weight has another shape
            return "linear", base.out_features, base.in_features
        if _is_norm(base):
            return "norm", base.weight.numel(), base.weight.numel()
        count = base.weight.shape[-1] if isinstance(base, Conv1D) else base.weight.shape[0]
        return "conv1d" if isinstance(base, Conv1D) else "conv", int(count), int(count)

    @property
    def can_have_bias(self) -> bool:
        """Whether the base layer has a bias, or adds one if it gets one."""
        base = self.get_base_layer()
        if getattr(base, "bias", None) is not None:
            return True
        return self.kind in ("linear", "conv") or isinstance(base, nn.LayerNorm)

    def shapes(self, config: Any) -> dict[str, tuple[int, ...]]:
        """Return the shape of a norm's weight, or one number per output feature."""
        base: Any = self.get_base_layer()
        shape = tuple(base.weight.shape) if self.kind == "norm" else (self.out_features,)
        has_bias = getattr(base, "bias", None) is not None
        shifts = {"all": True, "mergeable": self.can_have_bias, "existing": has_bias}[config.shift]
        return {"scale": shape, "shift": shape} if shifts else {"scale": shape}

    def initial(self, config: Any, weight_OI: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Return scales around 1 and shifts around 0."""
        noise = {
            role: torch.randn(shape, generator=generator, dtype=torch.float64) * config.init_std
            for role, shape in self.shapes(config).items()
        }
        return {role: value + 1.0 if role == "scale" else value for role, value in noise.items()}

    def change(self, adapter_name: str, x: Tensor, y: Tensor) -> Tensor:
        """Return ``scale * y + shift``."""
        trailing = axes_after_features(self.get_base_layer(), y.ndim)
        y = y * self._along(self.tensor("scale", adapter_name), trailing, y)
        if adapter_name in self.ssf_shift:
            y = y + self._along(self.tensor("shift", adapter_name), trailing, y)
        return y

    @staticmethod
    def _along(values: Tensor, trailing: int, y: Tensor) -> Tensor:
        return values.reshape(*values.shape, *(1,) * trailing).to(y.dtype)

    def check_mergeable(self) -> None:
        """Raise a ``ConfigError`` if the base layer cannot take the adapters in."""
        if any(is_quantized(parameter) for parameter in self.get_base_layer().parameters()):
            raise ConfigError(
                "The base weight is quantised, and merging would round it again: use "
                "lightning_peft.precision.merge_adapter(model, dequantize=True)."
            )
        if not self.can_have_bias and any(name in self.ssf_shift for name in self.active_adapters):
            raise ConfigError(
                f"A {type(self.get_base_layer()).__name__} has no bias that the shift could be merged into. Keep the "
                "adapter beside the base, or train with shift='mergeable'."
            )

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put scales and shifts into weight and bias, computed in the adapter's dtype and rounded once.

        A layer without a bias gets one if there is a shift (``shift="existing"`` has none there).

        Raises:
            ConfigError: If the base weight is quantised, or if an RMS norm has a shift.
            ValueError: With ``safe_merge``, if a value is not finite; the layer is left as it was.
        """
        base: Any = self.get_base_layer()
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.settings:
                continue
            self.check_mergeable()
            scale = self.tensor("scale", name)
            offset = norm_offset(base) if self.kind == "norm" else 0.0
            weight = (base.weight.to(scale.dtype) + offset) * self._rows(scale) - offset
            held: Any = getattr(base, "bias", None)
            bias = None if held is None else held.to(scale.dtype) * scale
            if name in self.ssf_shift:
                shift = self.tensor("shift", name)
                bias = shift.clone() if bias is None else bias + shift
            values = [weight] if bias is None else [weight, bias]
            if safe_merge and not all(torch.isfinite(value).all() for value in values):
                raise ValueError("The merged weight is not finite: the adapter seems to be broken.")
            base.weight.data.copy_(weight)
            if bias is not None and held is not None:
                held.data.copy_(bias)
            elif bias is not None:
                add_bias(base, bias, "SSF")
                self._added_bias = True
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take merged adapters out again, which is exact up to rounding.

        Raises:
            ConfigError: If a scale is zero, so that the base is lost.
        """
        base: Any = self.get_base_layer()
        while self.merged_adapters:
            name = self.merged_adapters[-1]
            scale = self.tensor("scale", name)
            if (scale == 0).any():
                raise ConfigError("A scale of SSF is zero: the merged base cannot be restored. Load it again.")
            offset = norm_offset(base) if self.kind == "norm" else 0.0
            base.weight.data.copy_((base.weight.to(scale.dtype) + offset) / self._rows(scale) - offset)
            if getattr(base, "bias", None) is not None:
                bias = base.bias.to(scale.dtype)
                if name in self.ssf_shift:
                    bias = bias - self.tensor("shift", name)
                base.bias.data.copy_(bias / scale)
            self.merged_adapters.pop()
        if self._added_bias:
            base.bias, self._added_bias = None, False

    def _rows(self, scale: Tensor) -> Tensor:
        """Scale as it multiplies the weight."""
        weight: Any = self.get_base_layer().weight
        if self.kind in ("norm", "conv1d"):
            return scale
        return scale.reshape(-1, *(1,) * (weight.ndim - 1))


def _is_norm(module: nn.Module) -> bool:
    return is_norm(module) or isinstance(module, nn.LayerNorm)  # whose weight may have several axes


@torch.no_grad()
def norm_offset(norm: nn.Module) -> float:
    """Return what a norm adds to its weight before it multiplies by it: 0 for most, 1 for Gemma's.

    It is measured: with a weight of zeros the first kind returns zeros.

    Raises:
        ConfigError: If the norm does neither, so that a scale cannot be merged into its weight.
    """
    if isinstance(norm, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)):
        return 0.0
    probe: Any = copy.deepcopy(norm).eval()
    x = torch.linspace(-1.0, 2.0, probe.weight.numel()).reshape(probe.weight.shape).to(probe.weight)
    if getattr(probe, "bias", None) is not None:
        probe.bias.zero_()
    outputs = []
    for value in (0.0, 1.0):
        probe.weight.fill_(value)
        outputs.append(probe(x[None]))
    for offset in (0.0, 1.0):
        if torch.allclose(outputs[0] * (1.0 + offset), outputs[1] * offset, rtol=1e-2, atol=1e-6):
            return offset
    raise ConfigError(f"{type(norm).__name__} does not multiply by its weight: SSF cannot be merged into it.")


class SSFTuner(NativeTuner):
    """Puts SSF into a model."""

    prefix = "ssf_"
    tuner_layer_cls = SSFLayer

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        for module in self.model.modules():  # all of them before any is changed
            if isinstance(module, SSFLayer):
                module.check_mergeable()


register("ssf", SSFConfig, SSFTuner)


class SSF(Adapter):
    """Train a scale and a shift of each feature that comes out of frozen layers and norms.

    Two numbers per output feature: less than LoRA at rank 1. Each layer keeps its output for the backward pass, so
    memory for activations is above LoRA's. Merged into the base it costs nothing in use.

    Use it for a new domain of the same task, above all in vision (ViT, Swin, ConvNeXt).

    Args:
        layers: What gets a scale and a shift, as a scope: linear layers, convolutions and norms in it.
        init_std: Scales start normal around 1, shifts around 0, with this standard deviation; 0 starts exactly at the
            base.
        shift: Where there is a shift: ``"mergeable"``: wherever a module has a bias or can get one, that is all but
            RMS norms; ``"existing"``: where it has one; ``"all"``: also in RMS norms, which then cannot be merged.
        target: Path of the submodule that gets the adapters.
        adapter_name: Name of the adapter.
        always: What trains beside it although it lies inside the target.
        seed: Of the initial values.

    Example:
        >>> from lightning_peft import SSF
        >>> SSF(layers=["blocks", "embeddings"]).method
        'ssf'

    Paper:
        D. Lian, D. Zhou, J. Feng, X. Wang: Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning,
        NeurIPS 2022, arXiv:2210.08823, equations 4 and 5.

    Differs from the paper:
        RMS norms, which its models do not have, get a scale only unless ``shift="all"``: they have no bias that a shift
        could be merged into.
    """

    def __init__(
        self,
        layers: str | list[str] = "blocks",
        init_std: float = 0.02,
        shift: Literal["mergeable", "existing", "all"] = "mergeable",
        target: str = "model",
        adapter_name: str = "default",
        always: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        config: dict[str, Any] = {"init_std": init_std, "shift": shift, "seed": seed}
        super().__init__("ssf", config, target, layers, adapter_name, always, seed)
        self.init_std, self.shift = init_std, shift
