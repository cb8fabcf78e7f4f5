"""LoRA-SB: LoRA-XS between the singular vectors of the first step that full fine-tuning would take.

``h = W x + B R A x`` where only R (r by r) trains. With the gradient G of the loss, averaged over some batches, the
first step of full fine-tuning is about ``D = -learning_rate · sign(G)`` (Adam) or ``-learning_rate · G`` (SGD). Its
truncated decomposition D = U S V^T gives B = U_r, R = diag(S_r), A = V_r^T: training starts one step ahead of the base
model, with the best rank r approximation of that step, and orthonormal factors make a step of R the projection of a
full one, so that no scaling factor is needed. Ponkshe, Singhal, Gorbunov, Tumanov, Horvath and Vepakomma, 2024,
arXiv:2411.19557.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_peft.adapters.native.three_factor import (
    ThreeFactorConfig,
    ThreeFactorLayer,
    ThreeFactorTuner,
    top_singular,
)
from lightning_peft.adapters.native.tuner import register
from lightning_peft.core.names import named_modules
from lightning_peft.errors import ConfigError, suggest

__all__ = ["LoRASBConfig", "calibrate_lora_sb"]


@dataclass
class LoRASBConfig(ThreeFactorConfig):
    """LoRA-SB: an r by r matrix between singular vectors of full fine-tuning's first step.

    Trains r² values per layer, as LoRA-XS does. Before training, :func:`calibrate_lora_sb` runs a few batches forward
    and backward; meanwhile the gradient of every adapted layer is held in float32.

    When: LoRA-XS is small enough, and not good enough.

    Args:
        learning_rate: Of the step that is approximated; the one you train with.
        first_step: ``"adamw"`` takes the sign of the gradient, ``"sgd"`` the gradient.

    Paper: Ponkshe et al. 2024, arXiv:2411.19557, algorithm 1.

    Differs from the paper: gradients are averaged over batches as they come, each with the mean loss of its batch,
    instead of summed over single samples.
    """

    learning_rate: float = field(default=1e-4)
    first_step: Literal["adamw", "sgd"] = field(default="adamw")

    method: ClassVar[str] = "lora_sb"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_number("learning_rate", 0.0, float("inf"), low_included=False)
        self._check_choice("first_step", ("adamw", "sgd"))
        if not self.save_frozen:
            raise ConfigError(
                "LoRASBConfig: save_frozen=False would lose the frozen factors, which come from data and cannot be "
                "computed from the base weight."
            )


class LoRASBLayer(ThreeFactorLayer):
    """A base layer with LoRA-SB adapters; all zero, and not to be trained, before calibration."""

    prefix = "lora_sb_"
    trained = ("R",)
    frozen = ("A", "B")
    from_data = True
    calibrated: dict[str, bool]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        object.__setattr__(self, "calibrated", {})
        super().__init__(*args, **kwargs)
        self.register_load_state_dict_post_hook(_notice_loaded)

    def update_layer(self, adapter_name: str, config: Any, path: str) -> None:
        """Add an adapter that waits for calibration."""
        super().update_layer(adapter_name, config, path)
        self.calibrated[adapter_name] = False

    def delta(self, adapter_name: str, x: Tensor) -> Tensor:
        """Return ``B R A x``.

        Raises:
            ConfigError: If it is about to be trained without calibration: its gradient would be zero for ever.
        """
        if self.training and torch.is_grad_enabled() and not self.calibrated.get(adapter_name):
            raise ConfigError(
                f"LoRA-SB adapter {adapter_name!r} starts from gradients, and would not train without them: call "
                "lightning_peft.calibrate_lora_sb(model, batches, loss_fn) before training."
            )
        return super().delta(adapter_name, x)


def _notice_loaded(layer: Any, _: Any) -> None:
    for name in layer.settings:
        factor = layer.tensor("A", name)
        if hasattr(factor, "_local_tensor"):
            layer.calibrated[name] = True
        elif not factor.is_meta:
            layer.calibrated[name] = bool(factor.any())


class LoRASBTuner(ThreeFactorTuner):
    """Puts LoRA-SB into a model."""

    prefix = "lora_sb_"
    tuner_layer_cls = LoRASBLayer


register("lora_sb", LoRASBConfig, LoRASBTuner)


def calibrate_lora_sb(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Callable[[Any], Tensor],
    *,
    adapter_name: str = "default",
    max_batches: int | None = None,
    again: bool = True,
) -> dict[str, float]:
    """Give the factors of LoRA-SB their start, from the gradients of some batches.

    Call it after injection, before the model is sharded and before training. Nothing but the factors changes: weights,
    ``grad``, buffers, training flags and random states are put back. With several processes the gradients are averaged
    over them, and all get the same factors.

    Args:
        model: The model with LoRA-SB adapters, or anything around it.
        batches: Batches, as ``loss_fn`` takes them. The paper uses a thousandth of the training data.
        loss_fn: Returns the scalar loss of a batch; it runs ``model``, in the mode (``train``, ``eval``) it is in.
        adapter_name: Which adapter.
        max_batches: Stop after so many; None for all.
        again: False does nothing if the adapter has its start already, such as from a checkpoint.

    Returns:
        Per layer, the fraction of the step's squared norm that its r by r matrix holds; empty if nothing was done.

    Raises:
        ConfigError: If there is no such adapter, it does not train, there is no batch, the model is sharded, or the
            loss does not depend on an adapted layer.
    """
    layers = {path: m for path, m in named_modules(model) if isinstance(m, LoRASBLayer) and adapter_name in m.settings}
    _check_layers(model, layers, adapter_name)
    if not again and all(layer.calibrated.get(adapter_name) for layer in layers.values()):
        return {}
    before = {
        path: [layer.tensor(role, adapter_name).detach().clone() for role in "BRA"] for path, layer in layers.items()
    }
    ready = {path: layer.calibrated.get(adapter_name, False) for path, layer in layers.items()}
    done = False
    try:
        for layer in layers.values():
            _set_factors(layer, adapter_name, [torch.zeros(()), torch.zeros(()), torch.zeros(())])
            layer.calibrated[adapter_name] = True
        gradients = _gradients(model, layers, batches, loss_fn, max_batches)
        held = {}
        for path, layer in layers.items():
            factors, held[path] = _factors(layer.settings[adapter_name], gradients.pop(path))
            _set_factors(layer, adapter_name, factors)
        done = True
    finally:
        if not done:
            for path, layer in layers.items():
                _set_factors(layer, adapter_name, before[path])
                layer.calibrated[adapter_name] = ready[path]
    return held


def _check_layers(model: nn.Module, layers: dict[str, LoRASBLayer], adapter_name: str) -> None:
    if not layers:
        names = {name for module in model.modules() if isinstance(module, LoRASBLayer) for name in module.settings}
        known = suggest(adapter_name, sorted(names)) or "The model has no LoRA-SB adapter at all."
        raise ConfigError(f"The model has no LoRA-SB adapter {adapter_name!r}. {known}")
    for path, layer in layers.items():
        factor = layer.tensor("R", adapter_name)
        if hasattr(factor, "_local_tensor"):
            raise ConfigError(f"{path} is sharded: calibrate LoRA-SB before the model is sharded.")
        if not factor.requires_grad or adapter_name not in layer.active_adapters or layer.disable_adapters:
            raise ConfigError(f"LoRA-SB adapter {adapter_name!r} of {path} is not active, or does not train.")


def _gradients(
    model: nn.Module,
    layers: dict[str, LoRASBLayer],
    batches: Iterable[Any],
    loss_fn: Callable[[Any], Tensor],
    max_batches: int | None,
) -> dict[str, Tensor]:
    """Return the gradient of every layer's weight (out, in), from the inputs and output gradients that pass it."""
    from lightning_peft.methods.scoring import mean_over_ranks, without_trace

    total: dict[str, Tensor] = {}

    def watch(path: str, layer: LoRASBLayer) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            if not output.requires_grad:
                return
            x = inputs[0].detach()

            def add(grad: Tensor) -> None:
                part = layer.weight_gradient(x, grad)
                total[path] = total[path] + part if path in total else part

            output.register_hook(add)

        return hook

    count = 0
    with ExitStack() as stack:
        stack.enter_context(without_trace(model))  # type: ignore[arg-type]
        for path, layer in layers.items():
            stack.callback(layer.register_forward_hook(watch(path, layer)).remove)
        for batch in batches:
            if max_batches is not None and count >= max_batches:
                break
            with torch.enable_grad():
                loss_fn(batch).backward()
            count += 1
    if count == 0:
        raise ConfigError("calibrate_lora_sb got no batch: the first step of full fine-tuning needs at least one.")
    unused = [path for path in layers if path not in total]
    if unused:
        raise ConfigError(f"The loss does not depend on {len(unused)} adapted layer(s), {unused[0]} for one.")
    return {path: mean_over_ranks(total[path] / count) for path in layers}


@torch.no_grad()
def _factors(config: Any, gradient_OI: Tensor) -> tuple[list[Tensor], float]:
    """Return B, R and A, and the fraction of the step's squared norm in them."""
    step = -config.learning_rate * (gradient_OI.sign() if config.first_step == "adamw" else gradient_OI)
    U, S, Vh = top_singular(step, config.r)
    share = float(S.square().sum() / step.square().sum().clamp_min(torch.finfo(step.dtype).tiny))
    factors = [U.contiguous(), torch.diag(S), Vh.contiguous()]
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        for factor in factors:
            dist.broadcast(factor, src=0)
    return factors, share


@torch.no_grad()
def _set_factors(layer: LoRASBLayer, adapter_name: str, factors: list[Tensor]) -> None:
    for role, value in zip("BRA", factors, strict=True):
        layer.tensor(role, adapter_name).copy_(value)
