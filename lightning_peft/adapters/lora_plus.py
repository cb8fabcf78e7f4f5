"""LoRA+: LoRA whose matrix ``B`` learns faster than ``A``.

With one learning rate for both, a wide model cannot learn its features efficiently; ``B``, which starts at zero, needs
one that is larger by a constant ratio. S. Hayou, N. Ghosh, B. Yu, arXiv:2402.12354.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Trainer
from typing_extensions import override

from lightning_peft.adapters.adapter import Adapter
from lightning_peft.adapters.drivers import Driver, check_undriven, scale_rates
from lightning_peft.adapters.injection import Injected
from lightning_peft.adapters.presets import lora_config
from lightning_peft.errors import ConfigError

__all__ = ["LoRAPlus", "LoRAPlusDriver"]


class LoRAPlusDriver(Driver):
    """Give ``B`` a learning rate of its own in whatever optimizer the module has built.

    Args:
        adapter: The adapter.
        lr_ratio: Learning rate of ``B`` over that of ``A``.
    """

    def __init__(self, adapter: Injected, lr_ratio: float) -> None:
        super().__init__(adapter.handle, adapter.adapter_name)
        self.lr_ratio = lr_ratio

    @override
    def prepare_optimizers(self, trainer: Trainer) -> None:
        """Cut the parameter groups in two and scale the learning rate of the second, with its schedule."""
        named = self.handle.get_base_model().named_parameters()
        scale_rates(trainer, (p for name, p in named if f".lora_B.{self.adapter_name}." in name), self.lr_ratio)


class LoRAPlus(Adapter):
    """Train LoRA with a larger learning rate for its second matrix ``B`` than for ``A``.

    Costs what LoRA costs. Each parameter group of the module's own optimizer, with its schedule, is cut in two: the
    learning rate that you give holds for ``A`` and all else, ``lr_ratio`` times as much for ``B``.

    Use it to converge faster than LoRA, in wide models most; start from a rate about half of what LoRA had.

    Args:
        rank: Of the update.
        lr_ratio: Learning rate of ``B`` over that of ``A``, 1 or more; larger for harder tasks.
        alpha: The update is scaled by ``alpha / rank``; None: twice the rank.
        dropout: On the adapters' input, in ``[0, 1)``.
        layers: Which layers get one, as a scope.
        init: How it starts: ``"default"`` (zero update), ``"gaussian"``, ``"orthogonal"``, ``"olora"``, ``"pissa"``.
        rank_stabilized: Scale by ``alpha / sqrt(rank)`` (rsLoRA).
        options: Further options of ``peft``'s ``LoraConfig``, such as ``{"use_dora": True}``.
        target: Path of the submodule that gets the adapters.
        adapter_name: Name of the adapter.
        always: What trains beside it although it lies inside the target.
        seed: Of the initial values.

    Raises:
        ConfigError: If ``lr_ratio`` is below 1, or an option is unknown. From the fit, if the optimizer shares its
            groups out among the ranks, or an option needs the loop too (``kasa_config``).

    Example:
        >>> from lightning_peft import LoRAPlus
        >>> LoRAPlus(rank=4, lr_ratio=8).config["r"]
        4

    Paper:
        S. Hayou, N. Ghosh, B. Yu: LoRA+: Efficient Low Rank Adaptation of Large Models, ICML 2024, arXiv:2402.12354.

    Differs from the paper:
        Adapters of embeddings keep the common learning rate; the authors' code has a third one for them.
    """

    def __init__(
        self,
        rank: int = 8,
        lr_ratio: float = 16.0,
        alpha: float | None = None,
        dropout: float = 0.0,
        layers: str | list[str] = "blocks",
        init: str = "default",
        rank_stabilized: bool = False,
        options: dict[str, Any] | None = None,
        target: str = "model",
        adapter_name: str = "default",
        always: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        if not lr_ratio >= 1:
            raise ConfigError(f"LoRAPlus: lr_ratio={lr_ratio!r}: the rate of B over that of A, 1 or more.")
        self.rank, self.lr_ratio, self.alpha, self.dropout, self.init = rank, lr_ratio, alpha, dropout, init
        self.rank_stabilized, self.options = rank_stabilized, options
        config = lora_config(rank, alpha, dropout, init) | {"use_rslora": rank_stabilized} | (options or {})
        super().__init__("lora", config, target, layers, adapter_name, always, seed)

    @override
    def make_driver(self, adapter: Injected) -> Driver:
        check_undriven(adapter.handle, adapter.adapter_name, "LoRAPlus")
        return LoRAPlusDriver(adapter, self.lr_ratio)
