"""MoSA: a bottleneck adapter whose up-projection is split into sparse experts, trained one at a time, used as one.

The entries of W_up are dealt out at random to E experts with equal shares. In training each adapter uses one expert,
drawn anew for each batch: ``y + s · (M_e * W_up) f(W_down h)``; in use all of them: ``y + s · (W_up / E) f(W_down h)``,
which is the mean of what the experts say. A second draw on the same batch is to give the same predictions (symmetric
Kullback-Leibler divergence). Zhang et al.: Split & Merge, 2023, arXiv:2312.02923.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from lightning_peft.adapters.adapter import Adapter
from lightning_peft.adapters.drivers import Driver
from lightning_peft.adapters.injection import Injected
from lightning_peft.adapters.native.bottleneck import BottleneckConfig, BottleneckLayer
from lightning_peft.adapters.native.tuner import NativeTuner, register
from lightning_peft.core.draw import draw_generator
from lightning_peft.errors import ConfigError

__all__ = ["MoSA", "MoSAConfig", "deal_out", "symmetric_divergence"]


@dataclass
class MoSAConfig(BottleneckConfig):
    """MoSA: bottleneck adapters whose up-projection consists of sparse experts.

    Args:
        experts: How many, at least 2.

    Paper: Zhang et al. 2023, arXiv:2312.02923.

    Differs from the paper: one matrix holds all experts, since each entry belongs to one; biases are shared.
    """

    form: Literal["series", "parallel"] = field(default="parallel")
    activation: str = field(default="gelu")
    scaling: float = field(default=0.1)
    experts: int = field(default=4)

    method: ClassVar[str] = "mosa"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.experts, int) or isinstance(self.experts, bool) or self.experts < 2:
            raise ConfigError(f"MoSAConfig: experts={self.experts!r} is no integer of at least 2.")


def deal_out(shape: tuple[int, ...], experts: int, generator: torch.Generator) -> Tensor:
    """Return the expert that each entry of a matrix belongs to; their shares differ by one entry at most."""
    count = shape[0] * shape[1]
    return (torch.randperm(count, generator=generator) % experts).reshape(shape).to(torch.int16)


def symmetric_divergence(first: Tensor, second: Tensor) -> Tensor:
    """Return half the sum of KL divergences of predictions, each from the other held fixed, averaged over rows."""
    rows = [logits.float().reshape(-1, logits.shape[-1]) for logits in (first, second)]
    logs = [functional.log_softmax(logits, dim=-1) for logits in rows]
    pairs = ((logs[0], logs[1].detach()), (logs[1], logs[0].detach()))
    return sum(functional.kl_div(*pair, reduction="batchmean", log_target=True) for pair in pairs) / 2  # type: ignore


class MoSALayer(BottleneckLayer):
    """A frozen module with MoSA adapters."""

    prefix = "mosa_"

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, path: str) -> None:
        self.chosen: dict[str, int] = {}
        self._experts: dict[str, Tensor] = {}
        super().__init__(base_layer, adapter_name, config, path)

    def update_layer(self, adapter_name: str, config: Any, path: str) -> None:
        """Add an adapter, with its initial values and its experts."""
        super().update_layer(adapter_name, config, path)
        generator = draw_generator(config.seed, 0, f"{path} experts")
        self._experts[adapter_name] = deal_out(self.shapes(config)["up"], config.experts, generator)

    def experts(self, adapter_name: str) -> Tensor:
        """Return the expert that each entry of the up-projection belongs to."""
        device = self.tensor("up", adapter_name).device
        self._experts[adapter_name] = self._experts[adapter_name].to(device)
        return self._experts[adapter_name]

    def projections(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """Return W_down (r, in), and of W_up (out, r) one expert in training, the mean of all otherwise."""
        down, up = self.tensor("down", adapter_name), self.tensor("up", adapter_name)
        count: int = getattr(self.settings[adapter_name], "experts")  # noqa: B009
        if not self.training:
            return down, up / count
        expert = self.chosen.get(adapter_name)
        if expert is None:  # without MoSA's callback
            expert = int(torch.randint(count, ()))
        return down, up * (self.experts(adapter_name) == expert)


class MoSATuner(NativeTuner):
    """Puts MoSA into a model."""

    prefix = "mosa_"
    tuner_layer_cls = MoSALayer


register("mosa", MoSAConfig, MoSATuner)


class _Draws(Driver):
    """Draws experts for each batch, and for a second pass over it."""

    def __init__(self, adapter: Injected, seed: int, weight: float) -> None:
        super().__init__(adapter.handle, adapter.adapter_name)
        self._seed, self._weight, self._batches = seed, weight, 0
        self._model: Any = self.handle.get_base_model()
        self._layers = {path: m for path, m in self._model.named_modules() if isinstance(m, MoSALayer)}
        self._hook: Any = None
        self._seen: list[tuple[Tensor, Tensor]] | None = None

    @property
    def adds_loss(self) -> bool:  # type: ignore[override]
        """Whether the second pass has a weight."""
        return self._weight > 0

    @property
    def sees_whole_parameters(self) -> bool:  # type: ignore[override]
        """Whether the target is run a second time inside its own forward pass."""
        return self._weight > 0

    def _draw(self, number: int) -> None:
        for path, layer in self._layers.items():
            if self.adapter_name in layer.settings:
                generator = draw_generator(self._seed, self._batches, f"{path} {number}")
                count = getattr(layer.settings[self.adapter_name], "experts")  # noqa: B009
                layer.chosen[self.adapter_name] = int(torch.randint(count, (), generator=generator))

    @override
    def started(self) -> None:
        if self._weight > 0 and self._hook is None:
            checkpointed = [
                path
                for path, module in self._model.named_modules()
                if getattr(module, "gradient_checkpointing", False) or type(module).__name__ == "CheckpointWrapper"
            ]
            if checkpointed:
                raise ConfigError(
                    f"MoSA: {checkpointed[0] or 'the model'} recomputes activations in the backward pass, when the "
                    "experts of the second pass are drawn already. Use consistency=0 or no activation checkpointing."
                )
            self._hook = self._model.register_forward_hook(self._after_forward, with_kwargs=True)

    @override
    def batch(self, batch: Any) -> None:
        self._seen = []
        if self._model.training:
            self._batches += 1
            self._draw(1)

    def _after_forward(self, model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if self._seen is None or not model.training or not torch.is_grad_enabled():
            return
        seen, self._seen = self._seen, None  # the second pass is not looked at again
        self._draw(2)
        again = model(*args, **{name: value for name, value in kwargs.items() if name != "labels"})
        self._draw(1)
        seen.append((_logits(output), _logits(again)))
        self._seen = seen

    @override
    def loss(self) -> Tensor | None:
        seen, self._seen = self._seen or [], None
        if not torch.is_grad_enabled():  # another method of the run only looks at the loss
            return None
        if len(seen) != 1:
            raise ConfigError(
                f"MoSA looks at the predictions of one call of the target per training step, and there were "
                f"{len(seen)}. Use consistency=0."
            )
        return self._weight * symmetric_divergence(*seen[0])

    @override
    def finished(self) -> None:
        self._seen = None
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"batches": self._batches}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._batches = state["batches"]


def _logits(output: Any) -> Tensor:
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise ConfigError(f"MoSA needs a target that returns logits, not a {type(output).__name__}: use consistency=0.")
    return logits


class MoSA(Adapter):
    """Train a bottleneck adapter in sparse parts, one drawn for each batch, and use it whole.

    Parameters and cost in use are those of a parallel adapter. Each training step runs the model a second time unless
    ``consistency`` is 0. Cannot be merged into the base.

    Use it in place of a bottleneck adapter that overfits few data.

    Args:
        rank: Width of the bottleneck.
        experts: Number of parts of the up-projection, at least 2.
        consistency: Weight of the divergence between predictions of two draws; 0 saves the second pass.
        form: ``"parallel"``: beside a module; ``"series"``: after it.
        layers: Which modules: ``"feed_forward"`` and ``"attention"`` by the names that models give them; or paths,
            globs, ``re:`` or ``class:`` patterns of modules, ``!`` before what to leave out.
        activation: ``"relu"``, ``"gelu"``, ``"silu"``, ``"tanh"`` or ``"none"``.
        scaling: What the up-projection is multiplied by.
        bias: Whether both projections have a bias.
        dropout: On the adapters' input, in ``[0, 1)``.
        target: Path of the submodule that gets the adapters.
        adapter_name: Name of the adapter.
        always: What trains beside it although it lies inside the target.
        seed: Of the initial values, the parts and the draws; the same on all ranks.

    Example:
        >>> from lightning_peft import MoSA
        >>> MoSA(rank=16, experts=2).method
        'mosa'

    Paper:
        Q. Zhang et al.: Split & Merge: Unlocking the Potential of Visual Adapters via Sparse Training, 2023,
        arXiv:2312.02923.

    Differs from the paper:
        One matrix holds all experts, since each entry belongs to one, and biases are shared: the authors' code keeps a
        full copy per expert and averages them. No norm of the adapter's own. As in the authors' runs, only the
        up-projection is split, and there is no divergence of hidden states.
    """

    def __init__(
        self,
        rank: int = 64,
        experts: int = 4,
        consistency: float = 1.0,
        form: Literal["series", "parallel"] = "parallel",
        layers: str | list[str] = "feed_forward",
        activation: Literal["relu", "gelu", "silu", "tanh", "none"] = "gelu",
        scaling: float = 0.1,
        bias: bool = True,
        dropout: float = 0.0,
        target: str = "model",
        adapter_name: str = "default",
        always: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        config: dict[str, Any] = {"r": rank, "experts": experts, "form": form, "activation": activation}
        config = {**config, "scaling": scaling, "use_bias": bias, "dropout": dropout, "seed": seed}
        super().__init__("mosa", config, target, layers, adapter_name, always, seed)
        if consistency < 0:
            raise ConfigError(f"MoSA: consistency={consistency!r} is negative.")
        self.rank, self.experts, self.consistency, self.form = rank, experts, consistency, form
        self.activation, self.scaling, self.bias, self.dropout = activation, scaling, bias, dropout

    @override
    def make_driver(self, adapter: Injected) -> Driver:
        return _Draws(adapter, self.seed, self.consistency)
