"""What adapters of our own share: registration with ``peft``, configuration, and a layer around a frozen base layer.

A native method is an ordinary ``peft`` tuner: once registered, ``peft.get_peft_model``, ``save_pretrained``,
``PeftModel.from_pretrained``, several adapters, ``disable_adapter``, ``merge_adapter`` and ``merge_and_unload``
know it.

Adapter weights are float32 whatever the base layer holds (float64 over a float64 base). In a forward pass they are
cast to the dtype of the activations, never the activations to theirs, so that the backward pass keeps nothing in
float32.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import PeftType, register_peft_method
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from lightning_peft.adapters.config import peft_methods
from lightning_peft.core.draw import draw_generator
from lightning_peft.core.quantized import is_quantized
from lightning_peft.errors import ConfigError, suggest

__all__ = ["NativeConfig", "NativeLayer", "NativeTuner", "UnknownOption", "register"]


class UnknownOption(ConfigError, TypeError):
    """An option that a configuration does not have. Also a ``TypeError``, which is what ``peft`` looks for."""


def register(name: str, config_cls: type[NativeConfig], tuner_cls: type[NativeTuner]) -> None:
    """Make a method known to ``peft``; nothing happens if this very class is registered already.

    Args:
        name: Lower-case name; parameters of the method start with it.
        config_cls: Its configuration.
        tuner_cls: Its tuner.

    Raises:
        ConfigError: If ``peft`` has a method of this name that is not ours.
    """
    kind = name.upper()
    known = PEFT_TYPE_TO_TUNER_MAPPING.get(kind)  # type: ignore[call-overload]
    if known is tuner_cls:
        return
    if known is not None:
        raise ConfigError(f"peft has a method {name!r} of its own ({known.__module__}.{known.__qualname__}).")
    if kind not in PeftType.__members__:  # peft's list of methods is a closed Enum: add a member to it
        member: Any = str.__new__(PeftType, kind)
        member._name_, member._value_ = kind, kind
        member._sort_order_ = len(PeftType.__members__)
        PeftType._member_names_.append(kind)
        PeftType._member_map_[kind] = member
        PeftType._value2member_map_[kind] = member
        type.__setattr__(PeftType, kind, member)
    register_peft_method(name=name, config_cls=config_cls, model_cls=tuner_cls)
    peft_methods.cache_clear()


@dataclass
class NativeConfig(PeftConfig):
    """Options that every native method has.

    Args:
        target_modules: Names, or one regular expression, of the layers that get an adapter; ``"all-linear"`` for all
            but the head. None: what ``peft`` does for LoRA on this architecture.
        exclude_modules: Names, or one regular expression, of layers that get none.
        layers_to_transform: Indices of the blocks that get adapters; None for all.
        layers_pattern: Name of the list of blocks, if it is unusual.
        modules_to_save: Modules that are trained and saved as they are, such as a new head.
        dropout: Probability in [0, 1) of dropping an input of the adapter while training.
        seed: Of the initial values. They depend on it and on the layer's path, not on the global random state, and
            are the same on all ranks.

    Raises:
        ConfigError: If an option is unknown, with the nearest, or out of range.
    """

    target_modules: list[str] | str | None = field(default=None)
    exclude_modules: list[str] | str | None = field(default=None)
    layers_to_transform: list[int] | int | None = field(default=None)
    layers_pattern: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)
    dropout: float = field(default=0.0)
    seed: int = field(default=0)

    method: ClassVar[str] = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Refuse unknown options before the dataclass does, with the nearest known one."""
        names = [f.name for f in dataclasses.fields(cls) if f.init]
        unknown = [name for name in kwargs if name not in names]
        if unknown:
            raise UnknownOption(
                f"{cls.__name__} got an unexpected keyword argument {unknown[0]!r}. {suggest(unknown[0], names)}"
            )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(self.method.upper())
        if isinstance(self.target_modules, (list, tuple)):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, (list, tuple)):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError(f"{type(self).__name__}: layers_pattern says nothing without layers_to_transform.")
        self._check_number("dropout", 0.0, 1.0)
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ConfigError(f"{type(self).__name__}: seed={self.seed!r} is no integer.")

    def _check_number(self, name: str, low: float, below: float, *, low_included: bool = True) -> None:
        value = getattr(self, name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not number or value >= below or value < low or (value == low and not low_included):
            limits = f"{'[' if low_included else '('}{low:g}, {below:g})"
            raise ConfigError(f"{type(self).__name__}: {name}={value!r} is no number in {limits}.")

    def _check_rank(self) -> None:
        rank = getattr(self, "r", None)
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise ConfigError(f"{type(self).__name__}: r={rank!r} is no rank: an integer of at least 1.")

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in choices:
            raise ConfigError(f"{type(self).__name__}: {name}={value!r} is unknown. {suggest(str(value), choices)}")


class NativeLayer(nn.Module, BaseTunerLayer):
    """A frozen base layer with adapters beside it; a method says what their values are and what they add.

    A subclass declares ``prefix`` and the roles of its tensors: those that train (``trained``) and those that do not
    (``frozen``). The tensors of role ``X`` are ``getattr(layer, prefix + "X")``, one plain parameter per adapter.

    Base layers: ``torch.nn.Linear`` (also quantised), the ``Conv1D`` of GPT-2, ``torch.nn.Conv2d`` without groups,
    whose weight counts as a matrix of shape (out, in · height · width).
    """

    prefix: ClassVar[str] = ""
    trained: ClassVar[tuple[str, ...]] = ()
    frozen: ClassVar[tuple[str, ...]] = ()
    from_data: ClassVar[bool] = False
    """Whether the values come from data later, and start at zero."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.adapter_layer_names = tuple(cls.prefix + role for role in cls.trained)
        cls.other_param_names = (*(cls.prefix + role for role in cls.frozen), "settings")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: NativeConfig, path: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.settings: dict[str, NativeConfig] = {}
        self.kind, self.out_features, self.in_features = self.measure(path)
        for role in (*self.trained, *self.frozen):
            setattr(
                self, self.prefix + role, nn.ParameterDict() if role in self.trained else BufferDict(persistent=True)
            )
        self.update_layer(adapter_name, config, path)

    def measure(self, path: str) -> tuple[str, int, int]:
        """Return the kind of the base layer, and how many features come out of it and go in."""
        return _kind_and_shape(self.get_base_layer(), path)

    def reference(self, path: str) -> Tensor:
        """Return the base weight whose device and precision the adapters follow."""
        weight = self.get_base_layer().weight
        assert isinstance(weight, Tensor)
        return weight

    def check_fit(self, config: Any, path: str) -> None:
        """Raise a ``ConfigError`` if an adapter of these settings does not fit the base layer."""
        rank = getattr(config, "r", 1)
        if rank > min(self.in_features, self.out_features):
            raise ConfigError(f"r={rank} is more than {path} of shape ({self.out_features}, {self.in_features}) has.")

    def shapes(self, config: Any) -> dict[str, tuple[int, ...]]:
        """Return the shape of the tensor of every role."""
        raise NotImplementedError

    def initial(self, config: Any, weight_OI: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the initial values of every role, computed from the base weight; what is left out is zero."""
        raise NotImplementedError

    def delta(self, adapter_name: str, x: Tensor) -> Tensor:
        """Return what the adapter adds to the base layer's output for the input ``x``."""
        raise NotImplementedError

    def delta_matrix(self, adapter_name: str) -> Tensor:
        """Return what the adapter adds to the weight as a matrix (out, in)."""
        raise NotImplementedError

    def tensor(self, role: str, adapter_name: str) -> Tensor:
        """Return the parameter or buffer of a role."""
        return getattr(self, self.prefix + role)[adapter_name]

    @torch.no_grad()
    def update_layer(self, adapter_name: str, config: NativeConfig, path: str) -> None:
        """Add an adapter, with its initial values."""
        weight = self.reference(path)
        if hasattr(weight, "_local_tensor"):
            raise ConfigError(f"{path} is sharded already: put adapters in before the model is sharded.")
        if weight.is_meta:
            raise ConfigError(f"{path} has no weights yet (meta device): load them before adapters are put in.")
        self.check_fit(config, path)
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.settings[adapter_name] = config
        meta = False
        for role, shape in self.shapes(config).items():
            held = getattr(self, self.prefix + role)
            value = torch.zeros(shape, dtype=dtype, device=weight.device)
            held[adapter_name] = nn.Parameter(value) if role in self.trained else value
            meta = meta or held[adapter_name].is_meta  # under peft's low_cpu_mem_usage, whose values are loaded
        if not (meta or self.from_data):
            generator = draw_generator(config.seed, 0, path)
            for role, value in self.initial(config, self.matrix().to(dtype), generator).items():
                self.tensor(role, adapter_name).copy_(value)
        self.set_adapter(self.active_adapters)

    def matrix(self) -> Tensor:
        """Return the base layer's weight as a matrix (out, in), dequantised if need be."""
        base = self.get_base_layer()
        weight: Any = base.weight
        if is_quantized(weight):
            weight = _dequantized(base)
        weight = weight.detach()
        return weight.T if self.kind == "conv1d" else weight.reshape(self.out_features, self.in_features)

    def multiply(self, x: Tensor, matrix_OI: Tensor) -> Tensor:
        """Do with ``matrix`` (out, in) in place of the weight what the base layer does, without its bias."""
        matrix_OI = matrix_OI.to(x.dtype)
        if self.kind == "conv2d":
            base: Any = self.get_base_layer()
            kernel = matrix_OI.reshape(-1, *base.weight.shape[1:])
            return base._conv_forward(x, kernel, None)
        return functional.linear(x, matrix_OI)

    def weight_gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        """Return the gradient of a weight (out, in) from the base layer's input and its output's gradient, in float32.

        Args:
            x: The input.
            grad: Gradient of the output, of the input's leading shape.
        """
        x, grad = x.detach().float(), grad.float()
        with torch.autocast(grad.device.type, enabled=False):
            if self.kind != "conv2d":
                return grad.reshape(-1, self.out_features).T @ x.reshape(-1, self.in_features)
            with torch.enable_grad():
                weight = torch.zeros(self.out_features, self.in_features, device=grad.device, requires_grad=True)
                return torch.autograd.grad(self.multiply(x, weight), weight, grad)[0]

    def mix(self, h: Tensor, matrix: Tensor) -> Tensor:
        """Multiply the features of ``h`` by a matrix (out, in), or by a vector if it is a diagonal one."""
        matrix = matrix.to(h.dtype)
        if self.kind != "conv2d":
            return h * matrix if matrix.ndim == 1 else functional.linear(h, matrix)
        if matrix.ndim == 1:
            return h * matrix.reshape(-1, 1, 1)
        return functional.conv2d(h, matrix[:, :, None, None])

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the base layer and add what the active adapters say."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        for name in self.active_adapters:
            if name in self.settings:
                dropped = functional.dropout(x, self.settings[name].dropout, self.training)
                result = result + self.delta(name, dropped).to(result.dtype)
        return result

    @torch.no_grad()
    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """Return what the adapter adds to the base weight, in its layout and the adapter's dtype."""
        delta_OI = self.delta_matrix(adapter_name)
        if self.kind == "conv1d":
            return delta_OI.T
        return delta_OI.reshape(self.get_base_layer().weight.shape) if self.kind == "conv2d" else delta_OI  # type: ignore[union-attr]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the base weight, summed in the adapter's dtype and rounded once.

        Raises:
            ConfigError: If the base weight is quantised.
            ValueError: With ``safe_merge``, if the sum is not finite; the weight is left as it was.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.settings:
                self._add_to_base(self.get_delta_weight(name), check=safe_merge)
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Subtract merged adapters from the base weight, which is exact up to rounding."""
        while self.merged_adapters:
            self._add_to_base(-self.get_delta_weight(self.merged_adapters.pop()), check=False)

    @torch.no_grad()
    def _add_to_base(self, delta: Tensor, *, check: bool) -> None:
        weight: Any = self.get_base_layer().weight
        if is_quantized(weight):
            raise ConfigError(
                "The base weight is quantised, and merging would round it again: use "
                "lightning_peft.precision.merge_adapter(model, dequantize=True)."
            )
        merged = (weight.data.to(delta.dtype) + delta).to(weight.dtype)
        if check and not torch.isfinite(merged).all():
            raise ValueError("The merged weight is not finite: the adapter seems to be broken.")
        weight.data.copy_(merged)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Say that ``peft.convert_to_lora`` may be used: the method adds to the weight."""
        return True


class NativeTuner(BaseTuner):
    """Puts the layers of a native method into a model."""

    tuner_layer_cls: type[NativeLayer]  # type: ignore[assignment]
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name, peft_config, current_key)
            return
        layer = self.tuner_layer_cls(target, adapter_name, peft_config, current_key)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


def _kind_and_shape(base: nn.Module, path: str) -> tuple[str, int, int]:
    """Return the kind of a base layer and the shape (out, in) of its weight as a matrix."""
    if type(base).__name__ == "NonDynamicallyQuantizableLinear":
        raise ConfigError(
            f"{path} is the output projection of a torch.nn.MultiheadAttention, which reads its weight without calling "
            "it: an adapter would have no effect. Leave it out by exclude_modules."
        )
    if isinstance(base, Conv1D):
        return "conv1d", int(base.weight.shape[1]), int(base.weight.shape[0])
    if isinstance(base, nn.Conv2d) and base.groups == 1:
        return "conv2d", base.out_channels, base.in_channels * math.prod(base.kernel_size)
    if isinstance(base, nn.Linear):
        return "linear", base.out_features, base.in_features
    raise ConfigError(
        f"{path} is a {type(base).__name__}{' with groups' if isinstance(base, nn.Conv2d) else ''}; this method needs "
        "torch.nn.Linear, transformers' Conv1D or torch.nn.Conv2d without groups."
    )


def _dequantized(base: nn.Module) -> Tensor:
    from lightning_peft.precision.layers import dequantize

    try:
        return dequantize(base)
    except ConfigError:  # quantised by another library: peft knows more of them
        from peft.utils.integrations import dequantize_module_weight

        return dequantize_module_weight(base)
