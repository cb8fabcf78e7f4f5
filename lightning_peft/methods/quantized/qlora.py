"""QLoRA: low-rank adapters on every linear layer of a base in 4 bits.

Dettmers et al. 2023, arXiv:2305.14314.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from typing_extensions import override

from lightning_peft.core.blocks import find_structure
from lightning_peft.core.draw import Draw
from lightning_peft.core.names import named_parameters
from lightning_peft.core.scope import match_names
from lightning_peft.core.trainable import set_flags
from lightning_peft.errors import ConfigError, ScopeError, suggest
from lightning_peft.methods.arguments import is_whole
from lightning_peft.methods.base import MethodCallback
from lightning_peft.methods.build import when_built

__all__ = ["QLoRA", "adapted_layers"]

_MARK = "_lightning_peft_qlora"


def adapted_layers(root: nn.Module, layers: str | Sequence[str]) -> list[str]:
    """Return the paths of the quantised linear layers below ``root`` that ``layers`` names, in model order.

    Args:
        root: A model with quantised layers.
        layers: ``"all"``, module paths, globs, ``re:PATTERN``, ``class:NAME``.

    Raises:
        ConfigError: If no layer is quantised.
        ScopeError: If an entry names no quantised layer.
    """
    from lightning_peft.precision.layers import quantized_layers

    paths = [path for path, _ in quantized_layers(root)]
    if not paths:
        raise ConfigError(
            "QLoRA: no layer of the model is quantised. Add plugins=[QuantizedPrecision('nf4')] to the Trainer, or "
            "load the model with transformers' BitsAndBytesConfig."
        )
    structure = find_structure(root)
    chosen: set[str] = set()
    for entry in [layers] if isinstance(layers, str) else layers:
        names = set(match_names(entry, structure))
        found = [path for path in paths if f"{path}.weight" in names]
        if not found:
            raise ScopeError(f"layers={entry!r} names no quantised linear layer. {suggest(entry, paths)}")
        chosen.update(found)
    return [path for path in paths if path in chosen]


class QLoRA(MethodCallback):
    """Train low-rank adapters beside a base whose linear layers are quantised (``QuantizedPrecision``).

    Weights take about a quarter of their bfloat16 size, gradients and optimizer state only exist for the adapters
    (``rank * (in + out)`` numbers per layer); a step costs the forward and backward pass through the whole base, plus
    dequantising each weight twice. The run, its checkpoints and its resumes hold adapters and no quantised weight.

    Use it to tune a model that does not fit in bfloat16. One that does trains faster, and merges without loss.

    Args:
        rank: Of the adapters.
        alpha: The adapters' product is scaled by ``alpha / rank``.
        dropout: On the adapters' input, in ``[0, 1)``.
        layers: Which quantised layers get an adapter: ``"all"``, as in the paper, or paths and patterns.
        always: What trains beside the adapters. A new classification head must: ``["head"]``.
        seed: Of the adapters' initial values; the same on all ranks, whatever the global seed.

    Raises:
        ConfigError: If a number is out of range. From the fit, if no layer is quantised.
        ScopeError: From the fit, if ``layers`` names no quantised layer.

    Example:
        >>> from lightning_peft import QLoRA
        >>> QLoRA(rank=16).alpha
        16

    Paper:
        T. Dettmers, A. Pagnoni, A. Holtzman, L. Zettlemoyer: QLoRA: Efficient Finetuning of Quantized LLMs,
        NeurIPS 2023, arXiv:2305.14314, Section 4: adapters on all linear layers, rank 64, alpha 16.

    Differs from the paper:
        The paper's paged optimizer is a choice of yours: ``bitsandbytes.optim.PagedAdamW8bit``.
    """

    def __init__(
        self,
        rank: int = 64,
        alpha: float = 16,
        dropout: float = 0.1,
        layers: str | list[str] = "all",
        always: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        super().__init__(scope="adapters", always=always, redraw="never", state="keep", seed=seed)
        if not is_whole(rank, 1):
            raise ConfigError(f"rank={rank!r}: a whole number from 1 on.")
        if not alpha > 0:
            raise ConfigError(f"alpha={alpha!r} must be above 0.")
        if not 0 <= dropout < 1:
            raise ConfigError(f"dropout={dropout!r} must be in [0, 1).")
        self.rank = int(rank)
        self.alpha = alpha
        self.dropout = dropout
        self.layers = layers if isinstance(layers, str) else list(layers)

    def select(self, draw: Draw) -> list[str]:
        """All adapters."""
        return list(self.units)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)

        def build() -> None:
            from lightning_peft.precision.plugin import QuantizedPrecision

            plugin = trainer.precision_plugin
            if isinstance(plugin, QuantizedPrecision):
                plugin.prepare(pl_module)
            self.inject(pl_module)

        when_built(pl_module, build)

    def inject(self, root: nn.Module) -> list[str]:
        """Put adapters on the quantised layers below ``root``; a second call finds them there and does nothing.

        Returns:
            The layers' paths.
        """
        settings = self.settings()
        done: dict[str, Any] | None = root.__dict__.get(_MARK)
        if done is not None and done["paths"] and all(_has_adapter(root, path) for path in done["paths"]):
            if done["settings"] != settings:
                raise ConfigError(
                    f"The model has adapters of {done['settings']}, and this QLoRA asks for {settings}: build the "
                    "model anew, or use the same settings."
                )
            return done["paths"]
        from peft import LoraConfig, inject_adapter_in_model

        from lightning_peft.precision.layers import adopt

        paths = adapted_layers(root, self.layers)
        adopt(root)
        flags = {name: parameter.requires_grad for name, parameter in named_parameters(root).items()}
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # pyright: ignore[reportArgumentType]
            lora_dropout=self.dropout,
            target_modules="|".join(re.escape(path) for path in paths),
        )
        mesh = root.__dict__.pop("_device_mesh", None)  # peft takes Lightning's for one of transformers
        try:
            with torch.random.fork_rng():
                torch.manual_seed(self.seed)
                inject_adapter_in_model(config, root)
        finally:
            root.__dict__["_device_mesh"] = mesh
        after = named_parameters(root)
        set_flags(after, {_inside(name, paths, after): flag for name, flag in flags.items()})
        object.__setattr__(root, _MARK, {"settings": settings, "paths": paths})
        return paths


def _inside(name: str, paths: list[str], after: dict[str, nn.Parameter]) -> str:
    """Where a parameter is found after its layer was wrapped by an adapter layer."""
    path, _, leaf = name.rpartition(".")
    moved = f"{path}.base_layer.{leaf}"
    return moved if path in paths and moved in after else name


def _has_adapter(root: nn.Module, path: str) -> bool:
    try:
        return hasattr(root.get_submodule(path), "base_layer")
    except AttributeError:
        return False
