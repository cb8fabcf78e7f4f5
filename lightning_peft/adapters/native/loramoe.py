"""LoRAMoE: low-rank experts mixed by a router per token, some of which keep what the base knows.

``h = W x + (alpha / r) · sum_e g_e(x) B_e A_e x`` with ``g(x) = softmax(G x)``. The experts fall into groups, one per
type of data. For a row of type t the sum Q of its tokens' weights is multiplied by ``1 + shift`` for experts of that
group and by ``1 - shift`` for the others, and the localised balancing loss, the squared coefficient of variation of all
products of a batch, makes weights go to the group and be equal within it. S. Dou et al., 2023, arXiv:2312.09979.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from lightning_peft.adapters.adapter import Adapter
from lightning_peft.adapters.drivers import Driver
from lightning_peft.adapters.native.mixtures import MixtureLayer, check_count, rows_of, uniform
from lightning_peft.adapters.native.tuner import NativeConfig, NativeTuner, register
from lightning_peft.adapters.poly import ids_of
from lightning_peft.errors import ConfigError

__all__ = ["LoRAMoE", "LoRAMoEConfig", "balancing_loss"]


@dataclass
class LoRAMoEConfig(NativeConfig):
    """LoRAMoE: experts of low rank and a router per layer. Outside Lightning the balancing loss is not added.

    Args:
        r: Rank of each expert.
        num_experts: Experts per layer, a multiple of ``num_types``.
        alpha: The update is scaled by ``alpha / r``.
        num_types: Types of data; experts ``0 .. num_experts / num_types - 1`` belong to type 0, and so on.
        balance_weight: Weight of the localised balancing loss, summed over the layers; 0 for none.
        balance_shift: How strongly it prefers a type's own experts, in [0, 1); 0 balances all experts.
        task_types: Where in the batch the type of each row is.

    Paper: S. Dou et al. 2023, arXiv:2312.09979.
    """

    r: int = field(default=4)
    num_experts: int = field(default=6)
    alpha: float = field(default=32.0)
    num_types: int = field(default=2)
    balance_weight: float = field(default=0.1)
    balance_shift: float = field(default=0.1)
    task_types: str | int = field(default="task_types")

    method: ClassVar[str] = "loramoe"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_rank()
        check_count(self, "num_experts", 2)
        check_count(self, "num_types", 1)
        self._check_number("alpha", 0.0, float("inf"), low_included=False)
        self._check_number("balance_weight", 0.0, float("inf"))
        self._check_number("balance_shift", 0.0, 1.0)
        if self.num_experts % self.num_types:
            raise ConfigError(
                f"LoRAMoEConfig: num_experts={self.num_experts} cannot be shared among num_types={self.num_types}: "
                "take a multiple."
            )

    def make_driver(self, handle: Any, adapter_name: str) -> LoRAMoEDriver:
        """Return what adds the balancing loss."""
        return LoRAMoEDriver(handle, adapter_name)


def balancing_loss(routed_NE: Tensor, types_N: Tensor, num_types: int, shift: float) -> Tensor:
    """Return the squared coefficient of variation of weights that experts got, shifted towards each row's type.

    Args:
        routed_NE: Sums of router weights over the tokens of each row.
        types_N: Type of each row.
        num_types: How many there are.
        shift: How much more an expert of the row's type should get.
    """
    num_experts = routed_NE.shape[1]
    group_E = torch.arange(num_experts, device=routed_NE.device) // (num_experts // num_types)
    own_NE = types_N.to(routed_NE.device)[:, None] == group_E
    shifted = torch.where(own_NE, routed_NE * (1.0 + shift), routed_NE * (1.0 - shift))
    return shifted.var() / (shifted.mean() ** 2 + 1e-10)


class LoRAMoELayer(MixtureLayer):
    """A linear layer with LoRAMoE adapters."""

    prefix = "loramoe_"
    trained = ("A", "B", "router")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.routed: dict[str, list[Tensor]] = {}
        """Adapter name -> per training call the sums (rows, experts), where the driver wants to know."""
        super().__init__(*args, **kwargs)

    def shapes(self, config: Any) -> dict[str, tuple[int, ...]]:
        """Return the shapes of experts and router."""
        num, rank = config.num_experts, config.r
        return {
            "A": (num, rank, self.in_features),
            "B": (num, self.out_features, rank),
            "router": (num, self.in_features),
        }

    def initial(self, config: Any, weight_OI: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Return A and router uniform, B zero."""
        shapes = self.shapes(config)
        return {role: uniform(shapes[role], generator) for role in ("A", "router")}

    def delta(self, adapter_name: str, x: Tensor) -> Tensor:
        """Return the mixture of the experts' outputs."""
        config: Any = self.settings[adapter_name]
        logits = functional.linear(x, self.tensor("router", adapter_name).to(x.dtype))
        weights = functional.softmax(logits, dim=-1, dtype=torch.float32)
        if self.training and torch.is_grad_enabled() and adapter_name in self.routed:
            self.routed[adapter_name].append(weights.sum(tuple(range(1, weights.ndim - 1))) if x.ndim > 2 else weights)
        mixed = self.experts(x, self.tensor("A", adapter_name), self.tensor("B", adapter_name), weights)
        return mixed * (config.alpha / config.r)

    def delta_matrix(self, adapter_name: str) -> Tensor:
        """Refuse.

        Raises:
            ConfigError: Always: weights of experts depend on the input.
        """
        raise ConfigError("LoRAMoE cannot be merged: which experts add to the weight depends on the input.")


class LoRAMoEDriver(Driver):
    """Adds the localised balancing loss, with types of data from the batch."""

    def __init__(self, handle: Any, adapter_name: str) -> None:
        super().__init__(handle, adapter_name)
        self.layers = [
            module
            for module in handle.get_base_model().modules()
            if isinstance(module, LoRAMoELayer) and adapter_name in module.settings
        ]
        self.config: Any = handle.peft_config[adapter_name]
        self._batch: Any = None

    @property
    def adds_loss(self) -> bool:  # type: ignore[override]
        """Whether the loss has a weight."""
        return self.config.balance_weight > 0

    def started(self) -> None:
        """Let the layers remember their routing."""
        if self.adds_loss:
            for layer in self.layers:
                layer.routed[self.adapter_name] = []

    def finished(self) -> None:
        """Let them forget it."""
        self._batch = None
        for layer in self.layers:
            layer.routed.pop(self.adapter_name, None)

    def batch(self, batch: Any) -> None:
        """Keep the batch for its types, and forget the last one's routing."""
        self._batch = batch
        for layer in self.layers:
            if self.adapter_name in layer.routed:
                layer.routed[self.adapter_name] = []

    def loss(self) -> Tensor:
        """Return the weighted sum of the layers' losses.

        Raises:
            ConfigError: If the batch has no types, or not one per row, or no layer was called with gradients.
        """
        batch, self._batch = self._batch, None
        types = ids_of(batch, self.config.task_types, "task_types")
        if len(types) and not 0 <= int(types.min()) <= int(types.max()) < self.config.num_types:
            raise ConfigError(
                f"task_types={self.config.task_types!r}: types from {int(types.min())} to {int(types.max())}, with "
                f"num_types={self.config.num_types} they go from 0 to {self.config.num_types - 1}."
            )
        terms = []
        for layer in self.layers:
            for routed in layer.routed[self.adapter_name]:
                rows_of(routed, len(types), "task_types")
                terms.append(balancing_loss(routed, types, self.config.num_types, self.config.balance_shift))
            layer.routed[self.adapter_name] = []
        if not terms:
            raise ConfigError(
                "LoRAMoE: no adapted layer was called with gradients in this step: there is nothing to balance. "
                "Reentrant activation checkpointing does this: use_reentrant=False, or balance_weight=0."
            )
        return self.config.balance_weight * torch.stack(terms).sum()


class LoRAMoETuner(NativeTuner):
    """Puts LoRAMoE into a model."""

    prefix = "loramoe_"
    tuner_layer_cls = LoRAMoELayer


register("loramoe", LoRAMoEConfig, LoRAMoETuner)


class LoRAMoE(Adapter):
    """Train low-rank experts, mixed per token by a router, with a loss that keeps some of them for each type of data.

    ``num_experts * rank * (in + out) + num_experts * in`` parameters per layer. All experts run on every token. The
    mixture depends on the input, so that it cannot be merged into the base.

    Use it for instruction tuning on much data, where plain tuning would make the model forget what it knows: questions
    of knowledge are one type, other tasks the second.

    Args:
        rank: Of each expert.
        num_experts: Experts per layer, a multiple of ``num_types``.
        alpha: The update is scaled by ``alpha / rank``.
        num_types: Types of data; the first experts belong to type 0, and so on, in equal shares.
        balance_weight: Weight of the localised balancing loss, summed over the layers; 0 for none.
        balance_shift: How strongly it prefers a type's own experts, in ``[0, 1)``; 0 balances all of them.
        task_types: Where in a training batch the type of each row is: key of a mapping, or position in a sequence. Not
            needed without balancing.
        dropout: On the adapters' input, in ``[0, 1)``.
        layers: Which linear layers get one, as a scope; the paper's are those of feed-forward blocks. Their input is
            (rows, tokens, features) or (rows, features).
        target: Path of the submodule that gets the adapters.
        adapter_name: Name of the adapter.
        always: What trains beside it although it lies inside the target.
        seed: Of the initial values.

    Raises:
        ConfigError: If an argument is out of its range. From a step, if the batch has no types, or not one per row.

    Example:
        >>> from lightning_peft import LoRAMoE
        >>> LoRAMoE(task_types="is_knowledge").method
        'loramoe'

    Paper:
        S. Dou et al.: LoRAMoE: Alleviate World Knowledge Forgetting in Large Language Models via MoE-Style Plugin,
        ACL 2024, arXiv:2312.09979.

    Differs from the paper:
        Not knowingly; any number of types. With several processes each balances its own part of the batch.
    """

    def __init__(
        self,
        rank: int = 4,
        num_experts: int = 6,
        alpha: float = 32.0,
        num_types: int = 2,
        balance_weight: float = 0.1,
        balance_shift: float = 0.1,
        task_types: str | int = "task_types",
        dropout: float = 0.0,
        layers: str | list[str] = "blocks",
        target: str = "model",
        adapter_name: str = "default",
        always: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        self.rank, self.num_experts, self.alpha, self.num_types = rank, num_experts, alpha, num_types
        self.balance_weight, self.balance_shift = balance_weight, balance_shift
        self.task_types, self.dropout = task_types, dropout
        config: dict[str, Any] = {
            "r": rank,
            "num_experts": num_experts,
            "alpha": alpha,
            "num_types": num_types,
            "balance_weight": balance_weight,
            "balance_shift": balance_shift,
            "task_types": task_types,
            "dropout": dropout,
            "seed": seed,
        }
        super().__init__("loramoe", config, target, layers, adapter_name, always, seed)
