"""Low rank that grows while it trains: what IncreLoRA and TriAdaptLoRA share.

An adapter is cut into slots: the first of rank ``r``, each further one of rank ``step_r``, up to ``max_r``. All slots
of a layer exist from the start, because an optimizer, a DDP wrapper and a checkpoint know only parameters that do; a
slot that has not been reached does not take part in the forward pass, does not train and has no optimizer state. It
costs its values alone: ``step_r * (in + out)`` numbers of memory and of checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_peft.adapters.adapter import Adapter
from lightning_peft.adapters.drivers import Driver
from lightning_peft.adapters.native.tuner import NativeConfig, NativeLayer
from lightning_peft.errors import ConfigError

__all__ = ["GrowingAdapter", "GrowingConfig", "GrowingLayer", "GrowthDriver", "driver_of", "top"]

Sink = Callable[[Tensor, Tensor], None]
D = TypeVar("D", bound="GrowthDriver")


@dataclass
class GrowingConfig(NativeConfig):
    """Options of adapters that grow.

    Args:
        r: Rank that every layer starts with.
        target_r: Mean rank over all layers at which growing ends.
        step_r: Rank that a layer gains when it grows.
        max_r: Rank beyond which no layer grows; its values are allocated from the start. None: four times
            ``target_r``, or as much as the layer has.
        alpha: The product is scaled by ``alpha / rank``, with the rank that the layer has at the time.
        start_step: Optimizer steps before the first growth.
        period_steps: Optimizer steps from one growth to the next.
        orthogonality: Weight of the regulariser that keeps the outer factors near orthogonal; 0 for none.
    """

    r: int = field(default=1)
    target_r: int = field(default=8)
    step_r: int = field(default=1)
    max_r: int | None = field(default=None)
    alpha: float = field(default=16.0)
    start_step: int = field(default=0)
    period_steps: int = field(default=100)
    orthogonality: float = field(default=0.1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_rank()
        for name, low in (("target_r", 1), ("step_r", 1), ("start_step", 0), ("period_steps", 1)):
            self._check_whole(name, low)
        self._check_number("alpha", 0.0, float("inf"), low_included=False)
        self._check_number("orthogonality", 0.0, float("inf"))
        if self.target_r < self.r:
            raise ConfigError(f"{type(self).__name__}: target_r={self.target_r} is less than r={self.r}.")
        if self.max_r is not None:
            self._check_whole("max_r", 1)
            if self.max_r < self.target_r:
                raise ConfigError(
                    f"{type(self).__name__}: max_r={self.max_r} is less than target_r={self.target_r}, the mean over "
                    "all layers."
                )

    def _check_whole(self, name: str, low: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ConfigError(f"{type(self).__name__}: {name}={value!r} is no integer of at least {low}.")

    def num_slots(self, widest: int) -> int:
        """Return how many slots a layer has whose weight is of rank ``widest`` at most."""
        limit = min(4 * self.target_r if self.max_r is None else self.max_r, widest)
        return 1 + max(0, limit - self.r) // self.step_r

    def rank(self, slots: int) -> int:
        """Return the rank of the first ``slots`` slots."""
        return self.r + (slots - 1) * self.step_r


class GrowingLayer(NativeLayer):
    """A base layer with adapters of several slots; ``allocated`` of them count, ``opened`` of them take part.

    A subclass names the roles of a slot (``slot_roles``) and their shapes; the tensor of role X in slot i is of role
    ``Xi``. Those of ``gates`` train when their slot is allocated, the others when it is opened.
    """

    frozen = ("slots",)
    slot_roles: ClassVar[tuple[str, ...]] = ()
    gates: ClassVar[tuple[str, ...]] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._counts: dict[str, tuple[int, int]] = {}
        self.sinks: dict[str, Sink] = {}
        super().__init__(*args, **kwargs)
        self.register_load_state_dict_post_hook(_notice_counts)

    def num_slots(self, config: Any) -> int:
        """Return how many slots there are."""
        return config.num_slots(min(self.in_features, self.out_features))

    def slot_shapes(self, config: Any, slot: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of each role of a slot."""
        raise NotImplementedError

    def shapes(self, config: Any) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all slots, and of the two counts."""
        sizes: dict[str, tuple[int, ...]] = {"slots": (2,)}
        for slot in range(self.num_slots(config)):
            sizes.update({f"{role}{slot}": shape for role, shape in self.slot_shapes(config, slot).items()})
        return sizes

    def update_layer(self, adapter_name: str, config: Any, path: str) -> None:
        """Add an adapter; roles of slots that no other adapter of the layer has are made first."""
        self.check_fit(config, path)
        roles = [f"{role}{slot}" for slot in range(self.num_slots(config)) for role in self.slot_roles]
        new = tuple(role for role in roles if role not in self.trained)
        self.trained = (*self.trained, *new)  # type: ignore[misc]
        self.adapter_layer_names = tuple(self.prefix + role for role in self.trained)
        for role in new:
            setattr(self, self.prefix + role, nn.ParameterDict())
        super().update_layer(adapter_name, config, path)
        self._counts[adapter_name] = (1, 1)

    def initial(self, config: Any, weight_OI: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Return A and B normal with standard deviation 0.02, one slot that counts, and zeros elsewhere."""
        values: dict[str, Tensor] = {"slots": torch.ones(2)}
        for role, shape in self.shapes(config).items():
            if role[0] in "AB":
                values[role] = torch.randn(shape, generator=generator, dtype=torch.float64) * 0.02
        return values

    def counts(self, adapter_name: str) -> tuple[int, int]:
        """Return how many slots are allocated, and how many opened."""
        return self._counts[adapter_name]

    @torch.no_grad()
    def set_counts(self, adapter_name: str, allocated: int, opened: int) -> None:
        """Say how many slots are allocated and opened, here and in what is saved."""
        self._counts[adapter_name] = (allocated, opened)
        self.tensor("slots", adapter_name).copy_(torch.tensor([allocated, opened]))

    def opened(self, role: str, adapter_name: str) -> list[Tensor]:
        """Return the tensors of a role of all opened slots."""
        return [self.tensor(f"{role}{slot}", adapter_name) for slot in range(self._counts[adapter_name][1])]

    def scaling(self, adapter_name: str) -> float:
        """Return ``alpha / rank``, as the authors' code does with a small number added to the rank."""
        config: Any = self.settings[adapter_name]
        return config.alpha / (config.rank(self._counts[adapter_name][0]) + 1e-5)

    def core(self, adapter_name: str) -> Tensor:
        """Return the middle factor, a matrix or a diagonal, without the scaling."""
        raise NotImplementedError

    def delta(self, adapter_name: str, x: Tensor) -> Tensor:
        """Return ``scaling * B core A x``, and show input and gradient to whoever scores the layer."""
        A, B = torch.cat(self.opened("A", adapter_name)), torch.cat(self.opened("B", adapter_name), dim=1)
        core = self.core(adapter_name) * self.scaling(adapter_name)
        y = self.mix(self.mix(self.multiply(x, A), core), B)
        sink = self.sinks.get(adapter_name)
        if sink is not None and y.requires_grad:
            inputs = x.detach()
            y.register_hook(lambda grad: sink(inputs, grad))
        return y

    def delta_matrix(self, adapter_name: str) -> Tensor:
        """Return ``scaling * B core A``."""
        A, B = torch.cat(self.opened("A", adapter_name)), torch.cat(self.opened("B", adapter_name), dim=1)
        core = self.core(adapter_name) * self.scaling(adapter_name)
        return (B * core if core.ndim == 1 else B @ core) @ A


def _notice_counts(layer: Any, _: Any) -> None:
    for name in layer.settings:
        values = layer.tensor("slots", name)
        if not values.is_meta:
            allocated, opened = (int(value) for value in values.tolist())
            layer._counts[name] = (allocated, opened)


class GrowthDriver(Driver):
    """Lets layers grow at fixed optimizer steps; a method says which.

    All processes decide alike: from weights, or from scores that are averaged over them. What is planned, what has
    ``requires_grad`` and what the optimizer steps stays one set: a slot is a unit of the adapter that is dropped as
    long as it has not been reached.
    """

    allocates = True
    sees_whole_parameters = True
    advances = False
    """Whether the slot next in line trains already, behind a gate that is nearly shut and does not."""

    def __init__(self, handle: Any, adapter_name: str) -> None:
        super().__init__(handle, adapter_name)
        self.layers: dict[str, GrowingLayer] = {
            path: module
            for path, module in handle.get_base_model().named_modules()
            if isinstance(module, GrowingLayer) and adapter_name in module.settings
        }
        self.config: Any = handle.peft_config[adapter_name]
        self.total_steps: int | None = None
        self._units: dict[str, tuple[str, int, bool]] | None = None
        self._last_step = -1
        self._settle()

    # ------------------------------------------------------------------ what a method says

    def choose(self, step: int, candidates: list[str], limit: int) -> list[str]:
        """Return which of the layers that can still grow do so, ``limit`` of them at most."""
        raise NotImplementedError

    def observe(self) -> None:
        """Look at scores after an optimizer step, as long as there is something to grow."""

    def opened(self, path: str) -> None:
        """Called when a slot was opened, or a layer's last one was allocated."""

    # ------------------------------------------------------------------ how far it is

    @property
    def ranks(self) -> dict[str, int]:
        """Path of each layer -> its rank now."""
        return {path: self.config.rank(layer.counts(self.adapter_name)[0]) for path, layer in self.layers.items()}

    @property
    def left(self) -> int:
        """How many slots the budget still has."""
        return (self.config.target_r * len(self.layers) - sum(self.ranks.values())) // self.config.step_r

    @property
    def candidates(self) -> list[str]:
        """Paths of the layers that can grow; none if the budget is used up."""
        if self.left < 1:
            return []
        name = self.adapter_name
        return [path for path, layer in self.layers.items() if layer.counts(name)[0] < layer.num_slots(self.config)]

    def _settle(self) -> None:
        """Open the slot next in line of each layer that may get one, and shut those that will get none."""
        growing = set(self.candidates) if self.advances else set()
        for path, layer in self.layers.items():
            allocated, opened = layer.counts(self.adapter_name)
            wanted = allocated + (path in growing)
            if wanted != opened:
                layer.set_counts(self.adapter_name, allocated, wanted)

    # ------------------------------------------------------------------ the run

    def cut(self, names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
        """One unit per slot of each layer, and one per gate."""
        any_layer = next(iter(self.layers.values()))
        tail = re.compile(rf"(.*)\.{any_layer.prefix}([A-Z])(\d+)\.{re.escape(self.adapter_name)}")
        self._units = {}
        cut: dict[str, list[str]] = {}
        for name in names:
            match = tail.fullmatch(name)
            if match is None:
                cut.setdefault(self.adapter_name, []).append(name)
                continue
            owner, role, slot = match[1], match[2], int(match[3])
            path = max((p for p in self.layers if owner == p or owner.endswith(f".{p}")), key=len)
            is_gate = role in any_layer.gates
            unit = f"{owner}.{'gate' if is_gate else 'slot'}{slot}"
            self._units[unit] = (path, slot, is_gate)
            cut.setdefault(unit, []).append(name)
        return {unit: tuple(members) for unit, members in cut.items()}

    @property
    def dropped(self) -> frozenset[str]:  # type: ignore[override]
        """Units of slots that have not been reached."""
        counts = {path: layer.counts(self.adapter_name) for path, layer in self.layers.items()}
        units = (self._units or {}).items()
        return frozenset(unit for unit, (path, slot, is_gate) in units if slot >= counts[path][0 if is_gate else 1])

    def prepare_optimizers(self, trainer: Trainer) -> None:
        """Note how long the run is."""
        steps = trainer.estimated_stepping_batches
        self.total_steps = int(steps) if steps not in (-1, float("inf")) else None
        if trainer.global_step == 0:
            self._last_step = -1

    def stepped(self, step: int) -> None:
        """Grow, if it is time."""
        again, self._last_step = step == self._last_step, step  # once, if there are several optimizers
        if again or not self.candidates:
            return
        self.observe()
        if step <= self.config.start_step or step % self.config.period_steps:
            return
        chosen = self.choose(step, self.candidates, self.left)
        for path in chosen:
            layer = self.layers[path]
            allocated, opened = layer.counts(self.adapter_name)
            layer.set_counts(self.adapter_name, allocated + 1, max(opened, allocated + 1))
        self._settle()
        for path in chosen:
            self.opened(path)
        self.allocations += 1

    @property
    def adds_loss(self) -> bool:  # type: ignore[override]
        """Whether the regulariser has a weight."""
        return self.config.orthogonality > 0

    def loss(self) -> Tensor:
        """Mean over all outer factors of the Frobenius norm of ``A A^T - 1`` and ``B^T B - 1``, weighted."""
        terms = []
        for layer in self.layers.values():
            A = torch.cat(layer.opened("A", self.adapter_name))
            B = torch.cat(layer.opened("B", self.adapter_name), dim=1)
            for product in (A @ A.T, B.T @ B):
                terms.append(torch.linalg.norm(product - torch.eye(len(product)).to(product)))
        return self.config.orthogonality * torch.stack(terms).mean()

    def state_dict(self) -> dict[str, Any]:
        """How often it grew, and when; how far each layer is lies in the layers' own buffers."""
        return {"allocations": self.allocations, "last_step": self._last_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""
        self.allocations, self._last_step = state["allocations"], state["last_step"]


class GrowingAdapter(Adapter):
    """An adapter that grows, as a callback."""

    @property
    def ranks(self) -> dict[str, int]:
        """Path below the target of each layer -> its rank now.

        Raises:
            ConfigError: If no fit, validation or test has put the adapter in yet.
        """
        assert self.handle is not None
        assert isinstance(self._driver, GrowthDriver)
        return self._driver.ranks


def driver_of(handle: Any, adapter_name: str, driver_cls: type[D]) -> D:
    """Return what lets an adapter grow; always the same object, which knows how far it is."""
    drivers: dict[str, D] = handle.base_model.__dict__.setdefault("_growth_drivers", {})
    if adapter_name not in drivers:
        drivers[adapter_name] = driver_cls(handle, adapter_name)
    return drivers[adapter_name]


def top(scores: Sequence[float], paths: Sequence[str], count: int) -> list[str]:
    """Return the ``count`` paths of the highest scores; of equal ones the earlier."""
    order = sorted(range(len(paths)), key=lambda index: (-scores[index], index))
    return [paths[index] for index in order[:count]]
