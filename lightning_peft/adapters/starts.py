"""How an adapter that starts from data gets its start, and what a checkpoint has to hold for it.

CorDA and LoRA-GA subtract the product they start with from the base. A checkpoint holds those factors, from which the
changed base is computed again, bit for bit, and a fingerprint of the base as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.adapters.config import config_from_plain
from lightning_peft.core.names import named_parameters
from lightning_peft.core.trainable import parameter_fingerprints
from lightning_peft.errors import ConfigError

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

__all__ = ["FromCheckpoint", "Start", "change_base", "convert_all"]


class Start:
    """How an adapter that starts from data gets its start."""

    asked: dict[str, Any] | None = None
    """The settings that the start was made for, where they are not those of the injection."""

    failure: Exception | None = None
    """What the user's own code raised."""

    def __init__(self) -> None:
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}
        self.base_marks: dict[str, int] = {}

    def put_in(
        self,
        root: nn.Module,
        base: nn.Module,
        config: Any,
        adapter_name: str,
        apply: Callable[[PeftConfig], PeftModel],
    ) -> PeftModel:
        """Put the adapter in by ``apply`` and give it its start.

        Args:
            root: The LightningModule.
            base: The target.
            config: Of the adapter.
            adapter_name: Its name.
            apply: Calls ``peft``, with the random state of the adapter's seed.
        """
        raise NotImplementedError


class FromCheckpoint(Start):
    """The start that a checkpoint holds, on the original base.

    Args:
        entry: What :meth:`~lightning_peft.adapters.injection.Injected.record` returned.
    """

    def __init__(self, entry: Mapping[str, Any]) -> None:
        super().__init__()
        self.asked = entry["start"]["asked"]
        self._config = entry["config"]
        self._factors = {path: (A.clone(), B.clone()) for path, (A, B) in entry["start"]["factors"].items()}

    @override
    def put_in(
        self, root: nn.Module, base: nn.Module, config: Any, adapter_name: str, apply: Callable[[Any], PeftModel]
    ) -> PeftModel:
        saved: Any = config_from_plain(self._config)
        if not self._factors:
            return apply(saved)
        init, saved.init_lora_weights = saved.init_lora_weights, True
        handle = apply(saved)
        handle.peft_config[adapter_name].init_lora_weights = init  # type: ignore[attr-defined]
        self.factors = self._factors
        self.base_marks = change_base(root, handle, adapter_name, self._factors, {})
        return handle


def convert_all(trainer: Trainer, module: LightningModule) -> None:
    """Bring a module into the precision that ``bf16-true``, ``16-true`` and ``64-true`` give it later anyway."""
    if isinstance(trainer.precision_plugin, (HalfPrecision, DoublePrecision)):
        trainer.precision_plugin.convert_module(module)


@torch.no_grad()
def change_base(
    root: nn.Module,
    handle: PeftModel,
    adapter_name: str,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    originals: Mapping[str, Tensor],
) -> dict[str, int]:
    """Start from ``factors``, subtract their product from the original weights, and return marks of both.

    The residual is ``peft``'s, computed in float64 on the CPU, so that a start on any device can be repeated.
    """
    names = {id(parameter): name for name, parameter in named_parameters(root).items()}
    marks = {}
    for path, (A_RI, B_OR) in factors.items():
        layer: Any = handle.get_base_model().get_submodule(path)
        weight = layer.get_base_layer().weight
        if weight.is_meta or hasattr(weight, "_local_tensor"):
            raise ConfigError(
                f"{path!r} has no weights yet or is sharded, and its start has to be subtracted from them: build the "
                "model with its weights, and leave sharding to the strategy."
            )
        original = originals[path] if path in originals else weight.detach().cpu().clone()
        product = layer.scaling[adapter_name] * (B_OR.double() @ A_RI.double())
        residual = original.double() - (product.T if layer.fan_in_fan_out else product)
        weight.copy_(residual.to(weight.dtype))
        layer.lora_A[adapter_name].weight.copy_(A_RI)
        layer.lora_B[adapter_name].weight.copy_(B_OR)
        marks[names[id(weight)]] = hash(tuple(parameter_fingerprints([original, A_RI, B_OR])))
    return marks
