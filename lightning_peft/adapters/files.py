"""Adapters in files: ``peft``'s own format, Lightning checkpoints without the base, merged models."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_peft.adapters.config import config_from_plain
from lightning_peft.adapters.frozen_base import CHECKPOINT_KEY, check_base, without_base
from lightning_peft.adapters.injection import Injected, inject
from lightning_peft.errors import ConfigError

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["changes_base", "export_adapter", "load_from_checkpoint", "merge_adapters"]

_Module = TypeVar("_Module", bound=LightningModule)

_CHANGING_INITS = ("olora", "pissa", "corda", "lora_ga", "loftq")


def changes_base(config: Mapping[str, Any]) -> str | None:
    """Return the option by which a method changes the base when it starts, or None if it does not."""
    init = str(config.get("init_lora_weights", "")).lower()
    if init.startswith(_CHANGING_INITS):
        return f"init_lora_weights={init!r}"
    if config.get("kasa_config"):
        return "kasa_config"
    return None


def export_adapter(adapter: Injected, folder: str | Path) -> Path:
    """Write an adapter as ``peft`` does; ``PeftModel.from_pretrained(base, folder)`` computes the same.

    Args:
        adapter: From :func:`~lightning_peft.adapters.injection.inject`.
        folder: Is made if it is missing.

    Returns:
        The folder that holds ``adapter_config.json``: ``folder``, or the adapter's own below it if it is not called
        ``default``.

    Raises:
        ConfigError: If the method has changed the base.
    """
    option = changes_base(adapter.config)
    if option is not None:
        raise ConfigError(
            f"{option} has changed the base weights when it started: the adapter alone does not fit the original base. "
            "Merge it (merge_adapters), or keep the Lightning checkpoint, which starts the same way."
        )
    folder = Path(folder)
    adapter.handle.save_pretrained(str(folder), selected_adapters=[adapter.adapter_name])
    return folder if adapter.adapter_name == "default" else folder / adapter.adapter_name


def load_from_checkpoint(module_class: type[_Module], path: str | Path, **kwargs: Any) -> _Module:
    """Build a LightningModule with its adapters from a checkpoint that holds no base.

    Args:
        module_class: The user's class. Its constructor, or its ``configure_model``, gives the pretrained base.
        path: A checkpoint file of one device or DDP, or a full one of a sharding strategy.
        kwargs: For the constructor, in place of saved hyperparameters.

    Returns:
        The module in evaluation mode, adapters put in and loaded, on the CPU.

    Raises:
        ConfigError: If the checkpoint was written without :class:`~lightning_peft.Adapter`.
        BaseMismatch: If the base is not the one of the checkpoint.
    """
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    saved = checkpoint.get(CHECKPOINT_KEY)
    if saved is None:
        raise ConfigError(
            f"{Path(path).name} was written without lightning_peft's Adapter. "
            f"Use {module_class.__name__}.load_from_checkpoint."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that keys are missing and unexpected: they are loaded below
        module = module_class.load_from_checkpoint(path, map_location="cpu", strict=False, **kwargs)
    for entry in saved["adapters"]:
        config = config_from_plain(entry["config"])
        inject(module, config, target=entry["target"], adapter_name=entry["adapter_name"], seed=entry["seed"])
    check_base(module, saved["base"])
    with without_base(module, saved["base"]):
        module.load_state_dict(checkpoint["state_dict"], strict=True)
    return module.eval()


def merge_adapters(handle: PeftModel) -> nn.Module:
    """Merge all active adapters into the weights of their base and take the adapter layers out, in place.

    Returns:
        The base, under the names it had before; a Hugging Face model can ``save_pretrained``.

    Raises:
        ConfigError: If the method cannot be merged, or if the base is quantised.
    """
    from lightning_peft.core.quantized import is_quantized

    if any(is_quantized(parameter) for parameter in handle.get_base_model().parameters()):
        raise ConfigError(
            "The base is quantised: rounding the merged weights again would lose most of what the adapter has learnt. "
            "Dequantise first: lightning_peft.precision.layers.merge_adapter(model, dequantize=True)."
        )
    try:
        return handle.merge_and_unload()  # type: ignore[operator]
    except (NotImplementedError, AttributeError) as error:
        kinds = {str(getattr(c.peft_type, "value", c.peft_type)) for c in handle.peft_config.values()}
        raise ConfigError(f"{', '.join(sorted(kinds))} cannot be merged into the base: {error}") from error
