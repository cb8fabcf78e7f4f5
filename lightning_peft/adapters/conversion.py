"""Write an adapter whose initialisation changed the base as an ordinary LoRA over the original base.

PiSSA, OLoRA, CorDA and LoRA-GA start from factors ``A0``, ``B0`` that they take out of the base weight::

    W = W_now + s B0 A0                         what the base was
    W_now + s B A = W + [s B | -s B0] [A ; A0]  what the trained layer computes

so that a LoRA of twice the rank says the same over ``W``. KaSA takes the smallest singular components out of the base
instead, and fits the same form. Equal up to rounding: of the arithmetic, about ``1e-6`` of a weight in float32, and of
``W_now`` where the base is stored in bfloat16, half of its last place.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_peft.core.quantized import is_quantized
from lightning_peft.errors import ConfigError

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

__all__ = ["as_lora_over_the_original_base", "changes_base", "initial_factors", "weights_before"]

_CHANGING_INITS = ("olora", "pissa", "corda", "lora_ga", "loftq")

Factors = dict[str, tuple[Tensor, Tensor]]
"""Path of a layer below the target -> ``(A0, B0)``."""


def changes_base(config: Mapping[str, Any]) -> str | None:
    """Return the option by which a method changes the base when it starts, or None if it does not."""
    init = str(config.get("init_lora_weights", "")).lower()
    if init.startswith(_CHANGING_INITS):
        return f"init_lora_weights={init!r}"
    if config.get("kasa_config") is not None:
        return "kasa_config"
    return None


def weights_before(base: nn.Module, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return copies on the CPU of what :func:`initial_factors` compares with; only KaSA needs them, and only shortly.

    Args:
        base: The target, before the adapter is put in.
        config: Of the adapter, as plain values.
    """
    if config.get("kasa_config") is None:
        return {}
    return {
        path: module.weight.detach().to("cpu", copy=True)
        for path, module in base.named_modules()
        if isinstance(module, nn.Linear)
    }


@torch.no_grad()
def initial_factors(handle: PeftModel, adapter_name: str, before: Mapping[str, Tensor]) -> Factors:
    """Return what the adapter, which has just been put in, took out of the base; on the CPU.

    Args:
        handle: ``peft``'s model.
        adapter_name: The adapter.
        before: From :func:`weights_before`.

    Returns:
        Path of each layer below the target -> ``(A0, B0)``, such that the base was ``W + scaling B0 A0``. Empty where
        the method leaves the base as it is, or where what it took away is not of low rank (LoftQ).
    """
    config: Any = handle.peft_config[adapter_name]
    if getattr(config, "kasa_config", None) is not None:
        return {
            path: _difference(before[path], layer, adapter_name)
            for path, layer in _layers(handle, adapter_name)
            if path in before
        }
    option = changes_base({"init_lora_weights": getattr(config, "init_lora_weights", "")})
    if option is None or "loftq" in option:
        return {}
    return {
        path: (_cpu(layer.lora_A[adapter_name].weight), _cpu(layer.lora_B[adapter_name].weight))
        for path, layer in _layers(handle, adapter_name)
        if adapter_name in layer.lora_A
    }


@torch.no_grad()
def as_lora_over_the_original_base(
    handle: PeftModel, adapter_name: str, start: Mapping[str, tuple[Tensor, Tensor]]
) -> tuple[dict[str, Tensor], PeftConfig]:
    """Return the adapter as a plain LoRA of twice its rank, with a scale of 1.

    Args:
        handle: ``peft``'s model, trained.
        adapter_name: The adapter.
        start: What it took out of the base, from :func:`initial_factors`.

    Returns:
        A state dict of ``handle`` with other LoRA matrices, and the configuration that goes with it: what
        ``handle.save_pretrained(state_dict=...)`` takes.

    Raises:
        ConfigError: If the difference to the original base is not a matrix of low rank, or not known.
    """
    config: Any = copy.deepcopy(handle.peft_config[adapter_name])
    layers = dict(_layers(handle, adapter_name))
    _check_convertible(config, layers, start)
    state = dict(handle.state_dict())
    ranks: dict[str, int] = {}
    for path, layer in layers.items():
        scaling = layer.scaling[adapter_name]
        before_A, before_B = start[path]
        lora_A, lora_B = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
        diagonal = getattr(layer, "lora_diag", {})
        inner = lora_B * diagonal[adapter_name] if adapter_name in diagonal else lora_B
        name = f"base_model.model.{path}"
        state[f"{name}.lora_A.{adapter_name}.weight"] = torch.cat([lora_A, before_A.to(lora_A)])
        state[f"{name}.lora_B.{adapter_name}.weight"] = scaling * torch.cat([inner, -before_B.to(lora_B)], dim=1)
        state.pop(f"{name}.lora_diag.{adapter_name}", None)
        if (bias := f"{name}.lora_B.{adapter_name}.bias") in state:
            state[bias] = scaling * state[bias]
        ranks[path] = len(lora_A) + len(before_A)
    config.r = config.lora_alpha = max(ranks.values())
    config.rank_pattern = {f"^{re.escape(path)}": rank for path, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = dict(config.rank_pattern)
    config.init_lora_weights, config.use_rslora = True, False
    for option in ("corda_config", "lora_ga_config", "kasa_config", "eva_config"):
        if hasattr(config, option):
            setattr(config, option, None)
    return state, config


def _check_convertible(config: Any, layers: Mapping[str, Any], start: Factors | Mapping[str, Any]) -> None:
    option = changes_base({name: getattr(config, name, None) for name in ("init_lora_weights", "kasa_config")})
    reason = None
    if "loftq" in str(option):
        reason = "what it took away is the rounding error of every weight, which no low rank holds"
    elif getattr(config, "use_dora", False):
        reason = "with DoRA the adapter is no sum with the base weight"
    elif any(path not in start for path in layers):
        reason = "the factors that it started from are not known"
    elif any(is_quantized(layer.get_base_layer().weight) for layer in layers.values()):
        reason = "the base was quantised after that, and its rounding has gone into what the adapter learnt"
    if reason is not None:
        raise ConfigError(
            f"{option} has changed the base weights when it started, and cannot be written as a LoRA over the "
            f"original base: {reason}. Merge it (merge_adapters), or keep the Lightning checkpoint."
        )


def _layers(handle: PeftModel, adapter_name: str) -> Iterator[tuple[str, Any]]:
    """Yield the path below the target, and the layer, of each layer that has the adapter."""
    from peft.tuners.lora import LoraLayer

    for path, module in handle.get_base_model().named_modules():
        if isinstance(module, LoraLayer) and adapter_name in module.r:
            yield path, module


def _difference(before: Tensor, layer: Any, adapter_name: str) -> tuple[Tensor, Tensor]:
    """Factor what has gone from a weight: at most as many components as the adapter has."""
    gone = before.float() - layer.get_base_layer().weight.detach().cpu().float()
    rank = layer.r[adapter_name]
    left, values, right = torch.linalg.svd(gone, full_matrices=False)
    return right[:rank].contiguous(), (left[:, :rank] * values[:rank] / layer.scaling[adapter_name]).contiguous()


def _cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
