"""Scale down intruder dimensions: what a LoRA has put on top of the spectrum that the pretrained weight does not know.

A leading left singular vector of ``W0 + D`` is an *intruder* if its cosine with every left singular vector of ``W0``
is small. Scaling its singular value down brings knowledge back that fine-tuning has displaced, at little cost for the
task. R. Shuttleworth et al.: LoRA vs Full Fine-tuning: An Illusion of Equivalence, 2024, arXiv:2410.21228.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_peft.adapters.drivers import lora_layers
from lightning_peft.adapters.files import changes_base
from lightning_peft.core.quantized import is_quantized
from lightning_peft.core.sharded import is_sharded
from lightning_peft.errors import ConfigError
from lightning_peft.methods.arguments import is_number, is_whole

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["find_intruders", "reduce_intruders", "without_intruders"]


def find_intruders(base_OI: Tensor, tuned_OI: Tensor, top: int, threshold: float) -> list[int]:
    """Return which of the ``top`` leading left singular vectors of ``tuned_OI`` are none of ``base_OI``'s.

    Args:
        base_OI: Pretrained weight.
        tuned_OI: The weight with its update.
        top: Singular vectors that are looked at, largest first.
        threshold: Largest absolute cosine with any vector of the base at which one is an intruder, in ``(0, 1)``.
    """
    base = torch.linalg.svd(base_OI, full_matrices=False).U
    tuned = torch.linalg.svd(tuned_OI, full_matrices=False).U[:, :top]
    return torch.where((tuned.T @ base).abs().amax(1) < threshold)[0].tolist()


def without_intruders(base_OI: Tensor, update_OI: Tensor, intruders: list[int], scale: float) -> Tensor:
    """Return the update after the singular values of ``intruders`` in the tuned weight have been scaled."""
    u, s, v = torch.linalg.svd(base_OI + update_OI, full_matrices=False)
    return update_OI + (scale - 1) * (u[:, intruders] * s[intruders]) @ v[intruders]


@torch.no_grad()
def reduce_intruders(
    handle: PeftModel, adapter_name: str, *, top: int = 10, threshold: float = 0.5, scale: float = 0.75
) -> dict[str, int]:
    """Scale down the intruders of every layer of a LoRA, in place; the rank stays.

    Args:
        handle: ``peft``'s model.
        adapter_name: The adapter.
        top: Leading singular vectors that are looked at, 1 or more.
        threshold: Largest absolute cosine at which one is an intruder, in ``(0, 1)``.
        scale: Factor on an intruder's singular value, in ``[0, 1]``; 1 leaves it, 0 removes it.

    Returns:
        Path of each linear or convolution layer below the target -> number of its intruders.

    Raises:
        ConfigError: If an argument is out of its range, the adapter is not a plain LoRA, or the base is quantised or
            sharded.
    """
    if not is_whole(top, 1) or not is_number(threshold) or not 0 < threshold < 1 or not 0 <= scale <= 1:
        raise ConfigError(
            f"Intruders: top={top!r} is a whole number from 1 on, threshold={threshold!r} lies between 0 and 1, and "
            f"scale={scale!r} from 0 to 1."
        )
    config: Any = handle.peft_config[adapter_name]
    layers = lora_layers(handle, adapter_name)
    option = "use_dora" if getattr(config, "use_dora", False) else changes_base(config.to_dict())
    if not layers or option is not None:
        raise ConfigError(
            "Intruders are found by comparing the weight with and without a plain LoRA; this adapter is "
            + (f"one with {option}." if layers else f"{config.peft_type} or has no linear layer.")
        )
    counts = {}
    for path, layer in layers.items():
        weight = layer.get_base_layer().weight
        a, b = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
        if is_quantized(weight) or is_sharded(weight) or b.shape[1] != len(a):
            raise ConfigError(f"Intruders: the weight of {path} is quantised, sharded, or of grouped convolutions.")
        base_OI = (weight.T if getattr(layer, "fan_in_fan_out", False) else weight.flatten(1)).float()
        factor = layer.scaling[adapter_name]
        update_OI = factor * b.flatten(1).float() @ a.flatten(1).float()
        intruders = find_intruders(base_OI, base_OI + update_OI, top, threshold)
        counts[path] = len(intruders)
        if intruders and scale < 1:
            reduced = without_intruders(base_OI, update_OI, intruders, scale) / factor
            u, s, v = torch.linalg.svd(reduced, full_matrices=False)
            rank = min(len(a), len(s))
            root = s[:rank].sqrt()
            b.flatten(1)[:, rank:] = 0  # where there are more ranks than the weight has
            b.flatten(1)[:, :rank] = u[:, :rank] * root
            a.flatten(1)[:rank] = root[:, None] * v[:rank]
    return counts
