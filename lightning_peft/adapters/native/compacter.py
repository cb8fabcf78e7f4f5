"""Compacter: bottleneck adapters whose projections are sums of Kronecker products.

``W = sum_i A_i ⊗ (s_i t_i)`` with n matrices A_i (n, n) shared by all adapters of the model ("slow" weights) and
factors s_i, t_i of rank k of each projection's own ("fast" weights). Karimi Mahabadi, Henderson and Ruder, 2021,
arXiv:2106.04647, section 4.

Shapes: rule (n, n, n); of a projection (in, out): left (n, in / n, k), right (n, k, out / n).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_peft.adapters.adapter import Adapter
from lightning_peft.adapters.native.bottleneck import BottleneckConfig, BottleneckLayer
from lightning_peft.adapters.native.tuner import NativeTuner, register
from lightning_peft.errors import ConfigError, UnsupportedStrategy

__all__ = ["Compacter", "CompacterConfig", "kronecker_sum"]


@dataclass
class CompacterConfig(BottleneckConfig):
    """Compacter: bottleneck adapters of sums of Kronecker products, with one set of small matrices for all of them.

    Args:
        n: Of the products that are summed, and size of the shared matrices; divides r and the widths of all targets.
        factor_rank: Rank of the factors that each projection has of its own.

    Paper: Karimi Mahabadi et al. 2021, arXiv:2106.04647.

    Differs from the paper: the right factor of the up-projection starts at zero, so that the model starts as its base.
    """

    activation: str = field(default="gelu")
    n: int = field(default=4)
    factor_rank: int = field(default=1)

    method: ClassVar[str] = "compacter"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("n", "factor_rank"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"CompacterConfig: {name}={value!r} is no integer of at least 1.")
        if self.r % self.n:
            raise ConfigError(f"CompacterConfig: n={self.n} does not divide r={self.r}.")


def kronecker_sum(rule: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return ``sum_i rule_i ⊗ (left_i right_i)`` (in, out)."""
    n, rows, _ = left.shape
    blocks = torch.einsum("iab,icd->acbd", rule, left @ right)
    return blocks.reshape(n * rows, n * right.shape[-1])


class CompacterLayer(BottleneckLayer):
    """A frozen module with Compacter adapters."""

    prefix = "compacter_"
    trained = ("rule", "down_left", "down_right", "down_bias", "up_left", "up_right", "up_bias")
    compacter_rule: nn.ParameterDict

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, path: str) -> None:
        self.owners: dict[str, CompacterLayer] = {}
        super().__init__(base_layer, adapter_name, config, path)

    def check_fit(self, config: Any, path: str) -> None:
        """Raise a ``ConfigError`` if n does not divide the widths."""
        super().check_fit(config, path)
        wrong = [width for width in self.sizes(config) if width % config.n]
        if wrong:
            raise ConfigError(f"n={config.n} does not divide the {wrong[0]} features of {path}.")

    def shapes(self, config: Any) -> dict[str, tuple[int, ...]]:
        """Return the shapes of factors, biases and shared matrices."""
        n, k, r = config.n, config.factor_rank, config.r
        features_in, features_out = self.sizes(config)
        shapes: dict[str, tuple[int, ...]] = {
            "rule": (n, n, n),
            "down_left": (n, features_in // n, k),
            "down_right": (n, k, r // n),
            "up_left": (n, r // n, k),
            "up_right": (n, k, features_out // n),
        }
        return {**shapes, "down_bias": (r,), "up_bias": (features_out,)} if config.use_bias else shapes

    def initial(self, config: Any, weight_OI: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Return normal shared matrices and Glorot-uniform factors; the last factor is zero."""
        shapes = self.shapes(config)
        values = {"rule": torch.randn(shapes["rule"], generator=generator, dtype=torch.float64) * 0.01}
        for role in ("down_left", "down_right", "up_left"):
            bound = math.sqrt(2.0) * math.sqrt(6.0 / (shapes[role][1] + shapes[role][2]))
            values[role] = (torch.rand(shapes[role], generator=generator, dtype=torch.float64) * 2 - 1) * bound
        return values

    def share(self, adapter_name: str, owner: CompacterLayer) -> None:
        """Use the shared matrices of another layer in place of one's own."""
        del self.compacter_rule[adapter_name]
        self.owners[adapter_name] = owner

    def rule(self, adapter_name: str) -> Tensor:
        """Return the shared matrices.

        Raises:
            UnsupportedStrategy: If they are sharded with the block of their first user.
        """
        rule = self.owners.get(adapter_name, self).tensor("rule", adapter_name)
        n = getattr(self.settings[adapter_name], "n")  # noqa: B009
        if hasattr(rule, "_local_tensor") or rule.numel() != n**3:
            raise UnsupportedStrategy(
                "Compacter's shared matrices are used in every block, and sharding gathers them in one only. Use one "
                "device, 'ddp', or another method."
            )
        return rule

    def projections(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """Return W_down (r, in) and W_up (out, r)."""
        rule = self.rule(adapter_name)
        down, up = (
            kronecker_sum(rule, self.tensor(f"{part}_left", adapter_name), self.tensor(f"{part}_right", adapter_name))
            for part in ("down", "up")
        )
        return down.T, up.T


class CompacterTuner(NativeTuner):
    """Puts Compacter into a model: the first layer holds the shared matrices of all."""

    prefix = "compacter_"
    tuner_layer_cls = CompacterLayer

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        users = (module for module in self.model.modules() if isinstance(module, CompacterLayer))
        owner = next((user for user in users if adapter_name in user.compacter_rule), None)
        super()._create_and_replace(peft_config, adapter_name, target, target_name, parent, *args, **kwargs)
        if owner is not None:
            getattr(parent, target_name).share(adapter_name, owner)


register("compacter", CompacterConfig, CompacterTuner)


class Compacter(Adapter):
    """Train bottlenecks of Kronecker products after the attention and feed-forward sublayers of each block.

    ``factor_rank * (2 * width + 2 * rank) + rank + width`` parameters per adapter and ``n³`` for the model: some per
    cent of a series adapter's. Cannot be merged; two small layers per sublayer in use.

    Use it where series adapters learn well and hundreds of them are kept or sent.

    Args:
        rank: Width of the bottleneck; n divides it.
        n: Number of products that are summed, and size of the shared matrices; divides the model's width.
        factor_rank: Rank of each projection's own factors.
        layers: What gets one behind it: ``"attention"`` and ``"feed_forward"`` are the projections that end these
            sublayers (the second alone: Compacter++); or paths, globs, ``re:`` or ``class:`` patterns of modules.
        activation: ``"relu"``, ``"gelu"``, ``"silu"``, ``"tanh"`` or ``"none"``.
        bias: Whether both projections have a bias.
        dropout: On the adapters' input, in ``[0, 1)``.
        target: Path of the submodule that gets the adapters.
        adapter_name: Name of the adapter.
        always: What trains beside it although it lies inside the target; ``["*norm*"]`` for the paper's trained norms.
        seed: Of the initial values.

    Example:
        >>> from lightning_peft import Compacter
        >>> Compacter(rank=32, layers="feed_forward").method
        'compacter'

    Paper:
        R. Karimi Mahabadi, J. Henderson, S. Ruder: Compacter: Efficient Low-Rank Hypercomplex Adapter Layers, NeurIPS
        2021, arXiv:2106.04647.

    Differs from the paper:
        The last factor starts at zero, so that the model starts exactly as its base. Norms train only if ``always``
        says so. Not under strategies that shard parameters: the shared matrices are used in every block.
    """

    def __init__(
        self,
        rank: int = 64,
        n: int = 4,
        factor_rank: int = 1,
        layers: str | Sequence[str] = ("attention", "feed_forward"),
        activation: Literal["relu", "gelu", "silu", "tanh", "none"] = "gelu",
        bias: bool = True,
        dropout: float = 0.0,
        target: str = "model",
        adapter_name: str = "default",
        always: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        config: dict[str, Any] = {"r": rank, "n": n, "factor_rank": factor_rank, "activation": activation}
        config = {**config, "use_bias": bias, "dropout": dropout, "seed": seed}
        layers = layers if isinstance(layers, str) else list(layers)
        super().__init__("compacter", config, target, layers, adapter_name, always, seed)
        self.rank, self.n, self.factor_rank = rank, n, factor_rank
        self.activation, self.bias, self.dropout = activation, bias, dropout
