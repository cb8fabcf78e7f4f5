"""Where a method of ``peft`` computes something else than it should, or fails in the first step; told before that."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.core.quantized import is_quantized
from lightning_peft.errors import ConfigError

__all__ = ["check_adapted", "check_complete", "check_quantised"]


def check_complete(config: Any) -> None:
    """Refuse a configuration that lacks what the method cannot do without.

    Raises:
        ConfigError: For X-LoRA without adapters to choose from.
    """
    if _kind(config) == "XLORA" and not config.adapters:
        raise ConfigError("xlora chooses among trained LoRAs: say config={'adapters': {name: folder, ...}}.")


def check_adapted(handle: Any, adapter_name: str, target: str) -> None:
    """Refuse what ``peft`` puts in without a word, and computes wrong.

    Raises:
        ConfigError: For OFT on convolutions (as of peft 0.21: the forward pass does not start at the base's output,
            and computes with another weight than the merged one).
    """
    if _kind(handle.peft_config[adapter_name]) != "OFT":
        return
    for path, module in handle.get_base_model().named_modules():
        if adapter_name in getattr(module, "oft_R", {}) and isinstance(module.get_base_layer(), nn.Conv2d):
            raise ConfigError(
                f"oft on the convolution {path!r} in {target!r}: peft's layer does not compute with the weight that "
                "it merges. Choose linear layers, or another method such as 'boft', 'lora' or 'loha'."
            )


def check_quantised(handle: Any, adapter_name: str, target: str) -> None:
    """Run one layer of each kind and shape forward and backward, where the base is quantised.

    Many methods read the weight of their layer, and fail in the first step on one that is packed.

    Raises:
        ConfigError: If one fails.
    """
    seen = set()
    for path, module in handle.get_base_model().named_modules():
        base = getattr(module, "base_layer", None)
        weight = getattr(base, "weight", None)
        if not isinstance(base, nn.Linear) or not isinstance(weight, Tensor) or not is_quantized(weight):
            continue
        key = (type(module), base.in_features, base.out_features)
        if key in seen or weight.is_meta or hasattr(weight, "_local_tensor"):
            continue
        seen.add(key)
        trainable = [p for p in module.parameters() if p.requires_grad]
        dtype = next((p.dtype for p in trainable if p.is_floating_point()), torch.float32)
        modes = {each: each.training for each in module.modules()}
        module.eval()  # LoRA-SB refuses to train before it has its start
        try:
            with torch.enable_grad(), torch.random.fork_rng():
                inputs = torch.zeros(1, 1, base.in_features, device=weight.device, dtype=dtype)
                total = module(inputs).float().sum()
                if trainable and total.requires_grad:
                    torch.autograd.grad(total, trainable, allow_unused=True)
        except ValueError:  # what a layer misses in its batch
            continue
        except (RuntimeError, TypeError, AttributeError) as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise ConfigError(
                f"{_kind(handle.peft_config[adapter_name]).lower()} cannot work on the quantised layer {path!r} in "
                f"{target!r}: {reason}. Choose 'lora', or leave this layer in full precision."
            ) from error
        finally:
            for each, mode in modes.items():
                each.training = mode


def _kind(config: Any) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))
