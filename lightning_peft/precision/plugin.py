"""``QuantizedPrecision``: the Trainer's plugin for quantised base weights."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from typing_extensions import override

from lightning_peft.core.quantized import is_quantized
from lightning_peft.errors import BaseMismatch, ConfigError, EffectError, ResumeMismatch, UnsupportedStrategy, suggest
from lightning_peft.methods.build import when_built
from lightning_peft.precision.layers import (
    Backend,
    Mode,
    _peft_layers,
    base_fingerprint,
    check_mode,
    hidden_weights,
    quantize,
    quantized_bytes,
    quantized_layers,
)

__all__ = ["QuantizedPrecision", "companion_callbacks"]

ComputeDtype = Literal["auto", "float32", "bfloat16"]
_VERSION = 1
_ATTACHED = "_lightning_peft_quantized_precision"

_alive: weakref.WeakSet[QuantizedPrecision] = weakref.WeakSet()


class QuantizedPrecision(Precision):
    """Keep the base model's linear layers in 4 or 8 bits, on any device, and train what is beside them.

    A weight takes 4.5 bits (``nf4``, ``fp4``), 4.13 (``-dq``) or 8 (``int8``) and is dequantised, one layer at a time,
    for each multiplication, forward and backward; gradients flow through it to what lies below. Adapters keep float32
    weights, while activations and products are in the compute dtype.

    Use it with adapters for a base that does not fit, or fits with small batches only; a model that fits in bfloat16
    trains faster in bfloat16.

    The model is quantised once, after ``configure_model`` and before anything is restored, wrapped or sharded, whether
    it was built in ``__init__`` or in ``configure_model``, and before or after adapters were injected. Layers that
    ``transformers`` loaded quantised stay as they are. Inside ``configure_model`` with stock strategies that shard
    there, call ``self.trainer.precision_plugin.quantize(self.model)`` before ``fully_shard``.

    A checkpoint holds all but the quantised weights: a resumed run quantises the same base again, bit for bit, and
    fingerprints in the checkpoint tell if it was another one.

    Args:
        mode: ``"nf4"``, ``"fp4"``, ``"nf4-dq"``, ``"fp4-dq"`` (scales quantised too) or ``"int8"``.
        scope: Which linear layers to quantise: roles, module paths, patterns, ``class:NAME``, ``re:PATTERN``.
        skip: Which of them to leave in floating point. Norms, biases, adapters and tied weights always are.
        compute_dtype: Dtype of products and activations: ``"bfloat16"`` (under autocast), ``"float32"``, or ``"auto"``:
            bfloat16 on a GPU that has it, float32 elsewhere.
        adapter_dtype: Dtype of adapter weights and so of their optimizer state: ``"float32"``, or ``"keep"``.
        backend: ``"bitsandbytes"``, or ``"torchao"`` (modes ``"nf4"``, whose scales it always quantises, and
            ``"int8"``).

    Raises:
        ConfigError: If an argument is unknown, with the nearest one. From the fit, if nothing is left to train.
        ScopeError: From the fit, if ``scope`` or ``skip`` matches nothing, or no linear layer is left.
        ResumeMismatch: From the fit, if a checkpoint was written under another mode or with other layers quantised.
        BaseMismatch: From the fit, if a checkpoint belongs to another base.
        UnsupportedStrategy: From the fit, if the strategy would shard 8-bit weights.

    Example:
        >>> from lightning_peft import QuantizedPrecision
        >>> QuantizedPrecision("nf4-dq", skip=["embeddings", "head", "*.down_proj"]).mode
        'nf4-dq'

    Paper:
        T. Dettmers, A. Pagnoni, A. Holtzman, L. Zettlemoyer: QLoRA: Efficient Finetuning of Quantized LLMs,
        NeurIPS 2023, arXiv:2305.14314 (4-bit NormalFloat, double quantisation); T. Dettmers, M. Lewis, Y. Belkada,
        L. Zettlemoyer: LLM.int8(), NeurIPS 2022, arXiv:2208.07339.
    """

    def __init__(
        self,
        mode: Mode = "nf4",
        scope: str | Sequence[str] = "all",
        skip: str | Sequence[str] = ("embeddings", "head"),
        compute_dtype: ComputeDtype = "auto",
        adapter_dtype: Literal["float32", "keep"] = "float32",
        backend: Backend = "bitsandbytes",
    ) -> None:
        super().__init__()
        check_mode(mode, backend)
        _check_choice("compute_dtype", compute_dtype, ("auto", "float32", "bfloat16"))
        _check_choice("adapter_dtype", adapter_dtype, ("float32", "keep"))
        self.mode: Mode = mode
        self.scope = scope if isinstance(scope, str) else list(scope)
        self.skip = [skip] if isinstance(skip, str) else list(skip)
        self.compute_dtype: ComputeDtype = compute_dtype
        self.adapter_dtype = adapter_dtype
        self.backend: Backend = backend
        self._device: torch.device | None = None
        self._root: weakref.ref[nn.Module] | None = None
        self._quantised: dict[str, int] = {}
        _alive.add(self)

    # ------------------------------------------------------------------ what a user may call

    def quantize(self, root: nn.Module) -> list[str]:
        """Quantise what ``scope`` and ``skip`` say below ``root``; what is quantised already stays as it is.

        Needed in ``configure_model`` only, before the model is sharded there. Names in ``scope`` and ``skip`` are then
        those below ``root``.

        Returns:
            Paths of the layers quantised now.
        """
        before = {id(layer) for _, layer in quantized_layers(root)}
        done = quantize(
            root,
            self.mode,
            scope=self.scope,
            skip=self.skip,
            backend=self.backend,
            compute_dtype=self._dtype(),
            device=self._device if self._device is not None and self._device.type != "cpu" else None,
        )
        if done:
            rank_zero_info(
                f"QuantizedPrecision: {len(done)} linear layers in {self.mode}, {quantized_bytes(root) / 2**20:.1f} MiB"
                + (f"; {len(before)} were quantised already" if before else "")
            )
        return done

    # ------------------------------------------------------------------ the run

    def attach(self, trainer: Trainer) -> None:
        """Learn the device, and leave quantised weights out of the Trainer's checkpoints."""
        strategy = trainer.strategy
        self._device = strategy.root_device
        _wrap(strategy, "lightning_module_state_dict", _hides_base)
        _wrap(strategy, "load_checkpoint", _hides_base)
        _wrap(strategy, "load_model_state_dict", _compares_base)

    def prepare(self, module: LightningModule) -> None:
        """Quantise a whole module if that has not been done; called when it is built and before it is wrapped."""
        if self._root is None or self._root() is not module or not any(True for _ in quantized_layers(module)):
            if not self._is_prepared_inside(module):
                self.quantize(module)
            self._root = weakref.ref(module)
        self._check_strategy(module)

    def _is_prepared_inside(self, module: LightningModule) -> bool:
        """Whether ``quantize`` was called in ``configure_model`` already, which told what the names are relative to."""
        return any(hasattr(p, "_local_tensor") for p in module.parameters()) and any(
            True for _ in quantized_layers(module)
        )

    def _check_strategy(self, module: LightningModule) -> None:
        if module._trainer is None:
            return
        strategy = module._trainer.strategy
        if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy)):
            raise UnsupportedStrategy(
                f"QuantizedPrecision has not been shown to be right under {type(strategy).__name__}. Use one device, "
                "strategy='ddp' or FSDP2Strategy."
            )
        if isinstance(strategy, ModelParallelStrategy) and self.mode == "int8":
            raise UnsupportedStrategy(
                f"{type(strategy).__name__} cannot shard 8-bit weights: their codes are kept a second time beside the "
                "parameter. Use mode='nf4' or 'nf4-dq', or strategy='ddp'."
            )

    @override
    def convert_module(self, module: nn.Module) -> nn.Module:
        """Called by the strategy right before it wraps the model: the last moment to quantise it."""
        if not isinstance(module, LightningModule):
            self.quantize(module)
            return module
        trainer = module._trainer
        if trainer is not None:
            self.attach(trainer)
            callbacks: list[Any] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
            if not any(isinstance(callback, _Companion) for callback in callbacks):
                rank_zero_warn(
                    "QuantizedPrecision: Lightning has not found this package's entry point (an installation from "
                    "before it had one?), so that checkpoints cannot be resumed from. Install the package again."
                )
        self.prepare(module)
        self._check_adapters(module)
        fitting = trainer is not None and trainer.state.fn == TrainerFn.FITTING
        if fitting and not any(p.requires_grad for p in module.parameters()):
            raise ConfigError(
                "QuantizedPrecision: nothing is left to train. A quantised weight cannot be trained: add adapters "
                "(the QLoRA or Adapter callback, or peft), or leave layers out with skip."
            )
        return module

    def _check_adapters(self, module: nn.Module) -> None:
        """Check that adapters are in floating point, and give them their dtype."""
        for path, layer in _peft_layers(module):
            for attribute in layer.adapter_layer_names:
                holder = getattr(layer, attribute, None)
                if not isinstance(holder, nn.Module):
                    continue
                for name, parameter in holder.named_parameters():
                    if is_quantized(parameter):
                        raise EffectError(
                            f"{path}.{attribute}.{name} is an adapter's weight and has been quantised. Quantise with "
                            "QuantizedPrecision alone, which leaves adapters out."
                        )
                    wanted = torch.float32 if self.adapter_dtype == "float32" else parameter.dtype
                    if parameter.dtype != wanted and parameter.requires_grad:
                        parameter.data = parameter.data.to(wanted)

    def _dtype(self) -> torch.dtype:
        if self.compute_dtype != "auto":
            return getattr(torch, self.compute_dtype)
        on_gpu = self._device is not None and self._device.type == "cuda"
        return torch.bfloat16 if on_gpu and torch.cuda.is_bf16_supported() else torch.float32

    @override
    def forward_context(self) -> AbstractContextManager:
        """Autocast to the compute dtype; nothing for float32."""
        dtype = self._dtype()
        if dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self._device.type if self._device is not None else "cpu", dtype=dtype)

    # ------------------------------------------------------------------ checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        root = self._root() if self._root is not None else None
        return {} if root is None else {"version": _VERSION, "mode": self.mode, "base": base_fingerprint(root)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to restore: what the state says was compared when the checkpoint was opened."""

    def check_checkpoint(self, module: LightningModule, checkpoint: Mapping[str, Any]) -> None:
        """Compare the base that a checkpoint was written on with this one.

        Raises:
            ResumeMismatch: If other layers, or in another mode, are quantised.
            BaseMismatch: If codes or scales differ.
        """
        saved = checkpoint.get(type(self).__qualname__)
        if not saved:
            return
        if saved["mode"] != self.mode:
            raise ResumeMismatch(
                f"The checkpoint was written with QuantizedPrecision(mode={saved['mode']!r}), this run has "
                f"mode={self.mode!r}. Adapters trained beside one base do not fit the other's rounding."
            )
        now = base_fingerprint(module)
        only_then, only_now = sorted(saved["base"].keys() - now), sorted(now.keys() - saved["base"].keys())
        if only_then or only_now:
            raise ResumeMismatch(
                "The checkpoint was written with other layers quantised: "
                + "; ".join(
                    f"{what}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
                    for what, names in (("only then", only_then), ("only now", only_now))
                    if names
                )
                + ". Use the same scope and skip."
            )
        wrong = [path for path, value in saved["base"].items() if now[path] != value]
        if wrong:
            raise BaseMismatch(
                f"The quantised base is not the one of the checkpoint: {len(wrong)} of {len(now)} layers differ, "
                f"{wrong[0]} for one. The checkpoint holds no base weights: start from the same pretrained model, "
                "in the same dtype and quantised on the same kind of device."
            )


def _wrap(strategy: Any, name: str, make: Callable[[Any, Any], Any]) -> None:
    """Put what ``make`` makes in the place of a method of ``strategy``, unless that is done already."""
    present = getattr(strategy, name)
    if not any(getattr(function, _ATTACHED, False) for function in (present, getattr(present, "inner", None))):
        wrapper = make(strategy, present)
        setattr(wrapper, _ATTACHED, True)
        setattr(strategy, name, wrapper)


def _hides_base(strategy: Any, method: Any) -> Any:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with hidden_weights(strategy.lightning_module):
            return method(*args, **kwargs)

    return wrapper


def _compares_base(strategy: Any, method: Any) -> Any:
    def wrapper(checkpoint: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        plugin, module = strategy.precision_plugin, strategy.lightning_module
        if isinstance(plugin, QuantizedPrecision) and module is not None:
            plugin.check_checkpoint(module, checkpoint)
        return method(checkpoint, *args, **kwargs)

    return wrapper


def _check_choice(argument: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{argument}={value!r} is unknown. {suggest(str(value), choices)}")


class _Companion(Callback):
    """Stands beside the plugin, which Lightning does not tell of the model before checkpoints are restored."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        plugin = trainer.precision_plugin
        if not isinstance(plugin, QuantizedPrecision):
            return
        plugin.attach(trainer)
        when_built(pl_module, lambda: plugin.prepare(pl_module))


def companion_callbacks() -> list[Callback]:
    """Return what a Trainer needs beside :class:`QuantizedPrecision`: nothing, unless the process has made one."""
    return [_Companion()] if _alive else []
